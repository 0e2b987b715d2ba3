"""Draw images for evaluation and cards: fixed noise, any step count, both samplers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from trl_tafs.method.guidance import is_guided
from trl_tafs.method.kernels import Annealed, Kernel, Ode
from trl_tafs.method.noise import SampleNoise
from trl_tafs.method.rollout import Velocity, sample_steps
from trl_tafs.method.types import Conditioning
from trl_tafs.output.out_of_memory import MicroBatch
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.components import casting_once
from trl_tafs.pipelines.finite import DenoiserWatch, check_images
from trl_tafs.policy.policy import Policy
from trl_tafs.rewards.scoring import RewardSet

SAMPLERS: dict[str, Kernel] = {"annealed": Annealed(), "ode": Ode()}
EVAL_EPOCH = -1  # the key of evaluation's noise: no training epoch has it

Encode = Callable[[Sequence[str]], Conditioning]


@dataclass(frozen=True)
class DrawSpec:
    """One way of drawing images.

    The two guidance scales say what the prompts are encoded with: they are a name here, and act in the `Conditioning`.
    """

    sampler: str  # of `SAMPLERS`
    num_steps: int
    height: int
    width: int
    guidance_scale: float = 1.0
    embedded_guidance_scale: float | None = None  # None: the family's default
    levels: str = "uniform"  # of the steps, `unshifted_levels`

    @property
    def nfe(self) -> int:
        """Evaluations of the denoiser an image: twice the steps with guidance."""
        return self.num_steps * (2 if is_guided(self.guidance_scale) else 1)

    @property
    def label(self) -> str:
        """The name of a folder of such images, `annealed_4_512x512`."""
        guidance = f"_guidance{self.guidance_scale:g}" if is_guided(self.guidance_scale) else ""
        embedded = "" if self.embedded_guidance_scale is None else f"_embedded{self.embedded_guidance_scale:g}"
        levels = "" if self.levels == "uniform" else f"_{self.levels}"
        return f"{self.sampler}_{self.num_steps}_{self.height}x{self.width}{guidance}{embedded}{levels}"

    def described(self) -> dict[str, Any]:
        """Return the settings and the number of evaluations as plain values."""
        return asdict(self) | {"nfe": self.nfe}


@dataclass(frozen=True)
class Drawn:
    """A batch of drawn latents, on the CPU."""

    steps: list[Tensor]  # (batch_size, *) each: clean estimates by step, or none of them, and the result last
    count: int  # rows that count; those after them pad the batch


@dataclass(frozen=True)
class Drawer:
    """Draws images of prompts, by the same noise for the same sample number.

    Batches have one shape, the last one padded, so that an image doesn't depend on how many others are drawn.
    """

    pipeline: TAFSPipelineMixin
    encode: Encode
    velocity: Velocity
    batch_size: int
    seed: int  # of the noise
    device: torch.device
    storage_dtype: torch.dtype  # of states between steps
    decode_batch_size: int | None = None  # images that the VAE decodes at once; None: batch_size
    decoding: Callable[[], AbstractContextManager] = nullcontext  # inside, the VAE is where it decodes
    before_batch: Callable[[], None] = lambda: None  # may raise, to stop

    @classmethod
    def of(cls, config: Any, policy: Policy, encode: Encode) -> Drawer:
        """Make what draws by a policy in training, as its configuration asks."""
        return cls(
            policy.pipeline,
            encode,
            policy.velocity,
            config.eval_batch_size or config.sample_batch_size,
            config.seed,
            policy.accelerator.device,
            policy.storage_dtype,
            config.decode_size,
            policy.devices.decoding,
        )

    def images(self, spec: DrawSpec, prompts: Sequence[str], sample_ids: Sequence[int]) -> Tensor:
        """Return an image of each prompt, (B, 3, H, W) on the CPU, drawn from the noise of its sample number."""
        return self.decode(self.latents(spec, prompts, sample_ids, steps=False))[:, 0]

    def step_images(self, spec: DrawSpec, prompts: Sequence[str], sample_ids: Sequence[int]) -> Tensor:
        """Return the decoded clean estimate of every step, (B, N, 3, H, W) on the CPU, the final image last."""
        return self.decode(self.latents(spec, prompts, sample_ids, steps=True))

    @torch.no_grad()
    def latents(self, spec: DrawSpec, prompts: Sequence[str], sample_ids: Sequence[int], *, steps: bool) -> list[Drawn]:
        """Draw batch by batch; with `steps` keep the clean estimate of every step beside the result."""
        levels = self.pipeline.rollout_levels(spec.num_steps, spec.height, spec.width, spec.levels).to(self.device)
        shape, kernel = self.pipeline.latent_shape(spec.height, spec.width), SAMPLERS[spec.sampler]
        drawn, watches = [], []
        for start in range(0, len(sample_ids), self.batch_size):
            self.before_batch()
            rows = list(range(start, min(start + self.batch_size, len(sample_ids))))
            padded = rows + [rows[-1]] * (self.batch_size - len(rows))
            noise = SampleNoise(self.seed, EVAL_EPOCH, tuple(sample_ids[i] for i in padded), self.device)
            conditioning, initial = self.encode([prompts[i] for i in padded]), noise("initial", 0, shape)
            kept, velocity = [], DenoiserWatch(self.pipeline, self.velocity)
            watches.append(velocity)
            with casting_once(self.device):
                for step in sample_steps(velocity, kernel, conditioning, levels, initial, noise, self.storage_dtype):
                    if step.index == spec.num_steps - 1:
                        kept.append(step.next_state.cpu())
                    elif steps:
                        kept.append(step.clean.cpu())
            drawn.append(Drawn(kept, len(rows)))
        for watch in watches:  # not before: other processes may evaluate a sharded denoiser with this one
            watch.check()
        return drawn

    def decode(self, drawn: Sequence[Drawn]) -> Tensor:
        """Return the images of drawn latents, (B, N, 3, H, W) on the CPU, N = 1 if steps weren't kept."""
        fitting, images = MicroBatch(self.decode_batch_size or self.batch_size, "decoding", "decode_batch_size"), []
        with self.decoding():  # where models share the GPU: one exchange
            for batch in drawn:
                decoded = [fitting(self._decoder(latents)) for latents in batch.steps]
                for step, latents in zip(decoded, batch.steps, strict=True):
                    check_images(self.pipeline, step, latents)
                images.append(torch.stack([step[: batch.count] for step in decoded], dim=1))
        return torch.cat(images)

    def _decoder(self, latents: Tensor) -> Callable[[int], Tensor]:
        """Return what decodes latents, so many at once."""
        return lambda size: self.pipeline.decode_in_batches(latents.to(self.device), size)


def draw_and_score(
    drawer: Drawer,
    spec: DrawSpec,
    rewards: RewardSet,
    items: Sequence[tuple[str, Mapping[str, Any]]],
    sample_ids: Sequence[int],
    *,
    steps: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draw an image of each (prompt, metadata) and score it.

    Args:
        drawer: draws.
        spec: the way of drawing.
        rewards: R of them.
        items: B (prompt, metadata) pairs.
        sample_ids: B numbers that choose the noise.
        steps: score the clean estimate of every step too.

    Returns:
        Images (B, N, 3, H, W) and rewards (B, N, R), on the CPU, the result last; N = 1 without `steps`.

    Raises:
        RewardError: a reward failed.
        NonFiniteError: the denoiser or the VAE made NaN or infinity.
    """
    prompts, metadata = [prompt for prompt, _ in items], [dict(row) for _, row in items]
    drawn = drawer.latents(spec, prompts, sample_ids, steps=steps)
    with drawer.decoding():  # where models share the GPU, the rewards have the denoiser's place
        images = drawer.decode(drawn)
        scores = [rewards(column, prompts, metadata).values for column in images.unbind(1)]
    return images, torch.stack(scores, dim=1)
