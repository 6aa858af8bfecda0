import dataclasses
import functools
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from dcjax.errors import RunError
from dcjax.tools.suite.benchmarks import SUITES, SuiteConfig
from dcjax.tools.suite.log import ProblemSamples
from dcjax.tools.suite.published import BENCHMARKS, PUBLISHED
from dcjax.tools.suite.result import (
    AVERAGE,
    SuiteResult,
    compare,
    differences,
    read_result,
    score_benchmark,
    score_policy,
    to_json,
)
from dcjax.tools.suite.tables import to_markdown, write_result

TITLES = [benchmark.title for benchmark in SUITES["paper"]]


def samples_of(rng, problems, samples, accuracy):
    """Right answers are "1"; wrong ones are one of three, or none where the response was cut."""
    found = []
    for number in range(problems):
        answers = ["1" if rng.random() < accuracy else str(rng.choice(["2", "3", "4", "none"])) for _ in range(samples)]
        kept = [None if answer == "none" else answer for answer in answers]
        rewards = [float(answer == "1") for answer in kept]
        lengths = rng.integers(1, 100, samples).tolist()
        found.append(ProblemSamples(f"p{number}", "1", kept, rewards, lengths, [answer is not None for answer in kept]))
    return found


NOTE = "not as published (problems × samples of each): AIME24 8 × 4, not 30 × 32"


@functools.cache
def result_of(seed, accuracy, *, name="ours", problems=8):
    rng = np.random.default_rng(seed)
    policies = [
        score_policy(policy, form, [score_benchmark(b, samples_of(rng, problems, 4, accuracy)) for b in BENCHMARKS])
        for policy, form in (("deployed", "int8"), ("training", "float32"))
    ]
    settings = dataclasses.asdict(SuiteConfig()) | {"template": "boxed"}
    return SuiteResult(name, 40, "paper", settings, policies, [NOTE])


# --- scores ---


def test_scores_are_what_loops_over_problems_and_subsets_find():
    sampled = samples_of(np.random.default_rng(0), 12, 6, 0.4)
    score = score_benchmark("aime24", sampled)
    assert (score.problems, score.samples) == (12, 6)
    right = [[answer == "1" for answer in problem.answers] for problem in sampled]
    assert score.accuracy.value == pytest.approx(np.mean([np.mean(row) for row in right]))
    assert score.by_problem == {problem.problem: np.mean(row) for problem, row in zip(sampled, right, strict=True)}
    assert list(score.pass_at) == list(score.majority_at) == [1, 2, 4, 6]
    for k in (1, 2, 4, 6):
        passed, won = [], []
        for problem in sampled:
            for subset in itertools.combinations(problem.answers, k):
                counts = Counter(answer for answer in subset if answer is not None)
                most = [answer for answer, count in counts.items() if count == max(counts.values())]
                passed.append("1" in subset)
                won.append(most.count("1") / len(most) if most else 0.0)
        assert score.pass_at[k].value == pytest.approx(np.mean(passed))
        assert score.majority_at[k].value == pytest.approx(np.mean(won))
        for estimate in (score.pass_at[k], score.majority_at[k]):
            assert estimate.interval[0] <= estimate.value <= estimate.interval[1]
    assert score.mean_length == pytest.approx(np.mean([length for p in sampled for length in p.lengths]))
    assert score.unfinished == sum(not ended for problem in sampled for ended in problem.finished)
    assert score.unfinished_share == score.unfinished / 72


def test_with_one_sample_there_is_one_k():
    score = score_benchmark("aime24", samples_of(np.random.default_rng(0), 5, 1, 0.5))
    assert list(score.pass_at) == [1]
    assert score.pass_at[1] == score.majority_at[1] == score.accuracy


def test_the_average_counts_benchmarks_alike_however_many_problems_they_have():
    rng = np.random.default_rng(0)
    scores = [score_benchmark("aime24", samples_of(rng, 4, 2, 0.9)), score_benchmark("x", samples_of(rng, 40, 2, 0.1))]
    average = score_policy("deployed", "int8", scores).average
    assert average.value == pytest.approx((scores[0].accuracy.value + scores[1].accuracy.value) / 2)


# --- comparisons ---


def test_a_comparison_is_of_each_benchmark_and_of_their_average():
    ours, theirs = result_of(0, 0.7), result_of(1, 0.3)
    compared = compare(ours, theirs)
    assert list(compared) == ["deployed", "training"]
    rows = compared["training"]
    assert [row.benchmark for row in rows] == [*BENCHMARKS, AVERAGE]
    for row, mine, other in zip(rows, ours.policies[1].benchmarks, theirs.policies[1].benchmarks, strict=False):
        assert row.difference == pytest.approx(mine.accuracy.value - other.accuracy.value)
        assert row.interval[0] < row.difference < row.interval[1]
    assert rows[-1].difference == pytest.approx(ours.policies[1].average.value - theirs.policies[1].average.value)
    assert rows[-1].p_value < 0.01 and rows[-1].interval[0] > 0


def test_a_result_does_not_differ_from_itself():
    result = result_of(0, 0.5)
    rows = [row for rows in compare(result, result).values() for row in rows]
    assert all((row.difference, row.interval, row.p_value) == (0.0, (0.0, 0.0), 1.0) for row in rows)


def test_problems_are_paired_by_id_and_not_by_place():
    ours = result_of(0, 0.5)
    score = ours.policies[0].benchmarks[0]
    turned = dataclasses.replace(score, by_problem=dict(reversed(score.by_problem.items())))
    theirs = dataclasses.replace(ours.policies[0], benchmarks=[turned, *ours.policies[0].benchmarks[1:]])
    assert differences(ours.policies[0], theirs)[0].interval == (0.0, 0.0)


def test_results_on_other_problems_are_not_compared():
    with pytest.raises(RunError, match="aime24 has 8 problems here and 9 there, 8 of them the same"):
        compare(result_of(0, 0.5), result_of(0, 0.5, problems=9))


# --- files ---


def test_a_result_is_read_back_as_it_was(tmp_path):
    result = result_of(0, 0.5)
    paths = write_result(result, tmp_path)
    assert read_result(tmp_path) == read_result(paths["json"]) == result
    assert paths["plot"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"policies": [{}]}', '{"policies": 3}'])
def test_what_is_no_result_is_refused(text, tmp_path):
    with pytest.raises(RunError, match=r"no result in .*missing"):
        read_result(tmp_path / "missing")
    (tmp_path / "suite.json").write_text(text)
    with pytest.raises(RunError, match=r"suite.json is not a result of dcjax evaluate --suite"):
        read_result(tmp_path)


def table(text, heading):
    """The rows of the table under a heading, as lists of cells."""
    section = text.split(f"## {heading}\n\n")[1].split("\n\n")[0].strip()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()]
    return [rows[0], *rows[2:]]


def test_a_comparison_under_other_ends_says_so():
    """As of a folder with a run that an older version began from it."""
    ours, theirs = (result_of(1, 0.5, name=name) for name in ("ours", "theirs"))

    def ending(result, stops):
        return dataclasses.replace(result, settings=result.settings | {"stop_tokens": stops})

    told = "\nNot measured alike: responses end in tokens [1] here and [1, 16] there.\n"
    assert to_markdown(ending(ours, [1]), ending(theirs, [1, 16])).endswith(told)
    for other in (ending(theirs, [1]), theirs):
        assert "Not measured alike" not in to_markdown(ending(ours, [1]), other)


def test_the_table_holds_what_was_measured_beside_what_was_published():
    result = result_of(0, 0.5)
    text = to_markdown(result, against=result_of(1, 0.5, name="theirs"))
    assert text.startswith("# ours at step 40: suite paper\n")
    assert f"- {NOTE}\n" in text
    header, deployed, training, *published = table(text, "avg@k")
    assert header == ["policy", *(f"{title} @4" for title in TITLES), "average"]
    assert (deployed[0], training[0]) == ("deployed (int8)", "training (float32)")
    accuracy = result.policies[0].benchmarks[2].accuracy
    assert deployed[3].split()[0] == f"{100 * accuracy.value:.1f}"
    assert deployed[3].endswith(f"({100 * accuracy.interval[0]:.1f} to {100 * accuracy.interval[1]:.1f})")
    assert ["Qwen3-8B, bf16: DC-GRPO", "63.2", "52.5", "91.8", "94.2", "50.1", "74.4", "71.0"] in published
    assert len(published) == len(PUBLISHED) and {len(row) for row in published} == {8}
    details = table(text, "Beside it")
    assert len(details) == 1 + 2 * 6 and details[1][:4] == ["AIME24", "deployed", "8", "4"]
    assert [row[0] for row in table(text, "Deployed less training policy")] == ["difference", "int8 less float32"]
    assert [row[0] for row in table(text, "ours at step 40 less theirs at step 40")][1:] == [
        "deployed policy",
        "training policy",
    ]
    widths = {len(line) for line in text.split("## avg@k")[1].split("##")[0].splitlines() if line}
    assert len(widths) == 1


def test_json_is_one_line_of_finite_numbers():
    text = to_json(result_of(0, 0.5))
    assert "\n" not in text and "NaN" not in text
    assert json.loads(text)["policies"][0]["benchmarks"][0]["pass_at"].keys() == {"1", "2", "4"}


# --- what was published ---


def test_the_published_averages_are_those_of_the_printed_rows():
    printed = [67.3, 71.0, 69.0, 71.8, 64.7, 68.1, 65.2, 67.7]
    assert [round(row.average, 1) for row in PUBLISHED] == printed
    assert {len(row.scores) for row in PUBLISHED} == {len(BENCHMARKS)}
    assert tuple(benchmark.dataset for benchmark in SUITES["paper"]) == BENCHMARKS


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("suite", "papers", "suite is 'papers'; it must be one of paper"),
        ("thinking", "no", "thinking is 'no'; it must be one of auto, on, off"),
        ("answer_start", "\\boxed{", r"answer-start is .*boxed\{'; it must not hold 'boxed'"),
        ("template", "box", "template is 'box'; it must be one of boxed, dapo"),
        ("samples", 0, "samples is 0; it must be at least 1"),
        ("problems", -1, "problems is -1; it must be at least 1"),
        ("max_response_length", 0, "max-response-length is 0; it must be at least 1"),
        ("temperature", -0.5, "temperature is -0.5; it must be at least 0"),
        ("temperature", float("nan"), "temperature is nan; it must be at least 0"),
        ("top_p", 0.0, r"top-p is 0.0; it must lie within \(0, 1\]"),
        ("seed", -1, "seed is -1; it must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(field, value, right):
    with pytest.raises(RunError, match=right):
        SuiteConfig(**{field: value})
