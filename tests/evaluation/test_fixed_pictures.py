"""Pictures of fixed prompts: the same noise each time, on disk and in the trackers."""

import json

import pytest
import tiny
import torch
from PIL import Image

from trl_tafs import TAFSQwenImageEditPipeline
from trl_tafs.evaluation.fixed_pictures import FixedPictures


def pixels(path):
    with Image.open(path) as image:
        return list(image.convert("RGB").getdata())


def folders(run):
    return sorted(path.name for path in (run / "pictures").glob("epoch_*"))


def test_the_same_noise_each_time_so_that_only_training_changes_them(pipeline, tmp_path):
    trainer = tiny.trainer(
        pipeline, tmp_path, num_epochs=3, picture_freq=2, picture_prompts=["one", "a seven"], train_learning_rate=0.02
    )
    before = torch.get_rng_state()
    trainer.pictures(0, 3, 0)
    assert torch.equal(before, torch.get_rng_state()), "a run draws the same with them and without"
    first = [pixels(tmp_path / "pictures" / "epoch_000000" / f"{i}.png") for i in range(2)]
    trainer.pictures(0, 3, 0)
    assert first == [pixels(tmp_path / "pictures" / "epoch_000000" / f"{i}.png") for i in range(2)]
    assert first[0] != first[1]
    trainer.train()
    assert folders(tmp_path) == ["epoch_000000", "epoch_000002", "epoch_000003"], "every 2, and after the last"
    assert pixels(tmp_path / "pictures" / "epoch_000003" / "0.png") != first[0], "what was trained"
    drawn = json.loads((tmp_path / "pictures" / "prompts.json").read_text())
    assert drawn["prompts"] == ["one", "a seven"] and drawn["spec"]["num_steps"] == 4


def test_they_are_of_held_out_prompts_where_none_are_named(pipeline, tmp_path):
    options = {"eval_prompts": ["b", "a", "b", "c", "d", "e"], "eval_freq": 0}
    with pytest.warns(UserWarning, match="repeat others"):
        trainer = tiny.trainer(pipeline, tmp_path, picture_freq=1, **options)
    assert list(trainer.pictures.prompts) == ["b", "a", "c", "d"]
    assert not tiny.trainer(pipeline, tmp_path / "none", picture_freq=0).pictures.due(0, 2)


def test_a_run_with_pictures_computes_what_one_without_does(pipeline_folder, tmp_path):
    logs = []
    for freq in (0, 1):
        folder = tmp_path / str(freq)
        tiny.trainer(tiny.load(pipeline_folder), folder, picture_freq=freq).train()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if "time" not in k and "second" not in k} for line in lines])
    assert logs[0] == logs[1]


def test_pictures_that_are_not_finite_cost_a_warning(pipeline, tmp_path, caplog):
    trainer = tiny.trainer(pipeline, tmp_path, picture_freq=1)
    pipeline.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    trainer.pictures(0, 2, 0)
    assert "no pictures after epoch 0: the VAE" in caplog.text and not folders(tmp_path)


def test_named_prompts_are_refused_for_models_that_edit():
    class Config:
        picture_prompts, picture_freq = ["a cat"], 1

    class Drawer:
        pipeline = TAFSQwenImageEditPipeline.__new__(TAFSQwenImageEditPipeline)

    with pytest.raises(ValueError, match="picture_prompts are text, and a TAFSQwenImageEditPipeline edits pictures"):
        FixedPictures.of(Config, None, Drawer, None, list, None, None)


def test_tensorboard_has_them(pipeline, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = tiny.trainer(
        pipeline, tmp_path, num_epochs=1, picture_freq=1, picture_prompts=["one"], log_with="tensorboard"
    )
    trainer.train()
    (events,) = {path.parent for path in (tmp_path / "trl").glob("events*")}
    found = EventAccumulator(str(events), size_guidance={"images": 0})
    found.Reload()
    (tag,) = found.Tags()["images"]
    assert "pictures/0 one" in tag
    shown = found.Images(tag)
    assert [(image.step, image.width) for image in shown] == [(0, 64), (1, 64)]
    written = (tmp_path / "pictures" / "epoch_000001" / "0.png").read_bytes()
    (tmp_path / "shown.png").write_bytes(shown[-1].encoded_image_string)
    (tmp_path / "written.png").write_bytes(written)
    assert pixels(tmp_path / "shown.png") == pixels(tmp_path / "written.png")


def test_wandb_has_them_offline(pipeline, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=1, picture_freq=1, picture_prompts=["one"], log_with="wandb")
    trainer.train()
    trainer.accelerator.end_training()
    files = list((tmp_path / "wandb").glob("offline-run-*/files/media/images/pictures/*.png"))
    assert len(files) == 2
    assert pixels(tmp_path / "pictures" / "epoch_000001" / "0.png") in [pixels(path) for path in files]


def test_trackio_has_them_offline(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    trainer = tiny.trainer(
        pipeline, tmp_path, num_epochs=1, picture_freq=1, picture_prompts=["one"], log_with="trackio"
    )
    trainer.train()
    trainer.accelerator.end_training()
    files = list((tmp_path / "trackio").rglob("*.png"))
    assert len(files) == 2
    assert pixels(tmp_path / "pictures" / "epoch_000001" / "0.png") in [pixels(path) for path in files]
