"""`trl-tafs doctor`: the arguments of `train`, a report, an exit code, and nothing that moves."""

import json

import pytest
import tiny

from trl_tafs.cli.main import main
from trl_tafs.cli.train import train


@pytest.fixture
def command(pipeline_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "mine.py").write_text(
        "def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
        "def flat(images, prompts, metadata):\n    return [0.5] * len(images)\n"
    )
    (tmp_path / "config.yaml").write_text(
        f"pretrained_model: {pipeline_folder}\nprompts: {tmp_path}/prompts.txt\nlogdir: {tmp_path}\nrun_name: run\n"
        "mixed_precision: 'no'\nsample_batch_size: 4\nsample_num_batches_per_epoch: 2\nnum_generations: 4\n"
        "train_batch_size: 4\nnum_epochs: 1\nlora_rank: 4\ndisable_tqdm: true\nsample_grid_freq: 0\n"
    )
    return ["--config", str(tmp_path / "config.yaml"), "--reward", f"{tmp_path}/mine.py:bright=1.0"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_takes_the_word_of_train_reports_and_touches_no_run(command, tmp_path, capsys):
    train(command)()  # a run whose folder, checkpoint and log lie where the doctor's would
    before = contents(tmp_path)
    capsys.readouterr()
    report = tmp_path / "report.json"
    for arguments in (command, [*command, "--resume_from", "latest", "--num_epochs", "3"]):
        assert main(["doctor", *arguments, "--json", str(report)]) == 0
        told, values = capsys.readouterr().out, json.loads(report.read_text())
        assert "8 images: 2 prompts x 4; 1 optimizer step an epoch" in told
        assert values["healthy"] and values["findings"] == [] and values["rewards"][0]["name"] == "bright"
        report.unlink()
        assert contents(tmp_path) == before
    assert values["time"]["epochs"] == 2, "it resumed: one epoch of three is done"


def test_what_is_wrong_is_told_and_the_exit_code_says_so(command, tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = [*command[:-1], f"{tmp_path}/mine.py:flat=1.0", "--json", str(report)]
    assert main(["doctor", *arguments]) == 1
    told = capsys.readouterr().out
    assert "ERROR      reward flat is the same for all images of a prompt" in told and told.endswith("not healthy\n")
    assert [found["severity"] for found in json.loads(report.read_text())["findings"]] == ["error"]
    assert main(["doctor", *command[:2], "--sample_num_steps", "1"]) == 1
    assert capsys.readouterr().err.startswith("trl-tafs doctor: sample_num_steps is 1")


def test_a_run_that_cannot_train_ends_in_one_line(command, tmp_path, capsys):
    pipeline = tiny.build_pipeline(0)
    pipeline.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "broken")
    assert main(["train", *command, "--pretrained_model", str(tmp_path / "broken")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("trl-tafs train: the VAE (AutoencoderKL, float32) decoded finite latents to NaN")
