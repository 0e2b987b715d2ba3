import dataclasses

import pytest
import torch
from toy import LEVELS, Linear, condition, no_reference, noise_of, rolled_out

from trl_tafs.method.image_objectives import MIN_LEVEL
from trl_tafs.method.kernels import Annealed, Clean, Windowed, clean_estimate
from trl_tafs.method.objectives import (
    OBJECTIVES,
    ClippedObjective,
    ForwardObjective,
    MatchingObjective,
)
from trl_tafs.method.options import MethodOptions
from trl_tafs.method.rollout import KEPT, replay
from trl_tafs.method.types import KLRows, TensorRecord


@pytest.mark.parametrize("kernel", [Annealed(), Clean(num_actions=3), Clean(baseline="group")], ids=str)
def test_items_are_images_with_their_steps_in_order(kernel):
    result = rolled_out(kernel)
    advantages = torch.arange(5 * 3 * kernel.num_actions, dtype=torch.float32).reshape(5, 3, -1)
    rows = ClippedObjective(kernel, 0.1).items(result, advantages)
    assert isinstance(rows, TensorRecord)
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
    rows = ClippedObjective(Annealed(), 0.1).items(rolled_out(Annealed()), torch.zeros(5, 3, 1))
    joined = type(rows).cat([rows[:4], rows[4:]])
    assert torch.equal(joined.state, rows.state)
    assert torch.equal(joined.sample, rows.sample)
    assert rows.repeat_interleave(2).sample.tolist() == [i for i in range(5) for _ in range(6)]
    assert rows[torch.tensor([14, 0])].sample.tolist() == [4, 0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "sqrt"])
def test_on_policy_the_loss_is_minus_the_mean_advantage(reduction):
    velocity, advantages = Linear(), torch.randn(5, 3, 1)
    objective = ClippedObjective(Annealed(), 0.1, reduction)
    rows = objective.items(rolled_out(Annealed(), 5, velocity, reduction), advantages)
    output = objective(velocity, rows, condition(5)[rows.sample])
    torch.testing.assert_close(output.loss, -advantages.mean())
    assert output.metrics["ratio_deviation"] < 1e-5


def test_each_row_is_replayed_with_its_own_prompt():
    velocity = Linear()
    objective = ClippedObjective(Annealed(), 0.1, "sum")
    rows = objective.items(rolled_out(Annealed(), 5, velocity), torch.ones(5, 3, 1))
    wrong = objective(velocity, rows, condition(5)[rows.sample.flip(0)])
    assert wrong.metrics["ratio_deviation"] > 0.05


def test_gaussian_and_uniform_weighting_differ_by_two_sigma_squared_a_row():
    velocity, result = Linear(), rolled_out(Annealed(), 5)
    gradients = {}
    for n in range(3):
        for weighting in ("gaussian", "uniform"):
            objective = ClippedObjective(Annealed(), 0.1, "sqrt", weighting)
            rows = objective.items(result, torch.ones(5, 3, 1))[n::3]
            loss = objective(velocity, rows, condition(5)[rows.sample]).loss
            gradients[weighting] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, velocity.parameters())])
        std = LEVELS[n + 1]
        torch.testing.assert_close(gradients["uniform"], 2 * std**2 * gradients["gaussian"], rtol=1e-4, atol=1e-7)


def test_the_kl_is_zero_without_a_change_and_its_gradient_too():
    velocity = Linear()
    objective = ClippedObjective(Annealed(), 0.1, beta=1.0)
    rows = objective.items(rolled_out(Annealed()), torch.zeros(5, 3, 1))
    output = objective(velocity, rows, condition(5)[rows.sample], velocity)
    assert output.metrics["kl"] == 0
    output.loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in velocity.parameters())


@pytest.mark.parametrize("kernel", [Annealed(), Annealed(0.5), Clean()], ids=str)
def test_the_kl_has_a_gradient_that_pulls_back_to_the_base(kernel):
    base, velocity = Linear(), Linear()
    objective = ClippedObjective(kernel, 0.1, beta=0.7)
    rows = objective.items(rolled_out(kernel, 5, base), torch.zeros(5, 3, 1))
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
        rows = objective.items(rolled_out(Annealed(), 5, base), torch.zeros(5, 3, 1))
        losses.append(objective(velocity, rows, condition(5)[rows.sample], base).loss)
    torch.testing.assert_close(2 * losses[0], losses[1])


def test_without_beta_the_reference_is_never_evaluated():
    objective = ClippedObjective(Annealed(), 0.1)
    rows = objective.items(rolled_out(Annealed()), torch.ones(5, 3, 1))
    assert "kl" not in objective(Linear(), rows, condition(5)[rows.sample], no_reference).metrics


def test_beta_without_a_reference_is_an_error():
    objective = ClippedObjective(Annealed(), 0.1, beta=0.1)
    rows = objective.items(rolled_out(Annealed()), torch.ones(5, 3, 1))
    with pytest.raises(ValueError, match="beta is 0.1: the KL term needs"):
        objective(Linear(), rows, condition(5)[rows.sample])


def test_advantages_of_another_number_of_actions_are_an_error():
    with pytest.raises(ValueError):
        ClippedObjective(Clean(num_actions=3), 0.1).items(rolled_out(Clean(num_actions=3)), torch.zeros(5, 3, 1))


def test_following_the_gradient_raises_what_has_an_advantage():
    velocity = Linear()
    objective = ClippedObjective(Annealed(), 0.5, "sum")
    advantages = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])[:, None, None].expand(5, 3, 1)
    rows = objective.items(rolled_out(Annealed(), 5, velocity, "sum"), advantages)
    objective(velocity, rows, condition(5)[rows.sample]).loss.backward()
    with torch.no_grad():
        for parameter in velocity.parameters():
            parameter -= 1e-4 * parameter.grad
        moved = replay(velocity, Annealed(), rows, condition(5)[rows.sample]).log_prob(rows.action)
    change = moved - rows.old_log_prob
    assert (change * rows.advantage).mean() > 0


def test_names_of_the_objectives():
    assert OBJECTIVES["clipped"] is ClippedObjective


# Forward objectives ---------------------------------------------------------------------------------------------


def forward_rows(result, advantages=None, **options):
    advantages = torch.zeros(5, 3, 1) if advantages is None else advantages
    return ForwardObjective(**{"levels": "sampler", **options}).items(result, advantages, noise_of())


def test_final_images_at_the_samplers_levels_are_rows_in_order():
    result, advantages = rolled_out(Annealed()), torch.arange(15, dtype=torch.float32).reshape(5, 3, 1)
    rows = forward_rows(result, advantages)
    assert len(rows) == 20 and isinstance(rows, TensorRecord)
    for image in range(5):
        for n in range(4):
            row = rows[4 * image + n]
            assert row.sample == image and row.level == LEVELS[n] and row.old_velocity is None
            assert torch.equal(row.clean, result.final[image])
            assert row.advantage.tolist() == [3 * image + 2]  # the last step's
    first = rows.state[rows.level == 1]
    noise = (rows.state - (1 - rows.level.reshape(-1, 1, 1, 1)) * rows.clean) / rows.level.reshape(-1, 1, 1, 1)
    assert torch.allclose(noise[rows.level == 1], first)
    assert abs(noise.std() - 1) < 0.15 and noise.unique().numel() > 200  # each row has its own


def test_every_image_is_a_row_with_its_own_advantage():
    result, advantages = rolled_out(Annealed()), torch.arange(15, dtype=torch.float32).reshape(5, 3, 1)
    rows = forward_rows(result, advantages, images="every")
    assert len(rows) == 5 * 3 * 4
    for image in range(5):
        for step in range(3):
            row = rows[12 * image + 4 * step + 1]
            assert row.sample == image and row.level == LEVELS[1]
            assert torch.equal(row.clean, result.clean[image, step + 1])
            assert row.advantage.tolist() == [3 * image + step]


@pytest.mark.parametrize("images", ["final", "every"])
def test_trajectory_rows_are_the_states_that_led_to_the_image(images):
    result, advantages = rolled_out(Annealed()), torch.arange(15, dtype=torch.float32).reshape(5, 3, 1)
    rows = forward_rows(result, advantages, images=images, levels="trajectory")
    assert len(rows) == 15
    for image in range(5):
        for step in range(3):
            row = rows[3 * image + step]
            assert torch.equal(row.state, result.states[image, step]) and row.level == LEVELS[step]
            final = images == "final"
            assert torch.equal(row.clean, result.final[image] if final else result.clean[image, step + 1])
            assert row.advantage.tolist() == [3 * image + (2 if final else step)]


def test_random_levels_are_spread_evenly_and_belong_to_the_sample():
    result = rolled_out(Annealed())
    level = forward_rows(result, levels="random", num_levels=8).level.reshape(5, 8)
    assert ((level > MIN_LEVEL) & (level < 1)).all() and level.unique().numel() == 40
    edges = MIN_LEVEL + (1 - MIN_LEVEL) * torch.arange(9) / 8
    assert ((level >= edges[:-1]) & (level <= edges[1:])).all()
    assert torch.equal(level, forward_rows(result, levels="random", num_levels=8).level.reshape(5, 8))


@pytest.mark.parametrize("objective", [ForwardObjective(weighting="velocity", adv_clip=1.0), MatchingObjective()])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_moves_the_estimate_towards_good_images_and_away_from_bad_ones(objective, sign):
    velocity, result = Linear(), rolled_out(Annealed())
    rows = objective.items(result, torch.full((5, 3, 1), sign), noise_of())
    text = condition(5)[rows.sample]

    def distance():
        v = velocity(rows.state, rows.level, text)
        return (clean_estimate(rows.state, v, rows.level) - rows.clean).square().mean()

    before = distance()
    objective(velocity, rows, text).loss.backward()
    with torch.no_grad():
        for parameter in velocity.parameters():
            parameter -= 1e-2 * parameter.grad
    assert sign * (distance() - before) < 0


@pytest.mark.parametrize("objective", [ForwardObjective(), MatchingObjective()], ids=lambda o: type(o).__name__)
def test_what_the_old_policy_said_on_policy_changes_nothing(objective):
    velocity, result = Linear(), rolled_out(Annealed())
    rows = objective.items(result, torch.randn(5, 3, 1), noise_of())
    text = condition(5)[rows.sample]
    observed = objective.with_old_policy(velocity, rows, text)
    assert not observed.old_velocity.requires_grad
    outputs = [objective(velocity, item, text).loss for item in (rows, observed)]
    gradients = [torch.autograd.grad(loss, velocity.parameters()) for loss in outputs]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_off_policy_the_spring_pulls_back_to_what_was_observed_and_matching_is_clipped():
    old, velocity, result = Linear(), Linear(1), rolled_out(Annealed())
    text = condition(5)[forward_rows(result).sample]
    spring = ForwardObjective(levels="sampler")
    rows = spring.with_old_policy(old, spring.items(result, torch.zeros(5, 3, 1), noise_of()), text)
    assert not spring.without_gradient(rows).any()
    assert spring(velocity, rows, text).metrics["old_distance"] > 0
    assert any(g.abs().sum() > 0 for g in torch.autograd.grad(spring(velocity, rows, text).loss, velocity.parameters()))
    matching = MatchingObjective(levels="sampler", clip_range=1e-3)
    rows = matching.with_old_policy(old, matching.items(result, torch.ones(5, 3, 1), noise_of()), text)
    assert matching(velocity, rows, text).metrics["clipfrac"] > 0.9


def test_items_without_advantage_have_no_gradient_where_nothing_else_pulls():
    advantages = torch.zeros(5, 3, 1)
    advantages[2, -1] = 1.0
    for kind in (ForwardObjective, MatchingObjective):
        rows = kind().items(rolled_out(Annealed()), advantages, noise_of())
        assert torch.equal(kind().without_gradient(rows), rows.sample != 2)
        assert not kind(beta=0.1).without_gradient(rows).any()


@pytest.mark.parametrize("kind", [ForwardObjective, MatchingObjective])
def test_the_distance_to_the_base_has_a_gradient_that_pulls_back(kind):
    base, velocity = Linear(), Linear()
    objective = kind(beta=0.7)
    rows = objective.items(rolled_out(Annealed(), 5, base), torch.zeros(5, 3, 1), noise_of())
    text = condition(5)[rows.sample]
    with torch.no_grad():
        velocity.inner.bias += 0.1
    rows = objective.with_old_policy(velocity, rows, text)  # the old policy is the present one: no spring
    output = objective(velocity, rows, text, base)
    torch.testing.assert_close(output.metrics["kl"], torch.tensor(0.005))  # .1^2 / 2 an element
    output.loss.backward()
    assert (velocity.inner.bias.grad > 0).all()
    with pytest.raises(ValueError, match="beta is 0.7"):
        objective(velocity, rows, text)


def test_the_clipped_objective_takes_siblings_of_a_state():
    kernel, velocity = Annealed(num_actions=4, antithetic=True), Linear()
    result = rolled_out(kernel, 5, velocity)
    objective = ClippedObjective(kernel, 0.1, level_weighting="balanced")
    rows = objective.items(result, torch.randn(5, 3, 4))
    assert objective(velocity, rows, condition(5)[rows.sample]).metrics["ratio_deviation"] < 1e-5


@pytest.mark.parametrize("levels", ["trajectory", "sampler"])
def test_a_windows_images_have_their_own_advantages(levels):
    result = rolled_out(Windowed(Annealed(), range(1, 3)))
    advantages = torch.arange(10, dtype=torch.float32).reshape(5, 2, 1)
    rows = forward_rows(result, advantages, images="every", levels=levels)
    each = 1 if levels == "trajectory" else 4
    assert len(rows) == 5 * 2 * each
    for image in range(5):
        for step in range(2):
            row = rows[each * (2 * image + step)]
            assert torch.equal(row.clean, result.clean[image, step + 2]), "that of the step after the action"
            assert row.sample == image and row.advantage.tolist() == [2 * image + step]


# What a rollout keeps ------------------------------------------------------------------------------------------


NEEDS = [
    (ClippedObjective, {}, Annealed()),
    (ClippedObjective, {}, Annealed(num_actions=3)),
    (ClippedObjective, {}, Clean(baseline="group")),
    *(
        (ForwardObjective, {"levels": levels, "images": images}, Annealed())
        for levels in ("trajectory", "sampler", "random")
        for images in ("final", "every")
    ),
]


@pytest.mark.parametrize(("kind", "choices", "kernel"), NEEDS, ids=str)
def test_items_are_the_same_from_what_the_objective_says_it_reads(kind, choices, kernel):
    forward = {"objective": "forward"} if choices else {}
    options = MethodOptions(**forward, **{f"forward_{name}": value for name, value in choices.items()})
    needs = kind.rollout_needs(options)
    whole, kept = (rolled_out(kernel, keep=keep) for keep in (KEPT, needs))
    for name in KEPT - {"states", "actions"}:
        a, b = getattr(whole, name), getattr(kept, name)
        assert torch.equal(a, b) if name in needs else b.numel() == 0, name
    objective = ClippedObjective(kernel, 0.1) if kind is ClippedObjective else kind(**choices)
    advantages = torch.randn(5, 3, kernel.num_actions)
    for field in dataclasses.fields(objective.items(whole, advantages, noise_of())):
        a, b = (getattr(objective.items(r, advantages, noise_of()), field.name) for r in (whole, kept))
        assert (a is None and b is None) or torch.equal(a, b), field.name


def test_rows_per_image_is_how_many_items_there_are():
    for levels in ("trajectory", "sampler", "random"):
        for images in ("final", "every"):
            told = {"forward_levels": levels, "forward_images": images, "forward_num_levels": 5}
            options = MethodOptions(objective="forward", **told)
            objective = ForwardObjective(levels, images, 5)
            items = objective.items(rolled_out(Annealed()), torch.zeros(5, 3, 1), noise_of())
            assert len(items) == 5 * ForwardObjective.rows_per_image(options)


@pytest.mark.parametrize(
    ("kind", "kept"), [(ForwardObjective, 3 * 2 + 4), (ClippedObjective, 4 * 2 + 4)], ids=["forward", "clipped"]
)
def test_the_bytes_of_one_rollout(kind, kept):
    # D = 12, bfloat16: three states, or the four of the path, and the final latent in float32
    needs = kind.rollout_needs(MethodOptions())
    result = rolled_out(Annealed(), batch=1, keep=needs, storage_dtype=torch.bfloat16)
    stored = (result.path, result.branches, result.log_probs, result.clean, result.final)
    ratios = 3 * 4 if kind is ClippedObjective else 0
    assert sum(tensor.untyped_storage().nbytes() for tensor in stored) == 12 * kept + ratios


@pytest.mark.parametrize("name", ["matched", "forward", "awm", "clipped"])
def test_the_distance_to_the_base_at_one_row_is_that_at_all_on_average(name):
    """Over the S choices of an image's row, loss and gradient are those of all rows."""
    kernel, velocity, base, steps = Annealed(), Linear(), Linear(seed=1), 3
    make = {"clipped": lambda: ClippedObjective(kernel, clip_range=0.1, beta=0.3)}
    make |= {key: lambda key=key: OBJECTIVES[key](beta=0.3) for key in ("matched", "forward")}
    make["awm"] = lambda: OBJECTIVES["awm"](beta=0.3, clip_range=0.1)
    objective, rollout = make[name](), rolled_out(kernel)
    items = objective.items(rollout, torch.randn(5, steps, 1, generator=torch.Generator().manual_seed(0)), noise_of())
    conditioning, evaluated = condition(5)[items.sample], []

    def reference(x, level, c):
        assert len(c) == len(x)
        evaluated.append(len(x))
        return base(x, level, c)

    def result(some):
        velocity.zero_grad()
        output = objective(velocity, some, conditioning, reference)
        output.loss.backward()
        return torch.cat([output.loss.detach()[None], *(p.grad.flatten() for p in velocity.parameters())])

    whole = result(items)
    chosen = [tuple(range(k, len(items), steps)) for k in range(steps)]
    parts = [result(dataclasses.replace(items, kl_rows=KLRows(rows, float(steps)))) for rows in chosen]
    assert torch.allclose(torch.stack(parts).mean(0), whole, atol=1e-5)
    assert not torch.allclose(parts[0], whole, atol=1e-4)
    assert evaluated == [15, 5, 5, 5]
    nowhere = dataclasses.replace(items, kl_rows=KLRows((), 3.0))
    assert objective(velocity, nowhere, conditioning, no_reference).metrics["kl"] == 0
