"""`dcjax lab`: real runs in processes of their own, killed, resumed and made again to the bit."""

import fcntl
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcjax.cli import main
from dcjax.cli.train import config_of
from dcjax.tools.lab.results import Results
from dcjax.tools.lab.study import Cell
from dcjax.user_code import CodeFile

REPOSITORY = Path(__file__).parents[2]

SMALL = """
from dcjax.tools.lab.study import Arm, Claim, LabTask, Study

SIZES = (
    *("model.hidden_size=32", "model.intermediate_size=64", "rollout.prompts=4", "rollout.group_size=4"),
    *("serving.slots=8", "evaluation.prompts=8", "evaluation.every=100"),
)

def study():
    return Study(
        name="small",
        tasks=(LabTask("chains", "quickstart", SIZES),),
        arms=(Arm("grpo", ("objective.algorithm=grpo",)), Arm("dc")),
        formats=("int4",),
        claims=(Claim("A4", "It helps.", ("dc",), ("grpo",), ("chains",), ("int4",)),),
        seeds=(5, 6),
        few_seeds=(5,),
        tuning_seeds=(),
        rates=(1e-3,),
        common=("steps=3", "optimizer.ema_decay=0.5"),
        start_settings=("warm_start.steps=2", "warm_start.batch_size=8"),
    )
"""


@pytest.mark.parametrize(
    ("source", "arguments", "told"),
    [
        (None, [], "study.py: No such file or directory"),
        ("def study(:", [], "SyntaxError"),
        ("x = 1", [], "AttributeError"),
        ("def study():\n    return 3", [], "returned int; it must return a Study"),
        ("def study():\n    raise OSError('no')", [], "OSError: no"),
        (SMALL, ["--claims", "B9"], "claim 'B9' is none of the study's: A4"),
        (SMALL, ["--workers", "0"], "--workers is 0; it must be at least 1"),
        (SMALL, ["--check", "-1"], "--check is -1; it must be at least 1"),
        (SMALL, ["--check", "2"], "there are no finished runs to check"),
    ],
)
def test_what_cannot_be_run_is_one_line(source, arguments, told, tmp_path, capfd):
    path = tmp_path / "study.py"
    if source is not None:
        path.write_text(source)
    assert main(["lab", str(path), *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("dcjax: error: ") and told in line


def test_a_dry_run_makes_nothing(tmp_path, capfd):
    (tmp_path / "study.py").write_text(SMALL)
    assert main(["lab", str(tmp_path / "study.py"), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    out, err = capfd.readouterr()
    assert "0 runs are made; the study has 8" in err
    assert out.splitlines()[-1].endswith("| not run |")
    assert [path.name for path in tmp_path.iterdir()] == ["study.py"]


@pytest.mark.slow
@pytest.mark.heavy
def test_a_killed_study_goes_on_and_its_runs_can_be_made_again(tmp_path):
    (tmp_path / "study.py").write_text(SMALL)
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "dcjax", "lab", "study.py", "--quick", "--out", "out"]
    first = subprocess.Popen(command, cwd=tmp_path)
    while not (results.exists() and results.read_text().count("\n")):
        assert first.poll() is None
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    kept = results.read_text()
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert results.read_text().startswith(kept)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert len({line["identity"] for line in lines}) == len(lines) == 4
    assert "| A4 | chains | int4 | dc | grpo | 1 |" in second.stdout  # one seed has no interval
    assert not [path for path in (tmp_path / "out").iterdir() if "_start_" not in path.name and path.is_dir()]
    again = subprocess.run([*command, "--check", "2"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert again.stdout.count("the same to the bit") == 2
    lines[0]["figures"]["reward"] += 1e-6
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = subprocess.run([*command, "--check", "4"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert other.returncode == 2 and "reward is" in other.stderr


def test_the_study_of_the_documentation_is_complete(tmp_path, capfd):
    page = (REPOSITORY / "docs" / "lab.md").read_text()
    (source,) = re.findall(r"^```python\n(# study\.py.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "study.py").write_text(source)
    assert main(["lab", str(tmp_path / "study.py"), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    # 2 arms x 2 rates tune; 2 arms x 2 formats x 5 seeds judge
    assert "0 runs are made; the study has 24" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.heavy
def test_an_interrupted_study_ends_its_runs(tmp_path):
    (tmp_path / "study.py").write_text(SMALL)
    study = subprocess.Popen(
        [sys.executable, "-m", "dcjax", "lab", "study.py", "--quick", "--out", "out"], cwd=tmp_path
    )
    while not (made := list(tmp_path.glob("out/*_start_*/run/.lock"))):
        assert study.poll() is None
        time.sleep(0.2)
    os.kill(study.pid, signal.SIGINT)
    assert study.wait(timeout=60) == 130
    with made[0].open() as lock:
        for _ in range(100):  # the run has been told, and ends by itself
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
        else:
            pytest.fail("the run goes on")


@pytest.mark.slow
def test_every_arm_of_the_laboratory_makes_a_config():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym needs a C compiler where it is installed")
    study = CodeFile.read(REPOSITORY / "experiments" / "lab" / "study.py").load().study()
    made = set()
    for task in study.tasks:
        for arm in study.arms:
            for format in (*study.formats, study.twin):
                settings = study.settings(Cell(task.name, 1, arm.name, format, 3e-4))
                config, _ = config_of([task.recipe, *settings])
                assert (config.serving.format, config.optimizer.learning_rate) == (format, 3e-4)
                made.add((task.name, config.serving.format, config.objective, config.optimizer, config.serving))
    # no two arms are the same
    assert len(made) == len(study.tasks) * len(study.arms) * 3


def test_every_claim_has_a_recipe_at_full_scale():
    study = CodeFile.read(REPOSITORY / "experiments" / "lab" / "study.py").load().study()
    for claim in study.claims:
        assert claim.full
        for line in claim.full:
            config, _ = config_of(line.split())
            assert config.pretrained is not None and config.mesh.fsdp > 1, line


def test_the_findings_are_those_of_the_results():
    """`python experiments/lab/findings.py` writes them."""
    script = runpy.run_path(str(REPOSITORY / "experiments" / "lab" / "findings.py"))
    study = CodeFile.read(REPOSITORY / "experiments" / "lab" / "study.py").load().study()
    text = script["DOCUMENT"].read_text("utf-8")
    tables = script["tables"](study, Results(REPOSITORY / "experiments" / "lab" / "results.jsonl"))
    assert script["filled"](text, tables) == text
    assert "| A4 | chains | int4 | dc | grpo |" in text
    with pytest.raises(ValueError, match="no place for 'verdict'"):
        script["filled"](text, {"verdict": ""})
