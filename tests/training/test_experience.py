"""An epoch's experience: which of all images are this process's, over one draw and two."""

import torch

from trl_tafs.method.types import PromptBatch, RewardTable
from trl_tafs.training.experience import Draw, Experience


def draw(first, count, rank, world):
    """`count` images of all processes, numbered from `first`; each one's reward is its number."""
    numbers = torch.arange(first, first + count)
    prompts = PromptBatch(tuple(map(str, numbers.tolist())), tuple({} for _ in numbers), numbers // 2, numbers)
    table = RewardTable(numbers.float().reshape(-1, 1, 1, 1), ("number",), torch.ones(1))
    share = count // world
    return Draw(prompts, [], table, torch.arange(rank * share, (rank + 1) * share))


def test_a_process_s_share_is_of_every_draw_in_the_order_of_the_draws():
    experience = Experience.of([draw(0, 4, rank=1, world=2), draw(4, 8, rank=1, world=2)])
    assert experience.prompts.prompts == tuple(map(str, range(12)))
    numbers = experience.rewards.values.flatten()
    assert numbers.tolist() == list(range(12))
    assert experience.local(numbers).tolist() == [2, 3, 8, 9, 10, 11]


def test_the_shares_of_all_processes_are_all_images_once():
    shares = [Experience.of([draw(0, 4, rank, 2), draw(4, 8, rank, 2)]).local_images for rank in (0, 1)]
    assert sorted(torch.cat(shares).tolist()) == list(range(12))
