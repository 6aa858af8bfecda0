"""What responses are judged by, in whatever order they end, on however many hosts."""

import itertools
import os
import signal

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcjax.data.datasets import Example
from dcjax.data.mathematics import MathTask
from dcjax.data.problems import FixedProblems, TextProblem
from dcjax.data.tokenizers import byte_tokenizer
from dcjax.errors import RunError
from dcjax.loop.reward_collector import TOLD, RewardCollector, Scores, check_golds, open_rewards
from dcjax.recipe.config import Config
from dcjax.recipe.reward import RewardConfig
from dcjax.recipe.rollout import RolloutConfig
from dcjax.rewards.boxed import integer_reward
from dcjax.rewards.in_process import InProcessRewards
from dcjax.rewards.pool import Pending, RewardPool
from dcjax.serving.rollout import Ended
from dcjax.user_code import CodeFile

pytestmark = pytest.mark.heavy

TOKENIZER = byte_tokenizer()
G, PROBLEMS = 3, [TextProblem("?", str(gold)) for gold in range(4)]
# of each problem: right, wrong, right but cut
ANSWERS = [(answer, ended) for gold in range(4) for answer, ended in ((gold, True), (gold + 1, True), (gold, False))]
RIGHT = [1.0, 0.0, 0.0] * 4


def ended(samples, by=TOKENIZER.eos_token_id):
    def tokens(answer, finished):
        ids = TOKENIZER(rf"it is \boxed{{{answer}}}", add_special_tokens=False)["input_ids"]
        return np.array(ids + [by] * finished, np.int32)

    return Ended(
        samples=np.array(samples, int),
        responses=[tokens(*ANSWERS[sample]) for sample in samples],
        finished=np.array([ANSWERS[sample][1] for sample in samples], bool),
    )


def judged(*parts):
    collector = RewardCollector(InProcessRewards(integer_reward), TOKENIZER, PROBLEMS, samples_per_prompt=G)
    for part in parts:
        collector.submit(ended(part))
    return collector.result().rewards


def test_whatever_token_ended_a_response_is_not_judged():
    """One that the tokenizer does not hold for special: an answer begun anew, which would be wrong."""
    seen = []

    def reward(text, gold, *, finished):
        seen.append(text)
        return integer_reward(text, gold, finished=finished)

    collector = RewardCollector(InProcessRewards(reward), TOKENIZER, PROBLEMS, samples_per_prompt=G)
    collector.submit(ended(range(12), by=TOKENIZER("}", add_special_tokens=False)["input_ids"][0]))
    assert collector.result().rewards.tolist() == RIGHT
    assert seen == [rf"it is \boxed{{{answer}}}" for answer, _ in ANSWERS]


@given(order=st.permutations(range(12)), cuts=st.sets(st.integers(0, 12), max_size=4))
def test_the_order_in_which_samples_end_does_not_matter(order, cuts):
    bounds = [0, *sorted(cuts), 12]
    parts = [sorted(order[start:stop]) for start, stop in itertools.pairwise(bounds)]
    scores = judged(*parts)
    assert scores.dtype == np.float32 and scores.tolist() == RIGHT


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_hosts_judge_their_shares_which_are_all_of_it(monkeypatch, processes):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    scores = []
    for number in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        scores.append(judged([1, 4, 5, 9, 11], [0, 2, 3, 6, 7, 8, 10]))
    assert np.concatenate(scores).tolist() == RIGHT
    assert max(map(len, scores)) <= -(-4 // processes) * G


def test_a_run_is_judged_here_by_its_task_or_in_as_many_workers_as_it_says():
    with open_rewards(Config()) as scorer:
        assert scorer == InProcessRewards(integer_reward)
    function = "dcjax.rewards.math:math_reward"
    with open_rewards(Config(reward=RewardConfig(function=function, workers=1))) as scorer:
        assert isinstance(scorer, RewardPool)
        # what the task's own reward would refuse
        assert scorer.submit([r"\boxed{12-4}"], ["8"], [True]).result().tolist() == [1.0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_that_cannot_be_imported_ends_the_run_in_one_line(workers):
    with pytest.raises(RunError, match=r"reward\.function is 'my:own': .* nor in an installed package"):
        open_rewards(Config(reward=RewardConfig(function="my:own", workers=workers)))


def raising(text, gold, *, finished):
    return {"0": 1.0}[gold]


def no_number(text, gold, *, finished):
    return 1.0 if gold == "0" else float("nan")


def too_large(text, gold, *, finished):
    return 1.0 if gold == "0" else 1e300  # an infinity in float32


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (raising, "KeyError: '1'"),
        (no_number, "ValueError: the reward is nan, for gold '1'; it must be a finite number"),
        (too_large, r"ValueError: the reward is 1e\+300, for gold '1'; it must be a finite number"),
    ],
)
def test_a_reward_that_raises_or_is_not_finite_ends_the_run_in_one_line(reward, told):
    """No number was a wrong answer in evaluation once, and laid to the learning rate in training."""
    collector = RewardCollector(InProcessRewards(reward), TOKENIZER, PROBLEMS, samples_per_prompt=G)
    collector.submit(ended([1, 4, 7]))
    collector.submit(ended([0, 2, 3, 5, 6, 8, 9, 10, 11]))
    where = rf"\({__file__}, line \d+, in {reward.__name__}\)"
    with pytest.raises(RunError, match=f"failed on response 4: {told} {where}; a reward returns a number") as caught:
        collector.result()
    assert "\n" not in str(caught.value)


FAILING = """
import json, sys
from dataclasses import dataclass
import numpy as np
from dcjax.recipe.reward import RewardConfig

class Silent(Exception):
    def __str__(self):
        raise ValueError

def raises(): raise KeyError("why")
def quotes(): raise ValueError("two\\nlines")
def says_nothing(): raise Silent
def library(): json.loads("{")
def exits(): sys.exit("why")
def ends(): raise SystemExit
def interrupts(): raise KeyboardInterrupt

def returns(value):
    return lambda: value

RETURNED = {"none": None, "part": {"score": "1.0"}, "empty": {},
    "unnamed": {"the score": 1.0}, "numbered": {1: 1.0}, "endless": {"a": 3e38, "b": 3e38},
    "text": "1.0", "array": np.ones(1), "many": np.ones((9, 9))}

def judge(text, gold, *, finished):
    return (globals().get(gold) or returns(RETURNED[gold]))()

@dataclass(frozen=True)
class Failing(RewardConfig):
    def verifier(self, task):
        return judge
"""

FAILED = {
    "raises": "KeyError: 'why'",
    "quotes": "ValueError: two lines",
    "says_nothing": "Silent: <exception str() failed>",
    "library": "JSONDecodeError: Expecting property name",
    "exits": "SystemExit: why",
    "ends": "SystemExit",
    "interrupts": "KeyboardInterrupt",
    "none": "TypeError: the reward is None, a NoneType, for gold 'none'; it must be a finite number",
    "part": "TypeError: the reward's part 'score' is '1.0', a str, for gold 'part'; it must be a finite number",
    "empty": "ValueError: the reward has 0 parts, for gold 'empty'; it must have 1 to 32",
    "unnamed": "TypeError: a part of the reward is called 'the score'; its name must be an identifier, like 'correct'",
    "numbered": "TypeError: a part of the reward is called 1; its name must be an identifier",
    "endless": "ValueError: the reward is 6e+38, for gold 'endless'; it must be a finite number",
    "text": "TypeError: the reward is '1.0', a str, for",
    "array": "TypeError: the reward is array([1.]), a ndarray, for",
    "many": "TypeError: the reward is array([[1., 1",
}


TELLING = """
from dataclasses import dataclass
from dcjax.recipe.reward import RewardConfig

def judge(text, gold, *, finished, prompt, record):
    correct = float(text.endswith(f"{{{gold}}}"))
    if not finished:
        return {"correct": 0.0}
    return {"correct": correct, "format": record["worth"] * ("boxed" in text), "known": float(prompt == "say: " + gold)}

@dataclass(frozen=True)
class Telling(RewardConfig):
    def verifier(self, task):
        return judge
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reward_sees_prompt_and_record_and_returns_its_parts(tmp_path, workers):
    file = tmp_path / "telling.py"
    file.write_text(f"{TELLING}# {workers}\n")
    problems = [
        TextProblem(f"say: {problem.answer}", problem.answer, record={"worth": 0.25 * (number + 1)})
        for number, problem in enumerate(PROBLEMS)
    ]
    with open_rewards(Config(reward=CodeFile.read(file).load().Telling(workers=workers))) as scorer:
        collector = RewardCollector(scorer, TOKENIZER, problems, samples_per_prompt=G)
        for part in ([11, 3, 5], [0, 1, 2, 4], [10, 9, 8, 7, 6]):
            collector.submit(ended(part))
        scores = collector.result()
    finished = np.array([ends for _, ends in ANSWERS])
    worth = np.repeat([0.25, 0.5, 0.75, 1], G).astype(np.float32)
    np.testing.assert_array_equal(scores.parts["correct"], RIGHT)
    np.testing.assert_array_equal(scores.parts["format"], np.where(finished, worth, np.nan))
    np.testing.assert_array_equal(scores.parts["known"], np.where(finished, 1, np.nan))
    np.testing.assert_array_equal(scores.rewards, np.where(finished, RIGHT + worth + 1, 0))
    np.testing.assert_array_equal(scores.graded, RIGHT)
    means = scores.part_means()
    assert set(means) == {"reward_parts/correct", "reward_parts/format", "reward_parts/known"}
    assert means["reward_parts/correct"] == pytest.approx(np.mean(RIGHT))
    assert means["reward_parts/format"] == pytest.approx(worth[finished].mean())
    unfinished = int(np.flatnonzero(~finished)[0])
    assert scores.parts_of(unfinished) == {"correct": 0.0}


def test_a_part_that_no_response_of_an_iteration_has_has_no_mean():
    scores = Scores(np.float32([1, 2]), {"there": np.float32([1, np.nan]), "gone": np.float32([np.nan, np.nan])})
    assert scores.part_means() == {"reward_parts/there": 1}


def test_accuracies_count_the_reward_where_it_has_no_part_that_says_correct():
    scores = Scores(np.float32([1, 2, 0]), {"correct": np.float32([0, np.nan, 0]), "length": np.float32([1, 2, 0])})
    assert scores.graded.tolist() == [0, 2, 0]
    assert Scores(np.float32([1, 2])).graded.tolist() == [1, 2]
    joined = Scores.joined([scores, Scores(np.float32([1]))])
    np.testing.assert_array_equal(joined.parts["length"], np.float32([1, 2, 0, np.nan]))


@pytest.mark.parametrize("workers", [0, 1])
def test_however_a_reward_fails_its_own_line_is_named_here_and_in_workers(tmp_path, workers):
    file = tmp_path / "failing.py"
    source = f"{FAILING}# in {workers} workers\n"  # a module of its own, whose path is this one
    file.write_text(source)
    lines = source.splitlines()
    with open_rewards(Config(reward=CodeFile.read(file).load().Failing(workers=workers))) as scorer:
        for kind, told in FAILED.items():
            collector = RewardCollector(scorer, TOKENIZER, [TextProblem("?", kind)], samples_per_prompt=1)
            collector.submit(ended([0]))
            with pytest.raises(RunError) as caught:
                collector.result()
            name = kind if f"def {kind}():" in FAILING else "judge"
            line = next(number for number, line in enumerate(lines, start=1) if line.startswith(f"def {name}("))
            assert str(caught.value).startswith(f"the reward function failed on response 0: {told}")
            assert f" ({file}, line {line}, in {name}); a reward returns" in str(caught.value)
            assert "\n" not in str(caught.value) and caught.value.status == 2


def test_an_interrupt_from_the_keyboard_is_no_error_of_the_reward():
    def reward(text, gold, *, finished):
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        InProcessRewards(reward).submit(["7"], ["7"], [True])
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_no_function_is_refused(tmp_path):
    (tmp_path / "none.py").write_text(FAILING.replace("return judge", "return None"))
    reward = CodeFile.read(tmp_path / "none.py").load().Failing()
    with pytest.raises(RunError, match="the reward of Failing and ArithmeticTask is None, a NoneType; it must be a f"):
        open_rewards(Config(reward=reward))


class Stopping:
    """Says that so many answers of each batch took too long."""

    counters, asks = None, ()

    def __init__(self, timeouts):
        self.timeouts = timeouts

    def submit(self, texts, golds, finished, known=None):
        pending = Pending.of([0.0] * len(texts))
        pending.timeouts = self.timeouts
        return pending


@pytest.mark.parametrize("timeouts, told", [(0, False), (3, False), (4, True)])
def test_a_batch_of_which_most_answers_take_too_long_is_told_of(capsys, timeouts, told):
    collector = RewardCollector(Stopping(timeouts), TOKENIZER, PROBLEMS, samples_per_prompt=G)
    for part in (range(6), range(6, 12)):
        collector.submit(ended(part))
    collector.result()
    errors = capsys.readouterr().err
    line = (
        f"dcjax: {2 * timeouts} of 12 answers took longer than an answer may (reward.timeout) and score 0; allow more "
    )
    assert errors.startswith(line) if told else errors == ""


SLOW = """
import time
from dataclasses import dataclass
from dcjax.recipe.reward import RewardConfig

def judge(text, gold, *, finished):
    time.sleep(60)

@dataclass(frozen=True)
class Slow(RewardConfig):
    def verifier(self, task):
        return judge
"""


def test_a_reward_whose_first_call_is_too_slow_ends_the_run_in_one_line(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    reward = CodeFile.read(tmp_path / "slow.py").load().Slow(workers=1, warm_up=0.2)
    with open_rewards(Config(reward=reward)) as scorer:
        collector = RewardCollector(scorer, TOKENIZER, PROBLEMS, samples_per_prompt=G)
        collector.submit(ended(range(12)))
        with pytest.raises(RunError, match=r"first call in a worker took more than warm_up, 0\.2 s; raise") as caught:
            collector.result()
        assert "\n" not in str(caught.value)


def of_golds(*golds):
    examples = [Example(f"id{n}", "?", gold, "minerva") for n, gold in enumerate(golds)]
    return FixedProblems(PROBLEMS, PROBLEMS, golds=examples)


MATH = Config(
    task=MathTask(),
    rollout=RolloutConfig(max_prompt_length=1024),
    reward=RewardConfig(workers=1),
)


def test_golds_that_cannot_be_read_are_named_before_a_run(capsys):
    check_golds(MATH, of_golds("7", r"A \cap B", "5.", "np.arcsin(10/13)"))
    assert capsys.readouterr().err.splitlines() == [
        r"dcjax: minerva: gold 'A \\cap B' of id1 cannot be read",
        "dcjax: minerva: gold 'np.arcsin(10/13)' of id3 cannot be read",
        "dcjax: 2 of 4 golds cannot be read: of these only their own text is right, and any other spelling scores 0",
    ]
    check_golds(MATH, of_golds("7", "5.", r"\frac{1}{2}"))
    assert capsys.readouterr().err == ""


def test_of_many_golds_that_cannot_be_read_some_are_named(capsys):
    check_golds(MATH, of_golds(*["{" * number for number in range(1, TOLD + 6)]))
    *named, last = capsys.readouterr().err.splitlines()
    assert len(named) == TOLD and "25 of 25 golds cannot be read (5 more are not listed; dcjax data lists all)" in last


def test_nothing_is_said_of_golds_that_a_users_own_reward_reads(capsys):
    check_golds(Config(reward=RewardConfig(function="dcjax.rewards.boxed:integer_reward")), of_golds(r"A \cap B"))
    assert capsys.readouterr().err == ""
