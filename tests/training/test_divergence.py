"""A run that makes NaN or infinity stops, says which part made it, and keeps the checkpoints that are good."""

import json
import math

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_tafs import NonFiniteError, TAFSGRPOTrainer
from trl_tafs.method.noise import SampleNoise
from trl_tafs.method.rollout import rollout
from trl_tafs.rewards.jpeg import jpeg_compressibility
from trl_tafs.training.logs import MeanMetrics

NAN = float("nan")


def log(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def spoil(module, name, value=NAN):
    """Give the first number of a weight another value."""
    dict(module.named_parameters())[name].data.view(-1)[0] = value


def saved(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("*")) if folder.exists() else []


def test_a_vae_that_decodes_to_nan_stops_before_the_first_epoch(pipeline, tmp_path):
    seen = []
    spoil(pipeline.vae, "decoder.conv_in.weight")
    with pytest.raises(NonFiniteError, match="VAE .* decoded finite latents to NaN"):
        tiny.trainer(pipeline, tmp_path, reward=lambda images, p, m: seen.append(images)).train()
    assert not seen


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_vae_that_decodes_to_nan_stops_the_first_epoch_before_a_reward_sees_it(pipeline, tmp_path, asynchronous):
    seen = []

    def size(images, prompts, metadata):
        seen.append(images)
        return jpeg_compressibility(images, prompts, metadata)

    spoil(pipeline.vae, "decoder.conv_in.weight")
    settings = {"async_reward_computation": asynchronous, "preflight_rollout": False}
    trainer = tiny.trainer(pipeline, tmp_path, reward=size, **settings)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    said = str(caught.value)
    assert said.startswith("epoch 0, step 0: the VAE (AutoencoderKL, float32) decoded finite latents to NaN")
    assert "its weight decoder.conv_in.weight isn't finite: the base model is damaged" in said
    assert said.endswith("No checkpoint was written")
    assert len(seen) == 1 and seen[0].isfinite().all(), "the preflight's noise alone"
    assert not saved(tmp_path) and not (tmp_path / "adapter").exists() and not (tmp_path / "pending").exists()


def test_an_overflow_in_float16_is_named_with_the_dtype_that_helps(pipeline, tmp_path):
    pipeline.vae.half()
    pipeline.vae.decoder.conv_out.weight.data.fill_(3e4)  # no weight is infinite, the pixels are
    trainer = tiny.trainer(pipeline, tmp_path)
    with pytest.raises(NonFiniteError, match=r"VAE \(AutoencoderKL, float16\) .* load the VAE in float32"):
        trainer.train()


def test_a_denoiser_s_nan_is_named_with_its_weight_and_evaluation(pipeline, tmp_path):
    spoil(pipeline.transformer, "proj_out.weight")
    trainer = tiny.trainer(pipeline, tmp_path)
    name = r"its weight proj_out.weight isn't finite: the base"
    with pytest.raises(NonFiniteError, match=rf"denoiser \(SD3\w+, float32\) .*infinity in evaluation 1 of 4: {name}"):
        trainer.train()


def test_a_text_encoder_s_nan_is_named_with_the_prompt(pipeline, tmp_path):
    spoil(pipeline.text_encoder, "text_model.final_layer_norm.weight")
    trainer = tiny.trainer(pipeline, tmp_path)
    with pytest.raises(
        NonFiniteError, match="text encoders .* of the prompt 'a handwritten seven': its weight text_enc"
    ):
        trainer.train()


class Spoiled(TAFSGRPOTrainer):
    """Its first trained weight becomes NaN at the end of an epoch, or in its hook."""

    at = 1

    def spoil(self):
        self.policy.parameters[0].data.view(-1)[0] = NAN

    def step(self, epoch, global_step):
        done = super().step(epoch, global_step)
        if epoch == self.at:
            self.spoil()
        return done


def spoiled(pipeline, folder, hook=None, **changes):
    settings = {"num_epochs": 4, "num_checkpoint_limit": 1, "eval_prompts": ["one"], **changes}
    prompts = settings.pop("eval_prompts")
    config = tiny.config(folder, **settings)
    return Spoiled(config, tiny.brightness, tiny.prompts, pipeline, hook, eval_prompts=prompts)


def test_weights_that_became_nan_are_written_nowhere(pipeline, tmp_path):
    trainer = spoiled(pipeline, tmp_path)
    with pytest.raises(NonFiniteError, match=r"after 2 epochs: the run has diverged: trained weights \(.*lora_A") as e:
        trainer.train()
    assert "lower train_learning_rate (0.0003)" in str(e.value) and "checkpoint_000001: change the" in str(e.value)
    assert saved(tmp_path) == ["checkpoint_000001"] and not (tmp_path / "adapter").exists()
    for write in (trainer.save_pretrained, trainer.save_checkpoint, lambda: trainer.checkpoints.save_best(2, "m", 1.0)):
        with pytest.raises(NonFiniteError, match="the run has diverged"):
            write()
    assert saved(tmp_path) == ["checkpoint_000001"]
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "best").exists()
    with pytest.raises(NonFiniteError, match=r"evaluation: the denoiser .* its trained weight .*lora_A.* has diverged"):
        trainer.evaluate(2)
    weights = tiny.trainer(tiny.load(pipeline.config._name_or_path), tmp_path, resume_from="latest").policy.parameters
    assert all(weight.isfinite().all() for weight in weights)


def test_weights_that_became_nan_before_an_update_are_found_after_it(pipeline, tmp_path):
    trainer = spoiled(pipeline, tmp_path, hook=lambda *args: trainer.spoil(), num_epochs=1)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(NonFiniteError, match="epoch 0: the run has div"):
        trainer.train()
    assert not saved(tmp_path) and not (tmp_path / "adapter").exists()


def test_copies_of_the_weights_are_looked_at_too(pipeline, tmp_path):
    policy = tiny.trainer(pipeline, tmp_path, train_use_ema=True, old_policy_decay=0.5).policy
    assert policy.is_finite()
    for copy in (policy.average.weights, policy.old.weights):
        before = copy[1].clone()
        copy[1].view(-1)[0] = math.inf
        assert not policy.is_finite() and policy.non_finite_name() is None
        copy[1].copy_(before)
    assert policy.is_finite()


def test_a_learning_rate_that_is_far_too_high_stops_after_k_left_out_steps(pipeline, tmp_path):
    trainer = tiny.trainer(
        pipeline, tmp_path, train_learning_rate=1e6, num_epochs=40, num_checkpoint_limit=2, train_max_skipped_steps=3
    )
    with pytest.warns(UserWarning, match="left out"), pytest.raises(NonFiniteError) as caught:
        trainer.train()
    assert "3 optimizer steps in a row were left out" in str(caught.value)
    assert "lower train_learning_rate (1e+06)" in str(caught.value)
    skipped = log(tmp_path, "skipped_steps")
    assert skipped == [1.0, 2.0], "the third stops before it is logged"
    assert trainer.progress.epoch < 10 and not (tmp_path / "adapter").exists()
    assert len(saved(tmp_path)) <= 2 and max(saved(tmp_path)) <= f"checkpoint_{trainer.progress.epoch - 2:06d}"


class HostCopies(TorchDispatchMode):
    """Counts the numbers that the host waits for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def copies(work):
    with HostCopies() as counted:
        work()
    return counted.count


def test_the_checks_cost_one_host_copy_a_rollout_batch_and_one_an_optimizer_step(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path)
    sampler, algorithm, policy = trainer.collector.sampler, trainer.algorithm, trainer.policy
    prompts = trainer.prompts.batch(0, 1, 8)
    noise = SampleNoise(1, 0, tuple(range(8)), algorithm.levels.device)
    conditioning, initial = sampler.encode(prompts.prompts), noise("initial", 0, algorithm.latent_shape)
    rest = conditioning, algorithm.levels, initial, noise
    bare = copies(lambda: rollout(policy.velocity, algorithm.kernel, *rest))
    assert copies(lambda: sampler.roll_out(prompts, 0)) == bare + 1

    def step(take):
        for parameter in policy.parameters:
            parameter.grad = torch.zeros_like(parameter)
        return copies(take)

    def alone():
        policy.clip_gradients()
        policy.step()

    step(alone)  # makes Adam's state
    assert step(lambda: trainer.updater._step(MeanMetrics(), 0)) == step(alone) + 1
