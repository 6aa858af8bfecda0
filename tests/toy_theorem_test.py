"""The toy problem's script as a user runs it, once in its own process, into a folder that does not exist yet."""

import os
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.slow]

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "experiments/toy_theorem.py"
FIGURES = ("figure6.png", "figure7.png", "theorem31.png", "eq13.png")


def run(*arguments):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, env=environment
    )


def rows(output):
    """{form: [β, ν, Σ m², Σ π A, π of each action]} of both tables."""
    found = {}
    for line in output.splitlines():
        form, numbers = line[:16].strip(), line[16:].split()
        if len(numbers) == 10:
            found[form] = [float(number) for number in numbers]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "new" / "folder"
    return run("--out", folder, "--budget", 0.2), folder


def test_it_prints_every_form_and_spends_the_budget(finished):
    process, _ = finished
    assert process.returncode == 0 and process.stderr == "", process.stderr
    table = rows(process.stdout)
    assert list(table) == ["π − q", "π/q − 1", "log(π/q)", "max(π − q, 0)", "max(π/q − 1, 0)"]
    for beta, _, spent, gain, *policy in table.values():
        assert beta > 0 and spent == pytest.approx(0.2, abs=1e-4) and gain > 0
        # six figures, each rounded to four places
        assert sum(policy) == pytest.approx(1, abs=3e-4)


def test_a_gap_of_all_states_grows_with_the_length_and_one_of_each_state_alone_does_not(finished):
    lines = finished[0].stdout.partition("Theorem 3.1)")[2].splitlines()[2:6]
    lengths, own, own_bound, shared, shared_bound = np.array([line.split() for line in lines], float).T
    assert lengths.tolist() == [1, 2, 4, 8]
    assert np.all(own < own_bound) and np.all(shared < shared_bound)
    assert np.all(np.diff(shared) > 0) and shared[-1] > 3 * shared[0]
    assert own[-1] < 1.5 * own[0]


def test_the_forms_differ_as_the_paper_says(finished):
    """A difference lets rare actions move as far as frequent ones; a ratio all but freezes them."""
    table = rows(finished[0].stdout)
    rare_gain = {form: numbers[-1] - 0.06 for form, numbers in table.items()}
    frequent_gain = {form: numbers[5] - 0.30 for form, numbers in table.items()}
    assert rare_gain["π − q"] > frequent_gain["π − q"]
    assert rare_gain["π/q − 1"] < 0.2 * frequent_gain["π/q − 1"]
    assert rare_gain["log(π/q)"] < 0.2 * frequent_gain["log(π/q)"]


def test_it_draws_every_figure_and_names_it(finished):
    process, folder = finished
    assert sorted(path.name for path in folder.iterdir()) == sorted(FIGURES)
    for name in FIGURES:
        image = (folder / name).read_bytes()
        assert image.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", image[16:24])
        assert width > 600 and height > 400
        assert f"figure: {folder / name}\n" in process.stdout


def exit_status(monkeypatch, *arguments):
    """Of the script in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return stopped.value.code


def test_a_budget_that_cannot_be_active_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    assert exit_status(monkeypatch, "--out", tmp_path / "none", "--budget", 50) == 2
    output, errors = capsys.readouterr()
    assert output == "" and "budget 50.0 is too large to be active" in errors.splitlines()[-1]
    assert not (tmp_path / "none").exists()


def test_help_says_what_it_does(monkeypatch, capsys):
    assert exit_status(monkeypatch, "--help") == 0
    output = capsys.readouterr().out
    assert "--out" in output and "--budget" in output and "Not a recipe" in output
