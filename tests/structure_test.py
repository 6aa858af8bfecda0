"""Imports run in one direction, as CONTRIBUTING draws them, and rooms that are NumPy's never reach JAX."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dcjax"
FLOORS = (
    *("errors", "paths", "signals", "types", "arguments", "user_code", "keys", "spans", "allocator"),
    *("rewards", "data", "rl", "sharding", "models", "serving", "reporting"),
    *("recipe", "recipes", "loop", "tools", "cli", "__main__"),
)
"""From the bottom up: what stands later may import what stands before it."""


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Whole names of the modules, and of what is imported from them, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_module_stands_on_a_floor():
    assert {room_of(path) for path in MODULES} == set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_points_back(path):
    own = FLOORS.index(room_of(path))
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package == "dcjax" and rest and rest != "__version__":
            assert FLOORS.index(rest.split(".")[0]) <= own, f"{path} imports {name}"


@pytest.mark.parametrize("room", ["data", "rewards"])
def test_tasks_and_rewards_are_of_numpy(room):
    for path in (PACKAGE / room).rglob("*.py"):
        reached = {name.split(".")[0] for name in imported(path)} | {
            ".".join(name.split(".")[:2]) for name in imported(path)
        }
        assert not reached & {"jax", "flax", "optax", "dcjax.models", "dcjax.serving", "dcjax.rl", "dcjax.types"}, path


@pytest.mark.parametrize(("room", "never"), [("rl", "models"), ("rl", "serving"), ("models", "rl"), ("models", "data")])
def test_what_is_learned_knows_nothing_of_networks_and_these_nothing_of_tasks(room, never):
    for path in (PACKAGE / room).rglob("*.py"):
        assert not [name for name in imported(path) if name.startswith(f"dcjax.{never}")], path
