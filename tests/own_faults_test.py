"""Code of a recipe's own that raises, wherever it is called: one line with its function, its file and its own line."""

import json
from pathlib import Path

import pretend
import pytest

from dcjax.cli import main

pytestmark = pytest.mark.heavy

RECIPE = """
import dataclasses
from dataclasses import dataclass, replace

import jax.numpy as jnp, optax
import tiny

from dcjax.data.arithmetic import ArithmeticTask
from dcjax.data.problems import FixedProblems
from dcjax.data.tokenizers import byte_tokenizer
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import OptimizerConfig
from dcjax.rl import HeadQuantity, IterationQuantity, Requirements, chain


def transform(terms, context): return {}["transform"]
def quantity(distributions): return {}["quantity"]
def of_iteration(iteration): return jnp.zeros(3) @ iteration.old_logps
def init(params): return {}["init"]
def update(updates, state, params=None): raise ValueError("update")
def schedule(count): return {}["schedule"]

@dataclass(frozen=True)
class Mine(ObjectiveConfig):
    fault: str = ""
    def build(self, **sizes):
        objective = super().build(**sizes)
        match self.fault:
            case "build": return {}["objective"]
            case "transform": return replace(objective, transform=chain(objective.transform, transform))
            case "quantity": return replace(objective, requires=Requirements(quantities=(HeadQuantity("q", quantity),)))
            case "iteration":
                return replace(objective, requires=Requirements(quantities=(IterationQuantity("q", of_iteration),)))
        return objective

@dataclass(frozen=True)
class Descent(OptimizerConfig):
    fault: str = ""
    def build(self, objective, *, steps):
        optimizer = super().build(objective, steps=steps)
        match self.fault:
            case "build": return {}["optimizer"]
            case "init": return replace(optimizer, descent=optax.GradientTransformation(init, update))
            case "update":
                own = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
                return replace(optimizer, descent=own)
            case "schedule": return replace(optimizer, descent=optax.sgd(schedule), learning_rate=schedule)
        return optimizer

class Problems(FixedProblems):
    def problems(self, split, seed, start, count):
        return super().problems(split, seed, start, count) if count == 1 else {}["problems"]

@dataclass(frozen=True)
class Task(ArithmeticTask):
    fault: str = ""
    @property
    def max_prompt_length(self):
        return {}["length"] if self.fault == "length" else super().max_prompt_length
    def build_tokenizer(self, pretrained):
        if self.fault != "template":
            return super().build_tokenizer(pretrained)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('no system role') }}"
        return tokenizer
    def open(self, tokenizer):
        if self.fault == "template":
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}])
        opened = super().open(tokenizer)
        if self.fault != "problems":
            return opened
        return Problems(opened.problems("train", 0, 0, 8), opened.problems("heldout", 0, 0, 8))

def config():
    return replace(
        tiny.CONFIG,
        task=Task(**dataclasses.asdict(tiny.TASK)),
        warm_start=replace(tiny.CONFIG.warm_start, steps=0),
        objective=Mine(**dataclasses.asdict(tiny.CONFIG.objective)),
        optimizer=Descent(**dataclasses.asdict(tiny.CONFIG.optimizer)),
    )
"""

FAULTS = {
    "objective.fault build": ("KeyError: 'objective'", "Mine.build", '{}["objective"]'),
    "objective.fault transform": ("KeyError: 'transform'", "transform", '{}["transform"]'),
    "objective.fault quantity": ("KeyError: 'quantity'", "quantity", '{}["quantity"]'),
    "objective.fault iteration": ("TypeError: ", "of_iteration", "jnp.zeros(3) @"),
    "optimizer.fault build": ("KeyError: 'optimizer'", "Descent.build", '{}["optimizer"]'),
    "optimizer.fault init": ("KeyError: 'init'", "init", '{}["init"]'),
    "optimizer.fault update": ("ValueError: update", "update", 'ValueError("update")'),
    "optimizer.fault schedule": ("KeyError: 'schedule'", "schedule", '{}["schedule"]'),
    "task.fault length": ("KeyError: 'length'", "Task.max_prompt_length", '{}["length"]'),
    "task.fault template --model.vocab_size 258": (
        "TemplateError: no system role",
        "Task.open",
        "tokenizer.apply_chat_template",
    ),
    "task.fault problems": ("KeyError: 'problems'", "Problems.problems", '{}["problems"]'),
}
"""By override: what is raised, in which function, and on which line."""


@pytest.fixture
def told(tmp_path, monkeypatch, capfd):
    """What a command that fails in code of the recipe says last, with its path."""
    monkeypatch.chdir(tmp_path)
    # a process loads equal files once, by the path of the first
    Path("mine.py").write_text(f"{RECIPE}# {tmp_path}")
    pretend.install_samples(monkeypatch)

    def run(*arguments):
        assert main([*map(str, arguments)]) == 2
        errors = capfd.readouterr().err
        assert "Traceback" not in errors
        return errors.splitlines()[-1]

    return run


def line_of(text):
    return next(number for number, line in enumerate(RECIPE.splitlines(), start=1) if text in line)


@pytest.mark.parametrize("override", FAULTS)
def test_the_function_and_its_own_line_are_told(told, tmp_path, override):
    said, function, text = FAULTS[override]
    line = told("train", "mine.py", "--run-dir", "run", *f"--{override}".split())
    assert line.startswith("dcjax: error: ") and said in line
    assert line.endswith(f"({tmp_path / 'mine.py'}, line {line_of(text)}, in {function})")


@pytest.mark.parametrize(
    ("command", "override"), [("evaluate", "task.fault problems"), ("probe", "objective.fault build")]
)
def test_a_tool_that_opens_a_run_tells_them_too(told, tmp_path, command, override):
    assert main(["train", "mine.py", "--run-dir", "run", "steps=0"]) == 0
    path, (section, fault) = Path("run/config.json"), override.split(".fault ")
    recorded = json.loads(path.read_text())
    recorded[section]["fault"] = fault
    path.write_text(json.dumps(recorded))
    said, function, text = FAULTS[override]
    line = told(command, "run")
    assert said in line and line.endswith(f"({tmp_path / 'mine.py'}, line {line_of(text)}, in {function})")
