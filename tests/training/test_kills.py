"""SIGKILL at every operation on files, and at any time: nothing that was complete is lost, and a resume is exact."""

import json
import random
import shutil

import pytest
import tiny
from accelerate.state import AcceleratorState, PartialState
from faults import KILLED, Nursery, killed_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trl_tafs.training import checkpoint_files as files
from trl_tafs.training.checkpoint_files import CheckpointError, checkpoints
from trl_tafs.training.run_folder import LOCK, RunFolder


def epochs(folder):
    return [files.epoch_of(path) for path in checkpoints(folder / "checkpoints")]


def leftovers(folder):
    """Hidden names, which are those of writers; the lock is a killed job's."""
    return [path for path in folder.rglob(".*") if path.name != LOCK]


@pytest.fixture(scope="module")
def trained(pipeline_folder, tmp_path_factory):
    """A trainer whose three epochs are done, with all of their checkpoints."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("kills") / "run"
    trainer = tiny.trainer(tiny.load(pipeline_folder), folder, **KILLED | {"num_checkpoint_limit": 5})
    trainer.train()
    return trainer, {state: dict(state._shared_state) for state in (AcceleratorState, PartialState)}


@pytest.fixture
def trainer(trained):
    """The trainer, with Accelerate's state as it was: the tests' own fixture takes it away."""
    for state, values in trained[1].items():
        state._shared_state.update(values)
    return trained[0]


@pytest.fixture
def every_operation(trainer, tmp_path):
    """Do a task once for each of its operations on files, killed there, each time in the same folder."""
    folder = trainer.run_folder.path
    shutil.copytree(folder, tmp_path / "before")

    def each(task, prepare=lambda folder: None):
        operation, killed = 0, True
        while killed:
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "before", folder)
            prepare(folder)
            killed = killed_at(operation, task, folder)
            yield operation, folder
            operation += 1

    yield each
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "before", folder)


def recovered(folder, trainer):
    """What the next start does first."""
    RunFolder(folder, trainer.accelerator).release()
    assert not leftovers(folder)


def content(path):
    return {name: entry["sha256"] for name, entry in files.listed_files(path).items()}


def read(path):
    """What is in a file; safetensors writes its header in any order."""
    if path.suffix == ".safetensors":
        return {name: tensor.tolist() for name, tensor in load_file(path).items()}
    return path.read_bytes()


def test_a_kill_while_the_only_checkpoint_is_written_again(trainer, every_operation, monkeypatch):
    monkeypatch.setitem(trainer.config.project_kwargs, "total_limit", 1)

    def alone(folder):
        for path in checkpoints(folder / "checkpoints")[:-1]:
            shutil.rmtree(path)

    expected = None
    for operation, folder in every_operation(trainer.save_checkpoint, prepare=alone):
        recovered(folder, trainer)
        (path,) = checkpoints(folder / "checkpoints")
        assert files.epoch_of(path) == 3 and files.torn(path) is None, operation
        expected = expected or content(path)
        assert content(path).keys() == expected.keys()
    assert operation > 10


def test_a_kill_while_a_checkpoint_is_written_and_the_oldest_dropped(trainer, every_operation, monkeypatch):
    monkeypatch.setitem(trainer.config.project_kwargs, "total_limit", 2)

    def two(folder):
        shutil.rmtree(folder / "checkpoints" / "checkpoint_000003")

    seen = set()
    for operation, folder in every_operation(trainer.save_checkpoint, prepare=two):
        recovered(folder, trainer)
        seen.add(tuple(epochs(folder)))
        assert all(files.torn(path) is None for path in checkpoints(folder / "checkpoints")), operation
    assert seen == {(1, 2), (1, 2, 3), (2, 3)}


def test_a_kill_while_a_resume_cuts_the_log_back_and_moves_later_checkpoints(trainer, every_operation, monkeypatch):
    first = trainer.run_folder.path / "checkpoints" / "checkpoint_000001"
    monkeypatch.setattr(trainer.config, "resume_from", str(first))
    log = trainer.local_tracker.tracker.read_bytes()
    cut = b"".join(line for line in log.splitlines(True) if json.loads(line)["epoch"] < 1)

    def resume():
        with RunFolder(trainer.run_folder.path, trainer.accelerator).held():
            trainer.checkpoints.begin()

    seen = []
    for operation, folder in every_operation(resume):
        recovered(folder, trainer)
        kept = [*checkpoints(folder / "checkpoints"), *checkpoints(folder / "earlier_1" / "checkpoints")]
        assert sorted(map(files.epoch_of, kept)) == [1, 2, 3], operation
        assert all(files.torn(path) is None for path in kept)
        seen.append((folder / "metrics.jsonl").read_bytes())
        assert seen[-1] in (log, cut)
        if seen[-1] == cut:
            assert (folder / "earlier_1" / "metrics.jsonl").read_bytes() == log
    assert seen[0] == log and seen[-1] == cut and operation > 5


def test_a_kill_while_an_earlier_run_is_set_aside(trainer, every_operation, monkeypatch):
    monkeypatch.setattr(trainer.config, "resume_from", "")
    seen = []
    for operation, folder in every_operation(trainer.checkpoints.begin):
        recovered(folder, trainer)
        where = folder if (folder / "checkpoints").exists() else folder / "earlier_1"
        assert epochs(where) == [1, 2, 3] and (where / "metrics.jsonl").is_file(), operation
        seen.append(where.name)
    assert seen[0] == "run" and seen[-1] == "earlier_1"


def test_a_kill_while_the_adapter_is_published_again(trainer, every_operation):
    folder = trainer.run_folder.path
    names = {path.name: read(path) for path in (folder / "adapter").rglob("*") if path.is_file()}

    def publish():  # all of `save_pretrained` but the pictures, which would be drawn each time
        with trainer.policy.averaged():
            trainer.policy.publish(folder / "adapter")
        trainer.create_model_card()

    for operation, _ in every_operation(publish):
        recovered(folder, trainer)
        for name, before in names.items():
            (path,) = (folder / "adapter").rglob(name)
            assert read(path) == before, f"{name} after operation {operation}: as it was, and as it is again"
        assert epochs(folder) == [1, 2, 3]


# Any content ----------------------------------------------------------------------------------------------------

DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "delete", "swap", "json", "grow"]),
        st.integers(0, 100),  # of the files
        st.integers(0, 10**6),  # of their bytes
        st.sampled_from([None, 0, -1, "", [], {}, [[]], {"files": {}}, {"files": {}, "sha256": ""}, 1e400]),
        st.booleans(),  # the manifest fits what is there: a checkpoint of somebody else's making
    ),
    min_size=1,
    max_size=3,
)


def damage(path, kind, number, place, value, fitting):
    names = sorted(file for file in path.rglob("*") if file.is_file())
    if not names:
        return
    file, other = names[number % len(names)], names[(number + 1 + place) % len(names)]
    data = bytearray(file.read_bytes())
    if kind == "flip" and data:
        data[place % len(data)] ^= 1 << place % 8
        file.write_bytes(data)
    elif kind == "cut":
        file.write_bytes(data[: place % (len(data) + 1)])
    elif kind == "grow":
        file.write_bytes(data + b"x")
    elif kind == "delete":
        file.unlink()
    elif kind == "swap":
        file.write_bytes(other.read_bytes())
    elif kind == "json":
        jsons = [name for name in names if name.suffix == ".json"]
        if jsons:
            jsons[number % len(jsons)].write_text(json.dumps(value))
    if fitting:
        files._write_manifest(path)


def loads_or_is_refused(trainer, tmp_path, steps):
    """A damaged checkpoint gives a CheckpointError or, where it isn't damaged after all, what was saved."""
    source = trainer.run_folder.path / "checkpoints" / "checkpoint_000003"
    path = tmp_path / "fuzz" / "checkpoint_000003"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(source, path)
    before, saved = content(path), files.read_state(path)["progress"]
    for step in steps:
        damage(path, *step)
    try:
        found = files.find_checkpoint(str(path), path.parent)
        trainer.checkpoints.load(found)
        files.load_generators(found, 0)
    except CheckpointError as error:
        assert str(path) in str(error)
        trainer.checkpoints.load(source)
        return
    if content(path) == before:
        assert files.read_state(path)["progress"] == saved == json.loads(json.dumps(trainer.progress.state_dict()))
    trainer.checkpoints.load(source)


FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@settings(max_examples=40, **FUZZ)
@given(steps=DAMAGE)
def test_whatever_is_in_a_checkpoint_it_is_read_or_refused(trainer, tmp_path_factory, steps):
    loads_or_is_refused(trainer, tmp_path_factory.getbasetemp(), steps)


@pytest.mark.slow
@settings(max_examples=2000, **FUZZ)
@given(steps=DAMAGE)
def test_whatever_is_in_a_checkpoint_it_is_read_or_refused_2000_times(trainer, tmp_path_factory, steps):
    loads_or_is_refused(trainer, tmp_path_factory.getbasetemp(), steps)


# Any time -------------------------------------------------------------------------------------------------------


def outcome(folder):
    """What a run ends with: its last checkpoint's files, counters, log, grids and adapter."""
    path = checkpoints(folder / "checkpoints")[-1]  # a kill may have left one more than the limit: the next save's
    kept = {name: read(path / name) for name in files.listed_files(path) if name != files.STATE}  # that has the folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in line.items() if not k.startswith(("time", "images_per_second"))} for line in lines]
    pictures = {p.name: p.read_bytes() for p in sorted((folder / "samples").glob("*.png"))}
    adapter = read(folder / "adapter" / "pytorch_lora_weights.safetensors")
    return kept, files.read_state(path)["progress"], log, pictures, adapter


@pytest.mark.slow
def test_75_kills_in_48_runs_at_any_time_and_operation_change_nothing(tmp_path):
    nursery, chance = Nursery(tmp_path), random.Random(0)
    try:
        code, seconds = nursery.train(tmp_path / "undisturbed")
        assert code == 0, nursery.log.read_text()
        expected, kills = outcome(tmp_path / "undisturbed"), 0
        for number in range(48):
            folder = tmp_path / f"run_{number}"
            for _ in range(1 + (number % 16 < 9)):  # 48 + 27
                code = 0
                while code == 0:  # it ended before its kill
                    by_time = chance.random() < 0.5
                    when = {"kill_after": chance.uniform(0, seconds)} if by_time else {"kill_at": chance.randrange(100)}
                    code, _ = nursery.train(folder, **when)
                assert code == -9, nursery.log.read_text()
                kills += 1
            code, _ = nursery.train(folder)
            assert code == 0, nursery.log.read_text()
            assert outcome(folder) == expected, f"run {number}"
            assert not leftovers(folder)
            shutil.rmtree(folder)
    finally:
        nursery.close()
    assert kills == 75
