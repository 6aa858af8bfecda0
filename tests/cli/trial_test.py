"""`dcjax train RECIPE --trial`: a recipe is made small before a run of it begins, and says so."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from launching import ended, processes

import dcjax.cli.trial
import dcjax.loop.early
import dcjax.loop.train
from dcjax.cli import main
from dcjax.data.datasets import SAMPLES
from dcjax.data.tokenizers import byte_tokenizer
from dcjax.loop.run_directory import open_run
from dcjax.models import ModelConfig, save_hf
from dcjax.recipe.trial import Available
from dcjax.reporting.record import read_metrics
from dcjax.sharding.mesh import MeshConfig
from dcjax.user_code import CodeFile

pytestmark = pytest.mark.heavy

PLACE = Available(devices=1, memory=2**34, cores=2, data=False, tokens=258)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def started(monkeypatch):
    """Configs that would have been run, on one device with 16 GiB; none is."""
    configs = []
    monkeypatch.setattr(dcjax.cli.trial, "memory_of", lambda device: PLACE.memory)
    monkeypatch.setattr(dcjax.cli.trial.jax, "devices", lambda: ["one"])
    monkeypatch.setattr(dcjax.loop.train, "train", lambda config, recipe, *, profile: configs.append(config))
    monkeypatch.setattr(dcjax.loop.early, "refuse_early", lambda config, recipe: None)
    return configs


@pytest.fixture
def folder(directory):
    """A Hugging Face folder of a small model, made for sequences that are shorter than the recipes' are."""
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 32, "num_layers": 1}
    model = ModelConfig(**sizes, max_position_embeddings=2048)
    byte_tokenizer().save_pretrained(directory / "words")
    save_hf(directory / "small", model, tiny.masters(model), tokenizer_from=directory / "words")
    return directory / "small"


def told(capfd):
    output, errors = capfd.readouterr()
    assert output == ""
    return [line.removeprefix("trial: ") for line in errors.splitlines() if line.startswith("trial: ")]


def test_a_recipe_of_a_slice_is_shrunk_and_each_field_is_a_line(started, capfd):
    assert main(["train", "dcmdp_qwen3_8b", "--trial"]) == 0
    (config,) = started
    assert (config.steps, config.rollout.prompts, config.mesh.fsdp, config.pretrained) == (2, 4, 1, None)
    assert config.directory == Path("runs/dcmdp_qwen3_8b-trial")
    lines = told(capfd)
    assert lines[-1] == "everything is written to runs/dcmdp_qwen3_8b-trial"
    assert {"steps 300 -> 2", "rollout.prompts 64 -> 4", "mesh.fsdp 16 -> 1", "model.num_layers 36 -> 2"} < set(lines)
    assert "pretrained models/Qwen3-8B -> None (there is no such folder, so weights are random)" in lines
    (data,) = (line for line in lines if line.startswith("task.data_dir "))
    assert data.startswith(f"task.data_dir data -> {SAMPLES} (") and "no benchmark" in data


def test_what_is_given_wins_in_every_spelling(started, capfd):
    given = ["--trial", "--rollout.prompts", "16", "steps=5", "--checkpoint.keep=9", "model.hidden_size=64"]
    assert main(["train", "dcmdp_qwen3_8b", *given, "name=other"]) == 0
    (config,) = started
    assert (config.rollout.prompts, config.steps, config.checkpoint.keep, config.model.hidden_size) == (16, 5, 9, 64)
    # the run of that name is left alone
    assert config.name == "other-trial"
    lines = told(capfd)
    fields = ("steps ", "rollout.prompts ", "checkpoint.keep ", "model.hidden_size ", "name ")
    assert not [line for line in lines if line.startswith(fields)]


def test_a_folder_that_is_given_gives_the_model(started, capfd, folder):
    assert main(["train", "dcmdp_qwen3_8b", f"pretrained={folder}", "--trial"]) == 0
    (config,) = started
    assert config.pretrained == folder
    assert not [line for line in told(capfd) if line.startswith(("model.", "pretrained"))]


def test_data_that_are_given_are_used_whole(started, capfd, directory):
    for name in ("dapo-math-17k", "aime24"):
        (directory / f"{name}.jsonl").write_bytes((SAMPLES / f"{name}.jsonl").read_bytes())
    assert main(["train", "dcmdp_qwen3_8b", "--trial", "--task.data-dir", str(directory)]) == 0
    (config,) = started
    # held-out prompts may be as long as in the recipe
    assert (config.task.data_dir, config.task.max_prompt_tokens) == (directory, 1024)
    assert not [line for line in told(capfd) if line.startswith("task.")]


def test_the_same_trial_goes_on_and_another_does_not_touch_it(started, directory):
    recipe = tiny.write_recipe(directory / "mine.py")
    given = ["train", str(recipe), "--trial", "--run-dir", str(directory / "mine")]

    def begin(*others):
        assert main([*given, *others]) == 0
        config = started[-1]
        with open_run(config, recipe=CodeFile.read(recipe)):
            return config.directory.name

    assert [begin(), begin(), begin("steps=5"), begin("steps=5"), begin()] == [
        *["mine-trial"] * 2,
        *["mine-trial-2"] * 2,
        "mine-trial",
    ]
    recipe.write_text(recipe.read_text() + "# a mended line\n")
    assert begin() == "mine-trial-3"
    (directory / "mine-trial-4").mkdir()
    assert begin("steps=7") == "mine-trial-5"
    assert not (directory / "mine").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dcmdp_qwen3_8b", "--trial", "pretrained=nowhere"], "nowhere"),
        (["run", "--trial"], "--trial is given, and run is a run; give the recipe that it was started from"),
        (["dcmdp_qwen3_8b", "--trial", "--no-recipe-code"], "--no-recipe-code is given; dcmdp_qwen3_8b is a recipe"),
        (
            ["dcmdp_qwen3_8b", "--trial", "rollout.prompts=6"],
            "rollout.prompts 6 do not divide into optimizer.updates 4",
        ),
        (["dcmdp_qwen3_8b", "--trial", "rollout.promts=6"], "rollout.promts"),
    ],
)
def test_refusals_are_one_line(started, capfd, directory, arguments, message):
    (directory / "run").mkdir()
    (directory / "run" / "config.json").write_text("{}")
    assert main(["train", *arguments]) == 2
    output, errors = capfd.readouterr()
    assert output == "" and errors.count("\n") == 1 and message in errors
    assert not started


def test_a_model_that_cannot_fit_is_refused_before_anything_is_compiled(started, capfd, folder, monkeypatch):
    monkeypatch.setattr(dcjax.cli.trial, "memory_of", lambda device: 2**16)
    assert main(["train", "dcmdp_qwen3_8b", "--trial", "--pretrained", str(folder)]) == 2
    assert f"{folder} has " in capfd.readouterr().err
    assert not started


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [False, True], ids=["random", "pretrained"])
def test_a_recipe_of_a_slice_runs_here(pretrained, folder, capfd, monkeypatch, directory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
    # a mesh of the eight devices, and one of them
    given = ["--pretrained", str(folder), "mesh.fsdp=1", "serving.tensor=1"] if pretrained else []
    assert main(["train", "dcmdp_qwen3_8b", "--trial", *given]) == 0
    records = read_metrics(Path("runs/dcmdp_qwen3_8b-trial/metrics.jsonl"))
    assert [record["step"] for record in records] == [0, 1, 2]
    errors = capfd.readouterr().err
    phases = [errors.index(f"step 0/2  {phase} …") for phase in ("evaluation", "sampling", "update")]
    assert phases == sorted(phases) and errors.index("iterations: 2, each of ") < phases[0]


@pytest.mark.slow
def test_processes_find_each_other_before_devices_are_counted(directory):
    """A mesh that the devices of one process alone could not hold, in one directory of all."""
    config = replace(tiny.CONFIG, mesh=MeshConfig(data=2), warm_start=replace(tiny.CONFIG.warm_start, steps=0))
    recipe = tiny.write_recipe(directory / "both.py", config)
    with processes(recipe, directory / "run", "--trial") as both:
        ends = [ended(process, within=300) for process in both]
    assert [status for status, _ in ends] == [0, 0], ends
    (_, told), (_, others) = ends
    assert "trial: steps 8 -> 2" in told and not [line for line in others if line.startswith("trial: ")]
    assert [path.name for path in directory.glob("run*")] == ["run-trial"]
    assert [record["step"] for record in read_metrics(directory / "run-trial" / "metrics.jsonl")] == [0, 1, 2]
