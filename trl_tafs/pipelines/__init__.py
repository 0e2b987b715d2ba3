"""Model families: one file each, a subclass of the diffusers pipeline over one shared mixin."""

from trl_tafs.pipelines.base import AnnealedFlowMatchScheduler, TAFSPipelineMixin
from trl_tafs.pipelines.stable_diffusion_3 import TAFSStableDiffusion3Pipeline

__all__ = ["AnnealedFlowMatchScheduler", "TAFSPipelineMixin", "TAFSStableDiffusion3Pipeline"]
