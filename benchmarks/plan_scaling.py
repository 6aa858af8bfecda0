"""The least time of one update of Qwen3-8B on 16 to 1024 chips of v5p, from programs compiled for them.

    python benchmarks/plan_scaling.py [--json PATH] [--picture PATH]

Responses are of 8192 tokens behind prompts of 1024, each computed in a microbatch of its own; parameters are split over
16 chips, and copied beyond. Weak: a response for each chip. Strong: 512 responses, whatever the number of chips; 1024
chips can share them only as tensor 2. Each bound is of a perfect overlap, as `dcjax plan` reckons.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcjax.cli.session import jax_session
from dcjax.sharding.mesh import MeshConfig
from dcjax.tools.plan.plan import Place

RESULTS = Path(__file__).parent / "results"
RECIPE = Path(__file__).parents[1] / "dcjax" / "recipes" / "dcmdp_qwen3_8b.py"
SLICES = {16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x8x8", 1024: "v5p:8x8x16"}
STRONG_RESPONSES = 512
COLUMNS = 9216
"""That a prompt and a response of the longest need."""


def bounds(chips: int, responses: int) -> dict[str, Any]:
    """Seconds of an update of so many responses by what bounds it, and what of it is sent."""
    shares = min(chips, responses)
    config = runpy.run_path(str(RECIPE))["config"]()
    config = replace(
        config,
        rollout=replace(config.rollout, prompts=responses // 2, group_size=2),
        warm_start=replace(config.warm_start, batch_size=responses),
        optimizer=replace(config.optimizer, updates=1, tokens_per_microbatch=COLUMNS),
        mesh=MeshConfig(data=shares // 16, fsdp=16, tensor=chips // shares),
    )
    place = Place.of(config, SLICES[chips])
    (step,) = place.plan(
        config.rollout.max_response_length,
        lambda line: print(f"{chips} chips: {line}", file=sys.stderr),
        {"train_step"},
    )
    seconds = {"compute": step.bound.compute, "memory": step.bound.memory, "links": step.bound.links}
    return {"chips": chips, "responses": responses, "seconds": seconds, "collective_bytes": step.collectives}


def draw(results: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """One panel for each way to scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, 2), results.items(), strict=True):
        chips = [point["chips"] for point in points]
        for bound, colour in {"compute": "C0", "memory": "C2", "links": "C3"}.items():
            axes.plot(chips, [point["seconds"][bound] for point in points], "o-", color=colour, label=bound)
        axes.set(xscale="log", yscale="log", xlabel="chips of v5p", ylabel="seconds of an update, at least", title=name)
        axes.set_xticks(chips, [str(count) for count in chips], minor=False)
        axes.minorticks_off()
        axes.legend()
    figure.savefig(picture, dpi=100)


def main() -> None:
    """Compiles for each slice, and writes figures and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "plan_scaling.json")
    parser.add_argument("--picture", type=Path, default=RESULTS / "plan_scaling.png")
    options = parser.parse_args()
    # nothing is computed, so that no accelerator need be taken
    os.environ["JAX_PLATFORMS"] = "cpu"
    results: dict[str, list[dict[str, Any]]] = {
        "weak: a response for each chip": [],
        f"strong: {STRONG_RESPONSES} responses": [],
    }
    weak, strong = results.values()
    with jax_session():
        for chips in SLICES:
            weak.append(bounds(chips, chips))
            strong.append(bounds(chips, STRONG_RESPONSES))
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.picture)
    for name, points in results.items():
        for point in points:
            seconds = ", ".join(f"{bound} {value:.2f} s" for bound, value in point["seconds"].items())
            print(f"{name}: {point['chips']} chips: {seconds}")


if __name__ == "__main__":
    main()
