"""Whether a model draws in few steps already, as far as that can be told."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.identity import base_identity

# What models and LoRAs for few steps are called, and those from which that was taken out again.
NAMED = re.compile(
    r"turbo|schnell|lightning|sprint|hyper-?(?:sd|flux)|few[-_]?step"
    r"|(?<![a-z0-9])(?:lcm|dmd2?)(?![a-z])|(?<![0-9.])[1-8][-_]?steps?(?![a-z])",
    re.IGNORECASE,
)
UNDONE = re.compile(r"(?:de|un)[-_]?(?:turbo|distill)", re.IGNORECASE)


def few_step_sign(pipeline: TAFSPipelineMixin, adapters: Sequence[str] = ()) -> str | None:
    """Return by what a model is known to draw in few steps already; None where nothing says so.

    By its pipeline's class (SanaSprint), its configuration where that says so (FLUX.2-klein's `is_distilled`; FLUX.1
    without an embedded guidance, as schnell), else by a name: that of its repository or folder, and those of LoRAs
    that are fused into it or act in it (SD3.5-large-turbo and Z-Image-Turbo are configured as their bases are, but for
    Z-Image's shift, which users set).

    What can't be told: a turbo model in a folder of another name, or a LoRA of another name. A schnell whose
    distillation was undone (LibreFLUX) has schnell's configuration, and is taken for one unless its name says so
    (De-Distill, De-Turbo).

    Args:
        pipeline: of the model.
        adapters: names of the LoRAs that act in its denoiser.
    """
    base = base_identity(pipeline)
    name = base.name.rpartition("/")[2]
    if UNDONE.search(name):
        return None
    if own := pipeline.few_step_sign():
        return own
    if NAMED.search(name):
        return f"by its name, {name}"
    lora = next((lora for lora in (*base.fused, *adapters) if NAMED.search(lora) and not UNDONE.search(lora)), None)
    return None if lora is None else f"by the name of a LoRA in it, {lora}"
