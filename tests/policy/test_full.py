"""The whole denoiser is trained, saved, resumed and loaded in plain diffusers, as a LoRA is."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig

from trl_tafs import evaluate
from trl_tafs.cli.main import main
from trl_tafs.hub.card import usage_code
from trl_tafs.policy.adapter_file import WEIGHT_NAME
from trl_tafs.policy.fingerprint import fingerprint

FULL = {"full_finetuning": True, "train_learning_rate": 1e-3, "beta": 0.1}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.sd_pipeline.transformer.named_parameters()}


def drawn(trainer, velocity=None):
    drawer = replace(trainer.drawer, velocity=velocity or trainer.policy.velocity)
    return drawer.images(trainer.draw_spec("annealed", 4), ["two"], [0])


@pytest.fixture
def trained(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path / "run", num_epochs=2, **FULL)
    trainer.at_first = drawn(trainer)
    trainer.train()
    return trainer


def test_all_of_it_moves_its_base_is_kept_and_diffusers_draws_the_same(trained, pipeline_folder):
    base = SD3Transformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
    now = weights(trained)
    moved = [name for name, p in base.named_parameters() if not torch.equal(p, now[name])]
    assert len(moved) > 0.9 * len(now)
    assert torch.equal(drawn(trained, trained.policy.reference), trained.at_first)
    ours = drawn(trained)
    assert not torch.equal(ours, trained.at_first)

    folder = Path(trained.config.project_dir) / "adapter"
    assert not (folder / WEIGHT_NAME).exists()
    stock = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    assert all(torch.equal(p, now[name]) for name, p in stock.named_parameters())
    facts = trained.publisher.facts(folder, None)
    scope = {}
    code = usage_code(facts, base=str(pipeline_folder), adapter=str(folder)).replace('image.save("image.png")', "")
    exec(compile(code, "card", "exec"), scope)
    assert type(scope["pipe"]) is StableDiffusion3Pipeline and scope["image"].size == (8, 8)
    assert "fine-tuned denoiser" in (folder / "README.md").read_text()
    assert facts.pictures, "before and after"


def test_the_command_and_the_evaluation_take_it_as_an_adapter(trained, pipeline_folder, tmp_path):
    folder = Path(trained.config.project_dir) / "adapter"
    model = ["--pretrained_model", str(pipeline_folder), "--dtype", "float32"]
    for name, source in (("base", "none"), ("ours", str(folder))):
        assert main(["sample", source, *model, "--prompt", "two", "--output", str(tmp_path / f"{name}.png")]) == 0
    base, ours = ((tmp_path / f"{name}.png").read_bytes() for name in ("base", "ours"))
    assert base != ours

    pipeline = tiny.load(pipeline_folder)
    before = {name: p.clone() for name, p in pipeline.transformer.named_parameters()}
    judge = {"brightness": lambda images, prompts, metadata: images.mean((1, 2, 3))}
    models = {"base": pipeline, "ours": (pipeline, str(folder)), "again": pipeline}
    found = evaluate(models, ["two", "six"], judge, tmp_path / "out")
    means = [row.metrics["brightness"].mean for row in found.rows]
    assert means[0] == means[2] != means[1], "and the base is there again afterwards"
    assert all(torch.equal(p, before[name]) for name, p in pipeline.transformer.named_parameters())
    assert fingerprint(str(folder)) != fingerprint(str(pipeline_folder)), "known by its weights"


def test_a_resumed_run_is_the_whole_run(trained, pipeline_folder, tmp_path):
    half = tiny.trainer(tiny.load(pipeline_folder), tmp_path / "half", num_epochs=2, **FULL)
    half.train(epochs=1)
    AcceleratorState._reset_state(reset_partial_state=True)
    rest = tiny.trainer(tiny.load(pipeline_folder), tmp_path / "half", num_epochs=2, resume_from="latest", **FULL)
    rest.train()
    one, two = weights(trained), weights(rest)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_it_cannot_be_combined_with_is_said(pipeline, tmp_path):
    with pytest.raises(ValueError, match="full_finetuning trains no LoRA.*leave out model_cpu_offload"):
        tiny.config(tmp_path, full_finetuning=True, model_cpu_offload=True)
    with pytest.raises(ValueError, match="leave out the LoraConfig"):
        tiny.trainer(pipeline, tmp_path, peft_config=LoraConfig(target_modules=["to_q"]), **FULL)
    pipeline.transformer.is_quantized = True
    with pytest.raises(ValueError, match="can't train a quantized denoiser"):
        tiny.trainer(pipeline, tmp_path / "other", **FULL)
