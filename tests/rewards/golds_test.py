import time

import pytest

from dcjax.rewards import golds
from dcjax.rewards.golds import unreadable

pytestmark = pytest.mark.heavy


def test_golds_that_cannot_be_read_are_found_within_limits(monkeypatch):
    """One that takes minutes is found too, and costs what an answer may."""
    hangs = r"\sum_{k=1}^{999999999} \frac{1}{k^k}"
    readable = ["5.", "-1./3", "4.5e33", r"\frac{1}{m} t", "14-i", "x>2", r"\text{Sunday}"]
    began = time.monotonic()
    assert unreadable([*readable, r"A \cap B", hangs, "7", r"A \cap B", "{"]) == {r"A \cap B", hangs, "{"}
    assert time.monotonic() - began < 30


def test_numbers_start_no_process(monkeypatch):
    monkeypatch.setattr(golds, "RewardPool", None)
    assert unreadable([]) == unreadable(["7", "0.5", "-1./3", "4.5e33", r"\frac{1}{2}"]) == set()
