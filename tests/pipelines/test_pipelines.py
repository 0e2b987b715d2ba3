"""The rollout is what stock diffusers samples, and replay is what the rollout scored."""

import json

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft import LoraConfig

from trl_tafs.method.kernels import Annealed, Clean, Ode
from trl_tafs.method.objectives import ClippedObjective
from trl_tafs.method.rollout import sample
from trl_tafs.method.types import Conditioning

PROMPTS = ["a handwritten seven", "two", "a handwritten two"]
CALL = {"num_inference_steps": 4, "sigmas": [1.0, 0.75, 0.5, 0.25], "output_type": "latent", "max_sequence_length": 8}


def stock(folder, **scheduler):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 0.0, 3.5])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 16)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_annealed_rollout_is_stochastic_sampling_bit_for_bit(pipeline_folder, guidance, height, width, shift):
    pipeline = tiny.load(pipeline_folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=shift)
    x = torch.randn(3, *pipeline.latent_shape(height, width))
    torch.manual_seed(3)
    ours = pipeline.annealed_rollout(PROMPTS, height=height, width=width, guidance_scale=guidance, latents=x)
    torch.manual_seed(3)
    theirs = stock(pipeline_folder, stochastic_sampling=True, shift=shift)(
        PROMPTS, height=height, width=width, guidance_scale=guidance, latents=x, **CALL
    ).images
    assert torch.equal(ours.final, theirs)
    images = pipeline.decode_latents(ours.final)
    pipe = stock(pipeline_folder)
    decoded = pipe.vae.decode(theirs / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)[0].detach()
    assert torch.equal(images, pipe.image_processor.postprocess(decoded, output_type="pt"))


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_the_ode_kernel_is_stock_euler_bit_for_bit(pipeline_folder, pipeline, guidance):
    x = torch.randn(3, *pipeline.latent_shape(8, 8))
    conditioning = pipeline.encode_conditioning(PROMPTS, guidance_scale=guidance)
    ours = sample(pipeline.velocity, Ode(), conditioning, pipeline.rollout_levels(4, 8, 8), x, None)
    theirs = stock(pipeline_folder)(PROMPTS, guidance_scale=guidance, latents=x, **CALL).images
    assert torch.equal(ours, theirs)


def test_dynamic_shift_is_stock_s(pipeline_folder, pipeline):
    changes = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, **changes)
    x = torch.randn(3, *pipeline.latent_shape(8, 16))
    torch.manual_seed(3)
    ours = pipeline.annealed_rollout(PROMPTS, height=8, width=16, latents=x)
    torch.manual_seed(3)
    pipe = stock(pipeline_folder, stochastic_sampling=True, **changes)
    theirs = pipe(PROMPTS, height=8, width=16, guidance_scale=1.0, latents=x, **CALL).images
    assert torch.equal(ours.final, theirs)
    assert ours.levels[1] > 0.75


def test_call_is_the_parents_and_annealed_honours_the_generator(pipeline_folder, pipeline):
    theirs = stock(pipeline_folder)

    def draw(pipe, seed, **call):
        return pipe("two", generator=torch.Generator().manual_seed(seed), **(CALL | call)).images

    assert torch.equal(draw(pipeline, 0), draw(theirs, 0))
    torch.manual_seed(1)
    first = draw(pipeline, 0, annealed=True)
    torch.manual_seed(2)
    assert torch.equal(first, draw(pipeline, 0, annealed=True)), "the global seed must not matter"
    assert not torch.equal(first, draw(pipeline, 1, annealed=True))
    assert pipeline.scheduler.config.stochastic_sampling is False, "the pipeline's own scheduler is left as it was"
    short = pipeline("two", annealed=True, output_type="latent", max_sequence_length=8)
    assert short.images.shape == (1, 1, 8, 8)
    assert pipeline.num_timesteps == 4


def test_levels_are_never_sd3_s_own_four(pipeline):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=3.0)
    levels = pipeline.rollout_levels(4, 8, 8)
    torch.testing.assert_close(levels, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    own.set_timesteps(4)
    assert own.sigmas[3] < 0.009, "diffusers' default would waste the last step"


def attach(pipeline, scale=0.1):
    target = list(pipeline.lora_target_modules)
    pipeline.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=target))
    for name, parameter in pipeline.transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=scale, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("kernel", [Annealed(), Annealed(eta=0.5), Clean(), Clean(num_actions=3)])
def test_the_ratio_is_exactly_one_on_policy(pipeline, kernel, guidance):
    attach(pipeline)
    conditioning = pipeline.encode_conditioning(PROMPTS, guidance_scale=guidance)
    rollout = pipeline.annealed_rollout(conditioning=conditioning, kernel=kernel)
    rows = ClippedObjective(kernel, 0.1).items(rollout, torch.ones_like(rollout.log_probs))
    for step in range(3):  # one step at a time, in the rollout's own batch shape
        mine = rows[step::3]
        log_prob = pipeline.log_prob(mine, conditioning[mine.sample], kernel=kernel)
        assert torch.equal(log_prob, mine.old_log_prob)
        assert log_prob.requires_grad


def test_guidance_in_the_rollout_alone_is_another_policy(pipeline):
    guided = pipeline.encode_conditioning(PROMPTS, guidance_scale=3.5)
    rollout = pipeline.annealed_rollout(conditioning=guided)
    rows = ClippedObjective(Annealed(), 0.1).items(rollout, torch.ones_like(rollout.log_probs))
    plain = Conditioning(guided.positive)
    difference = pipeline.log_prob(rows, plain[rows.sample]) - rows.old_log_prob
    assert difference.abs().max() > 0.01


def test_bf16_actions_are_scored_as_they_are_stored(pipeline):
    pipeline.transformer.to(torch.bfloat16)
    conditioning = pipeline.encode_conditioning(PROMPTS).to(torch.bfloat16)
    rollout = pipeline.annealed_rollout(conditioning=conditioning)
    assert rollout.actions.dtype == torch.bfloat16
    rows = ClippedObjective(Annealed(), 0.1).items(rollout, torch.ones_like(rollout.log_probs))
    worst = 0.0
    for step in range(3):
        mine = rows[step::3]
        log_prob = pipeline.log_prob(mine, conditioning[mine.sample])
        worst = max(worst, (log_prob - mine.old_log_prob).abs().max().item())
    assert worst == 0.0


def test_every_lora_parameter_gets_a_gradient(pipeline):
    attach(pipeline)
    conditioning = pipeline.encode_conditioning(PROMPTS)
    rollout = pipeline.annealed_rollout(conditioning=conditioning)
    rows = ClippedObjective(Annealed(), 0.1).items(rollout, torch.ones_like(rollout.log_probs))
    pipeline.log_prob(rows, conditioning[rows.sample]).sum().backward()
    lora = {name: p.grad for name, p in pipeline.transformer.named_parameters() if "lora_" in name}
    # The last block discards its context stream: what only leads there has no effect on the output.
    last = f"transformer_blocks.{len(pipeline.transformer.transformer_blocks) - 1}."
    missing = [
        n for n, g in lora.items() if (g is None or g.abs().sum() == 0) and not n.startswith(last + "attn.add_q")
    ]
    assert not missing


def test_a_saved_pipeline_names_the_stock_class(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusion3Pipeline"
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusion3Pipeline


def test_sizes_that_do_not_fit_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"multiples of 2, got 9 x 8; use 8 x 8"):
        pipeline.check_size(9, 8)
    with pytest.raises(ValueError, match="either a prompt or its conditioning"):
        pipeline.annealed_rollout()
