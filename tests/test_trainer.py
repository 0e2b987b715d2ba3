"""The loop: what is logged, what is trained, what is refused before time is spent."""

import json
import math
import re
from contextlib import nullcontext

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig

from trl_tafs.policy.adapter_file import read_adapter
from trl_tafs.policy.lora import adapter_state_dict
from trl_tafs.rewards import RewardError


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lora(trainer):
    return adapter_state_dict(trainer.sd_pipeline.denoiser, trainer.policy.adapter_name)


def test_an_epoch_moves_the_lora_and_nothing_else(pipeline, tmp_path):
    before = {n: p.clone() for n, p in pipeline.transformer.named_parameters()}
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=1)
    trainer.train()
    moved = set()
    for name, parameter in pipeline.transformer.named_parameters():
        key = name.replace(".base_layer", "")
        if "lora_" in name:
            moved.add("lora_B" in name and bool(parameter.abs().sum() > 0))
        else:
            assert torch.equal(parameter, before[key]), name
    assert True in moved


def test_what_is_logged(pipeline, tmp_path):
    tiny.trainer(pipeline, tmp_path, num_epochs=2, sample_grid_freq=1, log_with="tensorboard").train()
    lines = log(tmp_path)
    for key in ("reward", "reward_mean", "reward_std", "reward/group_std", "rewards/brightness/mean", "epoch"):
        assert [key in line for line in lines].count(True) >= 2, key
    for key in ("approx_kl", "clipfrac", "loss", "grad_norm", "inner_epoch", "learning_rate", "ratio_deviation"):
        assert [key in line for line in lines].count(True) == 2, key
    for key in ("time/rollout", "time/decode", "time/reward", "time/update"):
        assert [key in line for line in lines].count(True) == 2, key
    rewards = next(line for line in lines if "reward" in line)
    assert {f"reward/step_{n}" for n in (2, 3, 4)} <= set(rewards), "n = 2..N: the first is skipped"
    assert (tmp_path / "samples" / "epoch_000001.png").exists()
    assert list((tmp_path / "trl").glob("events*")), "the tracker that was asked for"


def test_one_update_an_epoch_is_on_policy(pipeline, tmp_path):
    # The rollout's and the replay's batches have one shape, so the ratio is 1 to the bit.
    tiny.trainer(pipeline, tmp_path, num_epochs=2, train_timestep_fraction=1.0).train()
    updates = [line for line in log(tmp_path) if "loss" in line]
    assert [line["ratio_deviation"] for line in updates] == [0.0, 0.0]
    assert [line["step"] for line in updates] == [0, 1]


def test_more_updates_leave_the_policy_and_are_counted(pipeline, tmp_path):
    trainer = tiny.trainer(
        pipeline, tmp_path, num_epochs=2, train_gradient_accumulation_steps=1, train_num_inner_epochs=2
    )
    trainer.train()
    updates = [line for line in log(tmp_path) if "loss" in line]
    assert len(updates) == trainer.progress.global_step == 2 * 2 * 2
    assert max(line["ratio_deviation"] for line in updates) > 0
    assert [line["inner_epoch"] for line in updates] == [0, 0, 1, 1] * 2


def test_kl_to_the_base_is_zero_at_first_and_holds_the_policy_back(pipeline_folder, tmp_path):
    def drift(beta):
        trainer = tiny.trainer(
            tiny.load(pipeline_folder), tmp_path / f"{beta}", num_epochs=6, beta=beta, train_learning_rate=3e-3
        )
        trainer.train()
        kl = [line["kl"] for line in log(tmp_path / f"{beta}") if "kl" in line]
        return kl, lora(trainer)

    weak, _ = drift(1e-6)
    strong, _ = drift(1e3)
    assert weak[0] == strong[0] == 0.0
    assert 0 < strong[-1] < 0.5 * weak[-1]


def test_a_known_reward_is_learned_and_a_shuffled_one_is_not(pipeline_folder, tmp_path):
    settings = {
        "num_epochs": 20,
        "train_learning_rate": 2e-3,
        "lora_rank": 8,
        "lora_alpha": 16,
        "sample_num_batches_per_epoch": 4,
        "num_generations": 32,
        "save_freq": 0,
    }

    def gain(shuffle):
        brightness = []

        def reward(images, prompts, metadata):
            rewards = tiny.brightness(images, prompts, metadata)[0]
            order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(len(brightness)))
            return rewards[order] if shuffle else rewards

        def hook(rows, step, tracker):
            brightness.append(torch.cat([row[0] for row in rows]).mean().item())

        name = "shuffled" if shuffle else "real"
        tiny.trainer(tiny.load(pipeline_folder), tmp_path / name, reward=reward, hook=hook, **settings).train()
        return sum(brightness[-3:]) / 3 - brightness[0]

    real, random = gain(shuffle=False), gain(shuffle=True)
    assert real > 0.01
    assert abs(random) < 0.4 * real


def test_a_hook_that_fails_costs_its_pictures_alone(pipeline, tmp_path):
    def hook(*args):
        raise OSError("no space on the tracker")

    trainer = tiny.trainer(pipeline, tmp_path, hook=hook, num_epochs=1)
    with pytest.warns(UserWarning, match="image_samples_hook failed .OSError: no space on the tracker"):
        trainer.train()
    assert trainer.progress.global_step == 1 and (tmp_path / "adapter").exists()


def test_the_hook_sees_what_ddpo_s_sees(pipeline, tmp_path):
    seen = []
    tiny.trainer(pipeline, tmp_path, hook=lambda *args: seen.append(args), num_epochs=1).train()
    rows, step, tracker = seen[0]
    images, prompts, metadata, rewards, reward_metadata = rows[-1]
    assert len(rows) == 2
    assert images.shape == (8, 3, 8, 8) and len(prompts) == len(metadata) == len(rewards) == 8
    torch.testing.assert_close(rewards, images.mean((1, 2, 3)))
    assert step == 0 and reward_metadata == {} and metadata[0] == {"digit": 7}
    tracker.log_images({"seven | 0.5": images[:1]}, step=step)
    assert list((tmp_path / "images").glob("*.png"))


def test_ddpo_s_methods(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path)
    images = torch.rand(8, 3, 8, 8)
    pairs = [(images, ["a"] * 8, [{}] * 8), (images[:4], ["a"] * 4, [{}] * 4)]
    rewards, metadata = trainer.compute_rewards(pairs, is_async=True)
    torch.testing.assert_close(rewards[0], images.mean((1, 2, 3)).double())
    assert [len(scored) for scored in rewards] == [8, 4] and metadata == ({}, {})
    ratio = torch.tensor([1.5, 0.5, 1.0])
    expected = -(math.exp(0.2) - math.exp(-0.2) + 1.0) / 3  # both clipped, in log space
    assert trainer.loss(torch.tensor([1.0, -1.0, 1.0]), 0.2, ratio).item() == pytest.approx(expected)
    assert trainer.step(0, 5) == 6


def test_several_rewards_masks_and_weights(pipeline, tmp_path):
    def half(images, prompts, metadata):
        return [None if i % 2 else float(image.mean()) for i, image in enumerate(images)]

    trainer = tiny.trainer(
        pipeline,
        tmp_path,
        reward={"bright": (tiny.brightness, 2.0), "half": half},
        num_epochs=1,
        prompt_function=["two"],
    )
    trainer.train()
    line = next(line for line in log(tmp_path) if "reward" in line)
    assert 0.3 < line["frac_no_verdict"] < 0.7
    assert {"rewards/bright/mean", "rewards/half/mean", "rewards/half/std"} <= set(line)


def test_prompts_from_a_dataset(pipeline, tmp_path):
    seen = []

    def reward(images, prompts, metadata):
        seen.extend((p, m["digit"]) for p, m in zip(prompts, metadata, strict=True))
        return images.mean((1, 2, 3))

    rows = Dataset.from_dict({"prompt": ["one", "two", "three", "four"], "digit": [1, 2, 3, 4]})
    tiny.trainer(pipeline, tmp_path, reward=reward, prompt_function=rows, num_epochs=2).train()
    assert set(seen) == {("one", 1), ("two", 2), ("three", 3), ("four", 4)}


def test_groups_without_variance_are_counted_and_skipped(pipeline, tmp_path, caplog):
    trainer = tiny.trainer(
        pipeline, tmp_path, reward=lambda images, p, m: [1.0] * len(images), num_epochs=1, train_adam_weight_decay=0.0
    )
    before, calls = lora(trainer), []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args: calls.append(1) or compute(*args)
    trainer.train()
    assert re.search("WARNING.*no image has an advantage, .*1 such in a row.: lambda gave the same", caplog.text)
    line = next(line for line in log(tmp_path) if "reward" in line)
    assert line["frac_reward_zero_std"] == line["frac_zero_advantage"] == 1.0
    assert not calls and trainer.progress.global_step == 0, "no pass, no optimizer step"
    assert all(torch.equal(before[k], v) for k, v in lora(trainer).items())


def test_evaluation_keeps_the_best_and_stops(pipeline, tmp_path):
    values = iter([0.0, 0.5, 0.9, 0.4, 0.3, 0.2, 0.1])  # the first is the preflight's
    trainer = tiny.trainer(
        pipeline,
        tmp_path,
        num_epochs=9,
        eval_freq=1,
        eval_num_steps=[2],
        eval_samplers=["annealed"],
        eval_prompts=["three", "four"],
        eval_reward_function={"judge": lambda images, p, m: [next(values)] * len(images)},
        metric_for_best_model="eval/annealed_2/judge",
        early_stopping_patience=2,
    )
    trainer.train()
    assert json.loads((tmp_path / "best" / "best.json").read_text())["epoch"] == 1
    assert trainer.progress.epoch == 3, "two evaluations without gain after the best"
    assert read_adapter(tmp_path / "best")


@pytest.mark.parametrize("greater", [True, False])
def test_an_evaluation_without_a_score_is_passed_over(pipeline, tmp_path, greater):
    settings = {"eval_freq": 1, "eval_prompts": ["three"], "early_stopping_patience": 1}
    name = "eval/annealed_4/brightness"
    trainer = tiny.trainer(pipeline, tmp_path, metric_for_best_model=name, greater_is_better=greater, **settings)
    better, worse = (0.3, 0.1) if greater else (0.1, 0.3)

    def keep(results, epoch):
        if trainer.progress.add_evaluation(epoch, results, "m", greater):
            trainer.checkpoints.save_best(epoch, "m", results["m"])
        return trainer.progress.out_of_patience(1)

    for epoch, (value, best, stop) in enumerate(
        [(math.nan, None, False), (0.2, 0.2, False), (math.nan, 0.2, False), (better, better, False)]
    ):
        with pytest.warns(UserWarning, match="m is NaN at epoch") if math.isnan(value) else nullcontext():
            assert keep({"m": value}, epoch) == stop
        assert trainer.progress.best_metric == best
    trainer.progress.best_metric = math.nan  # of an older checkpoint
    keep({"m": worse}, 9)
    assert (
        trainer.progress.best_metric == worse
        and json.loads((tmp_path / "best" / "best.json").read_text())["epoch"] == 9
    )
    assert keep({"m": worse}, 10), "patience counts the others"


def test_evaluation_has_fixed_noise_and_both_samplers(pipeline, tmp_path):
    seen = []

    def judge(images, prompts, metadata):
        seen.append(images)
        return images.mean((1, 2, 3))

    trainer = tiny.trainer(
        pipeline, tmp_path, eval_prompts=["three"], eval_reward_function=judge, eval_num_steps=[2, 4]
    )
    trainer.evaluate(0)
    trainer.evaluate(0)
    assert len(seen) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))
    keys = set(log(tmp_path)[-1])
    assert {f"eval/{s}_{n}/judge" for s in ("annealed", "ode") for n in (2, 4)} <= keys


def test_images_do_not_depend_on_the_batch_size(pipeline_folder, tmp_path):
    def images(batch_size):
        trainer = tiny.trainer(
            tiny.load(pipeline_folder),
            tmp_path / str(batch_size),
            sample_batch_size=batch_size,
            sample_num_batches_per_epoch=16 // batch_size,
        )
        parts, _ = trainer.collector.sampler.sample(trainer.collector.local_batches(trainer.prompts.batch(0, 2, 8)), 0)
        return torch.cat([part.rollout.final for part in parts]), torch.cat([p.rollout.actions for p in parts])

    (final, actions), (other_final, other_actions) = images(8), images(4)
    torch.testing.assert_close(final, other_final, atol=1e-5, rtol=0)
    torch.testing.assert_close(actions, other_actions, atol=1e-5, rtol=0)
    assert torch.equal(images(8)[0], final), "bit-equal at one micro-batch shape"


# What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 6}, r"16 images an epoch .* groups of 6; use num_generations=4 or 8"),
        ({"train_batch_size": 7}, r"16 images .* train_batch_size=7; use train_batch_size=4"),
        ({"train_gradient_accumulation_steps": 3}, "2 minibatches .* use 2"),
        ({"height": 9}, "multiples of 2, got 9 x 8"),
        ({"eval_freq": 1}, "no eval_prompts"),
        ({"resume_from": "nowhere"}, "nowhere doesn't exist"),
        ({"resume_from": "latest"}, "no checkpoint below"),
        ({"reward_weights": [1.0, 2.0]}, "2 reward_weights for 1 rewards"),
        ({"lora_target_modules": ["attn.to_nothing"]}, "linear layers end in: .*to_q"),
        ({"adapter_name_or_path": "nowhere"}, "nowhere"),
        ({"prompt_function": 3}, "prompts come from a function"),
    ],
)
def test_what_cannot_work_is_refused_at_once(pipeline, tmp_path, changes, message):
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=message):
        tiny.trainer(pipeline, tmp_path, **changes)


def test_a_plain_pipeline_is_refused(pipeline_folder, tmp_path):
    with pytest.raises(TypeError, match="load it as a TAFS pipeline"):
        tiny.trainer(tiny.build_pipeline(0), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward": lambda i, p, m: torch.zeros(3)}, r"returned shape \(3,\) for 2 images"),
        ({"reward": lambda i, p, m: ["high"] * len(p)}, "must return 2 numbers"),
        ({"prompt_function": lambda: (7, {})}, r"the prompt function gave \(7, \{\}\)"),
        ({"prompt_function": lambda: "two"}, "must give .prompt: str, metadata"),
    ],
)
def test_bad_rewards_and_prompts_stop_before_the_first_rollout(pipeline, tmp_path, arguments, message):
    trainer = tiny.trainer(pipeline, tmp_path, **arguments)
    rolled_out = []
    trainer.collector.sampler.roll_out = lambda *args: rolled_out.append(args)
    with pytest.raises((RewardError, ValueError), match=message):
        trainer.train()
    assert not rolled_out


def test_no_score_at_all_is_an_error(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, reward=lambda i, p, m: [None] * len(p))
    with pytest.raises(RewardError, match="gave no score .* for any of the epoch's 48 images"):
        trainer.train()


def test_dropout_in_the_lora_is_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="lora_dropout is 0.1"):
        tiny.trainer(pipeline, tmp_path, peft_config=LoraConfig(r=2, lora_dropout=0.1, target_modules=["attn.to_q"]))


def test_clipping_too_much_warns(pipeline, tmp_path, caplog):
    trainer = tiny.trainer(pipeline, tmp_path, train_clip_range=1e-9, train_gradient_accumulation_steps=1, num_epochs=1)
    trainer.train()
    assert re.search("WARNING.*of the ratios are clipped at train_clip_range=1e-09", caplog.text)


# Adapters -----------------------------------------------------------------------------------------------------


def test_the_users_lora_config_and_going_on_from_an_adapter(pipeline_folder, tmp_path):
    own = LoraConfig(r=2, lora_alpha=6, target_modules=["attn.to_q", "attn.to_v"])
    first = tiny.trainer(tiny.load(pipeline_folder), tmp_path / "a", peft_config=own, num_epochs=1)
    first.train()
    saved = tmp_path / "a" / "adapter"
    second = tiny.trainer(tiny.load(pipeline_folder), tmp_path / "b", adapter_name_or_path=str(saved))
    assert second.policy.lora_config.r == second.policy.lora_config.lora_alpha == 2, "6 / 2 is in the weights"
    published = {key: value * (3 if "lora_B" in key else 1) for key, value in lora(first).items()}
    assert all(torch.equal(value, lora(second)[key]) for key, value in published.items())

    loaded = tiny.load(pipeline_folder)
    loaded.load_lora_weights(saved)
    third = tiny.trainer(loaded, tmp_path / "c", num_epochs=1)
    assert all(torch.equal(value, lora(third)[key]) for key, value in published.items())
    third.train()
    assert len(third.sd_pipeline.transformer.peft_config) == 1, "no second adapter on top"
    with pytest.raises(ValueError, match="already carries the adapter default_0"):
        tiny.trainer(third.sd_pipeline, tmp_path / "d", peft_config=own)


def test_the_saved_adapter_samples_as_the_policy_does(pipeline_folder, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    trainer = tiny.trainer(tiny.load(pipeline_folder), tmp_path, num_epochs=2, train_learning_rate=1e-2)
    trainer.train()
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(tmp_path / "adapter")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "adapter", subfolder="scheduler")
    call = {"num_inference_steps": 4, "sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 1.0, "output_type": "pt"}
    x = torch.randn(2, 1, 8, 8)
    torch.manual_seed(0)
    theirs = pipe(["two", "six"], latents=x, max_sequence_length=8, **call).images
    torch.manual_seed(0)
    rollout = trainer.sd_pipeline.annealed_rollout(["two", "six"], latents=x)
    assert torch.equal(theirs, trainer.sd_pipeline.decode_latents(rollout.final))
    base = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    base.scheduler = pipe.scheduler
    torch.manual_seed(0)
    assert not torch.equal(theirs, base(["two", "six"], latents=x, max_sequence_length=8, **call).images)
