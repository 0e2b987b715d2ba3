"""How ComfyUI samples an adapter as it was trained, where it can be said."""

from __future__ import annotations

from collections.abc import Sequence

from trl_tafs.hub.facts import CardFacts

TABLE = 1000  # levels that ComfyUI keeps of a flow model
CLOSE = 1e-3  # levels that differ by less are taken as the same: a step of its table


def simple_levels(num_steps: int, shift: float) -> list[float]:
    """Return ComfyUI's levels of the scheduler `simple`, N of them, for a flow model of this shift.

    It picks `t = (1000 - floor(1000 n / N)) / 1000`, n = 0 .. N - 1, and shifts: `shift t / (1 + (shift - 1) t)`.
    """
    times = [(TABLE - int(n * (TABLE / num_steps))) / TABLE for n in range(num_steps)]
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def is_simple(levels: Sequence[float], shift: float) -> bool:
    """Return whether `simple` gives these levels."""
    return max(abs(a - b) for a, b in zip(levels, simple_levels(len(levels), shift), strict=True)) < CLOSE


def recipe(facts: CardFacts) -> str:
    """Return how ComfyUI draws with the adapter by the levels and the sampler that it was trained for; "" if unknown.

    ComfyUI's `lcm` sampler on a flow model is the annealed one: it noises the clean estimate again, to the next level.
    """
    if facts.comfyui_shift is None or facts.whole_denoiser:
        return ""
    sampler, cfg = "lcm" if facts.anneals else "euler", f"{facts.guidance_scale:g}"
    beneath = "".join(f", `{a.name}` at {1.0 if a.weight is None else a.weight:g}" for a in facts.frozen)
    loaded = f"`LoraLoaderModelOnly` at strength 1{' beside the frozen' + beneath.removeprefix(',') if beneath else ''}"
    if facts.embedded_guidance is not None:
        loaded += f", `FluxGuidance` {facts.embedded_guidance:g}"
    if is_simple(facts.levels, facts.comfyui_shift):
        return (
            f"{loaded}, `KSampler` with sampler `{sampler}`, `simple`, {facts.num_steps} steps, cfg {cfg}. At "
            f"the model's own shift of {facts.comfyui_shift:g} these are the levels below."
        )
    sigmas = ", ".join(f"{level:.6g}" for level in (*facts.levels, 0))
    return (
        f"{loaded}, `SamplerCustom` with `KSamplerSelect` `{sampler}`, cfg {cfg} and `ManualSigmas` `{sigmas}`. No "
        "scheduler of its own gives these levels."
    )
