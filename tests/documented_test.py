"""Every public name has a docstring, or takes the place of one that has."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dcjax"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if PACKAGE / "recipes" not in path.parents)
TREES = {path: ast.parse(path.read_text()) for path in MODULES}
CLASSES = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def undocumented(nodes):
    """Names of public functions and classes without a docstring."""
    kinds = (*FUNCTIONS, ast.ClassDef)
    public = [node for node in nodes if isinstance(node, kinds) and not node.name.startswith("_")]
    return [node.name for node in public if not ast.get_docstring(node)]


def takes_the_place(name, held):
    """Whether a class extends one that documents the name, or one of another package, whose documentation counts."""
    for base in held.bases:
        of = ast.unparse(base).split("[")[0].split(".")[-1]
        if of not in CLASSES:
            return True
        if any(isinstance(node, (*FUNCTIONS, ast.AnnAssign)) and name_of(node) == name for node in CLASSES[of].body):
            return True
        if takes_the_place(name, CLASSES[of]):
            return True
    return False


def name_of(node):
    return node.name if isinstance(node, FUNCTIONS) else ast.unparse(node.target)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_public_name_says_what_it_is(path):
    tree = TREES[path]
    assert ast.get_docstring(tree)
    assert undocumented(tree.body) == []
    for held in tree.body:
        if isinstance(held, ast.ClassDef) and not held.name.startswith("_"):
            left = [name for name in undocumented(held.body) if not takes_the_place(name, held)]
            assert left == [], held.name
