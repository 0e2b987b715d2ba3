"""What a configuration's parts come to together: allocation, credit and what is learned from epoch to epoch."""

import pytest
import torch

from trl_tafs import TAFSGRPOConfig
from trl_tafs.algorithm import build_algorithm
from trl_tafs.method.allocation import GroupBounds
from trl_tafs.method.levels import uniform_levels, with_zero
from trl_tafs.method.superflow import SuperFlowGroups
from trl_tafs.method.types import PromptBatch, RewardTable

SUPERFLOW = {"objective": "clipped", "group_allocation": "superflow", "step_credit": "terminal"}
SUPERFLOW |= {"scale_rewards": "batch"}


def algorithm(**options):
    levels = with_zero(uniform_levels(4))
    return build_algorithm(TAFSGRPOConfig(**options), GroupBounds(4, 2, 8), levels, (4, 8, 8))


def drawn(sizes):
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    prompts = tuple("abcdef"[g] for g in groups.tolist())
    return PromptBatch(prompts, ({},) * len(prompts), groups, torch.arange(len(prompts)))


def table(values):
    return RewardTable(torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1), ("reward",), torch.ones(1))


def test_prompts_are_averaged_where_it_is_asked_for():
    batch, rewards = drawn([6, 2]), table(torch.rand(8))
    options = {"objective": "clipped", "group_allocation": "variance", "step_credit": "terminal"}
    images, prompts = (
        algorithm(**options, group_averaging=what).credit(rewards, batch, 0).advantages
        for what in ("images", "prompts")
    )
    assert images.shape == prompts.shape == (8, 3, 1)
    torch.testing.assert_close(prompts[:6], images[:6] * 4 / 6)
    torch.testing.assert_close(prompts[6:], images[6:] * 4 / 2)


def test_superflows_tracker_is_the_baseline_and_learns_after_the_credit():
    made, batch = algorithm(**SUPERFLOW), drawn([3, 3])
    assert isinstance(made.groups, SuperFlowGroups) and made.states() == {"prompt_tracker": made.prompt_tracker}
    credit = made.credit(table([1, 1, 1, 0, 0, 0]), batch, 0)
    assert (credit.advantages[:3] > 0).all() and (credit.advantages[3:] < 0).all(), "groups without variance teach"
    assert len(made.prompt_tracker) == 0
    made.groups.update(batch.prompts, credit.combined.mean(2), 0)
    later = made.credit(table([1, 1, 1, 0, 0, 0]), batch, 1)
    assert made.groups.belief.expected(["a", "b"]).tolist() == pytest.approx([0.8, 0.2])  # (3 + 1) / 5, (0 + 1) / 5
    plain = algorithm(**SUPERFLOW | {"scale_rewards": "none"})
    plain.groups.update(batch.prompts, credit.combined.mean(2), 0)
    expected = torch.tensor([0.2] * 3 + [-0.2] * 3)[:, None, None].expand(6, 3, 1)
    torch.testing.assert_close(plain.credit(table([1, 1, 1, 0, 0, 0]), batch, 1).advantages, expected)
    assert later.advantages.abs().max() <= 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale_rewards": "group"}, "scale_rewards='group' has no effect; use scale_rewards='batch'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "use multi_objective_aggregation='sum_then_normalize'"),
    ],
)
def test_what_superflow_replaces_is_an_error(options, said):
    with pytest.raises(ValueError, match=said):
        TAFSGRPOConfig(**SUPERFLOW | options)
