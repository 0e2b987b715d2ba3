import math

import pytest
import torch

from trl_tafs.method.kernels import Annealed, Clean, Cps, DanceSde, FlowSde, Transition
from trl_tafs.method.losses import (
    CLIP_RANGE,
    LEVEL_WEIGHTINGS,
    clip_range_for,
    clipped_surrogate,
    matching_log_prob,
    negative_aware,
)


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
    std, sensitivity, gap = torch.tensor([[std]]), torch.rand(1, 1), torch.rand(1, 1)
    assert torch.equal(LEVEL_WEIGHTINGS["uniform"](std, sensitivity, gap), 2 * std.square())
    assert torch.equal(LEVEL_WEIGHTINGS["gaussian"](std, sensitivity, gap), torch.ones(1, 1))
    mean, action = torch.randn(1, 8), torch.randn(1, 8)
    weighted = LEVEL_WEIGHTINGS["uniform"](std, sensitivity, gap) * Transition(mean.requires_grad_(), std).log_prob(
        action
    )
    (gradient,) = torch.autograd.grad(weighted.sum(), mean)
    torch.testing.assert_close(gradient, 2 * (action - mean.detach()))  # of -|action - mean|^2, at every level


@pytest.mark.parametrize(("s", "s_next"), [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25)])
@pytest.mark.parametrize("kernel", [Annealed(), Annealed(0.5), Clean()], ids=str)
def test_balanced_weighting_moves_the_velocity_by_the_noise_itself_at_every_level(kernel, s, s_next):
    s, s_next = torch.tensor([s]), torch.tensor([s_next])
    x, v, noise = torch.randn(1, 8), torch.randn(1, 8, requires_grad=True), torch.randn(1, 8)
    policy = kernel.transition(x, v, s, s_next)
    weight = LEVEL_WEIGHTINGS["balanced"](policy.std.reshape(-1), kernel.sensitivity(s, s_next), s - s_next)
    (gradient,) = torch.autograd.grad((weight * policy.log_prob(policy.sample(noise).detach())).sum(), v)
    torch.testing.assert_close(gradient.abs(), noise.abs())


@pytest.mark.parametrize("kernel", [FlowSde(), DanceSde(), Annealed(), Annealed(0.5), Cps()], ids=str)
def test_the_noise_weightings_are_what_a_step_explores_and_the_g_of_its_sde(kernel):
    s, s_next = torch.tensor([1.0, 0.9, 0.5]), torch.tensor([0.75, 0.5, 0.25])
    policy = kernel.transition(torch.randn(3, 8), torch.randn(3, 8), s, s_next)
    std, sensitivity, gap = policy.std.flatten(), kernel.sensitivity(s, s_next), s - s_next
    assert torch.equal(LEVEL_WEIGHTINGS["std"](std, sensitivity, gap), std)
    g = LEVEL_WEIGHTINGS["diffusion"](std, sensitivity, gap)
    torch.testing.assert_close(g * gap.sqrt(), std)
    if hasattr(kernel, "diffusion"):
        torch.testing.assert_close(g, kernel.diffusion(s, s_next))


@pytest.mark.parametrize("weight", [0.3, 4.0])
@pytest.mark.parametrize(("ratio", "advantage"), [(1.3, 2.0), (0.7, 2.0), (1.3, -2.0), (0.7, -2.0)])
def test_a_positive_factor_of_the_advantage_is_a_weight(weight, ratio, advantage):
    one, other = (
        surrogate([math.log(ratio)], [weight * advantage]),
        surrogate([math.log(ratio)], [advantage], weight=torch.tensor([[weight]])),
    )
    torch.testing.assert_close(one[0].loss, other[0].loss)
    torch.testing.assert_close(one[1], other[1])


# Forward objectives ---------------------------------------------------------------------------------------------


def estimates(count=6, shape=(3, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    new, old, clean = (torch.randn((count, *shape), generator=generator) for _ in range(3))
    return new.requires_grad_(), old, clean, torch.rand(count, generator=generator).clamp(min=0.1)


def plain(estimate, old, clean, level, preference, beta):
    """Eq. 5 of DiffusionNFT, image by image, with the velocity's weight."""
    total = 0.0
    for row in range(len(estimate)):
        positive = (1 - beta) * old[row] + beta * estimate[row]
        negative = (1 + beta) * old[row] - beta * estimate[row]
        errors = [((item - clean[row]) / level[row]).square().mean() for item in (positive, negative)]
        total = total + preference[row] * errors[0] + (1 - preference[row]) * errors[1]
    return total / len(estimate) / beta


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_negative_aware_loss_is_the_papers_worked_image_by_image(beta):
    new, old, clean, level = estimates()
    preference = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9, 1.0])
    output = negative_aware(new, old, clean, level, preference, beta, "velocity")
    torch.testing.assert_close(output.loss, plain(new, old, clean, level, preference, beta))
    torch.testing.assert_close(output.metrics["old_distance"], (new - old).detach().square().mean())


def test_on_policy_its_gradient_pulls_to_good_images_and_away_from_bad_ones_whatever_beta():
    _, old, clean, level = estimates()
    preference = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9, 1.0])
    for beta in (0.1, 0.5, 1.0):
        new = old.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(negative_aware(new, old, clean, level, preference, beta, "clean").loss, new)
        expected = 2 * (2 * preference - 1)[:, None, None] * (old - clean) / old.numel()
        torch.testing.assert_close(gradient, expected)


def test_the_spring_holds_what_has_no_preference_at_the_old_policy():
    new, old, clean, level = estimates()
    output = negative_aware(new, old, clean, level, torch.full((6,), 0.5), 0.7, "clean")
    (gradient,) = torch.autograd.grad(output.loss, new)
    torch.testing.assert_close(gradient, 2 * 0.7 * (new - old).detach() / new.numel())


def test_adaptive_weights_are_one_over_the_mean_error_and_carry_no_gradient():
    new, old, clean, level = estimates()
    preference = torch.ones(6)
    (gradient,) = torch.autograd.grad(negative_aware(new, old, clean, level, preference, 1.0).loss, new)
    error = (new - clean).detach()
    expected = 2 * error / error.abs().mean((1, 2), keepdim=True) / new.numel()
    torch.testing.assert_close(gradient, expected)


def test_the_matching_log_probability_is_that_of_a_unit_gaussian_around_the_velocity():
    new, _, clean, level = estimates()
    x = torch.randn(6, 3, 4)
    v, target = ((x - item) / level[:, None, None] for item in (new, clean))
    log_prob = Transition(v, torch.tensor(1.0)).log_prob(target) + 12 * 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(matching_log_prob(new, clean, level), log_prob, rtol=1e-4, atol=1e-4)
