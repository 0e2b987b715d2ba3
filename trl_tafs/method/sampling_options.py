"""The options of the sampler: how a rollout is drawn, what it explores, how images are shared among prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl_tafs.method.kernels import KERNELS, Kernel
from trl_tafs.method.levels import LEVELS
from trl_tafs.options import (
    Options,
    check_at_least,
    check_at_least_1_or_none,
    check_at_most,
    check_choice,
    check_positive,
    option,
)

MAX_STEPS = 1000  # of a sampler: as many as the schedulers have timesteps


@dataclass
class SamplingOptions(Options):
    """The sampler, what it explores, and how an epoch's images are shared among its prompts."""

    title: ClassVar[str] = "Sampling"

    sample_num_steps: int = option(4, "N, denoising steps of a rollout (paper: 4).")
    sample_levels: str = option(
        "uniform",
        "Noise levels of the steps, before the shift: uniform, 1 to 1/N (paper); scheduler, those of the model's own "
        "scheduler (`set_timesteps(N)`), as public SD3 recipes: 10 steps end at .0089 instead of .25, the last of "
        "which, a step of detail, never trains an action.",
    )
    sample_eta: float | None = option(
        None,
        "How much noise a step draws afresh; towards 0 every kernel is the Euler ODE. annealed, cps: in (0, 1], 1 is "
        "annealing; flow_sde: Flow-GRPO's a; dance_sde: the diffusion itself. None: 1 for annealed, .8 for cps, .7 for "
        "flow_sde, .3 for dance_sde, those of their authors.",
    )
    sample_guidance_scale: float = option(
        1.0, "Classifier-free guidance in rollout and training alike; 1 (off): a few-step policy needs half the work."
    )
    sample_embedded_guidance_scale: float | None = option(
        None,
        "Guidance that a distilled model takes as an input (FLUX.1-dev, FLUX.2-dev, SanaSprint), which costs no second "
        "evaluation. None: the stock pipeline's default; an error for a model that takes none.",
    )
    sample_batch_size: int = option(8, "Images a process draws at once.")
    sample_num_batches_per_epoch: int = option(12, "Batches a process draws each epoch: 96 images, two groups of 48.")
    sample_kernel: str = option(
        "annealed",
        "The sampler, and what an action is: annealed (the paper's; the next noisy state), clean (the explored clean "
        "image), flow_sde (Flow-GRPO's), dance_sde (DanceGRPO's), cps (Flow-CPS: annealed with a part of the old "
        "noise), or ode (no action: for the forward objectives).",
    )
    sample_window_size: int | None = option(
        None, "Only so many steps in a row are explored and trained, the others are the ODE's (MixGRPO: 4). None: all."
    )
    sample_window_interval: int = option(25, "Epochs between two moves of the window (MixGRPO: 25).")
    sample_window_order: str = option(
        "progressive", "How the window moves: progressive, a step onwards, or random, the same place on all processes."
    )
    sample_window_range: int | None = option(
        None, "The window stays within the first so many steps (Flow-GRPO-Fast: half of them). None: all that train."
    )
    sample_kappa: float = option(0.5, "Clean kernel: exploration of the clean image, std = kappa x level.")
    num_perturbations: int = option(
        1,
        "M, actions of one state, each other's baseline. Clean kernel: explorations, which cost decodes and rewards "
        "and no denoiser evaluation. Annealed kernel: re-noisings, which cost one evaluation each besides.",
    )
    antithetic_perturbations: bool = option(
        False, "The second half of a state's actions has the noise of the first, negated; M must be even."
    )
    share_initial_noise: bool = option(
        False, "All images of a group start from the same noise, so that only their actions tell them apart."
    )
    clean_baseline: str = option("state", "Clean kernel: state (the state's own value is the baseline) or group.")
    num_generations: int | None = option(
        None,
        "G, images of a prompt (paper: 48). None: 48, or the largest divisor of the epoch's images below it. 1, as in "
        "DDPO, needs per_prompt_stat_tracking.",
    )
    group_allocation: str = option(
        "fixed",
        "How an epoch's images are shared among its prompts: fixed, num_generations each; variance, more where a "
        "prompt's rewards varied before; streaming, min_generations each, then the rest where these varied; superflow, "
        "by a Beta tracker of each prompt's final reward, which also says how often it is drawn, and is the baseline.",
    )
    group_bins: int = option(
        4,
        "superflow: K bins into which an epoch's prompts are sorted, each bin's groups an image less than the last's.",
    )
    group_averaging: str = option(
        "images",
        "Where group sizes vary: images, the loss is the mean over images; prompts, each image weighs 1 / its group's "
        "size, so that it is the mean over prompts.",
    )
    min_generations: int | None = option(
        None, "Least images of a prompt, where group sizes vary. None: a quarter of num_generations, at least 2."
    )
    max_generations: int | None = option(None, "Most images of a prompt. None: four times num_generations.")
    group_optimism: float = option(
        0.5, "How much more a prompt is thought to vary that little is known of, in units of the mean deviation."
    )
    group_memory: float = option(0.9, "Share of what is known of a prompt that an epoch keeps.")
    group_tracker_capacity: int = option(1_000_000, "Prompts that are remembered; the one seen longest ago goes first.")
    sampler_kwargs: dict | str | None = option(
        None, "Options of the kernel's own (JSON), for one that isn't of this package (docs/extending.md)."
    )

    @property
    def kernel_class(self) -> type[Kernel]:
        """The class of `sample_kernel`; raise ValueError if there is none."""
        check_choice(self, "sample_kernel", KERNELS)
        return KERNELS[self.sample_kernel]

    @property
    def anneals(self) -> bool:
        """Whether what is trained is to be sampled by annealing; by the ODE otherwise, as SDE methods' authors do."""
        return self.kernel_class.anneals

    @property
    def num_trained_steps(self) -> int:
        """S, the steps of an image that carry an action: N - 1 for all kernels, or the window's."""
        return self.sample_window_size or self.sample_num_steps - 1

    def complete(self) -> None:
        """Give `sample_eta` the kernel's default, 1 where the kernel has none."""
        if self.sample_eta is None:
            default = self.kernel_class.default_eta()
            self.sample_eta = 1.0 if default is None else default

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_choice(self, "sample_levels", LEVELS)
        check_choice(self, "clean_baseline", ("state", "group"))
        check_choice(self, "group_allocation", ("fixed", "variance", "streaming", "superflow"))
        check_choice(self, "group_averaging", ("images", "prompts"))
        check_choice(self, "sample_window_order", ("progressive", "random"))
        check_at_least(self, 2, "sample_num_steps", "max_generations")
        check_at_most(self, MAX_STEPS, "sample_num_steps")
        check_at_least(self, 1, "sample_batch_size", "sample_num_batches_per_epoch", "num_perturbations")
        check_at_least(self, 1, "sample_window_interval", "group_tracker_capacity", "group_bins")
        check_at_least(self, 0, "sample_guidance_scale", "sample_embedded_guidance_scale", "group_optimism")
        check_at_least_1_or_none(self, "sample_window_size", "min_generations")
        check_positive(self, "sample_kappa")
        if not 0 < self.group_memory <= 1:
            raise ValueError(f"group_memory is {self.group_memory}; it must lie in (0, 1]")
        bounds = self.min_generations, self.max_generations
        if bounds != (None, None) and self.group_allocation not in ("variance", "streaming"):
            raise ValueError("min_generations and max_generations need group_allocation='variance' or 'streaming'")
        if self.group_allocation == "fixed" and self.group_averaging != "images":
            raise ValueError(
                f"group_averaging={self.group_averaging!r} has no effect with group_allocation='fixed', whose groups "
                "are of one size; leave it out"
            )
        if None not in bounds and self.min_generations > self.max_generations:
            raise ValueError(
                f"min_generations={self.min_generations} is above max_generations={self.max_generations}; no prompt's "
                "images are as many"
            )
        if self.min_generations == 1 and self.group_allocation == "streaming":
            raise ValueError(
                "group_allocation='streaming' looks at how the first draws vary; use min_generations=2 or more"
            )
        self._check_kernel()
        self._check_window()

    def _check_kernel(self) -> None:
        kernel = self.kernel_class
        if not 0 < self.sample_eta <= kernel.largest_eta:
            raise ValueError(
                f"sample_eta is {self.sample_eta}; with sample_kernel={self.sample_kernel!r} it must lie in "
                f"(0, {kernel.largest_eta:g}] (at 0 the sampler is an ODE, without a density to train)"
            )
        if kernel.default_eta() is None and self.sample_eta != 1.0:
            raise ValueError(
                f"sample_eta={self.sample_eta} has no effect with sample_kernel={self.sample_kernel!r}; leave it out "
                "(clean has sample_kappa)"
            )
        if self.antithetic_perturbations and self.num_perturbations % 2:
            raise ValueError(
                f"antithetic_perturbations needs an even num_perturbations, not {self.num_perturbations}; use "
                f"{self.num_perturbations + 1}"
            )
        kernel.from_options(self)

    def _check_window(self) -> None:
        if self.sample_window_size is None:
            if self.sample_window_range is not None:
                raise ValueError(f"sample_window_range={self.sample_window_range} needs a sample_window_size")
            return
        covered = self.sample_num_steps - 1 if self.sample_window_range is None else self.sample_window_range
        if not self.sample_window_size <= covered < self.sample_num_steps:
            raise ValueError(
                f"a window of sample_window_size={self.sample_window_size} steps doesn't lie within the first "
                f"{covered} of {self.sample_num_steps}, the last of which never trains; use a range of "
                f"{self.sample_window_size} to {self.sample_num_steps - 1}"
            )
        if not (self.kernel_class.has_density and self.kernel_class.action_is_state):
            raise ValueError(
                f"a window of explored steps needs a stochastic kernel, not {self.sample_kernel!r}: one with a "
                "density, whose action is the next state"
            )
