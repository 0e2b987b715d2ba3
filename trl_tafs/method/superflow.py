"""SuperFlow (arXiv 2512.17951): what is expected of a prompt's rewards decides which are drawn, how often, and A.

The authors' code isn't published. The formulas (Beta tracker, its weight, bins, baseline) are those of three
independent study notes of the full text, which agree. What the notes leave out is chosen here, and marked "ours".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_tafs.method.advantages import EPS, group_mean_std
from trl_tafs.method.allocation import PromptTracker
from trl_tafs.method.noise import noise_seed
from trl_tafs.method.papers import SUPERFLOW, Paper

PRIOR = 1.0  # ours: a success and a failure of each prompt, which don't fade
WEIGHT_FLOOR = 0.01  # ours: eps of the weight, so that a prompt that is mastered, or hopeless, is drawn now and then


@dataclass(frozen=True)
class BetaBelief:
    r"""A Beta distribution over each prompt's rewards in [0, 1].

    .. math:: \alpha \leftarrow \rho \alpha + r, \quad \beta \leftarrow \rho \beta + 1 - r, \qquad
        u = \alpha / (\alpha + \beta), \quad w = \sqrt{u (1 - u) + \epsilon},

    `u` is what is expected of an image, `w` what there is to learn from the prompt. `alpha` and `beta` are the prior
    and the evidence of a `PromptTracker`: its weight times its mean, and the rest of its weight.

    Args:
        tracker: of one value a prompt. Ours: its rho is `memory` for each epoch since the prompt was seen, since the
            policy drifts by the epoch; all of an epoch's images count alike.
        reward_range: (lowest, highest) reward, which become 0 and 1; None: rewards are in [0, 1].
    """

    tracker: PromptTracker
    reward_range: tuple[float, float] | None = None

    def expected(self, prompts: Sequence[str]) -> Tensor:
        """Return u of P prompts, (P,); 1/2 for one never seen."""
        expected, known = torch.full((len(prompts),), 0.5), self.tracker.rows
        for i, prompt in enumerate(prompts if known else ()):
            row = known.get(noise_seed("prompt", prompt))
            if row is not None:
                weight = self.tracker.weight[row]
                expected[i] = (weight * self.tracker.mean[row, -1] + PRIOR) / (weight + 2 * PRIOR)
        return expected

    def weights(self, prompts: Sequence[str]) -> Tensor:
        """Return w of P prompts, (P,)."""
        expected = self.expected(prompts)
        return torch.sqrt(expected * (1 - expected) + WEIGHT_FLOOR)

    def unit(self, rewards: Tensor) -> Tensor:
        """Return rewards as shares of success, in [0, 1]; NaN stays. Beyond `reward_range` they count as its ends.

        Raises:
            ValueError: there is no range, and rewards lie outside [0, 1].
        """
        if self.reward_range is not None:
            low, high = self.reward_range
            return ((rewards - low) / (high - low)).clamp(0, 1)
        outside = (rewards < -1e-6) | (rewards > 1 + 1e-6)
        if outside.any():
            values = rewards[~rewards.isnan()]
            raise ValueError(
                f"{int(outside.sum())} of {values.numel()} rewards lie outside [0, 1], from {values.min():.4g} to "
                f"{values.max():.4g}; group_allocation='superflow' counts them as shares of success: say which are 0 "
                "and 1 by reward_range=[low, high]"
            )
        return rewards


@dataclass(frozen=True)
class ExpectedBaseline:
    """`A = r - u`, normalised over the batch: what is expected of a prompt is the baseline of each of its images.

    So a group without variance teaches, too: where all its images are better, or worse, than was expected. The batch's
    mean is taken out (ours: the belief lags behind a policy that improves).
    """

    belief: BetaBelief
    scale: str = "batch"  # or "none": r - u as it is

    def update(self, prompts: Sequence[str], values: Tensor) -> Tensor:
        """Return the advantages of the rewards (B, Q, K) of B images' prompts; NaN stays. The belief stays as it is."""
        residual = self.belief.unit(values) - self.belief.expected(prompts)[:, None, None]
        if self.scale == "none":
            return residual
        mean, std = group_mean_std(residual.flatten(), torch.zeros(residual.numel(), dtype=torch.int64))
        centred = torch.where(std > 0, residual.flatten() - mean, residual.flatten() * 0)
        return (centred / (std + EPS)).reshape(values.shape)


def binned_sizes(weights: Tensor, mean_size: int, bins: int) -> list[int]:
    """Return each of P prompts' images: sorted by weight into K bins, an image less from each bin to the next.

    The notes' sizes are `M_max - b + 1` of bin b = 1..K, the largest weights first. An epoch here has `P mean_size`
    images whatever the weights, so M_max follows from that (ours), and what is left over goes to the largest weights,
    one each.

    Args:
        weights: (P,).
        mean_size: images of a prompt on the average.
        bins: K.
    """
    order = weights.argsort(descending=True, stable=True)
    count = len(order)
    more = bins - 1 - torch.arange(count) * bins // count  # over the last bin's size, by rank
    least, left = divmod(mean_size * count - int(more.sum()), count)
    sizes = torch.empty(count, dtype=torch.int64)
    sizes[order] = least + more + (torch.arange(count) < left)
    return sizes.tolist()


@dataclass(frozen=True)
class SuperFlowGroups:
    """Prompts drawn by weight, group sizes by bins of it."""

    belief: BetaBelief
    group_size: int  # G, the mean
    bins: int = 4
    paper: ClassVar[Paper | None] = SUPERFLOW

    def weights(self, prompts: Sequence[str]) -> Tensor:
        """Return by what the prompts of an epoch are drawn, (P,)."""
        return self.belief.weights(prompts)

    def first(self, prompts: Sequence[str], epoch: int) -> list[int]:
        """Return `P * G` images in all."""
        return binned_sizes(self.belief.weights(prompts), self.group_size, self.bins)

    def rest(self, values: Tensor, group_ids: Tensor) -> None:
        """No second wave."""

    def update(self, prompts: Sequence[str], values: Tensor, epoch: int) -> None:
        """Count an epoch's rewards, (B, 1)."""
        self.belief.tracker.update(prompts, self.belief.unit(values), epoch)
