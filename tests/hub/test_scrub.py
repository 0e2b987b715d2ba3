"""What may not be published is taken out of settings."""

import json
from pathlib import Path

import pytest
import torch

from trl_tafs.hub.scrub import scrub

TOKEN = "hf_" + "abcdefgh" * 4


KEY = "0123456789abcdef" * 2 + "01234567"  # as W&B's


PRIVATE = (TOKEN, KEY, "alicesmith", "/home/", "secret-value", "/data/", "bob@", "gpu-box-17", "swordfish")


SETTINGS = {
    "train_learning_rate": 3e-4,
    "seed": 0,
    "max_sequence_length": 8,
    "logdir": "/home/alicesmith/runs/digits",
    "resume_from": Path("/data/alicesmith/checkpoints/epoch 7"),
    "run_name": "alicesmith_run-3",
    "hub_token": TOKEN,
    "resolution": torch.float32,
    "tracker_kwargs": {
        "wandb": {"entity": "alice", "apiKey": "secret-value", "notes": f"see {TOKEN}, or ask bob@lab.org"},
        "tags": [
            "a",
            f"key {KEY}",
            "out=/home/alicesmith/x/y.txt",
            "https://alicesmith:swordfish@host.org/x",
        ],
    },
    "project_kwargs": {
        "project_dir": "~alicesmith/p",
        "nested": [{"password": "swordfish", "depth": (1, 2)}],
    },
    "negative_prompts": "blurry and/or dark, 1/2 size",
    "docs": "https://huggingface.co/docs/peft",
    "node": "gpu-box-17",
    "comment": "the word was swordfish",
    "accelerator_kwargs": json.dumps({"wandb": {"api_key": "secret-value", "mode": "offline"}}),
    "command": "train --hub_token=secret-value --wandb-password swordfish {'user_name': 'secret-value'}",
}


def on_a_private_machine(patch):
    """A machine with a name, a user and a secret in its environment."""
    patch.setattr("socket.gethostname", lambda: "gpu-box-17")
    patch.setenv("LOGNAME", "alicesmith")
    patch.setenv("MY_API_KEY", "swordfish")


@pytest.fixture
def elsewhere(monkeypatch):
    on_a_private_machine(monkeypatch)


def test_scrub_keeps_the_training_and_drops_the_machine(elsewhere):
    published = scrub(SETTINGS)
    text = json.dumps(published)
    assert [part for part in PRIVATE if part in text] == []
    kept = ("train_learning_rate", "seed", "max_sequence_length", "negative_prompts", "docs")
    assert {name: published[name] for name in kept} == {name: SETTINGS[name] for name in kept}
    assert (published["logdir"], published["resume_from"]) == ("digits", "epoch 7")
    assert published["tracker_kwargs"]["tags"][2] == "out=y.txt"
    assert published["project_kwargs"]["nested"] == [{"depth": [1, 2]}]
    assert published["accelerator_kwargs"] == {"wandb": {"mode": "offline"}}
    assert scrub(published) == published


def test_scrub_takes_names_from_homes_of_other_machines():
    settings = {
        "a": "/Users/carol.jones/x",
        "b": "carol.jones",
        "c": r"C:\Users\dave99\data",
        "d": ["dave99"],
    }
    assert scrub(settings) == {"a": "x", "b": "[removed]", "c": "data", "d": ["[removed]"]}
    assert scrub({"home": "/home/erin", "tilde": "~", "revision": KEY}) == {
        "home": "[removed]",
        "tilde": "[removed]",
        "revision": KEY,
    }
