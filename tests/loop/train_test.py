import contextlib
import dataclasses
import gc
import gzip
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pretend
import pytest
import tiny
from damage import halve, largest_array_file
from launching import complaints, send_sigterm_at
from records import untimed
from stepping import change_rollouts
from tensorboardX.proto.event_pb2 import Event
from transformers import AutoTokenizer

import dcjax.loop.rollouts
import dcjax.loop.train
import dcjax.recipe.build
from dcjax.cli import main
from dcjax.loop.checkpoint import Checkpoints
from dcjax.loop.draw import Draw
from dcjax.loop.reward_collector import RewardCollector
from dcjax.loop.run_directory import load_config
from dcjax.loop.updater import Updater
from dcjax.recipe.build import abstract_state
from dcjax.reporting.record import read_metrics, read_transcripts
from dcjax.sharding.mesh import make_mesh

pytestmark = pytest.mark.heavy

STEPS, EVERY = tiny.CONFIG.steps, tiny.CONFIG.checkpoint.every
PROMPTS, GROUP, HELDOUT = tiny.CONFIG.rollout.prompts, tiny.CONFIG.rollout.group_size, tiny.CONFIG.evaluation.prompts

NO_WARM_START = ["--warm_start.steps", "0"]
EVALUATED = {"eval/deployed_accuracy", "eval/training_accuracy"}
MEASURED = {
    "reward",
    "mismatch/prob_diff_mean",
    "mismatch/prob_diff_max",
    "mismatch/log_ppl_abs_diff",
    "mismatch/log_ppl_abs_diff_per_token",
    "mismatch/k3",
    "entropy",
    "grad_norm",
    "grad_norm_smoothed",
    "dual/multiplier",
    "dual/budget",
    "response_length",
    "learning_rate",
    "time/rollout",
    "time/update",
    "tokens_per_second",
    "rollout_tokens_per_second",
    "update_tokens_per_second",
}


@pytest.fixture(scope="module")
def pretended_run(recipe, tmp_path_factory):
    """A finished run without arithmetic, of the same recipe. Tests look at it, and change copies."""
    directory = tmp_path_factory.mktemp("runs") / "pretended"
    with pytest.MonkeyPatch.context() as patch:
        pretend.install(patch)
        assert main(["train", str(recipe), "--run-dir", str(directory), *NO_WARM_START]) == 0
    return directory


@pytest.fixture
def train(recipe, capfd, caplog):
    """Runs `dcjax train` here; returns its status, and what it told on stderr and by logging beside its progress."""

    def run(directory, *overrides):
        capfd.readouterr()
        caplog.clear()
        status = main(["train", str(recipe), "--run-dir", str(directory), *overrides])
        told = complaints(capfd.readouterr().err)
        if told:
            # a task or future that was dropped after an error complains when it is collected
            gc.collect()
        told += complaints(capfd.readouterr().err)
        return status, told + [record.getMessage() for record in caplog.records]

    return run


@pytest.fixture
def pretending(train, monkeypatch):
    """The same, without arithmetic: see tests/helpers/pretend.py."""
    pretend.install(monkeypatch)
    return lambda directory, *overrides: train(directory, *NO_WARM_START, *overrides)


def interrupted_at(step, finished_run, directory):
    """A copy of the run as it was after the checkpoint of a step, with a little written after it."""
    shutil.copytree(finished_run, directory)
    for path in (directory / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return directory


def checkpointed(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal())


def restored(directory, step=None):
    """The TrainState and Cursor of a checkpoint, the newest where no step is given."""
    config = load_config(directory)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        like = abstract_state(config, make_mesh(config.mesh))
        return checkpoints.restore(checkpoints.latest() if step is None else step, like)


def metrics_of(directory):
    return read_metrics(directory / "metrics.jsonl")


def assert_same_run(ours, theirs):
    """Every metric and sample, and the final state with λ, data cursor and key, equal bit for bit."""
    ours_metrics, theirs_metrics = untimed(metrics_of(ours)), untimed(metrics_of(theirs))
    assert [record["step"] for record in ours_metrics] == [record["step"] for record in theirs_metrics]
    for one, other in zip(ours_metrics, theirs_metrics, strict=True):
        assert one == other
    for name in ("samples.jsonl", "warm_start.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    (our_state, our_loop), (their_state, their_loop) = restored(ours), restored(theirs)
    assert our_loop == their_loop
    assert jax.tree.structure(our_state) == jax.tree.structure(their_state)
    for (path, one), other in zip(jax.tree.leaves_with_path(our_state), jax.tree.leaves(their_state), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), jax.tree_util.keystr(path)
    assert optax.tree.get(our_state.opt_state, "multiplier") == optax.tree.get(their_state.opt_state, "multiplier")


def finite(state):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))


# --- a whole run ---


def test_a_line_a_step_from_step_0(finished_run):
    assert [record["step"] for record in metrics_of(finished_run)] == list(range(STEPS + 1))


def test_step_0_is_evaluated_and_nothing_else(finished_run):
    first = metrics_of(finished_run)[0]
    assert set(first) >= {"step", "eval/prompts"} | EVALUATED
    assert {name for name in first if not name.startswith("eval/")} == {"step"}


def test_every_step_has_the_metrics_of_its_update(finished_run):
    for record in metrics_of(finished_run)[1:]:
        assert set(record) >= MEASURED
        assert all(math.isfinite(value) for value in record.values())


def test_both_policies_are_evaluated_when_due_and_only_then(finished_run):
    for record in metrics_of(finished_run):
        if record["step"] % EVERY:
            assert not any(name.startswith("eval/") for name in record)
            continue
        assert record["eval/prompts"] == HELDOUT
        for name in EVALUATED:
            assert (record[name] * HELDOUT).is_integer() and 0 <= record[name] <= 1


def test_the_task_is_learnt_in_part_so_that_rewards_differ(finished_run):
    """Without this, most of a run's arithmetic would be on zeros, and what compares runs would compare little."""
    records = metrics_of(finished_run)[1:]
    assert any(0 < record["reward"] < 1 for record in records)
    assert all(record["grad_norm"] > 0 for record in records)


def test_the_multiplier_moves_by_the_excess_over_the_budget(finished_run):
    config, records = load_config(finished_run), metrics_of(finished_run)[1:]
    multiplier = np.float32(config.objective.initial_multiplier)
    for record in records:
        assert record["dual/multiplier"] == pytest.approx(multiplier, rel=1e-6)
        assert record["dual/budget"] == config.objective.budget
        excess = record["dual/discrepancy"] - config.objective.budget
        multiplier = min(max(multiplier + config.objective.dual_lr * excess, 0), 1)
    state, _ = restored(finished_run)
    assert float(optax.tree.get(state.opt_state, "multiplier")) == pytest.approx(multiplier, rel=1e-6)
    assert len({record["dual/multiplier"] for record in records}) > 1


def test_the_learning_rate_is_warmed_up(finished_run):
    rates = [record["learning_rate"] for record in metrics_of(finished_run)[1:]]
    assert rates == pytest.approx([1e-2 * min(step / 3, 1) for step in range(STEPS)])


def test_the_last_checkpoint_tells_where_the_loop_stands(finished_run):
    state, loop = restored(finished_run)
    assert (loop.step, int(state.step), loop.data_cursor) == (STEPS, STEPS, STEPS * PROMPTS)
    before = restored(finished_run, STEPS - EVERY)[1]
    assert before.step == STEPS - EVERY and before.rollout_key != loop.rollout_key
    assert finite(state)


def test_the_norm_of_the_parameters_is_that_of_what_is_saved(finished_run):
    for step in (STEPS - EVERY, STEPS):
        leaves = jax.tree.leaves(jax.device_get(restored(finished_run, step)[0].params))
        norm = math.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))
        assert metrics_of(finished_run)[step]["param_norm"] == pytest.approx(norm, rel=1e-5)


def test_the_newest_checkpoints_are_kept(finished_run):
    assert checkpointed(finished_run) == list(range(EVERY, STEPS + 1, EVERY))


def test_the_warm_start_has_a_log_of_its_own(finished_run):
    records = read_metrics(finished_run / "warm_start.jsonl")
    assert [record["step"] for record in records] == [10, 20, 30, 35]
    assert records[-1]["loss"] < records[0]["loss"]


def test_samples_are_kept_at_each_evaluation(finished_run):
    samples = read_transcripts(finished_run / "samples.jsonl")
    assert sorted({sample["step"] for sample in samples}) == list(range(EVERY, STEPS + 1, EVERY))
    for sample in samples:
        assert sample["prompt"].endswith("=") and sample["response"]
        assert sample["reward"] in (0, 1) and (sample["finished"] or sample["reward"] == 0)
        # sampled before the update that makes the step
        assert sample["policy_version"] == sample["step"] - 1
    assert {sample["reward"] for sample in samples} == {0, 1}


def test_the_events_of_tensorboard_are_a_copy_of_the_metrics(finished_run):
    seen = {}
    for path in (finished_run / "tensorboard").iterdir():
        data, at = path.read_bytes(), 0
        # a TFRecord is a length, its checksum, the message, its checksum
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            seen |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            at += 12 + length + 4
    expected = {
        (record["step"], name): np.float32(value)
        for record in metrics_of(finished_run)
        for name, value in record.items()
        if name != "step"
    }
    assert seen == expected


def test_the_tokenizer_is_saved_as_transformers_loads_it(finished_run):
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "tokenizer")
    text = r"3+4-2=3+4=7,7-2=5,\boxed{5}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id is not None


def test_the_report_is_drawn_and_tells_samples_token_by_token(finished_run):
    picture = (finished_run / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    page = (finished_run / "report.html").read_text()
    assert page.count("<svg") == 6
    tokens = [token for line in read_transcripts(finished_run / "samples.jsonl") for token in line["tokens"]]
    assert tokens and all(0 < p <= 1 for _, *both in tokens for p in both)
    assert 0 < page.count("data-told=") <= len(tokens)


# --- a profile: the finished run was asked for one of two iterations ---


@pytest.fixture(scope="module")
def profiled(finished_run):
    """Its iterations, and the events of the trace: (name, microseconds), by the name of the event."""
    iterations = json.loads((finished_run / "profile" / "times.json").read_text())["iterations"]
    (path,) = (finished_run / "profile").glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return iterations, [event for event in events if event.get("ph") == "X"]


def test_the_parts_of_a_profiled_iteration_add_up_to_its_time(profiled):
    iterations, _ = profiled
    assert [iteration["step"] for iteration in iterations] == [1, 2]
    for iteration in iterations:
        assert iteration["beside"] == {}
        assert sum(iteration["parts"].values()) == pytest.approx(iteration["seconds"])
    work = sum(seconds for iteration in iterations for part, seconds in iteration["parts"].items() if part != "other")
    assert 0.8 <= work / sum(iteration["seconds"] for iteration in iterations) <= 1
    every = {"sync", "data", "prefill", "decode", "rewards", "packing", "update", "log", "other"}
    assert every <= set(iterations[0]["parts"]) <= every | {"compile"}
    assert every | {"evaluation", "checkpoint"} <= set(iterations[1]["parts"])


def test_the_parts_agree_with_what_the_loop_times_itself(profiled, finished_run):
    for iteration, record in zip(profiled[0], metrics_of(finished_run)[1:], strict=False):
        parts = iteration["parts"]
        assert sum(parts[part] for part in ("sync", "data", "prefill", "decode", "rewards")) <= record["time/rollout"]
        assert parts["packing"] + parts["update"] <= record["time/update"]
        assert record["time/rollout"] + record["time/update"] <= iteration["seconds"]


def test_the_parts_agree_with_the_trace(profiled):
    """Each span begins and ends within what is counted for it, which is all but moments longer."""
    iterations, events = profiled
    traced = {int(event["args"]["step_num"]): event for event in events if event["name"] == "iteration"}
    assert sorted(traced) == [1, 2]
    shown, counted = [], []
    for iteration in iterations:
        whole, parts = traced[iteration["step"]], iteration["parts"]
        own = [
            event for event in events if event["tid"] == whole["tid"] and 0 <= event["ts"] - whole["ts"] < whole["dur"]
        ]
        shown.append(whole["dur"] / 1e6)
        counted.append(iteration["seconds"])
        assert shown[-1] <= counted[-1] + 1e-5
        for part in {"packing", "update", "evaluation", "checkpoint"} & set(parts):
            shown.append(sum(event["dur"] for event in own if event["name"] == part) / 1e6)
            counted.append(parts[part])
            # the span itself shows what is compiled in it
            assert shown[-1] <= counted[-1] + parts.get("compile", 0) + 1e-5, part
    assert sum(shown) >= 0.8 * sum(counted)


def test_the_report_shows_where_the_time_went(profiled, finished_run, pretended_run):
    page = (finished_run / "report.html").read_text()
    assert "Where the time went" in page and "(steps 1 to 2, in the mean)" in page
    for part in profiled[0][1]["parts"]:
        assert f"<tr><td>{part}</td>" in page
    for kind in ("rollout", "update"):
        assert f"Throughput of the {kind} alone" in page
    # one that was not asked
    assert not (pretended_run / "profile").exists()
    assert "Where the time went" not in (pretended_run / "report.html").read_text()


def test_a_run_that_is_stopped_leaves_the_profile_of_whole_iterations_and_a_resumed_one_its_own(
    pretended_run, pretending, monkeypatch, tmp_path
):
    directory, times = tmp_path / "run", tmp_path / "run" / "profile" / "times.json"
    with monkeypatch.context() as patched:
        send_sigterm_at(patched, Draw, "_once", call=3)
        assert pretending(directory, "--profile", "4")[0] == 75
    assert [iteration["step"] for iteration in json.loads(times.read_text())["iterations"]] == [1, 2]
    assert pretending(directory, "--profile", "1") == (0, [])
    assert [iteration["step"] for iteration in json.loads(times.read_text())["iterations"]] == [3]
    assert_same_run(directory, pretended_run)
    status, told = pretending(directory, "--profile", "1")
    assert (status, told) == (0, ["dcjax: nothing is profiled: no iteration was made to its end"])


def test_a_trace_that_cannot_be_written_is_one_line(pretended_run, pretending, monkeypatch, tmp_path):
    directory = interrupted_at(STEPS - EVERY, pretended_run, tmp_path / "run")
    (directory / "profile").mkdir()
    (directory / "profile" / "plugins").write_text("no directory")
    status, told = pretending(directory, "--profile", "1")
    assert status == 2
    assert len(told) == 1 and told[0].startswith("dcjax: error: cannot write the trace into "), told


def test_the_same_command_again_changes_nothing(pretended_run, pretending, tmp_path):
    directory = shutil.copytree(pretended_run, tmp_path / "run")
    names = ("metrics.jsonl", "samples.jsonl", "warm_start.jsonl")
    before = {name: (directory / name).read_bytes() for name in names}
    written = {path: path.stat().st_mtime_ns for path in (directory / "checkpoints").rglob("*")}
    assert pretending(directory) == (0, [])
    assert {name: (directory / name).read_bytes() for name in names} == before
    assert {path: path.stat().st_mtime_ns for path in (directory / "checkpoints").rglob("*")} == written


def test_a_run_of_no_steps_is_the_warm_start_evaluated(pretending, pretended_run, tmp_path):
    assert pretending(tmp_path / "run", "--steps", "0") == (0, [])
    assert metrics_of(tmp_path / "run") == metrics_of(pretended_run)[:1]
    assert checkpointed(tmp_path / "run") == [0]
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_grpo_runs_without_a_multiplier_and_several_updates_an_iteration_measure_staleness(train, tmp_path):
    overrides = ["--objective.algorithm", "grpo", "--optimizer.updates", "2", "--optimizer.warmup_steps", "0"]
    assert train(tmp_path / "run", *overrides, "--steps", "2") == (0, [])
    for record in metrics_of(tmp_path / "run")[1:]:
        assert record["dual/multiplier"] == 0
        assert {"staleness/prob_diff_mean", "staleness/k3"} <= set(record)
    state, loop = restored(tmp_path / "run")
    assert loop.step == int(state.step) == 2
    assert optax.tree.get(state.opt_state, "multiplier") is None


# --- the control: sampled in the trainer's own numerics ---

FLOAT32 = ["--serving.format", "float32"]


def test_served_in_float32_the_policies_agree_on_every_token_of_the_run(train, finished_run, tmp_path):
    assert train(tmp_path / "run", *FLOAT32) == (0, [])
    gaps = [record["mismatch/prob_diff_max"] for record in metrics_of(tmp_path / "run")[1:]]
    assert len(gaps) == STEPS and max(gaps) <= 1e-4
    # as those of the deployed format do not
    assert min(record["mismatch/prob_diff_max"] for record in metrics_of(finished_run)[1:]) > 1e-4
    for record in metrics_of(tmp_path / "run")[::EVERY]:
        assert record["eval/deployed_accuracy"] == record["eval/training_accuracy"]


def test_log_probs_that_are_one_token_off_fail_the_control(train, monkeypatch, tmp_path):
    def shifted(engine, rollout):
        return rollout.replace(rollout_logps=np.roll(rollout.rollout_logps, 1, axis=1) * rollout.response_mask)

    change_rollouts(monkeypatch, dcjax.loop.rollouts, shifted)
    assert train(tmp_path / "run", *FLOAT32, "--steps", "1", *NO_WARM_START) == (0, [])
    assert metrics_of(tmp_path / "run")[1]["mismatch/prob_diff_max"] > 1e-4


# --- resuming ---


def start(recipe, directory, *overrides):
    """A real `dcjax train` process."""
    command = [sys.executable, "-m", "dcjax", "train", str(recipe), "--run-dir", str(directory), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_when(process, happened):
    """Kills a process as soon as something has happened; fails if it ends before."""
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def finish(process):
    """Waits for a process to end well; returns what it told beside its progress."""
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return complaints(errors)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(recipe, train, finished_run, tmp_path):
    directory = tmp_path / "run"
    kill_when(start(recipe, directory), (directory / "checkpoints" / str(EVERY)).exists)
    assert checkpointed(directory)[-1] < STEPS
    assert train(directory) == (0, [])
    assert_same_run(directory, finished_run)


@pytest.mark.slow
def test_a_run_killed_three_times_once_while_saving_goes_on_as_if_nothing_had_happened(recipe, tmp_path):
    options = ["--steps", "60", "--checkpoint.every", "3"]
    directory, chooser = tmp_path / "run", random.Random(1)
    assert finish(start(recipe, tmp_path / "reference", *options)) == []

    def lines():
        path = directory / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def torn():
        with contextlib.suppress(FileNotFoundError):
            return [path.name for path in (directory / "checkpoints").iterdir() if not path.name.isdecimal()]

    for most in (20, 40):
        reached = lines() + chooser.randrange(1, most - lines())
        kill_when(start(recipe, directory, *options), lambda reached=reached: lines() >= reached)
    kill_when(start(recipe, directory, *options), torn)
    assert torn(), "the kill came after the checkpoint was whole"
    assert checkpointed(directory)[-1] < 60
    assert finish(start(recipe, directory, *options)) == []
    assert torn() == []
    assert_same_run(directory, tmp_path / "reference")


@pytest.mark.slow
def test_a_run_killed_in_the_warm_start_begins_again(recipe, finished_run, tmp_path):
    directory = tmp_path / "run"
    log = directory / "warm_start.jsonl"
    kill_when(start(recipe, directory), lambda: log.exists() and log.stat().st_size > 0)
    assert not (directory / "checkpoints" / "0").exists()
    assert finish(start(recipe, directory)) == []
    assert_same_run(directory, finished_run)


@pytest.mark.parametrize(
    # while samples are drawn an iteration is given up; an update is waited for
    ("method", "call"),
    [((Draw, "_once"), 4), pytest.param((Updater, "__call__"), 3, marks=pytest.mark.slow)],
)
def test_sigterm_saves_what_is_not_saved_yet_and_the_run_goes_on(
    train, finished_run, monkeypatch, tmp_path, method, call
):
    directory = tmp_path / "run"
    with monkeypatch.context() as patched:
        send_sigterm_at(patched, *method, call=call)
        status, told = train(directory)
    assert status == 75
    assert told == ["dcjax: error: stopped by SIGTERM; step 3 is saved, and the same command goes on from it"]
    assert checkpointed(directory) == [0, 2, 3]
    assert train(directory) == (0, [])
    assert_same_run(directory, finished_run)


def test_an_interrupt_leaves_a_run_that_goes_on(pretending, pretended_run, monkeypatch, tmp_path):
    directory = interrupted_at(STEPS - 2 * EVERY, pretended_run, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(dcjax.loop.train, "evaluate_state", lambda *_: signal.raise_signal(signal.SIGINT))
        status, told = pretending(directory)
    assert status == 130
    assert told == ["dcjax: interrupted; run the same command again to resume from the last checkpoint"]
    assert pretending(directory) == (0, [])
    assert_same_run(directory, pretended_run)


def test_where_the_run_is_saved_and_how_often_does_not_change_it(pretending, pretended_run, tmp_path):
    directory = interrupted_at(STEPS - 2 * EVERY, pretended_run, tmp_path / "elsewhere")
    assert pretending(directory, "--checkpoint.every", "1", "--checkpoint.keep", "2") == (0, [])
    assert checkpointed(directory) == [STEPS - 1, STEPS]
    assert_same_run(directory, pretended_run)


@pytest.mark.slow
def test_a_run_goes_on_over_more_devices(train, finished_run, tmp_path):
    directory = interrupted_at(STEPS - 2 * EVERY, finished_run, tmp_path / "run")
    assert train(directory, "--mesh.fsdp", "2") == (0, [])
    ours, theirs = metrics_of(directory), metrics_of(finished_run)
    assert [record["step"] for record in ours] == list(range(STEPS + 1))
    # sums over two devices round differently, and the next rollout may already sample another token
    at = STEPS - 2 * EVERY + 1
    assert untimed(ours)[:at] == untimed(theirs)[:at]
    for name in ("reward", "loss", "grad_norm", "entropy", "mismatch/prob_diff_mean"):
        assert ours[at][name] == pytest.approx(theirs[at][name], rel=1e-4, abs=1e-7)


# --- damage ---


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(train, finished_run, tmp_path):
    directory = shutil.copytree(finished_run, tmp_path / "run")
    halve(largest_array_file(directory / "checkpoints" / str(STEPS)))
    status, told = train(directory)
    assert status == 0
    assert len(told) == 1 and str(directory / "checkpoints" / str(STEPS)) in told[0], told
    assert "damaged" in told[0] and "the one before it" in told[0]
    assert_same_run(directory, finished_run)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_as_it_was(pretending, pretended_run, tmp_path):
    directory = shutil.copytree(pretended_run, tmp_path / "run")
    for step in checkpointed(directory):
        halve(largest_array_file(directory / "checkpoints" / str(step)))
    before = (directory / "metrics.jsonl").read_bytes()
    # however often it is tried
    for _ in range(2):
        status, told = pretending(directory)
        assert status == 2
        assert told[-1].startswith("dcjax: error: ") and "damaged" in told[-1] and "--run-dir" in told[-1]
        assert all(line.startswith("dcjax: ") for line in told), told
        assert (directory / "metrics.jsonl").read_bytes() == before


def test_damaged_metrics_before_the_checkpoint_are_refused_in_one_line(pretending, pretended_run, tmp_path):
    directory = interrupted_at(STEPS - EVERY, pretended_run, tmp_path / "run")
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[3][:40] + "\n", *lines[4:]]))
    status, told = pretending(directory)
    assert status == 2
    assert len(told) == 1 and "metrics.jsonl, line 4" in told[0]


def test_metrics_that_are_gone_are_refused_rather_than_begun_in_the_middle(pretending, pretended_run, tmp_path):
    directory = interrupted_at(STEPS - EVERY, pretended_run, tmp_path / "run")
    (directory / "metrics.jsonl").unlink()
    status, told = pretending(directory)
    assert status == 2
    assert len(told) == 1 and "metrics.jsonl" in told[0]


# --- a full disk ---


@contextlib.contextmanager
def file_size_limit():
    """Yields a setter of the largest size that a file may grow to, in bytes; a write beyond it fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("full", ["samples", "checkpoint"])
def test_a_disk_that_fills_up_stops_the_run_in_one_line_and_it_can_go_on(
    pretending, pretended_run, monkeypatch, tmp_path, full
):
    directory = interrupted_at(STEPS - 2 * EVERY, pretended_run, tmp_path / "run")
    update = Updater.__call__
    with file_size_limit() as limit, monkeypatch.context() as patched:

        def fill(self, state, sampled):
            if int(state.step) == STEPS - EVERY - 1:
                # the records have some thousand bytes, a checkpoint's list of arrays has more than ten thousand, and so
                # have the arrays, however many files they are spread over
                limit(10_000 if full == "checkpoint" else (directory / "samples.jsonl").stat().st_size + 100)
            return update(self, state, sampled)

        patched.setattr(Updater, "__call__", fill)
        status, told = pretending(directory)
    assert status == 2
    assert len(told) == 1, told
    assert told[0].startswith("dcjax: error: ")
    assert str(directory / ("samples.jsonl" if full == "samples" else "checkpoints")) in told[0]
    assert checkpointed(directory)[-1] == STEPS - 2 * EVERY
    assert finite(restored(directory)[0])
    assert pretending(directory) == (0, [])
    assert_same_run(directory, pretended_run)


@pytest.mark.parametrize("size", [1000, 3000])
def test_a_disk_that_is_full_from_the_start_is_one_line(pretending, tmp_path, size):
    with file_size_limit() as limit:
        limit(size)
        status, told = pretending(tmp_path / "run", "--steps", "0")
    assert status == 2
    assert len(told) == 1, told
    assert told[0].startswith("dcjax: error: ") and str(tmp_path / "run") in told[0]


@pytest.mark.slow
def test_penalty_correction_decay_and_estimator_compose_from_the_command_line(train, monkeypatch, tmp_path):
    directory = tmp_path / "run"
    choices = {
        "objective.estimator": "rloo",
        "objective.correction": "token_tis",
        "objective.zero_variance": "resample",
        "objective.budget": "auto",
        "objective.kl_coefficient": "0.01",
        "optimizer.decay": "length",
        "optimizer.ema_decay": "0.5",
    }
    pretend.install_samples(monkeypatch)
    status, told = train(
        directory,
        "steps=2",
        "model.num_layers=1",
        "warm_start.steps=0",
        # what samples is no policy of the trainer's
        "self_checks=false",
        *(f"{name}={value}" for name, value in choices.items()),
    )
    assert (status, told) == (0, [])
    recorded = json.loads((directory / "config.json").read_text())
    for name, value in choices.items():
        section, field = name.split(".")
        assert str(recorded[section][field]) == value
    last = read_metrics(directory / "metrics.jsonl")[-1]
    logged = {"token_tis/clipped_fraction", "dropped_fraction", "learning_rate_period", "eval/deployed_accuracy_ema"}
    assert logged <= set(last)
    # λ is held while its budget is being measured
    assert (last["dual/budget"], last["dual/multiplier"]) == (0.0, pytest.approx(0.1))
    assert last["prompts_taken"] >= PROMPTS


def test_a_self_check_that_fails_is_one_line_and_without_it_the_run_goes_on(pretending, monkeypatch, tmp_path):
    def wrong(state, batch):
        following, metrics = pretend.step(state, batch)
        return following, metrics | {"check/denominator_share": np.float32(0.25 if int(state.step) == 4 else 1)}

    monkeypatch.setattr(dcjax.recipe.build, "compile_train_step", lambda config, mesh: wrong)
    status, told = pretending(tmp_path / "run")
    assert (status, len(told)) == (2, 1)
    assert "self-check of the loss's normaliser: at step 5 it is 0.25 of the whole minibatch's, expected 1" in told[0]
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == 4
    assert pretending(tmp_path / "run", "self_checks=false") == (0, [])


def test_a_tokenizer_that_cannot_be_written_is_one_line(pretending, tmp_path):
    """Its library, in Rust, knows no OSError."""
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").mkdir(parents=True)
    status, told = pretending(tmp_path / "run")
    assert status == 2
    assert len(told) == 1 and str(tmp_path / "run" / "tokenizer") in told[0], told


@pytest.mark.slow
def test_a_real_process_on_a_full_disk_writes_one_line(recipe, finished_run, tmp_path):
    """Nothing that another thread prints, or the interpreter on its way out, comes beside it."""
    directory = interrupted_at(STEPS - 2 * EVERY, finished_run, tmp_path / "run")
    # until the checkpoint, whose arrays have hundreds of thousands of bytes, nothing larger is written
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    run = f"{limit}; from dcjax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "train", str(recipe), "--run-dir", str(directory)]
    never_cached = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    ended = subprocess.run(command, capture_output=True, text=True, env=never_cached)
    assert ended.returncode == 2
    told = complaints(ended.stderr)
    assert len(told) == 1 and str(directory / "checkpoints") in told[0], ended.stderr
    assert finish(start(recipe, directory)) == []
    assert_same_run(directory, finished_run)


def test_a_disk_that_is_full_for_the_events_neither_hangs_the_run_nor_prints_a_traceback(tmp_path):
    """They are written by a thread: once it has died, the queue to it fills up and is never emptied."""
    writes = f"""
import resource
from pathlib import Path
from dcjax.reporting.record import MetricsLog
with MetricsLog(Path({str(tmp_path)!r}), "metrics", last_step=None, tensorboard=True) as log:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        for step in range(1_000):
            log.write(step, {{"m": 1.0}})
    except OSError:
        pass
"""
    process = subprocess.Popen([sys.executable, "-c", writes], stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail("the log waits for ever for a thread that has died")
    assert "Traceback" not in errors


# --- numbers that are not finite ---


def bad_batch(directory):
    with np.load(directory / "bad_batch.npz", allow_pickle=False) as batch:
        return dict(batch)


def test_a_log_prob_that_is_not_finite_stops_the_run_and_is_named(pretending, pretended_run, monkeypatch, tmp_path):
    directory = interrupted_at(STEPS - 2 * EVERY, pretended_run, tmp_path / "run")
    rollouts, row = [], 5

    def broken(engine, rollout):
        rollout = dataclasses.replace(rollout, rollout_logps=rollout.rollout_logps.copy())
        rollouts.append(rollout)
        if len(rollouts) == 2:
            rollout.rollout_logps[row, rollout.response_mask[row].sum() - 1] = np.nan
            # what lies outside the responses says nothing
            rollout.rollout_logps[~rollout.response_mask] = -np.inf
        return rollout

    with monkeypatch.context() as patched:
        change_rollouts(patched, dcjax.loop.rollouts, broken)
        status, told = pretending(directory)
    assert status == 2
    assert len(told) == 1, told
    column = rollouts[1].response_mask[row].sum() - 1
    assert f"step {STEPS - 2 * EVERY + 2}" in told[0] and f"response {row}, token {column} is nan" in told[0]
    assert str(directory / "bad_batch.npz") in told[0] and "choose another serving.format" in told[0]
    batch = bad_batch(directory)
    for name in ("tokens", "attention_mask", "response_mask", "rollout_logps", "temperature"):
        np.testing.assert_array_equal(batch[name], getattr(rollouts[1], name))
    assert np.isnan(batch["rollout_logps"][row, column])
    assert batch["rewards"].shape == (PROMPTS * GROUP,) and batch["group_rewards"].shape == (PROMPTS * GROUP, GROUP)
    assert checkpointed(directory)[-1] == STEPS - 2 * EVERY and finite(restored(directory)[0])
    assert pretending(directory) == (0, [])
    assert_same_run(directory, pretended_run)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_logged_or_saved(
    pretending, pretended_run, monkeypatch, tmp_path
):
    directory = interrupted_at(STEPS - 2 * EVERY, pretended_run, tmp_path / "run")
    result = RewardCollector.result

    def infinite(judging):
        scores = result(judging)
        scores.rewards[3] = np.inf
        return scores

    with monkeypatch.context() as patched:
        patched.setattr(RewardCollector, "result", infinite)
        status, told = pretending(directory, "--checkpoint.every", "1", "--checkpoint.keep", "1")
    assert status == 2
    assert len(told) == 1 and "loss" in told[0] and "not finite" in told[0], told
    assert f"step {STEPS - 2 * EVERY + 1}" in told[0] and str(directory / "bad_batch.npz") in told[0]
    assert bad_batch(directory)["rewards"][3] == np.inf
    assert metrics_of(directory)[-1]["step"] == STEPS - 2 * EVERY
    assert checkpointed(directory)[-1] == STEPS - 2 * EVERY and finite(restored(directory)[0])


def test_an_update_after_which_a_metric_is_not_finite_is_not_saved(pretending, monkeypatch, tmp_path):
    """As the norm of parameters that have overflown, whose step still had a finite loss."""
    step, directory = pretend.step, tmp_path / "run"

    def overflowing(state, batch):
        state, metrics = step(state, batch)
        return state, metrics | {"param_norm": np.float32(np.inf)}

    monkeypatch.setattr(pretend, "step", overflowing)
    status, told = pretending(directory, "--checkpoint.every", "1", "--checkpoint.keep", "1", "--steps", "1")
    assert status == 2
    assert len(told) == 1 and "param_norm not finite" in told[0] and "optimizer.learning_rate" in told[0], told
    assert checkpointed(directory) == [0] and finite(restored(directory)[0])


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["3e38", "1e39"])
def test_an_update_that_overflows_stops_the_run_and_is_not_saved(train, tmp_path, rate):
    """The loss of the step is still finite: it is the parameters after it that are not."""
    directory = tmp_path / "run"
    overflow = ["--optimizer.learning_rate", rate, "--optimizer.warmup_steps", "0", "--optimizer.weight_decay", "10"]
    saved = ["--checkpoint.every", "1", "--checkpoint.keep", "1"]
    status, told = train(directory, *overflow, *saved, "--steps", "1", *NO_WARM_START)
    assert status == 2
    assert len(told) == 1 and "optimizer.learning_rate" in told[0], told
    assert checkpointed(directory) in ([], [0])
    if checkpointed(directory):
        assert finite(restored(directory)[0])
