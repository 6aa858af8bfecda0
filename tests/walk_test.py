"""docs/walk.md follows one batch: what it names exists, and is called in its order."""

import importlib
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import tiny
from stepping import Stepper

import dcjax
from dcjax.rewards.in_process import InProcessRewards

PACKAGE = Path(dcjax.__file__).parent
PAGE = (PACKAGE.parent / "docs/walk.md").read_text(encoding="utf-8")
NUMBERED = re.findall(r"^(\d+)\. `(dcjax[\w.]+)`", PAGE, re.MULTILINE)
WALK = [name for _, name in NUMBERED]

# programs of the finished run, which most likely are compiled already
CONFIG = replace(tiny.CONFIG, warm_start=replace(tiny.CONFIG.warm_start, steps=0))


def resolve(name):
    """What MODULE.QUALNAME stands for."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(f"no module in {name}")


class Calls:
    """The functions of these names, in the order in which they are called."""

    def __init__(self, names):
        self.names, self.called = set(names), []

    def __enter__(self):
        sys.setprofile(self._record)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)

    def _record(self, frame, event, argument):
        code = frame.f_code
        # those that check arguments in tests have the names of what they wrap, and other files
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)):
            return
        # a function that was returned counts as the one that made it
        function = f"{frame.f_globals['__name__']}.{code.co_qualname.split('.<locals>')[0]}"
        if function in self.names:
            self.called.append(function)


def test_the_walk_is_numbered_without_gaps():
    assert [int(number) for number, _ in NUMBERED] == list(range(1, len(NUMBERED) + 1))
    assert len(WALK) == len(re.findall(r"^\d+\. ", PAGE, re.MULTILINE)) > 30


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(dcjax\.[\w.]+)`", PAGE))))
def test_what_the_page_names_exists(name):
    assert callable(resolve(name))


@pytest.mark.slow
def test_an_iteration_calls_the_functions_in_the_order_of_the_page():
    """The first time that a function is named is its first call, the second time its second."""
    stepper = Stepper(CONFIG, InProcessRewards(CONFIG.task.reward))
    state, cursor = stepper.begin()
    # functions of compiled programs are called while these are traced
    jax.clear_caches()
    with Calls(WALK) as calls:
        state, cursor, _, _ = stepper.iterate(state, cursor)
        stepper.sampler(state, cursor)

    places, mentions = [], Counter()
    for name in WALK:
        mentions[name] += 1
        found = [place for place, called in enumerate(calls.called) if called == name]
        assert len(found) >= mentions[name], f"{name} is called {len(found)} times"
        places.append(found[mentions[name] - 1])
    wrong = [f"{WALK[i]} before {WALK[i + 1]}" for i in range(len(WALK) - 1) if places[i] >= places[i + 1]]
    assert not wrong, f"not in this order: {'; '.join(wrong)}"
