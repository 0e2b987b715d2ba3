"""A family of one's own, as docs/new_family.md writes it, goes through what the package's go through."""

import inspect
import re

import families
import pytest
import tiny
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
)
from digits_components import t5_tokenizer
from transformers import UMT5Config, UMT5EncoderModel

from trl_tafs import AutoTAFSPipeline, TAFSPipelineMixin
from trl_tafs.method.types import Embeddings

PROMPTS = ["a photo of cat", "two red dog"]


class TAFSAuraFlowPipeline(TAFSPipelineMixin, AuraFlowPipeline):
    """`AuraFlowPipeline` with annealed rollout and log-probability hooks."""

    lora_target_modules = ("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v")
    patch_size = 2

    def embed(self, prompts, max_sequence_length, negative=False):
        """B prompts by UMT5: text (B, L, C)."""
        text, *_ = self.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return Embeddings(text)

    def denoise(self, model, x, timestep, embeddings):
        """State x (B, C, h, w) at timestep (B,) to v (B, C, h, w)."""
        return model(
            x,
            encoder_hidden_states=embeddings.text,
            timestep=(timestep / 1000).to(x.dtype),
            return_dict=False,
        )[0]


@pytest.fixture
def components():
    """A tiny AuraFlow's."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer(families.WORDS)
    encoder = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=256,
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(encoder).eval(),
        "vae": families.kl_vae(scaling_factor=0.3).eval(),
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.73),
    }


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_its_rollout_is_what_the_stock_pipeline_samples(components, guidance):
    mine = TAFSAuraFlowPipeline(**components)
    x = torch.randn(2, *mine.latent_shape(16, 32))
    torch.manual_seed(3)
    ours = mine.annealed_rollout(
        PROMPTS, height=16, width=32, guidance_scale=guidance, latents=x, max_sequence_length=families.LENGTH
    )
    stock = AuraFlowPipeline(**components)
    stock.scheduler = mine.annealed_scheduler()
    stock.set_progress_bar_config(disable=True)
    call = mine.call_arguments(4, guidance) | {"max_sequence_length": families.LENGTH}
    torch.manual_seed(3)
    theirs = stock(PROMPTS, height=16, width=32, latents=x, output_type="pt", **call).images
    assert torch.equal(mine.decode_latents(ours.final), theirs)


def test_the_trainer_trains_it_and_the_stock_pipeline_loads_what_it_trained(components, tmp_path):
    mine = TAFSAuraFlowPipeline(**components)
    size = {"height": 16, "width": 16, "max_sequence_length": families.LENGTH}
    trainer = tiny.trainer(mine, tmp_path, num_epochs=1, prompt_function=PROMPTS, **size)
    trainer.train()
    before = {name: p for name, p in mine.transformer.named_parameters() if "lora_B" in name}
    assert before and all(p.abs().sum() > 0 for p in before.values())
    stock = AuraFlowPipeline.from_pretrained  # the class is diffusers' own, and loads the adapter
    assert stock.__self__ is AuraFlowPipeline and mine.stock_class() is AuraFlowPipeline
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "AuraFlowPipeline.from_pretrained" in card
    mine.transformer.delete_adapters("default")
    AuraFlowPipeline(**mine.components).load_lora_weights(tmp_path / "adapter")


def test_the_document_shows_this_class():
    text = (tiny.ROOT / "docs" / "new_family.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert inspect.getsource(TAFSAuraFlowPipeline) in code
    assert len(inspect.getsource(TAFSAuraFlowPipeline).splitlines()) <= 30


def test_auto_says_which_families_there_are(components):
    with pytest.raises(ValueError, match=r"this is a PixArtSigmaPipeline.*StableDiffusion3Pipeline, FluxPipeline"):
        AutoTAFSPipeline.from_pipe(PixArtSigmaPipeline(**components))
