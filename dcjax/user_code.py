"""Python files of users: recipes above all. They are loaded by path, kept with a run, and loaded again from there."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from dcjax.errors import RunError

RECIPE = "recipe"
"""The module's name in references to what the recipe of a run defines: recipe:MyObjective."""

_PREFIX = "dcjax_recipe_"
_LONGEST = 400
"""The most characters of an exception that are quoted."""
_loaded: dict[str, CodeFile] = {}
"""The files that were loaded, by the names of their modules."""


@dataclass(frozen=True)
class CodeFile:
    """A Python file and what it held when it was read."""

    path: Path
    source: bytes

    @classmethod
    def read(cls, path: Path) -> CodeFile:
        """The file at a path; raises OSError."""
        return cls(path.absolute(), path.read_bytes())

    @property
    def sha256(self) -> str:
        """The SHA-256 of the source, in hexadecimal."""
        return hashlib.sha256(self.source).hexdigest()

    @property
    def module_name(self) -> str:
        """What its module is called: equal sources are one module, whose classes are equal, wherever they were read."""
        return f"{_PREFIX}{self.sha256[:16]}"

    def load(self) -> ModuleType:
        """Executes the file as a module, once a process; raises whatever it raises."""
        if self.module_name in _loaded:
            return sys.modules[self.module_name]
        module = ModuleType(self.module_name)
        module.__file__ = str(self.path)
        # A dataclass looks its module up by name while it is being defined.
        sys.modules[self.module_name] = module
        try:
            exec(compile(self.source, self.path, "exec", dont_inherit=True), module.__dict__)
        except BaseException:
            del sys.modules[self.module_name]
            raise
        _loaded[self.module_name] = self
        return module


def code_files_in(pickled: bytes) -> list[CodeFile]:
    """The loaded files whose modules a pickled object refers to; another process has to load them first."""
    return [file for name, file in _loaded.items() if name.encode() in pickled]


def file_of(module_name: str) -> CodeFile | None:
    """The file that a module of user code was loaded from; None if dcjax or an installed package provides the module.

    Raises:
      ValueError: the module has no file, as in a notebook.
    """
    if module_name in _loaded:
        return _loaded[module_name]
    if is_installed(module_name):
        return None
    path = getattr(sys.modules[module_name], "__file__", None)
    if path is None:
        raise ValueError(f"{module_name} is not a file; put what it defines into a Python file")
    return CodeFile.read(Path(path))


def is_installed(module_name: str) -> bool:
    """Whether dcjax or an installed package provides a module; nothing is imported to find out."""
    top = module_name.partition(".")[0]
    return top == "dcjax" or top in _installed_modules()


@functools.cache
def _installed_modules() -> frozenset[str]:
    # An editable installation may list no modules; it is then taken to provide the one that is called like itself.
    names = {distribution.name for distribution in importlib.metadata.distributions()}
    return frozenset(importlib.metadata.packages_distributions()) | {
        name.replace("-", "_") for name in names if name is not None
    }


def reference_to(defined: Any) -> str:
    """MODULE:NAME of a class or function; MODULE is `recipe` for what a user's file defines.

    Raises:
      ValueError: it is not defined at the top level of its module, or the module has no file.
    """
    name = defined.__qualname__
    if "<" in name:
        raise ValueError(f"{name} must be defined at the top level of its file")
    module = defined.__module__ if file_of(defined.__module__) is None else RECIPE
    return f"{module}:{name}"


def find(reference: str, recipe: CodeFile | None) -> Any:
    """What MODULE:NAME refers to. Only dcjax, installed packages and the recipe are imported.

    Args:
      reference: as `reference_to` gives it.
      recipe: the file that `recipe:` stands for; None if there is none.

    Raises:
      ValueError: it is no such reference, or refers to something else or to nothing; or the recipe raises an error.
    """
    module_name, colon, name = reference.partition(":") if isinstance(reference, str) else (reference, "", "")
    if not (colon and all(part.isidentifier() for part in (*module_name.split("."), *name.split(".")))):
        raise ValueError(f"{reference!r} is not MODULE:NAME")
    if module_name == RECIPE and recipe is None:
        raise ValueError(f"{reference!r} is in a recipe, and there is none")
    if module_name != RECIPE and not is_installed(module_name):
        raise ValueError(f"{reference!r} is neither in dcjax, nor in the recipe, nor in an installed package")
    try:
        found: Any = recipe.load() if module_name == RECIPE and recipe else importlib.import_module(module_name)
        return functools.reduce(getattr, name.split("."), found)
    except (Exception, SystemExit) as error:  # The module's own code may raise anything.
        defined_in = recipe.module_name if module_name == RECIPE and recipe else module_name
        raise ValueError(f"{reference!r} cannot be imported: {failure(error, defined_in)}") from error


def failure(error: BaseException, module_name: str, code: CodeType | None = None) -> str:
    """An error of a user's code on one line: "KeyError: 'x' (mine.py, line 12, in judge)".

    Args:
      error: as it was caught.
      module_name: of the code; the line is the last that ran in this module, or in another of its package.
      code: the function that is named with its first line where none of them ran; without it no line is.
    """
    # a TracebackException also survives exceptions that cannot be turned into text
    text = f"{type(error).__name__}: {traceback.TracebackException(type(error), error, None)}".removesuffix(": ")
    told, line = " ".join(text.split())[:_LONGEST], None
    for frame, number in traceback.walk_tb(error.__traceback__):
        written = not frame.f_code.co_filename.startswith("<")  # the methods that dataclass generates are not
        if written and _package(str(frame.f_globals.get("__name__"))) == _package(module_name):
            code, line = frame.f_code, number
    return (
        told if code is None else f"{told} ({code.co_filename}, line {line or code.co_firstlineno}, in {_name(code)})"
    )


def function_of(called: Any) -> Any:
    """The function that a callable runs: without bound arguments and wrappers, and of an object its `__call__`."""
    while isinstance(called, functools.partial):
        called = called.func
    called = inspect.unwrap(called)
    return called if hasattr(called, "__code__") else type(called).__call__


@contextlib.contextmanager
def refusals_of(*sections: Any) -> Iterator[None]:
    """Where methods of a config's sections are called: what they refuse, and how their own code fails, in one line.

    Raises:
      RunError: code of a section that is not dcjax's raised an error, whose line is named; or a section raised a
        ValueError or a FileNotFoundError, which say by themselves what is wrong.
    """
    try:
        yield
    except (RunError, BrokenPipeError):
        raise
    except (Exception, SystemExit) as error:
        _tell_own(error, [type(section).__module__ for section in sections])
        if isinstance(error, ValueError | FileNotFoundError):
            raise RunError(str(error)) from None
        raise


@contextlib.contextmanager
def failures_of_files() -> Iterator[None]:
    """Where a command runs, and with it any functions of the files that it loaded, in JAX's hands too.

    Raises:
      RunError: code of such a file raised an error; its function and line are named.
    """
    try:
        yield
    except (RunError, BrokenPipeError):
        raise
    except (Exception, SystemExit) as error:
        _tell_own(error, _loaded)
        raise


def _tell_own(error: BaseException, module_names: Iterable[str]) -> None:
    """Raises RunError if code of one of these modules, dcjax's apart, ran when an error was raised."""
    ran = {_package(str(frame.f_globals.get("__name__"))) for frame, _ in traceback.walk_tb(error.__traceback__)}
    for module_name in module_names:
        if _package(module_name) != "dcjax" and _package(module_name) in ran:
            raise RunError(failure(error, module_name)) from error


def _package(module_name: str) -> str:
    return module_name.partition(".")[0]


def _name(code: CodeType) -> str:
    return getattr(code, "co_qualname", code.co_name)
