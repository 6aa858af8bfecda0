"""reasoning-gym's data sets and their verifiers (arXiv 2505.24760): what is imported where answers are judged.

The package is imported where a data set is opened, and nowhere else.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dcjax.rewards.answers import PLACES, Place

CHUNK = 500
"""Problems of one data set object, which is reasoning-gym's own default; some make all of them at once."""
_TRIGONOMETRIC = {f"{arc}{name}{h}" for arc in ("", "a") for name in ("sin", "cos", "tan") for h in ("", "h")}
FUNCTIONS = frozenset({"abs", "Abs", "sqrt", "exp", "log", "ln", "sec", "csc", "cot"} | _TRIGONOMETRIC)
"""Names that may be called in an answer that is evaluated."""


@dataclass(frozen=True)
class Source:
    """A data set with its parameters, and the level of its curriculum, if that decides some of them."""

    name: str
    parameters: tuple[tuple[str, Any], ...] = ()
    level: int | None = None

    def open(self, seed: int) -> Any:
        """The data set of reasoning-gym with `CHUNK` problems."""
        return _open(self, seed)

    @property
    def levels(self) -> int:
        """How many levels its curriculum has."""
        from reasoning_gym.factory import create_curriculum

        return max(len(each.levels) for each in create_curriculum(self.name).attributes.values())


def parse(written: str) -> Source:
    """The data set that a text such as chain_sum(min_terms=2) means; nothing is executed.

    Raises:
      ValueError: it is not written like that; the message begins with the text.
    """
    try:
        node = ast.parse(written.strip(), mode="eval").body
        call = ast.Call(node, [], []) if isinstance(node, ast.Name) else node
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args):
            raise ValueError
        given = [(keyword.arg or "", ast.literal_eval(keyword.value)) for keyword in call.keywords]
        if not all(name for name, _ in given):
            raise ValueError
        return Source(call.func.id, tuple((name, _frozen(value)) for name, value in given))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError(f"{written!r}; it must be NAME or NAME(PARAMETER=VALUE, ...), with plain values") from None


def require_gym() -> str:
    """The version of reasoning-gym.

    Raises:
      FileNotFoundError: it is not installed.
    """
    try:
        return importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError("reasoning-gym is not installed; pip install 'dcjax[tasks]' installs it") from None


def gym_reward(text: str, gold: str, *, finished: bool, record: Mapping[str, Any], place: Place) -> float:
    """What a data set's own verifier gives to the answer of a finished response, most often from 0 to 1.

    Some verifiers evaluate an answer as Python or by SymPy. These are only given answers that `is_plain`.

    Args:
      text: the response, decoded without special tokens.
      gold: not used: verifiers look at the whole problem.
      finished: whether the end token was generated; a response that was cut off scores 0.
      record: the problem: its `Source`, and reasoning-gym's own entry.
      place: where the answer stands.
    """
    answer = PLACES[place](text) if finished else None
    if answer is None:
        return 0.0
    verifier = record["source"].open(0)
    if _evaluates(type(verifier)) and not is_plain(answer):
        return 0.0
    try:
        return float(verifier.score_answer(answer, record["entry"]))
    except MemoryError:
        raise
    except Exception:  # it does not expect every text
        return 0.0


def is_plain(answer: str) -> bool:
    """Whether evaluating a text can call nothing but mathematical functions: neither attributes nor other names.

    A text that is no Python expression is plain if it has no parenthesis, as nothing is called without one.
    """
    try:
        tree = ast.parse(answer.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return "(" not in answer
    except (RecursionError, MemoryError):
        return False
    return all(_is_harmless(node) for node in ast.walk(tree))


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
    refused = ast.Attribute, ast.Lambda, ast.NamedExpr, ast.JoinedStr, ast.comprehension, ast.Starred, ast.Await
    return not isinstance(node, (*refused, ast.Yield, ast.YieldFrom))


@functools.cache
def _evaluates(kind: type) -> bool:
    """Whether the module of a data set evaluates texts."""
    source = inspect.getsource(sys.modules[kind.__module__])
    return any(f"{name}(" in source for name in ("eval", "exec", "parse_expr", "sympify"))


@functools.lru_cache(maxsize=32)
def _open(source: Source, seed: int) -> Any:
    from reasoning_gym.factory import create_curriculum, create_dataset

    given = {"seed": seed, "size": CHUNK} | dict(source.parameters)
    if source.level is None:
        return create_dataset(source.name, **given)
    curriculum = create_curriculum(source.name)
    for name, attribute in curriculum.attributes.items():
        curriculum.set_attr_level(name, min(source.level, len(attribute.levels) - 1))
    return create_dataset(source.name, **vars(curriculum.generate_configuration(given)))


def _frozen(value: Any) -> Any:
    """A literal with tuples for lists; raises TypeError for one that cannot be hashed."""
    value = tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
    hash(value)
    return value
