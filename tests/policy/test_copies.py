import json

import tiny
import torch

from trl_tafs.policy.adapter_file import read_adapter
from trl_tafs.policy.lora import adapter_state_dict


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lora(trainer):
    return adapter_state_dict(trainer.sd_pipeline.denoiser, trainer.policy.adapter_name)


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
    with trainer.policy.averaged():
        average = lora(trainer)
        images = trainer.drawer.images(trainer.draw_spec("ode", 2), ["three"], [0])
    assert any(not torch.equal(average[k], live[k]) for k in live)
    assert any(average[k].abs().sum() > 0 for k in live if "lora_B" in k), "it follows the policy"
    assert torch.equal(seen[-1], images)
    for folder in ("adapter", "best"):
        saved, _ = read_adapter(tmp_path / folder)
        strength = {key: 2.0 if "lora_B" in key else 1.0 for key in saved}  # alpha / r, which is published within
        assert all(torch.equal(saved[k], average[k] * strength[k]) for k in saved), folder
    assert all(torch.equal(lora(trainer)[k], live[k]) for k in live), "the policy is put back"


def test_the_old_policy_draws_the_rollouts_and_follows_the_present_one(pipeline, tmp_path):
    trainer = tiny.trainer(
        pipeline, tmp_path, objective="forward", old_policy_decay=0.75, old_policy_ramp=0.5, train_learning_rate=1e-2
    )
    drawn, weights = [], []
    sampler = trainer.collector.sampler
    sample, update = sampler.sample, trainer.updater.update

    def watched_collect(*args):
        drawn.append([p.detach().clone() for p in trainer.policy.parameters])
        return sample(*args)

    def watched_update(*args):
        yield from update(*args)
        weights.append([p.detach().clone() for p in trainer.policy.parameters])

    sampler.sample, trainer.updater.update = watched_collect, watched_update
    trainer.train(epochs=3)
    old = drawn[0]
    for epoch, decay in enumerate((0.5, 0.75)):  # .5 an epoch, at most .75
        old = [decay * o + (1 - decay) * new for o, new in zip(old, weights[epoch], strict=True)]
        for mine, theirs in zip(old, drawn[epoch + 1], strict=True):
            torch.testing.assert_close(mine, theirs)
    assert all(torch.equal(p, w) for p, w in zip(trainer.policy.parameters, weights[-1], strict=True)), "put back"
    first = [line for line in log(tmp_path) if "loss" in line][0]
    assert first["old_distance"] == 0
    assert log(tmp_path)[-2]["old_distance"] > 0
