"""What is said reaches a terminal, or the handlers that the user has; without either, warnings alone."""

import logging

import pytest

from trl_tafs.output import speech
from trl_tafs.output.secrets import remember


@pytest.fixture
def nobody(monkeypatch):
    """Call it for no handlers of the user's, as in a program that hasn't set logging up; pytest has its own."""
    monkeypatch.delenv(speech.VARIABLE, raising=False)
    return lambda: monkeypatch.setattr(logging.getLogger(), "handlers", [])


def said(capsys):
    speech.say("a line")
    speech.warn("a fault")
    return capsys.readouterr().err


def test_without_a_terminal_only_warnings_are_heard(nobody, capsys):
    nobody()
    assert not speech.is_heard()
    assert said(capsys) == "a fault\n"


def test_a_terminal_hears_both(nobody, capsys, monkeypatch):
    nobody()
    monkeypatch.setattr(speech.sys.stderr, "isatty", lambda: True)
    assert speech.is_heard() and said(capsys) == "a line\nwarning: a fault\n"


@pytest.mark.parametrize(("level", "heard"), [("info", True), ("warning", False)])
def test_the_variable_decides_where_it_is_set(nobody, capsys, monkeypatch, level, heard):
    nobody()
    monkeypatch.setenv(speech.VARIABLE, level)
    monkeypatch.setattr(speech.sys.stderr, "isatty", lambda: True)
    assert speech.is_heard() is heard and ("a line" in said(capsys)) is heard


def test_the_users_handlers_decide_where_there_are_some(capsys, caplog, monkeypatch):
    monkeypatch.setattr(speech.sys.stderr, "isatty", lambda: True)
    caplog.set_level("INFO", "trl_tafs")
    assert said(capsys) == "" and [record.message for record in caplog.records] == ["a line", "a fault"]
    assert {record.levelname for record in caplog.records} == {"INFO", "WARNING"}


def test_secrets_are_not_said(caplog):
    remember("hf_averysecrettoken")
    speech.warn("with hf_averysecrettoken in it")
    assert "hf_averysecrettoken" not in caplog.text
