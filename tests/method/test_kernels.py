import math
from dataclasses import dataclass

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from trl_tafs.method.kernels import (
    KERNELS,
    Annealed,
    Clean,
    DanceSde,
    FlowSde,
    Kernel,
    Ode,
    Transition,
    Windowed,
    clean_estimate,
)
from trl_tafs.method.levels import uniform_levels, with_zero
from trl_tafs.method.sampling_options import SamplingOptions

SHAPE = (3, 2, 4, 5)  # (B, *), D = 40
D = 40
SCALE = {"sum": 1.0, "mean": 1 / D, "sqrt": 1 / math.sqrt(D)}


def draw(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def level(value):
    return torch.tensor(value)


def joint(mean, std):
    return Independent(Normal(mean, std.expand_as(mean)), 3)


@pytest.mark.parametrize("reduction", SCALE)
@pytest.mark.parametrize("std", [level(0.3), torch.tensor([0.2, 0.5, 1.7]).reshape(3, 1, 1, 1)], ids=["one", "rows"])
def test_log_prob_is_the_joint_normal_in_the_units_of_the_reduction(reduction, std):
    mean, action = draw(*SHAPE), draw(*SHAPE, seed=1)
    expected = joint(mean, std).log_prob(action) * SCALE[reduction]
    torch.testing.assert_close(Transition(mean, std).log_prob(action, reduction), expected)


@pytest.mark.parametrize("reduction", SCALE)
@pytest.mark.parametrize("std", [level(0.3), torch.tensor([0.2, 0.5, 1.7]).reshape(3, 1, 1, 1)], ids=["one", "rows"])
def test_log_prob_of_several_actions_is_each_ones_own(reduction, std):
    mean, actions = draw(*SHAPE), draw(3, 6, *SHAPE[1:], seed=1)
    together = Transition(mean, std).log_prob(actions, reduction)
    assert together.shape == (3, 6)
    alone = torch.stack([joint(mean, std).log_prob(actions[:, m]) for m in range(6)], dim=1) * SCALE[reduction]
    torch.testing.assert_close(together, alone)


def test_reduction_is_the_joint_density_by_default():
    transition = Transition(draw(*SHAPE), level(0.5))
    assert torch.equal(transition.log_prob(draw(*SHAPE)), transition.log_prob(draw(*SHAPE), "sum"))


def test_bfloat16_actions_are_scored_in_float32():
    transition, action = Transition(draw(*SHAPE), level(0.5)), draw(*SHAPE, seed=1).bfloat16()
    scores = transition.log_prob(action)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, transition.log_prob(action.float()))


def test_log_prob_has_the_gradient_of_the_normal():
    mean, action = draw(*SHAPE).requires_grad_(), draw(*SHAPE, seed=1)
    (gradient,) = torch.autograd.grad(Transition(mean, level(0.4)).log_prob(action).sum(), mean)
    torch.testing.assert_close(gradient, (action - mean.detach()) / 0.4**2)


@pytest.mark.parametrize("shape", [SHAPE, (3, 6, 2, 4, 5)], ids=["one action", "M actions"])
@pytest.mark.parametrize("std", [level(0.3), torch.tensor([0.2, 0.5, 1.7]).reshape(3, 1, 1, 1)], ids=["one", "rows"])
def test_sample_is_mean_plus_std_noise(shape, std):
    mean, noise = draw(*SHAPE), draw(*shape, seed=1)
    sample = Transition(mean, std).sample(noise)
    assert sample.shape == shape
    for m in range(6) if noise.ndim == 5 else [None]:
        mine, its_noise = (sample, noise) if m is None else (sample[:, m], noise[:, m])
        assert torch.equal(mine, mean + std * its_noise)


def test_log_prob_of_a_sample_depends_on_its_noise_alone():
    noise = draw(*SHAPE, seed=1)
    expected = (-0.5 * noise.square() - math.log(0.5) - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
    transition = Transition(10 * draw(*SHAPE), level(0.5))
    torch.testing.assert_close(transition.log_prob(transition.sample(noise)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduction", SCALE)
def test_kl_is_torchs_also_between_different_deviations(reduction):
    p, q = (draw(*SHAPE), level(0.3)), (draw(*SHAPE, seed=1), torch.tensor([0.2, 0.5, 1.7]).reshape(3, 1, 1, 1))
    expected = kl_divergence(joint(*p), joint(*q)) * SCALE[reduction]
    torch.testing.assert_close(Transition(*p).kl(Transition(*q), reduction), expected)


def test_kl_has_a_gradient_and_it_is_the_right_one():
    mean, other = draw(*SHAPE).requires_grad_(), draw(*SHAPE, seed=1)
    kl = Transition(mean, level(0.5)).kl(Transition(other, level(0.5)), "mean").sum()
    (gradient,) = torch.autograd.grad(kl, mean)
    torch.testing.assert_close(gradient, (mean.detach() - other) / (0.5**2 * D))
    assert gradient.abs().min() > 0


def test_kl_of_a_policy_with_itself_is_exactly_zero():
    transition = Transition(draw(*SHAPE), level(0.37))
    assert torch.equal(transition.kl(transition), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [Annealed(), Annealed(0.5), Clean()], ids=str)
def test_the_action_at_the_mean_is_dead_its_gradient_exactly_zero(kernel, dtype):
    v = draw(*SHAPE, seed=1, dtype=dtype).requires_grad_()
    levels = torch.tensor([0.75, 0.5], dtype=dtype)
    transition = kernel.transition(draw(*SHAPE, dtype=dtype), v, levels[0], levels[1])
    (gradient,) = torch.autograd.grad(transition.log_prob(transition.mean.detach()).sum(), v)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_annealed_re_noises_the_clean_estimate():
    x, v, s, s_next = draw(*SHAPE), draw(*SHAPE, seed=1), level(0.75), level(0.5)
    transition = Annealed().transition(x, v, s, s_next)
    assert torch.equal(transition.mean, (1.0 - s_next) * (x - s * v))
    assert torch.equal(transition.std.expand(3, 1, 1, 1).flatten(), torch.full((3,), 0.5))


@pytest.mark.parametrize("eta", [0.01, 0.2, 0.5, 0.8, 0.99, 0.999999, 1.0])
def test_eta_splits_the_noise_and_keeps_its_size(eta):
    # from x = s x1 with xhat = 0 the mean is c x1, and c^2 + std^2 = s'^2
    noise, s, s_next = draw(*SHAPE), level(0.75), level(0.5)
    transition = Annealed(eta).transition(s * noise, noise, s, s_next)
    kept = (transition.mean / noise).double()
    torch.testing.assert_close(
        kept.square() + transition.std.double() ** 2, torch.full_like(kept, 0.25), rtol=1e-5, atol=0
    )
    assert transition.std.item() == pytest.approx(0.5 * math.sin(eta * math.pi / 2), rel=1e-6)


@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_a_known_image_keeps_its_trajectory_at_every_eta(eta):
    # with the true velocity of the pair (x0, x1) the mean is (1 - s') x0 + sqrt(s'^2 - std^2) x1
    clean, noise, s, s_next = draw(*SHAPE), draw(*SHAPE, seed=1), level(0.75), level(0.5)
    x = (1 - s) * clean + s * noise
    transition = Annealed(eta).transition(x, noise - clean, s, s_next)
    expected = (1 - s_next) * clean + s_next * math.cos(eta * math.pi / 2) * noise
    torch.testing.assert_close(transition.mean, expected, rtol=1e-4, atol=1e-5)


def test_eta_towards_zero_is_the_euler_step_of_the_ode():
    x, v, s, s_next = draw(*SHAPE), draw(*SHAPE, seed=1), level(0.75), level(0.5)
    euler = x + (s_next - s) * v
    transition = Annealed(1e-4).transition(x, v, s, s_next)
    torch.testing.assert_close(transition.mean, euler, rtol=0, atol=1e-5)
    assert transition.std < 1e-4
    assert not torch.allclose(Annealed(0.5).transition(x, v, s, s_next).mean, euler, atol=1e-2)


def test_eta_just_below_one_is_the_annealed_kernel():
    x, v, s, s_next = draw(*SHAPE), draw(*SHAPE, seed=1), level(0.75), level(0.5)
    near, at = Annealed(1 - 1e-7).transition(x, v, s, s_next), Annealed().transition(x, v, s, s_next)
    torch.testing.assert_close(near.mean, at.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(near.std, at.std)


def test_ode_is_euler_and_has_no_density():
    x, v, s, s_next = draw(*SHAPE), draw(*SHAPE, seed=1), level(0.75), level(0.5)
    assert torch.equal(Ode().next_state(x, v, s, s_next, None, torch.zeros(SHAPE)), x + (s_next - s) * v)
    assert list(Ode().trained_steps(4)) == [0, 1, 2] and not Ode().has_density, "states are kept, nothing is chosen"
    with pytest.raises(ValueError, match="no density"):
        Ode().transition(x, v, s, s_next)


def test_ode_of_a_straight_path_ends_at_its_image_whatever_the_steps():
    clean, noise = draw(*SHAPE), draw(*SHAPE, seed=1)
    x, levels = noise, [1.0, 0.9, 0.4, 0.0]
    for s, s_next in zip(levels, levels[1:], strict=False):
        x = Ode().next_state(x, noise - clean, level(s), level(s_next), None, noise)
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-5)


def test_clean_explores_around_the_clean_estimate_in_proportion_to_the_level():
    x, v, s, s_next = draw(*SHAPE), draw(*SHAPE, seed=1), level(0.75), level(0.5)
    transition = Clean(kappa=0.4).transition(x, v, s, s_next)
    assert torch.equal(transition.mean, clean_estimate(x, v, s))
    assert transition.std.item() == pytest.approx(0.3)


def test_clean_goes_on_from_the_explored_image_or_the_estimate():
    x, v, s, s_next = draw(*SHAPE), draw(*SHAPE, seed=1), level(0.75), level(0.5)
    action, noise = draw(*SHAPE, seed=2), draw(*SHAPE, seed=3)
    assert torch.equal(Clean().next_state(x, v, s, s_next, action, noise), 0.5 * action + 0.5 * noise)
    estimate = clean_estimate(x, v, s)
    assert torch.equal(Clean().next_state(x, v, s, s_next, None, noise), 0.5 * estimate + 0.5 * noise)


def test_the_state_that_follows_an_annealed_action_is_the_action():
    x, v = draw(*SHAPE), draw(*SHAPE, seed=1)
    action = draw(*SHAPE, seed=2)
    assert torch.equal(Annealed().next_state(x, v, level(0.5), level(0.25), action, torch.zeros(SHAPE)), action)
    last = Annealed().next_state(x, v, level(0.25), level(0.0), None, torch.zeros(SHAPE))
    assert torch.equal(last, clean_estimate(x, v, level(0.25)))


@pytest.mark.parametrize("num_steps", [2, 4, 8])
def test_the_annealed_kernel_never_trains_the_last_step_and_the_clean_one_never_the_first(num_steps):
    assert list(Annealed().trained_steps(num_steps)) == list(range(num_steps - 1))
    assert list(Clean().trained_steps(num_steps)) == list(range(1, num_steps))


def test_every_trained_step_has_a_positive_deviation():
    levels = [1.0, 0.75, 0.5, 0.25, 0.0]
    x, v = draw(*SHAPE), draw(*SHAPE, seed=1)
    for kernel in (Annealed(), Annealed(0.1), Clean(), FlowSde(), DanceSde()):
        for n in kernel.trained_steps(4):
            assert (kernel.transition(x, v, level(levels[n]), level(levels[n + 1])).std > 0).all()


@pytest.mark.parametrize("kernel", [Annealed(), Annealed(0.5), Clean(), Ode(), FlowSde(), DanceSde()], ids=str)
def test_a_level_a_row_is_one_level_for_all_bit_for_bit(kernel):
    x, v, noise = draw(*SHAPE), draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)
    one, rows = (level(0.9), level(0.75)), (torch.full((3,), 0.9), torch.full((3,), 0.75))
    assert torch.equal(kernel.next_state(x, v, *one, None, noise), kernel.next_state(x, v, *rows, None, noise))
    if not isinstance(kernel, Ode):
        a, b = kernel.transition(x, v, *one), kernel.transition(x, v, *rows)
        assert torch.equal(a.mean, b.mean)
        for shape in (SHAPE, (3, 4, *SHAPE[1:])):
            noise = draw(*shape, seed=3)
            assert torch.equal(a.sample(noise), b.sample(noise))
            assert torch.equal(a.log_prob(noise), b.log_prob(noise))


def test_rows_at_different_levels_are_each_computed_at_their_own():
    x, v = draw(*SHAPE), draw(*SHAPE, seed=1)
    s, s_next = torch.tensor([1.0, 0.75, 0.5]), torch.tensor([0.75, 0.5, 0.25])
    for kernel in (Annealed(), Annealed(0.5), Clean(), FlowSde(), DanceSde()):
        together = kernel.transition(x, v, s, s_next)
        for i in range(3):
            alone = kernel.transition(x[i : i + 1], v[i : i + 1], s[i], s_next[i])
            assert torch.equal(together.mean[i], alone.mean[0])
            assert torch.equal(together.std[i].flatten(), alone.std.flatten())


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (Clean(), True),
        (Clean(num_actions=4), False),
        (Clean(baseline="group"), False),
        (Annealed(), False),
    ],
    ids=str,
)
def test_the_mean_is_scored_only_where_it_is_the_only_baseline(kernel, expected):
    assert kernel.scores_mean is expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: Annealed(0.0),
        lambda: Annealed(1.5),
        lambda: Clean(kappa=0.0),
        lambda: Clean(num_actions=0),
        lambda: Clean(baseline="none"),
        lambda: FlowSde(0.0),
        lambda: DanceSde(-0.3),
        lambda: FlowSde(num_actions=3, antithetic=True),
    ],
)
def test_a_kernel_without_a_density_is_an_error(make):
    with pytest.raises(ValueError):
        make()


def test_an_unknown_reduction_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="sqrt"):
        Transition(draw(*SHAPE), level(0.5)).log_prob(draw(*SHAPE), "total")


def test_names_of_the_kernels():
    assert set(KERNELS) == {"annealed", "clean", "flow_sde", "dance_sde", "cps", "ode"}
    assert issubclass(KERNELS["cps"], Annealed), "at eta = 1 they are one, and below it the annealed kernel is CPS"
    assert [name for name, make in KERNELS.items() if make.anneals] == ["annealed", "clean"]
    etas = {"annealed": 1.0, "clean": None, "flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8, "ode": None}
    assert {name: make.default_eta() for name, make in KERNELS.items()} == etas
    assert all(make().trained_steps(4) for make in KERNELS.values())
    assert [name for name, make in KERNELS.items() if not make().has_density] == ["ode"]


# SDEs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("s", "s_next"), [(1.0, 0.75), (0.75, 0.5), (0.25, 0.1)])
def test_the_flow_sde_is_flow_grpos_equation_9_by_hand(s, s_next):
    # std = g sqrt(-dt), g = a sqrt(s / (1 - s~)), mu = x (1 + g^2 dt / 2s) + v (1 + g^2 (1 - s) / 2s) dt
    x, v, dt = draw(*SHAPE), draw(*SHAPE, seed=1), s_next - s
    g = 0.7 * math.sqrt(s / (1 - (s_next if s == 1 else s)))
    transition = FlowSde(0.7).transition(x, v, level(s), level(s_next))
    assert transition.std.item() == pytest.approx(g * math.sqrt(-dt), rel=1e-5)
    mean = x * (1 + g**2 * dt / (2 * s)) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    torch.testing.assert_close(transition.mean, mean)


@pytest.mark.parametrize(("s", "s_next"), [(1.0, 0.75), (0.75, 0.5), (0.25, 0.1)])
def test_the_dance_sde_is_its_score_form_by_hand(s, s_next):
    # mu = x + v dt - eta^2 / 2 score dt, score = -(x - (1 - s) x0) / s^2, std = eta sqrt(-dt)
    x, v, dt = draw(*SHAPE), draw(*SHAPE, seed=1), s_next - s
    score = -(x - (1 - s) * (x - s * v)) / s**2
    transition = DanceSde(0.3).transition(x, v, level(s), level(s_next))
    assert transition.std.item() == pytest.approx(0.3 * math.sqrt(-dt), rel=1e-5)
    torch.testing.assert_close(transition.mean, x + v * dt - 0.3**2 / 2 * score * dt)


@pytest.mark.parametrize("eta", [0.2, 0.8, 1.0])
@pytest.mark.parametrize(("s", "s_next"), [(1.0, 0.75), (0.5, 0.25)])
def test_cps_is_its_formula_and_at_1_the_annealed_kernel(eta, s, s_next):
    # mu = (1 - s') x0 + x1 sqrt(s'^2 - std^2), std = s' sin(a pi / 2)
    x, v = draw(*SHAPE), draw(*SHAPE, seed=1)
    x0, x1 = x - s * v, x + (1 - s) * v
    std = s_next * math.sin(eta * math.pi / 2)
    transition = KERNELS["cps"](eta).transition(x, v, level(s), level(s_next))
    assert transition.std.item() == pytest.approx(std, rel=1e-5)
    mean = (1 - s_next) * x0 + x1 * math.sqrt(max(s_next**2 - std**2, 0.0))
    torch.testing.assert_close(transition.mean, mean, rtol=1e-4, atol=1e-5)
    if eta == 1.0:
        annealed = Annealed().transition(x, v, level(s), level(s_next))
        assert torch.equal(transition.mean, annealed.mean) and torch.equal(transition.std, annealed.std)


@pytest.mark.parametrize("make", [FlowSde, DanceSde, Annealed], ids=["flow", "dance", "cps"])
def test_eta_towards_zero_is_the_euler_ode(make):
    x, v, s, s_next = draw(*SHAPE), draw(*SHAPE, seed=1), level(0.75), level(0.5)
    transition = make(1e-5).transition(x, v, s, s_next)
    torch.testing.assert_close(transition.mean, Ode().next_state(x, v, s, s_next, None, x), rtol=0, atol=1e-5)
    assert transition.std.item() < 1e-4


@pytest.mark.parametrize("kernel", [FlowSde(), DanceSde(), Annealed(), Annealed(0.4), Clean()], ids=str)
def test_sensitivity_is_the_derivative_of_the_mean_by_the_velocity(kernel):
    x, v = draw(*SHAPE), draw(*SHAPE, seed=1).requires_grad_()
    for s, s_next in ((1.0, 0.75), (0.5, 0.25)):
        mean = kernel.transition(x, v, level(s), level(s_next)).mean
        (slope,) = torch.autograd.grad(mean.sum(), v)
        torch.testing.assert_close(
            slope.abs(), kernel.sensitivity(level(s), level(s_next)).expand(SHAPE), rtol=1e-4, atol=1e-6
        )


def unit_gaussian_variance(kernel, num_steps):
    """Of what the sampler returns where data and noise are unit Gaussians, so that every marginal's variance is
    (1 - s)^2 + s^2 and the velocity is x (2 s - 1) / that; steps are linear, and variances multiply and add."""
    levels, variance = with_zero(uniform_levels(num_steps)).double(), 1.0
    for n in range(num_steps):
        s, s_next, x = levels[n], levels[n + 1], torch.ones(1, 1, dtype=torch.float64)
        v = x * (2 * s - 1) / (s**2 + (1 - s) ** 2)
        if n in kernel.trained_steps(num_steps) and kernel.has_density:
            transition = kernel.transition(x, v, s, s_next)
            variance = transition.mean.item() ** 2 * variance + transition.std.item() ** 2
        else:
            variance *= kernel.next_state(x, v, s, s_next, None, x).item() ** 2
    return variance


@pytest.mark.parametrize(
    ("kernel", "at_4", "at_2048"),
    [(FlowSde(0.7), 0.795, 1.004), (DanceSde(0.3), 0.542, 0.999), (Ode(), 0.518, 0.999)],
    ids=["flow", "dance", "ode"],
)
def test_the_sdes_approach_the_marginals_as_steps_are_refined(kernel, at_4, at_2048):
    assert unit_gaussian_variance(kernel, 4) == pytest.approx(at_4, abs=1e-3)
    assert unit_gaussian_variance(kernel, 2048) == pytest.approx(at_2048, abs=1e-3)
    errors = [abs(unit_gaussian_variance(kernel, n) - 1) for n in (4, 16, 2048)]
    assert errors == sorted(errors, reverse=True)


def test_cps_and_annealing_keep_the_coefficients_and_never_the_variance():
    # annealing's clean variance follows c' = (a')^2 ((1 - s')^2 c + s'^2), a' = 1 - s' (2 s' - 1) / ((1 - s')^2 +
    # s'^2): in the limit of many steps half of the variance is gone
    for eta, at_4, limit in ((1.0, 0.3107, 0.498), (0.8, 0.3866, 0.652)):
        assert unit_gaussian_variance(Annealed(eta), 4) == pytest.approx(at_4, abs=1e-4)
        assert unit_gaussian_variance(Annealed(eta), 2048) == pytest.approx(limit, abs=1e-3)
    x0, x1, s, s_next = draw(*SHAPE), draw(*SHAPE, seed=1), level(0.75), level(0.5)
    x, v = (1 - s) * x0 + s * x1, x1 - x0  # where the velocity is the pair's own
    transition = Annealed(0.4).transition(x, v, s, s_next)
    coefficient = math.sqrt(s_next.item() ** 2 - transition.std.item() ** 2)
    torch.testing.assert_close(transition.mean, (1 - s_next) * x0 + coefficient * x1)


def test_a_window_explores_inside_and_follows_the_ode_outside():
    kernel = Windowed(FlowSde(), range(1, 3))
    assert list(kernel.trained_steps(6)) == [1, 2] and kernel.reward_lag == 1 and kernel.has_density
    assert list(Windowed(FlowSde(), range(4, 8)).trained_steps(6)) == [4], "the last step has no action"
    x, v, s, s_next = draw(*SHAPE), draw(*SHAPE, seed=1), level(0.75), level(0.5)
    assert torch.equal(kernel.next_state(x, v, s, s_next, None, x), Ode().next_state(x, v, s, s_next, None, x))
    action = draw(*SHAPE, seed=2)
    assert torch.equal(kernel.next_state(x, v, s, s_next, action, x), action)
    assert torch.equal(kernel.transition(x, v, s, s_next).mean, FlowSde().transition(x, v, s, s_next).mean)
    assert not hasattr(kernel, "no_such_thing")


@pytest.mark.parametrize("fact", ["has_density", "reward_lag", "anneals", "renoises", "action_is_state"])
@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
def test_what_a_kernel_is_cannot_be_given_to_it(make, fact):
    with pytest.raises(TypeError, match=fact):
        make(**{fact: not getattr(make, fact)})


def test_a_window_is_what_its_kernel_is():
    for kernel in (Annealed(0.5), FlowSde(num_actions=2, antithetic=True), Clean()):
        windowed = Windowed(kernel, range(1, 2))
        for fact in (*Kernel.__annotations__, "scores_mean"):
            assert getattr(windowed, fact) == getattr(kernel, fact), fact


@dataclass(frozen=True)
class Tempered(Annealed):
    strength: float = 1.0


def test_a_kernel_is_made_from_options_and_brings_its_own(monkeypatch):
    monkeypatch.setitem(KERNELS, "tempered", Tempered)
    options = SamplingOptions(sample_kernel="tempered", sampler_kwargs='{"strength": 0.5}', num_perturbations=3)
    assert Tempered.from_options(options) == Tempered(strength=0.5, num_actions=3) and options.anneals
    assert Clean.from_options(SamplingOptions(sample_kappa=0.2, clean_baseline="group")) == Clean(0.2, "group")
    told = "sampler_kwargs has 'force', which Tempered doesn't take: its own options are strength"
    with pytest.raises(ValueError, match=told):
        SamplingOptions(sample_kernel="tempered", sampler_kwargs={"force": 1})
    with pytest.raises(ValueError, match="it has no options of its own; use the option sample_eta"):
        SamplingOptions(sampler_kwargs={"eta": 0.5})
    with pytest.raises(ValueError, match=r"sample_eta is 3.0; with sample_kernel='tempered' it must lie in \(0, 1\]"):
        SamplingOptions(sample_kernel="tempered", sample_eta=3.0)
