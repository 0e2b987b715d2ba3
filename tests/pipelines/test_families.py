"""Every family: the rollout is what the stock, unmodified pipeline samples, and what is trained is what it loads."""

import dataclasses
import inspect
import json
import shutil
from unittest import mock

import families
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from families import FAMILIES
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import trl_tafs
from trl_tafs import AutoTAFSPipeline, pipelines
from trl_tafs.cli import arguments as arguments_module
from trl_tafs.cli.arguments import parse_arguments, quantization_config
from trl_tafs.cli.main import main
from trl_tafs.cli.sample import _draw, sampling_parser
from trl_tafs.hub.card import usage_code
from trl_tafs.hub.facts import CardFacts, base_model_facts
from trl_tafs.method.kernels import Annealed, Ode
from trl_tafs.method.objectives import ClippedObjective
from trl_tafs.method.rollout import sample
from trl_tafs.pipelines.packed import PackedLatents
from trl_tafs.policy.adapter_file import WEIGHT_NAME, check_adapter_fits, folded_alpha, read_adapter, save_adapter
from trl_tafs.prompts.encoder import PromptEncoder

PROMPTS = ["a photo of cat", "two red dog", "a"]  # of different lengths
NAMES = list(FAMILIES)


def stock(name, mine=None, **scheduler):
    """The stock pipeline over our modules (or its own), with its scheduler changed as a user changes it."""
    pipe = families.stock(name)
    if mine is not None:
        pipe = type(pipe)(**{**pipe.components, "transformer": mine.transformer}, **_options(pipe))
        for attribute in FAMILIES[name].attributes:
            setattr(pipe, attribute, getattr(mine, attribute))
        pipe.set_progress_bar_config(disable=True)
    if scheduler and isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler = scheduler | {"shift_terminal": None}  # what is published leaves it out
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **scheduler)
    return pipe


def _options(pipe):
    return {"is_distilled": pipe.config.is_distilled} if "is_distilled" in pipe.config else {}


def sampled(pipe, mine, x, height, width, num_steps=4, guidance=1.0, seed=3, levels="uniform"):
    """What `pipe` samples from our initial noise `x`: its last state, shaped as ours, and its images."""
    arguments = mine.call_arguments(num_steps, guidance, levels=levels)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(PROMPTS)
    if isinstance(mine, PackedLatents):
        flux2 = hasattr(mine, "_patchify_latents")
        latents = x.permute(0, 3, 1, 2) if flux2 else x.flatten(1, 2)
    else:
        latents = x
    last = {}

    def step(*args, do=pipe.scheduler.step, **kwargs):  # not every stock pipeline has callbacks
        output = do(*args, **kwargs)
        last["state"] = output[0]
        return output

    torch.manual_seed(seed)
    own = inspect.signature(pipe.__call__).parameters
    arguments |= mine.size_arguments(height, width)
    length = {"max_sequence_length": families.LENGTH} if "max_sequence_length" in own else {}
    with mock.patch.object(pipe.scheduler, "step", step):
        images = pipe(
            prompt=list(PROMPTS),
            height=height,
            width=width,
            latents=latents.clone(),
            output_type="pt",
            **length,
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
        solver = stock(name, stochastic_sampling=False)
        compare(ode, sampled(solver, mine, x, height, width, guidance=guidance)[0], family.tolerance)
        assert not torch.equal(ode, ours.final)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_ode])
def test_the_published_schedulers_are_the_base_s_own_but_for_its_terminal_level(name):
    mine = families.ours(families.stock(name), name)
    own = dict(mine.scheduler.config)
    for scheduler, stochastic in ((mine.annealed_scheduler(), True), (mine.euler_scheduler(), False)):
        assert type(scheduler) is FlowMatchEulerDiscreteScheduler
        changed = {"shift_terminal": None, "stochastic_sampling": stochastic}
        assert {k: v for k, v in scheduler.config.items() if k[0] != "_"} == {
            k: v for k, v in (own | changed).items() if k[0] != "_"
        }
    assert mine.seeded_scheduler(None).config.shift_terminal is None
    height, width = FAMILIES[name].wide
    levels = mine.rollout_levels(4, height, width)
    assert levels[-1] == 0 and levels[-2] > 0.2, "no step is wasted at a level next to 0"


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_ode])
def test_the_scheduler_s_own_levels_are_rolled_out_and_published_as_well(name):
    family = FAMILIES[name]
    height, width = family.wide
    mine = families.ours(families.stock(name), name)
    own = mine.euler_scheduler()
    own.set_timesteps(4, **mine.schedule_shift_kwargs(height, width, 4))
    levels = mine.rollout_levels(4, height, width, "scheduler")
    torch.testing.assert_close(levels, own.sigmas, rtol=0, atol=2e-7)
    assert levels[-2] < 0.05 and mine.rollout_levels(4, height, width)[-2] > 0.2
    x = torch.randn(len(PROMPTS), *mine.latent_shape(height, width), generator=torch.Generator().manual_seed(1))
    ours = rolled_out(mine, x, height, width, levels="scheduler")
    theirs = sampled(stock(name, stochastic_sampling=True), mine, x, height, width, levels="scheduler")[0]
    compare(ours.final, theirs, family.tolerance)


def test_sana_sprint_has_angles_of_its_own():
    mine = families.ours(families.stock("sana-sprint"), "sana-sprint")
    for refused in (
        lambda: mine.rollout_levels(4, 32, 32, "scheduler"),
        lambda: mine.call_arguments(4, levels="scheduler"),
    ):
        with pytest.raises(ValueError, match="samples at angles of its own; use 'uniform'"):
            refused()
    with pytest.raises(ValueError, match="'schedular'; use uniform or scheduler"):
        families.ours(families.stock("sd3"), "sd3").unshifted_levels(4, "schedular")


def test_a_terminal_level_would_waste_a_step():
    mine = families.ours(families.stock("qwen-image"), "qwen-image")
    sigmas, shift = [1.0, 0.75, 0.5, 0.25], mine.schedule_shift_kwargs(16, 16, 4)
    mine.scheduler.set_timesteps(sigmas=sigmas, **shift)
    assert mine.scheduler.sigmas[-2] == pytest.approx(0.02)
    published = mine.annealed_scheduler()
    published.set_timesteps(sigmas=sigmas, **shift)
    assert torch.equal(published.sigmas, mine.rollout_levels(4, 16, 16))

    own = {
        "base_image_seq_len": 256,
        "max_image_seq_len": 8192,
        "base_shift": 0.5,
        "max_shift": 0.9,
    }  # Qwen-Image's own
    mine.scheduler = FlowMatchEulerDiscreteScheduler.from_config(mine.scheduler.config, **own)
    side = 32 * mine.size_multiple  # 32 x 32 tokens, as 512 px are
    assert mine.rollout_levels(4, side, side).tolist() == pytest.approx([1.0, 0.837, 0.632, 0.364, 0.0], abs=1e-3)


def test_the_command_samples_the_ode_at_the_trained_levels_too(tmp_path):
    mine = families.ours(families.stock("qwen-image"), "qwen-image")
    options = ["none", "--pretrained_model", "base", "--prompt", "a", "--height", "16", "--width", "16"]
    for levels in ("uniform", "scheduler"):
        _draw(mine, sampling_parser().parse_args([*options, "--sampler", "ode", "--levels", levels]))
        assert torch.equal(mine.scheduler.sigmas, mine.rollout_levels(4, 16, 16, levels))


# The policy ---------------------------------------------------------------------------------------------------

GUIDED = [(name, g) for name, family in FAMILIES.items() for g in (1.0, family.guidance) if g is not None]


def attach(mine, **changes):
    """A LoRA of some strength, and its configuration."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(mine.lora_target_modules)} | changes
    options["exclude_modules"] = mine.lora_excluded_modules or None
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
    rows = ClippedObjective(Annealed(), 0.1).items(rollout, torch.ones_like(rollout.log_probs))
    for step in range(3):
        mine_rows = rows[step::3]
        yield mine.log_prob(mine_rows, conditioning[mine_rows.sample]), mine_rows.old_log_prob


@pytest.mark.parametrize(("name", "guidance"), GUIDED)
def test_the_ratio_is_exactly_one_on_policy_and_every_lora_parameter_gets_a_gradient(name, guidance):
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
    assert all(gradient is not None for gradient in lora.values()), "DDP would wait for it"
    without = [n for n, g in lora.items() if g.abs().sum() == 0]
    assert [n for n in without if not any(part in n for part in mine.dead_lora_modules)] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_names_the_modules_whose_lora_is_dead_and_no_others(name):
    mine = families.ours(families.stock(name), name)
    linear = [n for n, module in mine.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    mine.transformer.add_adapter(LoraConfig(r=2, target_modules=linear, init_lora_weights=False))
    sum(new.sum() for new, _ in replayed(mine, name)).backward()
    gradients = {n: p.grad for n, p in mine.transformer.named_parameters() if "lora_B" in n}
    dead = {n for n, gradient in gradients.items() if gradient is None or not gradient.any()}
    assert dead == {n for n in gradients if any(f".{part}." in f".{n}" for part in mine.dead_lora_modules)}


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
    save_adapter(mine, tmp_path, lora_config=config)

    pipe = stock(name)
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(tmp_path)
    else:
        pipe.transformer.load_lora_adapter(tmp_path, use_safetensors=True)
    if family.has_ode:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
        assert pipe.scheduler.config.stochastic_sampling
    _, theirs = sampled(pipe, mine, x, height, width)
    compare(ours, theirs, family.tolerance)
    assert (ours - before).abs().max() > 1e-3, "the LoRA says nothing"

    weights, read = read_adapter(tmp_path)
    assert all(key.rpartition(".lora_")[2] in ("A.weight", "B.weight") for key in weights)
    check_adapter_fits(weights, stock(name).transformer)
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
    told = [line["ratio_deviation"] for line in lines if "ratio_deviation" in line]
    assert told == [pytest.approx(0, abs=1e-6)]  # a matrix product's last bit may depend on where its rows lie
    assert (tmp_path / "adapter" / WEIGHT_NAME).exists()


# Loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "z-image"])
def test_auto_picks_the_family_of_a_folder(name, tmp_path):
    families.stock(name).save_pretrained(tmp_path)
    mine = AutoTAFSPipeline.from_pretrained(tmp_path)
    assert type(mine).__name__ == FAMILIES[name].pipeline
    cast = AutoTAFSPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert cast.transformer.dtype == torch.bfloat16 and cast.storage_dtype == (cast.latent_dtype or torch.bfloat16)


def test_auto_names_the_families_when_it_cannot(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ValueError, match=r"holds a StableDiffusionXLPipeline.*there are Stable.*HiDreamImagePipeline"):
        AutoTAFSPipeline.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"from_pretrained\(\.\.\.\) or from_pipe"):
        AutoTAFSPipeline()


def test_from_pipe_neither_copies_nor_casts():
    pipe = families.stock("flux2-klein-distilled")
    pipe.transformer.to(torch.bfloat16)
    before = {n: id(p) for n, p in pipe.transformer.named_parameters()}
    mine = AutoTAFSPipeline.from_pipe(pipe)
    assert {n: id(p) for n, p in mine.transformer.named_parameters()} == before
    assert mine.transformer.dtype == torch.bfloat16 and mine.vae.dtype == torch.float32
    assert mine.config.is_distilled and all(mine.components[n] is c for n, c in pipe.components.items())
    assert AutoTAFSPipeline.from_pipe(mine) is mine
    assert AutoTAFSPipeline.from_pipe(type("Mine", (type(pipe),), {})(**pipe.components)).stock_class() is type(pipe)


def test_every_family_is_exported():
    drawn = {f.pipeline for f in FAMILIES.values()}
    assert {family.__name__ for family in pipelines.FAMILIES.values()} == drawn | families.EDITORS
    assert {family.__name__ for family in pipelines.FAMILIES.values()} <= set(trl_tafs.__all__)


# What differs -------------------------------------------------------------------------------------------------


def test_hidream_dev_s_lcm_scheduler_is_the_annealed_sampler_and_published_as_euler_s():
    lcm = FlowMatchLCMScheduler(shift=6.0)
    mine = families.ours(families.stock("hidream"), "hidream")
    mine.scheduler = lcm
    x = torch.randn(len(PROMPTS), *mine.latent_shape(16, 16), generator=torch.Generator().manual_seed(1))
    ours = rolled_out(mine, x, 16, 16)
    theirs = stock("hidream", mine)
    theirs.scheduler = lcm
    compare(ours.final, sampled(theirs, mine, x, 16, 16)[0], FAMILIES["hidream"].tolerance)
    assert torch.equal(mine.rollout_levels(4, 16, 16), lcm.sigmas), "the levels of its last set_timesteps"
    published = mine.annealed_scheduler()
    assert type(published) is FlowMatchEulerDiscreteScheduler
    assert (published.config.shift, published.config.stochastic_sampling) == (6.0, True)
    assert not {"scale_factors", "upscale_mode"} & published.config.keys(), "what Euler's doesn't have"


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler])
def test_a_shift_that_was_set_later_counts(scheduler):
    mine = families.ours(families.stock("sd3"), "sd3")
    mine.scheduler = scheduler(shift=3.0)
    mine.scheduler.set_shift(5.0)
    mine.scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert torch.equal(mine.rollout_levels(4, 8, 8), mine.scheduler.sigmas)
    assert mine.annealed_scheduler().config.shift == 5.0


def test_heun_s_shift_is_read():
    mine = families.ours(families.stock("sd3"), "sd3")
    mine.scheduler = FlowMatchHeunDiscreteScheduler(shift=2.5)
    assert mine.rollout_levels(2, 8, 8).tolist() == pytest.approx([1.0, 2.5 * 0.5 / 1.75, 0.0])


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (DDIMScheduler(), "is a DDIMScheduler, whose shift .* FlowMatchLCM- .* flow_shift"),
        (FlowMatchLCMScheduler(scale_factors=[0.5, 1.0]), r"FlowMatchLCMScheduler has scale_factors=\[0.5, 1.0\]"),
        (
            UniPCMultistepScheduler(use_flow_sigmas=True, use_dynamic_shifting=True, time_shift_type="exponential"),
            "is a UniPCMultistepScheduler, .* isn't dynamic",
        ),
    ],
    ids=["diffusion", "scales", "dynamic solver"],
)
def test_a_scheduler_that_can_t_be_used_is_refused_before_anything_is_moved(pipeline, tmp_path, scheduler, told):
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=told):
        tiny.trainer(pipeline, tmp_path)
    assert pipeline.transformer.training or any(p.requires_grad for p in pipeline.transformer.parameters())


def test_a_dpm_solver_s_flow_shift_is_kept():
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.5}
    mine = AutoTAFSPipeline.from_pipe(families.sana(DPMSolverMultistepScheduler(**options)))
    assert mine.rollout_levels(2, 32, 32).tolist() == pytest.approx([1.0, 2.5 * 0.5 / 1.75, 0.0])
    assert mine.annealed_scheduler().config.shift == 2.5 and mine.annealed_scheduler().config.stochastic_sampling
    mine.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler, whose shift can't be read"):
        mine.rollout_levels(2, 32, 32)


def test_the_embedded_guidance_reaches_the_model_and_only_one_that_takes_it():
    dev, schnell = (families.ours(families.stock(name), name) for name in ("flux-dev", "flux-schnell"))
    x = torch.randn(len(PROMPTS), *dev.latent_shape(16, 16))
    strong = rolled_out(dev, x, 16, 16, embedded_guidance_scale=7.0)
    assert not torch.equal(strong.final, rolled_out(dev, x, 16, 16).final)
    assert dev.call_arguments(4, embedded_guidance_scale=7.0)["guidance_scale"] == 7.0
    assert dev.call_arguments(4)["guidance_scale"] == 3.5 and "guidance_scale" not in schnell.call_arguments(4)
    with pytest.raises(ValueError, match="embedded_guidance_scale is 7.0, and this FluxTransformer2DModel takes no"):
        schnell.encode_conditioning(["a"], embedded_guidance_scale=7.0, max_sequence_length=families.LENGTH)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.guidance is None])
def test_guidance_that_the_stock_pipeline_has_not_is_refused(name, tmp_path):
    mine = families.ours(families.stock(name), name)
    with pytest.raises(ValueError, match=r"guidance_scale is 2.0.*use guidance_scale=1"):
        mine.encode_conditioning(["a"], guidance_scale=2.0, max_sequence_length=families.LENGTH)
    size = {"height": FAMILIES[name].size, "width": FAMILIES[name].size}
    with pytest.raises(ValueError, match=r"guidance_scale is 2.0.*use guidance_scale=1"):
        tiny.trainer(mine, tmp_path, sample_guidance_scale=2.0, train_cfg=True, **size)


@pytest.mark.parametrize(("name", "limit"), [("sd3", 512), ("flux-dev", 512), ("qwen-image", 1024)])
def test_more_tokens_than_the_stock_pipeline_takes_are_refused(name, limit, tmp_path):
    mine, size = families.ours(families.stock(name), name), FAMILIES[name].size
    assert mine.stock_sequence_limit == limit
    mine.check_sequence_length(limit)
    call = {"height": size, "width": size, "num_inference_steps": 2}
    mine("a", max_sequence_length=limit, **call)  # the stock pipeline itself
    with pytest.raises(ValueError, match="cannot be greater than"):
        mine("a", max_sequence_length=limit + 1, **call)
    message = f"max_sequence_length is {limit + 1}, and .* takes {limit} tokens at most.*use {limit} or less"
    with pytest.raises(ValueError, match=message):
        mine.encode_conditioning(["a"], max_sequence_length=limit + 1)
    with pytest.raises(ValueError, match=message):
        tiny.trainer(mine, tmp_path, height=size, width=size, max_sequence_length=limit + 1)
    with pytest.raises(ValueError, match=message):
        trl_tafs.evaluate({"m": mine}, ["a"], tiny.brightness, tmp_path / "out", max_sequence_length=limit + 1)


def test_a_length_in_which_no_prompt_fits_is_refused(tmp_path):
    lumina = families.ours(families.stock("lumina2"), "lumina2")
    lumina.system_prompt = "a photo of"
    assert lumina.prompt_tokens(["two red dog"]) == [3 + 4 + 3]  # "<", "Prompt", "Start", ">"
    with pytest.raises(ValueError, match=r"max_sequence_length is 7, and .* system prompt alone has 7 tokens"):
        tiny.trainer(lumina, tmp_path, height=32, width=32, max_sequence_length=7)
    lumina.check_sequence_length(8)
    longcat = families.ours(families.stock("longcat-image"), "longcat-image")
    with pytest.raises(ValueError, match="max_sequence_length is 4, and LongCatImagePipeline takes no other than its"):
        tiny.trainer(longcat, tmp_path, height=16, width=16, max_sequence_length=4)


def test_cogview4_is_told_the_levels_before_the_shift_and_others_than_whole_ones_are_rounded():
    mine = families.ours(families.stock("cogview4"), "cogview4")
    levels = mine.rollout_levels(5, 16, 32)[:-1]
    assert mine._told(levels * 1000, 16, 32).tolist() == mine.call_arguments(5)["timesteps"]
    assert mine._told(levels * 1000, 16, 16).tolist() != mine.call_arguments(5)["timesteps"], "by the size"
    mine.scheduler.register_to_config(time_shift_type="exponential")
    mine.scheduler = FlowMatchEulerDiscreteScheduler.from_config(mine.scheduler.config)
    assert mine._told(mine.rollout_levels(5, 16, 32)[:-1] * 1000, 16, 32).tolist() == [1000, 800, 600, 400, 200]


def test_lumina2_s_shift_is_of_its_channels_not_of_its_tokens():
    mine = families.ours(families.stock("lumina2"), "lumina2")
    assert torch.equal(mine.rollout_levels(4, 16, 16), mine.rollout_levels(4, 64, 64))


def test_what_a_family_cannot_do_is_said():
    klein = families.ours(families.stock("flux2-klein"), "flux2-klein")
    with pytest.raises(ValueError, match="negative prompt is 'blurry', and Flux2KleinPipeline takes only the empty"):
        klein.encode_conditioning(["a"], guidance_scale=2.0, negative_prompts="blurry")
    with pytest.raises(ValueError, match="negative prompt is 'blurry', and Flux2KleinPipeline takes only the empty"):
        klein.call_arguments(4, 2.0, "blurry")
    assert "negative_prompt" not in klein.call_arguments(4, 1.0, "blurry")
    hidream = families.ours(families.stock("hidream"), "hidream")
    with pytest.raises(ValueError, match="wouldn't draw 32 x 32.*use 16 x 16"):
        hidream.check_size(32, 32)
    sana = families.ours(families.stock("sana"), "sana")
    with pytest.raises(ValueError, match="multiples of 32, got 40 x 32; use 32 x 32"):
        sana.check_size(40, 32)


@pytest.mark.parametrize("name", ["flux-dev", "sana-sprint", "z-image", "qwen-image"])
def test_annealed_calls_honour_the_generator(name):
    mine = families.ours(families.stock(name), name)
    size = {"height": FAMILIES[name].size, "width": FAMILIES[name].size}
    call = size | {"prompt": "a red cat", "output_type": "pt", "max_sequence_length": families.LENGTH}

    def draw(seed):
        return mine(annealed=True, generator=torch.Generator().manual_seed(seed), **call).images

    first = draw(0)
    torch.manual_seed(1)
    assert torch.equal(first, draw(0)) and not torch.equal(first, draw(1))
    assert mine.num_timesteps == 4 and not mine.scheduler.config.get("stochastic_sampling", False)


def test_prompts_of_different_lengths_are_padded_alike_whatever_their_batch():
    mine = families.ours(families.stock("qwen-image"), "qwen-image")
    encode = PromptEncoder(mine, torch.device("cpu"))
    together, alone = encode(["a", "two red dog"]), encode(["a"])
    short, long = together.positive.mask.sum(1).tolist()
    assert together.positive.text.shape[1] == 64 and long == short + 2
    x, level = torch.randn(2, *mine.latent_shape(16, 16)), torch.full((2,), 0.5)
    assert torch.equal(mine.velocity(x, level, together)[:1], mine.velocity(x, level, encode(["a", "a"]))[:1]), (
        "a row's neighbour says something"
    )
    assert torch.equal(alone.positive.text, together[:1].positive.text)
    tight = mine.encode_conditioning(["a"])
    torch.testing.assert_close(mine.velocity(x[:1], level[:1], alone), mine.velocity(x[:1], level[:1], tight))


# Adapters for other tools -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", LORAS)
def test_a_folded_lora_is_the_same_one_and_needs_no_metadata(lora, tmp_path):
    mine = families.ours(families.stock("flux-dev"), "flux-dev")
    config = attach(mine, **LORAS[lora])
    x = torch.randn(len(PROMPTS), *mine.latent_shape(16, 16))
    ours = mine.decode_latents(rolled_out(mine, x, 16, 16).final)
    save_adapter(mine, tmp_path, lora_config=config, fold_alpha=True)
    weights, read = read_adapter(tmp_path)
    assert read.lora_alpha == read.r and not read.use_rslora and dict(read.alpha_pattern) == dict(read.rank_pattern)
    file = tmp_path / WEIGHT_NAME
    save_file({f"transformer.{key}": weight for key, weight in weights.items()}, file)  # without metadata
    pipe = stock("flux-dev", stochastic_sampling=True)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(sampled(pipe, mine, x, 16, 16)[1], ours, rtol=1e-5, atol=1e-5)


def test_a_power_of_two_folds_without_rounding():
    mine = families.ours(families.stock("flux-dev"), "flux-dev")
    config = attach(mine, r=4, lora_alpha=8)
    layers = {"a.lora_A.weight": torch.randn(4, 3), "a.lora_B.weight": torch.randn(3, 4)}
    folded, plain = folded_alpha(layers, config)
    assert torch.equal(folded["a.lora_B.weight"], 2 * layers["a.lora_B.weight"])
    assert torch.equal(folded["a.lora_A.weight"], layers["a.lora_A.weight"]) and plain.lora_alpha == plain.r == 4


# The card -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "sana", "sana-sprint", "z-image"])
def test_the_card_says_the_base_s_dtype_whatever_the_states(name, tmp_path):
    mine, size = families.ours(families.stock(name), name), FAMILIES[name].size
    mine.transformer.to(torch.bfloat16)
    trainer = tiny.trainer(mine, tmp_path, height=size, width=size)
    facts = trainer.publisher.facts(tmp_path, None)
    assert facts.dtype == "bfloat16" and "dtype=torch.bfloat16" in usage_code(facts)


def test_hidream_s_card_loads_its_llama_too(tmp_path):
    mine = families.ours(families.stock("hidream"), "hidream")
    llama = {"text_encoder_4": mine.text_encoder_4, "tokenizer_4": mine.tokenizer_4}
    for part in llama.values():
        part.save_pretrained(tmp_path / "llama")
    save_adapter(mine, tmp_path / "adapter", lora_config=attach(mine, **PLAIN))
    base = families.stock("hidream")
    base.register_modules(text_encoder_4=None, tokenizer_4=None)  # as the repository has it
    base.save_pretrained(tmp_path / "base")
    mine = AutoTAFSPipeline.from_pretrained(tmp_path / "base", **llama)

    assert base_model_facts(mine)["base_llama"] is None, "a name of this machine says nothing elsewhere"
    mine.text_encoder_4.name_or_path = "org/llama"
    levels = [1.0, 0.75, 0.5, 0.25]
    facts = CardFacts(
        pipeline_class="HiDreamImagePipeline",
        num_steps=4,
        levels_unshifted=levels,
        levels=levels,
        height=16,
        width=16,
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        **base_model_facts(mine),
    )
    code = usage_code(facts, base=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    code = code.replace("org/llama", str(tmp_path / "llama")).split("pipe.to(")[0]
    scope = {}
    exec(compile(code, "card", "exec"), scope)
    assert type(scope["pipe"]) is mine.stock_class() and type(scope["pipe"].text_encoder_4) is LlamaForCausalLM
    weights, theirs = mine.text_encoder_4.state_dict(), scope["pipe"].text_encoder_4.state_dict()
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)


@pytest.mark.parametrize("name", ["lumina2", "longcat-image"])
def test_the_card_s_code_draws_what_was_trained_whether_or_not_the_stock_pipeline_loads_a_lora(name, tmp_path):
    mine, size = families.ours(families.stock(name), name), FAMILIES[name].size
    trainer = tiny.trainer(mine, tmp_path / "run", height=size, width=size)
    attached = {n: p for n, p in mine.transformer.named_parameters() if "lora_B" in n}
    for parameter in attached.values():
        torch.nn.init.normal_(parameter.data, std=0.2)
    trainer.save_pretrained(tmp_path / "adapter")
    loads = "pipe.load_lora_weights(" if name == "lumina2" else "pipe.transformer.load_lora_adapter("
    code = usage_code(trainer.publisher.facts(tmp_path / "adapter", None), adapter=str(tmp_path / "adapter"))
    assert code.count(loads) == 1
    line = next(line for line in code.splitlines() if line.startswith(loads))
    pipe = stock(name)
    exec(line, {"pipe": pipe})
    theirs = {n: p for n, p in pipe.transformer.named_parameters() if "lora_B" in n}
    assert attached and len(theirs) == len(attached) and all(weight.any() for weight in theirs.values())


# Encoded prompts on disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "qwen-image", "hidream"])
def test_a_second_run_needs_no_text_encoder(name, tmp_path):
    mine = families.ours(families.stock(name), name)
    options = {"max_sequence_length": families.LENGTH, "guidance_scale": 2.0, "cache_dir": tmp_path}
    first = PromptEncoder(mine, torch.device("cpu"), **options)
    first.prepare(PROMPTS)
    expected = PromptEncoder(mine, torch.device("cpu"), **(options | {"cache_dir": None}))(PROMPTS)
    for component in [n for n in mine.components if n.startswith("text_encoder")]:
        mine.register_modules(**{component: None})
    again = PromptEncoder(mine, torch.device("cpu"), **options)
    found = again(PROMPTS)
    for half in ("positive", "negative"):
        for field in dataclasses.fields(getattr(expected, half)):
            ours, theirs = getattr(getattr(found, half), field.name), getattr(getattr(expected, half), field.name)
            assert ours is theirs is None or torch.equal(ours, theirs), field.name
    with pytest.raises(ValueError, match="the prompt 'blue' isn't encoded yet, and the pipeline has no text encoder"):
        again(["blue"])
    with pytest.raises(ValueError, match="isn't encoded yet"):  # other arguments are another embedding
        PromptEncoder(mine, torch.device("cpu"), **(options | {"max_sequence_length": 4}))(["a"])


def test_prompts_that_are_prepared_are_on_disk_alone(tmp_path):
    mine = families.ours(families.stock("sd3"), "sd3")
    encode = PromptEncoder(mine, torch.device("cpu"), max_sequence_length=families.LENGTH, cache_dir=tmp_path)
    encode.prepare([*PROMPTS, *PROMPTS])
    assert not encode.cache and len(list(tmp_path.iterdir())) == len(set(PROMPTS))


def test_embeddings_by_other_text_encoders_lie_apart(tmp_path):
    options = {"max_sequence_length": families.LENGTH, "cache_dir": tmp_path}

    def encoder(**missing):
        mine = families.ours(families.stock("sd3"), "sd3")
        mine.register_modules(**missing)
        return PromptEncoder(mine, torch.device("cpu"), **options)

    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    without_t5 = encoder(text_encoder_3=None)(["a"]).positive.text
    assert [path.name for path in tmp_path.iterdir()] == ["without_text_encoder_3"]
    nothing = encoder(**dict.fromkeys(names))
    assert torch.equal(nothing(["a"]).positive.text, without_t5), "nothing else is there"
    whole = encoder()(["a"]).positive.text
    assert not torch.equal(whole, without_t5)
    assert torch.equal(encoder(**dict.fromkeys(names))(["a"]).positive.text, whole)
    assert torch.equal(encoder(text_encoder_3=None)(["a"]).positive.text, without_t5)


def test_another_revision_of_the_base_is_another_embedding(tmp_path):
    mine = families.ours(families.stock("sd3"), "sd3")
    encode = PromptEncoder(mine, torch.device("cpu"), cache_dir=tmp_path)
    files = [encode._file("a")]
    for commit in ("0" * 40, "1" * 40):
        mine.vae.register_to_config(_name_or_path=f"hub/models--a--b/snapshots/{commit}/vae")
        files.append(encode._file("a"))
    assert len(set(files)) == 3


# The example configurations -----------------------------------------------------------------------------------

TWINS = {
    "sd35_medium_24gb": "sd3",
    "sd35_medium_paper": "sd3",
    "sd35_large_80gb": "sd3",
    "flux1_dev_24gb": "flux-dev",
    "flux1_dev_paper": "flux-dev",
    "flux2_klein_24gb": "flux2-klein",
    "flux2_dev_80gb": "flux2",
    "qwen_image_24gb": "qwen-image",
    "z_image_24gb": "z-image",
    "hidream_80gb": "hidream",
    "sana_24gb": "sana",
    "sana_sprint_24gb": "sana-sprint",
    "lumina2_24gb": "lumina2",
    "chroma_80gb": "chroma",
    "cogview4_80gb": "cogview4",
    "aura_flow_80gb": "aura-flow",
    "ovis_image_80gb": "ovis-image",
    "longcat_image_80gb": "longcat-image",
}
TWIN_LENGTHS = {"lumina2": 64, "longcat-image": None}  # what holds a system prompt; what takes no other length


@pytest.mark.parametrize("name", TWINS)
def test_a_recipe_trains_its_tiny_twin(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    twin = FAMILIES[TWINS[name]]
    stock = families.stock(TWINS[name])
    stock.save_pretrained(tmp_path / "twin")
    if TWINS[name] == "hidream":  # as its repositories are: Llama is another one
        without_llama(stock, tmp_path, monkeypatch)
    for attribute, value in twin.attributes.items():  # which no file of a pipeline holds
        held = property(lambda self, value=value: value, lambda self, value: None)
        monkeypatch.setattr(type(stock), attribute, held, raising=False)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    file = tiny.ROOT / "examples" / "configs" / f"{name}.yaml"
    arguments, config = parse_arguments(["--config", str(file)])
    assert (config.lora_rank, config.lora_alpha) == (32, 64)
    # bitsandbytes isn't here
    monkeypatch.setattr(arguments_module, "quantization_config", lambda name, components: None)
    monkeypatch.setattr(arguments_module, "require", lambda *needed: None)
    small = {
        "pretrained_model": tmp_path / "twin",
        "prompts": tmp_path / "prompts.txt",
        "reward": "jpeg_compressibility=1.0",
        "eval_prompts": tmp_path / "prompts.txt",
        "eval_reward": "jpeg_incompressibility=1.0",
        "reward_options": "{}",
        "metric_for_best_model": "eval/annealed_4/jpeg_incompressibility",
        "num_epochs": 1,
        "height": twin.size,
        "width": twin.size,
        "max_sequence_length": TWIN_LENGTHS.get(TWINS[name], families.LENGTH),
        "sample_batch_size": 2,
        "sample_num_batches_per_epoch": 4,
        "num_generations": 4,
        "train_batch_size": 2,
        "sample_grid_freq": 0,
        "disable_tqdm": True,
        "logdir": tmp_path,
        "run_name": "run",
    }
    options = [str(word) for key, value in small.items() if value is not None for word in (f"--{key}", value)]
    assert main(["train", "--config", str(file), *options]) == 0
    weights, lora = read_adapter(tmp_path / "run" / "adapter")
    assert lora.r == 32 and any(weight.abs().sum() > 0 for key, weight in weights.items() if "lora_B" in key)


def without_llama(stock, folder, monkeypatch):
    """HiDream's twin as its repositories are, and its Llama beside it, where `examples/hidream_llama.py` looks."""
    stock.text_encoder_4.save_pretrained(folder / "llama")
    stock.tokenizer_4.save_pretrained(folder / "llama")
    index = json.loads((folder / "twin" / "model_index.json").read_text())
    for part in ("text_encoder_4", "tokenizer_4"):
        shutil.rmtree(folder / "twin" / part)
        del index[part]
    (folder / "twin" / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setenv("HIDREAM_LLAMA", str(folder / "llama"))


def test_a_quantization_is_diffusers_own_configuration():
    found = quantization_config("nf4", ["transformer", "text_encoder"])
    assert found.quant_backend == "bitsandbytes_4bit" and found.quant_kwargs["bnb_4bit_quant_type"] == "nf4"
    assert found.components_to_quantize == ["transformer", "text_encoder"]
    with pytest.raises(ValueError, match="quantization is 'fp4'; use nf4 or int8"):
        quantization_config("fp4", [])
