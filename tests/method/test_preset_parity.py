"""Presets against the public code that they cite, from the same tensors (parity/freeze.py says which code)."""

import sys
from pathlib import Path

import pytest
import torch

from trl_tafs.config import TAFSGRPOConfig
from trl_tafs.method.advantages import normalize_groups
from trl_tafs.method.kernels import Transition
from trl_tafs.method.types import ForwardItems, Transitions
from trl_tafs.presets import DIFFERENCES, PRESETS

sys.path.insert(0, str(Path(__file__).with_name("parity")))

import public_cases as cases  # noqa: E402

STEPS = pytest.mark.parametrize("n", cases.STEPS)
LEVELS = torch.tensor(cases.LEVELS)
ADVANTAGES = torch.tensor(cases.ADVANTAGES)[:, None]


def parts(name):
    """The kernel and the objective of a preset, at a clip range that nothing reaches."""
    config = TAFSGRPOConfig.from_preset(name)
    kernel = config.kernel_class.from_options(config)
    return kernel, config.objective_class.from_options(config, kernel, 0.025)


def close(got, expected, **tolerance):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        got.detach().double().flatten(), expected.flatten(), **{"rtol": 2e-4, "atol": 1e-6} | tolerance
    )


def action_rows(kernel, n, reduction="mean"):
    """Four rows at step n whose action is given, on policy at `wave("v")`."""
    level, following = LEVELS[n].expand(4), LEVELS[n + 1].expand(4)
    x, action = cases.wave("x"), cases.wave("next")[:, None]
    old = kernel.transition(x, cases.wave("v"), level, following).log_prob(action, reduction)
    return Transitions(x, action, level, following, old, ADVANTAGES, torch.arange(4))


def given(tensor):
    return lambda x, level, conditioning: tensor


@STEPS
def test_flow_grpos_step_loss_kl_and_gradient(n):
    frozen, (kernel, objective) = cases.frozen("flow_grpo")[str(n)], parts("flow_grpo")
    rows, v = action_rows(kernel, n), cases.wave("v").requires_grad_()
    policy = kernel.transition(rows.state, v, rows.level, rows.next_level)
    close(policy.mean, frozen["mean"])
    close(kernel.diffusion(rows.level, rows.next_level), frozen["g"])
    close(policy.log_prob(rows.action, "mean"), frozen["log_prob"])
    output = objective(given(v), rows, None, given(cases.wave("base")))
    close(output.metrics["kl"], frozen["kl"][0])
    close(output.loss, frozen["loss"][0])
    close(torch.autograd.grad(output.loss, v)[0], frozen["gradient"])


def test_flow_grpos_advantages_but_for_the_unbiased_deviation():
    rewards, groups = torch.tensor(cases.REWARDS), torch.tensor([0] * 4 + [1] * 4)
    got = normalize_groups(rewards, groups, TAFSGRPOConfig.from_preset("flow_grpo").scale_rewards)
    close(got * (8 / 7) ** 0.5, cases.frozen("flow_grpo")["advantages"], rtol=1e-3)


@STEPS
def test_mix_grpos_step_within_its_window(n):
    frozen, (kernel, _) = cases.frozen("mix_grpo")[str(n)], parts("mix_grpo")
    rows = action_rows(kernel, n)
    policy = kernel.transition(rows.state, cases.wave("v"), rows.level, rows.next_level)
    close(policy.mean, frozen["mean"])
    close(policy.std.reshape(-1)[:1], frozen["std"])
    close(policy.log_prob(rows.action, "mean"), frozen["log_prob"])


@STEPS
def test_dance_grpos_log_probability_and_policy_gradient(n):
    frozen, (kernel, objective) = cases.frozen("dance_grpo")[str(n)], parts("dance_grpo")
    rows, v = action_rows(kernel, n, objective.reduction), cases.wave("v").requires_grad_()
    policy = kernel.transition(rows.state, v, rows.level, rows.next_level)
    close(policy.log_prob(rows.action, "mean"), frozen["log_prob"])
    (gradient,) = torch.autograd.grad(objective(given(v), rows, None).loss, v)
    close(gradient / 12**0.5, frozen["gradient"])  # "sqrt" units here, D = 12; Adam's step is the same


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_diffusion_nfts_loss_with_its_kl_and_gradient(beta):
    config = TAFSGRPOConfig.from_preset("diffusion_nft", nft_beta=beta)
    objective = config.objective_class.from_options(config, config.kernel_class.from_options(config), 0.025)
    v = cases.wave("v").requires_grad_()
    rows = ForwardItems(
        cases.wave("x"), cases.wave("clean"), torch.full((4,), 0.75), ADVANTAGES, torch.arange(4), cases.wave("old")
    )
    output = objective(given(v), rows, None, given(cases.wave("base")))
    close(output.loss, cases.frozen("diffusion_nft")[str(beta)]["loss"][0])
    close(torch.autograd.grad(output.loss, v)[0], cases.frozen("diffusion_nft")[str(beta)]["gradient"])
    assert config.num_replayed_rows == 9 and config.rows_per_image == 10


def test_awms_log_probability_and_gradient_in_proportion():
    (_, objective), level, frozen = parts("awm"), torch.tensor([0.9, 0.75, 0.5, 0.25]), cases.frozen("awm")
    v, wide = cases.wave("v").requires_grad_(), level.reshape(4, 1, 1, 1)
    state = (1 - wide) * cases.wave("clean") + wide * cases.wave("noise")
    rows = ForwardItems(state, cases.wave("clean"), level, ADVANTAGES, torch.arange(4))
    unit = Transition(v, torch.tensor(1.0))
    log_prob = unit.log_prob(cases.wave("noise") - cases.wave("clean"), "mean")
    close(2 * (log_prob - unit.log_prob(v.detach(), "mean")), frozen["log_prob"])
    output = objective(given(v), rows, None, given(cases.wave("base")))
    close(torch.autograd.grad(output.loss, v)[0] / 2.5, frozen["gradient"])


def test_every_preset_of_public_code_says_what_differs():
    ours = {name for name in PRESETS if name.startswith("tafs") or name == "paper"}
    assert PRESETS.keys() - ours == DIFFERENCES.keys()
