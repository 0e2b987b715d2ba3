import pytest
import torch

from trl_tafs.method.allocation import (
    FixedGroups,
    PromptTracker,
    StreamingGroups,
    VarianceGroups,
    neyman_allocation,
    optimistic_deviations,
)


def test_images_are_shared_in_proportion_to_the_deviations():
    assert neyman_allocation([1.0, 2.0, 3.0], 60, 2, 60) == [10, 20, 30]
    assert neyman_allocation([0.0, 0.0, 0.0], 30, 2, 60) == [10, 10, 10], "nothing varies: alike"


def test_where_a_bound_binds_the_others_share_the_rest():
    assert neyman_allocation([0.0, 1.0, 3.0], 42, 2, 48) == [2, 10, 30]
    assert neyman_allocation([0.0, 0.0, 1.0], 40, 2, 20) == [10, 10, 20], "what is left goes to those that don't vary"


@pytest.mark.parametrize("seed", range(8))
def test_an_allocation_is_whole_within_its_bounds_and_spends_the_budget(seed):
    generator = torch.Generator().manual_seed(seed)
    deviations = torch.rand(17, generator=generator).square() * (torch.rand(17, generator=generator) > 0.3)
    sizes = neyman_allocation(deviations.tolist(), 17 * 12, 3, 40)
    assert sum(sizes) == 17 * 12 and all(isinstance(n, int) and 3 <= n <= 40 for n in sizes)
    order = deviations.argsort()
    ranked = [sizes[i] for i in order.tolist()]
    assert all(b >= a - 1 for a, b in zip(ranked, ranked[1:], strict=False)), "who varies more gets no less"


def test_neyman_minimises_the_variance_of_the_mean_over_prompts():
    deviations, total = [0.1, 0.5, 0.9, 0.2], 40
    sizes = neyman_allocation(deviations, total, 1, total)

    def variance(counts):
        return sum(d**2 / n for d, n in zip(deviations, counts, strict=True))

    assert variance(sizes) < variance([10] * 4)
    for i in range(4):  # no single image is better elsewhere
        for j in range(4):
            if i != j and sizes[i] > 1:
                moved = [n - (k == i) + (k == j) for k, n in enumerate(sizes)]
                assert variance(sizes) <= variance(moved) + 1e-4


@pytest.mark.parametrize(("total", "low", "high"), [(5, 2, 10), (100, 2, 10)])
def test_a_budget_outside_the_bounds_is_an_error(total, low, high):
    with pytest.raises(ValueError, match=f"4 prompts of {low} to {high} images can't make {total}"):
        neyman_allocation([1.0] * 4, total, low, high)


def seen(tracker, prompt, values, epoch=0):
    values = torch.tensor(values).reshape(len(values), -1)
    tracker.update([prompt] * len(values), values, epoch)


def test_one_epoch_is_its_mean_and_variance():
    tracker = PromptTracker(2)
    seen(tracker, "a", [[1.0, 10.0], [3.0, 10.0], [5.0, 40.0]])
    assert tracker.means(["a", "b"])[0].tolist() == [3.0, 20.0]
    assert tracker.means(["b"]).isnan().all()
    deviation, evidence = tracker.deviations(["a", "b"], 0)
    assert deviation[0].item() == pytest.approx(300**0.5) and deviation[1].isnan(), "at the last scored step"
    assert evidence.tolist() == [3.0, 0.0]


def test_what_was_seen_fades_and_progress_is_no_spread():
    tracker = PromptTracker(1, memory=0.5)
    seen(tracker, "a", [0.0, 1.0], epoch=0)
    seen(tracker, "a", [10.0, 11.0], epoch=1)
    # weights .5 * 2 and 2: mean (1 * .5 + 2 * 10.5) / 3; the variance within each epoch is .5
    assert tracker.means(["a"]).item() == pytest.approx((0.5 + 21) / 3)
    assert tracker.deviations(["a"], 1)[0].item() == pytest.approx(0.5**0.5)
    assert tracker.deviations(["a"], 3)[1].item() == pytest.approx(3 * 0.25)


def test_a_single_image_deviates_from_what_was_known():
    tracker = PromptTracker(1, memory=1.0)
    seen(tracker, "a", [0.0])
    assert tracker.deviations(["a"], 0)[0].isnan(), "one image has no deviation"
    seen(tracker, "a", [2.0], epoch=1)
    assert tracker.deviations(["a"], 1)[0].item() == pytest.approx(2.0)
    assert tracker.means(["a"]).item() == pytest.approx(1.0)


def test_no_score_is_no_evidence():
    tracker = PromptTracker(1)
    seen(tracker, "a", [1.0, float("nan"), 3.0])
    assert tracker.means(["a"]).item() == 2.0
    seen(tracker, "b", [float("nan")])
    assert len(tracker) == 1


def test_memory_is_bounded_and_the_prompt_seen_longest_ago_goes():
    tracker = PromptTracker(1, capacity=3)
    for epoch, prompt in enumerate(["a", "b", "c", "a", "d"]):
        seen(tracker, prompt, [float(epoch), float(epoch)], epoch)
    assert len(tracker) == 3 and len(tracker.weight) <= 3
    assert tracker.means(["b"]).isnan().all()
    assert tracker.means(["a", "c", "d"]).flatten().tolist() == pytest.approx(
        [(0.729 * 0 * 2 + 6) / (2 * 0.729 + 2), 2, 4]
    )
    big = PromptTracker(3)
    big.update([f"prompt {i // 2}" for i in range(6000)], torch.rand(6000, 3), 0)
    assert len(big) == 3000 and len(big.weight) == 4096


def test_the_trackers_state_goes_round():
    tracker = PromptTracker(1, capacity=3)
    for epoch, prompt in enumerate(["a", "b", "c", "a", "d"]):
        seen(tracker, prompt, [float(epoch), 1.0], epoch)
    other = PromptTracker(1, capacity=3)
    other.load_state_dict(tracker.state_dict())
    for t in (tracker, other):
        seen(t, "e", [5.0, 6.0], 5)  # the same one goes
        seen(t, "a", [5.0, 7.0], 6)
    prompts = ["a", "b", "c", "d", "e"]
    assert torch.equal(tracker.means(prompts).nan_to_num(-1), other.means(prompts).nan_to_num(-1))
    assert torch.equal(tracker.deviations(prompts, 7)[1], other.deviations(prompts, 7)[1])


def test_optimism_decays_with_what_is_seen_and_comes_back_as_it_ages():
    deviation, optimism = torch.tensor([0.0, 1.0, float("nan")]), 0.5
    fresh = optimistic_deviations(deviation, torch.tensor([8.0, 8.0, 0.0]), optimism)
    aged = optimistic_deviations(deviation, torch.tensor([1.0, 8.0, 0.0]), optimism)
    assert fresh[0].item() == pytest.approx(0.5 * 0.5 / 3) and aged[0] > fresh[0] and aged[1] == fresh[1]
    assert fresh[2].isnan()


def test_prompts_never_seen_get_the_default_and_those_that_do_not_vary_the_least():
    groups = VarianceGroups(PromptTracker(1), group_size=8, low=2, high=20, optimism=0.0)
    prompts = ["solved", "open", "new", "hopeless"]
    assert groups.first(prompts, 0) == [8] * 4
    rewards = {"solved": [1.0, 1.0], "open": [0.0, 1.0], "hopeless": [0.0, 0.0]}
    for prompt, values in rewards.items():
        groups.update([prompt] * 2, torch.tensor(values)[:, None], 0)
    assert groups.first(prompts, 1) == [2, 20, 8, 2]
    assert sum(groups.first(prompts, 1)) == 32
    assert groups.rest(torch.zeros(4), torch.arange(4)) is None


def test_a_prompt_that_stopped_varying_comes_back_into_play():
    groups = VarianceGroups(PromptTracker(1, memory=0.8), group_size=8, low=2, high=20, optimism=1.0)
    for prompt, values in {"solved": [1.0] * 20, "open": [0.0, 1.0] * 10}.items():
        groups.update([prompt] * 20, torch.tensor(values)[:, None], 0)
    sizes = [groups.first(["solved", "open"], epoch)[0] for epoch in (1, 10, 30)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    for epoch in range(31, 34):  # the policy has changed: its few images vary now
        groups.update(["solved"] * 2, torch.tensor([[0.0], [1.0]]), epoch)
    assert groups.first(["solved", "open"], 34)[0] >= 7


def test_streaming_spends_the_rest_where_the_first_draws_varied():
    groups = StreamingGroups(PromptTracker(1), group_size=8, low=4, high=16, optimism=0.0)
    assert groups.first(["a", "b", "c"], 0) == [4, 4, 4]
    values = torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 1, 0.5, 0.5, 0.5, 0.5])
    assert groups.rest(values, torch.arange(3).repeat_interleave(4)) == [0, 12, 0]
    assert FixedGroups(8).first(["a", "b"], 3) == [8, 8]
