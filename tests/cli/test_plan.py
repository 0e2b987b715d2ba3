"""`trl-tafs plan`: from configurations alone, with an exit code for a card that is too small."""

import json

import families
import pytest

from trl_tafs.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of configurations without weights."""
    folder = tmp_path_factory.mktemp("plan") / "model"
    families.stock("sd3").save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


def test_a_plan_needs_no_weights_and_says_whether_it_fits(model, tmp_path, capsys):
    told = ["plan", "--pretrained_model", str(model), "--reward", "jpeg_compressibility", "--mixed_precision", "bf16"]
    sizes = ["--height", "8", "--width", "8", "--sample_batch_size", "4", "--sample_num_batches_per_epoch", "4"]
    sizes += ["--num_generations", "8", "--train_batch_size", "4"]
    assert main([*told, *sizes, "--gpu_memory", "24", "--json", str(tmp_path / "plan.json")]) == 0
    assert "TAFSStableDiffusion3Pipeline, 8 x 8" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert set(plan["phases"]) == {"encode", "rollout", "decode", "update", "step"} and plan["advice"] == []
    assert main([*told, *sizes, "--gpu_memory", "0.5"]) == 1
    assert "the device has 0.50: no setting makes it fit" in capsys.readouterr().out


def test_a_plan_in_shards_is_a_smaller_one(model, capsys, tmp_path):
    told = ["plan", "--pretrained_model", str(model), "--reward", "jpeg_compressibility", "--mixed_precision", "bf16"]
    told += ["--height", "8", "--width", "8", "--num_generations", "8", "--train_batch_size", "4", "--processes", "8"]
    found = []
    for more in ([], ["--fsdp2"]):
        assert main([*told, *more, "--json", str(tmp_path / "plan.json")]) == 0
        found.append(json.loads((tmp_path / "plan.json").read_text())["phases"]["rollout"])
    whole, shards = found
    assert shards["denoiser"] == -(-whole["denoiser"] // 8) and 0 < shards["gathered blocks"] <= whole["denoiser"]
    assert "gathered blocks" in capsys.readouterr().out
    assert main([*told, "--fsdp2", "--full_finetuning", "True"]) == 1
    assert "full_finetuning can't be had while FSDP2 shards" in capsys.readouterr().err
