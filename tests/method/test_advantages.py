import math

import pytest
import torch

from trl_tafs.method.advantages import (
    EPS,
    Advantages,
    PerPromptStatTracker,
    combine_rewards,
    group_mean_std,
    normalize_groups,
    normalize_states,
)
from trl_tafs.method.credit import CREDITS, Credit, TraceCredit, trace_advantages
from trl_tafs.method.options import CreditOptions
from trl_tafs.method.types import RewardTable

NAN = float("nan")


def table(values, weights=None):
    """(B, Q), (B, Q, K) or (B, Q, K, R) rewards as a table."""
    values = torch.as_tensor(values, dtype=torch.float32)
    while values.ndim < 4:
        values = values.unsqueeze(-1)
    names = tuple("abcdef"[: values.shape[3]])
    return RewardTable(values, names, torch.ones(len(names)) if weights is None else torch.tensor(weights))


def ids(*sizes):
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def advantages(values, group_ids, credit="step", num_trained=3, prompts=None, weights=None, last=None, **options):
    prompts = ["p"] * len(group_ids) if prompts is None else prompts
    options.setdefault("scale", "none")
    return Advantages(Credit(CREDITS[credit](), last), **options)(
        table(values, weights), group_ids, prompts, num_trained
    ).advantages


def random_rewards(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_equation_9_by_hand():
    # group 1, 3 5 7: mean 5, unbiased variance (4 + 0 + 4) / 2 = 4, deviation 2 -> -2, 0, 2 over 2.0001
    # group 2, 1 2: mean 1.5, variance (.25 + .25) / 1 = .5 -> -.5, .5 over .7072068
    got = normalize_groups(torch.tensor([[3.0], [5.0], [7.0], [1.0], [2.0]]), ids(3, 2))[:, 0]
    other = 0.5 / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(got, torch.tensor([-2 / 2.0001, 0.0, 2 / 2.0001, -other, other]))


def test_scale_none_takes_the_mean_off_and_scale_batch_divides_by_all_groups_deviation():
    values = torch.tensor([[3.0], [5.0], [7.0], [1.0], [2.0]])
    centred = torch.tensor([-2.0, 0.0, 2.0, -0.5, 0.5])
    torch.testing.assert_close(normalize_groups(values, ids(3, 2), "none")[:, 0], centred)
    # all five: mean 3.6, squares .36 + 1.96 + 11.56 + 6.76 + 2.56 = 23.2, variance 23.2 / 4 = 5.8
    torch.testing.assert_close(normalize_groups(values, ids(3, 2), "batch")[:, 0], centred / (math.sqrt(5.8) + EPS))


def test_each_step_is_normalised_by_itself():
    values = random_rewards(6, 3) * torch.tensor([1.0, 10.0, 100.0]) + torch.tensor([0.0, 5.0, -7.0])
    together = normalize_groups(values, ids(6))
    for q in range(3):
        torch.testing.assert_close(together[:, q], normalize_groups(values[:, q], ids(6)))
    torch.testing.assert_close(together.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(together.std(0), torch.ones(3), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("offset", "factor"), [(0.0, 1.0), (1e8, 1.0), (-1e8, 1.0), (1e10, 10.0), (0.0, 1e25), (1e37, 1e36), (0.0, 1e-3)]
)
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_large_rewards_and_small_differences_of_large_ones_are_told_apart(offset, factor, scale):
    # 0 1 2 3: mean 1.5, unbiased variance (2.25 + .25 + .25 + 2.25) / 3 = 5 / 3
    values = offset + factor * torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5]) / (math.sqrt(5 / 3) + EPS / factor)
    got = Advantages(Credit(CREDITS["step"]()), scale)(
        RewardTable(values.reshape(4, 1, 1, 1), ("a",), torch.ones(1, dtype=torch.float64)), ids(4), ["p"] * 4, 1
    )
    assert got.advantages.dtype == torch.float32
    torch.testing.assert_close(got.advantages.flatten(), expected, rtol=1e-6, atol=0)
    own = normalize_states(values.reshape(1, 1, 4), ids(1), scale).flatten()
    torch.testing.assert_close(own.float(), expected, rtol=1e-6, atol=0)
    tracked = PerPromptStatTracker(4, 4).update(["p"] * 4, values.reshape(4, 1, 1)).flatten()
    torch.testing.assert_close(tracked.float(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("constant", [0.1, 1e8 + 0.1, 1e25])
def test_equal_large_rewards_get_exactly_zero(constant):
    values = torch.full((6, 2), constant, dtype=torch.float64)
    assert torch.equal(normalize_groups(values, ids(4, 2)), torch.zeros(6, 2, dtype=torch.float64))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("constant", [0.0, 0.1, 0.3, -1.1, 100.3, 12345.678])
def test_a_group_without_variance_gets_exactly_zero(scale, constant):
    values = torch.cat([torch.full((7, 3), constant), random_rewards(5, 3)])
    got = normalize_groups(values, ids(7, 5), scale)
    assert torch.equal(got[:7], torch.zeros(7, 3))
    assert (got[7:] != 0).all()


def test_a_small_but_real_difference_still_counts():
    got = normalize_groups(torch.tensor([[0.5], [0.5001]]), ids(2))
    assert got[1, 0] > 0.1


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_normalisation_follows_the_samples_wherever_they_lie(scale):
    values, groups = random_rewards(12, 3), ids(3, 5, 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        normalize_groups(values[order], groups[order], scale), normalize_groups(values, groups, scale)[order]
    )


def test_group_ids_are_names_and_not_positions():
    values = random_rewards(6, 2)
    named = torch.tensor([70, 70, 70, -3, -3, -3])
    assert torch.equal(normalize_groups(values, named)[:3], normalize_groups(values, ids(3, 3))[:3])


def test_a_group_does_not_hear_of_the_others():
    values = random_rewards(8, 2)
    changed = torch.cat([values[:4], 100 * values[4:]])
    assert torch.equal(normalize_groups(values, ids(4, 4))[:4], normalize_groups(changed, ids(4, 4))[:4])


def test_a_missing_score_does_not_change_the_others():
    values = random_rewards(5, 3)
    with_gap = torch.cat([values, torch.full((1, 3), NAN)])
    got = normalize_groups(with_gap, ids(6))
    assert torch.equal(got[:5], normalize_groups(values, ids(5)))
    assert got[5].isnan().all()


def test_a_group_with_a_single_score_has_no_deviation_and_no_advantage():
    mean, std = group_mean_std(torch.tensor([[2.0], [NAN]]), ids(2))
    assert mean.flatten().tolist() == [2.0, 2.0]
    assert std.flatten().tolist() == [0.0, 0.0]
    assert torch.equal(advantages([[2.0], [NAN]], ids(2), num_trained=1), torch.zeros(2, 1, 1))


def test_large_offsets_do_not_eat_the_deviation():
    values = random_rewards(48, 1)
    torch.testing.assert_close(
        normalize_groups(values + 1000, ids(48)), normalize_groups(values, ids(48)), atol=2e-3, rtol=0
    )


TWO = [[1.0, 4.0, 0.0], [3.0, 0.0, 2.0]]


@pytest.mark.parametrize(
    ("credit", "last", "expected"),
    [
        ("step", None, [-1, 2, -1]),
        ("sum", None, [0, 0, 0]),  # -1 + 2 - 1
        ("reward_to_go", None, [0, 1, -1]),  # -1 + 2 - 1, 2 - 1, -1
        ("terminal", None, [-1, -1, -1]),
        # the last two steps, A = 2 -1; the first action takes the first one counted
        ("step", 2, [2, 2, -1]),
        ("sum", 2, [1, 1, 1]),
        ("reward_to_go", 2, [1, 1, -1]),
        ("terminal", 2, [-1, -1, -1]),
        # the last alone: all are terminal (Table 5's N_adv = 1 is Table 3's "w/o Step Adv.")
        ("step", 1, [-1, -1, -1]),
        ("sum", 1, [-1, -1, -1]),
        ("reward_to_go", 1, [-1, -1, -1]),
        ("terminal", 1, [-1, -1, -1]),
        ("step", 3, [-1, 2, -1]),
    ],
)
def test_credits_by_hand(credit, last, expected):
    scored = Credit(CREDITS[credit](), last).scored_steps(range(1, 4))
    values = torch.tensor(TWO)[:, [n - 1 for n in scored]]  # what the rollout would decode
    got = advantages(values, ids(2), credit, last=last)
    assert got.shape == (2, 3, 1)
    assert got[0, :, 0].tolist() == expected
    assert got[1, :, 0].tolist() == [-a for a in expected]


def test_terminal_is_the_last_step_also_where_earlier_ones_were_decoded():
    got = advantages(torch.tensor(TWO)[:, 1:], ids(2), "terminal")  # A = 2 -1
    assert got[0, :, 0].tolist() == [-1, -1, -1]


def test_gain_by_hand():
    # rewards from the first step on: image 1 0 1 4 0, image 2 2 3 0 2; increments 1 3 -4 and 1 -3 2;
    # means 1 0 -1 -> 0 3 -3 and 0 -3 3
    got = advantages([[0.0, 1.0, 4.0, 0.0], [2.0, 3.0, 0.0, 2.0]], ids(2), "gain")
    assert got[0, :, 0].tolist() == [0, 3, -3]
    assert got[1, :, 0].tolist() == [0, -3, 3]
    # the last one alone, decoded are two steps: increments -4 and 2, mean -1
    last = advantages([[4.0, 0.0], [0.0, 2.0]], ids(2), "gain", last=1)
    assert last[0, :, 0].tolist() == [-3, -3, -3]


def test_gain_is_normalised_after_the_difference():
    values = random_rewards(6, 4)
    got = advantages(values, ids(6), "gain", scale="group")
    torch.testing.assert_close(got[..., 0], normalize_groups(values[:, 1:] - values[:, :-1], ids(6)))
    normalised = normalize_groups(values, ids(6))
    assert not torch.allclose(got[..., 0], normalised[:, 1:] - normalised[:, :-1], atol=1e-2)


@pytest.mark.parametrize(
    ("credit", "last", "expected"),
    [
        ("step", None, range(1, 4)),
        ("step", 2, range(2, 4)),
        ("sum", 1, range(3, 4)),
        ("reward_to_go", 9, range(1, 4)),
        ("terminal", None, range(3, 4)),
        ("terminal", 3, range(3, 4)),
        ("gain", None, range(0, 4)),
        ("gain", 1, range(2, 4)),
    ],
)
def test_only_the_steps_that_are_used_are_decoded(credit, last, expected):
    assert Credit(CREDITS[credit](), last).scored_steps(range(1, 4)) == expected


@pytest.mark.parametrize("credit", ["step", "sum", "reward_to_go", "terminal", "gain"])
def test_one_trained_step_makes_every_credit_but_gain_the_same(credit):
    values = random_rewards(4, 2)
    used = values if credit == "gain" else values[:, 1:]
    reference = values[:, 1:] - values[:, :1] if credit == "gain" else values[:, 1:]
    got = advantages(used, ids(4), credit, num_trained=1, scale="group")
    torch.testing.assert_close(got[..., 0], normalize_groups(reference, ids(4)))


def test_unknown_credit_and_no_steps_are_errors():
    with pytest.raises(ValueError, match="step_credit is 'discounted'; use one of step, sum"):
        CreditOptions(step_credit="discounted")
    with pytest.raises(ValueError, match="num_advantage_steps is 0"):
        Credit(num_advantage_steps=0)


def test_sum_then_normalize_weighs_the_raw_rewards():
    values = random_rewards(6, 3, 1, 2) * torch.tensor([1.0, 10.0])
    got = advantages(values, ids(3, 3), weights=[2.0, -0.5], scale="group")
    torch.testing.assert_close(
        got[..., 0], normalize_groups((values[..., 0, :] * torch.tensor([2.0, -0.5])).sum(-1), ids(3, 3))
    )


def test_normalize_then_sum_weighs_the_normalised_rewards_then_normalises_by_the_batch():
    values = random_rewards(6, 3, 1, 2) * torch.tensor([1.0, 1000.0])
    got = advantages(values, ids(3, 3), weights=[2.0, 1.0], scale="group", aggregation="normalize_then_sum")
    parts = [normalize_groups(values[:, :, 0, r], ids(3, 3)) for r in range(2)]
    total = 2 * parts[0] + parts[1]
    expected = (total - total.mean(0)) / (total.std(0) + EPS)
    torch.testing.assert_close(got[..., 0], expected, rtol=1e-4, atol=1e-5)


def test_sum_of_normalized_is_normalised_once_and_keeps_what_lacks_a_score_at_zero():
    values = random_rewards(6, 3, 1, 2) * torch.tensor([1.0, 1000.0])
    values[0, 1, 0, 1] = float("nan")
    values[3:, :, :, :] = 0.5  # a group without variance
    got = advantages(values, ids(3, 3), weights=[2.0, 1.0], scale="group", aggregation="sum_of_normalized")
    parts = [normalize_groups(values[:, :, 0, r], ids(3, 3)) for r in range(2)]
    expected = (2 * parts[0] + parts[1]).nan_to_num(0.0)
    torch.testing.assert_close(got[..., 0], expected, rtol=1e-4, atol=1e-5)
    assert (got[3:] == 0).all() and got[0, 1, 0] == 0 and got[:3].std() > 1.5, "up to the sum of the weights"


def test_normalize_then_sum_does_not_let_the_larger_reward_drown_the_other():
    values = random_rewards(8, 1, 1, 2) * torch.tensor([1.0, 1000.0])
    first = normalize_groups(values[:, :, 0, 0], ids(8)).flatten()
    for aggregation, drowned in (("sum_then_normalize", True), ("normalize_then_sum", False)):
        got = advantages(values, ids(8), num_trained=1, scale="group", aggregation=aggregation).flatten()
        second = normalize_groups(values[:, :, 0, 1], ids(8)).flatten()
        assert torch.allclose(got, second, atol=0.05) is drowned
    assert torch.corrcoef(torch.stack([got, first]))[0, 1] > 0.3


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_reward_that_applies_to_some_prompts_only_is_left_out_of_the_others(aggregation):
    values = random_rewards(8, 3, 1, 2)
    values[4:, :, :, 1] = NAN  # the second reward has nothing to say on the second prompt
    got = advantages(values, ids(4, 4), aggregation=aggregation, scale="group")
    assert (got != 0).all()
    if aggregation == "sum_then_normalize":
        torch.testing.assert_close(got[4:, :, 0], normalize_groups(values[4:, :, 0, 0], ids(4)))
        torch.testing.assert_close(got[:4, :, 0], normalize_groups(values[:4, :, 0].sum(-1), ids(4)))


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_an_image_without_one_of_its_scores_is_masked_and_leaves_the_others_alone(aggregation, scale):
    values = random_rewards(6, 3, 1, 2)
    gap = values.clone()
    gap[5, 1, 0, 0] = NAN
    got = advantages(gap, ids(6), aggregation=aggregation, scale=scale)
    assert got[5, 1, 0] == 0
    assert got.isfinite().all()
    if aggregation == "sum_then_normalize":
        without = advantages(values[:5], ids(5), aggregation=aggregation, scale=scale)
        torch.testing.assert_close(got[:5, 1], without[:, 1])
    complete = advantages(values, ids(6), aggregation=aggregation, scale=scale)
    torch.testing.assert_close(got[:, [0, 2]], complete[:, [0, 2]])  # its other steps keep theirs


def test_combined_rewards_are_missing_only_where_a_score_that_the_group_has_is_missing():
    values = torch.tensor([[1.0, NAN], [2.0, NAN], [3.0, 4.0], [5.0, NAN]])[:, None, None]
    got = combine_rewards(table(values, [1.0, 10.0]), ids(2, 2)).flatten()
    assert got[:3].tolist() == [1.0, 2.0, 43.0]
    assert got[3].isnan()


def test_a_group_without_variance_gets_exactly_zero_by_normalize_then_sum_too():
    values = random_rewards(24, 3, 1, 2)
    values[:6] = 0.3
    got = advantages(values, ids(6, 6, 6, 6), scale="group", aggregation="normalize_then_sum")
    assert torch.equal(got[:6], torch.zeros(6, 3, 1))


def test_a_reward_of_weight_zero_is_only_looked_at():
    values = random_rewards(4, 3, 1, 2)
    values[0, :, :, 1] = NAN
    assert (advantages(values, ids(4), weights=[1.0, 0.0], scale="group") != 0).all()


def test_no_score_at_all_gives_zero_everywhere():
    assert torch.equal(advantages(torch.full((4, 3), NAN), ids(4)), torch.zeros(4, 3, 1))


def test_advantages_are_clipped_and_finite():
    values = torch.zeros(48, 3)
    values[0] = 1.0
    got = advantages(values, ids(48), scale="group", clip=2.0)
    assert got.max() == 2.0
    assert advantages(-values, ids(48), scale="group", clip=2.0).min() == -2.0
    assert advantages(values, ids(48), scale="group", clip=50.0).max() > 6


def test_siblings_are_each_others_baseline_by_hand():
    # state 1: 1 2 3 -> residuals -1 0 1; state 2: 10 10 40 -> -10 -10 20; the deviation is that of all six residuals:
    # squares 1 + 0 + 1 + 100 + 100 + 400 = 602, mean 0, variance 602 / 5
    values = torch.tensor([[[1.0, 2.0, 3.0]], [[10.0, 10.0, 40.0]]])
    residuals = torch.tensor([[[-1.0, 0.0, 1.0]], [[-10.0, -10.0, 20.0]]])
    torch.testing.assert_close(advantages(values, ids(2), num_trained=1, own_baseline=True), residuals.clamp(-5, 5))
    got = advantages(values, ids(2), num_trained=1, own_baseline=True, scale="group")
    torch.testing.assert_close(got, residuals / (math.sqrt(602 / 5) + EPS))


def test_the_mean_as_the_last_image_is_a_baseline_and_no_action():
    # action 3, mean 1 -> residual 1 of the action, -1 of the mean, which is dropped; action 0, mean 4 -> -2
    values = torch.tensor([[[3.0, 1.0]], [[0.0, 4.0]]])
    got = advantages(values, ids(2), num_trained=1, own_baseline=True, drop_mean=True)
    assert got.shape == (2, 1, 1)
    assert got.flatten().tolist() == [1.0, -2.0]
    scaled = advantages(values, ids(2), num_trained=1, own_baseline=True, drop_mean=True, scale="group").flatten()
    torch.testing.assert_close(scaled, torch.tensor([1.0, -2.0]) / (math.sqrt((1 + 1 + 4 + 4) / 3) + EPS))


def test_the_states_own_value_takes_nothing_from_the_other_states():
    values = random_rewards(4, 3, 5)
    shifted = values + torch.tensor([0.0, 10.0, -5.0, 3.0]).reshape(4, 1, 1)
    torch.testing.assert_close(
        normalize_states(values, ids(4)), normalize_states(shifted, ids(4)), rtol=1e-3, atol=1e-4
    )


def test_own_baseline_leaves_missing_siblings_out():
    values = torch.tensor([[[1.0, 3.0, NAN]], [[5.0, NAN, NAN]]])
    got = advantages(values, ids(2), num_trained=1, own_baseline=True)
    assert got[0, 0].tolist() == [-1.0, 1.0, 0.0]
    assert got[1, 0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_own_baseline_normalises_groups_apart_and_in_any_order(scale):
    values, groups = random_rewards(12, 3, 4), ids(3, 5, 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        normalize_states(values[order], groups[order], scale), normalize_states(values, groups, scale)[order]
    )


@pytest.mark.parametrize(
    ("constant", "siblings"),
    [
        (0.1, 3),
        (100.3, 2),
        (1000.7, 4),
        (100.3, 3),
        (1000.7, 8),
    ],
)
def test_states_where_exploration_changes_nothing_get_next_to_nothing(constant, siblings):
    got = normalize_states(torch.full((4, 3, siblings), constant), ids(4))
    assert got.abs().max() < 1e-3


def test_tracker_normalises_by_the_batch_until_a_prompt_is_known_well_enough():
    tracker = PerPromptStatTracker(buffer_size=8, min_count=4)
    values = torch.tensor([1.0, 2.0, 6.0, 7.0]).reshape(4, 1, 1)
    # mean 4, squares 9 + 4 + 4 + 9 = 26, variance 26 / 3
    got = tracker.update(["a", "a", "b", "b"], values).flatten()
    torch.testing.assert_close(got, torch.tensor([-3.0, -2.0, 2.0, 3.0]) / (math.sqrt(26 / 3) + EPS))
    # "a" now has 1 2 3 4: mean 2.5, variance 5 / 3; "b" has 6 7 5 10: mean 7, variance (1 + 0 + 4 + 9) / 3
    got = tracker.update(["a", "b", "a", "b"], torch.tensor([3.0, 5.0, 4.0, 10.0]).reshape(4, 1, 1)).flatten()
    a, b = math.sqrt(5 / 3) + EPS, math.sqrt(14 / 3) + EPS
    torch.testing.assert_close(got, torch.tensor([0.5 / a, -2 / b, 1.5 / a, 3 / b]))


def test_tracker_forgets_all_but_the_last_rewards():
    tracker = PerPromptStatTracker(buffer_size=4, min_count=4)
    tracker.update(["a"] * 4, torch.tensor([1e6, -1e6, 3.0, 4.0]).reshape(4, 1, 1))
    got = tracker.update(["a"] * 4, torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1)).flatten()
    torch.testing.assert_close(got, torch.tensor([-1.5, -0.5, 0.5, 1.5]) / (math.sqrt(5 / 3) + EPS))


def test_tracker_keeps_steps_apart_and_leaves_missing_scores_out():
    values = torch.tensor([[1.0, 100.0], [3.0, 300.0], [NAN, 200.0]]).reshape(3, 2, 1)
    got = PerPromptStatTracker(16, 2).update(["a"] * 3, values)
    torch.testing.assert_close(got[:2, 0, 0], torch.tensor([-1.0, 1.0]) / (math.sqrt(2) + EPS))
    torch.testing.assert_close(got[:, 1, 0], torch.tensor([-1.0, 1.0, 0.0]) * 100 / (100 + EPS))
    assert got[2, 0, 0].isnan()


def test_tracker_goes_on_from_its_state_bit_for_bit():
    whole, first = PerPromptStatTracker(6, 3), PerPromptStatTracker(6, 3)
    prompts = ["a", "b", "a", "b"]
    for seed in range(2):
        whole.update(prompts, random_rewards(4, 3, 1, seed=seed))
        first.update(prompts, random_rewards(4, 3, 1, seed=seed))
    second = PerPromptStatTracker(6, 3)
    second.load_state_dict(first.state_dict())
    for seed in range(2, 5):
        values = random_rewards(4, 3, 1, seed=seed)
        assert torch.equal(whole.update(prompts, values), second.update(prompts, values))


def test_a_trackers_state_does_not_change_when_the_tracker_goes_on():
    tracker = PerPromptStatTracker(6, 3)
    tracker.update(["a"], torch.ones(1, 1, 1))
    state = tracker.state_dict()
    tracker.update(["a"], torch.ones(1, 1, 1))
    assert len(state["a"]) == 1


def test_advantages_use_the_tracker_where_there_is_one():
    values = random_rewards(4, 3)
    expected = PerPromptStatTracker(16, 2).update(["a", "a", "b", "b"], values.unsqueeze(-1))
    got = advantages(values, ids(2, 2), prompts=["a", "a", "b", "b"], tracker=PerPromptStatTracker(16, 2))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("constant", [0.1, 100.3])
def test_a_prompt_without_variance_gets_exactly_zero_from_the_tracker(constant):
    got = PerPromptStatTracker(64, 4).update(["a"] * 48, torch.full((48, 3, 1), constant))
    assert torch.equal(got, torch.zeros(48, 3, 1))


def test_normalize_then_sum_keeps_the_statistics_of_each_reward_apart():
    values = random_rewards(6, 3, 1, 2) + torch.tensor([0.0, 1000.0])
    tracked = advantages(
        values, ids(6), prompts=["a"] * 6, tracker=PerPromptStatTracker(64, 2), aggregation="normalize_then_sum"
    )
    plain = advantages(values, ids(6), scale="group", aggregation="normalize_then_sum")
    torch.testing.assert_close(tracked, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("credit", ["step", "sum", "reward_to_go", "gain", "terminal"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_unequal_groups_in_any_order_get_the_same_advantages(credit, scale):
    values, groups = random_rewards(11, 4 if credit == "gain" else 3, 1, 2), ids(2, 6, 3)
    values = values[:, -1:] if credit == "terminal" else values
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    got = advantages(values, groups, credit, scale=scale)
    assert got.shape == (11, 3, 1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(advantages(values[order], groups[order], credit, scale=scale), got[order])


def levels_of(num_steps):
    """N + 1 levels from 1 to 0."""
    return torch.linspace(1, 0, num_steps + 1)


def analytic_advantages(num_steps, trace, discount, at):
    """Of an analytic flow's value: a clean estimate whose reward, less the group's, moves as V(s) = cos(3 s) + s^2."""
    levels = levels_of(num_steps)
    values = (torch.cos(3 * levels) + levels**2).reshape(1, -1, 1)
    advantage = trace_advantages(values, levels, trace, discount)[0, :, 0]
    return advantage[(levels[:-1, None] - torch.tensor(at)).abs().argmin(0)]


@pytest.mark.parametrize(("trace", "discount"), [(0.0, 0.0), (2.0, 0.0), (0.0, 1.5), (1.0, 0.5)])
def test_refining_the_schedule_converges_to_one_advantage_function(trace, discount):
    at = (1.0, 0.75, 0.5, 0.25)
    found = {n: analytic_advantages(n, trace, discount, at) for n in (4, 8, 16, 32, 2048)}
    errors = [(found[n] - found[2048]).abs().max().item() for n in (4, 8, 16, 32)]
    assert all(b <= a + 1e-4 for a, b in zip(errors, errors[1:], strict=False)), "it telescopes where there is no trace"
    assert errors[-1] < 0.15 * errors[0] + 1e-4
    # the limit, by quadrature: the integral of e^{-(trace + discount)(s - u)} (dV - discount V du), u falling from s
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    value, slope = torch.cos(3 * u) + u**2, -3 * torch.sin(3 * u) + 2 * u
    for s, got in zip(at, found[2048].tolist(), strict=True):
        kernel = torch.exp(-(trace + discount) * (s - u)) * (u <= s)
        assert got == pytest.approx((kernel * (-slope - discount * value)).mean().item(), abs=5e-3)


def test_a_factor_a_step_instead_of_a_rate_would_not_converge():
    values = {n: (torch.cos(3 * levels_of(n)) + levels_of(n) ** 2).reshape(1, -1, 1) for n in (8, 32)}
    kept = {n: -math.log(0.9) / levels_of(n).diff().abs()[0].item() for n in values}  # .9 a step, as a rate
    a, b = (trace_advantages(values[n], levels_of(n), kept[n])[0, 0, 0].item() for n in values)
    assert abs(a - b) > 0.1


@pytest.mark.parametrize("discount", [0.0, 0.7])
def test_without_a_trace_it_telescopes(discount):
    levels = torch.tensor([1.0, 0.9, 0.4, 0.3])
    values = random_rewards(5, 4, 2)
    got = trace_advantages(values, levels, 0.0, discount)
    expected = values[:, 3:] * torch.exp(-discount * (levels[:-1] - levels[-1]))[None, :, None] - values[:, :-1]
    torch.testing.assert_close(got, expected)


def test_a_fast_trace_is_the_increment_alone():
    levels, values = torch.tensor([1.0, 0.75, 0.5]), random_rewards(5, 3, 1)
    torch.testing.assert_close(trace_advantages(values, levels, 1e4), values.diff(dim=1))


def test_trace_by_hand():
    # levels 1, .5, .25; V 1, 3, 4; trace ln 2 / .25: half is left after .25, a quarter after .5
    got = trace_advantages(
        torch.tensor([1.0, 3.0, 4.0]).reshape(1, 3, 1), torch.tensor([1.0, 0.5, 0.25]), math.log(2) / 0.25
    )
    torch.testing.assert_close(got.flatten(), torch.tensor([2 + 0.25 * 1, 1.0]))


def test_the_trace_credit_scores_one_step_more_and_is_normalised():
    credit = Credit(TraceCredit(trace=1.0))
    assert credit.scored_steps(range(1, 4), 4) == range(0, 4)
    values, group_ids, levels = random_rewards(8, 4), ids(4, 4), torch.tensor([1.0, 0.75, 0.5, 0.25])
    got = Advantages(credit)(table(values), group_ids, ["p"] * 8, 3, levels).advantages
    expected = normalize_groups(trace_advantages(values[..., None], levels, 1.0), group_ids)
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="needs the levels"):
        credit(values[..., None], 3, lambda v: v)


def test_terminal_credit_scores_the_image_that_is_returned_even_if_only_early_steps_train():
    assert Credit(CREDITS["terminal"]()).scored_steps(range(1, 4), 10) == range(9, 10)
    assert Credit().scored_steps(range(1, 4), 10) == range(1, 4)


def test_unequal_groups_are_each_normalised_exactly():
    sizes = (2, 7, 3, 12)
    values, group_ids = random_rewards(sum(sizes), 3), ids(*sizes)
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(3))
    got = torch.empty_like(values)
    got[shuffled] = normalize_groups(values[shuffled], group_ids[shuffled])
    for group in range(4):
        mine = values[group_ids == group]
        torch.testing.assert_close(got[group_ids == group], (mine - mine.mean(0)) / (mine.std(0) + EPS))


def test_a_prompt_with_a_single_image_takes_its_expected_reward_as_baseline():
    values, group_ids = torch.tensor([[0.9], [0.2], [0.4], [0.6], [0.7]]), torch.tensor([0, 1, 1, 1, 2])
    known = {"a": 0.5, "b": 9.0, "c": NAN}
    prompts = ["a", "b", "b", "b", "c"]

    def baseline(asked):
        return torch.tensor([[known[p]] for p in asked])

    got = Advantages(Credit(), baseline=baseline)(table(values), group_ids, prompts, 1).advantages[:, 0, 0]
    deviation = 0.2  # of .2 .4 .6, the one group that has one
    expected = torch.tensor([(0.9 - 0.5) / deviation, -1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)  # "c" was never seen: no score
    alone = Advantages(Credit())(table(values), group_ids, prompts, 1).advantages[:, 0, 0]
    assert alone[0] == 0, "without a tracker a single image says nothing"


def test_a_single_image_with_a_baseline_does_not_widen_the_batchs_deviation():
    values, group_ids = 20 + random_rewards(9, 1), ids(4, 4, 1)

    def baseline(asked):
        return torch.full((len(asked), 1), 20.0)

    prompts = ["a"] * 4 + ["b"] * 4 + ["c"]
    got = Advantages(Credit(), scale="batch", baseline=baseline)(table(values), group_ids, prompts, 1).advantages[
        :, 0, 0
    ]
    without = Advantages(Credit(), scale="batch")(table(values[:8]), group_ids[:8], prompts[:8], 1).advantages[:, 0, 0]
    torch.testing.assert_close(got[:8], without, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[8], (values[8, 0] - 20) / (values[:8].std() + EPS), rtol=1e-3, atol=1e-4)
    alone = Advantages(Credit(), scale="batch", baseline=baseline)(
        table(values[:2]), ids(1, 1), ["a", "b"], 1
    ).advantages
    torch.testing.assert_close(alone[:, 0, 0], values[:2, 0] - 20, rtol=1e-3, atol=1e-4)  # no deviation is known


def test_tracker_counts_all_of_an_epoch_that_is_larger_than_its_buffer():
    values = torch.arange(48, dtype=torch.float32).reshape(48, 1, 1)
    tracker = PerPromptStatTracker(buffer_size=16, min_count=16)
    got = tracker.update(["a"] * 48, values).flatten()
    torch.testing.assert_close(got, (values.flatten() - 23.5) / (values.std() + EPS))
    tracker.update(["a"], torch.zeros(1, 1, 1))
    assert len(tracker.stats["a"]) == 16, "and then its own size again"
