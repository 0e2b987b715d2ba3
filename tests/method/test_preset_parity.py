"""Presets against the public code that they cite, from the same tensors (parity/freeze.py says which code)."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from trl_tafs.algorithm import build_window
from trl_tafs.config import TAFSGRPOConfig
from trl_tafs.method.advantages import Advantages
from trl_tafs.method.credit import Credit, TerminalCredit
from trl_tafs.method.kernels import Transition
from trl_tafs.method.types import ForwardItems, RewardTable, Transitions
from trl_tafs.policy.copies import OldPolicy
from trl_tafs.presets import DIFFERENCES, PRESETS

sys.path.insert(0, str(Path(__file__).with_name("parity")))

import public_cases as cases  # noqa: E402

STEPS = pytest.mark.parametrize("n", cases.STEPS)
LEVELS = torch.tensor(cases.LEVELS)
ADVANTAGES = torch.tensor(cases.ADVANTAGES)[:, None]


def parts(name, clip_range=0.025):
    """The kernel and the objective of a preset, by default at a clip range that nothing reaches."""
    config = TAFSGRPOConfig.from_preset(name)
    kernel = config.kernel_class.from_options(config)
    return kernel, config.objective_class.from_options(config, kernel, clip_range)


def close(got, expected, **tolerance):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        got.detach().double().flatten(), expected.flatten(), **{"rtol": 2e-4, "atol": 1e-6} | tolerance
    )


def action_rows(kernel, n, reduction="mean", old=None):
    """Four rows at step n whose action is given, of an old policy that predicts `wave("v")` unless another is given."""
    level, following = LEVELS[n].expand(4), LEVELS[n + 1].expand(4)
    x, action = cases.wave("x"), cases.wave("next")[:, None]
    sampled = kernel.transition(x, cases.wave("v") if old is None else old, level, following)
    old = sampled.log_prob(action, reduction)
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


@STEPS
def test_flow_cps_step_loss_and_gradient_on_policy(n):
    frozen, (kernel, objective) = cases.frozen("flow_cps")[str(n)], parts("flow_cps", cases.CPS_CLIP)
    objective = dataclasses.replace(objective, reduction="mean")  # the preset's units differ by a factor, sqrt(D)
    rows, v = action_rows(kernel, n), cases.wave("v").requires_grad_()
    policy = kernel.transition(rows.state, v, rows.level, rows.next_level)
    close(policy.mean, frozen["mean"])
    close(policy.std.reshape(-1), frozen["std"])
    plain = 2 * policy.std.reshape(4, 1).square()
    constant = policy.log_prob(policy.mean[:, None], "mean")
    close(plain * (policy.log_prob(rows.action, "mean") - constant), frozen["log_prob"])
    output = objective(given(v), rows, None)
    close(output.loss, frozen["on_policy"]["loss"][0])
    close(torch.autograd.grad(output.loss, v)[0], frozen["on_policy"]["gradient"])


@STEPS
def test_flow_cps_clips_the_same_actions_once_the_policy_has_moved(n):
    frozen, (kernel, objective) = cases.frozen("flow_cps")[str(n)]["moved"], parts("flow_cps", cases.CPS_CLIP)
    objective = dataclasses.replace(objective, reduction="mean")
    rows, v = action_rows(kernel, n, old=cases.moved()), cases.wave("v").requires_grad_()
    output = objective(given(v), rows, None)
    close(output.loss, frozen["loss"][0])
    gradient = torch.autograd.grad(output.loss, v)[0]
    close(gradient, frozen["gradient"], rtol=1e-3)
    assert n == 0 or (gradient.flatten(1) == 0).all(1).any(), "something is clipped"


@pytest.mark.parametrize("name", ["flow_grpo", "flow_cps", "dance_grpo", "mix_grpo", "diffusion_nft", "awm"])
def test_advantages_but_for_the_unbiased_deviation_where_it_is_the_batchs(name):
    config, groups = TAFSGRPOConfig.from_preset(name), torch.tensor([0] * 4 + [1] * 4)
    rewards = {"one": cases.REWARDS} | ({"two": cases.OTHER_REWARDS} if name == "mix_grpo" else {})
    values = torch.tensor(list(rewards.values()), dtype=torch.float64).T.reshape(8, 1, 1, -1)
    table = RewardTable(values, tuple(rewards), torch.tensor([cases.WEIGHTS[key] for key in rewards]).double())
    made = Advantages(Credit(TerminalCredit()), config.scale_rewards, config.multi_objective_aggregation)
    got = made(table, groups, cases.PROMPTS, 1).advantages
    close(got * ((8 / 7) ** 0.5 if config.scale_rewards == "batch" else 1), cases.frozen(name)["advantages"], rtol=2e-3)


@STEPS
def test_mix_grpos_step_loss_and_gradient_within_its_window(n):
    frozen, (kernel, objective) = cases.frozen("mix_grpo")[str(n)], parts("mix_grpo")
    rows, v = action_rows(kernel, n, objective.reduction), cases.wave("v").requires_grad_()
    policy = kernel.transition(rows.state, v, rows.level, rows.next_level)
    close(policy.mean, frozen["mean"])
    close(policy.std.reshape(-1)[:1], frozen["std"])
    close(policy.log_prob(rows.action, "mean"), frozen["log_prob"])
    loss = objective(given(v), rows, None).loss
    close(loss, frozen["loss"][0])
    close(torch.autograd.grad(loss, v)[0] / 12**0.5, frozen["gradient"])  # "sqrt" units here, D = 12


def test_mix_grpos_window_but_for_the_places_where_it_gets_shorter():
    config = TAFSGRPOConfig.from_preset("mix_grpo")
    window, places = build_window(config), cases.frozen("mix_grpo")["window"]
    whole = [place for place in places if len(place) == config.sample_window_size]
    assert [list(window.at(config.sample_window_interval * i)) for i in range(len(whole))] == whole
    assert [len(place) for place in places if place not in whole] == [3, 2, 1, 0], "what DIFFERENCES says"


@STEPS
def test_dance_grpos_log_probability_and_policy_gradient(n):
    frozen, (kernel, objective) = cases.frozen("dance_grpo")[str(n)], parts("dance_grpo")
    rows, v = action_rows(kernel, n, objective.reduction), cases.wave("v").requires_grad_()
    policy = kernel.transition(rows.state, v, rows.level, rows.next_level)
    close(policy.mean, frozen["mean"], rtol=1e-3, atol=1e-5)  # the source divides by the level's square
    close(policy.log_prob(rows.action, "mean"), frozen["log_prob"])
    loss = objective(given(v), rows, None).loss
    close(loss, frozen["loss"][0])
    (gradient,) = torch.autograd.grad(loss, v)
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


def test_diffusion_nfts_old_policy_lags_as_there():
    config = TAFSGRPOConfig.from_preset("diffusion_nft")
    for epoch, decay in zip(cases.DECAY_STEPS, cases.frozen("diffusion_nft")["decay"], strict=True):
        old = OldPolicy([torch.nn.Parameter(torch.zeros(1))], config.old_policy_decay, config.old_policy_ramp)
        old.load_state_dict({"weights": [torch.ones(1)], "epochs": epoch - 1})
        old.update()
        close(old.weights[0], [decay])


def test_awms_log_probability_and_gradient_in_proportion():
    (_, objective), level, frozen = parts("awm"), torch.tensor([0.9, 0.75, 0.5, 0.25]), cases.frozen("awm")
    v, wide = cases.wave("v").requires_grad_(), level.reshape(4, 1, 1, 1)
    state = (1 - wide) * cases.wave("clean") + wide * cases.wave("noise")
    rows = ForwardItems(state, cases.wave("clean"), level, ADVANTAGES, torch.arange(4))
    unit = Transition(v, torch.tensor(1.0))
    log_prob = unit.log_prob(cases.wave("noise") - cases.wave("clean"), "mean")
    close(2 * (log_prob - unit.log_prob(v.detach(), "mean")), frozen["log_prob"])
    output = objective(given(v), rows, None, given(cases.wave("base")))
    close(2 * output.metrics["kl"], frozen["kl"])
    close(torch.autograd.grad(output.loss, v)[0] / 2.5, frozen["gradient"])


def test_every_preset_of_public_code_says_what_differs():
    ours = {name for name in PRESETS if name.startswith("tafs") or name == "paper"}
    assert PRESETS.keys() - ours == DIFFERENCES.keys()
