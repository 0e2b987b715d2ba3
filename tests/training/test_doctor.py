"""What the doctor finds, what it leaves behind (nothing), and what it says of a run that is well."""

import copy
import json
import random

import families
import numpy as np
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState

from trl_tafs.method.types import RewardTable
from trl_tafs.training.checks import noise_shares, reward_facts
from trl_tafs.training.findings import Estimate
from trl_tafs.training.plan import plan_epoch

ALL = ("prompts", "velocities", "pictures", "rewards", "gradients", "weights after an update")


def found(report):
    """Severity, first words and remedy of each finding."""
    return [(f.severity, f.what, f.remedy) for f in report.findings]


def only(report, severity, what, remedy):
    """The one finding, which says that."""
    ((found_severity, found_what, found_remedy),) = found(report)
    assert (found_severity, report.healthy) == (severity, severity == "warning")
    assert what in found_what and remedy in found_remedy, (found_what, found_remedy)
    assert f"{severity.upper():10} {found_what.split()[0]}" in str(report)
    assert f"change     {found_remedy.split()[0]}" in str(report)


# A run that is well -------------------------------------------------------------------------------------------


def test_a_healthy_run_has_no_findings_and_its_report_says_what_was_seen(pipeline, tmp_path):
    trainer = tiny.trainer(
        pipeline, tmp_path, train_lr_scheduler_type="constant_with_warmup", train_lr_warmup_steps=1, num_epochs=7
    )
    report = trainer.doctor()
    assert report.healthy and report.findings == () and report.finite == ALL
    assert report.epoch == "16 images: 2 prompts x 8; 1 optimizer step an epoch"
    assert (report.images, report.groups) == (8, 2)
    assert (report.drift.kind, report.drift.value) == ("ratio", 0.0), "on policy to the bit, in float32"
    gradients = report.gradients
    assert gradients.missing == () and gradients.dead == 2, "the last block's add_q_proj: its A and its B"
    assert gradients.reached == gradients.expected and gradients.expected["lora_A"] == gradients.expected["lora_B"] > 0
    (reward,) = report.rewards
    assert reward.name == "brightness" and reward.least < reward.mean < reward.most and reward.group_std > 0
    assert (reward.noise, reward.still_groups, reward.no_score) == (0.0, 0.0, 0.0)
    assert report.time.phases.keys() == {"rollout", "decode", "reward", "update"} and report.time.epochs == 7
    values = json.loads(report.to_json())
    assert values["healthy"] and values["gradients"]["dead"] == 2 and values["time"]["hours"] == report.time.hours
    told = str(report)
    assert report.epoch in told and "max |ratio - 1| is 0" in told and told.endswith("in the way of training")


@pytest.mark.parametrize("name", ["flux-dev", "qwen-image", "sana"])
def test_a_healthy_run_of_a_family_has_no_findings(name, tmp_path):
    size = families.FAMILIES[name].size
    trainer = tiny.trainer(
        families.ours(families.stock(name), name),
        tmp_path,
        height=size,
        width=size,
        sample_batch_size=4,
        train_batch_size=4,
        num_generations=4,
        objective="forward",
        max_sequence_length=families.LENGTH,
    )
    report = trainer.doctor()
    assert found(report) == [] and report.finite == ALL
    assert report.drift.kind == "prediction" and report.drift.value == 0.0
    assert report.gradients.missing == ()


NO_TRACE = {
    "averages-and-statistics": {
        "train_use_ema": True,
        "per_prompt_stat_tracking": True,
        "per_prompt_stat_tracking_min_count": 2,
        "train_num_inner_epochs": 2,
        "train_lr_scheduler_type": "constant_with_warmup",
        "train_lr_warmup_steps": 2,
        "async_reward_computation": True,
    },
    "old-policy-offload": {
        "objective": "forward",
        "old_policy_decay": 0.5,
        "model_cpu_offload": True,
        "train_gradient_checkpointing": True,
        "group_allocation": "variance",
    },
    "full-bf16": {"full_finetuning": True, "train_learning_rate": 1e-3, "beta": 0.1, "mixed_precision": "bf16"},
}
SMALL = {"sample_batch_size": 4, "train_batch_size": 4, "num_generations": 4, "save_freq": 0, "num_epochs": 2}


def whole_state(trainer):
    """Everything that moves, as one flat list of tensors and values."""
    states = trainer.policy.states() | trainer.algorithm.states()
    items = [p.detach().clone() for p in trainer.policy.parameters]
    items += [copy.deepcopy({name: state.state_dict() for name, state in states.items()})]
    items += [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
    return items


def same(a, b):
    """Whether two nested states are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("name", NO_TRACE)
def test_it_leaves_no_trace(pipeline_folder, tmp_path, name):
    def reward(images, prompts, metadata):  # draws from the generators that a user's code draws from
        noise = torch.rand(()) + np.random.rand() + random.random()
        return images.mean((1, 2, 3)) + 0.001 * noise

    def run(folder, visits):
        AcceleratorState._reset_state()
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        prompts = ["one", "two", "three"]
        trainer = tiny.trainer(tiny.load(pipeline_folder), folder, reward, prompts, **SMALL, **NO_TRACE[name])
        for epoch in (0, 1):
            if epoch in visits:
                before, files = whole_state(trainer), sorted(folder.rglob("*"))
                assert trainer.doctor().finite == ALL
                assert sorted(folder.rglob("*")) == files
                assert same(whole_state(trainer), before)
            trainer.progress.global_step = trainer.step(epoch, trainer.progress.global_step)
            trainer.progress.epoch = epoch + 1
        return whole_state(trainer)

    # before anything, and in the middle, where optimizer, averages and statistics aren't empty
    assert same(run(tmp_path / "visited", (0, 1)), run(tmp_path / "plain", ()))


# What is wrong ------------------------------------------------------------------------------------------------


def test_a_vae_that_decodes_to_nan_is_named_and_stops_the_training_too(pipeline, tmp_path):
    pipeline.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    trainer = tiny.trainer(pipeline, tmp_path)
    report = trainer.doctor()
    only(report, "error", "the VAE (AutoencoderKL, float32) decoded finite latents to NaN", "download it again")
    assert report.finite == ("prompts",) and report.gradients is None and report.time is None


def test_a_denoiser_and_a_text_encoder_that_overflow_are_named(pipeline, pipeline_folder, tmp_path):
    pipeline.transformer.proj_out.weight.data.fill_(float("inf"))
    only(tiny.trainer(pipeline, tmp_path / "a").doctor(), "error", "its weight proj_out.weight isn't", "download")
    pipeline = tiny.load(pipeline_folder)
    pipeline.text_encoder_3.shared.weight.data.fill_(float("inf"))
    only(tiny.trainer(pipeline, tmp_path / "b").doctor(), "error", "shared.weight isn't finite", "download")


def test_a_vae_that_decodes_to_one_colour_is_named(pipeline, tmp_path):
    pipeline.vae.decoder.conv_out.weight.data.zero_()
    only(tiny.trainer(pipeline, tmp_path).doctor(), "error", "every picture is one flat colour", "the VAE in float32")


def test_a_constant_reward_is_named_and_the_update_is_looked_at_all_the_same(pipeline, tmp_path):
    def constant(images, prompts, metadata):
        return torch.full((len(images),), 0.25)

    trainer = tiny.trainer(pipeline, tmp_path, {"constant": constant})
    report = trainer.doctor()
    only(report, "error", "reward constant is the same for all images of a prompt (0.25 to 0.25", "two different")
    assert report.gradients.missing == () and report.rewards[0].still_groups == 1.0
    beside = trainer.collector.sampler.rewards = type(trainer.rewards)({"constant": constant, "b": tiny.brightness})
    trainer.preflight.rewards = beside
    only(trainer.doctor(), "warning", "reward constant is the same", "call constant")


def test_a_reward_that_is_noise_is_named_with_its_share(pipeline, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def rewards(scale):
        def noise(images, prompts, metadata):
            return images.mean((1, 2, 3)) + scale * torch.randn(len(images), generator=generator)

        return noise

    trainer = tiny.trainer(pipeline, tmp_path, rewards(1.0), sample_batch_size=16, sample_num_batches_per_epoch=1)
    report = trainer.doctor()
    only(report, "error", "reward noise scores the same images otherwise the second time", "make noise deterministic")
    assert report.rewards[0].noise > 0.5
    spread = report.rewards[0].group_std  # of the noise alone, 1
    assert 0.5 < spread < 2


def test_a_reward_without_scores_or_that_raises_is_a_finding(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, {"mute": lambda images, prompts, metadata: [None] * len(images)})
    only(trainer.doctor(), "error", "reward mute gave no score", "call mute on one image")

    def down(images, prompts, metadata):
        if len(images) > 2:
            raise ConnectionError("judge is down")
        return images.mean((1, 2, 3))

    trainer.preflight.rewards = trainer.collector.sampler.rewards = type(trainer.rewards)({"down": down})
    only(trainer.doctor(), "error", "reward 'down' raised ConnectionError: judge is down", "call the reward")


def test_a_lora_that_nothing_reaches_is_named(pipeline, tmp_path):
    pipeline.transformer.unused = torch.nn.Linear(4, 4)
    trainer = tiny.trainer(pipeline, tmp_path, lora_target_modules=["attn.to_q", "attn.to_k", "unused"])
    report = trainer.doctor()
    only(report, "error", "no gradient reaches 2 trained weights: unused.lora_A, unused.lora_B", "lora_target_modules")
    cut = pipeline.transformer.transformer_blocks[0].attn.to_k
    cut.register_forward_hook(lambda module, inputs, output: output.detach())
    assert "transformer_blocks.0.attn.to_k.lora_A" in trainer.doctor().gradients.missing


def test_a_frozen_lora_is_named(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path)
    pipeline.transformer.transformer_blocks[0].attn.to_q.lora_B["default"].weight.requires_grad_(False)
    report = trainer.doctor()
    ((severity, what, remedy), *_) = found(report)
    assert severity == "error" and "1 trained weights are frozen" in what and "requires_grad_(True)" in remedy
    assert "transformer_blocks.0.attn.to_q.lora_B" in what


@pytest.mark.parametrize(("objective", "kind"), [("clipped", "ratio"), ("forward", "prediction")])
def test_a_replay_that_rounds_otherwise_is_named_with_its_share_of_the_clip_range(pipeline, tmp_path, objective, kind):
    trainer = tiny.trainer(
        pipeline, tmp_path, objective=objective, sample_batch_size=16, sample_num_batches_per_epoch=1
    )

    def stretch(module, arguments, keywords):  # the rollout's batches are larger than the replay's
        if len(keywords["hidden_states"]) == trainer.config.train_batch_size:
            keywords["hidden_states"] = 1.5 * keywords["hidden_states"]
        return arguments, keywords

    pipeline.transformer.register_forward_pre_hook(stretch, with_kwargs=True)
    report = trainer.doctor()
    assert report.drift.kind == kind and report.drift.share > 0.05
    ((severity, what, remedy),) = found(report)
    assert "the update doesn't see the policy that sampled" in what and report.drift.line() in what
    assert "sample_batch_size=16 and train_batch_size=8 are two" in remedy
    if kind == "ratio":
        assert f"{report.drift.share:.1%} of the clip range" in what
        assert report.drift.share == report.drift.value / trainer.algorithm.clip_range


def test_a_learning_rate_that_breaks_the_weights_is_named(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, train_learning_rate=1e30)
    report = trainer.doctor()
    only(report, "error", "aren't finite after an optimizer step", "lower train_learning_rate, which is 1e+30")
    assert trainer.progress.skipped_steps == 0, "the run has left out none"


def test_an_error_of_the_user_s_own_loss_is_a_finding(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path)
    trainer.compute_loss = lambda items, conditioning: items.no_such_field
    only(trainer.doctor(), "error", "the update raised AttributeError", "repair the update")
    assert all(p.grad is None for p in trainer.policy.parameters)


def test_an_epoch_of_one_prompt_is_a_warning(pipeline, tmp_path):
    report = tiny.trainer(pipeline, tmp_path, num_generations=16).doctor()
    only(report, "warning", "an epoch is a single prompt, with 16 images", "lower num_generations")
    assert report.groups == 1


# The arithmetic -----------------------------------------------------------------------------------------------


def test_an_epoch_s_time_is_scaled_from_the_images_that_were_drawn():
    seconds = {"rollout": 2.0, "decode": 1.0, "reward": 1.0, "update": 4.0}
    estimate = Estimate.scaled(seconds, images=8, epoch_images=96, passes=2, epochs=100)
    assert estimate.phases == {"rollout": 24.0, "decode": 12.0, "reward": 12.0, "update": 96.0}
    assert (estimate.epoch_seconds, estimate.hours) == (144.0, 4.0)
    assert "144 s an epoch" in estimate.line() and "4 hours for 100 epochs" in estimate.line()
    assert "2.4 minutes for 1 epochs" in Estimate(estimate.phases, 1).line()


def test_the_share_of_noise_is_that_of_the_variance_within_groups():
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(50).repeat_interleave(20)
    signal = torch.randn(1000, generator=generator) + 100 * ids  # what differs between prompts doesn't count
    noise = 0.5 * torch.randn(2, 1000, generator=generator)
    first, second = (torch.stack([signal + part, signal, part * 0], 1) for part in noise)
    mixed, none, constant = noise_shares(first, second, ids)
    assert mixed == pytest.approx(0.25 / 1.25, abs=0.02) and none == 0.0 and constant is None
    first[::2, 0] = float("nan")  # an image without a score in one of them doesn't count
    assert noise_shares(first, second, ids)[0] == pytest.approx(0.2, abs=0.05)
    assert noise_shares(first[:2] * float("nan"), second[:2], ids[:2]) == [None] * 3
    assert noise_shares(first[:1], second[:1], ids[:1]) == [None] * 3, "groups of one have no variance"


def test_the_facts_of_a_reward_are_those_of_its_groups():
    values = torch.tensor([1.0, 3.0, 5.0, 5.0, float("nan")]).reshape(5, 1, 1, 1)
    (fact,) = reward_facts(RewardTable(values, ("r",), torch.ones(1)), torch.tensor([0, 0, 1, 1, 1]), noise=[0.5])
    assert (fact.mean, fact.least, fact.most, fact.still_groups, fact.no_score) == (3.5, 1.0, 5.0, 0.5, 0.2)
    assert fact.group_std == pytest.approx(2**0.5 / 2) and not fact.constant
    assert "50% of it noise; 50% of the groups without variance; no score for 20%" in fact.line()


def test_the_arithmetic_of_an_epoch_in_one_line(tmp_path):
    def line(world, inner=1, **changes):
        return plan_epoch(tiny.config(tmp_path, **changes), world).line(inner)

    assert line(1) == "16 images: 2 prompts x 8; 1 optimizer step an epoch"
    several = {"num_generations": 16, "train_gradient_accumulation_steps": 1}
    assert line(1, 3, **several) == "16 images: 1 prompt x 16; 6 optimizer steps an epoch"
    varying = line(2, group_allocation="variance")
    assert varying == "32 images on 2 processes: 4 prompts x 2 to 32, 8 on the average; 1 optimizer step an epoch"
