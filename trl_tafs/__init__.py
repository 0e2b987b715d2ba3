"""TAFS-GRPO for flow-matching text-to-image pipelines: few-step alignment as a TRL-style trainer.

Names are imported on first use, so that `import trl_tafs` loads neither diffusers nor open_clip.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl_tafs.pipelines.families import FAMILIES

__version__ = "0.1.0"

_EXPORTS = {
    "TAFSGRPOConfig": "trl_tafs.config",
    "TAFSGRPOTrainer": "trl_tafs.trainer",
    "AutoTAFSPipeline": "trl_tafs.pipelines.auto",
    **FAMILIES,
    "AnnealedFlowMatchScheduler": "trl_tafs.pipelines.schedulers",
    "TAFSPipelineMixin": "trl_tafs.pipelines.base",
    "NonFiniteError": "trl_tafs.pipelines.finite",
    "REWARDS": "trl_tafs.rewards",
    "evaluate": "trl_tafs.evaluation.compare",
}

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from trl_tafs.config import TAFSGRPOConfig as TAFSGRPOConfig
    from trl_tafs.evaluation.compare import evaluate as evaluate
    from trl_tafs.pipelines.auto import AutoTAFSPipeline as AutoTAFSPipeline
    from trl_tafs.pipelines.base import TAFSPipelineMixin as TAFSPipelineMixin
    from trl_tafs.pipelines.families import *  # noqa: F403
    from trl_tafs.pipelines.finite import NonFiniteError as NonFiniteError
    from trl_tafs.pipelines.schedulers import AnnealedFlowMatchScheduler as AnnealedFlowMatchScheduler
    from trl_tafs.rewards import REWARDS as REWARDS
    from trl_tafs.trainer import TAFSGRPOTrainer as TAFSGRPOTrainer


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'trl_tafs' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
