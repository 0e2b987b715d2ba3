"""Nothing already computed is lost: resume is bit-exact, faults keep what there is."""

import json
import shutil
import warnings
from contextlib import ExitStack

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from faults import files_of_at_most

from trl_tafs.policy.lora import adapter_state_dict
from trl_tafs.rewards import RewardError
from trl_tafs.training.checkpoint_files import MANIFEST, CheckpointError, checkpoints
from trl_tafs.training.pending import PendingRollouts

SETTINGS = {
    "train_gradient_accumulation_steps": 1,
    "train_lr_scheduler_type": "linear",
    "train_lr_warmup_steps": 2,
    "num_epochs": 4,
}


def random_prompt():
    import random

    return random.choice(["one", "two", "three"]), {}


def run(folder, pipeline_folder, epochs=None, reward=tiny.brightness, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = SETTINGS | {"prompt_function": random_prompt} | changes
    trainer = tiny.trainer(tiny.load(pipeline_folder), folder, reward=reward, **settings)
    trainer.train(epochs)
    return trainer


def weights(trainer):
    return adapter_state_dict(trainer.sd_pipeline.denoiser, trainer.policy.adapter_name)


def assert_same(trainer, other):
    mine, theirs = weights(trainer), weights(other)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert trainer.progress.global_step == other.progress.global_step and trainer.progress.epoch == other.progress.epoch
    assert trainer.progress.reward_curve == other.progress.reward_curve


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_use_ema": True},
        {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 2},
        {"objective": "forward", "old_policy_decay": 0.75, "old_policy_ramp": 0.5, "forward_levels": "random"},
        {"group_allocation": "variance", "step_credit": "trace", "num_generations": 4, "min_generations": 1},
        {"group_allocation": "streaming"},
        {
            **{"group_allocation": "superflow", "scale_rewards": "batch", "step_credit": "terminal"},
            **{"group_averaging": "prompts", "prompt_function": ["one", "two", "three", "four", "five"]},
        },
        {"sample_kernel": "flow_sde", "sample_window_size": 1, "sample_window_interval": 1, "step_credit": "terminal"},
    ],
    ids=["plain", "ema", "statistics", "old policy", "variance", "streaming", "superflow", "window"],
)
def test_two_and_two_epochs_are_four_bit_for_bit(pipeline_folder, tmp_path, changes):
    straight = run(tmp_path / "straight", pipeline_folder, **changes)
    run(tmp_path / "halves", pipeline_folder, epochs=2, **changes)
    resumed = run(tmp_path / "halves", pipeline_folder, resume_from="latest", **changes)
    assert_same(straight, resumed)
    if straight.policy.average is not None:
        pairs = zip(straight.policy.average.ema.shadow_params, resumed.policy.average.ema.shadow_params, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    if straight.algorithm.stat_tracker is not None:
        assert straight.algorithm.stat_tracker.state_dict() == resumed.algorithm.stat_tracker.state_dict()

    if straight.algorithm.prompt_tracker is not None:
        mine, theirs = (trainer.algorithm.prompt_tracker.state_dict() for trainer in (straight, resumed))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine) and len(mine["keys"]) > 1

    def lines(name):
        read = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith(("time", "images_per_second"))} for line in read]

    assert lines("straight") == lines("halves")


def test_a_run_killed_in_the_middle_goes_on_from_its_last_checkpoint(pipeline_folder, tmp_path):
    straight = run(tmp_path / "straight", pipeline_folder)

    class Killed(BaseException):
        pass

    calls = []

    def fatal(images, prompts, metadata):
        calls.append(1)
        if len(calls) == 16:  # preflight, then two batches of three steps an epoch: in the middle of the third
            raise Killed
        return tiny.brightness(images, prompts, metadata)

    with pytest.raises(Killed):
        run(tmp_path / "killed", pipeline_folder, reward=fatal)
    assert_same(straight, run(tmp_path / "killed", pipeline_folder, resume_from="latest"))


def kept_rollouts(folder, epoch):
    return torch.load(PendingRollouts(folder, 0).path(epoch), weights_only=True)


def test_a_full_disk_while_rollouts_are_kept_still_leaves_a_checkpoint(pipeline_folder, tmp_path):
    calls = []
    sizes = {"lora_rank": 1, "sample_batch_size": 64, "num_generations": 128, "sample_num_batches_per_epoch": 2}
    with ExitStack() as full:

        def breaks(images, prompts, metadata):
            calls.append(len(images))
            if len(calls) > 7:  # preflight and the first epoch
                full.enter_context(files_of_at_most(100_000))  # more than a checkpoint's, less than the rollouts
                raise ConnectionError("judge is down")
            return tiny.brightness(images, prompts, metadata)

        with pytest.raises(RewardError, match="judge is down.* could not be kept .*File too large"):
            run(tmp_path / "failed", pipeline_folder, reward=breaks, reward_max_retries=0, save_freq=0, **sizes)
    assert [path.name for path in checkpoints(tmp_path / "failed" / "checkpoints")] == ["checkpoint_000001"]
    assert not list((tmp_path / "failed" / "pending").iterdir())


def test_a_reward_that_fails_is_retried_then_the_rollouts_are_kept(pipeline_folder, tmp_path):
    straight = run(tmp_path / "straight", pipeline_folder)
    calls = []

    def breaks(images, prompts, metadata):
        calls.append(len(images))
        if len(calls) >= 17:  # preflight, then two batches of three steps an epoch: the third epoch's second batch
            raise ConnectionError("judge is down")
        return tiny.brightness(images, prompts, metadata)

    with (
        pytest.warns(UserWarning, match="judge is down; it is retried"),
        pytest.raises(
            RewardError, match=r"epoch 2, step 4: reward 'breaks' raised ConnectionError: judge is down \(3 "
        ),
    ):
        run(tmp_path / "failed", pipeline_folder, reward=breaks, reward_max_retries=2, save_freq=0)
    assert len(calls) == 19, "two retries"
    kept = kept_rollouts(tmp_path / "failed", 2)
    assert [part["scores"] is not None for part in kept[0]["batches"]] == [True, False]

    scored = []

    def again(images, prompts, metadata):
        scored.append(len(images))
        return tiny.brightness(images, prompts, metadata)

    resumed = run(tmp_path / "failed", pipeline_folder, reward=again, resume_from="latest")
    assert_same(straight, resumed)
    assert scored == [2] + [8] * 9, "preflight, the batch that failed, and the last epoch's two: nothing twice"
    assert not (tmp_path / "failed" / "pending").exists()


def test_a_reward_that_fails_in_the_second_wave_costs_neither_wave(pipeline_folder, tmp_path):
    streaming = {"group_allocation": "streaming", "min_generations": 4}
    straight = run(tmp_path / "straight", pipeline_folder, **streaming)
    calls = []

    def breaks(images, prompts, metadata):
        calls.append(len(images))
        if len(calls) == 11:  # preflight, then two waves of three steps an epoch: the second epoch's second wave
            raise ConnectionError("judge is down")
        return tiny.brightness(images, prompts, metadata)

    with pytest.raises(RewardError, match="epoch 1"):
        run(tmp_path / "failed", pipeline_folder, reward=breaks, reward_max_retries=0, **streaming)
    kept = kept_rollouts(tmp_path / "failed", 1)
    assert [[part["scores"] is not None for part in draw["batches"]] for draw in kept] == [[True], [False]]
    scored = []

    def again(images, prompts, metadata):
        scored.append(len(images))
        return tiny.brightness(images, prompts, metadata)

    resumed = run(tmp_path / "failed", pipeline_folder, reward=again, resume_from="latest", **streaming)
    assert_same(straight, resumed)
    assert scored == [2] + [8] * 15, "preflight, the wave that failed, and two more epochs: nothing twice"


def test_an_asynchronous_reward_that_fails_is_asked_again_for_what_it_owes(pipeline_folder, tmp_path):
    straight = run(tmp_path / "straight", pipeline_folder)
    calls = []

    def breaks(images, prompts, metadata):
        calls.append(1)
        if len(calls) == 2:
            raise ConnectionError("judge is down")
        return tiny.brightness(images, prompts, metadata)

    threads = {"async_reward_computation": True, "max_workers": 1}
    with pytest.raises(RewardError, match="epoch 0"):
        run(tmp_path / "failed", pipeline_folder, reward=breaks, reward_max_retries=0, **threads)
    kept = kept_rollouts(tmp_path / "failed", 0)
    assert kept[0]["batches"][0]["scores"] is None
    resumed = run(tmp_path / "failed", pipeline_folder, resume_from="latest", **threads)
    assert_same(straight, resumed)


def test_kept_rollouts_of_other_prompts_are_not_used(pipeline_folder, tmp_path):
    def breaks(images, prompts, metadata):
        if len(images) > 2:
            raise ConnectionError
        return [0.0, 0.0]

    with pytest.raises(RewardError):
        run(tmp_path, pipeline_folder, reward=breaks, reward_max_retries=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = run(tmp_path, pipeline_folder, resume_from="latest", prompt_function=["nine"])
    fresh = run(tmp_path / "fresh", pipeline_folder, prompt_function=["nine"])
    assert_same(other, fresh)


def test_a_full_disk_costs_the_checkpoint_and_the_next_epoch_tries_again(pipeline_folder, tmp_path, capsys):
    calls = []
    with ExitStack() as full:

        def reward(images, prompts, metadata):
            calls.append(1)
            if len(calls) == 8:  # preflight, then two batches of three steps an epoch: the second epoch
                full.enter_context(files_of_at_most(30_000))
            if len(calls) == 14:
                full.close()
            return tiny.brightness(images, prompts, metadata)

        trainer = run(tmp_path, pipeline_folder, reward=reward, save_freq=2)
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["checkpoint_000003", "checkpoint_000004"]
    assert "checkpoint_000002 could not be written: " in (said := capsys.readouterr().out) and "File too large" in said
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    assert trainer.progress.epoch == 4


def test_only_the_newest_are_kept(pipeline_folder, tmp_path):
    run(tmp_path, pipeline_folder, num_checkpoint_limit=2)
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["checkpoint_000003", "checkpoint_000004"]


def test_torn_checkpoints_are_refused_with_a_whole_one_named(pipeline_folder, tmp_path):
    run(tmp_path, pipeline_folder, epochs=2)
    newest = tmp_path / "checkpoints" / "checkpoint_000002"
    optimizer = newest / "states" / "optimizer.pt"
    size = optimizer.stat().st_size
    with optimizer.open("r+b") as file:
        file.truncate(100)
    message = rf"states/optimizer.pt has 100 bytes of {size}; resume_from='.*checkpoint_000001' is whole"
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, pipeline_folder, resume_from="latest")
    optimizer.unlink()
    with pytest.raises(CheckpointError, match="lacks states/optimizer.pt"):
        run(tmp_path, pipeline_folder, resume_from=str(newest))
    (newest / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        run(tmp_path, pipeline_folder, resume_from=str(newest))
    shutil.rmtree(newest)
    assert run(tmp_path, pipeline_folder, epochs=2, resume_from=str(tmp_path / "checkpoints")).progress.epoch == 2


def test_other_settings_on_resume_are_named(pipeline_folder, tmp_path):
    run(tmp_path, pipeline_folder, epochs=1)
    with pytest.warns(UserWarning, match="train_learning_rate 0.0003 -> 0.001"):
        trainer = run(tmp_path, pipeline_folder, resume_from="latest", train_learning_rate=1e-3, epochs=2)
    assert trainer.policy.lr_scheduler.base_lrs == [1e-3], "what is announced holds"


def test_a_new_run_in_a_used_folder_sets_the_earlier_one_aside(pipeline_folder, tmp_path):
    run(tmp_path, pipeline_folder, num_checkpoint_limit=2)
    with pytest.warns(UserWarning, match="holds an earlier run, resume_from is empty; moved to .*earlier_1"):
        run(tmp_path, pipeline_folder, epochs=1, num_checkpoint_limit=2)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["checkpoint_000001"]
    assert len(checkpoints(tmp_path / "earlier_1" / "checkpoints")) == 2
    assert run(tmp_path, pipeline_folder, epochs=2, resume_from="latest").progress.epoch == 2


def test_resuming_at_an_earlier_checkpoint_sets_the_later_ones_aside(pipeline_folder, tmp_path):
    run(tmp_path, pipeline_folder)
    first = tmp_path / "checkpoints" / "checkpoint_000001"
    run(tmp_path, pipeline_folder, epochs=2, resume_from=str(first), num_checkpoint_limit=2)
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["checkpoint_000001", "checkpoint_000002"]
    assert len(checkpoints(tmp_path / "earlier_1" / "checkpoints")) == 3


def test_a_checkpoint_is_an_adapter_for_plain_diffusers(pipeline_folder, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    run(tmp_path, pipeline_folder, epochs=1)
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(tmp_path / "checkpoints" / "checkpoint_000001")
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 8


def test_evaluations_survive_a_resume(pipeline_folder, tmp_path):
    settings = {
        "eval_freq": 1,
        "eval_num_steps": [2],
        "eval_samplers": ["annealed"],
        "eval_prompts": ["three"],
        "metric_for_best_model": "eval/annealed_2/brightness",
    }
    straight = run(tmp_path / "straight", pipeline_folder, **settings)
    run(tmp_path / "halves", pipeline_folder, epochs=2, **settings)
    resumed = run(tmp_path / "halves", pipeline_folder, resume_from="latest", **settings)
    assert resumed.progress.evaluations == straight.progress.evaluations
    assert resumed.progress.best_metric == straight.progress.best_metric

    if straight.algorithm.prompt_tracker is not None:
        mine, theirs = (trainer.algorithm.prompt_tracker.state_dict() for trainer in (straight, resumed))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine) and len(mine["keys"]) > 1

    def lines(name):
        read = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith(("time", "images_per_second"))} for line in read]

    assert lines("halves") == lines("straight")


def test_a_judge_that_fails_costs_its_judgement_not_the_epochs(pipeline_folder, tmp_path):
    calls = []

    def judge(images, prompts, metadata):
        calls.append(1)
        if len(calls) == 4:  # preflight, epoch 0, epoch 1: at the second epoch's end
            raise ConnectionError("judge is down")
        return images.mean((1, 2, 3))

    settings = {"eval_freq": 1, "eval_num_steps": [2], "eval_samplers": ["annealed"], "eval_prompts": ["three"]}
    with pytest.raises(RewardError, match="evaluation: reward 'judge' raised ConnectionError"):
        run(tmp_path, pipeline_folder, save_freq=0, reward_max_retries=0, eval_reward_function=judge, **settings)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["checkpoint_000002"]


def test_only_faults_of_the_disk_are_survived(pipeline_folder, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = tiny.trainer(tiny.load(pipeline_folder), tmp_path)
    trainer.policy.lora_config.bias = "all"  # which the format can't hold
    with pytest.raises(ValueError, match="cannot hold bias"):
        trainer.save_checkpoint()


def test_kept_rollouts_of_another_seed_are_not_used(pipeline_folder, tmp_path):
    def breaks(images, prompts, metadata):
        if len(images) > 2:
            raise ConnectionError
        return [0.0, 0.0]

    with pytest.raises(RewardError):
        run(tmp_path, pipeline_folder, reward=breaks, reward_max_retries=0, prompt_function=["nine"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = run(tmp_path, pipeline_folder, resume_from="latest", prompt_function=["nine"], seed=5, epochs=1)
    batches = other.collector.local_batches(other.prompts.batch(0, 2, 8))
    payloads = other.collector.sampler.sample(batches, 0)[0]
    assert other.progress.reward_curve[0][1] != pytest.approx(payloads[0].scores[:, -1].mean().item(), abs=1e-7)


def test_without_a_save_freq_a_checkpoint_is_due_by_what_the_last_one_took(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, save_freq=None)
    checkpoints = trainer.checkpoints
    assert checkpoints.due(1), "there is none yet"
    trainer.save_checkpoint()
    assert checkpoints.took > 0
    checkpoints.took = 1000.0  # seconds
    assert not checkpoints.due(1)
    checkpoints.written -= 19_900
    assert not checkpoints.due(1)
    checkpoints.written -= 200
    assert checkpoints.due(1)
    trainer.progress.skipped_steps = 1
    assert not checkpoints.due(1), "the last optimizer steps were left out"
