"""Every family: the rollout is what the stock, unmodified pipeline samples, and what is trained is what it loads."""

import json

import families
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from families import FAMILIES
from peft import LoraConfig

from trl_tafs import hub
from trl_tafs.kernels import Annealed, Ode
from trl_tafs.objectives import ClippedObjective
from trl_tafs.pipelines.base import PackedLatents
from trl_tafs.rollout import sample

PROMPTS = ["a photo of cat", "two red dog", "a"]  # of different lengths
NAMES = list(FAMILIES)


def stock(name, mine=None, **scheduler):
    """The stock pipeline over our modules (or its own), with its scheduler changed as a user changes it."""
    pipe = families.stock(name)
    if mine is not None:
        pipe = type(pipe)(**{**pipe.components, "transformer": mine.transformer}, **_options(pipe))
        pipe.set_progress_bar_config(disable=True)
    if scheduler and isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **scheduler)
    return pipe


def _options(pipe):
    return {"is_distilled": pipe.config.is_distilled} if "is_distilled" in pipe.config else {}


def sampled(pipe, mine, x, height, width, num_steps=4, guidance=1.0, seed=3):
    """What `pipe` samples from our initial noise `x`: its last state, shaped as ours, and its images."""
    arguments = mine.call_arguments(num_steps, guidance)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(PROMPTS)
    if isinstance(mine, PackedLatents):
        flux2 = hasattr(mine, "_patchify_latents")
        latents = x.permute(0, 3, 1, 2) if flux2 else x.flatten(1, 2)
    else:
        latents = x
    last = {}

    def keep(pipeline, step, timestep, tensors):
        last["state"] = tensors["latents"]
        return {}

    torch.manual_seed(seed)
    images = pipe(
        prompt=list(PROMPTS),
        height=height,
        width=width,
        latents=latents.clone(),
        output_type="pt",
        max_sequence_length=families.LENGTH,
        callback_on_step_end=keep,
        **arguments,
    ).images
    return last["state"].reshape(x.shape), images


def compare(mine, theirs, tolerance):
    if tolerance == 0.0:
        assert torch.equal(mine, theirs), f"by {(mine - theirs).abs().max():.2e}"
    else:
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def rolled_out(mine, x, height, width, num_steps=4, guidance=1.0, **options):
    torch.manual_seed(3)
    return mine.annealed_rollout(
        PROMPTS,
        num_inference_steps=num_steps,
        height=height,
        width=width,
        guidance_scale=guidance,
        max_sequence_length=families.LENGTH,
        latents=x,
        **options,
    )


CASES = [
    pytest.param(name, guidance, size, id=f"{name}-{guidance}-{size[0]}x{size[1]}")
    for name, family in FAMILIES.items()
    for guidance in (1.0, family.guidance)
    if guidance is not None
    for size in ((family.size, family.size), family.wide)
]


@pytest.mark.parametrize(("name", "guidance", "size"), CASES)
def test_the_rollout_is_what_the_stock_pipeline_samples(name, guidance, size):
    family = FAMILIES[name]
    height, width = size
    mine = families.ours(families.stock(name), name)
    x = torch.randn(len(PROMPTS), *mine.latent_shape(height, width), generator=torch.Generator().manual_seed(1))
    ours = rolled_out(mine, x, height, width, guidance=guidance)
    state, images = sampled(stock(name, stochastic_sampling=True), mine, x, height, width, guidance=guidance)
    if family.has_ode:  # SanaSprint's own last state is in units of its sigma_data
        compare(ours.final, state, family.tolerance)
    compare(mine.decode_latents(ours.final), images, family.tolerance)
    assert images.shape == (len(PROMPTS), 3, height, width) and images.std() > 0.01
    if family.has_ode:
        conditioning = mine.encode_conditioning(PROMPTS, guidance_scale=guidance, max_sequence_length=families.LENGTH)
        ode = sample(mine.velocity, Ode(), conditioning, mine.rollout_levels(4, height, width), x, None)
        compare(ode, sampled(stock(name), mine, x, height, width, guidance=guidance)[0], family.tolerance)
        assert not torch.equal(ode, ours.final)


# The policy ---------------------------------------------------------------------------------------------------

GUIDED = [(name, g) for name, family in FAMILIES.items() for g in (1.0, family.guidance) if g is not None]


def attach(mine, **changes):
    """A LoRA of some strength, and its configuration."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(mine.lora_target_modules)} | changes
    config = LoraConfig(**options)
    mine.transformer.add_adapter(config)
    for i, (name, parameter) in enumerate(mine.transformer.named_parameters()):
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    return config


def replayed(mine, name, guidance=1.0):
    """Log-probabilities of a rollout's actions when they are replayed, step by step, and as the rollout scored them."""
    family = FAMILIES[name]
    conditioning = mine.encode_conditioning(PROMPTS, guidance_scale=guidance, max_sequence_length=families.LENGTH)
    noise = torch.Generator().manual_seed(1)
    rollout = mine.annealed_rollout(
        conditioning=conditioning, height=family.wide[0], width=family.wide[1], generator=noise
    )
    rows = ClippedObjective(Annealed(), 0.1).rows(rollout, torch.ones_like(rollout.log_probs))
    for step in range(3):
        mine_rows = rows[step::3]
        yield mine.log_prob(mine_rows, conditioning[mine_rows.sample]), mine_rows.old_log_prob


@pytest.mark.parametrize(("name", "guidance"), GUIDED)
def test_the_ratio_is_exactly_one_on_policy_and_every_lora_parameter_gets_a_gradient(name, guidance):
    family = FAMILIES[name]
    mine = families.ours(families.stock(name), name)
    targets = mine.lora_target_modules
    if name == "hidream":  # what the eval-mode experts would leave without a gradient, silently
        targets = (*targets, "ff_i.experts.0.w1", "ff_i.experts.1.w2", "ff_i.shared_experts.w3", "ff_t.w1")
    attach(mine, target_modules=list(targets))
    total = 0.0
    for new, old in replayed(mine, name, guidance):
        assert torch.equal(new, old)
        total = total + new.sum()
    total.backward()
    lora = {n: p.grad for n, p in mine.transformer.named_parameters() if "lora_" in n}
    assert {part for n in lora for part in targets if f".{part}.lora_A" in n} == set(targets)
    without = [n for n, g in lora.items() if g is None or g.abs().sum() == 0]
    assert [n for n in without if not any(part in n for part in family.dead)] == []
    assert all(any(part in n for n in without) for part in family.dead), "alive after all"


PLAIN = {"r": 4, "lora_alpha": 6}
LORAS = {
    "plain": PLAIN,
    "rslora": PLAIN | {"use_rslora": True},
    "pattern": PLAIN | {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 3}},
}


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_lora_draws_bit_equal_images_in_the_stock_pipeline(name, lora, tmp_path):
    family = FAMILIES[name]
    height, width = family.size, family.size
    mine = families.ours(families.stock(name), name)
    x = torch.randn(len(PROMPTS), *mine.latent_shape(height, width), generator=torch.Generator().manual_seed(1))
    before = mine.decode_latents(rolled_out(mine, x, height, width).final)
    config = attach(mine, **LORAS[lora])
    ours = mine.decode_latents(rolled_out(mine, x, height, width).final)
    hub.save_adapter(mine, tmp_path, lora_config=config)

    pipe = stock(name)
    pipe.load_lora_weights(tmp_path)
    if family.has_ode:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
        assert pipe.scheduler.config.stochastic_sampling
    _, theirs = sampled(pipe, mine, x, height, width)
    compare(ours, theirs, family.tolerance)
    assert (ours - before).abs().max() > 1e-3, "the LoRA says nothing"

    weights, read = hub.read_adapter(tmp_path)
    assert all(key.rpartition(".lora_")[2] in ("A.weight", "B.weight") for key in weights)
    hub.check_adapter_fits(weights, stock(name).transformer)
    assert (read.r, read.lora_alpha, read.use_rslora) == (config.r, config.lora_alpha, config.use_rslora)


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_of_the_trainer_runs(name, tmp_path):
    family = FAMILIES[name]
    mine = families.ours(families.stock(name), name)
    trainer = tiny.trainer(
        mine,
        tmp_path,
        num_epochs=1,
        height=family.size,
        width=family.size,
        max_sequence_length=families.LENGTH,
        sample_batch_size=4,
        sample_num_batches_per_epoch=2,
        num_generations=4,
        train_batch_size=4,
        prompt_function=PROMPTS,
        train_timestep_fraction=1.0,
    )
    before = {n: p.clone() for n, p in mine.transformer.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(mine.transformer.named_parameters())
    assert any(not torch.equal(before[n], after[n]) for n in before)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["ratio_deviation"] for line in lines if "ratio_deviation" in line] == [0.0]
    assert (tmp_path / "adapter" / hub.WEIGHT_NAME).exists()
