"""The annealed sampler as a diffusers scheduler, and what can be read of a base model's own one."""

from __future__ import annotations

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

    Flow-matching DPM-solver and UniPC (Sana's, HiDream's) call the shift `flow_shift`, which `from_config` would drop.
    A `shift_terminal` (Qwen-Image's .02) is left out: it stretches whatever levels are given until the last one is
    there, and in few steps a last one so low is a step wasted.

    Raises:
        ValueError: a scheduler whose shift can't be read.
    """
    config = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return {key: value for key, value in config.items() if not key.startswith("_")} | {"shift_terminal": None}
    if config.get("use_flow_sigmas") and config.get("flow_shift") is not None:
        return {"num_train_timesteps": config["num_train_timesteps"], "shift": config["flow_shift"]}
    raise ValueError(
        f"the pipeline's scheduler is a {type(scheduler).__name__}, whose shift can't be read here; set "
        "pipeline.scheduler to the FlowMatchEulerDiscreteScheduler that the adapter is to be sampled with"
    )
