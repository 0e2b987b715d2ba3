"""What a run is launched with: refused before a model is moved where it can't be had; trackers cost no run."""

import dataclasses
import datetime
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec

import pytest
import tiny
import torch
from accelerate import DistributedDataParallelKwargs, InitProcessGroupKwargs, tracking
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import AutocastKwargs

from trl_tafs.training.launch import check_launch, check_processes
from trl_tafs.training.trackers import make_accelerator

MISSING = next(name for name in ("wandb", "trackio") if find_spec(name) is None)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"log_with": MISSING}, f"log_with is '{MISSING}', which isn't installed: pip install \"trl_tafs.{MISSING}.\""),
        ({"log_with": "clearml"}, "log_with is 'clearml', which isn't installed: pip install clearml"),
        ({"log_with": "tensorbord"}, "log_with is 'tensorbord'; use one of .*tensorboard.*, or None for metrics.jsonl"),
        ({"train_use_8bit_adam": True}, 'train_use_8bit_adam needs bitsandbytes: pip install "trl_tafs.8bit."'),
        ({"tracker_kwargs": {"wandb": {}}}, "tracker_kwargs are for 'wandb', and log_with is None"),
        ({"log_with": "tensorboard", "tracker_kwargs": {"x": {}}}, "are for 'x', and .* below their tracker's name"),
        ({"accelerator_kwargs": {"mixed_precision": "fp16"}}, "'mixed_precision', which the field mixed_precision"),
        ({"accelerator_kwargs": {"project_config": None}}, "'project_config', which the field project_kwargs sets"),
        (
            {"accelerator_kwargs": {"gradient_accumulation_steps": 4}},
            "the field train_gradient_accumulation_steps sets; use that",
        ),
        (
            {"accelerator_kwargs": {"torch_tp_plugin": None}},
            "'torch_tp_plugin', which shards a model; launch with plain",
        ),
        ({"accelerator_kwargs": {"split_batches": True}}, "'split_batches', without effect as there is no data loader"),
        ({"accelerator_kwargs": {"cpus": True}}, "'cpus', which Accelerator doesn't take; use .*cpu"),
        ({"accelerator_kwargs": {"kwargs_handlers": ["x"]}}, "kwargs_handlers is .'x'.; give a list of accelerate.uti"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_had_is_refused_before_the_pipeline_is_touched(tmp_path, changes, told):
    config = dataclasses.replace(tiny.config(tmp_path), **changes)
    if "bitsandbytes" in told and find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is here")
    with pytest.raises(ValueError, match=told):
        tiny.TAFSGRPOTrainer(config, tiny.brightness, tiny.prompts, None)
    assert not list(tmp_path.iterdir())


def test_what_trl_s_examples_pass_is_taken(tmp_path):
    kwargs = {"logging_dir": str(tmp_path / "l"), "automatic_checkpoint_naming": True, "total_limit": 5}
    check_launch(tiny.config(tmp_path, project_kwargs={**kwargs, "project_dir": str(tmp_path)}, log_with="tensorboard"))


def test_a_tracker_s_folder_is_tried(tmp_path):
    (tmp_path / "file").touch()
    kwargs = {"project_dir": str(tmp_path / "run"), "logging_dir": str(tmp_path / "file" / "below")}
    with pytest.raises(ValueError, match="logging_dir is '.*below', which can't be written .Not a directory"):
        check_launch(tiny.config(tmp_path, project_kwargs=kwargs, log_with="tensorboard"))
    check_launch(tiny.config(tmp_path, project_kwargs=kwargs))  # nothing is written there


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_a_launch_that_shards_the_model_is_refused(tmp_path, monkeypatch, variable, name):
    monkeypatch.setenv(variable, "true")  # what `accelerate launch` sets
    with pytest.raises(ValueError, match=f"launched for {name} .{variable}=true.*accelerate launch --multi_gpu"):
        check_launch(tiny.config(tmp_path))


def test_processes_that_do_not_see_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched .WORLD_SIZE=2., and .* sees 1: .*USE_CPU=1"):
        make_accelerator(tiny.config(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "1")
    accelerator, _ = make_accelerator(tiny.config(tmp_path))
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="OMPI_COMM_WORLD_SIZE=2"):
        check_processes(accelerator)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would find a GPU")
def test_torchrun_where_no_gpu_is_seen_is_refused(tmp_path):
    code = "import tiny; from trl_tafs.training.trackers import make_accelerator; make_accelerator(tiny.config('run'))"
    (tmp_path / "script.py").write_text(code)
    paths = os.pathsep.join([str(tiny.ROOT), str(tiny.ROOT / "tests")])
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "script.py"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert "ValueError: 2 processes were launched (WORLD_SIZE=2), and Accelerate sees 1" in done.stderr


def test_handlers_are_added_to_ours(pipeline, tmp_path):
    given = [InitProcessGroupKwargs(timeout=datetime.timedelta(hours=3)), AutocastKwargs(cache_enabled=False)]
    trainer = tiny.trainer(pipeline, tmp_path, accelerator_kwargs={"kwargs_handlers": given})
    accelerator = trainer.accelerator
    assert accelerator.init_handler.timeout == datetime.timedelta(hours=3)
    assert accelerator.autocast_handler == given[1] and accelerator.ddp_handler.broadcast_buffers is False
    assert "10800" in trainer.settings["accelerator_kwargs"] or "3:00:00" in trainer.settings["accelerator_kwargs"]


def test_a_ddp_handler_of_the_user_s_is_taken_without_broadcasts(tmp_path):
    given = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator, _ = make_accelerator(tiny.config(tmp_path, accelerator_kwargs={"kwargs_handlers": [given]}))
    assert accelerator.ddp_handler.find_unused_parameters and not accelerator.ddp_handler.broadcast_buffers
    assert given.broadcast_buffers, "theirs is left as it is"


# Trackers -----------------------------------------------------------------------------------------------------


class Service(GeneralTracker):
    """Sends each line to a service, by a connection of its own, as trackers' clients do."""

    name = "service"
    requires_logging_directory = False

    def __init__(self, project, port):
        super().__init__()
        self.port = port

    @property
    def tracker(self):
        return self

    def _send(self, text):
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(text.encode())

    def start(self):
        self._send("start")

    def log(self, values, step=None, **kwargs):
        self._send(json.dumps(sorted(values)))

    def log_images(self, values, **kwargs):
        self._send("images")


@pytest.fixture
def service(monkeypatch):
    """A service that listens: its port, what it was sent, and `close`, which takes it away."""
    if not hasattr(tracking, "register_tracker_class"):
        pytest.skip("accelerate 1.15 is the first to take trackers of one's own by name")
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "service", Service)  # accelerate's register_tracker_class
    listener = socket.create_server(("127.0.0.1", 0))
    received: queue.Queue = queue.Queue()

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            with connection:
                received.put(connection.makefile().read())

    thread = threading.Thread(target=serve)
    thread.start()

    def close():
        if listener.fileno() >= 0:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join()

    yield listener.getsockname()[1], received, close
    close()


def test_a_tracker_that_fails_costs_a_warning_a_kind_and_the_local_log_goes_on(pipeline, tmp_path, service):
    port, received, close = service
    options = {"service": {"port": port}}

    def hook(rows, step, tracker):
        assert tracker.name == "service" and tracker.port == port
        tracker.log_images({"seven": rows[0][0]}, step=step)

    trainer = tiny.trainer(
        pipeline, tmp_path, hook=hook, num_epochs=2, log_with="service", tracker_kwargs=options, save_freq=0
    )
    trainer.accelerator.log({"before": 1.0})
    assert [received.get(timeout=900) for _ in range(2)] == ["start", '["before"]']
    close()
    with pytest.warns(UserWarning, match="the tracker service failed in log .ConnectionRefusedError") as caught:
        trainer.train()
    told = [str(warning.message) for warning in caught if "the tracker" in str(warning.message)]
    assert len(told) == 2 and "log_images" in told[1], "one a kind"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["epoch"] for line in lines if "reward" in line} == {0, 1}


def test_a_tracker_that_cannot_start_is_an_error_before_anything_is_spent(pipeline, tmp_path, service):
    port, _, close = service
    options = {"service": {"port": port}}
    close()
    with pytest.raises(ValueError, match="log_with='service': the tracker can't start .ConnectionRefusedError"):
        tiny.trainer(pipeline, tmp_path, log_with="service", tracker_kwargs=options)


def test_options_that_a_tracker_does_not_take_are_named(pipeline, tmp_path):
    config = {"log_with": "tensorboard", "tracker_kwargs": {"tensorboard": {"flush_sec": 3}}}
    with pytest.raises(ValueError, match="log_with='tensorboard': the tracker can't start .TypeError: .*flush_sec"):
        tiny.trainer(pipeline, tmp_path, **config)
