"""What an epoch's update does with its rows: prompts, noise, shuffles, averages, gradients; and what is logged."""

import dataclasses
import json

import pytest
import tiny
import torch
from PIL import Image

from trl_tafs import hub, policy, report
from trl_tafs.conditioning import PromptEncoder
from trl_tafs.evaluation import EVAL_EPOCH, sample_images
from trl_tafs.metrics import sample_grid, tensor_to_image
from trl_tafs.rollout import SampleNoise

PROMPTS = ["one", "two", "three", "four"]


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lora(trainer):
    return policy.adapter_state_dict(trainer.sd_pipeline.denoiser, trainer.adapter_name)


def test_every_row_is_replayed_with_its_own_prompt(pipeline, tmp_path):
    tiny.trainer(
        pipeline, tmp_path, prompt_function=PROMPTS, num_generations=4, num_epochs=2, train_learning_rate=1e-2
    ).train()
    assert max(line["ratio_deviation"] for line in log(tmp_path) if "loss" in line) < 1e-5


def test_the_encoder_gives_each_prompt_its_own_row_and_forgets_the_oldest(pipeline):
    encode = PromptEncoder(pipeline, torch.device("cpu"), guidance_scale=2.0, negative_prompt="six", cache_size=2)
    rows = encode(["one", "two", "one", "three"])
    for i, prompt in enumerate(["one", "two", "one", "three"]):
        own = pipeline.encode_conditioning([prompt], guidance_scale=2.0, negative_prompts="six")
        assert torch.equal(rows.positive.text[i], own.positive.text[0])
        assert torch.equal(rows.negative.text[i], own.negative.text[0])
    assert list(encode.cache) == ["two", "three"]


def test_all_prompts_are_read_before_training_only_for_a_folder(pipeline_folder, tmp_path):
    reads = []

    class Rows(list):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    for name, changes in (("plain", {}), ("kept", {"prompt_cache_dir": str(tmp_path / "prompts")})):
        trainer = tiny.trainer(tiny.load(pipeline_folder), tmp_path / name, prompt_function=Rows(PROMPTS), **changes)
        reads.clear()
        trainer._preflight()
        assert len(reads) == (1 if name == "plain" else 1 + len(PROMPTS))
    assert len(list((tmp_path / "prompts").rglob("*.safetensors"))) == len(PROMPTS)


def test_the_encoder_forgets_by_weight_too(pipeline):
    encode = PromptEncoder(pipeline, torch.device("cpu"))
    one = encode(["one"])
    weight = sum(value.numel() * value.element_size() for value in vars(one.positive).values() if value is not None)
    bounded = PromptEncoder(pipeline, torch.device("cpu"), cache_bytes=2 * weight)
    assert len(bounded(["one", "two", "three"])) == 3 and list(bounded.cache) == ["two", "three"]
    none = PromptEncoder(pipeline, torch.device("cpu"), cache_bytes=0)
    assert torch.equal(none(["one"]).positive.text, one.positive.text) and not none.cache


def test_the_average_is_what_is_evaluated_saved_and_kept_as_best(pipeline, tmp_path):
    seen = []

    def judge(images, prompts, metadata):
        seen.append(images)
        return images.mean((1, 2, 3)) + len(seen)  # the last one is the best

    trainer = tiny.trainer(
        pipeline,
        tmp_path,
        num_epochs=3,
        train_use_ema=True,
        train_learning_rate=1e-2,
        eval_freq=3,
        eval_prompts=["three"],
        eval_num_steps=[2],
        eval_samplers=["ode"],
        eval_reward_function={"judge": judge},
        metric_for_best_model="eval/ode_2/judge",
    )
    trainer.train()
    live = lora(trainer)
    with trainer.averaged_adapter():
        average = lora(trainer)
        images = sample_images(
            pipeline, trainer.encode, trainer.velocity, trainer.setting(), ["three"], [0], sampler="ode", num_steps=2
        )
    assert any(not torch.equal(average[k], live[k]) for k in live)
    assert any(average[k].abs().sum() > 0 for k in live if "lora_B" in k), "it follows the policy"
    assert torch.equal(seen[-1], images)
    for folder in ("adapter", "best"):
        saved, _ = hub.read_adapter(tmp_path / folder)
        assert all(torch.equal(saved[k], average[k]) for k in saved), folder
    assert all(torch.equal(lora(trainer)[k], live[k]) for k in live), "the policy is put back"


def test_the_learning_rate_follows_its_schedule(pipeline, tmp_path):
    tiny.trainer(pipeline, tmp_path, num_epochs=4, train_lr_scheduler_type="linear").train()
    rates = [line["learning_rate"] for line in log(tmp_path) if "loss" in line]
    assert rates == pytest.approx([2.25e-4, 1.5e-4, 0.75e-4, 0.0])


def test_noise_and_shuffle_change_with_the_epoch(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path)
    batch = trainer.prompts.batch(0, 2, 8)[:8]
    parts = [trainer.collector.roll_out(batch, 1, epoch) for epoch in (0, 1)]
    assert not torch.equal(parts[0].rollout.states[:, 0], parts[1].rollout.states[:, 0])
    whole = trainer.collector.roll_out(trainer.prompts.batch(0, 2, 8), 1, 0)
    rows = trainer.objective.rows(whole.rollout, torch.ones(16, 3, 1))
    batches = [trainer.updater.micro_batches(rows, *key) for key in ((0, 0), (1, 0), (0, 1))]
    orders = [torch.cat([index for index, _ in batch]).tolist() for batch in batches]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(48)) for order in orders)


def test_a_fraction_of_the_steps_is_another_one_for_each_image(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, train_timestep_fraction=0.4)
    whole = trainer.collector.roll_out(trainer.prompts.batch(0, 2, 8), 1, 0)
    rows = trainer.objective.rows(whole.rollout, torch.ones(16, 3, 1))
    index = torch.cat([i for i, _ in trainer.updater.micro_batches(rows, 0, 0)])
    assert sorted((index // 3).tolist()) == list(range(16))
    assert set((index % 3).tolist()) == {0, 1, 2}


def test_gradients_are_averaged_over_the_micro_batches_and_clipped(pipeline_folder, tmp_path):
    def norms(size, **changes):
        folder = tmp_path / f"{size}-{len(changes)}"
        trainer = tiny.trainer(tiny.load(pipeline_folder), folder, num_epochs=1, train_batch_size=size, **changes)
        seen, step = [], trainer.optimizer.optimizer.step

        def spy(*args, **kwargs):
            seen.append(torch.stack([p.grad.norm() for p in trainer.parameters if p.grad is not None]).norm().item())
            return step(*args, **kwargs)

        trainer.optimizer.optimizer.step = spy
        trainer.train()
        line = next(line for line in log(folder) if "loss" in line)
        return line["grad_norm"], seen[0]

    (small, _), (large, _) = norms(4), norms(16)
    assert small == pytest.approx(large, rel=1e-3)
    assert norms(16, train_max_grad_norm=1e-6)[1] == pytest.approx(1e-6, rel=1e-2)


def test_rewards_are_logged_by_name_and_step(pipeline, tmp_path):
    calls = []

    def by_step(images, prompts, metadata):  # a call a scored step, three a batch, in order
        if len(images) == 2:  # the preflight
            return [0.0, 0.0]
        part, step = divmod(len(calls) - 1, 3)
        return [float(step) + 10 * i + 100 * part for i in range(len(images))]

    def constant(images, prompts, metadata):
        if len(images) > 2:
            calls.append(len(images))
        return [5.0] * len(images)

    seen = []
    rewards = {"constant": constant, "by_step": by_step}
    tiny.trainer(pipeline, tmp_path, rewards, hook=lambda rows, *rest: seen.extend(rows), num_epochs=1).train()
    line = next(line for line in log(tmp_path) if "reward" in line)
    assert line["rewards/constant/mean"] == 5 and line["rewards/by_step/mean"] == pytest.approx(2 + 35 + 50)
    steps = [line[f"reward/step_{n}"] for n in (2, 3, 4)]
    assert [s - steps[0] for s in steps] == pytest.approx([0, 1, 2])
    for part, row in enumerate(seen):
        assert row[3].tolist() == [5 + 2 + 10 * i + 100 * part for i in range(8)]


def test_a_smaller_metric_can_be_the_better_one(pipeline, tmp_path):
    values = iter([9.0, 0.5, 0.4, 0.3, 0.6])  # the first is the preflight's
    trainer = tiny.trainer(
        pipeline,
        tmp_path,
        num_epochs=3,
        eval_freq=1,
        eval_num_steps=[2],
        eval_samplers=["annealed"],
        eval_prompts=["three"],
        eval_reward_function={"judge": lambda images, p, m: [next(values)] * len(images)},
        metric_for_best_model="eval/annealed_2/judge",
        greater_is_better=False,
    )
    trainer.train()
    best = json.loads((tmp_path / "best" / "best.json").read_text())
    assert best["epoch"] == 2 and best["value"] == pytest.approx(0.3)


def test_evaluation_has_noise_of_its_own():
    own, first = (SampleNoise(0, epoch, (0, 1))("initial", 0, (8,)) for epoch in (EVAL_EPOCH, 0))
    assert not torch.equal(own, first)


def test_two_trainers_in_one_process_keep_their_own_step_size(pipeline_folder, tmp_path):
    first = tiny.trainer(tiny.load(pipeline_folder), tmp_path / "a", num_epochs=1)
    tiny.trainer(tiny.load(pipeline_folder), tmp_path / "b", train_gradient_accumulation_steps=1)
    first.train()
    assert first.global_step == 1


def test_a_reward_without_any_verdict_is_named(pipeline, tmp_path):
    rewards = {"bright": tiny.brightness, "silent": lambda images, p, m: [None] * len(p)}
    with pytest.warns(UserWarning, match="silent gave no verdict for any image"):
        tiny.trainer(pipeline, tmp_path, rewards, num_epochs=1).train()


def test_a_grid_shows_each_prompt_s_clean_estimates_in_the_order_of_the_steps(pipeline, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "sample_grid", lambda *args: drawn.append(args) or sample_grid(*args))
    trainer = tiny.trainer(pipeline, tmp_path, prompt_function=PROMPTS, num_generations=4, sample_grid_freq=1)
    parts, _ = trainer.collector.collect(trainer._batches(trainer.prompts.batch(0, 4, 4)), 1, 0)
    trainer.report.save_grid(parts, 0)
    images, rows, columns, _ = drawn[0]
    assert [column[:2] for column in columns] == ["1:", "2:", "3:", "4:"]
    assert list(rows) == [part.batch.prompts[i] for part in parts for i in (0, 4)]
    expected = torch.stack([part.rollout.clean[i] for part in parts for i in (0, 4)])
    decoded = torch.stack([trainer.collector.decode(clean) for clean in expected])
    torch.testing.assert_close(images, decoded, atol=1e-5, rtol=0)


def test_the_card_s_pictures_are_the_base_s_and_the_policy_s(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, prompt_function=PROMPTS, num_epochs=3, train_learning_rate=3e-2)
    trainer.train()
    prompts = trainer.report.card_prompts()
    base, policy_ = (
        sample_images(pipeline, trainer.encode, velocity, trainer.setting(), prompts, range(len(prompts)))
        for velocity in (trainer.reference_velocity, trainer.velocity)
    )
    for name, images in (("before", base), ("after", policy_)):
        for i, image in enumerate(images):
            with Image.open(tmp_path / "adapter" / "images" / f"{name}_{i}.png") as picture:
                assert picture.tobytes() == tensor_to_image(image).tobytes(), name
    assert not torch.equal(base, policy_)


@pytest.mark.parametrize(("kernel", "anneals"), [("annealed", True), ("ode", False), ("flow_sde", False)])
def test_what_is_published_is_sampled_as_it_was_trained(pipeline, tmp_path, kernel, anneals):
    objective = {"objective": "forward"} if kernel == "ode" else {}
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=1, sample_kernel=kernel, **objective)
    trainer.train()
    scheduler = json.loads((tmp_path / "adapter" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["stochastic_sampling"] is anneals
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert ("scheduler anneals" in text, "solves the ODE" in text) == (anneals, not anneals)
    prompts, sampler = trainer.report.card_prompts(), "annealed" if anneals else "ode"
    drawn = sample_images(
        pipeline, trainer.encode, pipeline.velocity, trainer.setting(), prompts, range(len(prompts)), sampler=sampler
    )
    shown = Image.open(tmp_path / "adapter" / "images" / "after_0.png").tobytes()
    assert shown == tensor_to_image(drawn[0]).tobytes(), "the card's pictures, too"


def test_the_old_policy_draws_the_rollouts_and_follows_the_present_one(pipeline, tmp_path):
    trainer = tiny.trainer(
        pipeline, tmp_path, objective="forward", old_policy_decay=0.75, old_policy_ramp=0.5, train_learning_rate=1e-2
    )
    drawn, weights = [], []
    collect, update = trainer.collector.collect, trainer.updater.run

    def watched_collect(*args):
        drawn.append([p.detach().clone() for p in trainer.parameters])
        return collect(*args)

    def watched_update(*args):
        update(*args)
        weights.append([p.detach().clone() for p in trainer.parameters])

    trainer.collector.collect, trainer.updater.run = watched_collect, watched_update
    trainer.train(epochs=3)
    old = drawn[0]
    for epoch, decay in enumerate((0.5, 0.75)):  # .5 an epoch, at most .75
        old = [decay * o + (1 - decay) * new for o, new in zip(old, weights[epoch], strict=True)]
        for mine, theirs in zip(old, drawn[epoch + 1], strict=True):
            torch.testing.assert_close(mine, theirs)
    assert all(torch.equal(p, w) for p, w in zip(trainer.parameters, weights[-1], strict=True)), "put back"
    first = [line for line in log(tmp_path) if "loss" in line][0]
    assert first["old_distance"] == 0
    assert log(tmp_path)[-2]["old_distance"] > 0


def test_a_group_can_share_its_initial_noise(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, prompt_function=PROMPTS, num_generations=4, share_initial_noise=True)
    prompts = trainer.prompts.batch(0, trainer.plan.num_groups, trainer.plan.group_size)
    part = trainer.collector.roll_out(prompts[:8], 0, 0)
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


def test_a_step_whose_gradient_is_not_finite_is_left_out(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=3)
    compute, calls = trainer.compute_loss, []

    def once(rows, conditioning):
        output = compute(rows, conditioning)
        calls.append(trainer.global_step)
        return dataclasses.replace(output, loss=output.loss * float("nan")) if trainer.global_step == 1 else output

    trainer.compute_loss = once
    with pytest.warns(UserWarning, match="norm is nan: this optimizer step is left out"):
        trainer.train()
    assert set(calls) == {0, 1, 2}
    assert all(torch.isfinite(weight).all() for weight in lora(trainer).values())
    norms = [line["grad_norm"] for line in log(tmp_path) if "grad_norm" in line]
    assert len(norms) == 3 and norms[1] is None and norms[2] > 0
