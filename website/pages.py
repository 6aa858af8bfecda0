"""Pages of the site that are made from other files: fields, commands and names from the code, notebooks, changelog."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "serving", "rl", "data", "rewards", "sharding", "recipe", "loop", "reporting", "tools")
"""Packages whose names the reference documents."""


def all_pages() -> dict[str, str | bytes]:
    """Markdown, and the pictures that it shows, by their places in docs/."""
    return {
        "index.md": _from_root("README.md"),
        "changelog.md": _from_root("CHANGELOG.md"),
        "contributing.md": _from_root("CONTRIBUTING.md"),
        "reference/config.md": config_page(),
        "reference/commands.md": commands_page(),
        **api_pages(),
        **notebook_pages(),
    }


def _from_root(name: str) -> str:
    """A page that lies beside docs/, its links as pages in docs/ have them."""
    text = (ROOT / name).read_text("utf-8")
    return re.sub(r"\]\((?!https?:|#)(?:docs/)?", lambda found: "](" if "docs/" in found[0] else "](../", text)


# --- fields ---


def config_page() -> str:
    """Every field of a recipe's `Config` with its type, default and meaning."""
    from dcjax.recipe.config import Config

    set_by = "What `dcjax train RECIPE --section.field value` sets ([recipes](../recipes.md))."
    lines = ["# Fields of a run", "", set_by, ""]
    sections = []
    for field in dataclasses.fields(Config):
        default = _default(field)
        if dataclasses.is_dataclass(default):
            sections.append((field.name, default))
    lines += ["## Of the run", "", *_table("", Config(), skipped={name for name, _ in sections})]
    for name, default in sections:
        told = (inspect.getdoc(type(default)) or "").splitlines()[0]
        lines += [f"## {name}", "", told, "", *_table(f"{name}.", default)]
    return "\n".join(lines)


def _table(prefix: str, section: Any, skipped: frozenset[str] | set[str] = frozenset()) -> list[str]:
    told = documentation(type(section))
    lines = ["| field | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(section):
        if field.name in skipped:
            continue
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            inner = documentation(type(value))
            lines += [
                _row(f"{prefix}{field.name}.{below.name}", getattr(value, below.name), inner.get(below.name, ""))
                for below in dataclasses.fields(value)
            ]
            continue
        lines.append(_row(prefix + field.name, value, told.get(field.name, "")))
    return [*lines, ""]


def _row(name: str, value: Any, meaning: str) -> str:
    return f"| `{name}` | `{value!r}` | {_cell(meaning)} |".replace("``", "` `")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def documentation(section: type) -> dict[str, str]:
    """The string behind each field of a class and of those that it extends."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__[:-1]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(node, ast.ClassDef)
        for field, behind in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = behind.value if isinstance(behind, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[field.target.id] = inspect.cleandoc(text.value)
    return found


# --- commands ---


def commands_page() -> str:
    """The help of each command."""
    from dcjax.cli import build_parser

    parser = build_parser()
    lines = ["# Commands", "", "What `dcjax COMMAND --help` prints.", "", *_help(parser)]
    for name, below in _parsers(parser):
        lines += [f"## dcjax {name}", "", *_help(below)]
    return "\n".join(lines)


def _help(parser: Any) -> list[str]:
    return ["```text", parser.format_help().rstrip(), "```", ""]


def _parsers(parser, before: str = ""):
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for name, below in action.choices.items():
                yield f"{before}{name}", below
                yield from _parsers(below, f"{before}{name} ")


# --- names ---


def api_pages() -> dict[str, str]:
    """A page for each package, with all of its modules' public names."""
    pages = {"reference/api/types.md": _api_page("dcjax.types", ["dcjax.types"])}
    for package in PACKAGES:
        module = importlib.import_module(f"dcjax.{package}")
        pages[f"reference/api/{package}.md"] = _api_page(f"dcjax.{package}", [module.__name__, *_modules(module)])
    return pages


def _modules(package: ModuleType) -> list[str]:
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda name: None)
    return sorted(module.name for module in found if not module.name.rpartition(".")[2].startswith("_"))


def _api_page(title: str, modules: list[str]) -> str:
    return "\n".join([f"# {title}", "", *(f"::: {module}\n" for module in modules)])


# --- notebooks ---


def notebook_pages() -> dict[str, str | bytes]:
    """A page for each notebook, with the outputs that it was saved with, and their pictures."""
    pages: dict[str, str | bytes] = {}
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        named = {"output_files_dir": path.stem, "unique_key": path.stem}
        text, resources = MarkdownExporter().from_filename(str(path), resources=named)
        title, _, rest = re.sub(r"(\]\(\w+)\.ipynb\)", r"\1.md)", text).strip().partition("\n")
        told = f"This page is the notebook [{path.name}]({path.name}), to be run in Jupyter or in Colab."
        pages[f"notebooks/{path.stem}.md"] = "\n\n".join([title, told, rest])
        pages |= {f"notebooks/{name}": picture for name, picture in resources["outputs"].items()}
    return pages
