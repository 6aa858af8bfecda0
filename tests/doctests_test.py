"""The examples in docstrings print what they say, in every module that has some."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import dcjax

ROOT = Path(dcjax.__file__).parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def examples_of(source):
    """The docstrings with examples, each behind the name of what it documents.

    They are read from the source: `doctest.testmod` does not see functions that a decorator has wrapped, as `masks`
    wraps most of `dcjax.rl`, and passes without having run their examples.
    """
    documented = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
    docstrings = [(getattr(node, "name", "module"), ast.get_docstring(node)) for node in documented]
    return [(name, text) for name, text in docstrings if text and (">>>" in text or "Examples:" in text)]


def modules_with_examples():
    sources = {path: path.read_text() for path in sorted(ROOT.rglob("*.py"))}
    found = {path: examples_of(source) for path, source in sources.items() if ">>>" in source or "Examples:" in source}
    return {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): each for path, each in found.items() if each}


MODULES = modules_with_examples()


def run(docstrings, names):
    """Runs every example, with these names defined; returns what went wrong."""
    runner, report = doctest.DocTestRunner(), []
    for name, text in docstrings:
        test = doctest.DocTestParser().get_doctest(text, dict(names), name, None, 0)
        assert test.examples, f"{name} announces examples and has none"
        runner.run(test, out=report.append)
    return "".join(report)


def test_there_are_examples():
    assert "dcjax.rl.losses" in MODULES


def test_an_example_that_is_wrong_is_found():
    wrong = examples_of('@decorated\ndef f():\n    """Says so.\n\n    Examples:\n      >>> one + 1\n      3\n    """')
    assert "Expected:\n    3\nGot:\n    2\n" in run(wrong, {"one": 1})


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_print_what_they_say(name):
    assert run(MODULES[name], vars(importlib.import_module(name))) == ""
