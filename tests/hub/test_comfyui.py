"""What the card says of ComfyUI is what ComfyUI computes."""

import pytest
import torch
from digits_components import build_pipeline
from published import LEVELS, facts

from trl_tafs.hub.comfyui import is_simple, recipe, simple_levels
from trl_tafs.method.kernels import Annealed


def table(shift, timesteps=1000):
    """ComfyUI's table of a flow model's levels, ascending (ModelSamplingDiscreteFlow, time_snr_shift)."""
    t = torch.arange(1, timesteps + 1, 1) / timesteps
    return t if shift == 1.0 else shift * t / (1 + (shift - 1) * t)


def simple(sigmas, steps):
    """Its scheduler `simple`, without the zero at the end."""
    spacing = len(sigmas) / steps
    return [float(sigmas[-(1 + int(x * spacing))]) for x in range(steps)]


@pytest.mark.parametrize("shift", [1.0, 3.0, 3.158])
@pytest.mark.parametrize("steps", [2, 3, 4, 6, 7, 8])
def test_simple_picks_these_levels(shift, steps):
    assert simple_levels(steps, shift) == pytest.approx(simple(table(shift), steps), abs=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_trained_levels_are_simple_s_at_the_shifts_of_sd3_and_schnell(shift):
    pipeline = build_pipeline(0)
    pipeline.scheduler = type(pipeline.scheduler)(shift=shift)
    from trl_tafs import AutoTAFSPipeline

    levels = AutoTAFSPipeline.from_pipe(pipeline).rollout_levels(4, 512, 512)[:-1].tolist()
    assert levels == pytest.approx(simple(table(shift), 4), abs=1e-6)
    assert is_simple(levels, shift) and not is_simple(levels, 2.0)


def test_lcm_on_a_flow_model_is_the_annealed_sampler():
    x, v, noise = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    s, s_next = torch.tensor(0.75), torch.tensor(0.5)
    denoised = x - v * s  # CONST.calculate_denoised
    lcm = s_next * noise + (1.0 - s_next) * denoised  # CONST.noise_scaling
    torch.testing.assert_close(Annealed().transition(x, v, s, s_next).sample(noise), lcm)


def test_the_card_s_recipe_is_for_levels_that_match_and_the_sigmas_for_others():
    shifted = simple_levels(4, 3.0)
    text = recipe(facts(levels=shifted, comfyui_shift=3.0))
    assert "`lcm`, `simple`, 4 steps, cfg 1." in text and "shift of 3" in text
    assert "`euler`" in recipe(facts(levels=shifted, comfyui_shift=3.0, anneals=False, guidance_scale=2.5))
    other = recipe(facts(levels=LEVELS, comfyui_shift=3.0, embedded_guidance=3.5))
    assert "`ManualSigmas` `1, 0.75, 0.5, 0.25, 0`" in other and "`FluxGuidance` 3.5" in other and "simple" not in other
    assert recipe(facts(levels=shifted, comfyui_shift=None)) == ""
    assert recipe(facts(levels=shifted, comfyui_shift=3.0, whole_denoiser="SD3Transformer2DModel")) == ""
