"""Signals, locks, damaged files, full disks: what is lost, what is said; the resumed run is the undisturbed one.

docs/reliability.md has a row for each fault, with the test that causes it.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from faults import small_disk
from run_state import Signalling, everything, same

from trl_tafs.cli.main import main
from trl_tafs.training import checkpoint_files as files
from trl_tafs.training.checkpoint_files import CheckpointError, checkpoints
from trl_tafs.training.run_folder import LOCK, RunFolder, RunFolderError

EVALUATION = {
    "eval_freq": 1,
    "eval_num_steps": [2, 3],
    "eval_samplers": ["annealed"],
    "eval_prompts": ["three"],
}
SETTINGS = {
    "num_epochs": 3,
    "train_gradient_accumulation_steps": 1,  # two optimizer steps an epoch
    "per_prompt_stat_tracking": True,
    "train_use_ema": True,
    "prompt_function": ["one", "two", "three"],
} | EVALUATION


def noisy(images, prompts, metadata):
    """A reward that draws from the global generator, which a resume must put back."""
    return images.mean((1, 2, 3)) + 0.1 * torch.rand(len(images))


def make(pipeline_folder, folder, reward=noisy, **changes):
    """A trainer whose update draws from the global generator, as a dropout does."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = tiny.trainer(tiny.load(pipeline_folder), folder, reward=reward, **SETTINGS | changes)
    compute_loss = trainer.compute_loss

    def drawing(*batch):
        torch.rand(1)
        return compute_loss(*batch)

    trainer.compute_loss = drawing
    return trainer


@pytest.fixture(scope="module")
def undisturbed(pipeline_folder, tmp_path_factory):
    """A run of three epochs: the trainer and all that it is known by."""
    trainer = make(pipeline_folder, tmp_path_factory.mktemp("undisturbed"))
    trainer.train()
    return trainer, everything(trainer)


# Signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_freq", [1, 3])
@pytest.mark.parametrize("where", ["rollout", "update", "evaluation"])
def test_a_signal_saves_within_a_batch_and_the_run_goes_on_as_if_nothing_had_been(
    pipeline_folder, tmp_path, undisturbed, capsys, where, save_freq
):
    number = signal.SIGINT if save_freq == 3 else signal.SIGTERM
    # two calls before training, two of an evaluation, then two batches of three steps an epoch and two of an evaluation
    reward = Signalling(noisy, {"rollout": 15, "update": 0, "evaluation": 19}[where], number)
    trainer = make(pipeline_folder, tmp_path, reward=reward, save_freq=save_freq)
    if where == "update":  # the second epoch's second micro-batch: after an optimizer step of that epoch
        trainer.compute_loss = Signalling(trainer.compute_loss, 8, number)
    with pytest.raises(KeyboardInterrupt if save_freq == 3 else SystemExit) as raised:
        trainer.train()
    assert save_freq == 3 or raised.value.code == 143
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert handlers == [signal.SIG_DFL, signal.default_int_handler]
    done = 2 if where == "evaluation" else 1
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    assert files.epoch_of(newest) == done, "the last epoch that is done"
    said = capsys.readouterr().out
    assert f"stopped by {number.name}: checkpoint {newest} is saved" in said and "resume_from='latest'" in said

    scored = Signalling(noisy, None)
    resumed = make(pipeline_folder, tmp_path, reward=scored, resume_from="latest")
    resumed.train()
    assert same(everything(resumed), undisturbed[1])
    # before training, what is left of the second epoch and its evaluation, the third one and its evaluation
    assert scored.calls == 2 + {"rollout": 3, "update": 0, "evaluation": 0}[where] + 2 + 6 + 2
    assert not (tmp_path / "pending").exists()


def test_after_a_signal_the_same_trainer_can_go_on(pipeline_folder, tmp_path, undisturbed):
    trainer = make(pipeline_folder, tmp_path, save_freq=3)
    compute_loss, trainer.compute_loss = trainer.compute_loss, None
    trainer.compute_loss = Signalling(compute_loss, 8, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert same(everything(trainer), undisturbed[1])


def test_a_second_signal_stops_at_once(pipeline_folder, tmp_path):
    def twice(images, prompts, metadata):
        if len(images) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not reached")
        return noisy(images, prompts, metadata)

    trainer = make(pipeline_folder, tmp_path, reward=twice, eval_freq=0)
    with pytest.raises(SystemExit) as raised:
        trainer.train()
    assert raised.value.code == 143 and not checkpoints(tmp_path / "checkpoints")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not (tmp_path / LOCK).exists()


def test_handlers_of_others_stay_and_threads_install_none(pipeline_folder, tmp_path):
    heard = []
    stopper = make(pipeline_folder, tmp_path).stopper
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with stopper.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == [signal.SIGTERM] and not stopper.requested
            assert signal.getsignal(signal.SIGINT) != signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)

    def listen():
        with stopper.listening():
            heard.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard[1] == signal.SIG_DFL


def test_the_command_line_says_how_to_go_on_and_that_command_does(pipeline_folder, tmp_path, capfd):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "mine.py").write_text(
        "import os, signal\n"
        "calls = []\n"
        "def bright(images, prompts, metadata):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == 3 and not os.path.exists({str(tmp_path / 'run' / 'pending')!r}):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return images.mean((1, 2, 3))\n"
    )
    config = tiny.config(tmp_path / "run", num_epochs=1)
    command = ["train", "--pretrained_model", str(pipeline_folder), "--prompts", str(tmp_path / "prompts.txt")]
    command += ["--reward", f"{tmp_path / 'mine.py'}:bright", "--resume_from", "auto", "--objective", "clipped"]
    command += ["--project_kwargs", json.dumps(config.project_kwargs), "--mixed_precision", "no"]
    for name in ("sample_batch_size", "sample_num_batches_per_epoch", "num_generations", "num_epochs", "lora_rank"):
        command += [f"--{name}", str(getattr(config, name))]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(command) == 143
    said = capfd.readouterr().out
    resume = re.search(r"Go on with:\n  trl-tafs (train .*)", said)[1]
    assert "--resume_from latest" in resume and "auto" not in resume
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(shlex.split(resume)) == 0
    assert "resumed from" in capfd.readouterr().out and (tmp_path / "run" / "adapter").is_dir()


# One job a folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def locked_by(folder, **holder):
    folder.mkdir(exist_ok=True)
    text = json.dumps({"host": socket.gethostname(), "since": 0.0, "token": "other"} | holder)
    (folder / LOCK).write_text(text)
    return text


def test_a_second_job_in_a_folder_is_refused_before_it_changes_anything(pipeline_folder, tmp_path, sleeper):
    lock = locked_by(tmp_path, pid=sleeper.pid, started=psutil.Process(sleeper.pid).create_time())
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RunFolderError, match=f"in use by process {sleeper.pid} on this host since .*run_name.*delete"):
        make(pipeline_folder, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "metrics.jsonl"]
    assert (tmp_path / LOCK).read_text() == lock
    sleeper.kill()
    sleeper.wait()
    make(pipeline_folder, tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid(), "a dead job's lock is taken over"


def test_another_hosts_lock_is_never_taken_over(tmp_path):
    locked_by(tmp_path, pid=1, host="elsewhere")
    with pytest.raises(RunFolderError, match=f"process 1 on another host, elsewhere, .*delete {tmp_path / LOCK}"):
        RunFolder(tmp_path, Accelerator())
    (tmp_path / LOCK).write_text("torn")
    with pytest.raises(RunFolderError, match="a job that its lock doesn't name"):
        RunFolder(tmp_path, Accelerator())


def test_a_number_that_was_given_again_is_another_process(tmp_path, sleeper):
    locked_by(tmp_path, pid=sleeper.pid, started=1.0)
    RunFolder(tmp_path, Accelerator())


def test_within_a_process_the_later_one_takes_over_and_the_earlier_lets_go_of_nothing(tmp_path):
    first, second = RunFolder(tmp_path, Accelerator()), RunFolder(tmp_path, Accelerator())
    first.release()
    assert (tmp_path / LOCK).exists(), "the second one's"
    if (pid := os.fork()) == 0:  # a data loader's worker, say, that ends
        second.release()
        os._exit(0)
    os.waitpid(pid, 0)
    assert (tmp_path / LOCK).exists()
    second.release()
    assert not list(tmp_path.iterdir())
    third = RunFolder(tmp_path, Accelerator())
    del third
    assert not list(tmp_path.iterdir()), "a trainer that is dropped holds nothing"


def test_of_many_that_find_a_dead_jobs_lock_one_gets_it(tmp_path, sleeper):
    sleeper.kill()
    sleeper.wait()
    accelerator = Accelerator()
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        locked_by(folder, pid=sleeper.pid, started=1.0)
        start, go = os.pipe()
        done, finish = os.pipe()
        children = []
        for _ in range(4):
            if (pid := os.fork()) == 0:
                os.close(go)
                os.close(finish)
                os.read(start, 1)  # until the parent closes it
                try:
                    held = RunFolder(folder, accelerator)
                except RunFolderError:
                    os._exit(1)
                os.read(done, 1)  # until all have tried
                held.release()
                os._exit(0)
            children.append(pid)
        os.close(start)
        os.close(go)
        losers = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)]
        os.close(done)
        os.close(finish)
        assert losers == [1, 1, 1] and os.waitstatus_to_exitcode(os.wait()[1]) == 0


# Checkpoints ----------------------------------------------------------------------------------------------------


def flip(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


@pytest.fixture
def three(undisturbed, tmp_path):
    """A copy of the undisturbed run's folder, and its checkpoints, oldest first."""
    shutil.copytree(undisturbed[0].config.project_dir, tmp_path / "run")
    return tmp_path / "run", checkpoints(tmp_path / "run" / "checkpoints")


def test_one_flipped_bit_anywhere_is_found_and_the_newest_whole_one_named(three):
    folder, found = three
    names = list(files.listed_files(found[-1]))
    assert {"states/optimizer.pt", "pytorch_lora_weights.safetensors", "trainer_state.json"} <= set(names)
    for name in [*names, files.MANIFEST]:
        flip(found[-1] / name)
        fault = f"checkpoint_000003 .*{re.escape(name)}.*resume_from='.*checkpoint_000002' is whole"
        with pytest.raises(CheckpointError, match=fault):
            files.find_checkpoint("latest", folder / "checkpoints")
        flip(found[-1] / name)
    assert files.find_checkpoint("latest", folder / "checkpoints") == found[-1]


def test_auto_takes_the_newest_whole_one_or_begins(pipeline_folder, undisturbed, three, capsys):
    folder, found = three
    flip(found[-1] / "states" / "optimizer.pt")
    with pytest.warns(UserWarning, match="resume_from='auto' takes .*checkpoint_000002, since .*optimizer.pt is not"):
        resumed = make(pipeline_folder, folder, resume_from="auto")
    resumed.train()
    assert same(everything(resumed), undisturbed[1])
    assert (folder / "earlier_1" / "checkpoints" / "checkpoint_000003").is_dir(), "moved, not deleted"
    assert (folder / "earlier_1" / "metrics.jsonl").is_file()
    for path in checkpoints(folder / "checkpoints"):
        flip(path / "trainer_state.json")
    with pytest.raises(CheckpointError, match="no checkpoint is whole: .*checkpoint_000003.*checkpoint_000001"):
        files.find_checkpoint("auto", folder / "checkpoints")
    trainer = make(pipeline_folder, folder / "new", resume_from="auto")
    assert trainer.progress.epoch == 0 and "a new run begins" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="there is no checkpoint below"):
        files.find_checkpoint("latest", folder / "new" / "checkpoints")


def test_a_checkpoint_that_is_whole_and_wrong_is_refused_with_the_file(undisturbed, three):
    Accelerator()  # Accelerate's state, which every test loses at its end
    trainer, found = undisturbed[0], three[1]
    state = json.loads((found[-1] / files.STATE).read_text())
    wrong = [[], {"progress": state["progress"]}, state | {"progress": 5}]
    for name, value in (("epoch", "3"), ("epoch", -1), ("reward_curve", [1]), ("evaluations", [{"a": 1}]), ("new", 0)):
        wrong.append(state | {"progress": state["progress"] | {name: value}})
    wrong.append(state | {"progress": {k: v for k, v in state["progress"].items() if k != "global_step"}})
    for content in wrong:
        (found[-1] / files.STATE).write_text(json.dumps(content))
        files._write_manifest(found[-1])
        with pytest.raises(CheckpointError, match=f"{files.STATE} can't be used .*checkpoint_000002' is whole"):
            trainer.checkpoints.load(found[-1])
    files.write_state(found[-1], state)
    for name in ("optimizer", "lr_scheduler", "average", "stat_tracker"):
        path = found[-1] / "states" / f"{name}.pt"
        before = path.read_bytes()
        torch.save({"foreign": 1} if name != "stat_tracker" else [1], path)
        files._write_manifest(found[-1])
        with pytest.raises(CheckpointError, match=rf"states/{name}.pt can't be used .*is whole"):
            trainer.checkpoints.load(found[-1])
        path.write_bytes(before)
    files._write_manifest(found[-1])
    trainer.checkpoints.load(found[-1])
    assert same(everything(trainer), undisturbed[1])


def test_damaged_rollouts_are_drawn_again(pipeline_folder, tmp_path):
    trainer = make(pipeline_folder, tmp_path, reward=Signalling(noisy, 15))
    with pytest.raises(SystemExit):
        trainer.train()
    (kept,) = (tmp_path / "pending").glob("*.pt")
    flip(kept)
    resumed = make(pipeline_folder, tmp_path, resume_from="latest")
    with pytest.warns(UserWarning, match=r"the rollouts in .*rank_0.pt are drawn again: .*not what was written"):
        resumed.train()
    assert [epoch for epoch, _ in resumed.progress.reward_curve] == [0, 1, 2] and not kept.exists()


# The disk -------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_refused_before_training(pipeline_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"run can't be written \(.*another logdir or project_dir"):
        make(pipeline_folder, tmp_path / "file" / "run")


def test_a_run_survives_a_disk_that_is_really_full(pipeline_folder, tmp_path, capsys):
    with small_disk(tmp_path / "disk", 3_000_000) as mounted:
        if not mounted:
            pytest.skip("mounting isn't permitted here")
        folder, filled = tmp_path / "disk" / "run", []

        def reward(images, prompts, metadata):
            if (folder / "checkpoints" / "checkpoint_000001").exists() and not filled:
                filled.append(1)
                with open(tmp_path / "disk" / "filler", "wb", buffering=0) as filler:
                    with pytest.raises(OSError, match="No space left"):
                        while True:
                            filler.write(bytes(4096))
            return noisy(images, prompts, metadata)

        trainer = make(
            pipeline_folder,
            folder,
            reward=reward,
            sample_grid_freq=1,
            metric_for_best_model="eval/annealed_2/reward",
        )
        with pytest.warns(UserWarning) as warned:
            trainer.train()
        assert trainer.progress.epoch == 3
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint_000001"]
        assert files.torn(folder / "checkpoints" / "checkpoint_000001") is None
        assert "checkpoint_000003 could not be written: [Errno 28] No space left" in capsys.readouterr().out
        said = "\n".join(str(warning.message) for warning in warned)
        assert "metrics.jsonl could not be written" in said and "epoch_000002.png could not be written" in said
        assert all(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()), "no torn line"
        place = Path(re.search(r"adapter can't be written \(.*\): the adapter is in (.*)", said)[1])
        assert (place / "pytorch_lora_weights.safetensors").is_file() and (place / "README.md").is_file()
        shutil.rmtree(place)


def test_an_adapter_whose_place_is_taken_goes_to_another_one(pipeline_folder, tmp_path):
    (tmp_path / "adapter").write_text("a file")
    trainer = make(pipeline_folder, tmp_path, eval_freq=0)
    with pytest.warns(UserWarning, match="adapter can't be written .*: the adapter is in "):
        place = trainer.save_pretrained()
    assert (place / "pytorch_lora_weights.safetensors").is_file()
    shutil.rmtree(place)
    with pytest.raises(OSError):
        trainer.save_pretrained(tmp_path / "adapter")


# The page -------------------------------------------------------------------------------------------------------


def test_every_row_of_the_page_names_tests_that_exist():
    page = (tiny.ROOT / "docs" / "reliability.md").read_text()
    rows = [row for row in page.splitlines() if row.startswith("|") and not row.startswith(("| Fault", "|--"))]
    named = [re.findall(r"`(\w+/[\w/]+\.py)::(\w+)`", row) for row in rows]
    assert len(rows) > 15 and all(named), [row for row, tests in zip(rows, named, strict=True) if not tests]
    for path, name in (test for tests in named for test in tests):
        assert f"def {name}(" in (tiny.ROOT / "tests" / path).read_text(), f"{path}::{name}"
