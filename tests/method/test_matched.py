"""Eq. 10 on the next clean image."""

import dataclasses
import math

import pytest
import torch
from toy import LEVELS, Linear, condition, no_reference, rolled_out

from trl_tafs.method.image_objectives import ForwardObjective, MatchedObjective, MatchingObjective
from trl_tafs.method.kernels import Annealed, FlowSde, Ode, Windowed, clean_estimate
from trl_tafs.method.options import MethodOptions
from trl_tafs.method.types import ForwardItems

UNITS = {"mean": 1 / 12, "sqrt": 1 / math.sqrt(12), "sum": 1.0}


def rows_of(objective, result=None, advantages=None):
    result = rolled_out(Annealed()) if result is None else result
    return objective.items(result, torch.randn(5, 3, 1) if advantages is None else advantages)


class Estimates(torch.nn.Module):
    """A velocity whose clean estimates are its parameters, one a row."""

    def __init__(self, estimate):
        super().__init__()
        self.estimate = torch.nn.Parameter(estimate.clone())

    def forward(self, x, level, conditioning):
        return (x - self.estimate) / level.reshape(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("kernel", [Annealed(), Annealed(0.5), FlowSde(), Ode(), Windowed(Annealed(), range(1, 3))])
def test_an_item_is_a_state_and_the_clean_image_of_the_step_that_follows(kernel):
    result = rolled_out(kernel)
    steps = result.steps.tolist()
    advantages = torch.arange(5.0 * len(steps)).reshape(5, len(steps), 1)
    rows = rows_of(MatchedObjective(), result, advantages)
    for image in range(5):
        for i, n in enumerate(steps):
            row = rows[len(steps) * image + i]
            assert torch.equal(row.state, result.states[image, i]) and row.level == LEVELS[n]
            assert torch.equal(row.clean, result.clean[image, n + 1])
            assert row.sample == image and row.advantage == advantages[image, i]


@pytest.mark.parametrize("reduction", UNITS)
@pytest.mark.parametrize("weighting", ["clean", "velocity", "adaptive"])
def test_on_policy_the_gradient_by_the_estimate_is_advantage_times_distance_over_sigma_squared(weighting, reduction):
    objective = MatchedObjective(weighting=weighting, reduction=reduction)
    velocity = Linear()
    rows = rows_of(objective, rolled_out(Annealed(), 5, velocity))
    with torch.no_grad():
        v = velocity(rows.state, rows.level, condition(5)[rows.sample])
        estimate = clean_estimate(rows.state, v, rows.level)
    policy = Estimates(estimate)
    output = objective(policy, rows, condition(5)[rows.sample], no_reference)
    output.loss.backward()
    error = rows.clean - estimate
    for row in range(len(rows)):
        squared = {
            "clean": 1.0,
            "velocity": rows.level[row].item() ** 2,
            "adaptive": error[row].abs().mean().item(),
        }[weighting]
        expected = -rows.advantage[row].item() * error[row] / squared * UNITS[reduction] / len(rows)
        torch.testing.assert_close(policy.estimate.grad[row], expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(output.loss, -rows.advantage.mean())
    assert output.metrics["ratio_deviation"] == 0 and "kl" not in output.metrics


def test_a_policy_that_predicts_its_own_action_learns_nothing():
    objective, velocity = MatchedObjective(), Linear()
    rows = rows_of(objective)
    text = condition(5)[rows.sample]
    with torch.no_grad():
        own = clean_estimate(rows.state, velocity(rows.state, rows.level, text), rows.level)
    objective(velocity, dataclasses.replace(rows, clean=own), text).loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in velocity.parameters())
    velocity.zero_grad()
    objective(velocity, rows, text).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in velocity.parameters()), "the next image is another"


def test_the_gradient_of_a_linear_model_in_closed_form():
    # v = w x: xhat = (1 - s w) x, d xhat / d w = -s x
    w, generator = torch.tensor(0.4, requires_grad=True), torch.Generator().manual_seed(0)
    state, clean = (torch.randn(6, 3, 2, generator=generator) for _ in range(2))
    level, advantage = torch.tensor([1.0, 0.75, 0.5] * 2), torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 0.0])[:, None]
    rows = ForwardItems(state, clean, level, advantage, torch.arange(6))
    objective = MatchedObjective(weighting="velocity", reduction="sum")
    objective(lambda x, s, c: w * x, rows, condition(6)).loss.backward()
    s = level.reshape(-1, 1, 1)
    error = clean - (1 - s * 0.4) * state
    expected = -(advantage[:, 0] * (error * -s * state / s**2).sum((1, 2))).mean()
    torch.testing.assert_close(w.grad, expected)


@pytest.mark.parametrize("weighting", ["clean", "velocity", "adaptive"])
def test_on_policy_it_is_matching_of_every_steps_image_on_the_trajectory(weighting):
    velocity, result, advantages = Linear(), rolled_out(Annealed()), torch.randn(5, 3, 1)
    gradients = []
    for objective in (
        MatchedObjective(weighting=weighting, reduction="sqrt"),
        MatchingObjective(levels="trajectory", images="every", weighting=weighting),
    ):
        rows = objective.items(result, advantages, None)
        loss = objective(velocity, rows, condition(5)[rows.sample]).loss
        gradients.append(torch.autograd.grad(loss, velocity.parameters()))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_on_policy_it_is_half_of_diffusion_nft_on_every_steps_image():
    velocity, result, advantages = Linear(), rolled_out(Annealed()), torch.randn(5, 3, 1)
    gradients = []
    for objective in (MatchedObjective(), ForwardObjective(levels="trajectory", images="every", adv_clip=20.0)):
        rows = objective.items(result, advantages, None)
        loss = objective(velocity, rows, condition(5)[rows.sample]).loss
        gradients.append(torch.autograd.grad(loss, velocity.parameters()))
    for one, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(2 * one, twice)


def pushed_away(weighting, beta, steps=200):
    """Where a prediction, 0 at the base, is driven by an advantage of -1 for an image at 1; on policy at s = .5."""
    objective = MatchedObjective(weighting=weighting, beta=beta)
    policy, state = Estimates(torch.zeros(1, 1)), torch.zeros(1, 1)
    level, advantage = torch.tensor([0.5]), torch.tensor([[-1.0]])
    rows = ForwardItems(state, torch.ones(1, 1), level, advantage, torch.zeros(1, dtype=torch.long))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(policy, rows, condition(1), lambda x, s, c: torch.zeros_like(x)).loss.backward()
        optimizer.step()
    return policy.estimate.item()


def test_a_distance_to_the_base_ends_a_pull_that_does_not_grow():
    # d = xhat - base: the push is 1, the base's pull beta |d| / s^2
    for beta in (0.05, 0.1, 1.0):
        assert pushed_away("adaptive", beta) == pytest.approx(-(0.25 / beta), rel=0.05)
    # the push is 1 + |d|: stronger than the base's pull at every d where beta < s^2
    assert pushed_away("clean", 0.2) < -1e2 and math.isfinite(pushed_away("clean", 0.3))


def test_off_policy_the_adaptive_weight_is_the_old_policys_in_both_densities():
    objective, old, new = MatchedObjective(weighting="adaptive", reduction="sum"), Linear(), Linear(1)
    rows = rows_of(objective)
    text = condition(5)[rows.sample]
    rows = objective.with_old_policy(old, rows, text)
    estimates = [clean_estimate(rows.state, v(rows.state, rows.level, text), rows.level) for v in (new, old)]
    errors = [(item - rows.clean).flatten(1).detach() for item in estimates]
    log_ratio = (errors[1].square().sum(1) - errors[0].square().sum(1)) / (2 * errors[1].abs().mean(1))
    got = objective(new, rows, text).metrics["approx_kl"]
    torch.testing.assert_close(got, 0.5 * log_ratio.square().mean())


def test_it_takes_of_a_rollout_what_it_says():
    needs = MatchedObjective.rollout_needs(MethodOptions())
    assert needs == {"states", "clean"}
    whole, kept = rolled_out(Annealed()), rolled_out(Annealed(), keep=needs)
    advantages = torch.randn(5, 3, 1)
    one, other = (rows_of(MatchedObjective(), result, advantages) for result in (whole, kept))
    assert torch.equal(one.state, other.state) and torch.equal(one.clean, other.clean)
    assert kept.log_probs.numel() == kept.branches.numel() == 0
    options = MethodOptions(objective="matched", sample_kernel="cps", sample_num_steps=6, sample_window_size=2)
    assert MatchedObjective.rows_per_image(options) == options.rows_per_image == 2
    assert not options.credits_final_image


def test_of_siblings_of_a_state_it_takes_none():
    with pytest.raises(ValueError, match="advantages"):
        rows_of(MatchedObjective(), rolled_out(Annealed(num_actions=2)), torch.zeros(5, 3, 2))


def repeated(rows, times):
    """The same rows with each element of a latent there several times: D grows, the picture and its change don't."""

    def wide(x):
        return x.repeat_interleave(times, dim=-1)

    return dataclasses.replace(
        rows, state=wide(rows.state), clean=wide(rows.clean), old_velocity=wide(rows.old_velocity)
    )


def test_by_default_the_ratio_its_clip_and_the_pull_to_the_base_are_the_same_at_every_size_of_the_latent():
    kernel, options = Annealed(), MethodOptions(objective="matched")
    made = [
        MatchedObjective.from_options(options, kernel, MatchedObjective.default_clip_range("mean", d))
        for d in (12, 192)
    ]
    old, new = Linear(), Linear(1)
    rows = rows_of(made[0])
    text = condition(5)[rows.sample]
    rows = made[0].with_old_policy(old, rows, text)
    outputs, gradients = [], []
    for objective, items in zip(made, (rows, repeated(rows, 16)), strict=True):
        times = items.state.shape[-1] // rows.state.shape[-1]
        with torch.no_grad():
            velocity, base = (v(rows.state, rows.level, text).repeat_interleave(times, -1) for v in (new, old))
        policy = torch.nn.Parameter(0.9 * items.old_velocity + 0.1 * velocity)
        output = objective(lambda x, s, c, p=policy: p, items, text, lambda x, s, c, b=base: b)
        output.loss.backward()
        outputs.append(output)
        gradients.append(policy.grad.unflatten(-1, (-1, times)).sum(-1))
    assert 0 < outputs[0].metrics["clipfrac"] < 1, "some are clipped and some aren't"
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    for name, value in outputs[0].metrics.items():
        torch.testing.assert_close(value, outputs[1].metrics[name])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", UNITS)
def test_the_default_clip_range_clips_the_same_actions_in_every_reduction(reduction):
    old, new = Linear(), Linear(1)
    shares = []
    for name in ("mean", reduction):
        objective = MatchedObjective(reduction=name, clip_range=MatchedObjective.default_clip_range(name, 12))
        rows = rows_of(objective, rolled_out(Annealed()), torch.ones(5, 3, 1))
        text = condition(5)[rows.sample]
        rows = objective.with_old_policy(old, rows, text)

        def between(x, level, c):
            return 0.9 * old(x, level, c) + 0.1 * new(x, level, c)

        shares.append(objective(between, rows, text).metrics["clipfrac"])
    assert shares[0] == shares[1] and 0 < shares[0] < 1
