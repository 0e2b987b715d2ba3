"""Every family: the rollout is what the stock, unmodified pipeline samples, and what is trained is what it loads."""

import copy
import json

import families
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
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
