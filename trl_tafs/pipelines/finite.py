"""NaN and infinity, found where they are made: which part made them, in what dtype, and what to change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trl_tafs.method.rollout import Velocity
from trl_tafs.method.types import Conditioning


class NonFiniteError(RuntimeError):
    """A part of a run made NaN or infinity: what follows from it would be no result."""


class DenoiserWatch:
    """Sees whether all of a denoiser's velocities are finite: a sum each on the device, one host copy for all of them.

    Args:
        pipeline: whose denoiser it is.
        velocity: of the policy.
    """

    def __init__(self, pipeline: Any, velocity: Velocity) -> None:
        self.pipeline, self._velocity = pipeline, velocity
        self.sums: list[Tensor] = []  # () float32 of each evaluation; NaN and infinity stay in a sum

    def __call__(self, x: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity, (B, *) float32."""
        v = self._velocity(x, level, conditioning)
        self.sums.append(v.detach().sum(dtype=torch.float32))
        return v

    def check(self) -> None:
        """Raise NonFiniteError if a velocity since the last check wasn't finite."""
        sums, self.sums = self.sums, []
        finite = torch.stack(sums).isfinite() if sums else torch.ones(1)
        if not finite.all():
            first = finite.tolist().index(False) + 1
            raise NonFiniteError(denoiser_fault(self.pipeline, f"in evaluation {first} of {len(sums)}"))


def is_finite(values: Tensor) -> bool:
    """Return whether there is no NaN and no infinity among the values, by one reduction and one host copy."""
    return bool(values.sum(dtype=torch.float32).isfinite())


def check_images(pipeline: Any, images: Tensor, latents: Tensor) -> None:
    """Raise NonFiniteError, naming the denoiser or the VAE, if images (B, 3, H, W) of latents (B, *) aren't finite."""
    if not is_finite(images):
        raise NonFiniteError(vae_fault(pipeline) if is_finite(latents) else denoiser_fault(pipeline))


def check_embeddings(pipeline: Any, conditioning: Conditioning, prompt: str) -> None:
    """Raise NonFiniteError if the text encoders' embeddings of a prompt aren't finite."""
    pictures = conditioning.positive.pictures
    if pictures is not None and not is_finite(pictures):
        name, dtype = type(pipeline.vae).__name__, _name(pipeline.vae.dtype)
        remedy = "load the VAE in float32 (pipeline.vae.to(torch.float32))"
        raise NonFiniteError(
            f"the VAE ({name}, {dtype}) made NaN or infinity of the source picture of the prompt {prompt[:80]!r}: "
            f"{_bad_weight(pipeline.vae) or _overflow({dtype}, remedy)}"
        )
    halves = (half for half in (conditioning.positive, conditioning.negative) if half is not None)
    made = [values for half in halves for values in (half.text, half.pooled, half.layers) if values is not None]
    if not all(map(is_finite, made)):
        encoders = pipeline.text_encoders()
        dtypes = {_name(module.dtype) for module in encoders.values()}
        named = next((f for name, module in encoders.items() if (f := _bad_weight(module, name))), None)
        cause = named or _overflow(dtypes, 'use mixed_precision="bf16" (--dtype bfloat16)')
        raise NonFiniteError(
            f"the text encoders ({', '.join(encoders)}; {', '.join(sorted(dtypes))}) made NaN or infinity of the "
            f"prompt {prompt[:80]!r}: {cause}"
        )


def denoiser_fault(pipeline: Any, where: str = "") -> str:
    """Return what is to be said of a denoiser whose velocities aren't finite; `where` comes after "infinity"."""
    denoiser, dtype = pipeline.denoiser, _name(pipeline.model_dtype)
    adapter = [parameter for name, parameter in denoiser.named_parameters() if "lora_" in name]
    cause = _bad_weight(denoiser) or _overflow({dtype}, 'use mixed_precision="bf16" (--dtype bfloat16)')
    if adapter and not _bad_weight(denoiser):
        largest = max(float(parameter.detach().abs().max()) for parameter in adapter)
        cause = f"all its weights are finite, the adapter's up to {largest:.3g}: {cause}"
    return f"the denoiser ({type(denoiser).__name__}, {dtype}) made NaN or infinity{where and ' ' + where}: {cause}"


def vae_fault(pipeline: Any) -> str:
    """Return what is to be said of a VAE that decodes finite latents to NaN or infinity."""
    vae, dtype = pipeline.vae, _name(pipeline.vae.dtype)
    cause = _bad_weight(vae) or _overflow({dtype}, "load the VAE in float32 (pipeline.vae.to(torch.float32))")
    return f"the VAE ({type(vae).__name__}, {dtype}) decoded finite latents to NaN or infinity: {cause}"


def _bad_weight(module: nn.Module, prefix: str = "") -> str | None:
    """Return what is to be said of a module's first weight that isn't finite, or None."""
    for name, tensor in (*module.named_parameters(prefix), *module.named_buffers(prefix)):
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of a shard: the other processes don't ask
        if tensor.is_floating_point() and not is_finite(own.detach()):
            if "lora_" in name:
                return f"its trained weight {name} isn't finite: training has diverged, lower train_learning_rate"
            trained = "training has diverged, or " if tensor.requires_grad else ""  # of a base as it is loaded, too
            return f"its weight {name} isn't finite: {trained}the base model is damaged, download it again"
    return None


def _overflow(dtypes: set[str], remedy: str) -> str:
    """Return the likely cause where all weights are finite, and what to change."""
    if "float16" in dtypes:
        return f"float16 ends at 65504; {remedy}"
    return "a value overflowed; lower train_learning_rate, or go back to an earlier checkpoint or adapter"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
