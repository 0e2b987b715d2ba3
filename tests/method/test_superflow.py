"""SuperFlow: the Beta tracker, its weights and bins, the tracker as the baseline."""

import math

import pytest
import torch

from trl_tafs.method.allocation import PromptTracker, images_of_equal_prompts
from trl_tafs.method.options import MethodOptions
from trl_tafs.method.superflow import WEIGHT_FLOOR, BetaBelief, ExpectedBaseline, SuperFlowGroups, binned_sizes

SUPERFLOW = {"objective": "clipped", "group_allocation": "superflow", "step_credit": "terminal"}


def belief(memory=0.5, reward_range=None):
    return BetaBelief(PromptTracker(1, memory), reward_range)


def seen(groups, prompt, rewards, epoch):
    groups.update([prompt] * len(rewards), torch.tensor(rewards)[:, None], epoch)


def test_alpha_and_beta_are_faded_sums_of_success_and_failure():
    groups, alpha, beta = SuperFlowGroups(belief(0.5), 8), 0.0, 0.0
    for epoch, rewards in enumerate([[1.0, 0.0, 1.0], [0.25, 0.5], [1.0]]):
        alpha, beta = 0.5 * alpha + sum(rewards), 0.5 * beta + sum(1 - r for r in rewards)
        seen(groups, "a", rewards, epoch)
        u = (alpha + 1) / (alpha + beta + 2)  # a success and a failure that don't fade
        expected, weight = groups.belief.expected(["a", "new"]), groups.weights(["a", "new"])
        assert expected.tolist() == pytest.approx([u, 0.5])
        assert weight.tolist() == pytest.approx([math.sqrt(u * (1 - u) + WEIGHT_FLOOR), math.sqrt(0.25 + WEIGHT_FLOOR)])


def test_epochs_in_which_a_prompt_was_not_drawn_fade_it_too():
    groups = SuperFlowGroups(belief(0.5), 8)
    seen(groups, "a", [1.0] * 4, 0)
    seen(groups, "a", [0.0], 3)
    assert groups.belief.expected(["a"]).item() == pytest.approx((0.5**3 * 4 + 1) / (0.5**3 * 4 + 1 + 2))


def test_what_is_mastered_or_hopeless_weighs_less_than_what_is_open_and_never_nothing():
    groups = SuperFlowGroups(belief(1.0), 8)
    for prompt, rewards in {"mastered": [1.0] * 500, "hopeless": [0.0] * 500, "open": [0.0, 1.0] * 250}.items():
        seen(groups, prompt, rewards, 0)
    mastered, hopeless, contested, new = groups.weights(["mastered", "hopeless", "open", "new"]).tolist()
    assert mastered == pytest.approx(hopeless) and 0.1 <= mastered < 0.12
    assert contested == pytest.approx(new, abs=1e-3) and contested > 4 * mastered


def test_bins_are_an_image_apart_the_largest_weights_first_and_spend_the_budget():
    # 24, 23, 22, 21 of the notes, for a mean of 22.5: with 8 prompts 22 each make the same four sizes, shifted
    weights = torch.tensor([0.1, 0.8, 0.3, 0.6, 0.2, 0.7, 0.4, 0.5])
    sizes = binned_sizes(weights, 22, 4)
    assert sum(sizes) == 8 * 22
    by_weight = [sizes[i] for i in weights.argsort(descending=True).tolist()]
    assert by_weight == [24, 24, 23, 23, 21, 21, 20, 20]  # 23, 23, 22, 22, 21, 21, 20, 20 and the four that are left
    assert binned_sizes(weights, 22, 1) == [22] * 8
    assert binned_sizes(torch.ones(3), 10, 3) == [11, 10, 9]


@pytest.mark.parametrize(("count", "mean", "bins"), [(1, 5, 4), (2, 5, 4), (5, 24, 4), (7, 9, 9), (100, 6, 3)])
def test_sizes_add_up_and_stay_near_the_mean(count, mean, bins):
    weights = torch.rand(count, generator=torch.Generator().manual_seed(count))
    sizes = torch.tensor(binned_sizes(weights, mean, bins))
    assert sizes.sum() == count * mean
    assert sizes.min() >= mean - bins + 1 and sizes.max() <= mean + bins
    assert (sizes[weights.argsort(descending=True)].diff() <= 0).all()


# The baseline ---------------------------------------------------------------------------------------------------


def rewards_of(*groups):
    return torch.tensor([r for group in groups for r in group])[:, None, None]


def test_every_image_is_compared_with_what_was_expected_of_its_prompt_and_scaled_by_the_batch():
    groups = SuperFlowGroups(belief(1.0), 4)
    seen(groups, "a", [1.0, 1.0, 1.0, 1.0], 0)  # u = 5/6
    prompts, values = ["a"] * 3 + ["b"] * 3, rewards_of([1.0, 0.0, 0.5], [1.0, 1.0, 1.0])
    residual = values.flatten() - torch.tensor([5 / 6] * 3 + [0.5] * 3)
    plain = ExpectedBaseline(groups.belief, "none").update(prompts, values)
    torch.testing.assert_close(plain.flatten(), residual)
    scaled = ExpectedBaseline(groups.belief).update(prompts, values)
    torch.testing.assert_close(scaled.flatten(), (residual - residual.mean()) / (residual.std() + 1e-4))


def test_a_group_without_variance_teaches():
    prompts, values = ["a"] * 3 + ["b"] * 3, rewards_of([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    advantages = ExpectedBaseline(belief()).update(prompts, values).flatten()
    assert (advantages[:3] > 0.5).all() and (advantages[3:] < -0.5).all()


def test_without_a_score_there_is_no_advantage_and_no_evidence():
    groups = SuperFlowGroups(belief(), 3)
    nan = float("nan")
    values = rewards_of([1.0, nan, 0.0])
    got = ExpectedBaseline(groups.belief, "none").update(["a"] * 3, values).flatten()
    assert got[1].isnan() and got[[0, 2]].tolist() == [0.5, -0.5]
    seen(groups, "a", [1.0, nan], 0)
    assert groups.belief.expected(["a"]).item() == pytest.approx(2 / 3)


def test_rewards_outside_0_and_1_need_a_range():
    values = torch.tensor([0.5, -0.25, 26.0, float("nan")])[:, None, None]
    with pytest.raises(ValueError, match=r"2 of 3 rewards lie outside \[0, 1\], from -0.25 to 26; .* reward_range="):
        ExpectedBaseline(belief()).update(["a"] * 4, values)
    unit = belief(reward_range=(-0.5, 1.5)).unit(values).flatten()
    assert unit[:3].tolist() == [0.5, 0.125, 1.0] and unit[3].isnan()
    assert belief().unit(torch.tensor([0.0, 1.0, 1.0 + 1e-7])).shape == (3,), "up to rounding"


def test_the_tracker_is_of_the_range_as_well():
    groups = SuperFlowGroups(belief(reward_range=(0.0, 20.0)), 4)
    seen(groups, "a", [20.0, 10.0], 0)
    assert groups.belief.expected(["a"]).item() == pytest.approx(2.5 / 4)


# Prompts or images averaged -------------------------------------------------------------------------------------


def test_images_weighted_by_one_over_their_groups_size_average_over_prompts():
    ids, values = torch.tensor([0] * 6 + [1] * 2 + [2]), torch.rand(9)
    weights = images_of_equal_prompts(ids)
    by_prompt = torch.stack([values[ids == p].mean() for p in range(3)]).mean()
    torch.testing.assert_close((weights * values).mean(), by_prompt)
    assert torch.equal(images_of_equal_prompts(torch.tensor([0, 0, 1, 1])), torch.ones(4))


def test_neymans_sizes_minimise_the_variance_of_the_mean_over_prompts_and_not_that_over_images():
    # deviations 3 and 1, 8 images, as many prompts of each: 6 and 2 by Neyman, or 4 and 4
    def variance(sizes, weights):  # of sum w_p (mean of prompt p)
        return sum(w**2 * d**2 / n for w, d, n in zip(weights, (3.0, 1.0), sizes, strict=True))

    prompts = [variance(sizes, (0.5, 0.5)) for sizes in ((6, 2), (4, 4))]
    images = [variance(sizes, [n / 8 for n in sizes]) for sizes in ((6, 2), (4, 4))]
    assert prompts[0] < prompts[1] and images[0] > images[1]


# Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step_credit": "step"}, "step_credit='step' scores others; use step_credit='terminal'"),
        ({"num_perturbations": 2}, "a state's own baseline takes all"),
        ({"sample_kernel": "clean"}, "a state's own baseline takes all"),
        ({"per_prompt_stat_tracking": True}, "per_prompt_stat_tracking replaces the groups' statistics"),
        ({"min_generations": 4}, "min_generations and max_generations need group_allocation='variance'"),
        ({"reward_range": [1.0, 0.0]}, r"reward_range is \[1.0, 0.0\]; it must be two numbers"),
        ({"reward_range": [1.0]}, "it must be two numbers"),
        ({"group_allocation": "variance", "group_bins": 3}, "group_bins=3 has no effect with .*'variance'"),
        ({"group_allocation": "fixed", "reward_range": [0.0, 9.0]}, "reward_range=.* has no effect with .*'fixed'"),
        ({"group_allocation": "fixed", "group_averaging": "prompts"}, "group_averaging='prompts' has no effect with"),
        ({"group_averaging": "pixels"}, "group_averaging is 'pixels'"),
    ],
)
def test_what_does_not_go_together_is_an_error(options, said):
    MethodOptions(**SUPERFLOW)
    with pytest.raises(ValueError, match=said):
        MethodOptions(**SUPERFLOW | options)
