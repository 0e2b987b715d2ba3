"""The policy on a pipeline: what it leaves there, and what a second one finds."""

import logging

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState

from trl_tafs.cli.arguments import ScriptArguments, load_pipeline
from trl_tafs.policy.lora import adapter_state_dict
from trl_tafs.training.checkpoint_files import CheckpointError

SMALL = {"mixed_precision": "bf16", "sample_num_steps": 2, "sample_num_batches_per_epoch": 1, "num_generations": 4}
SHARED = {"model_cpu_offload": True, "vae_tiling": True, "train_gradient_checkpointing": True}


def weights(trainer):
    return adapter_state_dict(trainer.sd_pipeline.denoiser, trainer.policy.adapter_name)


def autocast_dtypes(trainer):
    """Dtypes of the denoiser's inner activations in one evaluation through the prepared model."""
    seen = set()
    layer = trainer.sd_pipeline.denoiser.transformer_blocks[0].attn.to_q
    handle = layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    conditioning = trainer.encode(["two"])
    trainer.policy.velocity(torch.randn(1, 1, 8, 8), torch.ones(1), conditioning)
    handle.remove()
    return seen


def test_libraries_say_nothing_at_a_start(pipeline_folder, tmp_path, recwarn):
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        for precision in ("bf16", "no"):  # loaded in bfloat16, and cast to it
            pipeline = load_pipeline(ScriptArguments(pretrained_model=str(pipeline_folder)), precision)
            tiny.trainer(pipeline, tmp_path / precision, mixed_precision="bf16")
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert [*said, *(str(warning.message) for warning in recwarn)] == []


def test_a_pipeline_is_left_as_it_was_found(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=1, **SHARED)
    trainer.train()
    assert not pipeline.denoiser.is_gradient_checkpointing
    assert not pipeline.vae.use_tiling
    second = tiny.trainer(pipeline, tmp_path / "second")
    assert not second.policy.devices.shared and second.policy.devices is not trainer.policy.devices
    assert not {"encoding", "decoding"} & vars(pipeline).keys()


def test_checkpointing_and_tiling_that_were_on_stay_on(pipeline, tmp_path):
    pipeline.denoiser.enable_gradient_checkpointing()
    pipeline.vae.enable_tiling()
    tiny.trainer(pipeline, tmp_path, num_epochs=1, **SHARED).train()
    assert pipeline.denoiser.is_gradient_checkpointing and pipeline.vae.use_tiling


def test_a_second_trainer_on_the_pipeline_has_its_own_autocast_and_no_more(pipeline_folder, tmp_path):
    pipeline = tiny.load(pipeline_folder)
    first = tiny.trainer(pipeline, tmp_path / "a", **SMALL, num_epochs=1)
    first.train()
    second = tiny.trainer(pipeline, tmp_path / "b", **SMALL, num_epochs=1)
    assert autocast_dtypes(second) == {torch.bfloat16}
    depth, forward = 0, pipeline.denoiser.forward
    while hasattr(forward, "__wrapped__"):
        depth, forward = depth + 1, forward.__wrapped__
    fresh = tiny.load(pipeline_folder)
    tiny.trainer(fresh, tmp_path / "c", **SMALL)
    expected, forward = 0, fresh.denoiser.forward
    while hasattr(forward, "__wrapped__"):
        expected, forward = expected + 1, forward.__wrapped__
    assert depth == expected > 0, "one wrapper, not two"


def test_a_resume_on_the_same_pipeline_is_the_same_run(pipeline_folder, tmp_path):
    straight = tiny.trainer(tiny.load(pipeline_folder), tmp_path / "straight", **SMALL, num_epochs=2)
    straight.train()
    pipeline = tiny.load(pipeline_folder)
    tiny.trainer(pipeline, tmp_path / "halves", **SMALL, num_epochs=1).train()
    resumed = tiny.trainer(pipeline, tmp_path / "halves", **SMALL, num_epochs=2, resume_from="latest")
    resumed.train()
    assert all(torch.equal(value, weights(resumed)[key]) for key, value in weights(straight).items())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"train_use_ema": True}, {}, r"has a state 'average', and this run takes none \(train_use_ema\)"),
        (
            {},
            {"objective": "forward", "old_policy_decay": 0.5},
            r"has no state 'old_policy', and this run needs one \(old_policy_decay\)",
        ),
        (
            {"train_use_ema": True},
            {"per_prompt_stat_tracking": True, "train_use_ema": True},
            r"has no state 'stat_tracker', and this run needs one \(per_prompt_stat_tracking\)",
        ),
    ],
)
def test_a_checkpoint_of_other_states_names_what_is_missing(pipeline_folder, tmp_path, before, after, message):
    tiny.trainer(tiny.load(pipeline_folder), tmp_path, num_epochs=1, **before).train()
    with pytest.raises(CheckpointError, match=message):
        tiny.trainer(tiny.load(pipeline_folder), tmp_path, resume_from="latest", **after)


def test_a_checkpoint_of_another_lora_is_refused_before_anything_is_loaded(pipeline_folder, tmp_path):
    tiny.trainer(tiny.load(pipeline_folder), tmp_path, num_epochs=1).train()
    for changes, message in (
        ({"lora_rank": 2, "lora_alpha": 4}, "has a LoRA of rank 4 on .*this run's is of 2; resume with the lora_rank"),
        (
            {"lora_alpha": 16},
            "strength 2 on .*this run's is 4: it would act 2 times as strongly.*adapter_name_or",
        ),
        ({"lora_target_modules": ["attn.to_q"]}, "has a LoRA on .* layers, and this run on .*lora_target_modules"),
        ({"full_finetuning": True}, "holds a LoRA, and this run trains the whole denoiser.*full_finetuning=False"),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(CheckpointError, match=message):
            tiny.trainer(tiny.load(pipeline_folder), tmp_path, resume_from="latest", **changes)
