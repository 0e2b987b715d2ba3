"""Real faults: a disk that takes no more, and processes that are killed at a chosen operation on their files."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import tiny
import torch
from accelerate.state import AcceleratorState

WATCHED = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")


@contextmanager
def files_of_at_most(size):
    """The kernel refuses to let a file grow beyond `size` bytes: EFBIG, in the middle of a write."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def small_disk(folder, size):
    """A disk of `size` bytes at `folder`; yields False where mounting isn't permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


# Processes to kill ----------------------------------------------------------------------------------------------


def killed_at(operation, task, folder):
    """Fork, do `task` in the child, SIGKILL it at an operation on files below `folder`; whether it came so far."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            watch(folder, operation)
            task()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), "the task failed: its error is above"
    return code != 0


def watch(folder, kill_at):
    """SIGKILL this process at an operation that changes files below `folder`, counted from 0."""
    done = 0

    def hook(event, arguments):
        nonlocal done
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in WATCHED) and str(arguments[0]).startswith(str(folder)):
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

    sys.addaudithook(hook)


class Nursery:
    """A process that has loaded everything and forks a child for each run, which costs no second start.

    It trains nothing itself: autograd can't be forked once it has run.
    """

    def __init__(self, folder):
        self.log = Path(folder) / "children.txt"
        paths = os.pathsep.join([str(tiny.ROOT / "tests"), str(tiny.ROOT)])
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        assert json.loads(self.process.stdout.readline()) == "ready"

    def train(self, folder, *, kill_at=None, kill_after=None):
        """Train, resuming from what is in `folder`; return the exit code, minus the signal, and the seconds.

        SIGKILL at an operation on files, counted from 0, or after so many seconds.
        """
        self.process.stdin.write(json.dumps([str(folder), kill_at, kill_after]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


KILLED = {
    "train_gradient_accumulation_steps": 1,
    "num_epochs": 3,
    "num_checkpoint_limit": 1,
    "sample_grid_freq": 1,
    "per_prompt_stat_tracking": True,
    "train_use_ema": True,
    "lora_rank": 2,
    "prompt_function": ["one", "two", "three"],
    "resume_from": "auto",
}


def serve(scratch):
    """Read runs from stdin, fork a child for each, and write how it ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed meanwhile is no answer
    model = Path(scratch) / "tiny-sd3"
    tiny.build_pipeline(0).save_pretrained(model)
    torch.set_num_threads(1)
    tiny.trainer(tiny.load(model), Path(scratch) / "warm", **KILLED)  # imports what is imported late
    pipeline = tiny.load(model)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        folder, kill_at, kill_after = json.loads(line)
        start = time.monotonic()
        if (pid := os.fork()) == 0:
            child(pipeline, scratch, folder, kill_at)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # of one that has ended, too: it is waited for below
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([code, time.monotonic() - start]), file=answers, flush=True)


def child(pipeline, scratch, folder, kill_at):
    """Train, with all that is printed in the log."""
    code = 1
    try:
        log = os.open(Path(scratch) / "children.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if kill_at is not None:
            watch(folder, kill_at)
        AcceleratorState._reset_state(reset_partial_state=True)
        tiny.trainer(pipeline, folder, **KILLED).train()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
