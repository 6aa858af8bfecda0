"""What objectives cost that read the sampler's whole distributions, and training in the served format.

    python benchmarks/distributions.py [scores] [gradients] [step] [plan] [left --folder FOLDER] [--json PATH]

- scores: on [4, 1024] tokens with a vocabulary of 151,936 and Qwen3-0.6B's layers, random weights, int8 rollouts: the
  log-probs of sampled tokens alone (`token_logps`); the same with what the centred penalty, score centering and the
  metrics of whole distributions compute; and the engine's pass that reads the rollout, whose sum has a goal.
  Temporaries are those of the compiled programs. `gradients` is the same with gradients, which takes three times as
  long.
- step: the quickstart's whole training step with each objective, and in the served format, as a ratio to the published
  penalty's; and the reading of a rollout in the same unit.
- plan: the paper's recipe for 8B, compiled for its v5p slice with the published and with the centred penalty and score
  centering: operations, memory and bounds of the step and of the reading.

- left: of a folder that the quickstart was exported to, the mean |p − q| that is left in each format of tokens that it
  sampled, where the trainer's forward has its masters, its served weights, or all of the format.

How they are timed is said in timing.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from objective import steps_of  # pyrefly: ignore[missing-import]
from timing import environment, measure, pin, ratio, row, table  # pyrefly: ignore[missing-import]

from dcjax.allocator import keep_freed_memory
from dcjax.data.task import encode_prompts
from dcjax.models import init_params, load_hf, presets, token_logps
from dcjax.recipe import build
from dcjax.recipe.build import build_engine
from dcjax.recipe.config import Config
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.serving.decoder import NO_EXCESS_PRECISION
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.formats import formats
from dcjax.serving.in_training import InTraining, training_numerics
from dcjax.serving.rollout import sample_responses
from dcjax.serving.scoring import Reading, lower_reading, read_hidden
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.tools.plan.plan import Place
from dcjax.types import Batch, Rollout

RECIPES = Path(__file__).parent.parent / "dcjax" / "recipes"
ROWS, PROMPT, RESPONSE = 4, 64, 1024
CENTRED: dict[str, Any] = {"penalty_form": "state_centred"}
BOTH = CENTRED | {"score_centering": True}
GOAL = 2.2
MIB, GIB = 2**20, 2**30


def full_rollout(rows: int, prompt: int, response: int, vocab_size: int) -> Rollout:
    """Responses without padding, of random tokens."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (rows, prompt + response)).astype(np.int32)
    ones, zeros = np.ones((rows, response), bool), np.zeros((rows, response), np.float32)
    return Rollout(
        tokens=tokens,
        attention_mask=np.ones(tokens.shape, bool),
        response_mask=ones,
        rollout_logps=zeros - 10,
        temperature=np.ones(rows, np.float32),
        versions=zeros.astype(np.int32),
        finished=np.ones(rows, bool),
        log_mass=zeros,
    )


def compare_scores(rounds: int, *, differentiated: bool) -> dict[str, Any]:
    """CPU-seconds of log-probs alone, with both distributions, and of the reading."""
    model = presets["qwen3-0.6b"]
    rollout, mesh = full_rollout(ROWS, PROMPT, RESPONSE, model.vocab_size), make_mesh(MeshConfig())
    params = jax.jit(partial(init_params, model))(jax.random.key(0))
    engine = Qwen3Engine(
        model, format="int8", slots=ROWS, max_prompt_length=PROMPT, max_response_length=RESPONSE, end_tokens=[0]
    )
    serving = engine.sync(params, 0)
    reading = read_hidden(engine, serving, rollout, mesh)
    quantities = build.objective_of(Config(objective=ObjectiveConfig(**BOTH))).requires.of_head

    def scores(params: Any, reading: Reading | None) -> Any:
        found = token_logps(
            model,
            params,
            rollout.tokens,
            response_length=RESPONSE,
            temperature=jnp.asarray(rollout.temperature),
            quantities={} if reading is None else quantities,
            sampler_hidden=None if reading is None else reading.hidden,
            sampler_head=None if reading is None else reading.head,
        )
        return jnp.sum(found.logps) + sum(map(jnp.sum, found.quantities.values()))

    program: Any = jax.jit(jax.grad(scores) if differentiated else scores)
    given = {"token_logps": None, "with both distributions": reading}
    runs: dict[str, Callable[[int], Any]] = {
        name: lambda number, reading=reading: program(params, reading) for name, reading in given.items()
    }
    runs["reading"] = lambda number: read_hidden(engine, serving, rollout, mesh).hidden
    lowered = {name: program.lower(params, reading) for name, reading in given.items()}
    lowered["reading"] = lower_reading(engine, serving, ROWS)
    temporaries = {name: one.compile().memory_analysis().temp_size_in_bytes / MIB for name, one in lowered.items()}
    cpu = {name: of.cpu for name, of in measure("scores", runs, rounds).items()}
    alone, both, read = cpu.values()
    rows = [row("token_logps", alone, np.min)]
    rows += [row(name, cpu[name], np.min, ratio(cpu[name], alone, "token_logps")) for name in list(cpu)[1:]]
    in_all = ratio(both + read, alone, "token_logps", "" if differentiated else f"<= {GOAL}")
    rows.append(row("both distributions, and the reading", both + read, np.min, in_all))
    notes = [f"temporaries: {name} {size:,.0f} MiB" for name, size in temporaries.items()]
    title = f"[{ROWS}, {RESPONSE}] tokens, vocabulary {model.vocab_size:,}" + ", with gradients" * differentiated
    return {"title": title, "unit": "CPU-s", "rows": rows, "notes": notes, "temporaries_mib": temporaries}


STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "dc_grpo": ({}, "masters"),
    "centred": (CENTRED, "masters"),
    "score centering": ({"score_centering": True}, "masters"),
    "both": (BOTH, "masters"),
    "both, of a head of 8": (BOTH | {"sampler_head": 8}, "masters"),
    "dc_direct, total variation": ({"algorithm": "dc_direct", "signal": "total_variation"}, "masters"),
    "in served weights": ({}, "weights"),
    "in all of the served format": ({}, "all"),
}
"""Objective settings, and what the forward takes from the serving format."""


def compare_step(rounds: int) -> dict[str, Any]:
    """CPU-milliseconds of the quickstart's step, and of reading its rollout."""
    config: Any = runpy.run_path(str(RECIPES / "quickstart.py"))["config"]()
    programs = {name: whole_step(config, *settings) for name, settings in STEPS.items()}
    programs["reading"] = reader(config)
    cpu = {name: of.cpu * 1e3 for name, of in measure("step", programs, rounds).items()}
    rows = [row("dc_grpo", cpu["dc_grpo"], np.min)]
    rows += [
        row(name, cpu[name], np.min, ratio(cpu[name], cpu["dc_grpo"], "dc_grpo")) for name in cpu if name != "dc_grpo"
    ]
    sizes = config.rollout
    shape = f"{sizes.sequences} x ({sizes.max_prompt_length} + {sizes.max_response_length})"
    return {"title": f"quickstart's step, {shape} tokens", "unit": "CPU-ms", "rows": rows, "notes": []}


def sampled(config: Config) -> Rollout:
    """Ragged responses of random tokens, as long as the quickstart's are."""
    sizes, rng = config.rollout, np.random.default_rng(0)
    rollout = full_rollout(sizes.sequences, sizes.max_prompt_length, sizes.max_response_length, config.model.vocab_size)
    mask = np.arange(sizes.max_response_length) < rng.integers(1, sizes.max_response_length + 1, (sizes.sequences, 1))
    attention = np.concatenate([rollout.attention_mask[:, : sizes.max_prompt_length], mask], axis=1)
    return dataclasses.replace(rollout, response_mask=mask, attention_mask=attention)


def whole_step(config: Config, objective: dict[str, Any], in_training: Any) -> Callable[[int], Any]:
    """A training step, packing included, each call on from the last one's state."""
    section: Any = config.objective
    config = dataclasses.replace(
        config,
        objective=dataclasses.replace(section, **objective),
        serving=dataclasses.replace(config.serving, in_training=in_training),
    )
    mesh, rollout = make_mesh(config.mesh), sampled(config)
    params = jax.jit(partial(init_params, config.model))(jax.random.key(0))
    requires = build.objective_of(config).requires
    if requires.sampler_head:
        shape = (*rollout.response_mask.shape, requires.sampler_head)
        tokens = np.broadcast_to(np.arange(requires.sampler_head, dtype=np.int32), shape)
        rollout = dataclasses.replace(rollout, sampler_tokens=tokens, sampler_logps=np.full(shape, -3.0, np.float32))
    rewards = np.random.default_rng(0).integers(0, 2, len(rollout.tokens)).astype(np.float32)
    batch = Batch.of(rollout, rewards=rewards, group_size=config.rollout.group_size)
    if requires.sampler_distributions:
        engine = build_engine(config, mesh, [0])
        reading = read_hidden(engine, engine.sync(params, 0), rollout, mesh)
        batch = dataclasses.replace(batch, sampler_hidden=reading.hidden, sampler_head=reading.head)
    return steps_of(config, batch)


def reader(config: Config) -> Callable[[int], Any]:
    """The engine's pass over a rollout."""
    mesh, rollout = make_mesh(config.mesh), sampled(config)
    engine = build_engine(config, mesh, [0])
    serving = engine.sync(jax.jit(partial(init_params, config.model))(jax.random.key(0)), 0)
    return lambda number: read_hidden(engine, serving, rollout, mesh).hidden


def compare_plan() -> dict[str, Any]:
    """One chip's operations, memory and seconds at least, of the programs that differ."""
    config, found = runpy.run_path(str(RECIPES / "dcmdp_qwen3_8b.py"))["config"](), {}
    for name, settings in {"published": {}, "centred and score centering": BOTH}.items():
        objective = dataclasses.replace(config.objective, **settings)
        place = Place.of(dataclasses.replace(config, objective=objective), "v5p:4x4x4")
        told = partial(print, file=sys.stderr, flush=True)
        for one in place.plan(config.rollout.max_response_length / 2, told, ("train_step", "read")):
            planned = one.planned
            found[f"{name}: {planned.name}"] = {
                "tflops": sum(planned.cost.flops.values()) / 1e12,
                "arguments_gib": planned.argument_bytes / GIB,
                "temporaries_gib": planned.temp_bytes / GIB,
                "seconds": dataclasses.asdict(one.bound),
                "refused": planned.refused,
            }
    return found


def compare_left(folder: Path) -> dict[str, Any]:
    """Mean |p − q| by format, and by what of it the trainer's forward has."""
    model, params = load_hf(folder)
    config = runpy.run_path(str(RECIPES / "quickstart.py"))["config"]()
    mesh, tokenizer = make_mesh(MeshConfig()), config.task.build_tokenizer(None)
    problems = config.task.open(tokenizer).problems("train", 0, 0, 32)
    found: dict[str, dict[str, float]] = {}
    for name, format in formats.items():
        engine = build_engine(
            dataclasses.replace(config, model=model, serving=dataclasses.replace(config.serving, format=name)),
            mesh,
            [tokenizer.eos_token_id],
        )
        rollout = sample_responses(
            engine,
            engine.sync(params, 0),
            encode_prompts(tokenizer, problems),
            samples_per_prompt=4,
            temperature=1.0,
            key=jax.random.key(1),
        )
        found[name] = {"tokens": int(rollout.response_mask.sum())}
        for how in get_args(InTraining):
            trained, numerics = training_numerics(model, format, engine.kv_cache, (), how)
            logps = jax.jit(
                lambda params, trained=trained, numerics=numerics, rollout=rollout: (
                    token_logps(
                        trained,
                        params,
                        rollout.tokens,
                        rollout.attention_mask,
                        response_length=rollout.response_mask.shape[1],
                        temperature=jnp.asarray(rollout.temperature),
                        numerics=numerics,
                    ).logps
                ),
                compiler_options=NO_EXCESS_PRECISION,
            )(params)
            gaps = np.abs(np.exp(logps) - np.exp(rollout.rollout_logps))[rollout.response_mask]
            found[name][how] = float(gaps.mean())
        print(f"{name:16s}", {how: f"{value:.3g}" for how, value in found[name].items()}, file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Runs the comparisons and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "which",
        nargs="*",
        default=["scores", "step", "plan"],
        help="of scores, step, plan and left (default: the first three)",
    )
    add("--folder", type=Path, help="of left: an exported quickstart")
    add("--json", type=Path, metavar="PATH", help="write the figures there too, beside those that it has")
    add("--rounds", type=int, default=5, help="runs of each program (default: 5)")
    add("--cores", type=int, default=0, help="cores to stay on (default: 0, all)")
    args = parser.parse_args()
    keep_freed_memory()
    pin(args.cores)
    figures = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    compared = {
        "scores": lambda: compare_scores(args.rounds, differentiated=False),
        "gradients": lambda: compare_scores(args.rounds, differentiated=True),
        "step": lambda: compare_step(args.rounds),
        "plan": compare_plan,
        "left": lambda: compare_left(args.folder),
    }
    for which in args.which:
        found = figures[which] = compared[which]()
        print(table([found]) if "rows" in found else json.dumps(found, indent=2), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures | {"environment": environment(args)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
