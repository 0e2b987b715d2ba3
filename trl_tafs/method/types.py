"""The objects that travel between the stages of one iteration.

Sizes, everywhere: `B` samples, `N` sampling steps, `S` trained steps, `Q` scored steps, `M` actions a state,
`K` scored images a state, `R` rewards, `*` the latent's own shape, whose number of elements is `D`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional


def map_tensors(item: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Apply `fn` to every tensor of a (nested) dataclass of this module; everything else stays as it is."""
    if isinstance(item, Tensor):
        return fn(item)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        changes = {f.name: map_tensors(getattr(item, f.name), fn) for f in dataclasses.fields(item)}
        return dataclasses.replace(item, **changes)
    return item


def onto(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor of the host on a device; to a GPU from pinned memory, so that the host goes on at once.

    A copy from ordinary memory would wait until the GPU has done all that it was given before.
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class TensorRecord:
    """A dataclass whose tensors share their first axis: it can be indexed, repeated and moved as one."""

    def __getitem__(self, index: Any) -> Self:
        return map_tensors(self, lambda tensor: tensor[index])

    def repeat_interleave(self, times: int) -> Self:
        """Repeat each entry `times` times: (B, ...) -> (B * times, ...)."""
        return map_tensors(self, lambda tensor: tensor.repeat_interleave(times, dim=0))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `Tensor.to`, on every tensor."""
        return map_tensors(self, lambda tensor: tensor.to(*args, **kwargs))

    @classmethod
    def cat(cls, items: list[Self]) -> Self:
        """Concatenate along the first axis; what is no tensor is taken from the first item."""
        first = items[0]
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(first):  # type: ignore[arg-type]
            values = [getattr(item, field.name) for item in items]
            if isinstance(values[0], Tensor):
                changes[field.name] = torch.cat(values)
            elif isinstance(values[0], TensorRecord):
                changes[field.name] = type(values[0]).cat(values)
        return dataclasses.replace(first, **changes)  # type: ignore[type-var]


@dataclass(frozen=True)
class PromptBatch:
    """What is to be drawn: one entry an image. Images with the same group id share their prompt."""

    prompts: tuple[str, ...]  # B
    metadata: tuple[dict[str, Any], ...]  # B
    group_ids: Tensor  # (B,) int64
    sample_ids: Tensor  # (B,) int64, the image's number in its epoch: the key of its noise

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, part: slice) -> PromptBatch:
        return PromptBatch(self.prompts[part], self.metadata[part], self.group_ids[part], self.sample_ids[part])

    @classmethod
    def cat(cls, items: list[PromptBatch]) -> PromptBatch:
        """One after the other."""
        return cls(
            prompts=tuple(prompt for item in items for prompt in item.prompts),
            metadata=tuple(entry for item in items for entry in item.metadata),
            group_ids=torch.cat([item.group_ids for item in items]),
            sample_ids=torch.cat([item.sample_ids for item in items]),
        )


@dataclass(frozen=True)
class Embeddings(TensorRecord):
    """Encoded prompts, as the denoiser takes them."""

    text: Tensor  # (B, L, C)
    pooled: Tensor | None = None  # (B, P)
    mask: Tensor | None = None  # (B, L), 1 at a prompt's own tokens; None: all are
    layers: Tensor | None = None  # (B, K, L, C), of a second encoder of which every layer is used (HiDream)
    guidance: Tensor | None = None  # (B,) float32, the scale that a guidance-distilled model takes as an input
    pictures: Tensor | None = None  # (B, P, C), the source pictures' tokens, one picture after the other
    picture_grids: tuple[tuple[int, int], ...] | None = None  # their (rows, columns) of tokens, the same for all B

    def padded(self, length: int) -> Embeddings:
        """Return the text with zeros up to `length` tokens, and a mask that says so."""
        missing = length - self.text.shape[1]
        mask = self.text.new_ones(self.text.shape[:2], dtype=torch.int64) if self.mask is None else self.mask
        return dataclasses.replace(
            self, text=functional.pad(self.text, (0, 0, 0, missing)), mask=functional.pad(mask, (0, missing))
        )

    @classmethod
    def cat(cls, items: list[Embeddings]) -> Embeddings:
        """Concatenate, shorter texts padded to the longest."""
        grids = {item.picture_grids for item in items}
        if len(grids) > 1:
            raise ValueError(f"prompts with source pictures of other sizes ({grids}, in tokens) can't be one batch")
        longest = max(item.text.shape[1] for item in items)
        masked = any(item.mask is not None for item in items)
        if masked or any(item.text.shape[1] < longest for item in items):
            items = [item.padded(longest) for item in items]
        return super().cat(items)


@dataclass(frozen=True)
class Conditioning(TensorRecord):
    """All that a velocity depends on besides state and level, guidance included.

    Rollout and replay are given the same object, so that they can't differ in their guidance.
    """

    positive: Embeddings
    negative: Embeddings | None = None  # None: no classifier-free guidance
    guidance_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.positive.text)

    def padded_to_multiple(self, multiple: int) -> Conditioning:
        """Return the texts padded to a multiple of `multiple` tokens."""

        def pad(half: Embeddings) -> Embeddings:
            return half.padded(-(-half.text.shape[1] // multiple) * multiple)

        negative = None if self.negative is None else pad(self.negative)
        return dataclasses.replace(self, positive=pad(self.positive), negative=negative)

    @classmethod
    def cat(cls, items: list[Conditioning]) -> Conditioning:
        """Concatenate conditionings of one and the same guidance."""
        kinds = {(item.guidance_scale, item.negative is None) for item in items}
        if len(kinds) > 1:
            raise ValueError(f"conditionings of different guidance can't be one batch: {sorted(kinds)}")
        return super().cat(items)


@dataclass(frozen=True)
class Rollout:
    """Sampled trajectories of B images over N steps.

    What nobody reads isn't kept: of `path`, `branches`, `log_probs` and `clean` there may be (B, 0, ...).
    """

    levels: Tensor  # (N + 1,) float32, 1 > ... > 0
    steps: Tensor  # (S,) int64, the trained steps, 0-based, one after the other
    path: Tensor  # (B, S, *) x_n at the trained steps, storage dtype; (B, S + 1, *) where the actions are its states
    branches: Tensor  # (B, S, M, *) storage dtype, the actions, where the path doesn't hold them
    log_probs: Tensor  # (B, S, M) float32, in the units of the reduction that was asked for
    clean: Tensor  # (B, N, *) float32, the clean estimate of every step
    scored: Tensor  # (B, Q, K, *) float32, the clean latents that are to be decoded and scored
    final: Tensor  # (B, *) what the sampler returns
    last: Tensor  # (B, 1, *) x_N, storage dtype, of the last evaluation; (B, 0, *) where it wasn't asked for

    @property
    def states(self) -> Tensor:
        """(B, S, *), the states at which the actions were taken."""
        return self.path[:, : len(self.steps)]

    @property
    def actions(self) -> Tensor:
        """(B, S, M, *); (B, 0, 1, *) where they weren't kept."""
        return self.branches if self.branches.shape[1] else self.path[:, 1:].unsqueeze(2)


@dataclass(frozen=True)
class RewardTable:
    """Rewards of the scored images; NaN where a reward gave no score."""

    values: Tensor  # (B, Q, K, R) float64
    names: tuple[str, ...]  # R
    weights: Tensor  # (R,) float64

    @classmethod
    def cat(cls, items: list[RewardTable]) -> RewardTable:
        """Concatenate tables of the same rewards."""
        return cls(torch.cat([item.values for item in items]), items[0].names, items[0].weights)


@dataclass(frozen=True)
class KLRows:
    """Those of T items at which the distance to the base is taken."""

    places: tuple[int, ...]  # t of the T, on the host: how many they are is known without waiting for a device
    weight: float  # how many each stands for


@dataclass(frozen=True)
class Transitions(TensorRecord):
    """Minibatch items of the clipped objective: the actions of one state at one step, T = B * S of them."""

    state: Tensor  # (T, *)
    action: Tensor  # (T, M, *)
    level: Tensor  # (T,) float32
    next_level: Tensor  # (T,) float32
    old_log_prob: Tensor  # (T, M) float32
    advantage: Tensor  # (T, M) float32
    sample: Tensor  # (T,) int64, the item's image: which conditioning belongs to it
    old_velocity: Tensor | None = None  # (T, *) of the policy that sampled; None: not asked for, or the present one's
    kl_rows: KLRows | None = None  # where the distance to the base is taken; None: everywhere

    def __len__(self) -> int:
        return len(self.sample)


@dataclass(frozen=True)
class ForwardItems(TensorRecord):
    """Minibatch items of the forward objectives: a noisy state, and a clean image of the policy with its advantage."""

    state: Tensor  # (T, *) storage dtype
    clean: Tensor  # (T, *) float32
    level: Tensor  # (T,) float32, the state's
    advantage: Tensor  # (T, 1) float32
    sample: Tensor  # (T,) int64, the item's image
    old_velocity: Tensor | None = None  # (T, *) of the policy that sampled; None: the present one's
    kl_rows: KLRows | None = None  # where the distance to the base is taken; None: everywhere

    def __len__(self) -> int:
        return len(self.sample)


@dataclass(frozen=True)
class LossOutput:
    """A loss to be minimised and what is worth a look, detached, one value each."""

    loss: Tensor  # ()
    metrics: dict[str, Tensor]
