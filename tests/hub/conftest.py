import adapters
import pytest


@pytest.fixture
def elsewhere(monkeypatch):
    adapters.on_a_private_machine(monkeypatch)
