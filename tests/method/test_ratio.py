"""What holds a ratio: centring, the mask by the exact KL, dual clip, the weight of A < 0, the old policy's KL."""

import dataclasses
import math

import pytest
import torch
from toy import Linear, condition, noise_of, rolled_out

from trl_tafs.method.image_objectives import MatchedObjective, MatchingObjective
from trl_tafs.method.kernels import Annealed, Clean, FlowSde, Transition, clean_estimate
from trl_tafs.method.losses import CLIP_RANGE, clip_range_for, clipped_surrogate, masked_surrogate
from trl_tafs.method.objectives import ClippedObjective

ALL = {
    "clipped": lambda **o: ClippedObjective(Annealed(), **{"clip_range": 0.1, **o}),
    "clipped-sde": lambda **o: ClippedObjective(FlowSde(), **{"clip_range": 0.1, **o}),
    "matched": lambda **o: MatchedObjective(**{"clip_range": 0.1, **o}),
    "awm": lambda **o: MatchingObjective(**{"clip_range": 0.1, **o}),
}


def prepared(name, advantages=None, old=None, **options):
    """An objective and its items, seen by `old`, which rolled out."""
    objective, old = ALL[name](**options), Linear() if old is None else old
    result = rolled_out(FlowSde() if name == "clipped-sde" else Annealed(), 5, old, options.get("reduction", "sqrt"))
    rows = objective.items(result, torch.randn(5, 3, 1) if advantages is None else advantages, noise_of())
    return objective, rows, objective.with_old_policy(old, rows, condition(5)[rows.sample])


def loss_and_gradients(objective, velocity, rows, base=None):
    output = objective(velocity, rows, condition(5)[rows.sample], base)
    gradients = torch.autograd.grad(output.loss, velocity.parameters(), allow_unused=True)
    return output, torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "options",
    [{"center_ratio": True}, {"kl_limit": 1e-6}, {"delta": 2.0}, {"old_beta": 3.0}],
    ids=lambda options: next(iter(options)),
)
def test_at_one_update_nothing_of_it_changes_anything(name, options):
    advantages = torch.randn(5, 3, 1)
    held = prepared(name, advantages, **options)
    plain, expected = loss_and_gradients(prepared(name, advantages)[0], Linear(), held[1])
    output, gradient = loss_and_gradients(held[0], Linear(), held[1])
    assert torch.equal(output.loss, plain.loss) and torch.equal(gradient, expected)
    # with several, the first is on policy up to the rounding of the two passes
    output, gradient = loss_and_gradients(held[0], Linear(), held[2])
    torch.testing.assert_close(output.loss, plain.loss)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "balanced"])
def test_weights_in_the_ratio_change_the_clip_alone(weighting):
    kernel, old, advantages = Annealed(), Linear(), torch.randn(5, 3, 1)
    taken = rolled_out(kernel, 5, old, "mean")
    objectives = [
        ClippedObjective(kernel, 0.004, "mean", weighting, clip_weighting=where) for where in ("loss", "ratio")
    ]
    rows = objectives[0].items(taken, advantages, noise_of())
    gradients = [loss_and_gradients(objective, Linear(), rows)[1] for objective in objectives]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    moved = Linear()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(2e-2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy = kernel.transition(
        rows.state.float(), moved(rows.state, rows.level, condition(5)[rows.sample]), rows.level, rows.next_level
    )
    log_ratio = (policy.log_prob(rows.action, "mean") - rows.old_log_prob).detach()
    s, following = rows.level[:, None], rows.next_level[:, None]
    weight = {"uniform": 2 * following.square(), "balanced": following / kernel.sensitivity(s, following)}[weighting]
    outside = [(factor * log_ratio).abs() > 0.004 for factor in (torch.ones_like(weight), weight)]
    assert not torch.equal(*outside)
    for objective, expected in zip(objectives, outside, strict=True):
        clipfrac = loss_and_gradients(objective, moved, rows)[0].metrics["clipfrac"]
        assert clipfrac == expected.float().mean()


@pytest.mark.parametrize("reduction", ["mean", "sqrt", "sum"])
@pytest.mark.parametrize("kernel", [Annealed(), Clean(baseline="group"), FlowSde()], ids=str)
def test_a_centred_log_ratio_is_linear_in_the_change_of_the_mean(kernel, reduction):
    old, new = Linear(), Linear(1)
    objective = ClippedObjective(kernel, 0.1, reduction, center_ratio=True)
    rows = objective.items(rolled_out(kernel, 5, old, reduction), torch.ones(5, 3, 1))
    text = condition(5)[rows.sample]
    rows = objective.with_old_policy(old, rows, text)
    got = objective(new, rows, text).metrics["approx_kl"]
    means = [
        kernel.transition(rows.state, v(rows.state, rows.level, text), rows.level, rows.next_level) for v in (new, old)
    ]
    inner = (rows.action[:, 0] - means[1].mean) * (means[0].mean - means[1].mean) / means[1].std ** 2
    log_ratio = inner.flatten(1).sum(1) * {"mean": 1 / 12, "sqrt": 12**-0.5, "sum": 1.0}[reduction]
    torch.testing.assert_close(got, 0.5 * log_ratio.square().mean(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "weighting"),
    [("matched", "clean"), ("matched", "velocity"), ("matched", "adaptive"), ("awm", "clean"), ("awm", "velocity")],
)
def test_so_is_that_of_a_clean_image(name, weighting):
    old, new = Linear(), Linear(1)
    objective, _, rows = prepared(name, old=old, weighting=weighting, reduction="sum", center_ratio=True)
    text = condition(5)[rows.sample]
    x, y = (clean_estimate(rows.state, v(rows.state, rows.level, text), rows.level).flatten(1) for v in (new, old))
    error = rows.clean.flatten(1) - y
    squared = {"clean": 1.0, "velocity": rows.level.square(), "adaptive": error.abs().mean(1)}[weighting]
    log_ratio = (error * (x - y)).sum(1) / squared
    got = objective(new, rows, text).metrics["approx_kl"]
    torch.testing.assert_close(got, 0.5 * log_ratio.square().mean(), rtol=1e-4, atol=1e-6)


def without_gradient(num_elements, change, centred, rows=200):
    """Shares of actions drawn from N(0, I) that the clip takes the gradient from, at A = 1 and A = -1."""
    old, generator, found = Transition(torch.zeros(1, num_elements), torch.tensor(1.0)), torch.Generator(), []
    generator.manual_seed(0)
    direction = torch.randn(1, num_elements, generator=generator).sign()
    for _ in range(0, rows, 20):
        action = torch.randn(1, 20, num_elements, generator=generator)
        advantage = torch.tensor([1.0, -1.0]).repeat(10)[None]
        moved = Transition(change * direction, torch.tensor(1.0))
        log_prob = moved.log_prob(action, "sqrt").requires_grad_()
        kl = moved.kl(old, "mean")[:, None] * math.sqrt(num_elements) if centred else 0.0
        bound = clip_range_for("sqrt", num_elements)
        loss = clipped_surrogate(log_prob + kl, old.log_prob(action, "sqrt"), advantage, bound).loss
        (gradient,) = torch.autograd.grad(loss, log_prob)
        found.append((gradient == 0)[0].reshape(10, 2).float().mean(0))
    return torch.stack(found).mean(0).tolist()


@pytest.mark.parametrize(("change", "plain"), [(0.02, (0.0, 0.905)), (0.03, (0.0, 0.999))])
def test_at_65536_elements_the_drift_silences_what_is_to_be_avoided_and_centring_treats_both_alike(change, plain):
    # log r = e z - e^2 sqrt(D) / 2 in sqrt units: P(z > (.025 + .0512) / .02) above, P(z < (.0512 - .025) / .02) below
    good, bad = without_gradient(65536, change, centred=False, rows=400)
    assert good == pytest.approx(plain[0], abs=0.02) and bad == pytest.approx(plain[1], abs=0.06)
    good, bad = without_gradient(65536, change, centred=True, rows=400)
    expected = 0.5 * math.erfc(CLIP_RANGE / change / math.sqrt(2))
    assert (good, bad) == pytest.approx((expected, expected), abs=0.07)


def test_at_64_elements_centring_hardly_matters():
    shares = [without_gradient(64, 0.02, centred, rows=4000) for centred in (False, True)]
    expected = 0.5 * math.erfc(CLIP_RANGE / 0.02 / math.sqrt(2))
    assert shares[0] + shares[1] == pytest.approx([expected] * 4, abs=0.03)


# The mask -------------------------------------------------------------------------------------------------------


def test_what_leads_away_is_left_out_where_the_policy_is_far_and_nothing_else():
    log_ratio = torch.tensor([0.3, 0.3, -0.3, -0.3, 0.3, -0.3])[:, None].requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, -2.0])[:, None]
    far = torch.tensor([True, True, True, True, False, False])[:, None]
    output = masked_surrogate(log_ratio, torch.zeros(6, 1), advantage, far)
    (gradient,) = torch.autograd.grad(output.loss, log_ratio)
    kept = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])[:, None]
    torch.testing.assert_close(gradient, -kept * advantage * log_ratio.detach().exp() / 6)
    metrics = {name: round(value.item(), 4) for name, value in output.metrics.items()}
    assert metrics["clipfrac"] == round(2 / 6, 4)
    assert metrics["clipfrac_positive"] == metrics["clipfrac_negative"] == round(1 / 6, 4)


@pytest.mark.parametrize("name", ALL)
def test_the_limit_is_of_the_kl_an_element(name):
    old, new = Linear(), Linear(1)
    advantages = torch.randn(5, 3, 1)
    objective, _, rows = prepared(name, advantages, old=old, kl_limit=1e9)
    free, gradient = loss_and_gradients(objective, new, rows)
    assert free.metrics["clipfrac"] == 0
    least = free.metrics["old_kl"].item()
    for limit, held in ((1e-9, True), (1e3 * least, False)):
        objective, _, rows = prepared(name, advantages, old=old, kl_limit=limit)
        output, other = loss_and_gradients(objective, new, rows)
        assert (output.metrics["clipfrac"] > 0) == held
        assert torch.equal(gradient, other) != held


# The negative side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        # bounds .8187 and 1.2214, delta 1.5: dual clip by hand
        (1.3, -2.0, 2.6, True),
        (1.8, -2.0, 3.0, False),  # rose although it was bad: at most delta
        (0.7, -2.0, 1.637462, False),
        (1.8, 2.0, -2.442806, False),  # the clip's own
        (1.1, 2.0, -2.2, True),
    ],
)
def test_dual_clip_by_hand(ratio, advantage, loss, moves):
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    output = clipped_surrogate(log_prob, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2, delta=1.5)
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)
    (gradient,) = torch.autograd.grad(output.loss, log_prob)
    assert gradient.item() == pytest.approx(-ratio * advantage if moves else 0.0, abs=1e-6)


def test_delta_within_the_clip_range_is_an_error_that_says_the_bound():
    for name in ALL:
        with pytest.raises(ValueError, match="delta is 1.1, a bound .* clip range of 0.1 holds at 1.105"):
            ALL[name](delta=1.1)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_the_weight_of_what_compares_badly(name, factor):
    advantages = torch.tensor([2.0, -2.0, 0.0] * 5).reshape(5, 3, 1)
    objective, rows, _ = prepared(name, advantages, negative_weight=factor)
    _, gradient = loss_and_gradients(objective, Linear(), rows)
    plain, scaled = ALL[name](), torch.where(rows.advantage < 0, factor * rows.advantage, rows.advantage)
    _, expected = loss_and_gradients(plain, Linear(), dataclasses.replace(rows, advantage=scaled))
    torch.testing.assert_close(gradient, expected)
    still = objective.without_gradient(rows)
    assert torch.equal(still, (rows.advantage[:, 0] == 0) | ((rows.advantage[:, 0] < 0) & (factor == 0)))


# The spring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_kl_to_the_old_policy_pulls_back_to_it(name):
    old, new = Linear(), Linear()
    with torch.no_grad():
        new.inner.bias += 0.1
    objective, fresh, rows = prepared(name, torch.zeros(5, 3, 1), old=old, old_beta=0.7)
    output, gradient = loss_and_gradients(objective, new, rows)
    torch.testing.assert_close(output.loss, 0.7 * output.metrics["old_kl"])
    assert (gradient[-12:] > 0).all(), "of the bias"
    assert objective.without_gradient(fresh).all(), "on policy nothing pulls"
    assert not objective.without_gradient(rows).any()


def test_its_size_is_that_of_the_gaussians():
    old, new = Linear(), Linear()
    with torch.no_grad():
        new.inner.bias += 0.1
    for name, weighting in (("matched", "velocity"), ("matched", "clean"), ("clipped", None)):
        options = {} if weighting is None else {"weighting": weighting}
        objective, _, rows = prepared(name, old=old, old_beta=1.0, **options)
        level = rows.level
        expected = {
            "velocity": torch.full_like(level, 0.005),  # |dv|^2 / 2
            "clean": 0.005 * level**2,
            None: 0.005 * (level * (1 - level + 0.25) / (level - 0.25)) ** 2,  # |(1 - s') s dv|^2 / (2 s'^2)
        }[weighting]
        got = objective(new, rows, condition(5)[rows.sample]).metrics["old_kl"]
        torch.testing.assert_close(got, expected.mean(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sqrt", "sum"])
def test_shares_by_sign_are_what_lost_its_gradient(reduction):
    old, new = Linear(), Linear()
    with torch.no_grad():
        new.inner.bias += 0.02
    objective, _, rows = prepared("clipped", old=old, clip_range=1e-3, reduction=reduction)
    log_prob = objective.kernel.transition(
        rows.state, new(rows.state, rows.level, condition(5)[rows.sample]), rows.level, rows.next_level
    ).log_prob(rows.action, reduction)
    log_prob = log_prob.detach().requires_grad_()
    output = clipped_surrogate(log_prob, rows.old_log_prob, rows.advantage, 1e-3)
    lost = torch.autograd.grad(output.loss, log_prob)[0] == 0
    for sign, name in ((1, "clipfrac_positive"), (-1, "clipfrac_negative")):
        torch.testing.assert_close(output.metrics[name], (lost & (rows.advantage.sign() == sign)).float().mean())
