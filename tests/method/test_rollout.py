import math

import pytest
import torch
from torch import nn

from trl_tafs.method.kernels import Annealed, Clean, Ode, Transition, clean_estimate
from trl_tafs.method.levels import shift_levels, uniform_levels, with_zero
from trl_tafs.method.noise import SampleNoise, noise_seed
from trl_tafs.method.objectives import ClippedObjective
from trl_tafs.method.rollout import default_scored_steps, replay, rollout, sample, sample_steps
from trl_tafs.method.types import Conditioning, Embeddings

SHAPE = (4, 6, 6)
LEVELS = with_zero(shift_levels(uniform_levels(4), 3.0))
KERNELS = [Annealed(), Annealed(0.5), Clean(), Clean(baseline="group"), Clean(num_actions=4)]


class Denoiser(nn.Module):
    """A convolution that hears the level and the prompt."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.condition = nn.Linear(4, 8)
        self.to(dtype)

    def forward(self, x, level, conditioning):
        dtype = self.condition.weight.dtype
        told = torch.cat([conditioning.positive.text.mean(1), level[:, None]], dim=1).to(dtype)
        return self.outer(torch.tanh(self.inner(x.to(dtype)) + self.condition(told)[:, :, None, None])).float()


def condition(batch, seed=5):
    return Conditioning(Embeddings(torch.randn(batch, 3, 3, generator=torch.Generator().manual_seed(seed))))


def roll_out(kernel, batch=6, velocity=None, epoch=0, ids=None, levels=LEVELS, **options):
    ids = tuple(range(batch)) if ids is None else ids
    noise = SampleNoise(7, epoch, ids)
    velocity = Denoiser() if velocity is None else velocity
    text = condition(64)[torch.tensor(ids)]
    return rollout(velocity, kernel, text, levels, noise("initial", 0, SHAPE), noise, **options)


# Noise ----------------------------------------------------------------------------------------------------------


def test_noise_of_a_sample_is_the_same_in_any_batch_and_order():
    whole = SampleNoise(3, 2, tuple(range(8)))("action", 1, (2, 5))
    for ids in ((0, 1, 2, 3), (4, 5, 6, 7), (6,), (7, 0, 3)):
        assert torch.equal(SampleNoise(3, 2, ids)("action", 1, (2, 5)), whole[list(ids)])


def test_noise_differs_in_seed_epoch_sample_stream_and_step():
    draws = [
        SampleNoise(seed, epoch, (sample_id,))(stream, step, (16,))
        for seed in (0, 1)
        for epoch in (-1, 0, 1)
        for sample_id in (0, 1, 10)
        for stream in ("initial", "action", "state")
        for step in (0, 1)
    ]
    everything = torch.cat(draws)
    assert len(everything.unique(dim=0)) == len(draws) == 108
    correlation = torch.corrcoef(everything) - torch.eye(108)
    assert correlation.abs().max() < 0.95


def test_noise_is_standard_normal_over_samples():
    values = SampleNoise(0, 0, tuple(range(2000)))("initial", 0, (8,))
    assert values.mean().abs() < 0.03
    assert (values.std() - 1).abs() < 0.03
    assert (torch.corrcoef(values.T) - torch.eye(8)).abs().max() < 0.1  # between the elements of one stream
    assert (values[1:] * values[:-1]).mean().abs() < 0.03  # between neighbouring samples


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    SampleNoise(0, 0, (0, 1))("initial", 0, SHAPE)
    assert torch.equal(before, torch.get_rng_state())


def test_noise_seed_keeps_keys_apart_that_join_to_the_same_text():
    assert noise_seed(1, 11) != noise_seed(11, 1)
    assert noise_seed(1, 23) != noise_seed(12, 3)
    assert 0 <= noise_seed(0) < 2**63


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_samples_trajectory_does_not_depend_on_how_the_epoch_is_split(kernel):
    whole = roll_out(kernel, 6)
    for split in ((0, 1, 2), (3, 4, 5), (5,), (4, 0)):
        part, rows = roll_out(kernel, ids=split), list(split)
        for name in ("states", "actions", "clean", "scored", "final"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name)[rows], rtol=0, atol=1e-5)


# Rollout --------------------------------------------------------------------------------------------------------


def test_annealed_rollout_is_algorithm_1():
    velocity, noise = Denoiser(), SampleNoise(7, 0, tuple(range(6)))
    result, text = roll_out(Annealed(), 6, velocity), condition(64)[torch.arange(6)]
    x = noise("initial", 0, SHAPE)
    with torch.no_grad():
        for n in range(4):
            clean = x - LEVELS[n] * velocity(x, LEVELS[n].expand(6), text)
            assert torch.equal(result.clean[:, n], clean)
            if n < 3:
                assert torch.equal(result.states[:, n], x)
                x = (1.0 - LEVELS[n + 1]) * clean + LEVELS[n + 1] * noise("action", n, (1, *SHAPE))[:, 0]
                assert torch.equal(result.actions[:, n, 0], x)
    assert torch.equal(result.final, clean)
    assert result.steps.tolist() == [0, 1, 2]
    assert torch.equal(result.levels, LEVELS)


def test_the_action_of_a_step_is_the_next_steps_state():
    result = roll_out(Annealed(0.5))
    assert torch.equal(result.actions[:, :-1, 0], result.states[:, 1:])


def test_the_clean_kernel_goes_on_from_the_first_of_its_actions_with_fresh_noise():
    result, noise = roll_out(Clean(num_actions=4)), SampleNoise(7, 0, tuple(range(6)))
    assert result.steps.tolist() == [1, 2, 3]
    for i, n in enumerate((1, 2)):
        fresh = noise("state", n, SHAPE)
        expected = (1.0 - LEVELS[n + 1]) * result.actions[:, i, 0] + LEVELS[n + 1] * fresh
        assert torch.equal(result.states[:, i + 1], expected)
    first = (1.0 - LEVELS[1]) * result.clean[:, 0] + LEVELS[1] * noise("state", 0, SHAPE)
    assert torch.equal(result.states[:, 0], first)
    assert torch.equal(result.final, result.actions[:, -1, 0])


def test_annealed_scores_the_clean_estimates_of_steps_2_to_n():
    result = roll_out(Annealed())
    assert torch.equal(result.scored, result.clean[:, 1:, None])


def test_the_clean_kernel_scores_the_explored_images_never_their_mean():
    result = roll_out(Clean(num_actions=4))
    assert torch.equal(result.scored, result.actions)
    assert not torch.allclose(result.scored[:, :, 0], result.clean[:, 1:], atol=1e-2)


def test_the_state_baseline_scores_the_mean_beside_the_action_as_the_last():
    result = roll_out(Clean(baseline="state"))
    assert result.scored.shape == (6, 3, 2, *SHAPE)
    assert torch.equal(result.scored[:, :, :1], result.actions)
    assert torch.equal(result.scored[:, :, 1], result.clean[:, 1:])
    assert torch.equal(roll_out(Clean(baseline="group")).scored, roll_out(Clean(baseline="group")).actions)


def test_scored_steps_can_be_chosen():
    assert torch.equal(roll_out(Annealed(), scored_steps=range(0, 4)).scored[:, :, 0], roll_out(Annealed()).clean)
    last = roll_out(Clean(num_actions=4), scored_steps=range(3, 4))
    assert torch.equal(last.scored, last.actions[:, -1:])


def test_gain_credit_scores_the_unexplored_first_step_of_the_clean_kernel_too():
    result = roll_out(Clean(baseline="group"), scored_steps=range(0, 4))
    assert torch.equal(result.scored[:, :1], result.clean[:, :1, None])
    assert torch.equal(result.scored[:, 1:], result.actions)


@pytest.mark.parametrize("kernel", [Clean(), Clean(num_actions=4)], ids=str)
def test_a_first_step_that_has_no_baseline_of_its_own_cannot_be_scored(kernel):
    with pytest.raises(ValueError, match="step"):
        roll_out(kernel, scored_steps=range(0, 4))


def test_default_scored_steps_are_those_the_actions_answer_for():
    assert default_scored_steps(Annealed(), 4) == range(1, 4)
    assert default_scored_steps(Clean(), 4) == range(1, 4)


def test_sample_returns_what_the_rollout_ends_with():
    noise, text = SampleNoise(7, 0, tuple(range(6))), condition(64)[torch.arange(6)]
    final = sample(Denoiser(), Annealed(), text, LEVELS, noise("initial", 0, SHAPE), noise)
    assert torch.equal(final, roll_out(Annealed()).final)


def test_ode_sampling_is_eulers_method_and_draws_no_noise():
    def no_noise(stream, step, shape):
        raise AssertionError("the ODE drew noise")

    velocity, text, x = Denoiser(), condition(6), SampleNoise(7, 0, tuple(range(6)))("initial", 0, SHAPE)
    final = sample(velocity, Ode(), text, LEVELS, x, no_noise)
    with torch.no_grad():
        for n in range(4):
            x = x + (LEVELS[n + 1] - LEVELS[n]) * velocity(x, LEVELS[n].expand(6), text)
    assert torch.equal(final, x)


def test_eta_towards_zero_samples_what_the_ode_samples():
    noise, text = SampleNoise(7, 0, tuple(range(6))), condition(6)
    x = noise("initial", 0, SHAPE)
    ode, near = (sample(Denoiser(), k, text, LEVELS, x, noise) for k in (Ode(), Annealed(1e-4)))
    torch.testing.assert_close(ode, near, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("kernel", "num_steps"), [(Ode(), 1), (Annealed(), 1), (Clean(), 1)], ids=str)
def test_a_rollout_without_a_trained_step_is_an_error_that_says_so(kernel, num_steps):
    with pytest.raises(ValueError, match="step"):
        roll_out(kernel, levels=with_zero(uniform_levels(num_steps)))


# Replay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "sqrt"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_ratio_is_exactly_one_on_policy(kernel, reduction):
    velocity = Denoiser()
    result = roll_out(kernel, 6, velocity, reduction=reduction)
    rows = ClippedObjective(kernel, 0.1, reduction).items(result, torch.zeros_like(result.log_probs))
    text = condition(64)
    for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).split(6):  # the rollout's batch
        micro = rows[index]
        log_prob = replay(velocity, kernel, micro, text[micro.sample]).log_prob(micro.action, reduction)
        assert torch.equal(torch.exp(log_prob - micro.old_log_prob), torch.ones_like(log_prob))
        assert torch.equal(log_prob, micro.old_log_prob)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_ratio_moves_with_the_policy_and_has_a_gradient(kernel):
    velocity = Denoiser()
    result = roll_out(kernel, 6, velocity)
    rows = ClippedObjective(kernel, 0.1, "sum").items(result, torch.zeros_like(result.log_probs))
    with torch.no_grad():
        velocity.outer.bias += 0.01
    log_prob = replay(velocity, kernel, rows, condition(64)[rows.sample]).log_prob(rows.action)
    assert (log_prob - rows.old_log_prob).abs().min() > 1e-4
    log_prob.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in velocity.parameters())


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_bfloat16_actions_are_rounded_first_and_scored_second(kernel):
    velocity = Denoiser(torch.bfloat16)
    result = roll_out(kernel, 6, velocity, storage_dtype=torch.bfloat16)
    assert result.states.dtype == result.actions.dtype == torch.bfloat16
    rows = ClippedObjective(kernel, 0.1, "sum").items(result, torch.zeros_like(result.log_probs))
    noise = SampleNoise(7, 0, tuple(range(6)))
    for i, n in enumerate(result.steps.tolist()):
        micro = rows[i :: len(result.steps)]
        policy = replay(velocity, kernel, micro, condition(64)[micro.sample])
        assert torch.equal(policy.log_prob(micro.action), micro.old_log_prob)
        unrounded = policy.sample(noise("action", n, (kernel.num_actions, *SHAPE)))
        assert torch.equal(unrounded.bfloat16(), micro.action)
        before_rounding = policy.log_prob(unrounded)
        assert (before_rounding - micro.old_log_prob).abs().max() > 1e-3


def test_steps_carry_the_transition_that_was_sampled():
    noise = SampleNoise(7, 0, (0, 1))
    steps = list(sample_steps(Denoiser(), Annealed(), condition(2), LEVELS, noise("initial", 0, SHAPE), noise))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.transition is None for step in steps] == [False, False, False, True]
    for step in steps[:-1]:
        assert isinstance(step.transition, Transition)
        assert torch.equal(step.actions, step.transition.sample(noise("action", step.index, (1, *SHAPE))))


# The variance that re-noising a posterior mean leaves -----------------------------------------------------------


def unit_gaussian_velocity(x, level, conditioning):
    """E[eps - x0 | x] of a rectified flow between N(0, 1) and N(0, 1): s^2 + (1 - s)^2 is the marginal's variance."""
    s = level.reshape(-1, *[1] * (x.ndim - 1))
    return (s - (1 - s)) * x / ((1 - s) ** 2 + s**2)


def annealed_variances(levels):
    """Closed form. xhat = a x, a = (1 - s) / ((1 - s)^2 + s^2); Var x' = (1 - s')^2 a^2 Var x + s'^2; Var x_1 = 1.

    Of N = 4 uniform levels 1, 3/4, 1/2, 1/4: a = 0, 2/5, 1, 6/5. Var x = 1, 9/16, .2725, .215781;
    Var xhat = 0, .09, .2725, .310725. The marginals would have Var x = 1, .625, .5, .625, and 1 at the end.
    """
    states, cleans, variance = [], [], 1.0
    for s, s_next in zip(levels[:-1], levels[1:], strict=True):
        states.append(variance)
        cleans.append(((1 - s) / ((1 - s) ** 2 + s**2)) ** 2 * variance)
        variance = (1 - s_next) ** 2 * cleans[-1] + s_next**2
    return states, cleans


def gaussian_noise(stream, step, shape, rows=100):
    return SampleNoise(0, 0, tuple(range(rows)))(stream, step, shape)


def test_closed_form_of_the_annealed_variance_at_four_steps():
    states, cleans = annealed_variances([1.0, 0.75, 0.5, 0.25, 0.0])
    assert states == pytest.approx([1.0, 0.5625, 0.2725, 0.21578125])
    assert cleans == pytest.approx([0.0, 0.09, 0.2725, 0.310725])


@pytest.mark.parametrize(("num_steps", "expected"), [(2, 0.25), (4, 0.310725), (8, None)])
def test_re_noising_a_posterior_mean_does_not_preserve_the_marginals(num_steps, expected):
    levels, x = with_zero(uniform_levels(num_steps)), gaussian_noise("initial", 0, (600,))  # 60,000 numbers
    states, cleans = annealed_variances(levels.tolist())
    if expected is not None:
        assert cleans[-1] == pytest.approx(expected)
    final = sample(unit_gaussian_velocity, Annealed(), None, levels, x, gaussian_noise)
    tolerance = 5 * math.sqrt(2 / final.numel())  # five standard errors of a variance
    assert final.var().item() == pytest.approx(cleans[-1], rel=tolerance)
    steps = sample_steps(unit_gaussian_velocity, Annealed(), None, levels, x, gaussian_noise)
    for n, step in enumerate(steps):
        assert step.state.var().item() == pytest.approx(states[n], rel=tolerance)
        assert step.clean.var().item() == pytest.approx(cleans[n], rel=tolerance, abs=1e-9)


def test_the_ode_preserves_the_marginals_as_its_steps_are_refined():
    x, variances = gaussian_noise("initial", 0, (600,)), {}
    for num_steps in (4, 32, 256):
        levels = with_zero(uniform_levels(num_steps))
        variances[num_steps] = sample(unit_gaussian_velocity, Ode(), None, levels, x, gaussian_noise).var().item()
    assert abs(variances[256] - 1) < 0.03
    assert abs(variances[256] - 1) < abs(variances[32] - 1) < abs(variances[4] - 1)


# Which credit carries a signal ----------------------------------------------------------------------------------
#
# A linear-Gaussian policy: xhat_n = a x_n + theta, and the reward <w, clean image>. The annealed action at step n has
# the mean (1 - s') xhat_n, and the next clean image is a (action) + theta, so that through the action alone
# d E[R^{n+1}] / d theta = (1 - s') a w. The clean kernel's action has the mean xhat_n: d E[R^n] / d theta = w.

SLOPE, BATCH = 0.8, 20_000
WEIGHTS = torch.tensor([1.0, -0.5, 0.25, 2.0])
UNIFORM = with_zero(uniform_levels(4))


def estimated_gradient(kernel, scored_steps=None, score=lambda result: result.scored, levels=UNIFORM):
    """Minus the gradient of the surrogate at theta = 0, by the package's own rollout, rows and loss."""
    theta, generator = torch.zeros(4, requires_grad=True), torch.Generator().manual_seed(1)

    def velocity(x, level, conditioning):
        return (x - (SLOPE * x + theta)) / level[:, None]

    def noise(stream, step, shape):
        return torch.randn(BATCH, *shape, generator=generator)

    x = noise("initial", 0, (4,))
    result = rollout(velocity, kernel, None, levels, x, noise, reduction="sum", scored_steps=scored_steps)
    rewards = score(result) @ WEIGHTS  # (B, Q, K)
    dims = (2,) if kernel.scores_mean or kernel.num_actions > 1 else (0,)
    advantages = (rewards - rewards.mean(dims, keepdim=True))[..., : kernel.num_actions]
    objective = ClippedObjective(kernel, 0.2, "sum")
    output = objective(velocity, objective.items(result, advantages), None)
    (gradient,) = torch.autograd.grad(output.loss, theta)
    return -gradient


def gain_and_cosine(gradient, truth):
    return (gradient @ truth / truth.square().sum()).item(), torch.cosine_similarity(gradient, truth, dim=0).item()


def annealed_truth():
    return torch.stack([(1 - UNIFORM[n + 1]) * SLOPE * WEIGHTS for n in range(3)]).mean(0)


def test_the_reward_of_the_clean_image_that_follows_gives_the_annealed_kernel_the_true_gradient():
    gain, cosine = gain_and_cosine(estimated_gradient(Annealed()), annealed_truth())
    assert gain == pytest.approx(1.0, abs=0.05)
    assert cosine > 0.99


def test_credit_off_by_one_is_dead():
    gradient = estimated_gradient(Annealed(), scored_steps=range(0, 3))  # the clean image before the action
    gain, _ = gain_and_cosine(gradient, annealed_truth())
    assert abs(gain) < 0.05
    assert gradient.norm() < 0.1 * annealed_truth().norm()


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [(Clean(baseline="group"), 1.0), (Clean(num_actions=4), 0.75), (Clean(baseline="state"), 0.5)],  # 1 - 1 / K
    ids=["group", "M = 4", "state"],
)
def test_the_reward_of_the_explored_image_gives_the_clean_kernel_the_true_gradient(kernel, expected):
    gain, cosine = gain_and_cosine(estimated_gradient(kernel), WEIGHTS)
    assert gain == pytest.approx(expected, abs=0.05)
    assert cosine > 0.99


def test_the_reward_of_the_mean_is_dead_in_the_clean_kernel():
    gradient = estimated_gradient(Clean(baseline="group"), score=lambda result: result.clean[:, 1:, None])
    gain, _ = gain_and_cosine(gradient, WEIGHTS)
    assert abs(gain) < 0.05
    assert gradient.norm() < 0.1 * WEIGHTS.norm()


def test_the_action_at_the_mean_is_dead_in_a_whole_rollout():
    velocity, text = Denoiser(), condition(6)
    still = lambda stream, step, shape: torch.zeros(6, *shape)  # noqa: E731
    x = SampleNoise(0, 0, tuple(range(6)))("initial", 0, SHAPE)
    result = rollout(velocity, Annealed(), text, LEVELS, x, still)
    objective = ClippedObjective(Annealed(), 0.2, "sum")
    rows = objective.items(result, torch.randn(6, 3, 1))
    for step in (rows[n::3] for n in range(3)):  # the rollout's batches, so that the means are equal to the bit
        objective(velocity, step, text[step.sample]).loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in velocity.parameters())


# Branches of the annealed kernel --------------------------------------------------------------------------------


def test_each_re_noising_of_a_state_is_scored_by_the_image_it_leads_to():
    velocity, text = Denoiser(), condition(64)[:6]
    result = roll_out(Annealed(num_actions=3), velocity=velocity)
    assert result.scored.shape[:3] == (6, 3, 3)
    for step in range(3):
        level = LEVELS[step + 1]
        for m in range(3):
            action = result.actions[:, step, m]
            v = velocity(action, level.expand(6), text)
            torch.testing.assert_close(result.scored[:, step, m], clean_estimate(action, v, level))
    torch.testing.assert_close(result.scored[:, :, 0], result.clean[:, 1:])


def test_branches_leave_the_trajectory_and_its_noise_as_they_are():
    plain, branched = roll_out(Annealed()), roll_out(Annealed(num_actions=3))
    states = branched.states[:, 1:]
    assert torch.equal(states, branched.actions[:, :-1, 0]), "it goes on from the first"
    assert torch.equal(plain.states[:, 0], branched.states[:, 0])


def test_antithetic_actions_are_mirror_images_around_their_mean():
    for kernel in (Annealed(num_actions=4, antithetic=True), Clean(num_actions=4, antithetic=True)):
        result = roll_out(kernel)
        first, second = result.actions[:, :, :2], result.actions[:, :, 2:]
        means = (first + second) / 2
        torch.testing.assert_close(means[:, :, 0], means[:, :, 1])
        assert (first - second).abs().mean() > 0.1
        assert not torch.allclose(first[:, :, 0], first[:, :, 1], atol=0.05)


def test_an_odd_number_of_antithetic_actions_is_an_error():
    with pytest.raises(ValueError, match="num_actions is 3; antithetic actions come in pairs"):
        Annealed(num_actions=3, antithetic=True)
