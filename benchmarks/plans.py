"""Plans of the recipes at full scale on the slices that they name, for docs/papers.md and the recipes' docstrings.

    python benchmarks/plans.py [RECIPE ...]
    python benchmarks/plans.py --claims      # the full recipes of the laboratory's claims, into results/claims.json

Each is compiled for its slice, which takes two to five minutes, with responses half as long as they may be on average,
and written to results/plans.json with its config. Printed are the rows of the table and the docstrings' sentences.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

from dcjax.cli.session import jax_session
from dcjax.cli.train import config_of
from dcjax.recipe.plain import flatten, to_dict
from dcjax.tools.plan.plan import make_plan
from dcjax.tools.plan.tables import to_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "plans.json"
CLAIMS = RESULTS.with_name("claims.json")
RECIPES = (
    "dcmdp_qwen3_8b",
    "dcmdp_qwen3_30b_a3b",
    "case_study_1_5b",
    "length_decay_qwen3_4b",
    "length_decay_qwen3_8b",
)
GIB = 2**30


def described(recipe: str) -> tuple[dict[str, Any], str]:
    """A recipe's config as its fields are overridden, and the slice that its docstring names."""
    file = runpy.run_path(str(ROOT / "dcjax" / "recipes" / f"{recipe}.py"))
    named = re.search(r"^Slice: (\S+),", file["__doc__"], re.MULTILINE)
    assert named is not None, recipe
    return json.loads(json.dumps(flatten(to_dict(file["config"]())), default=str)), named[1]


def planned(recipe: str) -> dict[str, Any]:
    """A recipe's plan, as `dcjax plan --json` prints it, beside its config."""
    fields, topology = described(recipe)
    config = runpy.run_path(str(ROOT / "dcjax" / "recipes" / f"{recipe}.py"))["config"]()
    plan = make_plan(config, topology, told=lambda line: print(f"{recipe}: {line}", file=sys.stderr, flush=True))
    return {"config": fields, "steps": config.steps, "plan": json.loads(to_json(plan))}


def plan_claims() -> None:
    """Plans the full recipe of each claim that has no plan yet, and prints a row of docs/findings.md for each."""
    study = runpy.run_path(str(ROOT / "experiments" / "lab" / "study.py"))["study"]()
    results = json.loads(CLAIMS.read_text()) if CLAIMS.exists() else {}
    lines = list(dict.fromkeys(line for claim in study.claims for line in claim.full))
    for line in (line for line in lines if line not in results):
        config, _ = config_of(line.split())
        _, topology = described(line.split()[0])
        plan = json.loads(to_json(make_plan(config, topology, told=lambda told: print(told, file=sys.stderr))))
        results[line] = {
            "topology": topology,
            "gib": round(most_held(plan), 1),
            "iteration_seconds": round(plan["iteration_seconds"]["all"], 1),
            "compile_seconds": round(sum(program["compile_seconds"] for program in plan["programs"].values())),
        }
        CLAIMS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    for line in lines:
        of_line = results[line]
        claims = ", ".join(dict.fromkeys(claim.key for claim in study.claims if line in claim.full))
        print(f"| {claims} | `{line}` | {of_line['topology']} | {of_line['gib']} | {of_line['iteration_seconds']} |")


def sentence(of_recipe: dict[str, Any]) -> str:
    """What a recipe's docstring says of its plan."""
    plan = of_recipe["plan"]
    seconds = plan["iteration_seconds"]
    return (
        f"Plan, with responses of {plan['mean_response_length']:g} tokens on average: at most {most_held(plan):.1f} "
        f"GiB of a chip; an iteration takes at least {seconds['all']:.1f} s, of which decoding {seconds['decode']:.1f} "
        f"and the update {seconds['update']:.1f}; {of_recipe['steps']} steps are at least {plan['chip_hours']:,.0f} "
        "chip-hours."
    )


def most_held(plan: dict[str, Any]) -> float:
    """GiB that a chip holds at most, in any of the programs."""
    names = ("argument_bytes", "output_bytes", "temp_bytes", "resident_bytes")
    return max(sum(program[name] for name in names) for program in plan["programs"].values()) / GIB


def table_row(recipe: str, of_recipe: dict[str, Any]) -> str:
    """A row of docs/papers.md: memory, the train step, the iteration."""
    plan = of_recipe["plan"]
    step = plan["programs"]["train_step"]
    kind = max(step["collective_bytes"], key=step["collective_bytes"].get)
    sent = f"{sum(step['collective_bytes'].values()) / 1e9:,.0f}, mostly {kind}"
    bounds = " / ".join(f"{step['seconds'][name]:.1f}" for name in ("compute", "memory", "links"))
    return (
        f"| `{recipe}` | {most_held(plan):.1f} | {step['flops'] / 1e12:,.0f} | {bounds} | {sent} "
        f"| {100 * plan['update_share_of_peak']:.0f}% | {plan['iteration_seconds']['all']:.1f} "
        f"| {plan['tokens_per_second_per_chip']:,.0f} | {plan['chip_hours']:,.0f} | {step['compile_seconds']:.0f} |"
    )


def main(recipes: list[str]) -> None:
    """Plans the recipes, and prints what is to be written of them."""
    # nothing is computed, so that no accelerator need be taken
    os.environ["JAX_PLATFORMS"] = "cpu"
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with jax_session():
        if recipes == ["--claims"]:
            plan_claims()
            return
        for recipe in recipes or RECIPES:
            results[recipe] = planned(recipe)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    for recipe, of_recipe in results.items():
        print(table_row(recipe, of_recipe))
    for recipe, of_recipe in results.items():
        print(f"{recipe}: {sentence(of_recipe)}")


if __name__ == "__main__":
    main(sys.argv[1:])
