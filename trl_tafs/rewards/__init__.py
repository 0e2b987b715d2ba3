"""Rewards: any callable `(images, prompts, prompt_metadata) -> rewards` or `-> (rewards, reward_metadata)`.

Images are (B, 3, H, W) float32 in [0, 1]. Rewards are B numbers; None or NaN means "no score" and is masked.
`REWARDS` names the ones that come with the package, as "module:factory", so that nothing is loaded before its use.
"""

from trl_tafs.rewards.loading import REWARDS, load_reward, parse_rewards
from trl_tafs.rewards.scoring import RewardError, RewardRefused, RewardSet

__all__ = ["REWARDS", "RewardError", "RewardRefused", "RewardSet", "load_reward", "parse_rewards"]
