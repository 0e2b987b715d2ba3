"""What is published of a run's settings: the training, nothing of the machine or its user."""

import json

from adapters import KEY, PRIVATE, SETTINGS

from trl_tafs.hub.scrub import scrub


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
