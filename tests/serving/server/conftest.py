"""Servers that a test stops are gone in a moment."""

import pytest

from dcjax.serving.server import life


@pytest.fixture(autouse=True)
def shorter_linger(monkeypatch):
    monkeypatch.setattr(life, "LINGER", 0.2)
