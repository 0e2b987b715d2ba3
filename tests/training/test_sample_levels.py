"""`sample_levels`: what is trained, drawn for an evaluation, written and published are the same levels."""

import json

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from trl_tafs import TAFSGRPOConfig
from trl_tafs.algorithm import build_algorithm
from trl_tafs.method.allocation import GroupBounds
from trl_tafs.method.kernels import KERNELS
from trl_tafs.method.losses import FORWARD_WEIGHTINGS, LEVEL_WEIGHTINGS
from trl_tafs.method.noise import SampleNoise
from trl_tafs.method.rollout import rollout

SMALL = {"num_epochs": 1, "sample_num_steps": 6, "sample_levels": "scheduler"}


@pytest.fixture
def shifted(pipeline):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=3.0)
    return pipeline


def test_a_run_trains_evaluates_and_publishes_the_levels_of_the_scheduler(shifted, tmp_path):
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    own.set_timesteps(6)
    held_out = {"eval_prompts": ["two"], "eval_freq": 1, "eval_num_steps": [6], "eval_samplers": ["ode"]}
    trainer = tiny.trainer(shifted, tmp_path, **SMALL, **held_out)
    torch.testing.assert_close(trainer.algorithm.levels, own.sigmas, rtol=0, atol=2e-7)
    assert trainer.draw_spec("ode", 6).label == "ode_6_8x8_scheduler"
    trainer.train()
    settings = json.loads((tmp_path / "adapter" / "training_settings.json").read_text())
    assert settings["sample_levels"] == "scheduler"
    assert settings["levels"] == pytest.approx(own.sigmas.tolist(), abs=1e-6)
    facts = trainer.publisher.facts(tmp_path / "adapter", None)
    assert facts.call["sigmas"] == facts.levels_unshifted == shifted.unshifted_levels(6, "scheduler").tolist()
    assert facts.levels == pytest.approx(own.sigmas[:-1].tolist(), abs=1e-6)
    with pytest.warns(UserWarning, match="sample_levels scheduler -> uniform"):
        tiny.trainer(shifted, tmp_path, **{**SMALL, "sample_levels": "uniform", "resume_from": "latest"})


def test_an_evaluation_draws_at_the_levels_that_it_is_asked_for(shifted, tmp_path):
    trainer = tiny.trainer(shifted, tmp_path, **SMALL)
    uniform = tiny.trainer(shifted, tmp_path / "uniform", **{**SMALL, "sample_levels": "uniform"})
    specs = [one.draw_spec("ode", 4) for one in (trainer, uniform)]
    images = [trainer.drawer.images(spec, ["two"], [0]) for spec in specs]
    assert specs[1].label == "ode_4_8x8" and not torch.equal(*images)


def loss_at_the_scheduler_s_levels(**changes):
    """A loss of a toy policy and its gradient, at the levels of ten steps that end at .0089."""
    config = TAFSGRPOConfig(sample_num_steps=10, sample_levels="scheduler", **changes)
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    own.set_timesteps(10)
    made = build_algorithm(config, GroupBounds(4, 4, 4), own.sigmas, (4,))
    scale = torch.tensor(0.3, requires_grad=True)

    def velocity(x, level, conditioning):
        return scale * x

    x, noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), SampleNoise(0, 0, (0, 1, 2, 3))
    taken = rollout(velocity, made.kernel, None, own.sigmas, x, noise, reduction=config.log_prob_reduction)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None, None].expand(taken.log_probs.shape)
    rows = made.objective.items(taken, advantages, noise)
    output = made.objective(velocity, rows, None, lambda x, level, conditioning: 0.2 * x)
    return taken, output.loss, torch.autograd.grad(output.loss, scale)[0]


@pytest.mark.parametrize("kernel", ["annealed", "flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("weighting", LEVEL_WEIGHTINGS)
def test_an_action_near_zero_noise_has_a_finite_gradient_and_the_last_step_never_trains(kernel, weighting):
    taken, loss, gradient = loss_at_the_scheduler_s_levels(
        objective="clipped", sample_kernel=kernel, train_level_weighting=weighting, beta=0.1
    )
    assert taken.steps.tolist() == list(range(9)), "the step from .0089 to 0 isn't"
    assert loss.isfinite() and gradient.isfinite() and gradient != 0


@pytest.mark.parametrize("objective", ["forward", "awm"])
@pytest.mark.parametrize("weighting", FORWARD_WEIGHTINGS)
def test_matching_near_zero_noise_has_a_finite_gradient(objective, weighting):
    _, loss, gradient = loss_at_the_scheduler_s_levels(
        objective=objective, sample_kernel="ode", forward_levels="sampler", train_level_weighting=weighting, beta=0.1
    )
    assert loss.isfinite() and gradient.isfinite() and gradient != 0


def test_every_kernel_with_a_density_leaves_the_last_step_or_explores_its_image():
    for name, kernel in KERNELS.items():
        if kernel.has_density and name != "clean":
            assert (
                kernel.from_options(TAFSGRPOConfig(sample_kernel=name, objective="clipped")).trained_steps(10).stop == 9
            )
