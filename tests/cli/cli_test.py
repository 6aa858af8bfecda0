import dataclasses
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dcjax.loop.early
import dcjax.loop.train
import dcjax.rewards.pool
from dcjax.cli import build_parser, main
from dcjax.data.datasets import SAMPLES
from dcjax.data.store import load_examples
from dcjax.models.rope import YarnScaling
from dcjax.recipe.config import Config
from dcjax.recipe.objective import ObjectiveConfig
from dcjax.recipe.plain import to_dict

pytestmark = pytest.mark.heavy

RECIPE = """
from dcjax.recipe.config import Config, EvaluationConfig, WarmStartConfig
from dcjax.recipe.rollout import RolloutConfig

def config():
    return Config(
        name="tested",
        steps=1,
        warm_start=WarmStartConfig(steps=0),
        evaluation=EvaluationConfig(prompts=4),
        rollout=RolloutConfig(prompts=4, group_size=4),
    )
"""

BUILT_IN = Path(__file__).parents[2] / "dcjax" / "recipes"


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Where each test stands: an empty directory but for `experiments/tested.py`."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "tested.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    # wide enough for tyro not to break a flag's line
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture
def refusal(capfd, directory):
    """Runs a command that must be refused: one line on stderr, status 2, and no file made or changed."""

    def run(*arguments):
        before = contents(directory)
        status = main([str(argument) for argument in arguments])
        output, errors = capfd.readouterr()
        assert status == 2
        assert output == ""
        assert errors.startswith("dcjax: error: ")
        assert errors.endswith("\n") and errors.count("\n") == 1, errors
        assert contents(directory) == before
        return errors.removeprefix("dcjax: error: ").rstrip("\n")

    return run


class Started(list):
    """Configs, and how many iterations were to be profiled of the last."""

    profile = None


@pytest.fixture
def started(monkeypatch):
    """Configs that `dcjax train` would have run; none is."""
    configs = Started()

    def train(config, recipe, *, profile):
        configs.append(config)
        configs.profile = profile
        return Path("report.png"), Path("report.html")

    monkeypatch.setattr(dcjax.loop.train, "train", train)
    monkeypatch.setattr(dcjax.loop.early, "refuse_early", lambda config, recipe: None)
    return configs


def contents(directory):
    """Each path below a directory, with what a file holds."""
    return {
        path.relative_to(directory): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
        if "__pycache__" not in path.parts
    }


def recipe(body, name="other"):
    """The path of a new recipe file."""
    path = Path(f"{name}.py")
    path.write_text(body)
    return str(path)


def help_of(capfd, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    return output


def recipe_config():
    namespace = {}
    exec(RECIPE, namespace)
    return namespace["config"]()


def fields_of(config, prefix=""):
    """Each leaf of a nested config as (dotted name, value)."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def make_run(directory, config=None, **recorded):
    """A run directory that holds a config.json and nothing else."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(to_dict(config or Config()) | recorded))
    return directory


def process(*arguments, **environment):
    """A real `dcjax` process, ended."""
    command = [sys.executable, "-m", "dcjax", *arguments]
    return subprocess.run(command, capture_output=True, env=os.environ | environment)


def test_a_real_process_shows_the_commands():
    finished = process("--help")
    assert finished.returncode == 0
    assert finished.stderr == b""
    for command in ("train", "evaluate", "report"):
        assert re.search(rf"^ +{command} +\w", finished.stdout.decode(), re.MULTILINE)


def test_a_real_process_that_fails_has_status_2_and_writes_one_line():
    finished = process("train", "tested", "--objective.budget", "-1", "--run-dir", "run")
    assert finished.returncode == 2
    assert finished.stdout == b""
    assert finished.stderr.decode().startswith("dcjax: error: objective.budget is -1.0; it must be at least 0")
    assert finished.stderr.count(b"\n") == 1
    assert not Path("run").exists()


def test_help_is_readable_where_the_terminal_has_no_greek():
    finished = process("train", "tested", "--help", PYTHONIOENCODING="ascii")
    assert finished.returncode == 0
    assert b"Traceback" not in finished.stderr
    assert b"--objective.initial_multiplier" in finished.stdout


def test_help_that_is_read_in_part_is_no_error():
    """As in `dcjax --help | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen([sys.executable, "-m", "dcjax", "--help"], stdout=writing, stderr=subprocess.PIPE) as started:
        os.close(writing)
        errors = started.stderr.read()
    assert errors == b""


def test_help_of_a_recipe_that_is_read_in_part_is_no_error(capfd, monkeypatch):
    """As in `dcjax train --help | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed_pipe:
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        assert main(["train", "tested", "--help"]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_each_command_explains_itself(capfd, command):
    assert f"usage: dcjax {command}" in help_of(capfd, command, "--help")


def test_train_help_names_every_field_with_its_meaning_and_default(capfd):
    text = help_of(capfd, "train", "tested", "--help")
    # the frame of tyro's boxes
    lines = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()]
    fields = dict(fields_of(recipe_config()))
    assert len(fields) > 50
    for name, value in fields.items():
        (at,) = (i for i, line in enumerate(lines) if re.match(rf"--{re.escape(name)}\b(?!\.)", line))
        below = (i for i in range(at + 1, len(lines)) if lines[i].startswith("--") or "options" in lines[i])
        explained = " ".join(lines[at + 1 : next(below, len(lines))])
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        meaning, found, _ = explained.partition(f"(default: {shown})")
        assert found, (name, value, explained)
        assert len(meaning.split()) >= 2, (name, meaning)


def test_the_quickstart_is_the_default_recipe_wherever_one_is(started, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["train"]) == 0
    assert main(["train", "quickstart"]) == 0
    assert main(["train", str(BUILT_IN / "quickstart.py")]) == 0
    assert main(["train", "--seed", "3"]) == 0
    first, second, third, seeded = started
    assert first == second == third
    assert first.name == "quickstart"
    assert seeded == dataclasses.replace(first, seed=3)


RECIPES = sorted(path for path in BUILT_IN.glob("*.py") if "def config(" in path.read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_a_valid_config(started, path):
    assert main(["train", str(path)]) == 0
    assert isinstance(started[0], Config)


@pytest.mark.parametrize(
    "spelled",
    [
        ["--objective.initial_multiplier", "0.25", "--steps", "7"],
        ["--objective.initial-multiplier", "0.25", "--steps", "7"],
        ["--objective.initial_multiplier=0.25", "--steps=7"],
        ["--objective.initial-multiplier=0.25", "--steps=7"],
        ["objective.initial_multiplier=0.25", "steps=7"],
        ["objective.initial-multiplier=0.25", "steps=7"],
        ["steps=7", "--objective.initial-multiplier", "0.25"],
    ],
    ids=" ".join,
)
def test_a_field_is_set_in_either_spelling(started, spelled):
    assert main(["train", "tested"]) == 0
    assert main(["train", "tested", *spelled]) == 0
    plain, config = started
    assert (config.steps, config.objective.initial_multiplier) == (7, 0.25)
    objective = dataclasses.replace(plain.objective, initial_multiplier=0.25)
    assert config == dataclasses.replace(plain, steps=7, objective=objective)


@pytest.mark.parametrize("word", ["true", "True", "1", "false", "False", "0"])
@pytest.mark.parametrize(
    "spelled", ["model.tie_embeddings={}", "--model.tie-embeddings {}", "--model.tie_embeddings={}"]
)
def test_what_is_on_or_off_is_set_to_true_or_false(started, spelled, word):
    assert main(["train", "tested", *spelled.format(word).split()]) == 0
    assert started[0].model.tie_embeddings == (word in ("true", "True", "1"))


def test_a_word_for_what_is_on_or_off_is_quoted(refusal):
    message = refusal("train", "tested", "model.tie_embeddings=maybe")
    assert message == "model.tie_embeddings is 'maybe'; it must be true or false"


def test_fields_that_only_fit_together_are_set_together(started):
    """Prompts and updates are validated when all are known, not one after the other."""
    assert main(["train", "tested", "optimizer.updates=3", "rollout.prompts=6"]) == 0
    assert (started[0].optimizer.updates, started[0].rollout.prompts) == (3, 6)


@pytest.mark.parametrize(
    ("given", "steps", "seed"),
    [
        ([], None, 0),
        (["--profile", "3"], 3, 0),
        (["--profile=12", "seed=5"], 12, 5),
        (["--seed", "5", "--profile", "1"], 1, 5),
    ],
)
def test_iterations_to_profile_are_no_field_of_the_run(started, given, steps, seed):
    assert main(["train", "tested", *given]) == 0
    assert (started.profile, started[0].seed) == (steps, seed)


@pytest.mark.parametrize(
    ("given", "quoted"),
    [
        (["0"], "'0'"),
        (["-1"], "'-1'"),
        (["1.5"], "'1.5'"),
        (["all"], "'all'"),
        ([], "''"),
        (["--seed", "1"], "'--seed'"),
    ],
)
def test_iterations_to_profile_are_at_least_one(refusal, given, quoted):
    told = refusal("train", "tested", "--profile", *given)
    assert told == f"--profile is {quoted}; it must be a number of iterations, at least 1"


@pytest.mark.parametrize("spelled", [["run_dir=lr=3"], ["--run_dir=lr=3"], ["--run_dir", "lr=3"]], ids=" ".join)
def test_an_equals_sign_in_a_value_is_kept(started, spelled):
    assert main(["train", "tested", *spelled]) == 0
    assert started[0].directory == Path("lr=3")


# every argument of every command but train that is a path, behind what the command needs besides
PATHS = {
    "report RUN": ["report", ...],
    "evaluate SOURCE": ["evaluate", ...],
    "evaluate --data-dir": ["evaluate", "x", "--suite", "paper", "--data-dir", ...],
    "evaluate --against": ["evaluate", "x", "--suite", "paper", "--against", ...],
    "evaluate --out": ["evaluate", "x", "--suite", "paper", "--out", ...],
    "serve SOURCE": ["serve", ...],
    "serve --token-file": ["serve", "x", "--protocol", "http", "--token-file", ...],
    "probe SOURCE": ["probe", ...],
    "probe --prompts-file": ["probe", "x", "--prompts-file", ...],
    "probe --out": ["probe", "x", "--out", ...],
    "lab STUDY": ["lab", ...],
    "lab --results": ["lab", "x", "--results", ...],
    "lab --out": ["lab", "x", "--out", ...],
    "convert import SOURCE": ["convert", "import", ..., "x"],
    "convert import OUT": ["convert", "import", "x", ...],
    "convert export RUN_OR_STEP": ["convert", "export", ..., "x"],
    "convert export OUT": ["convert", "export", "x", ...],
    "convert inspect SOURCE": ["convert", "inspect", ...],
    "data DATA_DIR": ["data", ...],
}


def arguments_of(parser, command=""):
    """Each argument of type Path of a parser and of those below it, as "COMMAND ARGUMENT"."""
    for action in parser._actions:
        if action.type is Path:
            yield f"{command} {(action.option_strings or [action.metavar or action.dest.upper()])[0]}"
        if isinstance(action.choices, dict):
            for name, below in action.choices.items():
                yield from arguments_of(below, f"{command} {name}".strip())


def test_every_path_of_the_command_line_is_known():
    assert sorted(arguments_of(build_parser())) == sorted(PATHS)


@pytest.mark.parametrize("given", ["", "gs://bucket/x", "~nobody-has-this-name/x"])
@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_is_not_local_is_refused_before_anything_is_done(refusal, name, given):
    message = refusal(*(given if part is ... else part for part in PATHS[name]))
    assert f"argument {name.split()[-1]}: it is {given!r}; " in message


@pytest.mark.parametrize("name", PATHS)
def test_a_path_may_begin_with_the_home_directory(name, directory, monkeypatch):
    monkeypatch.setenv("HOME", str(directory))
    words = ["~/y" if part is ... else part for part in PATHS[name]]
    found = [value for value in vars(build_parser().parse_args(words)).values() if isinstance(value, Path)]
    assert directory / "y" in found and Path("~/y") not in found


@pytest.mark.parametrize("given", ["", "s3://bucket/x", "~nobody-has-this-name/x"])
@pytest.mark.parametrize("field", ["run_dir", "pretrained"])
def test_a_field_that_is_no_local_path_is_refused(refusal, field, given):
    for spelled in ([f"{field}={given}"], [f"--{field}", given]):
        assert refusal("train", "tested", *spelled).startswith(f"{field} is {given!r}; ")


@pytest.mark.parametrize("given", ["", "s3://bucket/x"])
@pytest.mark.parametrize("field", ["data_dir", "index_file"])
def test_a_path_of_the_task_is_refused_alike(refusal, field, given):
    body = """
from dcjax.recipe.config import Config
from dcjax.recipe.reward import RewardConfig
from dcjax.data.mathematics import MathTask

def config():
    return Config(task=MathTask(max_prompt_tokens=9), reward=RewardConfig(workers=1))
"""
    assert refusal("train", recipe(body), f"task.{field}={given}").startswith(f"task.{field} is {given!r}; ")


def test_a_recipe_with_an_address_is_refused_by_its_field(refusal):
    body = "from dcjax.recipe.config import *\ndef config():\n    return Config(run_dir=Path('gs://bucket/x'))"
    assert "run_dir is 'gs:/bucket/x'; it must be a local path" in refusal("train", recipe(body))


@pytest.mark.parametrize("given", ["", "gs://bucket/recipe.py", "~nobody-has-this-name/recipe.py"])
def test_a_recipe_that_is_no_local_path_is_refused(refusal, given):
    assert refusal("train", given).startswith(f"the recipe is {given!r}; ")


def test_fields_and_recipes_may_begin_with_the_home_directory(started, directory, monkeypatch):
    monkeypatch.setenv("HOME", str(directory))
    assert main(["train", "~/experiments/tested.py", "run_dir=~/run", "--pretrained", "~/model"]) == 0
    assert (started[0].run_dir, started[0].pretrained) == (directory / "run", directory / "model")
    assert main(["train", "tested", "run_dir=None", "pretrained=None"]) == 0
    assert (started[1].run_dir, started[1].pretrained) == (None, None)


def test_a_recipe_is_given_by_name_or_by_path(started):
    assert main(["train", "tested"]) == 0
    assert main(["train", "experiments/tested.py"]) == 0
    assert started[0] == started[1]


def test_a_recipe_may_define_a_dataclass_of_its_own(started):
    body = """
from __future__ import annotations
from dataclasses import dataclass
from dcjax.recipe.config import Config

@dataclass
class Lengths:
    steps: int = 9

def config():
    return Config(steps=Lengths().steps)
"""
    assert main(["train", recipe(body)]) == 0
    assert started[0].steps == 9


SCALED = """
from dcjax.models import ModelConfig
from dcjax.models.rope import YarnScaling
from dcjax.recipe.config import Config

def config():
    return Config(model=ModelConfig(rope_scaling=YarnScaling(4.0, 64)))
"""


def test_fields_of_scaled_rope_are_set_where_a_recipe_scales_it(started):
    assert main(["train", recipe(SCALED), "model.rope_scaling.factor=8", "--model.rope_scaling.truncate", "false"]) == 0
    assert started[0].model.rope_scaling == YarnScaling(8.0, 64, truncate=False)


def test_a_factor_of_scaled_rope_that_cannot_be_is_refused(refusal):
    told = refusal("train", recipe(SCALED), "model.rope_scaling.factor=0.5")
    assert "model.rope_scaling.factor is 0.5; it must be a finite number of at least 1" in told


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["evaluate"], ["report"], ["report", "a", "b"]])
def test_a_command_line_that_is_none_points_to_the_help(refusal, arguments):
    assert "--help" in refusal(*arguments)


def test_recipes_are_found_by_name_from_any_directory(started, directory, monkeypatch):
    (directory / "elsewhere").mkdir()
    monkeypatch.chdir(directory / "elsewhere")
    assert main(["train", "quickstart"]) == 0
    assert started[0].name == "quickstart"


def test_an_unknown_recipe_lists_those_there_are(refusal):
    message = refusal("train", "tessted")
    assert "tessted" in message and message.endswith("tested")


def test_an_unknown_recipe_file_is_named(refusal):
    assert "missing/recipe.py" in refusal("train", "missing/recipe.py")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def config(:", "SyntaxError: invalid syntax (other.py, line 1)"),
        ("def config():\n    raise KeyError('lost')", "KeyError: 'lost' ({}, line 2, in config)"),
        ("raise RuntimeError('two\\nlines')", "two lines ({}, line 1, in <module>)"),
        ("import json\njson.loads('{')", "(char 1) ({}, line 2, in <module>)"),
        ("import sys\nsys.exit(1)", "SystemExit: 1 ({}, line 2, in <module>)"),
        ("", "config"),
        ("config = 3", "not callable"),
        ("def config():\n    return {'steps': 3}", "returned dict; it must return a dcjax.recipe.config.Config"),
        ("def config():\n    pass", "returned NoneType"),
        ("def config(steps):\n    pass", "steps"),
        (
            "from dcjax.recipe.config import *\ndef config():\n    return Config(steps=-1)",
            "steps is -1; it must be at least 0",
        ),
        ("\0", "other.py"),
    ],
    ids=range(12),
)
def test_a_recipe_that_cannot_be_run_is_named_with_the_reason_and_its_line(refusal, directory, body, expected):
    message = refusal("train", recipe(body), "--run-dir", "run")
    assert "other.py" in message and expected.format(directory / "other.py") in message


OWN_CODE = """
from dataclasses import dataclass, replace
from dcjax.data.arithmetic import ArithmeticTask
from dcjax.recipe.reward import RewardConfig
from tested import config as tested

def outer():
    def inner(text, gold, *, finished): return 1.0
    return inner

@dataclass(frozen=True)
class Mine(RewardConfig):
    fault: str = ""
    def verifier(self, task):
        match self.fault:
            case "raises": return {}["why"]
            case "exits": raise SystemExit
            case "local": return outer()
            case "lambda": return lambda text, gold, *, finished: 1.0
            case "none": return None
            case "value": raise ValueError("why")
        return super().verifier(task)

@dataclass(frozen=True)
class Task(ArithmeticTask):
    fault: str = ""
    def open(self, tokenizer):
        return open("latin.jsonl", encoding="utf-8").read() if self.fault == "latin" else {}["why"]
    def build_tokenizer(self, pretrained):
        return super().build_tokenizer(pretrained) if self.fault else {}["why"]

def config():
    return replace(tested(), reward=Mine(), task=Task())
"""


OWN_FAULTS = [
    ("--reward.fault raises", "KeyError: 'why' ({file}, line {line}, in Mine.verifier)", 'case "raises"'),
    ("--reward.fault exits", "SystemExit ({file}, line {line}, in Mine.verifier)", 'case "exits"'),
    ("--reward.fault value", "ValueError: why ({file}, line {line}, in Mine.verifier)", 'case "value"'),
    ("--reward.fault none", "the reward of Mine and Task is None, a NoneType; it must be a function", ""),
    ("--reward.fault none --reward.workers 1", "the reward of Mine and Task is None, a NoneType; it must be", ""),
    ("--reward.fault local --reward.workers 1", "is outer.<locals>.inner ({file}, line {line})", "def inner"),
    ("--reward.fault lambda --reward.workers 1", "<lambda> ({file}, line {line}), which", 'case "lambda"'),
    ("--task.fault latin", "UnicodeDecodeError: 'utf-8' codec", ""),
    ("--task.fault latin", "({file}, line {line}, in Task.open)", "return open("),
    ("--task.fault raises", "KeyError: 'why' ({file}, line {line}, in Task.open)", "return open("),
    ("", "KeyError: 'why' ({file}, line {line}, in Task.build_tokenizer)", "return super().build"),
]


def test_code_of_a_section_that_fails_is_named_by_its_line(refusal, directory, monkeypatch):
    monkeypatch.syspath_prepend(directory / "experiments")
    Path("latin.jsonl").write_bytes(b"caf\xe9")
    file = directory / recipe(OWN_CODE)
    for overrides, expected, line in OWN_FAULTS:
        number = next(n for n, text in enumerate(OWN_CODE.splitlines(), start=1) if line in text)
        message = refusal("train", file, "--run-dir", "run", *overrides.split())
        assert expected.format(file=file, line=number) in message


MATHEMATICS = """
from dataclasses import replace
from dcjax.data.mathematics import MathTask
from dcjax.recipe.reward import RewardConfig
from tested import config as tested

def config():
    given = tested()
    rollout = replace(given.rollout, max_prompt_length=1024)
    return replace(given, reward=RewardConfig(workers=2), task=MathTask(), rollout=rollout)
"""
"""A task of files whose reward needs processes."""


@pytest.fixture
def mathematics(directory, monkeypatch, capfd):
    """What refuses a run of mathematics, for which no process is started."""
    monkeypatch.syspath_prepend(directory / "experiments")
    monkeypatch.setattr(dcjax.rewards.pool, "_Server", lambda *arguments: pytest.fail("started"))

    def run(*overrides):
        assert main(["train", recipe(MATHEMATICS), "--run-dir", "run", *map(str, overrides)]) == 2
        *others, message = capfd.readouterr().err.splitlines()
        assert all(line.startswith("dcjax: dapo-math-17k: examples 29") for line in others)
        assert not Path("run").exists()
        return message.removeprefix("dcjax: error: ")

    return run


@pytest.mark.parametrize(
    ("overrides", "of_the_model"),
    [
        ("--mesh.fsdp 16 --pretrained nowhere", "no nowhere/config.json"),
        ("--mesh.tensor 16", "mesh.tensor × mesh.context is 16, which does not divide the 4 query heads"),
    ],
)
def test_all_that_refuses_a_run_is_said_at_once_and_before_anything_slow(mathematics, overrides, of_the_model):
    begun = time.perf_counter()
    message = mathematics(*overrides.split())
    assert time.perf_counter() - begun < 5
    for expected in (
        of_the_model,
        "no copy of dapo-math-17k, aime24 in data; dcjax data data --download fetches",
        f"the samples that come with dcjax: --task.data_dir {SAMPLES}",
        " 16 needs 16 devices; 8 found",
    ):
        assert expected in message


def test_a_real_process_that_is_refused_starts_no_other_and_says_all_in_one_line():
    overrides = ["--mesh.fsdp", "16"]
    ended = process("train", recipe(MATHEMATICS), *overrides, PYTHONPATH=os.pathsep.join([*sys.path, "experiments"]))
    assert ended.returncode == 2 and ended.stderr.count(b"\n") == 1
    assert b"no copy of dapo-math-17k, aime24 in data" in ended.stderr
    assert b"mesh.fsdp 16 needs 16 devices" in ended.stderr


REFUSED = """
import sys
from dcjax.cli import main

assert main(["train", "tested", *sys.argv[1:]]) == 2
print(sys.modules.keys() & {"tensorflow", "jetstream", "transformers"})
"""


def test_a_mesh_that_does_not_fit_is_refused_before_slow_imports():
    command = [sys.executable, "-c", REFUSED, "--mesh.fsdp", "16"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout == "set()\n"
    assert ended.stderr == (
        "dcjax: error: mesh.fsdp 16 needs 16 devices; 8 found, so the product must be at most that\n"
    )


def test_all_that_files_show_is_said_at_once(mathematics, capfd):
    for name in ("dapo-math-17k", "aime24"):
        load_examples(name, SAMPLES)
    capfd.readouterr()  # data sets that are prepared for the first time show how far they are
    message = mathematics("--task.data_dir", SAMPLES, "--task.max_prompt_tokens", "8", "--model.vocab_size", "128")
    assert "dapo-math-17k has nothing left to train on" in message
    assert "model.vocab_size is 128; the tokenizer needs 258" in message


@pytest.mark.parametrize(
    ("name", "held", "expected"),
    [
        ("aime24.jsonl", b'{"problem": "caf\xe9"}', r"""line 1: b'\xe9' after b'{"problem": "caf' is not UTF-8"""),
        ("aime24.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "is a Git LFS pointer"),
    ],
)
def test_a_data_file_that_is_none_is_named(mathematics, directory, name, held, expected):
    (directory / "data").mkdir()
    shutil.copy(SAMPLES / "dapo-math-17k.jsonl", directory / "data")
    (directory / "data" / name).write_bytes(held)
    message = mathematics()
    assert message.startswith(f"data/{name}") and expected in message


@pytest.mark.parametrize("spelled", [["--steppes", "3"], ["--steppes=3"], ["steppes=3"]], ids=" ".join)
def test_an_unknown_field_brings_the_nearest_to_mind(refusal, spelled):
    message = refusal("train", "tested", *spelled, "--run-dir", "run")
    assert "--steppes" in message and "--steps INT" in message


def test_an_unknown_field_of_a_section_brings_the_nearest_to_mind(refusal):
    message = refusal("train", "tested", "--rollout.groupsize", "3")
    assert "--rollout.groupsize" in message and "--rollout.group_size INT" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=many", ["many", "--steps INT"]),
        ("steps=", ["--steps INT"]),
        ("optimizer.learning_rate=fast", ["fast", "--optimizer.learning_rate FLOAT"]),
        ("serving.format=int7", ["int7", "float32", "bf16", "int8"]),
        ("objective.algorithm=ppo", ["ppo", "dc_grpo", "grpo"]),
        ("objective.budget=-1", ["objective.budget is -1.0", "at least 0"]),
        ("objective.budget=nan", ["objective.budget is nan"]),
        ("rollout.group_size=1", ["rollout.group_size is 1", "at least 2"]),
        ("optimizer.updates=3", ["rollout.prompts 4", "optimizer.updates 3"]),
        ("optimizer.tokens_per_microbatch=5", ["optimizer.tokens_per_microbatch is 5", "must be at least"]),
        ("rollout.max_prompt_length=6", ["rollout.max_prompt_length is 6", "needs 13 tokens"]),
        ("rollout.max_response_length=12", ["rollout.max_response_length is 12", "needs"]),
        ("mesh.data=3", ["mesh.data × mesh.fsdp × mesh.expert, 3"]),
        ("mesh.tensor=16", ["mesh.tensor × mesh.context is 16", "4 query heads"]),
        ("model.vocab_size=18", ["model.vocab_size is 18", "needs 19"]),
        ("model.num_heads=3", ["model.num_heads 3", "model.num_kv_heads 2"]),
        ("seed=-1", ["seed is -1", "at least 0"]),
        ("seed=99999999999999999999", ["seed is 99999999999999999999"]),
        ("name=a/b", ["'a/b'"]),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_what_would_be_right(refusal, override, expected):
    message = refusal("train", "tested", override, "--run-dir", "run")
    for words in expected:
        assert words in message, message


def test_a_task_without_held_out_problems_is_refused_before_training(refusal):
    tiny = ["task.min_operations=1", "task.max_operations=1", "task.max_operand=1", "task.max_value=1"]
    message = refusal("train", "tested", *tiny, "--run-dir", "run")
    assert "task" in message and "heldout" in message


def test_a_flag_without_its_value_is_named(refusal):
    assert "--run_dir" in refusal("train", "tested", "--run-dir")


def test_a_word_that_is_no_override_is_named(refusal):
    assert "stray" in refusal("train", "tested", "stray")


def test_a_run_directory_below_a_file_cannot_be_made(refusal, directory):
    (directory / "file").write_text("mine")
    assert "file" in refusal("train", "tested", "--run-dir", "file/run")
    assert "file" in refusal("train", "tested", "--run-dir", "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_directory_that_may_not_be_written_is_refused(refusal, directory):
    locked = directory / "locked"
    locked.mkdir(mode=0o500)
    assert "locked" in refusal("train", "tested", "--run-dir", "locked/run")
    assert "locked" in refusal("train", "tested", "--run-dir", "locked")


def test_a_run_directory_of_another_config_is_refused_with_the_differing_fields(refusal, directory):
    there = dataclasses.replace(recipe_config(), seed=5, objective=ObjectiveConfig(budget=0.125))
    make_run(directory / "run", there)
    message = refusal("train", "tested", "--run-dir", "run", "--seed", "6", "--checkpoint.every", "3")
    assert "seed 6 (there 5)" in message
    assert f"objective.budget {ObjectiveConfig().budget} (there 0.125)" in message
    assert message.count("there") == 2


def test_a_run_directory_that_another_process_holds_is_refused(refusal, directory):
    make_run(directory / "run", recipe_config())
    with open(directory / "run" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        message = refusal("train", "tested", "--run-dir", "run")
    assert "another process" in message and "run" in message


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"steps": -1}', '{"wisdom": 3}', '{"task": 3}'])
def test_a_damaged_config_is_named(refusal, directory, damage):
    make_run(directory / "run")
    (directory / "run" / "config.json").write_text(damage)
    assert "run/config.json" in refusal("evaluate", "run")


@pytest.mark.parametrize("source", ["missing", "missing/checkpoints/3", "."])
def test_evaluating_what_is_no_run_is_refused(refusal, source):
    assert "no run in" in refusal("evaluate", source)


def test_evaluating_a_run_without_checkpoints_says_when_there_will_be_one(refusal, directory):
    make_run(directory / "run")
    message = refusal("evaluate", "run")
    assert "no checkpoint in" in message and "after the warm start" in message


def test_evaluating_a_missing_step_lists_those_there_are(refusal, directory):
    make_run(directory / "run")
    message = refusal("evaluate", "run/checkpoints/3")
    assert "no checkpoint of step 3" in message and "none" in message


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--format", "int7", "float32, bf16, fp16, int8, int8_channel, w8a8_rotated, w8a8, fp8_weight_only, fp8, int4"),
        ("--prompts", "0", "evaluation.prompts is 0; it must be at least 1"),
        ("--prompts", "few", "few"),
        ("--temperature", "-1", "evaluation.temperature is -1.0; it must be at least 0"),
        ("--temperature", "nan", "evaluation.temperature is nan"),
        ("--tempo", "1", "--tempo"),
    ],
)
def test_evaluating_with_a_setting_that_cannot_be_is_refused(refusal, directory, option, value, expected):
    make_run(directory / "run")
    assert expected in refusal("evaluate", "run", option, value)


def test_a_report_of_what_is_no_run_is_refused(refusal, directory):
    assert "missing/metrics.jsonl" in refusal("report", "missing")
    make_run(directory / "run")
    assert "run/metrics.jsonl" in refusal("report", "run")
    (directory / "run" / "metrics.jsonl").write_text("not JSON\n{}\n")
    assert "line 1" in refusal("report", "run")


def test_a_report_says_where_it_is(capfd, directory):
    make_run(directory / "run")
    (directory / "run" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert main(["report", "run"]) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    assert output == f"plot:   {Path('run/report.png')}\nreport: {Path('run/report.html')}\n"
    assert Path("run/report.png").stat().st_size > 0 and Path("run/report.html").stat().st_size > 0


def test_an_interrupted_run_says_how_to_go_on(capfd, monkeypatch):
    def interrupted(config, recipe, *, profile):
        raise KeyboardInterrupt

    monkeypatch.setattr(dcjax.loop.train, "train", interrupted)
    assert main(["train", "tested"]) == 130
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1 and "run the same command again to resume" in errors


@pytest.mark.parametrize(
    ("command", "function", "expected"),
    [
        (("evaluate", "run"), "dcjax.tools.evaluate.evaluate_source", "interrupted"),
        (("report", "run"), "dcjax.reporting.run_report.write_report", "interrupted"),
        (
            ("convert", "inspect", "in"),
            "dcjax.tools.convert.inspect_model",
            "interrupted; nothing is left half-written",
        ),
        (("convert", "import", "in", "out"), "dcjax.tools.convert.import_model", "nothing is left half-written"),
        (("convert", "export", "run", "out"), "dcjax.tools.convert.export_run", "nothing is left half-written"),
    ],
)
def test_an_interrupted_command_that_does_not_resume_does_not_say_so(capfd, monkeypatch, command, function, expected):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupted)
    assert main(command) == 130
    errors = capfd.readouterr().err
    assert errors.startswith("dcjax: ") and errors.endswith(f"{expected}\n") and errors.count("\n") == 1
