"""What this tree computes is a function of the tree alone, and the gauge sees where it isn't."""

import os
import subprocess
import sys

import pytest
import torch
from gauge.bit_equal import CASES, differences
from tiny import ROOT

THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MKL_NUM_THREADS": "1"}
ONE = "reward-to-go"


def start(out, *cases, **environment):
    """A process of its own that writes the records of the cases, all by default."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, str(ROOT / "tests" / "gauge" / "bit_equal.py"), "write", str(out), *cases]
    environment = os.environ | THREAD | {"PYTHONPATH": paths} | environment
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read(process, out):
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said[-4000:]
    return torch.load(out, weights_only=False)  # this test's own


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """All cases, trained at once in two processes."""
    folder = tmp_path_factory.mktemp("gauge")
    started = [(start(folder / name), folder / name) for name in ("a.pt", "b.pt")]
    return [read(*pair) for pair in started]


def test_two_processes_compute_the_same_to_the_bit(records):
    assert records[0].keys() == CASES.keys()
    assert differences(*records) == []


def test_every_case_learns_from_something_and_stays_finite(records):
    def moved(record):
        lora = [value for name, value in record["weights"].items() if "lora_B" in name]
        return any(value.any() for value in lora) or not lora

    for case, record in records[0].items():
        assert all(value.isfinite().all() for value in record["weights"].values()), case
        assert moved(record) and any(line.get("grad_norm", 0) > 0 for line in record["log"]), case


def test_other_noise_is_seen(records, tmp_path):
    planted = read(start(tmp_path / "planted.pt", ONE, GAUGE_PLANT="noise"), tmp_path / "planted.pt")
    told = differences({ONE: records[0][ONE]}, planted)
    assert {line.partition(":")[0] for line in told} >= {f"{ONE}/{part}" for part in ("weights", "states", "log")}


def test_an_unknown_plant_is_an_error(tmp_path):
    process = start(tmp_path / "x.pt", ONE, GAUGE_PLANT="typo")
    assert process.wait(timeout=300) and "GAUGE_PLANT is 'typo'" in process.stdout.read()


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
