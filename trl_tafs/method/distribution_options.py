"""The options of distribution matching, which joins any objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl_tafs.options import Options, check_at_least, check_choice, check_positive, option

TEACHER_GUIDANCE = 3.0  # where the model can be guided (docs/distribution_matching.md)


@dataclass
class DistributionOptions(Options):
    """Distribution matching beside the reward: a pull from what the policy draws to what the base draws."""

    title: ClassVar[str] = "Distribution matching"

    dm_weight: float = option(
        0.0,
        "Weight of distribution matching (DMD) beside any objective; 0: off. The teacher is the base without what is "
        "trained; a second LoRA, the fake score, learns what the policy draws. The mean over elements, as beta.",
    )
    dm_guidance_scale: float | None = option(
        None,
        f"Classifier-free guidance of the teacher; 1: off. None: {TEACHER_GUIDANCE:g}, or off for a model whose "
        "guidance is distilled into it (embedded), or that has none.",
    )
    dm_rows: str = option(
        "trained",
        "Which of the policy's clean estimates are matched: trained (those that the objective evaluates anyway), or "
        "final (the last evaluation's, the image itself: one more forward and backward pass an image).",
    )
    dm_fake_updates: int = option(1, "Optimizer steps of the fake score for each of the policy's.")
    dm_fake_learning_rate: float | None = option(
        None, "AdamW's, for the fake score. None: three times train_learning_rate."
    )
    dm_level_shift: float = option(
        1.0, "Estimates are noised again to levels of U(.02, 1), shifted by this as a schedule's; 1: not shifted."
    )

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_choice(self, "dm_rows", ("trained", "final"))
        check_at_least(self, 0, "dm_weight")
        check_at_least(self, 1, "dm_guidance_scale", "dm_fake_updates")
        check_positive(self, "dm_fake_learning_rate", "dm_level_shift")

    @property
    def matches_distribution(self) -> bool:
        """Whether distribution matching is on."""
        return self.dm_weight > 0

    @property
    def matches_final_state(self) -> bool:
        """Whether what is matched is the last evaluation's estimate, whose state a rollout keeps for it."""
        return self.matches_distribution and self.dm_rows == "final"

    def teacher_guidance(self, embeds_guidance: bool) -> float:
        """Return the scale of the teacher's classifier-free guidance, for a model that has its own guidance or not."""
        return self.dm_guidance_scale or (1.0 if embeds_guidance else TEACHER_GUIDANCE)
