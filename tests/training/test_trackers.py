import json
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import files_of_at_most
from PIL import Image

from trl_tafs.training.trackers import LocalTracker


def lines(tracker):
    return [json.loads(line) for line in tracker.tracker.read_text().splitlines()]


def test_every_log_is_one_line_of_json(tmp_path):
    tracker = LocalTracker(tmp_path / "run")
    tracker.log({"loss": 0.5, "epoch": 0}, step=3)
    tracker.log({"loss": 0.25, "epoch": 1}, step=4)
    first, second = lines(tracker)
    assert (first["step"], first["loss"], first["epoch"]) == (3, 0.5, 0)
    assert (second["step"], second["loss"], second["epoch"]) == (4, 0.25, 1)
    assert second["time"] >= first["time"] > 1.6e9


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(0.5), 0.5),
        (torch.tensor([2.0]), 2.0),
        (np.float32(0.5), 0.5),
        (np.array([3]), 3),
        (True, True),
        ("annealed", "annealed"),
        (float("nan"), None),
        (float("inf"), None),
        (torch.tensor(float("nan")), None),
        (np.float64("nan"), None),
    ],
    ids=repr,
)
def test_numbers_of_every_kind_are_written_and_nan_is_null(tmp_path, value, expected):
    tracker = LocalTracker(tmp_path)
    tracker.log({"value": value}, step=0)
    assert lines(tracker)[0]["value"] == expected
    assert "NaN" not in tracker.tracker.read_text()


def test_what_is_no_number_is_left_out(tmp_path):
    tracker = LocalTracker(tmp_path)
    tracker.log({"loss": 1.0, "rewards": torch.rand(3), "table": [1, 2], "none": None}, step=0)
    assert set(lines(tracker)[0]) == {"step", "time", "loss"}


def test_rewinding_drops_the_epochs_that_are_done_again(tmp_path):
    tracker = LocalTracker(tmp_path)
    for epoch in range(4):
        tracker.log({"epoch": epoch, "loss": epoch / 10}, step=2 * epoch)
        tracker.log({"epoch": epoch, "reward": 1.0}, step=2 * epoch)
    before = tracker.tracker.read_text().splitlines()
    tracker.rewind(2)
    assert tracker.tracker.read_text().splitlines() == before[:4]
    tracker.rewind(0)
    assert tracker.tracker.read_text() == ""


def test_rewinding_a_log_that_is_not_there_does_nothing(tmp_path):
    LocalTracker(tmp_path).rewind(0)
    assert list(tmp_path.iterdir()) == []


def test_rewinding_survives_a_torn_line(tmp_path):
    tracker = LocalTracker(tmp_path)
    tracker.log({"epoch": 0}, step=0)
    with tracker.tracker.open("a") as file:
        file.write('{"step": 1, "epo')
    tracker.rewind(1)
    assert [line["epoch"] for line in lines(tracker)] == [0]


def test_a_full_disk_costs_the_line_and_a_warning_never_the_run(tmp_path):
    tracker = LocalTracker(tmp_path)
    tracker.log({"epoch": 0}, step=0)
    with files_of_at_most(tracker.tracker.stat().st_size + 20):  # room for half a line
        with pytest.warns(UserWarning, match="File too large"):
            tracker.log({"epoch": 1, "name": "x" * 50}, step=1)
        with pytest.warns(UserWarning, match="config.json could not be written"):
            tracker.store_init_configuration({"seed": "0" * 200})
    tracker.log({"epoch": 2}, step=2)
    assert [line["epoch"] for line in lines(tracker)] == [0, 2]


def test_a_torn_line_costs_itself_alone(tmp_path):
    tracker = LocalTracker(tmp_path)
    tracker.log({"epoch": 0}, step=0)
    for torn in (b'{"epoch": 1, "los', b"\xff\xfe", b"5\n", b'{"epoch": "late"}\n'):
        with tracker.tracker.open("ab") as file:
            file.write(torn)
        tracker.log({"epoch": 1}, step=1)
    tracker.rewind(2)
    assert [line["epoch"] for line in lines(tracker)] == [0, 1, 1, 1, 1]


def test_configuration_is_kept_as_json(tmp_path):
    LocalTracker(tmp_path).store_init_configuration({"seed": 0, "folder": Path("x")})
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 0, "folder": "x"}


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 8, 8)])
def test_images_are_saved_under_a_name_that_a_file_may_have(tmp_path, shape):
    LocalTracker(tmp_path).log_images({"a cat / a dog: 0.5 | ../x": torch.rand(shape)}, step=12)
    (path,) = tmp_path.rglob("*.png")
    assert path.parent == tmp_path / "images"
    assert path.name.startswith("000012_a_cat_a_dog")


def test_images_come_as_accelerates_trackers_take_them(tmp_path):
    pixels = torch.randint(0, 256, (2, 3, 80, 72), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    arrays = pixels.permute(0, 2, 3, 1).numpy()  # as wandb and TensorBoard have them
    pictures = [Image.fromarray(array) for array in arrays]
    kinds = {
        "batch": pixels.float() / 255,
        "bytes": pixels,
        "arrays": arrays,
        "floats": arrays.astype(np.float32) / 255,
        "pictures": pictures,
        "list": [pixels[0].float() / 255, arrays[1]],
    }
    LocalTracker(tmp_path).log_images(kinds, step=3)
    for name in kinds:
        for i in range(2):
            with Image.open(tmp_path / "images" / f"000003_{name}_{i}.png") as saved:
                assert np.array_equal(np.array(saved), arrays[i]), name
    LocalTracker(tmp_path).log_images({"one": pictures[0].convert("RGBA"), "grey": pixels[0, 0]}, step=3)
    with Image.open(tmp_path / "images" / "000003_one.png") as saved:
        assert np.array_equal(np.array(saved), arrays[0])
    with Image.open(tmp_path / "images" / "000003_grey.png") as saved:
        assert np.array_equal(np.array(saved)[..., 2], pixels[0, 0].numpy())


NO_IMAGES = {
    "object": object(),
    "channels": torch.rand(5, 6, 7),
    "path": "a path",
    "none": [None],
    "vector": torch.rand(3),
}


@pytest.mark.parametrize("value", NO_IMAGES.values(), ids=NO_IMAGES)
def test_what_is_no_image_costs_a_warning_and_the_others_are_saved(tmp_path, value):
    with pytest.warns(UserWarning, match="the images 'wrong' could not be saved"):
        LocalTracker(tmp_path).log_images({"wrong": value, "right": torch.rand(3, 8, 8)}, step=1)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["000001_right.png"]


@pytest.mark.filterwarnings("ignore:.*could not be written")
@pytest.mark.parametrize(("title", "step"), [("a cat " * 60, 1), ("a cat", None)], ids=["long prompt", "no step"])
def test_images_are_saved_for_long_prompts_and_without_a_step(tmp_path, title, step):
    LocalTracker(tmp_path).log_images({title: torch.rand(3, 8, 8)}, step=step)
    assert len(list(tmp_path.rglob("*.png"))) == 1
