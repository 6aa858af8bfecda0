"""Tasks of reasoning-gym: purity, what is held out, curricula, refusals, and verifiers that evaluate what they get."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass

import pytest

pytest.importorskip("reasoning_gym", reason="reasoning-gym needs a C compiler where it is installed")

from dcjax.data.gym import DRAWS, HASH_SEEDED, GymTask
from dcjax.data.task import Curriculum
from dcjax.data.tokenizers import byte_tokenizer
from dcjax.rewards import gym
from dcjax.rewards.gym import Source, gym_reward, is_plain, parse

SMALL = "chain_sum(min_terms=2, max_terms=2, max_digits=1)"


def opened(*datasets, **fields):
    """Of prompts in bytes."""
    fields = {"max_prompt_tokens": 4096} | fields
    return GymTask(datasets=datasets, **fields).open(byte_tokenizer())


@pytest.fixture(scope="module")
def mixed():
    return opened(SMALL, "leg_counting", weights=(3, 1), heldout=20)


def test_a_data_set_is_written_as_a_call():
    assert parse("chain_sum") == Source("chain_sum")
    assert parse(" a(b=1, c=[1, 'x'], d=-2.5) ") == Source("a", (("b", 1), ("c", (1, "x")), ("d", -2.5)))


@pytest.mark.parametrize("written", ["", "a(1)", "a.b", "a(b=c)", "a(**{})", "a(b=__import__('os'))", "a b", "a(b={})"])
def test_nothing_else_is_a_data_set(written):
    with pytest.raises(ValueError) as refused:
        GymTask(datasets=(written,))
    assert f"task.datasets has {written!r}; it must be NAME" in str(refused.value)


def test_problems_are_a_function_of_seed_and_number(mixed):
    again = opened(SMALL, "leg_counting", weights=(3, 1), heldout=20)
    ours = mixed.problems("train", 3, 10, 12)
    assert ours == again.problems("train", 3, 10, 12)
    assert ours[5:7] == again.problems("train", 3, 15, 2)
    assert ours != mixed.problems("train", 4, 10, 12)
    assert mixed.fingerprint == again.fingerprint


def test_data_sets_are_drawn_by_their_weights(mixed):
    names = [each.record["source"].name for each in mixed.problems("train", 0, 0, 400)]
    # 300 are expected, with a standard deviation of 8.7
    assert abs(names.count("chain_sum") - 300) < 45


def test_no_training_problem_repeats_a_held_out_one(mixed):
    """Sums of two digits are few, so that most would."""
    measured = {each.question for each in mixed.problems("heldout", 0, 0, 20)}
    assert not measured & {each.question for each in mixed.problems("train", 0, 0, 200)}
    assert mixed.problems("heldout", 7, 20, 20) == mixed.problems("heldout", 0, 0, 20)


def test_where_all_are_held_out_it_is_said():
    with pytest.raises(ValueError, match=f"chain_sum: {DRAWS} of {DRAWS} problems are held out; lower task"):
        opened("chain_sum(min_terms=2, max_terms=2, max_digits=1)", heldout=3000).problems("train", 0, 0, 500)


def test_right_answers_score_and_others_do_not(mixed):
    reward = GymTask().reward
    for problem in mixed.problems("train", 0, 0, 20):
        known = {"finished": True, "record": problem.record}
        assert reward(f"so <answer>{problem.answer}</answer>", problem.answer, **known) == 1.0
        assert reward(f"so <answer>{problem.answer}1</answer>", problem.answer, **known) < 1.0
        assert reward(problem.answer, problem.answer, **known) == 0.0
        assert reward(f"<answer>{problem.answer}</answer>", problem.answer, finished=False, record=problem.record) == 0


def test_demonstrations_are_right_answers_in_their_place(mixed):
    shown = mixed.demonstrations(seed=1, step=2, count=6, scratchpad_fraction=0.0)
    assert all(one.response.startswith("<answer>") and one.response.endswith("</answer>") for one in shown)
    assert shown == mixed.demonstrations(seed=1, step=2, count=6, scratchpad_fraction=0.0)
    assert shown != mixed.demonstrations(seed=1, step=3, count=6, scratchpad_fraction=0.0)


def test_reasoning_stands_before_the_answer_in_a_share_of_the_demonstrations():
    @dataclass(frozen=True)
    class Thinking(GymTask):
        def reasoning(self, entry):
            return f"{entry['metadata']['expression']}, so "

    problems = Thinking(datasets=(SMALL,), heldout=2, max_prompt_tokens=4096).open(byte_tokenizer())
    every, some, none = (
        problems.demonstrations(seed=0, step=1, count=100, scratchpad_fraction=share) for share in (1.0, 0.3, 0.0)
    )
    for thought, plain in zip(every, none, strict=True):
        before, so, after = thought.response.partition(", so ")
        assert so and after == plain.response
        assert f": {before} =" in thought.prompt == plain.prompt
    thinking = [", so " in each.response for each in some]
    assert 15 < sum(thinking) < 45
    assert some == [both[not thought] for both, thought in zip(zip(every, none, strict=True), thinking, strict=True)]


def test_a_data_set_without_answers_has_nothing_to_imitate():
    with pytest.raises(ValueError, match=r"rush_hour gives no right answers to imitate; warm_start\.steps must be 0"):
        opened("rush_hour", heldout=2).demonstrations(seed=0, step=1, count=1, scratchpad_fraction=0.0)


def test_a_curriculum_rises_and_falls_with_success():
    problems = opened("chain_sum", curriculum=True, window=4, heldout=4)
    assert isinstance(problems, Curriculum)
    reached, levels = {}, []
    for share in (1.0, 1.0, 0.5, 0.0, 0.0, 0.0):
        drawn = problems.at(reached).problems("train", 0, 0, 4)
        levels.append(problems.levels(reached)["chain_sum"])
        reached = json.loads(json.dumps(problems.after(reached, [(each, share) for each in drawn])))
    assert levels == [0, 1, 2, 2, 1, 0]
    assert problems.levels(reached) == {"chain_sum": 0}


def test_a_window_spans_iterations_and_levels_end_at_the_last():
    problems = opened("chain_sum", curriculum=True, window=4, heldout=4)
    drawn = problems.at({}).problems("train", 0, 0, 3)
    halfway = problems.after({}, [(each, 1.0) for each in drawn])
    assert halfway == {"chain_sum": [0, 3, 3.0]}
    assert problems.after(halfway, [(drawn[0], 0.2)]) == {"chain_sum": [1, 0, 0.0]}
    last = Source("chain_sum").levels - 1
    top = {"chain_sum": [last, 3, 3.0]}
    assert problems.after(top, [(problems.at(top).problems("train", 0, 0, 1)[0], 1.0)]) == {"chain_sum": [last, 0, 0.0]}


def test_levels_change_the_problems_and_not_those_held_out():
    problems = opened("chain_sum", curriculum=True, heldout=4)
    easy, hard = problems.at({}), problems.at({"chain_sum": [3, 0, 0.0]})
    digits = [sum(map(str.isdigit, each.question)) for each in easy.problems("train", 0, 0, 30)]
    more = [sum(map(str.isdigit, each.question)) for each in hard.problems("train", 0, 0, 30)]
    assert sum(more) > 1.5 * sum(digits)
    assert easy.problems("heldout", 0, 0, 4) == hard.problems("heldout", 0, 0, 4)


def test_prompts_that_are_too_long_are_passed_over():
    with pytest.raises(ValueError, match=f"leg_counting: {DRAWS} of {DRAWS} problems are longer than task"):
        opened("leg_counting", heldout=2, max_prompt_tokens=100)


@pytest.mark.parametrize(
    "written, told",
    [
        ("chain_sums", "'chain_sums' is no data set of reasoning-gym; near it are chain_sum"),
        ("chain_sum(bla=1)", "chain_sum has no parameter 'bla'; it has min_terms, max_terms"),
        ("chain_sum(seed=1)", "chain_sum has no parameter 'seed'; it has min_terms"),
        ("chain_sum(min_terms=0)", "chain_sum refuses its parameters: AssertionError: min_terms must be positive"),
        ("composite", "'composite' is no data set of reasoning-gym"),
    ],
)
def test_data_sets_that_cannot_be_used_are_named(written, told):
    with pytest.raises(ValueError) as refused:
        opened(written, heldout=2)
    assert told in str(refused.value)


def test_what_cannot_be_repeated_needs_a_hash_seed(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match="ransom_note draws other problems in every process unless PYTHONHASHSEED"):
        opened("ransom_note", heldout=2)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    opened("ransom_note", heldout=2)


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"datasets": ()}, "task.datasets is empty"),
        ({"weights": (1.0, 2.0)}, r"task.weights is \(1.0, 2.0\); it must be one number above 0 for each of 1"),
        ({"heldout": 0}, "task.heldout is 0; it must be at least 1"),
        ({"lower_at": 0.9}, "task.lower_at is 0.9 and task.raise_at 0.8; they must lie within"),
        ({"datasets": ("ab", "ab"), "curriculum": True}, "a curriculum must have each data set once"),
    ],
)
def test_fields_out_of_range_are_quoted(fields, told):
    with pytest.raises(ValueError, match=told):
        GymTask(**fields)


EXECUTES = [
    "exec('raise SystemExit')",
    "(exec)('x')",
    "[exec][0]('x')",
    "__import__('os').system('x')",
    "x.__class__",
    "f\"{exec('x')}\"",
    "exec('x') + 5!",
    "(lambda: 1)()",
    "[eval('x') for x in (1, 2)]",
    "[x for x in (1, 2)]",
    "(y := 1)",
    "max(1, 2)",
    "exec\\\n('x')",
    "(exec #\n('x'))",
    "ｅｘｅｃ('x')",
    "(" * 10_000,
    "-" * 100_000 + "1",
]


@pytest.mark.parametrize("answer", EXECUTES)
def test_answers_that_would_execute_something_are_not_plain(answer):
    assert not is_plain(answer)


@pytest.mark.parametrize("answer", ["7", "x**2 + 3*x", "sqrt(2)*sin(x)", "[[0, 1], [1, 0]]", "5!", "2x + 1", "a b", ""])
def test_honest_answers_are_plain(answer):
    assert is_plain(answer)


@pytest.mark.parametrize("name", ["spiral_matrix", "n_queens", "puzzle24", "simple_integration", "string_insertion"])
def test_verifiers_that_evaluate_execute_nothing(name, tmp_path):
    """reasoning-gym 0.1.25 runs such answers as Python: the file would be there."""
    problem = opened(name, heldout=2).problems("train", 0, 0, 1)[0]
    made = tmp_path / "made"
    for answer in (f"open({str(made)!r}, 'w')", f"[open({str(made)!r}, 'w')]", f"print(open({str(made)!r}, 'w'))"):
        text = f"<answer>{answer}</answer>"
        assert gym_reward(text, "", finished=True, record=problem.record, place="tags") == 0.0
    assert not made.exists()


def test_what_a_verifier_does_not_expect_scores_nothing(monkeypatch):
    problem = opened("chain_sum", heldout=2).problems("train", 0, 0, 1)[0]
    verifier = problem.record["source"].open(0)
    monkeypatch.setattr(type(verifier), "score_answer", lambda *_: 1 / 0)
    assert gym_reward("<answer>1</answer>", "", finished=True, record=problem.record, place="tags") == 0.0


MADE = """
import json, pickle, signal, sys
from reasoning_gym.factory import DATASETS
from dcjax.rewards.gym import Source

def late(*_):
    raise TimeoutError

signal.signal(signal.SIGALRM, late)
made = {}
for name in sorted(set(DATASETS) - {"composite"}):
    signal.alarm(60)
    data = Source(name).open(5)
    numbers = [int(each) for each in sys.argv[1].split()]
    made[name] = {str(number): [data[number]["question"], data[number]["answer"]] for number in numbers}
    pickle.dumps(data[numbers[0]])
    signal.alarm(0)
with open(sys.argv[2], "w") as file:
    json.dump(made, file, default=repr)
"""


@pytest.mark.slow
def test_every_data_set_is_the_same_in_every_process_and_order(tmp_path):
    """All but those that are said to depend on the hash seed."""

    def made(numbers, hash_seed):
        environment, out = os.environ | {"PYTHONHASHSEED": str(hash_seed)}, tmp_path / str(hash_seed)
        subprocess.run([sys.executable, "-c", MADE, numbers, str(out)], check=True, env=environment)
        return json.loads(out.read_text())

    ours, theirs = made("0 1 2 499", 1), made("499 2 1 0", 2)
    assert {name for name in ours if ours[name] != theirs[name]} == HASH_SEEDED


def test_entries_travel_to_worker_processes():
    for problem in itertools.chain.from_iterable(
        opened(name, heldout=2).problems("train", 0, 0, 2) for name in ("chain_sum", "zebra_puzzles", "graph_color")
    ):
        assert pickle.loads(pickle.dumps(problem.record)) == problem.record


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(name):
        raise gym.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gym.importlib.metadata, "version", missing)
    with pytest.raises(FileNotFoundError, match="reasoning-gym is not installed; pip install"):
        GymTask().check_files()
