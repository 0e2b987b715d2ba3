"""What this tree computes is a function of the tree alone, and the gauge sees where it isn't."""

import os
import subprocess
import sys

import pytest
import torch
from gauge import bit_equal
from gauge.bit_equal import CASES, differences
from tiny import ROOT

import trl_tafs.method.noise as noise

# Every kernel, objective, allocation and way to place a base once; the other cases are among the slow tests.
QUICK = ["branches", "sde-kl-guided", "window", "awm-ode-bf16", "streaming-async", "ddpo-stats-ema"]
ONE = "window"


def elsewhere(folder, *cases):
    """The records of the cases, all by default, from a process of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, str(ROOT / "tests" / "gauge" / "bit_equal.py"), "write", str(folder / "out.pt"), *cases]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "out.pt", weights_only=False)  # this test's own


@pytest.fixture(scope="module")
def records():
    """Of this process, in which other tests may have run before."""
    return bit_equal.record(QUICK)


def test_two_processes_compute_the_same_to_the_bit(records, tmp_path):
    assert differences(records, elsewhere(tmp_path, *QUICK)) == []


@pytest.mark.slow
def test_all_cases_are_the_same_to_the_bit_and_learn(tmp_path):
    records = bit_equal.record(CASES)
    assert differences(records, elsewhere(tmp_path)) == []
    check_learning(records)


def test_every_case_learns_from_something_and_stays_finite(records):
    check_learning(records)


def check_learning(records):
    def moved(record):
        lora = [value for name, value in record["weights"].items() if "lora_B" in name]
        return any(value.any() for value in lora) or not lora

    for case, record in records.items():
        assert all(value.isfinite().all() for value in record["weights"].values()), case
        assert moved(record) and any(line.get("grad_norm", 0) > 0 for line in record["log"]), case


def test_other_noise_is_seen(records, monkeypatch):
    seed = noise.noise_seed
    monkeypatch.setattr(noise, "noise_seed", lambda *key: seed("planted", *key))
    told = differences({ONE: records[ONE]}, bit_equal.record([ONE]))
    assert {line.partition(":")[0] for line in told} >= {f"{ONE}/{part}" for part in ("weights", "states", "log")}


def record(**changes):
    whole = {
        "weights": {"a": torch.tensor([1.0, float("nan")]), "b": torch.zeros(2)},
        "states": {"optimizer": {"step": torch.tensor(3), "groups": [{"lr": 1e-3}, ("x", 2)]}},
        "log": [{"loss": float("nan"), "epoch": 0}],
        "files": {"a.png": b"png", "x.safetensors": b'\x0f\0\0\0\0\0\0\0{"b":{},"a":{}}data'},
        "settings": {"seed": 1, "gone": 2},
        "generator": torch.arange(3, dtype=torch.uint8),
    }
    return {"case": whole | changes}


def test_equal_records_have_no_difference_and_nan_is_nan():
    assert differences(record(), record()) == []


def test_the_order_of_a_safetensors_header_is_no_difference_but_its_data_is():
    other = {"a.png": b"png", "x.safetensors": b'\x0f\0\0\0\0\0\0\0{"a":{},"b":{}}data'}
    assert differences(record(), record(files=other)) == []
    other["x.safetensors"] = other["x.safetensors"][:-1] + b"A"
    assert differences(record(), record(files=other)) == ["case/files: x.safetensors"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"weights": {"a": torch.tensor([1.0, float("nan")]), "b": torch.tensor([0.0, 1e-45])}}, "weights: b"),
        ({"weights": {"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(2)}}, "weights: a"),
        ({"weights": {"a": torch.tensor([1.0, float("nan")])}}, "weights: b"),
        ({"weights": {"a": torch.tensor([1.0, float("nan")]), "b": torch.zeros(2).double()}}, "weights: b"),
        (
            {"states": {"optimizer": {"step": torch.tensor(3), "groups": [{"lr": 1e-3}, ("x", 3)]}}},
            "states: optimizer",
        ),
        ({"log": [{"loss": 0.0, "epoch": 0}]}, "log"),
        ({"log": []}, "log"),
        ({"files": {"a.png": b"png"}}, "files: x.safetensors"),
        ({"settings": {"seed": 1}}, "settings: gone"),
        ({"settings": {"seed": 2, "gone": 2}}, "settings: seed"),
        ({"generator": torch.arange(1, 4, dtype=torch.uint8)}, "generator"),
    ],
)
def test_a_difference_is_named_from_either_side(changes, told):
    assert differences(record(), record(**changes)) == [f"case/{told}"]
    assert differences(record(**changes), record()) == [f"case/{told}"]


def test_a_removed_setting_and_a_missing_case():
    without = record(settings={"seed": 1})
    assert differences(record(), without, removed=("gone",)) == []
    assert differences(record(), {}) == ["case: only in one"]
    parts = {name: part for name, part in record()["case"].items() if name != "generator"}
    assert differences(record(), {"case": parts}) == ["case/generator: only in one"]
    assert differences({"case": parts}, record()) == ["case/generator: only in one"]
