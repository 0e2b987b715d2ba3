import pytest
import tiny
import torch

from trl_tafs.output.pictures import sample_grid
from trl_tafs.training import samples

PROMPTS = ["one", "two", "three", "four"]


def test_a_grid_shows_each_prompt_s_clean_estimates_in_the_order_of_the_steps(pipeline, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(samples, "sample_grid", lambda *args: drawn.append(args) or sample_grid(*args))
    trainer = tiny.trainer(pipeline, tmp_path, prompt_function=PROMPTS, num_generations=4, sample_grid_freq=1)
    parts, _ = trainer.collector.sampler.sample(trainer.collector.local_batches(trainer.prompts.batch(0, 4, 4)), 0)
    trainer.viewer.save_grid(parts, tmp_path / "grid.png", "")
    images, rows, columns, _ = drawn[0]
    assert [column[:2] for column in columns] == ["1:", "2:", "3:", "4:"]
    assert list(rows) == [part.prompts.prompts[i] for part in parts for i in (0, 4)]
    expected = torch.stack([part.rollout.clean[i] for part in parts for i in (0, 4)])
    decoded = torch.stack([trainer.collector.sampler.decode(clean) for clean in expected])
    torch.testing.assert_close(images, decoded, atol=1e-5, rtol=0)


def test_a_group_can_share_its_initial_noise(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, prompt_function=PROMPTS, num_generations=4, share_initial_noise=True)
    prompts = trainer.prompts.batch(0, trainer.plan.num_groups, trainer.plan.group_size)
    part = trainer.collector.sampler.roll_out(prompts[:8], 0)
    first = part.rollout.states[:, 0]
    assert torch.equal(first[:4], first[:1].expand_as(first[:4]))
    assert not torch.equal(first[0], first[4])
    assert not torch.equal(part.rollout.states[0, 1], part.rollout.states[1, 1]), "the actions differ"


def test_only_the_final_image_is_scored_where_it_alone_is_matched(pipeline, tmp_path):
    seen = []

    def count(images, prompts, metadata):
        seen.append(len(images))
        return images.mean((1, 2, 3))

    tiny.trainer(pipeline, tmp_path, reward=count, objective="forward", num_epochs=1).train()
    assert seen == [2, 8, 8]  # the preflight, two batches


SUPERFLOW = {"group_allocation": "superflow", "step_credit": "terminal", "scale_rewards": "batch", "group_bins": 2}
SUPERFLOW |= {"num_generations": 4}


def test_superflows_prompts_are_drawn_by_what_the_tracker_knows_and_more_of_the_open_ones(pipeline, tmp_path):
    names = [f"prompt {i}" for i in range(40)]
    trainer = tiny.trainer(pipeline, tmp_path, prompt_function=names, **SUPERFLOW)
    groups, collector = trainer.algorithm.groups, trainer.collector
    groups.update(names[:20] * 50, torch.ones(1000, 1), 0)  # mastered: a third of the others' weight
    drawn = [prompt for epoch in range(100) for prompt, _ in collector.draw_prompts(epoch)]
    assert 0.12 < sum(prompt in names[:20] for prompt in drawn) / 400 < 0.28
    assert collector.draw_prompts(3) == trainer.prompts.by_weight(3, 4, groups.weights)
    experience = collector.collect(0, 0)
    sizes = torch.bincount(experience.prompts.group_ids)
    weights = groups.weights([prompt for prompt, _ in collector.draw_prompts(0)])
    assert sizes.sum() == 16 and sizes[weights.argmax()] == 5 and sizes[weights.argmin()] == 3
    trainer.step(0, 0)
    assert len(trainer.algorithm.prompt_tracker) > 20


def test_superflow_says_at_once_that_a_function_of_prompts_will_not_do(pipeline, tmp_path):
    with pytest.raises(ValueError, match="'superflow' draws prompts by weight from a fixed set"):
        tiny.trainer(pipeline, tmp_path, **SUPERFLOW)
