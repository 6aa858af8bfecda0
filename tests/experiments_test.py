"""The recipes of both papers: their numbers against the papers', their slices, and every row of their sweeps."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import dcjax.loop.early
import dcjax.loop.train
from dcjax.cli import main
from dcjax.models.parallel.forward import check_model
from dcjax.models.parameters import parameters
from dcjax.recipe.plain import flatten, to_dict
from dcjax.sharding.mesh import PAPER_A_ROLLOUT, PAPER_A_TRAINING, over
from dcjax.tools.suite.published import PUBLISHED

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SCRIPT = EXPERIMENTS / "sweeps.py"
SWEEPS, command = (runpy.run_path(str(SCRIPT))[name] for name in ("SWEEPS", "command"))
RECIPES = EXPERIMENTS.parent / "dcjax" / "recipes"
FILES = {recipe: runpy.run_path(str(RECIPES / f"{recipe}.py")) for recipe in SWEEPS}
CONFIGS = {recipe: file["config"]() for recipe, file in FILES.items()}
ROWS = [
    pytest.param(recipe, row, id=f"{recipe}-{row.name}", marks=pytest.mark.slow if number % 4 else [])
    for recipe, rows in SWEEPS.items()
    for number, row in enumerate(rows)
]

PAPER_A = {
    "task.dataset": "dapo-math-17k",
    "task.heldout": "aime24",
    "warm_start.steps": 0,
    "rollout.prompts": 64,
    "rollout.group_size": 8,
    "rollout.temperature": 1.0,
    "rollout.top_k": 0,
    "rollout.top_p": 1.0,
    "rollout.max_response_length": 8192,
    "serving.format": "bf16",
    "model.precision.compute": "bf16",
    "objective.algorithm": "dc_grpo",
    "objective.estimator": "grpo",
    "objective.zero_variance": "keep",
    "objective.correction": "none",
    "objective.kl_coefficient": 0.0,
    "objective.eps_low": 0.24,
    "objective.eps_high": 0.24,
    "objective.initial_multiplier": 0.1,
    "objective.dual_lr": 1.0,
    "objective.budget": 0.0037,
    "optimizer.learning_rate": 1e-6,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.95,
    "optimizer.updates": 4,  # of 64 prompts, 16 each
    "optimizer.decay": "constant",
    "evaluation.temperature": 0.7,
}
PAPER_B = {
    "task.dataset": "dapo-math-17k",
    "task.heldout": "aime24",
    "task.questions": "english_integer",
    "warm_start.steps": 0,
    "rollout.prompts": 64,
    "rollout.group_size": 16,
    "rollout.temperature": 1.0,
    "rollout.max_response_length": 8192,
    "serving.format": "bf16",
    "model.precision.compute": "bf16",
    "objective.algorithm": "grpo",
    "objective.estimator": "rloo",
    "objective.zero_variance": "drop",
    "objective.correction": "none",
    "objective.correction_bound": 2.0,
    "objective.kl_coefficient": 0.0,
    "objective.eps_low": 0.2,
    "objective.eps_high": 0.28,
    "optimizer.learning_rate": 1e-6,
    "optimizer.weight_decay": 0.01,
    "optimizer.max_grad_norm": 1.0,
    "optimizer.updates": 1,  # on-policy
    "optimizer.decay": "period",
    "optimizer.decay_floor": 0.1,
}
OF_30B = {"objective.initial_multiplier": 0.05, "objective.budget": 0.005}
NUMBERS = {
    "dcmdp_qwen3_8b": PAPER_A,
    "dcmdp_qwen3_30b_a3b": PAPER_A | OF_30B,
    "case_study_1_5b": PAPER_A,
    "length_decay_qwen3_4b": PAPER_B | {"optimizer.decay_period": 204},
    "length_decay_qwen3_8b": PAPER_B | {"optimizer.decay_period": 160},
}
"""As the papers state them."""

BILLIONS = {
    "dcmdp_qwen3_8b": 8.2,
    "dcmdp_qwen3_30b_a3b": 30.5,
    "case_study_1_5b": 1.78,
    "length_decay_qwen3_4b": 4.0,
    "length_decay_qwen3_8b": 8.2,
}
"""Parameters, as the models' cards state them; the distilled model's head is counted apart from its embedding."""

CHIPS_PER_HOST, BYTES_PER_CHIP = 4, 95e9
"""Of TPU v5p."""


@pytest.mark.parametrize("recipe", SWEEPS)
def test_a_recipe_has_its_papers_numbers(recipe):
    stated = flatten(to_dict(CONFIGS[recipe]))
    assert {name: stated[name] for name in NUMBERS[recipe]} == NUMBERS[recipe]


@pytest.mark.parametrize("recipe", SWEEPS)
def test_a_recipe_is_whole_on_the_slice_that_it_names(recipe):
    config = CONFIGS[recipe]
    named = re.search(r"^Slice: v5p:(\d+)x(\d+)x(\d+), (\d+) chips", FILES[recipe]["__doc__"], re.MULTILINE)
    *sides, chips = map(int, named.groups())
    mesh = asdict(config.mesh)
    assert math.prod(sides) == chips == math.prod(mesh.values())
    check_model(config.model, mesh)  # raises where the mesh does not divide it
    hosts, tensor = chips // CHIPS_PER_HOST, config.serving.tensor
    assert config.rollout.prompts % hosts == 0
    assert chips % tensor == 0 and config.model.num_kv_heads % tensor == 0
    assert config.serving.slots % (chips // tensor) == 0


@pytest.mark.parametrize("recipe", SWEEPS)
def test_a_chip_has_room_for_what_trains_and_what_samples(recipe):
    """State, served weights and a cache of every slot, by arithmetic, leave a third of the chip to activations."""
    config = CONFIGS[recipe]
    model, serving, chips = config.model, config.serving, math.prod(asdict(config.mesh).values())
    size = sum(math.prod(parameter.stacked_shape) for parameter in parameters(model))
    assert size == pytest.approx(BILLIONS[recipe] * 1e9, rel=0.01)
    state = 16 * size / chips * config.mesh.data  # float32 masters, two moments and gradients
    tokens = config.rollout.max_prompt_length + config.rollout.max_response_length
    cache = 2 * 2 * model.num_layers * model.num_kv_heads * model.head_dim * tokens * serving.slots / chips
    assert state + 2 * size / serving.tensor + cache < BYTES_PER_CHIP * 2 / 3


@pytest.mark.parametrize("preset", PAPER_A_TRAINING)
def test_paper_a_is_laid_out_as_the_paper_does(preset):
    config = CONFIGS[{"qwen3-8b": "dcmdp_qwen3_8b", "qwen3-30b-a3b": "dcmdp_qwen3_30b_a3b"}[preset]]
    asked, mesh = over(PAPER_A_TRAINING[preset], 64), config.mesh
    # copies of what FSDP splits are ours
    assert replace(mesh, data=1, fsdp=mesh.data * mesh.fsdp) == asked
    assert config.serving.tensor == PAPER_A_ROLLOUT.get(preset, config.serving.tensor)


@pytest.fixture
def started(monkeypatch):
    """Configs that `dcjax train` would have run; none is."""
    configs = []
    monkeypatch.setattr(dcjax.loop.train, "train", lambda config, recipe, *, profile: configs.append(config))
    monkeypatch.setattr(dcjax.loop.early, "refuse_early", lambda config, recipe: None)
    return configs


@pytest.mark.parametrize(("recipe", "row"), ROWS)
def test_a_row_changes_what_it_names_and_nothing_else(recipe, row, started):
    _, *words = command(recipe, row)
    assert main(words) == 0
    before, after = (flatten(to_dict(config)) for config in (CONFIGS[recipe], *started))
    changed = {name: value for name, value in after.items() if value != before[name]}
    named = dict(override.split("=") for override in words[2:])
    assert changed == {name: type(after[name])(value) for name, value in named.items()}


@pytest.mark.parametrize("recipe", SWEEPS)
def test_every_run_of_a_sweep_has_a_directory_and_settings_of_its_own(recipe):
    rows = SWEEPS[recipe]
    assert rows[0].name == "" and not rows[0].overrides
    assert len({row.name for row in rows}) == len({tuple(sorted(row.overrides)) for row in rows}) == len(rows)


SCORES = re.compile(r"((?:\d\d\.\d ){6})\| (\d\d\.\d)")
MODELS = {"dcmdp_qwen3_8b": "Qwen3-8B", "dcmdp_qwen3_30b_a3b": "Qwen3-30B-A3B"}


@pytest.mark.parametrize(("recipe", "row"), [row for row in ROWS if row.values[0] in MODELS])
def test_published_scores_have_the_published_mean(recipe, row):
    if (found := SCORES.match(row.published)) is None:
        assert "serving.format=int8" in row.overrides  # which the paper does not have
        return
    scores, mean = [float(score) for score in found[1].split()], float(found[2])
    assert sum(scores) / 6 == pytest.approx(mean, abs=0.0501)


def test_main_results_are_those_that_suites_are_compared_with():
    suites = {" ".join(map(str, each.scores)) for each in PUBLISHED}
    rows = [row for recipe in MODELS for row in SWEEPS[recipe] if row.name in ("", "grpo", "fp8", "grpo_fp8")]
    assert {SCORES.match(row.published)[1].strip() for row in rows} == suites
    for recipe in MODELS:
        told = FILES[recipe]["__doc__"].replace("\n", " ")
        assert all(row.published in told for row in SWEEPS[recipe][:2])


def sweep(*arguments):
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS.parent)}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.heavy
def test_a_shell_reads_the_commands(tmp_path):
    """A `dcjax` that repeats its arguments stands in for the real one, which needs a slice."""
    (tmp_path / "dcjax").write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    (tmp_path / "dcjax").chmod(0o755)
    printed = sweep("length_decay_qwen3_4b", "pretrained=/with space/Qwen3-4B", "seed=1")
    assert printed.returncode == 0 and printed.stderr == ""
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    ran = subprocess.run(["sh", "-e"], input=printed.stdout, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0 and ran.stderr == ""
    expected = []
    for row in SWEEPS["length_decay_qwen3_4b"]:
        name = [f"name=length_decay_qwen3_4b_{row.name}"] if row.name else []
        expected += ["train", "length_decay_qwen3_4b", *name, *row.overrides]
        expected += ["pretrained=/with space/Qwen3-4B", "seed=1"]
    assert ran.stdout.splitlines() == expected
    assert printed.stdout.count("# published: ") == len(SWEEPS["length_decay_qwen3_4b"])


@pytest.mark.heavy
def test_a_recipe_without_a_sweep_is_refused_in_one_line():
    refused = sweep("dapo_math")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.startswith("sweeps: error: argument recipe: invalid choice: 'dapo_math' (choose from ")
    assert refused.stderr.count("\n") == 1 and all(recipe in refused.stderr for recipe in SWEEPS)


def test_the_page_names_every_recipe_with_its_slice():
    page = (EXPERIMENTS.parent / "docs" / "papers.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (v5p:\S+) as ", page, re.MULTILINE))
    assert rows == {
        recipe: re.search(r"^Slice: (\S+),", file["__doc__"], re.MULTILINE)[1] for recipe, file in FILES.items()
    }


PLANS = runpy.run_path(str(EXPERIMENTS.parent / "benchmarks" / "plans.py"))
PLANNED = json.loads(PLANS["RESULTS"].read_text())


@pytest.mark.parametrize("recipe", SWEEPS)
def test_a_recipe_says_what_was_planned_of_it_as_it_is(recipe):
    fields, slice_name = PLANS["described"](recipe)
    # fields that are newer than the plan have the value that changes nothing; or `benchmarks/plans.py RECIPE` is due
    planned = PLANNED[recipe]["config"]
    assert planned == {name: fields.get(name) for name in planned}
    plan = PLANNED[recipe]["plan"]
    assert (plan["topology"], plan["fits"]) == (slice_name, True)
    assert PLANS["sentence"](PLANNED[recipe]) in " ".join(FILES[recipe]["__doc__"].split())


def test_the_page_has_the_plan_of_every_recipe():
    page = (EXPERIMENTS.parent / "docs" / "papers.md").read_text()
    assert all(PLANS["table_row"](recipe, PLANNED[recipe]) in page for recipe in SWEEPS)


COMMAND = re.compile(r"(?:dcjax (?:train|plan)|sweeps\.py| --)\s+(?:\\\n\s+)?([a-z]\w*)(?=[\s`])")
"""A recipe in a command of the documentation, also where it stands behind a launcher's own arguments."""


@pytest.mark.parametrize("page", ["README.md", "docs/launching.md", "docs/papers.md", "docs/plan.md", "docs/server.md"])
def test_recipes_in_commands_of_the_documentation_are_there(page):
    named = set(COMMAND.findall((EXPERIMENTS.parent / page).read_text()))
    assert named and named <= {path.stem for path in RECIPES.glob("*.py")}
