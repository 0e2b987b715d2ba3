import os
import subprocess
import sys

import pytest
from tiny import ROOT

import trl_tafs

HEAVY = ("diffusers", "open_clip", "transformers", "accelerate", "peft", "trl", "datasets", "torchvision", "PIL",
         "huggingface_hub")  # fmt: skip


PROBE = f"""
import sys, torch

def probe(statement):
    before = set(sys.modules)
    exec(statement)
    others = [name for name in sys.modules.keys() - before if not name.startswith("trl_tafs")]
    print(len(others), *[name for name in {HEAVY} if name in sys.modules], sep=",")

before = [name for name in {HEAVY} if name in sys.modules]
assert not before, before
probe("import trl_tafs")
probe("import trl_tafs.method.objectives, trl_tafs.method.advantages, trl_tafs.method.levels, trl_tafs.training.plan")
probe("from trl_tafs import TAFSGRPOConfig, REWARDS")
probe("import trl_tafs.hub.card, trl_tafs.hub.push")
"""


@pytest.fixture(scope="module")
def probes():
    """(modules of others that it loaded, heavy libraries) of each statement, in a fresh interpreter that has torch."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines()]
    return [(int(modules), loaded) for modules, *loaded in rows]


def test_importing_the_package_its_maths_or_its_config_loads_no_heavy_library(probes):
    assert [loaded for _, loaded in probes] == [[], [], [], []]


def test_importing_the_package_loads_next_to_nothing_beyond_torch(probes):
    assert sum(modules for modules, _ in probes) <= 10


def test_dir_lists_what_can_be_imported():
    assert {"TAFSGRPOConfig", "TAFSGRPOTrainer", "TAFSStableDiffusion3Pipeline"} <= set(dir(trl_tafs))
    for name in dir(trl_tafs):
        assert getattr(trl_tafs, name) is not None
    assert set(trl_tafs.__all__) == set(dir(trl_tafs))


def test_an_unknown_attribute_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="module 'trl_tafs' has no attribute 'TAFSTrainer'"):
        _ = trl_tafs.TAFSTrainer
    with pytest.raises(ImportError):
        from trl_tafs import TAFSTrainer  # noqa: F401


def test_the_package_is_typed_and_has_a_version():
    assert (ROOT / "trl_tafs" / "py.typed").exists()
    assert trl_tafs.__version__.count(".") == 2
