"""The options of credit, objective and loss, and what must hold between all of the method's."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

from trl_tafs.method.credit import CreditRule, credit_rule
from trl_tafs.method.distribution_options import DistributionOptions
from trl_tafs.method.kernels import KERNELS, REDUCTIONS
from trl_tafs.method.losses import CLIP_RANGE
from trl_tafs.method.objective import Objective
from trl_tafs.method.objectives import OBJECTIVES
from trl_tafs.method.sampling_options import SamplingOptions
from trl_tafs.options import (
    Options,
    check_at_least,
    check_choice,
    check_positive,
    option,
)
from trl_tafs.output.errors import did_you_mean, shown


@dataclass
class CreditOptions(Options):
    """From rewards to advantages."""

    title: ClassVar[str] = "Credit"

    step_credit: str = option(
        "step",
        "Which rewards an action answers for, where every step is scored (objective=clipped or forward_images=every): "
        "step (Eq. 10), sum (Alg. 1, line 18), reward_to_go, gain, trace (increments, weighted in "
        "continuous time), or terminal (w/o Step Adv.).",
    )
    credit_trace: float = option(
        0.0, "trace: how fast later increments fade, per unit of level; 0: all count, a large one: gain."
    )
    credit_discount: float = option(0.0, "trace: how fast later value fades, per unit of level.")
    num_advantage_steps: int | None = option(
        None, "Only the last so many steps' rewards are used (Table 5), where every step is scored."
    )
    reward_range: list[float] | None = option(
        None,
        "group_allocation=superflow: the combined reward that counts as 0 and the one that counts as 1, beyond which "
        "nothing counts more. None: rewards lie in [0, 1], or it is an error.",
    )
    train_adv_clip_max: float = option(5.0, "Advantages are clipped to +- this.")
    per_prompt_stat_tracking: bool = option(False, "DDPO's running statistics of a prompt instead of the group's.")
    per_prompt_stat_tracking_buffer_size: int = option(16, "Rewards kept a prompt, or an epoch's if these are more.")
    per_prompt_stat_tracking_min_count: int = option(16, "Rewards needed before a prompt's own statistics are used.")
    credit_kwargs: dict | str | None = option(
        None, "Options of the credit rule's own (JSON), for one that isn't of this package (docs/extending.md)."
    )

    @property
    def credit_rule(self) -> CreditRule:
        """The rule of `step_credit` with its options."""
        return credit_rule(self)

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_at_least(self, 0, "credit_trace", "credit_discount")
        check_positive(self, "train_adv_clip_max")
        if self.reward_range is not None and not (
            len(self.reward_range) == 2 and -math.inf < self.reward_range[0] < self.reward_range[1] < math.inf
        ):
            raise ValueError(f"reward_range is {self.reward_range}; it must be two numbers, the lower one first")
        check_at_least(self, 1, "per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count")
        if self.per_prompt_stat_tracking_min_count > self.per_prompt_stat_tracking_buffer_size:
            raise ValueError(
                f"per_prompt_stat_tracking_min_count={self.per_prompt_stat_tracking_min_count} is never reached with "
                f"per_prompt_stat_tracking_buffer_size={self.per_prompt_stat_tracking_buffer_size}"
            )
        credit_rule(self)


@dataclass
class ObjectiveOptions(Options):
    """What is minimised."""

    title: ClassVar[str] = "Objective"

    objective: str = option(
        "matched",
        "matched: the paper's Eq. 10 with the next clean image as the action of the state before it; clipped: Eq. 10 "
        "on the sampler's own actions, GRPO's surrogate; forward: DiffusionNFT's, which needs no likelihood; awm: "
        "advantage-weighted matching, forward's simpler sibling.",
    )
    forward_levels: str = option(
        "trajectory",
        "Forward objectives, states that an image is matched from: trajectory (those of its own rollout), sampler "
        "(noised to the sampler's levels), or random (to random ones, as in DiffusionNFT).",
    )
    forward_num_levels: int = option(4, "Random levels of one image.")
    forward_images: str = option(
        "final", "Forward objectives: the final image only, or every scored step's with its own advantage."
    )
    nft_beta: float = option(
        1.0, "Forward objective: how far the implicit positive and negative policies lie from the old one."
    )

    @property
    def objective_class(self) -> type[Objective]:
        """The class of `objective`; raise ValueError if there is none."""
        check_choice(self, "objective", OBJECTIVES)
        return OBJECTIVES[self.objective]

    @property
    def from_actions(self) -> bool:
        """Whether the objective learns from actions, and so needs a kernel with a density."""
        return self.objective_class.from_actions

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_choice(self, "forward_levels", ("sampler", "random", "trajectory"))
        check_choice(self, "forward_images", ("final", "every"))
        check_at_least(self, 1, "forward_num_levels")
        check_positive(self, "nft_beta")


@dataclass
class LossOptions(Options):
    """The terms of the loss."""

    title: ClassVar[str] = "Loss"

    train_clip_range: float | None = option(
        None,
        "Clip range of the ratio, in the units of train_log_prob_reduction. None: .025 in sqrt units at any "
        "resolution (.2 in sum units at D = 64); for matched .05 in mean units (with clean weights .01 is as much).",
    )
    train_log_prob_reduction: str | None = option(
        None,
        "Log-probabilities are the mean over latent elements (DDPO), their sum, or sqrt: the sum over sqrt(D). None: "
        "that in which a change of the policy moves the ratio alike at every D, mean for matched, sqrt for the others.",
    )
    train_level_weighting: str | None = option(
        None,
        "clipped: balanced (default), every level moves the velocity equally; gaussian, the density as it is (Eq. 10); "
        "uniform, without its 1/(2 sigma^2); std, times the action's (TempFlow-GRPO); diffusion, times the g of the "
        "SDE whose step it is (SuperFlow). forward, awm, matched: adaptive (default of forward and matched), whose "
        "pull doesn't grow with the distance; velocity (awm's); or clean, the error of the clean image.",
    )
    train_clip_weighting: str = option(
        "loss",
        "clipped: loss, train_level_weighting multiplies the loss, and the clip range is the same relative change of "
        "the policy at every level; ratio, it is the ratio's exponent, whose clip range then depends on the level "
        "(Flow-CPS's code). Felt with several optimizer steps an epoch.",
    )
    beta: float | None = option(
        None,
        "Weight of the KL to the base without the adapter; of forward, awm and matched: half the squared distance of "
        "the velocities. A mean over latent elements: beside a policy term in sqrt units (train_log_prob_reduction) it "
        "weighs sqrt(D) times less than beside public code's mean. None: .1 for matched and .2 for forward, which "
        "costs a reference evaluation a trained row and keeps what the reward doesn't see (docs/learning.md); 0 for "
        "the others (paper: none).",
    )
    train_kl_weighting: str = option(
        "gaussian",
        "clipped: gaussian, beta's KL of an action's two densities; diffusion, that times the gap to the next level, "
        "|m - m_base|^2 / (2 g^2), as Flow-GRPO's code has it.",
    )
    train_kl_rows: str = option(
        "all",
        "Where beta's distance to the base is taken: all of an image's trained rows, or one, drawn anew each "
        "time, which counts for all: the same on average, and the base is evaluated that much less often.",
    )
    train_center_ratio: bool = option(
        False,
        "Take the drift out of the log-ratio, which grows with D and clips advantages below 0 long before those above "
        "(GRPO-Guard). Felt with several optimizer steps an epoch.",
    )
    train_kl_limit: float | None = option(
        None,
        "Instead of the clip: leave out what pushes the policy away from the old one where their KL is past this, in "
        "nats per latent element (Flow-DPPO). Felt with several optimizer steps an epoch.",
    )
    delta: float | None = option(
        None,
        "Where an advantage is below 0, a ratio above this counts as this (TRL's delta; dual-clip PPO), in the units "
        "of train_log_prob_reduction. Felt with several optimizer steps an epoch.",
    )
    train_negative_weight: float = option(
        1.0, "clipped, awm, matched: advantages below 0 are multiplied by this; 0: only what compares well teaches."
    )
    old_policy_beta: float = option(
        0.0,
        "clipped, awm, matched: weight of the KL to the policy that sampled, in nats per latent element (PPO's KL "
        "penalty). Felt with several optimizer steps an epoch, or with old_policy_decay.",
    )
    objective_kwargs: dict | str | None = option(
        None, "Options of the objective's own (JSON), for one that isn't of this package (docs/extending.md)."
    )

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        if self.train_log_prob_reduction is not None:
            check_choice(self, "train_log_prob_reduction", REDUCTIONS)
        check_choice(self, "train_kl_weighting", ("gaussian", "diffusion"))
        check_choice(self, "train_kl_rows", ("all", "one"))
        check_choice(self, "train_clip_weighting", ("loss", "ratio"))
        check_positive(self, "train_clip_range", "train_kl_limit")
        check_at_least(self, 0, "train_negative_weight", "old_policy_beta")
        if self.train_kl_limit is not None and (self.train_clip_range, self.delta) != (None, None):
            raise ValueError(
                f"train_kl_limit={self.train_kl_limit} takes the place of the clip, and train_clip_range="
                f"{self.train_clip_range} with delta={self.delta} has no effect; leave one side out"
            )

    @property
    def needs_several_updates(self) -> list[str]:
        """Those of the options that are set and act on an old policy alone."""
        ratio = {"train_center_ratio": False, "train_kl_limit": None, "delta": None, "old_policy_beta": 0.0}
        defaults: dict[str, object] = {**ratio, "train_clip_weighting": "loss"}
        return [name for name, default in defaults.items() if getattr(self, name) != default]


@dataclass
class MethodOptions(LossOptions, DistributionOptions, ObjectiveOptions, CreditOptions, SamplingOptions):
    """All that the parts of the method are made from, and what must hold between them."""

    @property
    def level_weighting(self) -> str | None:
        """`train_level_weighting`, or the objective's default."""
        return self.train_level_weighting or self.objective_class.default_weighting

    @property
    def log_prob_reduction(self) -> str:
        """`train_log_prob_reduction`, or the objective's default."""
        return self.train_log_prob_reduction or self.objective_class.default_reduction

    @property
    def rows_per_image(self) -> int:
        """How many minibatch items the objective makes of one image."""
        return self.objective_class.rows_per_image(self)

    @property
    def credits_final_image(self) -> bool:
        """Whether only the final image is scored, whatever the credit."""
        return self.objective_class.scores_final_image(self)

    def complete(self) -> None:
        """Give `beta` the objective's default."""
        if self.beta is None:
            self.beta = self.objective_class.default_beta

    def check(self) -> None:
        """Raise ValueError for what can't work together."""
        check_at_least(self, 0, "beta")
        if self.train_kl_weighting != "gaussian" and self.beta == 0:
            raise ValueError(f"train_kl_weighting={self.train_kl_weighting!r} weighs a KL, and beta is 0; leave it out")
        if self.train_clip_weighting == "ratio" and self.level_weighting == "gaussian":
            raise ValueError(
                "train_clip_weighting='ratio' has no effect with train_level_weighting='gaussian', whose weights are "
                "1; leave it out"
            )
        if self.num_advantage_steps is not None and not 1 <= self.num_advantage_steps <= self.num_trained_steps:
            raise ValueError(
                f"num_advantage_steps is {self.num_advantage_steps}; with sample_num_steps={self.sample_num_steps} "
                f"it can be 1 to {self.num_trained_steps}"
            )
        if self.num_generations is not None and self.num_generations < (1 if self.per_prompt_stat_tracking else 2):
            raise ValueError(
                f"num_generations is {self.num_generations}; a group-relative advantage needs at least 2 images of a "
                "prompt, or 1 with DDPO's statistics of each prompt (per_prompt_stat_tracking=True)"
            )
        if self.per_prompt_stat_tracking and self.group_allocation != "fixed":
            raise ValueError(
                f"per_prompt_stat_tracking replaces the groups' statistics, which group_allocation="
                f"{self.group_allocation!r} is for; use one of them"
            )
        self._check_objective()
        self._check_credit()
        self._check_superflow()
        if self.objective_class.warns_without_beta and self.beta == 0:
            warnings.warn(
                f"beta is 0: objective={self.objective!r} pushes away from images that compare badly without an end, "
                f"and long runs leave what the base draws; use beta={self.objective_class.default_beta or 0.2:g}",
                stacklevel=4,  # where the configuration is made
            )

    def _check_superflow(self) -> None:
        if self.group_allocation != "superflow":
            for name, default in (("reward_range", None), ("group_bins", 4)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect with group_allocation={self.group_allocation!r}; "
                        "it is for superflow"
                    )
            return
        if not (self.credits_final_image or self.credit_rule.final_only):
            raise ValueError(
                f"group_allocation='superflow' expects a final reward of a prompt, and step_credit="
                f"{self.step_credit!r} scores others; use step_credit='terminal'"
            )

    def _check_objective(self) -> None:
        objective, kernel = self.objective_class, self.kernel_class.from_options(self)
        if self.train_level_weighting is not None and self.train_level_weighting not in objective.weightings:
            raise ValueError(
                f"train_level_weighting is {shown(self.train_level_weighting)}; use one of "
                f"{', '.join(objective.weightings)} with objective={self.objective!r}, or None for its default"
                f"{did_you_mean(self.train_level_weighting, objective.weightings)}"
            )
        for field in (*dataclasses.fields(ObjectiveOptions), *dataclasses.fields(LossOptions)):
            value, read = getattr(self, field.name), {"objective", "objective_kwargs", *objective.reads.values()}
            if field.name not in read and value != field.default:
                raise ValueError(
                    f"{field.name}={value} has no effect with objective={self.objective!r}, which reads "
                    f"{', '.join(objective.reads.values())}; leave it out"
                )
        if objective.from_actions and not kernel.has_density:
            others = [name for name, other in KERNELS.items() if other.has_density]
            raise ValueError(
                f"sample_kernel={self.sample_kernel!r} has no density, and objective={self.objective!r} needs one; use "
                f"one of {', '.join(others)}, or objective='forward'"
            )
        if not objective.from_actions and (kernel.reward_lag == 0 or kernel.num_actions > 1):
            raise ValueError(
                f"objective={self.objective!r} learns from images, not from actions; sample_kernel="
                f"{self.sample_kernel!r} with num_perturbations={self.num_perturbations} needs objective='clipped'"
            )
        objective.from_options(self, kernel, self.train_clip_range or CLIP_RANGE)

    def _check_credit(self) -> None:
        rule, kernel = self.credit_rule, self.kernel_class.from_options(self)
        said = f"step_credit={self.step_credit!r} with num_advantage_steps={self.num_advantage_steps}"
        says_more = not (rule.own_step_only or rule.final_only) or self.num_advantage_steps not in (None, 1)
        if self.credits_final_image and says_more:
            raise ValueError(
                f"{said}: objective={self.objective!r} with forward_images={self.forward_images!r} scores the final "
                "image alone; use forward_images='every' or objective='clipped', or leave both out"
            )
        if not (kernel.num_actions > 1 or kernel.scores_mean):  # a state is no baseline of its own
            return
        if self.per_prompt_stat_tracking:
            raise ValueError(
                "per_prompt_stat_tracking replaces the baseline; use it with num_perturbations=1 and the annealed "
                "kernel or clean_baseline='group'"
            )
        if not rule.own_step_only or self.num_advantage_steps not in (None, self.num_trained_steps):
            raise ValueError(
                f"{said}: a state's own baseline takes all that earlier actions did out of a reward, and leaves them "
                "none; use step_credit='step' and num_advantage_steps=None, or clean_baseline='group' with "
                "num_perturbations=1"
            )
