"""Sections of a reader's own: what is accepted, recorded, read back and refused."""

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path

import optax
import pytest
import tiny

from dcjax.data.arithmetic import ArithmeticTask
from dcjax.data.mathematics import MathTask
from dcjax.data.task import Task
from dcjax.recipe import build
from dcjax.recipe.config import Config
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.optimizer import Optimizer, OptimizerConfig
from dcjax.recipe.plain import classes_in, from_dict, path_fields, to_dict
from dcjax.recipe.reward import RewardConfig
from dcjax.rl import Objective, Requirements, group_relative_advantages
from dcjax.sharding.mesh import make_mesh
from dcjax.user_code import CodeFile

HERE = CodeFile.read(Path(__file__))


def refusal(action):
    with pytest.raises(ValueError) as caught:
        action()
    return str(caught.value)


@dataclass(frozen=True)
class Stage:
    """A nested part of a section."""

    steps: int = 3
    file: Path | None = None


@dataclass(frozen=True)
class Smaller(ArithmeticTask):
    """The embedded task with a field of its own."""

    name: str = "smaller"


@dataclass(frozen=True)
class Subset(Task):
    """Its fields are a subset of the embedded task's."""

    max_operand: int = 2
    max_value: int = 5
    max_prompt_length: int = 4

    @property
    def reward(self):
        return ArithmeticTask().reward

    def open(self, tokenizer):
        return ArithmeticTask(max_operand=self.max_operand, max_value=self.max_value)


@dataclass(frozen=True)
class Minimal:
    """An objective that inherits nothing."""

    stages: tuple[Stage, ...] = (Stage(), Stage(5))
    files: tuple[Path, ...] = ()
    limit: float = 0.5

    def build(self, *, updates, max_response_length):
        return Objective(group_relative_advantages())


@dataclass(frozen=True)
class Sgd:
    """An optimiser that inherits nothing."""

    updates: int = 1
    tokens_per_microbatch: int | None = None
    rate: float = 0.1

    def build(self, objective, *, steps):
        schedule = optax.constant_schedule(self.rate)
        return Optimizer(optax.sgd(schedule), schedule)


def comes_back(config, **options):
    return from_dict(json.loads(json.dumps(to_dict(config))), HERE, **options)


def own_module():
    """This file, as a run loads it that keeps a copy of it."""
    return HERE.load()


def test_a_task_whose_fields_are_a_subset_of_the_embedded_ones_comes_back_as_itself():
    task = own_module().Subset(max_value=7)
    config = Config(task=task)
    assert to_dict(config)["task"]["class"] == "recipe:Subset"
    assert comes_back(config) == config
    assert type(comes_back(config).task) is type(task)


def test_sections_with_nested_dataclasses_and_paths_come_back_equal():
    own = own_module()
    stages = (own.Stage(7, Path("a/b")), own.Stage())
    config = Config(
        objective=own.Minimal(stages=stages, files=(Path("x"), Path("y"))), optimizer=own.Sgd(), task=own.Smaller()
    )
    assert comes_back(config) == config
    assert {"recipe:Minimal", "recipe:Stage", "recipe:Sgd", "recipe:Smaller"} < set(classes_in(to_dict(config)))


def test_relative_paths_are_of_the_directory_that_is_given():
    own = own_module()
    objective = own.Minimal(files=(Path("x"), Path("/y")), stages=(own.Stage(1, Path("z")),))
    read = comes_back(Config(pretrained=Path("model"), objective=objective), directory=Path("/started"))
    assert read.pretrained == Path("/started/model") and read.run_dir is None
    assert read.objective.files == (Path("/started/x"), Path("/y"))
    assert read.objective.stages[0].file == Path("/started/z")


def test_texts_in_fields_of_paths_become_local_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    own = own_module()
    objective = own.Minimal(files=("~/x", "y"), stages=(own.Stage(file="z"),))
    made = Config(objective=objective).objective
    assert made.files == (Path("/home/me/x"), Path("y"))
    assert made.stages[0].file == Path("z")
    other = own.Minimal(files=("gs://bucket/x",))
    assert refusal(lambda: Config(objective=other)).startswith("objective.files is 'gs://bucket/x'; it must be a local")


def test_fields_that_hold_paths_are_known_by_their_names():
    assert path_fields(Config()) == set()
    assert path_fields(Config(pretrained=Path("a"), run_dir=Path("b"))) == {"pretrained", "run_dir"}


def test_equal_sections_are_one_program_and_different_ones_are_not():
    mesh = make_mesh(tiny.CONFIG.mesh)

    def step(**fields):
        config = replace(tiny.CONFIG, objective=own_module().Minimal(**fields), optimizer=own_module().Sgd())
        return build.compile_train_step(config, mesh)

    assert step(limit=0.5) is step(limit=0.5)
    assert step(limit=0.5) is not step(limit=0.25)


def test_the_length_of_a_run_is_in_its_program_only_where_the_rate_ends_with_it():
    def tx(steps, **fields):
        return build.build_optimizer(replace(tiny.CONFIG, steps=steps, optimizer=OptimizerConfig(**fields)))

    assert tx(5) is tx(6)
    assert tx(5, decay="linear") is not tx(6, decay="linear")


def test_a_schedule_of_ones_own_is_what_adam_and_the_log_get():
    @dataclass(frozen=True)
    class Halved(OptimizerConfig):
        def schedule(self, steps):
            return optax.linear_schedule(self.learning_rate, self.learning_rate / 2, steps)

    objective = Objective(group_relative_advantages())
    optimizer = Halved(learning_rate=0.5, max_grad_norm=1e9).build(objective, steps=10)
    assert float(optimizer.learning_rate(10)) == 0.25
    assert Halved(learning_rate=0.5).build(objective, steps=20).learning_rate(10) == pytest.approx(0.375)


# --- what is refused ---


@dataclass
class Melting(ObjectiveConfig.__mro__[-1]):
    """Not frozen."""


@dataclass(frozen=True)
class Anything:
    value: object = None

    def build(self, *, updates, max_response_length):
        return Objective(group_relative_advantages())


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (None, "objective is a NoneType; its class must be a @dataclass(frozen=True)"),
        (Melting(), "objective is a Melting; its class must be a @dataclass(frozen=True)"),
        (Anything([1, 2]), "objective.value is [1, 2], a list, which has no hash; make it a tuple"),
        (Anything({"a": 1}), "objective.value is {'a': 1}, a dict, which has no hash"),
        (Anything((1, (len,))), "objective.value[1][0] is <built-in function len>, a builtin_function_or_method;"),
        (Anything(float("nan")), "objective.value is nan; it must be a number"),
        (Anything(Anything(1j)), "objective.value.value is 1j, a complex;"),
        (Stage(), "objective is a Stage, which has no 'build'; see dcjax.recipe.sections.ObjectiveSection"),
    ],
)
def test_a_section_that_could_not_be_recorded_is_refused_by_its_field(objective, expected):
    assert refusal(lambda: Config(objective=objective)).startswith(expected)


def test_a_class_that_has_no_name_is_refused():
    @dataclass(frozen=True)
    class Local(ObjectiveConfig):
        pass

    assert "Local must be defined at the top level of its file" in refusal(lambda: Config(objective=Local()))


@dataclass(frozen=True)
class Wrong(ObjectiveConfig):
    def build(self, *, updates, max_response_length):
        return group_relative_advantages()


@dataclass(frozen=True)
class WrongOptimizer(OptimizerConfig):
    def build(self, objective, *, steps):
        return optax.sgd(1.0)


@dataclass(frozen=True)
class Candidates(ObjectiveConfig):
    def build(self, **sizes):
        return replace(super().build(**sizes), requires=Requirements(candidate_tokens=True))


def test_what_builds_something_else_is_refused():
    assert "objective.build returned a function; it must return a dcjax.rl.Objective" in refusal(
        lambda: Config(objective=Wrong())
    )
    assert "optimizer.build returned a GradientTransformation" in refusal(lambda: Config(optimizer=WrongOptimizer()))


@dataclass(frozen=True)
class Lenient(RewardConfig):
    def verifier(self, task):
        return refusal


def test_a_verifier_of_ones_own_needs_no_workers_even_where_the_tasks_does():
    long = replace(Config().rollout, max_prompt_length=1024)
    assert "reward.workers is 0" in refusal(lambda: Config(task=MathTask(), rollout=long))
    assert Config(task=MathTask(), rollout=long, reward=Lenient()).reward.workers == 0


def test_candidates_that_no_rollout_records_are_refused():
    assert "rollout.top_k is 0; this objective requires candidate tokens" in refusal(
        lambda: Config(objective=Candidates())
    )
    assert Config(objective=Candidates(), rollout=replace(Config().rollout, top_k=4))


def test_a_class_that_is_gone_or_is_no_section_is_named():
    def reading(**task):
        return refusal(lambda: from_dict({"task": task}, HERE))

    assert "the class of task: 'os:system' is neither in dcjax" in reading(**{"class": "os:system"})
    assert "the class of task: 'recipe:Gone' cannot be imported" in reading(**{"class": "recipe:Gone"})
    assert "'dcjax.errors:RunError' is no frozen dataclass" in reading(**{"class": "dcjax.errors:RunError"})
    assert "'numpy:load' is no frozen dataclass" in reading(**{"class": "numpy:load"})
    assert "the class of task: 7 is not MODULE:NAME" in reading(**{"class": 7})
    assert "task is a Stage, which has no 'max_prompt_length'" in reading(**{"class": "recipe:Stage"})
    assert "Subset has no field 'steps'" in reading(**{"class": "recipe:Subset", "steps": 1})
    assert "task names no class" in reading(max_value=9)


def test_a_class_in_place_of_a_section_that_may_have_none_is_refused():
    other = {"class": "dcjax.recipe.reward:RewardConfig"}
    for name in ("model", "rollout", "mesh"):
        assert f"{name} is a RewardConfig; it must be a " in refusal(lambda name=name: from_dict({name: other}))


def test_a_subclass_of_a_built_in_section_has_its_fields_and_its_own():
    section = own_module().Smaller(max_value=9, name="mine")
    assert dataclasses.asdict(section)["name"] == "mine"
    assert comes_back(Config(task=section, reward=RewardConfig(timeout=3.0))).task == section
