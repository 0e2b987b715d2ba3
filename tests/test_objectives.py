import pytest
import torch
from torch import nn

from trl_tafs.kernels import Annealed, Clean
from trl_tafs.objectives import OBJECTIVES, ClippedObjective
from trl_tafs.rollout import SampleNoise, replay, rollout
from trl_tafs.schedules import uniform_levels, with_zero
from trl_tafs.types import Conditioning, Embeddings, Rows

LEVELS = with_zero(uniform_levels(4))
SHAPE = (3, 2, 2)


class Linear(nn.Module):
    """A velocity that depends on state, level and prompt."""

    def __init__(self, seed=0):
        super().__init__()
        self.inner = nn.Linear(12 + 2, 12)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x, level, conditioning):
        inputs = torch.cat([x.flatten(1), level[:, None], conditioning.positive.text[:, 0]], dim=1)
        return self.inner(inputs).reshape(x.shape)


def condition(batch):
    return Conditioning(Embeddings(torch.arange(batch, dtype=torch.float32).reshape(batch, 1, 1) / 10))


def rolled_out(kernel, batch=5, velocity=None, reduction="sqrt"):
    noise = SampleNoise(0, 0, tuple(range(batch)))
    velocity = Linear() if velocity is None else velocity
    return rollout(velocity, kernel, condition(batch), LEVELS, noise("initial", 0, SHAPE), noise, reduction=reduction)


def no_reference(x, level, conditioning):
    raise AssertionError("the reference was called")


@pytest.mark.parametrize("kernel", [Annealed(), Clean(num_actions=3), Clean(baseline="group")], ids=str)
def test_rows_are_images_with_their_steps_in_order(kernel):
    result = rolled_out(kernel)
    advantages = torch.arange(5 * 3 * kernel.num_actions, dtype=torch.float32).reshape(5, 3, -1)
    rows = ClippedObjective(kernel, 0.1).rows(result, advantages)
    assert isinstance(rows, Rows)
    assert len(rows) == 15
    for image in range(5):
        for i, n in enumerate(result.steps.tolist()):
            row = rows[3 * image + i]
            assert row.sample == image
            assert torch.equal(row.state, result.states[image, i])
            assert torch.equal(row.action, result.actions[image, i])
            assert torch.equal(row.old_log_prob, result.log_probs[image, i])
            assert torch.equal(row.advantage, advantages[image, i])
            assert (row.level, row.next_level) == (LEVELS[n], LEVELS[n + 1])


def test_rows_can_be_picked_repeated_and_joined():
    rows = ClippedObjective(Annealed(), 0.1).rows(rolled_out(Annealed()), torch.zeros(5, 3, 1))
    joined = type(rows).cat([rows[:4], rows[4:]])
    assert torch.equal(joined.state, rows.state)
    assert torch.equal(joined.sample, rows.sample)
    assert rows.repeat_interleave(2).sample.tolist() == [i for i in range(5) for _ in range(6)]
    assert rows[torch.tensor([14, 0])].sample.tolist() == [4, 0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "sqrt"])
def test_on_policy_the_loss_is_minus_the_mean_advantage(reduction):
    velocity, advantages = Linear(), torch.randn(5, 3, 1)
    objective = ClippedObjective(Annealed(), 0.1, reduction)
    rows = objective.rows(rolled_out(Annealed(), 5, velocity, reduction), advantages)
    output = objective(velocity, rows, condition(5)[rows.sample])
    torch.testing.assert_close(output.loss, -advantages.mean())
    assert output.metrics["ratio_deviation"] < 1e-5


def test_each_row_is_replayed_with_its_own_prompt():
    velocity = Linear()
    objective = ClippedObjective(Annealed(), 0.1, "sum")
    rows = objective.rows(rolled_out(Annealed(), 5, velocity), torch.ones(5, 3, 1))
    wrong = objective(velocity, rows, condition(5)[rows.sample.flip(0)])
    assert wrong.metrics["ratio_deviation"] > 0.05


def test_gaussian_and_uniform_weighting_differ_by_two_sigma_squared_a_row():
    velocity, result = Linear(), rolled_out(Annealed(), 5)
    gradients = {}
    for n in range(3):
        for weighting in ("gaussian", "uniform"):
            objective = ClippedObjective(Annealed(), 0.1, "sqrt", weighting)
            rows = objective.rows(result, torch.ones(5, 3, 1))[n::3]
            loss = objective(velocity, rows, condition(5)[rows.sample]).loss
            gradients[weighting] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, velocity.parameters())])
        std = LEVELS[n + 1]
        torch.testing.assert_close(gradients["uniform"], 2 * std**2 * gradients["gaussian"], rtol=1e-4, atol=1e-7)


def test_the_kl_is_zero_without_a_change_and_its_gradient_too():
    velocity = Linear()
    objective = ClippedObjective(Annealed(), 0.1, beta=1.0)
    rows = objective.rows(rolled_out(Annealed()), torch.zeros(5, 3, 1))
    output = objective(velocity, rows, condition(5)[rows.sample], velocity)
    assert output.metrics["kl"] == 0
    output.loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in velocity.parameters())


@pytest.mark.parametrize("kernel", [Annealed(), Annealed(0.5), Clean()], ids=str)
def test_the_kl_has_a_gradient_that_pulls_back_to_the_base(kernel):
    base, velocity = Linear(), Linear()
    objective = ClippedObjective(kernel, 0.1, beta=0.7)
    rows = objective.rows(rolled_out(kernel, 5, base), torch.zeros(5, 3, 1))
    with torch.no_grad():
        velocity.inner.bias += 0.1
    output = objective(velocity, rows, condition(5)[rows.sample], base)
    text = condition(5)[rows.sample]
    policy, reference = (replay(v, kernel, rows, text) for v in (velocity, base))
    expected = ((policy.mean - reference.mean) / policy.std).square().flatten(1).mean(1).mean() / 2
    torch.testing.assert_close(output.metrics["kl"], expected.detach())
    torch.testing.assert_close(output.loss, 0.7 * expected)  # no advantage: the KL alone
    output.loss.backward()
    assert (velocity.inner.bias.grad > 0).all()
    assert all(p.grad is None for p in base.parameters())


def test_beta_scales_the_kl_in_the_loss():
    base, velocity = Linear(), Linear(1)
    losses = []
    for beta in (0.5, 1.0):
        objective = ClippedObjective(Annealed(), 0.1, beta=beta)
        rows = objective.rows(rolled_out(Annealed(), 5, base), torch.zeros(5, 3, 1))
        losses.append(objective(velocity, rows, condition(5)[rows.sample], base).loss)
    torch.testing.assert_close(2 * losses[0], losses[1])


def test_without_beta_the_reference_is_never_evaluated():
    objective = ClippedObjective(Annealed(), 0.1)
    rows = objective.rows(rolled_out(Annealed()), torch.ones(5, 3, 1))
    assert "kl" not in objective(Linear(), rows, condition(5)[rows.sample], no_reference).metrics


def test_beta_without_a_reference_is_an_error():
    objective = ClippedObjective(Annealed(), 0.1, beta=0.1)
    rows = objective.rows(rolled_out(Annealed()), torch.ones(5, 3, 1))
    with pytest.raises(ValueError, match="beta is 0.1: the KL term needs"):
        objective(Linear(), rows, condition(5)[rows.sample])


def test_advantages_of_another_number_of_actions_are_an_error():
    with pytest.raises(ValueError):
        ClippedObjective(Clean(num_actions=3), 0.1).rows(rolled_out(Clean(num_actions=3)), torch.zeros(5, 3, 1))


def test_following_the_gradient_raises_what_has_an_advantage():
    velocity = Linear()
    objective = ClippedObjective(Annealed(), 0.5, "sum")
    advantages = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])[:, None, None].expand(5, 3, 1)
    rows = objective.rows(rolled_out(Annealed(), 5, velocity, "sum"), advantages)
    objective(velocity, rows, condition(5)[rows.sample]).loss.backward()
    with torch.no_grad():
        for parameter in velocity.parameters():
            parameter -= 1e-4 * parameter.grad
        moved = replay(velocity, Annealed(), rows, condition(5)[rows.sample]).log_prob(rows.action)
    change = moved - rows.old_log_prob
    assert (change * rows.advantage).mean() > 0


def test_names_of_the_objectives():
    assert OBJECTIVES["clipped"] is ClippedObjective
