"""The options of the rewards: how several are combined, and what is done when one fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl_tafs.options import Options, check_at_least, check_at_most, check_choice, option

AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum", "sum_of_normalized")
LONGEST_WAIT = 7 * 24 * 3600  # seconds, for a reward


@dataclass
class RewardOptions(Options):
    """How images are scored."""

    title: ClassVar[str] = "Rewards"

    reward_weights: list[float] | None = option(None, "Weight of each reward; None: 1 each.")
    multi_objective_aggregation: str = option(
        "sum_then_normalize",
        "sum_then_normalize, normalize_then_sum (each reward by itself first, then their sum by the batch; GDPO), or "
        "sum_of_normalized (each by itself, their sum as it is; MixGRPO).",
    )
    scale_rewards: str = option(
        "group", "Divide by the deviation of the group (paper, Eq. 9), of the whole batch, or by none."
    )
    async_reward_computation: bool | None = option(
        None,
        "Score in threads while the next step or batch is drawn. None: where every reward says that it may be "
        "(`runs_in_threads`, as those of a server do), and not with model_cpu_offload.",
    )
    max_workers: int = option(2, "Threads of async_reward_computation.")
    reward_max_retries: int = option(2, "How often a reward that raises is called again before the run stops.")
    reward_retry_delay: float = option(1.0, "Seconds before the first retry; doubled each time.")
    reward_on_failure: str = option(
        "error", "When a reward still raises then: error (keep the rollouts, stop), or mask (no score on its images)."
    )

    def check(self) -> None:
        """Raise ValueError for what can't work."""
        check_choice(self, "multi_objective_aggregation", AGGREGATIONS)
        check_choice(self, "scale_rewards", ("group", "batch", "none"))
        check_choice(self, "reward_on_failure", ("error", "mask"))
        check_at_least(self, 1, "max_workers")
        check_at_least(self, 0, "reward_max_retries", "reward_retry_delay")
        check_at_most(self, 100, "reward_max_retries")
        if self.reward_retry_delay * 2.0 ** (self.reward_max_retries - 1) > LONGEST_WAIT:
            raise ValueError(
                f"reward_retry_delay={self.reward_retry_delay} is doubled for each of reward_max_retries="
                f"{self.reward_max_retries}, and the last wait would be longer than {LONGEST_WAIT} s; lower one of them"
            )
        if self.reward_weights is not None and not any(self.reward_weights):
            raise ValueError(f"reward_weights is {self.reward_weights}; with zeros alone nothing is trained for")
