"""Model families: one file each, a subclass of the diffusers pipeline over one shared mixin."""

from trl_tafs.pipelines.auto import FAMILIES, AutoTAFSPipeline
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.flux import TAFSFluxPipeline
from trl_tafs.pipelines.flux2 import TAFSFlux2KleinPipeline, TAFSFlux2Pipeline
from trl_tafs.pipelines.hidream import TAFSHiDreamPipeline
from trl_tafs.pipelines.qwen_image import TAFSQwenImagePipeline
from trl_tafs.pipelines.sana import TAFSSanaPipeline, TAFSSanaSprintPipeline
from trl_tafs.pipelines.schedulers import AnnealedFlowMatchScheduler
from trl_tafs.pipelines.stable_diffusion_3 import TAFSStableDiffusion3Pipeline
from trl_tafs.pipelines.z_image import TAFSZImagePipeline

__all__ = [
    "FAMILIES",
    "AnnealedFlowMatchScheduler",
    "AutoTAFSPipeline",
    "TAFSFlux2KleinPipeline",
    "TAFSFlux2Pipeline",
    "TAFSFluxPipeline",
    "TAFSHiDreamPipeline",
    "TAFSPipelineMixin",
    "TAFSQwenImagePipeline",
    "TAFSSanaPipeline",
    "TAFSSanaSprintPipeline",
    "TAFSStableDiffusion3Pipeline",
    "TAFSZImagePipeline",
]
