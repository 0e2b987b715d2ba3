"""The annealed sampler as a diffusers scheduler, and what can be read of a base model's own one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


class AnnealedFlowMatchScheduler(FlowMatchEulerDiscreteScheduler):
    """Diffusers' Euler scheduler with `stochastic_sampling`, whose re-noising honours a generator.

    Most pipelines don't pass their generator on to the scheduler, so that the noise of `stochastic_sampling`
    follows the global seed; this one carries its own.
    """

    generator: torch.Generator | list[torch.Generator] | None = None

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> AnnealedFlowMatchScheduler:
        """Return the annealed sampler of a pipeline that has `scheduler`, drawing from `generator`."""
        annealed = cls.from_config(flow_match_config(scheduler), stochastic_sampling=True)
        annealed.generator = generator
        return annealed

    def step(self, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        """Do the parent's step, with this scheduler's generator if none is passed."""
        return super().step(*args, generator=self.generator if generator is None else generator, **kwargs)


def flow_match_config(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's configuration as `FlowMatchEulerDiscreteScheduler` reads it.

    Of diffusers' `FlowMatch...` classes all that Euler's has too is taken: LCM's, HiDream-I1-Dev's own, is the annealed
    sampler itself. A shift that was set later (`set_shift`) counts. Flow-matching DPM-solver and UniPC (Sana's,
    HiDream's) call the shift `flow_shift`, which `from_config` would drop. A `shift_terminal` (Qwen-Image's .02) is
    left out: it stretches whatever levels are given until the last one is there, and in few steps one so low is a step
    wasted.

    Raises:
        ValueError: a scheduler whose shift can't be read, or that changes the size between steps.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if "shift" in config and any(base.__name__.startswith("FlowMatch") for base in type(scheduler).__mro__):
        if config.get("scale_factors"):
            raise ValueError(
                f"the pipeline's {name} has scale_factors={config['scale_factors']}, by which images grow between "
                "steps, and a rollout has one size; set pipeline.scheduler to one without"
            )
        euler = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        shared = {key: value for key, value in config.items() if key in euler}
        return shared | {"shift": getattr(scheduler, "shift", config["shift"]), "shift_terminal": None}
    flow_shift, dynamic = config.get("flow_shift"), config.get("use_dynamic_shifting")
    if config.get("use_flow_sigmas") and flow_shift is not None and not dynamic:
        return {"num_train_timesteps": config["num_train_timesteps"], "shift": flow_shift}
    raise ValueError(
        f"the pipeline's scheduler is a {name}, whose shift can't be read here; set pipeline.scheduler to the "
        "FlowMatchEulerDiscreteScheduler that the adapter is to be sampled with. Read are FlowMatchEulerDiscrete-, "
        "FlowMatchLCM- and FlowMatchHeunDiscreteScheduler, and solvers with use_flow_sigmas and a flow_shift that "
        "isn't dynamic (DPM-solver, UniPC)"
    )
