import math

import pytest
import torch

from trl_tafs.kernels import Transition
from trl_tafs.losses import CLIP_RANGE, LEVEL_WEIGHTINGS, clip_range_for, clipped_surrogate


def surrogate(log_ratio, advantage, clip_range=0.2, weight=None):
    log_prob = torch.as_tensor(log_ratio, dtype=torch.float32).reshape(-1, 1).requires_grad_()
    advantage = torch.as_tensor(advantage, dtype=torch.float32).reshape(-1, 1)
    output = clipped_surrogate(log_prob, torch.zeros_like(log_prob), advantage, clip_range, weight)
    (gradient,) = torch.autograd.grad(output.loss, log_prob)
    return output, gradient.flatten()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        # -min(r A, clip(r, e^-.2, e^.2) A), the bounds .8187 and 1.2214, and whether there is a gradient
        (1.0, 2.0, -2.0, True),
        (1.1, 2.0, -2.2, True),
        (1.3, 2.0, -2.442806, False),  # already raised enough
        (0.7, 2.0, -1.4, True),  # fell although it was good: never clipped
        (1.1, -2.0, 2.2, True),
        (1.3, -2.0, 2.6, True),  # rose although it was bad: never clipped
        (0.7, -2.0, 1.637462, False),  # already lowered enough
        (0.9, -2.0, 1.8, True),
        (1.3, 0.0, 0.0, False),
    ],
)
def test_clipping_by_hand(ratio, advantage, loss, moves):
    output, gradient = surrogate([math.log(ratio)], [advantage])
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)
    # d(-r A) / d log p = -r A
    assert gradient.item() == pytest.approx(-ratio * advantage if moves else 0.0, abs=1e-6)


def test_the_loss_is_the_mean_over_all_actions():
    log_prob = torch.log(torch.tensor([[1.1, 0.9], [1.3, 0.7]]))
    output = clipped_surrogate(log_prob, torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [1.0, -1.0]]), 0.2)
    assert output.loss.item() == pytest.approx(-(1.1 - 0.9 + 1.221403 - 0.818731) / 4)


def test_on_policy_the_gradient_is_the_score_function_estimator():
    mean, action = torch.randn(6, 10), torch.randn(6, 10)
    mean.requires_grad_()
    advantage = torch.randn(6, 1)
    log_prob = Transition(mean, torch.tensor(0.5)).log_prob(action)[:, None]
    loss = clipped_surrogate(log_prob, log_prob.detach(), advantage, 0.1).loss
    (gradient,) = torch.autograd.grad(loss, mean)
    score = (action - mean.detach()) / 0.5**2  # of log p
    torch.testing.assert_close(gradient, -advantage * score / 6)


def test_level_weights_multiply_the_rows():
    weight = torch.tensor([[2.0], [0.5]])
    output, gradient = surrogate([0.0, 0.0], [3.0, -1.0], weight=weight)
    assert output.loss.item() == pytest.approx(-(2 * 3.0 - 0.5) / 2)
    torch.testing.assert_close(gradient, torch.tensor([-3.0, 0.25]))


def test_metrics_say_what_was_clipped_and_how_far_the_policy_went():
    log_ratio = torch.log(torch.tensor([1.0, 1.1, 1.3, 0.5]))
    output, _ = surrogate(log_ratio, [1.0, 1.0, 1.0, 1.0])
    assert output.metrics["clipfrac"].item() == 0.5
    assert output.metrics["ratio_deviation"].item() == pytest.approx(0.5)
    assert output.metrics["approx_kl"].item() == pytest.approx(log_ratio.square().mean().item() / 2)
    assert not any(value.requires_grad for value in output.metrics.values())
    assert all(value.ndim == 0 for value in output.metrics.values())


def test_on_policy_nothing_is_clipped():
    output, _ = surrogate([0.0, 0.0], [1.0, -1.0], clip_range=1e-6)
    assert output.metrics["clipfrac"] == output.metrics["ratio_deviation"] == output.metrics["approx_kl"] == 0


def test_an_action_without_advantage_cannot_spoil_the_loss_however_far_the_policy_went():
    output, gradient = surrogate([100.0, 0.0], [0.0, 1.0])
    assert output.loss.isfinite()
    assert gradient.isfinite().all()


# The clip range -------------------------------------------------------------------------------------------------


def test_clip_ranges_of_the_documentation():
    assert CLIP_RANGE == 0.025
    assert clip_range_for("sqrt", 64) == clip_range_for("sqrt", 65536) == 0.025
    assert clip_range_for("sum", 64) == pytest.approx(0.2)
    assert clip_range_for("mean", 64) == pytest.approx(0.003125)
    assert clip_range_for("sum", 65536) == pytest.approx(6.4)
    assert clip_range_for("mean", 65536) == pytest.approx(9.77e-5, rel=1e-3)


def clipped_fraction(reduction, num_elements, change, rows=4000):
    """Of actions drawn from N(0, 1), when each element of the mean moves by `change` deviations."""
    old, new = (Transition(torch.full((1, num_elements), m), torch.tensor(1.0)) for m in (0.0, change))
    generator, counted = torch.Generator().manual_seed(0), []
    for _ in range(0, rows, 100):
        action = torch.randn(1, 100, num_elements, generator=generator)
        log_probs = [t.log_prob(action, reduction) for t in (new, old)]
        output = clipped_surrogate(*log_probs, torch.ones(1, 100), clip_range_for(reduction, num_elements))
        counted.append(output.metrics["clipfrac"])
    return torch.stack(counted).mean().item()


@pytest.mark.parametrize("change", [0.01, 0.0125, 0.015])
def test_the_three_reductions_clip_the_same_share_at_64_elements(change):
    shares = [clipped_fraction(reduction, 64, change) for reduction in ("mean", "sqrt", "sum")]
    assert max(shares) - min(shares) < 1e-3, "the same actions, up to rounding at the bound"
    expected = math.erfc(CLIP_RANGE / change / math.sqrt(2))  # of a normal of deviation `change`
    assert shares == pytest.approx([expected] * 3, abs=0.015)


@pytest.mark.parametrize("num_elements", [64, 1024])
@pytest.mark.parametrize("reduction", ["mean", "sqrt"])
def test_mean_and_sqrt_clip_alike_at_any_size_while_the_change_is_small(reduction, num_elements):
    # log r = e sqrt(D) z - e^2 D / 2: the drift is below .07 of the range here, and grows with sqrt(D)
    assert clipped_fraction(reduction, num_elements, 0.0125) == pytest.approx(0.0455, abs=0.015)


def analytic_fraction(reduction, num_elements, change):
    """log r = e sqrt(D) z - e^2 D / 2, in the units of the reduction, against the two bounds of the ratio."""
    unit = {"mean": 1 / num_elements, "sqrt": 1 / math.sqrt(num_elements), "sum": 1.0}[reduction]
    bound, root = clip_range_for(reduction, num_elements), change * math.sqrt(num_elements)
    upper = (bound / unit + root**2 / 2) / root
    lower = (-bound / unit + root**2 / 2) / root
    return 0.5 * (math.erfc(upper / math.sqrt(2)) + math.erfc(-lower / math.sqrt(2)))


@pytest.mark.parametrize("reduction", ["mean", "sqrt", "sum"])
@pytest.mark.parametrize(("num_elements", "change"), [(64, 0.0125), (64, 0.03), (1024, 0.0125), (1024, 0.03)])
def test_the_clipped_share_is_the_closed_forms(reduction, num_elements, change):
    got = clipped_fraction(reduction, num_elements, change)
    assert got == pytest.approx(analytic_fraction(reduction, num_elements, change), abs=0.03)


def share_at(reduction, num_elements, change):
    """The library's clipped share on log-ratios drawn from their distribution: no tensor of D elements is needed."""
    z = torch.randn(40_000, 1, generator=torch.Generator().manual_seed(0))
    unit = {"mean": 1 / num_elements, "sqrt": 1 / math.sqrt(num_elements), "sum": 1.0}[reduction]
    log_ratio = unit * (change * math.sqrt(num_elements) * z - change**2 * num_elements / 2)
    bound = clip_range_for(reduction, num_elements)
    return clipped_surrogate(log_ratio, torch.zeros_like(z), torch.ones_like(z), bound).metrics["clipfrac"].item()


def test_at_65536_elements_the_drift_counts_where_the_range_bites():
    # drift over range: e^2 sqrt(D) / 2 / .025, 1/40 at D = 64 and .8 at D = 65,536 with e = .0125
    assert share_at("sqrt", 64, 0.0125) == pytest.approx(0.046, abs=5e-3)
    assert share_at("sqrt", 65536, 0.0125) == pytest.approx(0.3447, abs=0.01)  # P(z < -.4) + P(z > 3.6)
    assert share_at("mean", 65536, 0.0125) == pytest.approx(0.3447, abs=0.01)
    assert share_at("sqrt", 65536, 0.005) < 1e-3  # below, nothing is clipped at either


@pytest.mark.parametrize("change", [0.01, 0.0125, 0.02])
def test_sum_units_clip_as_sqrt_units_do_at_65536_elements(change):
    assert share_at("sum", 65536, change) == pytest.approx(share_at("sqrt", 65536, change), abs=1e-3)


# Level weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.75, 0.5, 0.25])
def test_uniform_weighting_takes_exactly_the_one_over_two_sigma_squared_out(std):
    std = torch.tensor([[std]])
    assert torch.equal(LEVEL_WEIGHTINGS["uniform"](std), 2 * std.square())
    assert torch.equal(LEVEL_WEIGHTINGS["gaussian"](std), torch.ones(1, 1))
    mean, action = torch.randn(1, 8), torch.randn(1, 8)
    weighted = LEVEL_WEIGHTINGS["uniform"](std) * Transition(mean.requires_grad_(), std).log_prob(action)
    (gradient,) = torch.autograd.grad(weighted.sum(), mean)
    torch.testing.assert_close(gradient, 2 * (action - mean.detach()))  # of -|action - mean|^2, at every level
