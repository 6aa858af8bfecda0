"""What a reader of the code has to hold in mind, counted: modules at the root, rooms, imports, lengths of functions.

Usage: python benchmarks/structure.py [CHECKOUT ...]; of each checkout one column. A room is a folder of modules in
`dcjax/` (with the folders below it), or a module at the root. An import runs back up where its room imports, through
others, the room that it is imported by. The config visits a room that names `Config` in its annotations.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def modules_of(checkout: Path) -> dict[str, ast.Module]:
    """Every module of `dcjax/` by its dotted name, parsed."""
    found = {}
    for path in sorted((checkout / "dcjax").rglob("*.py")):
        name = ".".join(path.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def room_of(module: str) -> str:
    """The first folder or module below `dcjax`."""
    return ".".join(module.split(".")[:2])


def imports_of(module: str, tree: ast.Module, known: dict[str, ast.Module]) -> set[str]:
    """The modules of `dcjax` that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in known} - {module, "dcjax"}


def arrows(modules: dict[str, ast.Module]) -> set[tuple[str, str]]:
    """(importing room, imported room), once each."""
    pairs = {
        (room_of(name), room_of(other)) for name, tree in modules.items() for other in imports_of(name, tree, modules)
    }
    return {(room, other) for room, other in pairs if room != other}


def below(room: str, pairs: set[tuple[str, str]]) -> set[str]:
    """All rooms that a room imports, through others too."""
    found, new = set(), {room}
    while new:
        new = {other for importing, other in pairs if importing in new} - found
        found |= new
    return found


def functions(modules: dict[str, ast.Module]) -> Iterator[FUNCTIONS]:
    """Every function and method, nested ones too."""
    for tree in modules.values():
        yield from (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def code_lines(function: FUNCTIONS) -> int:
    """Lines from `def` to the end, the docstring left out."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


def private_helpers_used_once(modules: dict[str, ast.Module]) -> tuple[int, int]:
    """Of the functions at a module's top whose names begin with one underscore: those named once elsewhere, and all."""
    once, total = 0, 0
    for tree in modules.values():
        names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        for node in tree.body:
            if isinstance(node, FUNCTIONS) and node.name.startswith("_") and not node.name.startswith("__"):
                total, once = total + 1, once + (names.count(node.name) == 1)
    return once, total


def visited_by_config(modules: dict[str, ast.Module]) -> int:
    """Modules in which a parameter is annotated with the whole `Config`."""
    found = set()
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.arg) and node.annotation is not None and ast.unparse(node.annotation) == "Config":
                found.add(name)
    return len(found)


def count(checkout: Path) -> dict[str, str]:
    """The figures of a checkout, by name."""
    modules = modules_of(checkout)
    pairs = arrows(modules)
    rooms = {room_of(name) for name in modules} - {"dcjax"}
    lengths = sorted(code_lines(function) for function in functions(modules))
    once, helpers = private_helpers_used_once(modules)
    back = [pair for pair in pairs if pair[0] in below(pair[1], pairs)]
    return {
        "modules at the root": str(len([path for path in (checkout / "dcjax").glob("*.py")])),
        "rooms": str(len(rooms)),
        "imports between rooms": str(len(pairs)),
        "imports that run in a circle": str(len(back)),
        "imports between modules": str(sum(len(imports_of(name, tree, modules)) for name, tree in modules.items())),
        "modules that take the whole config": str(visited_by_config(modules)),
        "lines of a function, median": f"{statistics.median(lengths):g}",
        "lines of a function, 90th percentile": str(lengths[int(0.9 * len(lengths))]),
        "longest function": str(lengths[-1]),
        "private helpers used once": f"{once} of {helpers}",
    }


def main() -> None:
    """Prints the table."""
    checkouts = [Path(name) for name in sys.argv[1:]] or [Path(__file__).resolve().parent.parent]
    columns = [count(checkout) for checkout in checkouts]
    width = max(map(len, columns[0]))
    for name in columns[0]:
        print(name.ljust(width), *(column[name].rjust(12) for column in columns))


if __name__ == "__main__":
    main()
