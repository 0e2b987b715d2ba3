"""The model families of the package: the one list that a new family is added to. Imports nothing heavy."""

from typing import TYPE_CHECKING

FAMILIES = {  # class: its module
    "TAFSStableDiffusion3Pipeline": "trl_tafs.pipelines.stable_diffusion_3",
    "TAFSFluxPipeline": "trl_tafs.pipelines.flux",
    "TAFSFluxKontextPipeline": "trl_tafs.pipelines.flux",
    "TAFSFlux2Pipeline": "trl_tafs.pipelines.flux2",
    "TAFSFlux2KleinPipeline": "trl_tafs.pipelines.flux2",
    "TAFSQwenImagePipeline": "trl_tafs.pipelines.qwen_image",
    "TAFSQwenImageEditPipeline": "trl_tafs.pipelines.qwen_image",
    "TAFSQwenImageEditPlusPipeline": "trl_tafs.pipelines.qwen_image",
    "TAFSZImagePipeline": "trl_tafs.pipelines.z_image",
    "TAFSSanaPipeline": "trl_tafs.pipelines.sana",
    "TAFSSanaSprintPipeline": "trl_tafs.pipelines.sana",
    "TAFSHiDreamPipeline": "trl_tafs.pipelines.hidream",
    "TAFSLumina2Pipeline": "trl_tafs.pipelines.lumina2",
    "TAFSChromaPipeline": "trl_tafs.pipelines.chroma",
    "TAFSCogView4Pipeline": "trl_tafs.pipelines.cogview4",
    "TAFSAuraFlowPipeline": "trl_tafs.pipelines.aura_flow",
    "TAFSOvisImagePipeline": "trl_tafs.pipelines.ovis_image",
    "TAFSLongCatImagePipeline": "trl_tafs.pipelines.longcat_image",
}

if TYPE_CHECKING:  # the same list, for editors and type checkers
    from trl_tafs.pipelines.aura_flow import TAFSAuraFlowPipeline as TAFSAuraFlowPipeline
    from trl_tafs.pipelines.chroma import TAFSChromaPipeline as TAFSChromaPipeline
    from trl_tafs.pipelines.cogview4 import TAFSCogView4Pipeline as TAFSCogView4Pipeline
    from trl_tafs.pipelines.flux import TAFSFluxKontextPipeline as TAFSFluxKontextPipeline
    from trl_tafs.pipelines.flux import TAFSFluxPipeline as TAFSFluxPipeline
    from trl_tafs.pipelines.flux2 import TAFSFlux2KleinPipeline as TAFSFlux2KleinPipeline
    from trl_tafs.pipelines.flux2 import TAFSFlux2Pipeline as TAFSFlux2Pipeline
    from trl_tafs.pipelines.hidream import TAFSHiDreamPipeline as TAFSHiDreamPipeline
    from trl_tafs.pipelines.longcat_image import TAFSLongCatImagePipeline as TAFSLongCatImagePipeline
    from trl_tafs.pipelines.lumina2 import TAFSLumina2Pipeline as TAFSLumina2Pipeline
    from trl_tafs.pipelines.ovis_image import TAFSOvisImagePipeline as TAFSOvisImagePipeline
    from trl_tafs.pipelines.qwen_image import TAFSQwenImageEditPipeline as TAFSQwenImageEditPipeline
    from trl_tafs.pipelines.qwen_image import TAFSQwenImageEditPlusPipeline as TAFSQwenImageEditPlusPipeline
    from trl_tafs.pipelines.qwen_image import TAFSQwenImagePipeline as TAFSQwenImagePipeline
    from trl_tafs.pipelines.sana import TAFSSanaPipeline as TAFSSanaPipeline
    from trl_tafs.pipelines.sana import TAFSSanaSprintPipeline as TAFSSanaSprintPipeline
    from trl_tafs.pipelines.stable_diffusion_3 import TAFSStableDiffusion3Pipeline as TAFSStableDiffusion3Pipeline
    from trl_tafs.pipelines.z_image import TAFSZImagePipeline as TAFSZImagePipeline
