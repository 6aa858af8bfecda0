"""Studies: which runs they need, that none is made twice, and verdicts against hand-worked and simulated numbers."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from dcjax.errors import RunError
from dcjax.reporting.statistics import holm, paired_t
from dcjax.tools.lab.page import write_page
from dcjax.tools.lab.results import Result, Results, summarise
from dcjax.tools.lab.runner import run_study
from dcjax.tools.lab.schedule import count_made, following, needed, total, tuned_rates, waiting
from dcjax.tools.lab.study import Arm, Cell, Claim, LabTask, Study
from dcjax.tools.lab.table import render, render_candidates, render_summary
from dcjax.tools.lab.verdicts import candidates, effects_of

STUDY = Study(
    name="small",
    tasks=(LabTask("chains", "quickstart", ("warm_start.steps=1",)),),
    arms=(Arm("grpo"), Arm("dc", ("objective.algorithm=dc_grpo",)), Arm("fixed", ("objective.algorithm=dual_grpo",))),
    formats=("int8", "int4"),
    claims=(
        Claim("A4", "The penalty helps.", ("dc",), ("grpo",), ("chains",), ("int8", "int4")),
        Claim("X", "So does the other.", ("fixed",), ("grpo", "dc"), ("chains",), ("int4",), verdict=False, rate=1e-3),
    ),
    seeds=tuple(range(10)),
    few_seeds=(0, 1),
    tuning_seeds=(100, 101),
    rates=(1e-4, 2e-4),
)
ABOUT_GAPS = replace(STUDY.claims[0], key="B1", metric="gap", verdict=False)
PICTURES = ("gains", "first_looks", "doses", "noise", "curves_chains")
BEST = {"grpo": 2e-4, "dc": 1e-4}


def made(cell):
    """A result with the metric that makes the rates of `BEST` best."""
    metric = 0.5 - 0.1 * (cell.rate != BEST.get(cell.arm, cell.rate))
    return Result(cell, STUDY.identity(cell), {"deployed": metric, "gap": 0.01}, {})


def all_done(metric):
    """The figures of all runs of the study, by a function of (arm, format, seed)."""
    done = {cell: made(cell).figures for cell in waiting(STUDY, {})}
    for cell in waiting(STUDY, done):
        done[cell] = {"deployed": metric(cell.arm, cell.format, cell.seed), "gap": 0.01}
    assert not waiting(STUDY, done)
    return done


def never():
    raise AssertionError("nothing failed")


def test_every_run_that_a_study_needs_is_made_once():
    lock, seen = threading.Lock(), []

    def run(cell):
        with lock:
            assert cell not in seen
            seen.append(cell)
        return made(cell)

    results = Results_in_memory()
    run_study(STUDY, results, run, workers=3, stop=never)
    # tuning: 2 arms x 2 rates x 2 formats x 2 seeds; judged: 2 arms x 3 formats x 10 seeds, 3 x 2 formats x 2 seeds
    assert len(seen) == total(STUDY) == 2 * 2 * 2 * 2 + 2 * 3 * 10 + 3 * 2 * 2
    assert tuned_rates(STUDY, results.of(STUDY)) == {("chains", arm): rate for arm, rate in BEST.items()}
    assert all(cell.rate in (BEST.get(cell.arm), 1e-3) for cell in seen if cell.seed < 100)


class Results_in_memory:
    def __init__(self):
        self.made = {}

    def of(self, study):
        return dict(self.made)

    def add(self, result):
        self.made[result.cell] = result.figures


def test_a_claim_is_tuned_first_and_each_seed_of_its_arms_comes_before_the_next_claim_after_it():
    first = needed(STUDY, {})
    tuning = [cell for cell in first if cell.seed >= 100]
    assert first[: len(tuning)] == tuning
    assert {cell.rate for cell in first[len(tuning) :]} == {1e-3}  # of the claim that needs no tuning
    judged = waiting(STUDY, {cell: made(cell).figures for cell in tuning})
    of_claims = [cell.rate == 1e-3 for cell in judged]
    assert of_claims == sorted(of_claims)
    seeds = [cell.seed for cell in judged if cell.rate != 1e-3]
    assert seeds == sorted(seeds)


def test_no_run_waits_for_a_warm_start_that_another_makes_while_there_are_others():
    first, *others = waiting(STUDY, {})
    assert following(STUDY, {}, []) == first
    # the others of its seed would wait, and so those of the next one come first
    assert following(STUDY, {}, [first]) == next(cell for cell in others if cell.start != first.start)
    # behind the first run of a seed its warm start is there
    assert following(STUDY, {first: {}}, others[:1]) == others[1] and others[1].start == first.start
    # and where only such runs are left, one of them is the next
    alone = replace(STUDY, claims=STUDY.claims[1:], few_seeds=(0,))
    one, two, *_ = waiting(alone, {})
    assert following(alone, {}, [one]) == two and one.start == two.start
    assert following(alone, {}, waiting(alone, {})) is None


def test_a_stopped_study_goes_on_and_failures_are_told(tmp_path):
    file, calls, stopped = tmp_path / "results.jsonl", [], []

    def fails_at_the_fifth(cell):
        calls.append(cell)
        if len(calls) == 5:
            raise RunError("the machine is on fire")
        return made(cell)

    with pytest.raises(RunError, match="on fire"):
        run_study(STUDY, Results(file), fails_at_the_fifth, workers=1, stop=lambda: stopped.append(True))
    assert stopped == [True]
    again = []
    run_study(STUDY, Results(file), lambda cell: again.append(cell) or made(cell), workers=1, stop=never)
    assert len(again) == total(STUDY) - 4
    assert not {*again} & {*calls[:4]}


def test_results_survive_a_torn_line_and_name_a_damaged_one(tmp_path):
    file, cell = tmp_path / "results.jsonl", Cell("chains", 100, "dc", "int8", 1e-4)
    Results(file).add(made(cell))
    whole = file.read_text()
    file.write_text(whole + whole[:50])
    assert Results(file).of(STUDY) == {cell: {"deployed": 0.5, "gap": 0.01}}
    assert file.read_text() == whole
    file.write_text("{}\n" + whole)
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1 is no result: '{}'"):
        Results(file)


def test_results_of_other_settings_do_not_count(tmp_path):
    results, cell = Results(tmp_path / "results.jsonl"), Cell("chains", 100, "dc", "int8", 1e-4)
    results.add(made(cell))
    assert cell in results.of(STUDY)
    for other in (
        replace(STUDY, common=("steps=7",)),
        replace(STUDY, start_settings=("warm_start.batch_size=7",)),
        replace(STUDY, tasks=(replace(STUDY.tasks[0], recipe="another"),)),
        replace(STUDY, arms=(STUDY.arms[0], Arm("dc", ("objective.dual_lr=3",)), STUDY.arms[2])),
    ):
        assert not results.of(other)


def test_figures_and_curves_of_a_runs_lines():
    accuracies = {f"eval/{who}_accuracy{which}": 0.25 for who in ("deployed", "training") for which in ("", "_ema")}
    recent = ("reward", "mismatch/prob_diff_mean", "dual/multiplier", "response_length", "grad_norm")
    lines = [
        {"step": 0, **accuracies},
        *({"step": step, **dict.fromkeys(recent, float(step))} for step in range(1, 49)),
    ]
    lines[-1] |= {name: 0.75 for name in accuracies}
    figures, curves = summarise(lines)
    assert (figures["start"], figures["deployed"], figures["training_ema"]) == (0.25, 0.75, 0.75)
    assert figures["gap"] == np.mean(range(39, 49))
    assert curves["step"] == list(range(4, 49, 4))
    assert curves["reward"] == [step - 1.5 for step in curves["step"]]


NOISE = np.random.default_rng(7).normal(0, 0.01, 10)


@pytest.mark.parametrize(
    ("gain", "twin", "verdict"),
    [
        (0.05, 0.0, "reproduces"),
        (0.05, 0.05, "does not"),  # as much without a mismatch
        (0.0, 0.0, "does not"),
        (-0.05, 0.0, "does not"),
    ],
)
def test_verdicts_follow_gain_and_interaction(gain, twin, verdict):
    def metric(arm, format, seed):
        effect = {"dc": twin if format == "float32" else gain}.get(arm, 0.0)
        return 0.8 + effect + NOISE[seed] * (arm == "dc") * (0.3 if format == "float32" else 0.5)

    for effect in effects_of(STUDY, all_done(metric))[:2]:
        assert (effect.claim, effect.arm, effect.against, effect.seeds) == ("A4", "dc", "grpo", 10)
        assert effect.verdict == verdict
        assert effect.gain.difference == pytest.approx(gain + 0.5 * NOISE.mean())
        assert effect.interaction.difference == pytest.approx(gain - twin + 0.2 * NOISE.mean())


def test_a_claim_may_be_about_another_figure_and_tells_the_gap_it_answers():
    study = replace(STUDY, claims=(replace(STUDY.claims[0], metric="gap", verdict=False),))
    done = all_done(lambda arm, format, seed: 0.8)
    for cell in [cell for cell in done if cell.seed < 100]:
        done[cell] = {"deployed": 0.8, "gap": 0.01 * (1 + (cell.arm == "dc")) * (cell.format != "float32")}
    for effect in effects_of(study, done):
        assert (effect.mean, effect.gap) == pytest.approx((0.02, 0.01))
        assert effect.gain.difference == effect.interaction.difference == pytest.approx(0.01)
        assert effect.metric == "gap"


def test_gaps_have_more_decimals_than_accuracies():
    study = replace(STUDY, claims=(STUDY.claims[0], ABOUT_GAPS))
    done = {
        cell: {**figures, "gap": 0.001 + 0.00024 * (cell.arm == "dc")}
        for cell, figures in all_done(lambda arm, format, seed: 0.8).items()
    }
    (row, *_) = [row for row in render(effects_of(study, done)).splitlines() if row.startswith("| B1 ")]
    assert "| .00124 | +.00024 [+.00024, +.00024], p 0.000 |" in row


def test_what_has_a_picture_of_its_own(tmp_path):
    elsewhere = replace(STUDY.claims[1], key="D1", formats=("fp8",), drawn=True)
    write_page(tmp_path, replace(STUDY, claims=(*STUDY.claims, ABOUT_GAPS, elsewhere)), {}, command="dcjax lab")
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {*PICTURES, "gains_gap", "first_looks_elsewhere", "curves_D1_chains"}


def test_wide_intervals_are_inconclusive_and_few_seeds_have_no_verdict():
    def noisy(arm, format, seed):
        return 0.8 + (0.02 + 10 * NOISE[seed] if arm == "dc" and format != "float32" else 0.0)

    effects = effects_of(STUDY, all_done(noisy))
    assert {effect.verdict for effect in effects if effect.claim == "A4"} == {"inconclusive"}
    assert {(effect.verdict, effect.seeds) for effect in effects if effect.claim == "X"} == {("no verdict", 2)}


def test_a_claim_is_judged_only_when_all_its_runs_are_made():
    done = all_done(lambda arm, format, seed: 0.8 + 0.1 * (arm == "dc" and format != "float32") + 1e-3 * NOISE[seed])
    done.pop(Cell("chains", 9, "dc", "int4", BEST["dc"]))
    judged = {effect.format: effect for effect in effects_of(STUDY, done) if effect.claim == "A4"}
    assert (judged["int8"].seeds, judged["int4"].seeds) == (10, 9)
    assert {effect.verdict for effect in judged.values()} == {"no verdict"}
    assert {effect.verdict for effect in effects_of(STUDY, {})} == {"not run"}


def test_paired_t_is_that_of_scipy_and_knows_equal_values():
    ours, theirs = NOISE + 0.01, np.zeros(10)
    expected = stats.ttest_rel(ours, theirs)
    found = paired_t(list(ours - theirs))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval()))
    assert (paired_t([0.0, 0.0]).p_value, paired_t([0.5, 0.5]).p_value) == (1.0, 0.0)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"formats": ("int8", "int4", "float32")}, "formats has 'float32', which is the twin's"),
        ({"claims": (replace(STUDY.claims[1], formats=("float32",)),)}, "formats has 'float32', which is the twin's"),
        ({"arms": (*STUDY.arms, Arm("same"))}, "arms 'grpo' and 'same' have the same settings"),
        ({"tuning_seeds": (3, 100)}, "tuning_seeds has 3, by which claims are judged"),
        ({"margin": 0.0}, "margin is 0.0; it must be above 0"),
        ({"rates": ()}, "claim A4 has no rate, and the study has none to choose from"),
        (
            {"claims": (replace(STUDY.claims[0], arms=("dcc",)),)},
            "claim A4 names 'dcc' among its arms",
        ),
        ({"claims": (replace(STUDY.claims[0], tasks=("legs",)),)}, "names 'legs' among its tasks"),
    ],
)
def test_studies_that_cannot_be_are_refused(change, told):
    with pytest.raises(ValueError) as refused:
        replace(STUDY, **change)
    assert told in str(refused.value)


def test_some_claims_and_a_quick_look():
    assert [claim.key for claim in STUDY.only(("X",)).claims] == ["X"]
    with pytest.raises(ValueError, match="claim 'Y' is none of the study's: A4, X"):
        STUDY.only(("Y",))
    quick = STUDY.quick()
    assert {cell.format for cell in needed(quick, {})} == {"int4", "float32"}
    assert {cell.rate for cell in needed(quick, {})} == {2e-4, 1e-3}
    assert total(quick) == 2 * 2 * 2 + 3 * 2 * 2


def test_runs_of_other_claims_and_formats_are_not_counted():
    done = all_done(lambda arm, format, seed: 0.8)
    assert count_made(STUDY, done) == total(STUDY) == 88
    assert count_made(STUDY.only(("X",)), done) == total(STUDY.only(("X",)))
    assert count_made(STUDY, {}) == 0 < count_made(STUDY.quick(), done) < total(STUDY.quick())


def test_the_page_holds_tables_and_pictures_and_escapes_what_it_shows(tmp_path):
    study = replace(STUDY, claims=(replace(STUDY.claims[0], hypothesis="<b>It</b> helps."), STUDY.claims[1]))
    names = ("reward", "gap", "multiplier", "length", "grad_norm")
    curves = {"step": [1.0, 2.0], **{name: [0.1, 0.2] for name in names}}
    figures = {name: 0.5 for name in ("deployed_ema", "training", "training_ema", "gap", "grad_norm")}
    made_all = {
        cell: Result(cell, study.identity(cell), figures | done, curves, {"commit": "abc"})
        for cell, done in all_done(lambda arm, format, seed: 0.8 + 0.1 * (arm == "dc") + NOISE[seed]).items()
    }
    for known in ({}, made_all):
        page = write_page(tmp_path, study, known, command="dcjax lab study.py").read_text()
        assert "&lt;b&gt;It&lt;/b&gt; helps." in page and "<script" not in page
        assert page.count("data:image/png;base64,") == len(PICTURES)
        assert {path.stem for path in tmp_path.glob("*.png")} == {*PICTURES}
        assert page.count("<details") == 4
    assert "88 of 88 runs are made" in page and "abc" in page
    claims, _, tables = page.partition("<details")
    assert "<i>does not 2</i>" in claims
    assert tables.count("does not") == 2  # the metric's table alone has verdicts


def test_the_table_has_a_row_an_effect():
    table = render(effects_of(STUDY, all_done(lambda arm, format, seed: 0.8 + 0.1 * (arm == "dc")))).splitlines()
    assert len(table) == 2 + 4
    assert table[2].startswith("| A4 | chains | int8 | dc | grpo | 10 | .900 | +.100 [+.100, +.100], p 0.000 |")
    assert json.dumps(table)  # plain text


def test_a_setting_wins_that_pays_everywhere_and_loses_nothing_without_a_mismatch():
    def found(int8, int4, twin):
        gains = {"int8": int8, "int4": int4, "float32": twin}
        done = all_done(lambda arm, format, seed: 0.8 + (arm == "dc") * (gains[format] + 0.1 * NOISE[seed]))
        (candidate,) = candidates(effects_of(STUDY, done), "grpo")
        return candidate

    both = found(0.05, 0.04, -0.005)
    assert (both.arm, both.pays, both.of) == ("dc", 2, 2)
    assert both.lost == pytest.approx(0.005 - 0.1 * NOISE.mean())
    assert both.wins(0.01) and not both.wins(0.001)
    assert found(0.05, 0.0, 0.0).pays == 1 and not found(0.05, 0.0, 0.0).wins(0.01)
    assert found(0.05, 0.05, 0.05).pays == 0  # as much without a mismatch
    assert render_candidates([both], 0.01).endswith("lose at most 0.01: dc.")
    assert candidates(effects_of(STUDY, {}), "grpo") == []


def test_the_summary_has_a_row_a_claim():
    effects = effects_of(STUDY, all_done(lambda arm, format, seed: 0.8 + 0.1 * (arm == "dc")))
    rows = render_summary(STUDY, effects, "dcjax lab").splitlines()[2:]
    assert rows[0] == "| A4 | The penalty helps. | does not 2 | 10 | `dcjax lab --claims A4` |"
    assert rows[1] == "| X | So does the other. | no verdict 2 | 2 | `dcjax lab --claims X` |"
