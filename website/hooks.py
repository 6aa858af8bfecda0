"""What MkDocs does beside rendering docs/: pages made from the code, and files that pages link to outside docs/.

The site stands alone: a link such as ../dcjax/recipes/quickstart.py leads to a copy of that file in the site.
"""

from __future__ import annotations

import re
from pathlib import Path

import pages  # pyrefly: ignore[missing-import]  (beside this file)
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?\[[^\]]*\]\()((?:\.\./)+)([^)#\s]+)")
"""A link that begins with ../, in three parts: before it, the ways up, and the path."""
NOTEBOOK = re.compile(r"(\]\([^)\s]*notebooks/\w+)\.ipynb\)")
"""A link to a notebook, which the site shows as a page."""
BESIDE_DOCS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")


def on_files(files: Files, config) -> Files:
    """Adds the pages that are made, and the files that pages link to."""
    for path, text in pages.all_pages().items():
        files.append(File.generated(config, path, content=text))
    linked = {
        target
        for file in files.documentation_pages()
        for target in _outside(file.src_uri, file.content_string)
        if target not in BESIDE_DOCS
    }
    for target in sorted(linked):
        if not (ROOT / target).exists():
            raise PluginError(f"a page links to {target}, which is not there")
        files.append(File.generated(config, f"files/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Leads links to files outside docs/ to their copies, and those to what is a page, a notebook too, to the page."""
    up = "../" * page.file.src_uri.count("/")

    def led(found: re.Match) -> str:
        before = found[1]
        target = _target(page.file.src_uri, found)
        if target is None:
            return found[0]
        if target in BESIDE_DOCS:
            there = {"README.md": "index.md"}.get(target, Path(target).name.lower())
            return f"{before}{up}{there}"
        if target.startswith("docs/"):
            return f"{before}{up}{target.removeprefix('docs/')}"
        return f"{before}{up}files/{target}"

    if not page.file.src_uri.startswith("notebooks/"):  # whose pages lead to the files
        markdown = NOTEBOOK.sub(r"\1.md)", markdown)
    return LINK.sub(led, markdown)


def _outside(page: str, text: str) -> set[str]:
    """The files in the checkout and outside docs/ that a page links to."""
    targets = {_target(page, found) for found in LINK.finditer(text)}
    return {target for target in targets if target is not None and not target.startswith("docs/")}


def _target(page: str, found: re.Match) -> str | None:
    """What a link leads to, as a path in the checkout; None where that is in docs/ as the page sees it."""
    path = (ROOT / "docs" / page).parent / (found[2] + found[3])
    resolved = path.resolve()
    if resolved.is_relative_to(ROOT / "docs") or not resolved.is_relative_to(ROOT):
        return None
    return resolved.relative_to(ROOT).as_posix()
