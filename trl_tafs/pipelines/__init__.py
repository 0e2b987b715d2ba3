"""Model families: one file each, a subclass of the diffusers pipeline over one shared mixin.

Names are imported on first use, so that the list of families alone loads no diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl_tafs.pipelines import families

if TYPE_CHECKING:
    from trl_tafs.pipelines.auto import FAMILIES as FAMILIES
    from trl_tafs.pipelines.auto import AutoTAFSPipeline as AutoTAFSPipeline
    from trl_tafs.pipelines.base import TAFSPipelineMixin as TAFSPipelineMixin
    from trl_tafs.pipelines.families import *  # noqa: F403
    from trl_tafs.pipelines.schedulers import AnnealedFlowMatchScheduler as AnnealedFlowMatchScheduler

_EXPORTS = {
    "FAMILIES": "trl_tafs.pipelines.auto",
    "AutoTAFSPipeline": "trl_tafs.pipelines.auto",
    "TAFSPipelineMixin": "trl_tafs.pipelines.base",
    "AnnealedFlowMatchScheduler": "trl_tafs.pipelines.schedulers",
    **families.FAMILIES,
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'trl_tafs.pipelines' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
