"""Writes what the laboratory has found: the tables of docs/findings.md, its page and pictures. Not a recipe.

python experiments/lab/findings.py
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

from dcjax.tools.lab.page import write_page
from dcjax.tools.lab.results import Results
from dcjax.tools.lab.schedule import count_made, total
from dcjax.tools.lab.study import Study
from dcjax.tools.lab.table import render, render_candidates, render_summary
from dcjax.tools.lab.verdicts import candidates, effects_of

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "findings.md"


def tables(study: Study, results: Results) -> dict[str, str]:
    """What stands in the document between `<!-- NAME -->` and the next `<!-- end -->`, by name."""
    done = results.of(study)
    effects = effects_of(study, done)
    shown = [effect for effect in effects if effect.seeds > 1]
    judged = {claim.key for claim in study.claims if claim.verdict}
    return {
        "progress": f"{count_made(study, done)} of {total(study)} runs are made.",
        "claims": render_summary(study, effects, "dcjax lab"),
        "judged": render([effect for effect in shown if effect.claim in judged]),
        "candidates": render_candidates(candidates(effects, "grpo"), study.margin),
        "first looks": render([effect for effect in shown if effect.claim not in judged]),
    }


def filled(text: str, contents: dict[str, str]) -> str:
    """The document with its tables replaced.

    Raises:
      ValueError: it has no place for one.
    """
    for name, content in contents.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, behind = rest.partition("<!-- end -->")
        if not (begin and end):
            raise ValueError(f"{DOCUMENT} has no place for {name!r}: <!-- {name} -->, and <!-- end --> behind it")
        text = f"{before}{begin}{content}\n{end}{behind}"
    return text


def main() -> None:
    """Reads the study and its results, and writes."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    study, results = runpy.run_path(str(HERE / "study.py"))["study"](), Results(HERE / "results.jsonl")
    DOCUMENT.write_text(filled(DOCUMENT.read_text("utf-8"), tables(study, results)), "utf-8")
    page = write_page(DOCUMENT.with_suffix(""), study, results.whole(study), command="dcjax lab")
    print(f"document: {DOCUMENT}\npage: {page}")


if __name__ == "__main__":
    main()
