"""Kernels, objectives and families of a user's own, named on the command line and in YAML."""

import json
from unittest import mock

import pytest

from trl_tafs.cli.arguments import parse_arguments
from trl_tafs.cli.main import main
from trl_tafs.method.credit import CREDITS
from trl_tafs.method.kernels import KERNELS
from trl_tafs.method.objectives import OBJECTIVES

PARTS = """
from dataclasses import dataclass

from trl_tafs.method.kernels import KERNELS, Sde
from trl_tafs.method.objectives import OBJECTIVES, ClippedObjective
from trl_tafs.method.types import LossOutput


@dataclass(frozen=True)
class Tapered(Sde):
    eta: float = 0.6
    power: float = 1.0

    def diffusion(self, s, s_next):
        return self.eta * s**self.power


@dataclass(frozen=True)
class Scaled(ClippedObjective):
    strength: float = 1.0

    def __call__(self, *args):
        output = super().__call__(*args)
        return LossOutput(self.strength * output.loss, output.metrics)


KERNELS["tapered"], OBJECTIVES["scaled"] = Tapered, Scaled
"""
FAMILY = """
from trl_tafs import TAFSStableDiffusion3Pipeline


class Mine(TAFSStableDiffusion3Pipeline):
    drawn = []

    def denoise(self, model, x, timestep, embeddings):
        self.drawn.append(len(x))
        return super().denoise(model, x, timestep, embeddings)
"""


@pytest.fixture(autouse=True)
def registries():
    """What a test registers is gone after it."""
    with mock.patch.dict(CREDITS), mock.patch.dict(OBJECTIVES), mock.patch.dict(KERNELS):
        yield


@pytest.fixture
def options(pipeline_folder, tmp_path):
    """A tiny run of the user's own kernel and objective, by the fields of a file."""
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    return {
        "pretrained_model": str(pipeline_folder),
        "prompts": str(tmp_path / "prompts.txt"),
        "reward": ["jpeg_compressibility"],
        "logdir": str(tmp_path),
        "run_name": "run",
        "mixed_precision": "no",
        "num_epochs": 1,
        "sample_batch_size": 4,
        "sample_num_batches_per_epoch": 2,
        "train_batch_size": 4,
        "disable_tqdm": True,
        "sample_grid_freq": 0,
        "sample_kernel": "tapered",
        "sampler_kwargs": {"power": 2},
        "objective": "scaled",
    }


def test_parts_of_ones_own_are_trained_from_the_command_line_and_read_back(options, tmp_path, capsys):
    words = [word for name, value in options.items() for word in (f"--{name}", *_words(value))]
    command = [*words, "--objective_kwargs", '{"strength": 2}', "--import", str(tmp_path / "parts.py")]
    assert main(["train", *command]) == 0
    settings = tmp_path / "run" / "adapter" / "training_settings.json"
    written = json.loads(settings.read_text())
    assert (written["sample_kernel"], written["sampler_kwargs"]) == ("tapered", {"power": 2.0})
    # the settings that it wrote are a configuration, for whoever has the parts
    given = ["--config", str(settings), "--import", str(tmp_path / "parts.py"), "--prompts", options["prompts"]]
    _, config = parse_arguments(given)
    assert (config.objective, config.objective_kwargs) == ("scaled", {"strength": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("grad_norm", 0) > 0 for line in lines)


def test_a_file_names_parts_and_a_pipeline_of_ones_own(options, tmp_path):
    (tmp_path / "family.py").write_text(FAMILY)
    file = tmp_path / "config.yaml"
    file.write_text(
        json.dumps(options | {"import": str(tmp_path / "parts.py"), "pipeline_class": f"{tmp_path / 'family.py'}:Mine"})
    )
    assert main(["train", "--config", str(file)]) == 0
    made = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (made["sample_kernel"], made["objective"]) == ("tapered", "scaled")
    from trl_tafs.rewards.loading import find_object

    mine = find_object(f"{tmp_path / 'family.py'}:Mine", "a test")
    assert mine.drawn, "the pipeline that trained is the user's own"
    mine.drawn.clear()
    sample = ["sample", str(tmp_path / "run" / "adapter"), "--pretrained_model", options["pretrained_model"]]
    sample += ["--pipeline_class", f"{tmp_path / 'family.py'}:Mine", "--dtype", "float32", "--prompt", "one"]
    assert main([*sample, "--output", str(tmp_path / "a.png"), "--import", str(tmp_path / "parts.py")]) == 0
    evaluate = ["evaluate", "none", "--pretrained_model", options["pretrained_model"], "--dtype", "float32"]
    evaluate += ["--prompts", options["prompts"], "--reward", "jpeg_compressibility", "--num_steps", "2"]
    evaluate += ["--output_dir", str(tmp_path / "out"), "--pipeline_class", f"{tmp_path / 'family.py'}:Mine"]
    assert main([*evaluate, "--sampler", "ode"]) == 0 and (tmp_path / "out" / "results.md").exists() and mine.drawn


def test_what_is_not_imported_is_not_there(options):
    with pytest.raises(ValueError, match="sample_kernel is 'tapered'; use one of annealed"):
        parse_arguments(["--sample_kernel", "tapered", "--prompts", "x"])


def _words(value):
    if isinstance(value, list):
        return value
    return [json.dumps(value) if isinstance(value, dict) else str(value)]
