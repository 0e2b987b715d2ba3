"""One thread, no network, no trackers: every test runs on tiny real components."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# How fast examples are made and tried is the machine's matter.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

LONGEST = ("tests/gauge/", "tests/examples/", "tests/training/", "tests/test_trainer.py", "tests/pipelines/")


def pytest_collection_modifyitems(items):
    """The longest files first, so that `make test` has short ones for both processes at its end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A tiny SD3 pipeline with random weights, saved in diffusers' format."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    tiny.build_pipeline(0).save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(pipeline_folder):
    """A fresh TAFS pipeline, loaded as a user loads one."""
    return tiny.load(pipeline_folder)


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a generator of its own is the same in every run, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one state a process; every test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
