"""What an epoch's update does with its rows: prompts, noise, shuffles, averages, gradients; and what is logged."""

import dataclasses
import json

import pytest
import tiny
import torch

from trl_tafs.policy.lora import adapter_state_dict

PROMPTS = ["one", "two", "three", "four"]


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lora(trainer):
    return adapter_state_dict(trainer.sd_pipeline.denoiser, trainer.policy.adapter_name)


def test_every_row_is_replayed_with_its_own_prompt(pipeline, tmp_path):
    tiny.trainer(
        pipeline, tmp_path, prompt_function=PROMPTS, num_generations=4, num_epochs=2, train_learning_rate=1e-2
    ).train()
    assert max(line["ratio_deviation"] for line in log(tmp_path) if "loss" in line) < 1e-5


def test_noise_and_shuffle_change_with_the_epoch(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path)
    batch = trainer.prompts.batch(0, 2, 8)[:8]
    parts = [trainer.collector.sampler.roll_out(batch, epoch) for epoch in (0, 1)]
    assert not torch.equal(parts[0].rollout.states[:, 0], parts[1].rollout.states[:, 0])
    whole = trainer.collector.sampler.roll_out(trainer.prompts.batch(0, 2, 8), 0)
    rows = trainer.algorithm.objective.items(whole.rollout, torch.ones(16, 3, 1))
    batches = [trainer.updater.micro_batches(rows, *key) for key in ((0, 0), (1, 0), (0, 1))]
    orders = [torch.cat([index for index, _ in batch]).tolist() for batch in batches]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(48)) for order in orders)


def test_a_fraction_of_the_steps_is_another_one_for_each_image(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, train_timestep_fraction=0.4)
    whole = trainer.collector.sampler.roll_out(trainer.prompts.batch(0, 2, 8), 0)
    rows = trainer.algorithm.objective.items(whole.rollout, torch.ones(16, 3, 1))
    index = torch.cat([i for i, _ in trainer.updater.micro_batches(rows, 0, 0)])
    assert sorted((index // 3).tolist()) == list(range(16))
    assert set((index % 3).tolist()) == {0, 1, 2}


def test_gradients_are_averaged_over_the_micro_batches_and_clipped(pipeline_folder, tmp_path):
    def norms(size, **changes):
        folder = tmp_path / f"{size}-{len(changes)}"
        trainer = tiny.trainer(tiny.load(pipeline_folder), folder, num_epochs=1, train_batch_size=size, **changes)
        seen, step = [], trainer.policy.optimizer.optimizer.step

        def spy(*args, **kwargs):
            seen.append(
                torch.stack([p.grad.norm() for p in trainer.policy.parameters if p.grad is not None]).norm().item()
            )
            return step(*args, **kwargs)

        trainer.policy.optimizer.optimizer.step = spy
        trainer.train()
        line = next(line for line in log(folder) if "loss" in line)
        return line["grad_norm"], seen[0]

    (small, _), (large, _) = norms(4), norms(16)
    assert small == pytest.approx(large, rel=1e-3)
    assert norms(16, train_max_grad_norm=1e-6)[1] == pytest.approx(1e-6, rel=1e-2)


def test_two_trainers_in_one_process_keep_their_own_step_size(pipeline_folder, tmp_path):
    first = tiny.trainer(tiny.load(pipeline_folder), tmp_path / "a", num_epochs=1)
    tiny.trainer(tiny.load(pipeline_folder), tmp_path / "b", train_gradient_accumulation_steps=1)
    first.train()
    assert first.progress.global_step == 1


def test_a_step_whose_gradient_is_not_finite_is_left_out(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=3)
    compute, calls = trainer.compute_loss, []

    def once(rows, conditioning):
        output = compute(rows, conditioning)
        calls.append(trainer.progress.global_step)
        return (
            dataclasses.replace(output, loss=output.loss * float("nan"))
            if trainer.progress.global_step == 1
            else output
        )

    trainer.compute_loss = once
    with pytest.warns(UserWarning, match="norm is nan: this optimizer step is left out"):
        trainer.train()
    assert set(calls) == {0, 1, 2}
    assert all(torch.isfinite(weight).all() for weight in lora(trainer).values())
    norms = [line["grad_norm"] for line in log(tmp_path) if "grad_norm" in line]
    assert len(norms) == 3 and norms[1] is None and norms[2] > 0
