"""Distribution matching's mathematics: its direction, its gradient by hand, the levels, what the fake score learns."""

import pytest
import torch

from trl_tafs.method.distribution import (
    DistributionMatching,
    drawn_levels,
    fake_loss,
    matching_direction,
    matching_loss,
    renoised,
)
from trl_tafs.method.kernels import clean_estimate
from trl_tafs.method.noise import keyed_normal

KEYS = [(0, 1, sample, "matching", 0, 0, 0) for sample in range(5)]


def velocity(shift):
    """The exact velocity of a model whose clean image is `shift` whatever the state: (x - shift) / t."""
    return lambda x, level: (x - shift) / level.reshape(-1, 1, 1)


def test_the_gradient_is_the_weighted_direction_over_the_elements_by_hand():
    estimate = torch.randn(5, 2, 3, dtype=torch.float64).float().requires_grad_()
    term = DistributionMatching(weight=0.7)
    loss, metrics = term(estimate, KEYS, velocity(1.0), velocity(-2.0))
    loss.backward()
    distance = (estimate.detach() - 1.0).abs().mean((1, 2), keepdim=True)
    direction = -3.0 / distance  # fake - teacher, over the distance to the teacher's
    expected = 0.7 * direction.expand_as(estimate) / 6 / 5  # D elements, a mean over 5 rows
    torch.testing.assert_close(estimate.grad, expected, rtol=1e-4, atol=1e-6)
    assert metrics["dm_gap"].item() == pytest.approx(direction.abs().mean().item(), rel=1e-4)
    assert not metrics["dm_loss"].requires_grad
    moved = estimate.detach() - 0.1 * estimate.grad  # a step of descent
    assert ((moved - 1.0).mean() - (estimate.detach() - 1.0).mean()).item() > 0, "away from the fake, to the teacher"


def test_where_fake_and_teacher_agree_there_is_no_gradient():
    estimate = torch.randn(5, 2, 3).requires_grad_()
    loss, metrics = DistributionMatching(1.0)(estimate, KEYS, velocity(0.3), velocity(0.3))
    loss.backward()
    assert not estimate.grad.any() and metrics["dm_gap"].item() == 0.0
    same = estimate.detach()
    assert matching_direction(same, same, same).isfinite().all(), "an estimate that is the teacher's"


def test_teacher_and_fake_carry_no_gradient():
    weights = torch.tensor([0.5, -0.5], requires_grad=True)
    estimate = torch.randn(5, 2, 3).requires_grad_()
    loss, _ = DistributionMatching(1.0)(estimate, KEYS, velocity(weights[0]), velocity(weights[1]))
    loss.backward()
    assert weights.grad is None and estimate.grad.any()
    teacher, fake = torch.randn(2, 5, 2, 3).requires_grad_().unbind(0)
    direction = matching_direction(estimate, teacher, fake)
    assert not direction.requires_grad
    assert not matching_loss(estimate.detach(), fake).requires_grad


def test_levels_are_uniform_or_shifted_as_a_schedule():
    levels = drawn_levels(keyed_normal([(i,) for i in range(4000)], ()))
    assert 0.02 < levels.min() < 0.03 and 0.99 < levels.max() < 1
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(levels.quantile(quartiles), 0.02 + 0.98 * quartiles, atol=0.03, rtol=0)
    shifted = drawn_levels(keyed_normal([(i,) for i in range(4000)], ()), 3.0)
    torch.testing.assert_close(shifted, 3 * levels / (1 + 2 * levels))


def test_a_row_has_its_own_noise_whatever_is_beside_it():
    estimate = torch.randn(5, 2, 3)
    whole = renoised(estimate, KEYS)
    part = renoised(estimate[3:4], KEYS[3:4])
    assert torch.equal(whole.state[3:4], part.state) and torch.equal(whole.level[3:4], part.level)
    wide = whole.level.reshape(-1, 1, 1)
    torch.testing.assert_close(whole.state, (1 - wide) * estimate + wide * whole.noise)
    again = renoised(estimate, [(*key[:-1], 1) for key in KEYS])
    assert not torch.equal(again.level, whole.level), "fresh ones for the fake score"


def test_the_fake_score_learns_the_mean_of_what_it_sees():
    """Flow matching's error is least where the predicted clean image is the estimate's own."""
    estimate = torch.full((5, 2, 3), 0.4)
    rows = renoised(estimate, KEYS)
    mean = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([mean], lr=0.02)
    losses = []
    for _ in range(200):
        loss = fake_loss(velocity(mean)(rows.state, rows.level), rows, estimate).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0] and mean.item() == pytest.approx(0.4, abs=0.01)
    exact = velocity(0.4)(rows.state, rows.level)
    torch.testing.assert_close(clean_estimate(rows.state, exact, rows.level), estimate)
    torch.testing.assert_close(fake_loss(exact, rows, estimate), torch.zeros(5), atol=1e-9, rtol=0)
