import dataclasses
import json
import os
import shutil

import pretend
import pytest
import tiny
from launching import complaints
from stepping import change_rollouts

import dcjax.loop.evaluate
import dcjax.tools.evaluate
from dcjax.cli import main
from dcjax.errors import RunError
from dcjax.loop.checkpoint import Checkpoints
from dcjax.loop.run_directory import load_config, open_run
from dcjax.reporting.record import read_metrics
from dcjax.reporting.statistics import wilson_interval
from dcjax.tools.evaluate import evaluate_source

pytestmark = pytest.mark.heavy

STEPS, EVERY, HELDOUT = tiny.CONFIG.steps, tiny.CONFIG.checkpoint.every, tiny.CONFIG.evaluation.prompts


@pytest.fixture
def evaluated(capfd):
    """Runs `dcjax evaluate SOURCE --json`, which must say nothing else; returns what it printed."""

    def run(source, *options):
        capfd.readouterr()
        status = main(["evaluate", str(source), "--json", *options])
        output, errors = capfd.readouterr()
        assert (status, complaints(errors)) == (0, [])
        assert output.count("\n") == 1
        return json.loads(output)

    return run


def by_policy(result):
    return {row["policy"]: row for row in result["policies"]}


def logged(directory, step):
    """Both accuracies in the line of a step."""
    (line,) = (record for record in read_metrics(directory / "metrics.jsonl") if record["step"] == step)
    return {policy: line[f"eval/{policy}_accuracy"] for policy in ("deployed", "training")}


@pytest.fixture
def refusal(capfd):
    """Runs a command that must be refused: status 2 and one line on stderr, which is returned."""

    def run(*arguments):
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        output, errors = capfd.readouterr()
        assert (status, output) == (2, "")
        (told,) = complaints(errors)
        assert told.startswith("dcjax: error: "), errors
        return told

    return run


def test_a_run_is_evaluated_as_its_last_line_says(finished_run, evaluated):
    result = evaluated(finished_run)
    rows = by_policy(result)
    assert result["step"] == STEPS
    assert {policy: row["accuracy"] for policy, row in rows.items()} == logged(finished_run, STEPS)
    assert (rows["deployed"]["format"], rows["training"]["format"]) == ("int8", "float32")
    for row in rows.values():
        assert row["total"] == HELDOUT and row["accuracy"] == row["correct"] / HELDOUT
        assert row["interval"] == list(wilson_interval(row["correct"], HELDOUT))
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]


@pytest.mark.parametrize("step", [EVERY, STEPS - EVERY])
def test_a_checkpoint_is_evaluated_as_the_line_of_its_step_says(finished_run, evaluated, step):
    result = evaluated(finished_run / "checkpoints" / str(step))
    assert result["step"] == step
    assert {policy: row["accuracy"] for policy, row in by_policy(result).items()} == logged(finished_run, step)


def test_golds_are_looked_at_before_anything_is_sampled(finished_run, refusal, monkeypatch):
    def check(config, problems):
        raise RunError(f"looked at {problems.golds}")

    def sample(*arguments, **settings):
        raise RunError("sampled")

    monkeypatch.setattr(dcjax.tools.evaluate, "check_golds", check)
    monkeypatch.setattr(dcjax.loop.evaluate, "Sampling", sample)
    assert refusal("evaluate", finished_run) == "dcjax: error: looked at ()"


def test_the_run_is_not_so_bad_that_accuracies_cannot_tell_checkpoints_apart(finished_run):
    """Were they all 0, the tests above would compare nothing."""
    accuracies = [tuple(logged(finished_run, step).values()) for step in range(0, STEPS + 1, EVERY)]
    assert max(max(pair) for pair in accuracies) > 0
    assert len(set(accuracies)) > 1


def test_the_table_shows_what_the_json_does(finished_run, evaluated, capfd):
    rows = by_policy(evaluated(finished_run))
    assert main(["evaluate", str(finished_run)]) == 0
    output, errors = capfd.readouterr()
    assert complaints(errors) == []
    title, header, *lines = output.splitlines()
    assert title == f"step {STEPS}, temperature 1"
    assert "95%" in header
    shown = {line.split()[0]: line for line in lines}
    assert set(shown) == {"deployed", "training"}
    for policy, line in shown.items():
        row = rows[policy]
        assert f"{row['correct']}/{row['total']}" in line and row["format"] in line
        assert f"{row['accuracy']:.3f}" in line
        assert f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}" in line


def test_in_the_trainers_own_format_the_policies_are_one(finished_run, evaluated):
    rows = by_policy(evaluated(finished_run, "--format", "float32"))
    assert rows["deployed"]["format"] == rows["training"]["format"] == "float32"
    assert rows["deployed"]["correct"] == rows["training"]["correct"]
    assert rows["training"]["accuracy"] == logged(finished_run, STEPS)["training"]


def test_the_settings_of_the_run_may_be_replaced(finished_run, monkeypatch):
    asked = []

    def seen(engine, rollout):
        asked.append((len(rollout.tokens), *set(rollout.temperature.tolist())))
        return rollout

    pretend.install(monkeypatch)
    change_rollouts(monkeypatch, dcjax.loop.evaluate, seen)
    result = evaluate_source(finished_run, prompts=4, temperature=0.0)
    assert asked == [(4, 0.0), (4, 0.0)]
    assert result.temperature == 0 and [row.total for row in result.rows] == [4, 4]


def test_evaluating_changes_nothing_in_the_run(finished_run, evaluated):
    def seen():
        return {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}

    before = seen()
    evaluated(finished_run)
    assert seen() == before


def test_a_run_called_by_a_number_is_evaluated_while_another_process_trains_in_it(
    finished_run, evaluated, tmp_path, monkeypatch
):
    """As the runs of several seeds are called; from within it."""
    directory = shutil.copytree(finished_run, tmp_path / "seeds" / "7")
    monkeypatch.chdir(directory / "checkpoints")
    with open_run(dataclasses.replace(load_config(directory), run_dir=directory)):
        assert evaluated("..")["step"] == STEPS


def test_a_missing_checkpoint_lists_those_there_are(finished_run, refusal):
    errors = refusal("evaluate", finished_run / "checkpoints" / "99")
    assert "no checkpoint of step 99" in errors and "there: 2, 4, 6, 8" in errors


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_can_be_evaluated(
    finished_run, refusal, evaluated, tmp_path
):
    directory = shutil.copytree(finished_run, tmp_path / "run")
    for data in (directory / "checkpoints" / str(STEPS) / "state").rglob("d/*"):
        os.truncate(data, data.stat().st_size // 2)
    errors = refusal("evaluate", directory)
    assert str(directory / "checkpoints" / str(STEPS)) in errors and "damaged" in errors
    assert evaluated(directory / "checkpoints" / str(STEPS - EVERY))["step"] == STEPS - EVERY


def test_a_run_without_its_tokenizer_is_refused(finished_run, refusal, tmp_path):
    directory = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(directory / "tokenizer")
    assert str(directory / "tokenizer") in refusal("evaluate", directory)


@pytest.mark.parametrize(
    ("format", "largest", "held"),
    [("float32", float("nan"), "3.4e+38"), pytest.param("fp16", 1e5, "6.55e+04", marks=pytest.mark.slow)],
)
def test_a_policy_that_overflows_in_its_format_is_not_evaluated(
    finished_run, refusal, monkeypatch, format, largest, held
):
    """A residual stream of 1e5 is more than float16 holds; token 0 for ever was an accuracy of 0 once."""
    restore = Checkpoints.restore

    def overflowing(*arguments):
        params, loop = restore(*arguments)
        table = params["embed_tokens"]
        return params | {"embed_tokens": table * (largest / abs(table).max())}, loop

    monkeypatch.setattr(Checkpoints, "restore", overflowing)
    told = refusal("evaluate", finished_run, "--format", format, "--temperature", "0")
    assert "the deployed policy cannot be evaluated: the engine's log-prob at response 0, token 0 is nan" in told
    assert f"a number exceeds the largest of format {format!r}, {held}" in told
