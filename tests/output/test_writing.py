"""Writes are whole or not at all, whatever stops them; a fault of the disk costs a warning where that is allowed."""

import errno
import os
import uuid

import pytest
import torch
from faults import files_of_at_most, small_disk
from safetensors.torch import save_file

from trl_tafs.output.errors import first_line
from trl_tafs.output.files import (
    clean_up,
    is_disk_fault,
    replace_folder,
    save_tensors,
    tolerating_disk_faults,
    write_folder_whole,
    write_whole,
)


@pytest.fixture
def small_files():
    """Files of at most 1000 bytes: the disk's own error, of the kernel, in the middle of a write."""
    with files_of_at_most(1000):
        yield


@pytest.mark.parametrize("content", [b"\x00new", "n\u00ebw", lambda path: path.write_text("new")])
def test_a_file_is_written_with_its_folder_and_nothing_is_left_beside_it(tmp_path, content):
    path = tmp_path / "a" / "b.txt"
    for _ in range(2):
        assert write_whole(path, content) == path
    expected = {bytes: content, str: "n\u00ebw".encode()}.get(type(content), b"new")
    assert path.read_bytes() == expected
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [
        b"x" * 2000,
        lambda path: save_file({"a": torch.zeros(1000)}, path),
        lambda path: save_tensors(torch.zeros(1000), path),
        lambda path: path.write_text("part") / 0,
    ],
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, small_files, content):
    path = write_whole(tmp_path / "a", "old")
    with pytest.raises(Exception):  # noqa: B017
        write_whole(path, content)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_the_one_that_is_there(tmp_path):
    folder = tmp_path / "new" / "model"
    for name in ("one", "two"):
        assert write_folder_whole(folder, lambda path, name=name: (path / name).write_text(name)) == folder
    assert [p.name for p in folder.iterdir()] == ["two"] and list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_cannot_be_filled_or_put_in_place_leaves_the_old_one(tmp_path, small_files):
    folder = tmp_path / "model"
    write_folder_whole(folder, lambda path: (path / "a").write_text("old"))
    with pytest.raises(OSError, match="too large"):
        write_folder_whole(folder, lambda path: (path / "a").write_bytes(b"x" * 2000))
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", folder)
    assert (folder / "a").read_text() == "old" and list(tmp_path.iterdir()) == [folder]


def test_a_disk_fault_is_a_warning_and_any_other_error_is_raised(tmp_path, small_files):
    with pytest.warns(UserWarning, match="the log could not be written .*File too large.*the run goes on"):
        with tolerating_disk_faults("the log"):
            (tmp_path / "a").write_bytes(b"x" * 2000)
    with pytest.warns(UserWarning, match="the adapter could not be written"):
        with tolerating_disk_faults("the adapter"):  # safetensors' own error
            save_file({"a": torch.zeros(1000)}, tmp_path / "b")
    with pytest.raises(ZeroDivisionError), tolerating_disk_faults("the log"):
        _ = 1 / 0


def test_the_first_line_of_an_error_names_its_class():
    assert first_line(ValueError("\n\n  no such\nfile")) == "ValueError:   no such"
    assert first_line(KeyError()) == "KeyError: "


def test_tensors_are_saved_as_torch_does_and_a_disk_that_fails_has_its_errno(tmp_path):
    value = {"a": torch.arange(3.0), "b": [1, "two", None], "c": torch.zeros(0)}
    save_tensors(value, tmp_path / "ours")
    torch.save(value, tmp_path / "theirs")
    ours = torch.load(tmp_path / "ours", weights_only=True)
    assert torch.equal(ours["a"], value["a"]) and ours["b"] == value["b"] and ours["c"].shape == (0,)
    assert abs(os.path.getsize(tmp_path / "ours") - os.path.getsize(tmp_path / "theirs")) < 100
    with files_of_at_most(1000), pytest.raises(OSError, match="too_large") as raised:
        save_tensors(torch.zeros(10_000), tmp_path / "too_large")
    assert raised.value.errno == errno.EFBIG and is_disk_fault(raised.value)


def test_a_full_disk_says_so(tmp_path):
    with small_disk(tmp_path / "disk", 65536) as mounted:
        if not mounted:
            pytest.skip("mounting isn't permitted here")
        big = torch.zeros(100_000)
        for save in (save_tensors, lambda value, path: save_file({"a": value}, path)):
            with pytest.raises(Exception, match="No space left") as raised:
                write_whole(tmp_path / "disk" / "a", lambda path, save=save: save(big, path))
            assert is_disk_fault(raised.value)
        assert not list((tmp_path / "disk").iterdir())


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "refused"), ValueError("os error 28"), OSError("no")])
def test_what_the_disk_did_not_say_is_no_fault_of_it(error):
    assert not is_disk_fault(error)


def test_what_killed_writers_left_is_put_right(tmp_path):
    def left(name, kind):
        return tmp_path / "a" / f".{name}.{uuid.uuid4().hex}.{kind}"

    (tmp_path / "a" / "there").mkdir(parents=True)
    for name, kind in (("gone", "old"), ("gone", "part"), ("there", "old"), ("there", "part")):
        path = left(name, kind)
        path.mkdir()
        (path / kind).write_text(name)
    left("file", "part").write_text("half")
    (tmp_path / "a" / ".mine.part").write_text("mine")
    clean_up(tmp_path)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".mine.part", "gone", "there"]
    assert (tmp_path / "a" / "gone" / "old").read_text() == "gone"
