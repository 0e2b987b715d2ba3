"""The example scripts as users run them, and a script with the structure of TRL's last DDPO example."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import tiny
import torch
from scripts import run_script
from transformers import HfArgumentParser

DIGITS = tiny.ROOT / "examples" / "digits"


def test_train_sd3_by_accelerate_launch_on_the_embedded_pipeline(tmp_path):
    """In processes of its own, as users start it."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "examples/train_sd3.py"]
    options = ["--config", "examples/configs/digits.yaml", "--num_epochs", "2", "--eval_freq", "1"]
    options += ["--sample_batch_size", "32", "--train_batch_size", "32", "--eval_images_per_prompt", "1"]
    options += ["--reward", "examples/digits/digits_judges.py:DigitReward=2.0", "jpeg_compressibility=0.01"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [*launch, *options, "--logdir", str(tmp_path)], capture_output=True, text=True, cwd=tiny.ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "digits" / "metrics.jsonl").read_text().splitlines()]
    assert any("rewards/DigitReward/mean" in line and "rewards/jpeg_compressibility/mean" in line for line in lines)
    assert sum("eval/annealed_4/HeldOutJudge" in line for line in lines) == 3
    assert (tmp_path / "digits" / "adapter" / "pytorch_lora_weights.safetensors").exists()


def test_train_sd3_takes_the_options_of_rewards():
    command = ["--config", "examples/configs/digits.yaml", "--reward_options", '{"absent": {}}']
    with pytest.raises(ValueError, match="reward_options are for absent"):
        run_script("examples/train_sd3.py", *command)


def test_quickstart_writes_what_it_promises(tmp_path, capsys):
    run_script(DIGITS / "quickstart.py", "--epochs", 1, "--images_per_digit", 2, "--output_dir", tmp_path)
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    for when in ("before", "after"):
        for sampler in ("annealed", "ode"):
            for steps in ("2", "4", "8"):
                assert {"reward", "held_out", "fidelity", "diversity"} <= set(summary[when][sampler][steps])
    assert summary["epochs"] == 1 and summary["seed"] == 0 and summary["seconds"] > 0
    for name in ("grid_before.png", "grid_after.png", "curve.png", "adapter/pytorch_lora_weights.safetensors"):
        assert (tmp_path / name).stat().st_size > 0, name
    assert "load_lora_weights" in out and "32 ODE steps, guidance" in out and "further" in out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quickstart_gains_what_the_readme_says(tmp_path, seed):
    run_script(DIGITS / "quickstart.py", "--seed", seed, "--output_dir", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    before, after = (summary[when]["annealed"]["4"] for when in ("before", "after"))
    assert after["reward"] - before["reward"] >= 0.3
    assert after["held_out"] - before["held_out"] >= 0.2


# The structure of TRL's last examples/scripts/ddpo.py: script arguments beside the trainer's config, a prompt
# function, a reward of uint8 images, a hook that logs the last batch, save and push at the end. What differs from it
# is what its users change: imports, the pipeline's constructor, the closing lines.


@dataclass
class DDPOScriptArguments:
    pretrained_model: str = field(default="", metadata={"help": "the pretrained model to use"})
    pretrained_revision: str = field(default="main", metadata={"help": "the revision"})
    use_lora: bool = field(default=True, metadata={"help": "Whether to use LoRA."})


ANIMALS = ["one", "two", "three", "four"]


def prompt_fn():
    import numpy as np

    return np.random.choice(ANIMALS), {}


def size_scorer():
    def _fn(images, prompts, metadata):
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
        return images.float().mean((1, 2, 3)), {}

    return _fn


def image_outputs_logger(image_data, global_step, accelerate_logger):
    result = {}
    images, prompts, _, rewards, _ = image_data[-1]
    for i, image in enumerate(images):
        prompt, reward = prompts[i], rewards[i].item()
        result[f"{prompt:.25} | {reward:.2f}"] = image.unsqueeze(0).float()
    accelerate_logger.log_images(result, step=global_step)


def test_a_ddpo_script_runs_after_its_imports_pipeline_and_last_lines_are_changed(pipeline_folder, tmp_path):
    parser = HfArgumentParser((DDPOScriptArguments, tiny.TAFSGRPOConfig))
    script_args, training_args = parser.parse_args_into_dataclasses(
        [
            *(
                "--pretrained_model",
                str(pipeline_folder),
                "--num_epochs",
                "2",
                "--train_gradient_accumulation_steps",
                "1",
            ),
            *(
                "--sample_num_steps",
                "4",
                "--sample_batch_size",
                "6",
                "--train_batch_size",
                "3",
                "--log_with",
                "tensorboard",
            ),
            *("--sample_num_batches_per_epoch", "4", "--per_prompt_stat_tracking", "True", "--mixed_precision", "no"),
            *("--per_prompt_stat_tracking_buffer_size", "32", "--tracker_project_name", "stable_diffusion_training"),
        ]
    )
    training_args.project_kwargs = {
        "logging_dir": str(tmp_path / "logs"),
        "automatic_checkpoint_naming": True,
        "total_limit": 5,
        "project_dir": str(tmp_path / "save"),
    }
    pipeline = tiny.TAFSStableDiffusion3Pipeline.from_pretrained(script_args.pretrained_model)
    trainer = tiny.TAFSGRPOTrainer(
        training_args, size_scorer(), prompt_fn, pipeline, image_samples_hook=image_outputs_logger
    )
    trainer.train()
    trainer.save_model(tmp_path / "model")
    assert (tmp_path / "model" / "pytorch_lora_weights.safetensors").exists()
    assert list((tmp_path / "logs").rglob("events*")), "images went to tensorboard"
    assert len(list((tmp_path / "save" / "checkpoints").iterdir())) == 2


def test_what_the_examples_import_is_there():
    wanted = set()
    for path in sorted((tiny.ROOT / "examples").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl_tafs":
                wanted |= {(path.name, node.module, alias.name) for alias in node.names}
    assert len(wanted) > 50
    missing = [item for item in sorted(wanted) if not _is_there(*item[1:])]
    assert not missing


def _is_there(module, name):
    found = importlib.import_module(module)
    return hasattr(found, name) or (hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}"))
