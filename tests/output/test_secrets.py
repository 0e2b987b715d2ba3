"""Secrets are found by their form, by the name that they have, and, once given, wherever they are."""

import pytest

from trl_tafs.options import decode_dict
from trl_tafs.output.errors import first_line, one_line, shown
from trl_tafs.output.secrets import hide, remember, remember_all, without_secrets

TOKEN = "hf_" + "abcdefgh" * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"see {TOKEN}!", "see [removed]!"),
        ("http://alice:pw@host:1/x, https://token@hub", "http://host:1/x, https://hub"),
        ("Authorization: Bearer abc.def", "[removed]"),
        ('{"api_key": "abc"}', '{"[removed]"}'),
        ("--hub_token abc --seed 3", "[removed] --seed 3"),
        ("password=abc, next", "[removed], next"),
        ("max_tokens: 3, a tokenizer, keys", "max_tokens: 3, a tokenizer, keys"),
    ],
)
def test_secrets_are_known_by_their_form(text, expected):
    assert hide(text) == expected and hide(expected) == expected


def test_what_was_given_as_a_secret_is_hidden_everywhere_and_what_is_short_is_not(monkeypatch):
    assert hide("swordfish-1 of a client") == "swordfish-1 of a client"
    remember("swordfish-1")
    remember("a")
    remember(None)
    remember_all({"judge": {"apiKey": ["mackerel/2"], "model": "a-long-name"}})
    assert hide("swordfish-1 mackerel/2 mackerel%2F2 a-long-name") == "[removed] [removed] [removed] a-long-name"
    assert decode_dict("tracker_kwargs", '{"wandb": {"api-key": "herring-33"}}') == {"wandb": {"api-key": "herring-33"}}
    monkeypatch.setenv("MY_SECRET", "pilchard-4")
    error = RuntimeError("no herring-33,\nno pilchard-4")
    assert one_line(error) == "no [removed], no [removed]" and first_line(error) == "RuntimeError: no [removed],"
    assert shown(["herring-33"]) == "['[removed]']"


def test_settings_keep_their_shape_and_lose_their_secrets():
    found = object()
    settings = {"a": {"api_key": "abc", "token": None, "n": 1}, "b": [f"x {TOKEN}", ("http://u:p@h",)], "c": found}
    assert without_secrets(settings) == {
        "a": {"api_key": "[removed]", "token": None, "n": 1},
        "b": ["x [removed]", ("http://h",)],
        "c": found,
    }
    assert settings["a"]["api_key"] == "abc"
