"""Tasks of reasoning-gym: a hundred procedural data sets with verifiers of their own (arXiv 2505.24760).

Which problem a number stands for is a function of the run's seed alone, so that runs resume and hosts agree.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dcjax.data.chat_task import ChatTask
from dcjax.data.problems import TextProblem
from dcjax.data.task import Demonstration, Problem, Problems, Split, encode
from dcjax.data.templates import TemplateName
from dcjax.rewards.gym import CHUNK, Source, gym_reward, parse, require_gym
from dcjax.rewards.processes import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HASH_SEEDED = frozenset(
    {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
)
"""Data sets of reasoning-gym 0.1.25 whose problems depend on Python's hash seed, which differs between processes."""
NOWHERE = (0, 0, 0.0)
"""A data set's level, the problems attempted there, and how many were right, where a curriculum begins."""
DRAWS = 16
"""The most problems that are made for one that is neither held out nor too long."""


@dataclass(frozen=True)
class GymTask(ChatTask):
    """Problems of reasoning-gym's data sets, scored by their own verifiers.

    A data set is written as a call: its name, and in parentheses what differs from its defaults, as in
    chain_sum(min_terms=2, max_terms=3).

    Raises:
      ValueError: a field is out of range, or a data set is not written like that.
    """

    datasets: tuple[str, ...] = ("chain_sum",)
    """Data sets that problems are drawn from: NAME, or NAME(PARAMETER=VALUE, ...)."""
    weights: tuple[float, ...] = ()
    """How often each of them is drawn, in proportion; equally often where none is given."""
    heldout_datasets: tuple[str, ...] = ()
    """Data sets of the problems that are measured by; where none is given, those of training."""
    heldout: int = 128
    """Number of held-out problems, which no training problem repeats."""
    curriculum: bool = False
    """Begin at the first level of each data set's own curriculum, and change it by success."""
    raise_at: float = 0.8
    """Share of right responses from which a data set's level rises."""
    lower_at: float = 0.2
    """Share of right responses up to which it falls."""
    window: int = 64
    """Problems of a data set over which that share is taken, and between changes of its level."""
    template: TemplateName = "tags"
    max_prompt_tokens: int = 512
    """Longer problems, template included, are passed over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.datasets:
            raise ValueError("task.datasets is empty; it must name at least one data set, such as chain_sum")
        for name in ("datasets", "heldout_datasets"):
            for written in getattr(self, name):
                try:
                    parse(written)
                except ValueError as error:
                    raise ValueError(f"task.{name} has {error}") from None
        if self.weights and (len(self.weights) != len(self.datasets) or not all(each > 0 for each in self.weights)):
            raise ValueError(
                f"task.weights is {self.weights}; it must be one number above 0 for each of {len(self.datasets)} data "
                "sets"
            )
        for name in ("heldout", "window"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"task.{name} is {value}; it must be at least 1")
        names = [parse(written).name for written in self.datasets]
        if self.curriculum and len(set(names)) < len(names):
            raise ValueError(f"task.datasets is {self.datasets}; a curriculum must have each data set once")
        if not 0 <= self.lower_at < self.raise_at <= 1:
            raise ValueError(
                f"task.lower_at is {self.lower_at} and task.raise_at {self.raise_at}; they must lie within [0, 1], "
                "lower_at below raise_at"
            )

    @property
    def reward(self) -> Reward:
        """The verifier of the data set that a problem is of."""
        return functools.partial(gym_reward, place=self.template)

    def reasoning(self, entry: Mapping[str, Any]) -> str:
        """What a demonstration with a scratchpad says before the answer: "" here, as data sets give none.

        Args:
          entry: the problem as reasoning-gym makes it: question, answer, metadata.
        """
        return ""

    def check_files(self) -> None:
        """Looks for the package.

        Raises:
          FileNotFoundError: it is not installed.
        """
        require_gym()

    def open(self, tokenizer: PreTrainedTokenizerFast) -> GymProblems:
        """The problems; those that are held out are made at once.

        Raises:
          FileNotFoundError: reasoning-gym is not installed.
          ValueError: it has no such data set or parameter, or a data set cannot be repeated in another process.
        """
        require_gym()
        sources = [parse(written) for written in self.datasets]
        measured = [parse(written) for written in self.heldout_datasets]
        for source in (*sources, *measured):
            _check(source, curriculum=self.curriculum and source in sources)
        training = Draws(self, tokenizer, sources, self.weights)
        held_out = replace(training, sources=measured, weights=()) if measured else training
        heldout = [held_out("heldout", 0, number) for number in range(self.heldout)]
        training = replace(training, passed_over=frozenset(problem.question for problem in heldout))
        for source in sources:  # what one of them cannot do should be known before training
            replace(training, sources=[source], weights=())("train", 0, 0)
        return (GymCurriculum if self.curriculum else GymProblems)(training, heldout)


@dataclass(frozen=True)
class Draws:
    """Problems of data sets, endless streams of them: (stream, seed, number) -> a problem, a pure function."""

    task: GymTask
    tokenizer: PreTrainedTokenizerFast
    sources: Sequence[Source]
    weights: Sequence[float] = ()
    passed_over: frozenset[str | None] = frozenset()
    """Questions that are never drawn."""

    def __call__(self, stream: str, seed: int, number: int) -> TextProblem:
        """The first of `DRAWS` problems that is neither passed over nor too long.

        Raises:
          ValueError: there is none.
        """
        generator = np.random.default_rng([seed, number, *stream.encode()])
        share = np.array(self.weights or [1.0] * len(self.sources))
        source = self.sources[generator.choice(len(self.sources), p=share / share.sum())]
        longest, too_long = self.task.max_prompt_tokens, 0
        for attempt in range(DRAWS):
            problem = self._problem(source, f"{stream} {seed} {source.name} {attempt}", number)
            if len(encode(self.tokenizer, [problem.prompt])[0]) > longest:
                too_long += 1
            elif problem.question not in self.passed_over:
                return problem
        if too_long:
            raise ValueError(
                f"{source.name}: {too_long} of {DRAWS} problems are longer than task.max_prompt_tokens, {longest}; "
                "allow longer ones, or give it other parameters"
            )
        raise ValueError(
            f"{source.name}: {DRAWS} of {DRAWS} problems are held out; lower task.heldout, {self.task.heldout}, or "
            "give it parameters with more problems"
        )

    def _problem(self, source: Source, stream: str, number: int) -> TextProblem:
        base = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:3])
        # data sets seed a problem by their own seed plus its number, so that the next chunk must begin behind this one
        entry = source.open(base + number // CHUNK * CHUNK)[number % CHUNK]
        question, answer = str(entry["question"]), str(entry["answer"] or "")
        return TextProblem(
            self.task.asked.prompt(self.tokenizer, question),
            answer,
            question,
            solution=self.task.asked.show(answer),
            record={"source": source, "entry": entry},
        )


@dataclass(frozen=True)
class GymProblems(Problems):
    """Training problems without end, and held-out ones, which come round in their order."""

    training: Draws
    heldout: Sequence[TextProblem]

    def problems(self, split: Split, seed: int, start: int, count: int) -> list[TextProblem]:
        """Problems start, ..., start + count - 1 of a split: a pure function of the arguments.

        Raises:
          ValueError: a data set has nothing to train on that is neither held out nor too long.
        """
        numbers = range(start, start + count)
        if split == "heldout":
            return [self.heldout[number % len(self.heldout)] for number in numbers]
        return [self.training("train", seed, number) for number in numbers]

    @property
    def fingerprint(self) -> dict[str, str]:
        """The version of reasoning-gym, and a SHA-256 of the held-out problems."""
        asked = json.dumps([(problem.question, problem.answer) for problem in self.heldout])
        return {f"reasoning-gym {require_gym()}": f"SHA-256 {hashlib.sha256(asked.encode()).hexdigest()[:16]}"}

    def demonstrations(self, *, seed: int, step: int, count: int, scratchpad_fraction: float) -> list[Demonstration]:
        """Training problems with the data sets' own answers where the template asks for them.

        The task's `reasoning` stands before the answer with probability `scratchpad_fraction`.

        Raises:
          ValueError: a data set has no answers that its verifier accepts.
        """
        numbers, task = range((step - 1) * count, step * count), self.training.task
        thinks = np.random.default_rng([seed, step, *b"reasoning"]).random(count) < scratchpad_fraction
        shown = []
        for number, thought in zip(numbers, thinks.tolist(), strict=True):
            problem = self.training("demonstrations", seed, number)
            record = problem.record or {}
            response = (task.reasoning(record["entry"]) if thought else "") + (problem.solution or "")
            if gym_reward(response, problem.answer, finished=True, record=record, place=task.template) < 1:
                raise ValueError(
                    f"{record['source'].name} gives no right answers to imitate; warm_start.steps must be 0"
                )
            shown.append(Demonstration(problem.prompt, response))
        return shown


@dataclass(frozen=True)
class GymCurriculum(GymProblems):
    """Training problems whose data sets' levels rise and fall with success (`dcjax.data.task.Curriculum`)."""

    def at(self, progress: dict[str, Any]) -> GymProblems:
        """The problems at the levels there."""
        reached = [replace(source, level=_level(progress, source)) for source in self.training.sources]
        return replace(self, training=replace(self.training, sources=reached))

    def after(self, progress: dict[str, Any], attempted: Sequence[tuple[Problem, float]]) -> dict[str, Any]:
        """The levels after an iteration: each changes by one once `window` problems of its data set were attempted."""
        following, task = dict(progress), self.training.task
        for problem, share in attempted:
            source = problem.record["source"]  # pyrefly: ignore[missing-attribute]
            level, seen, right = following.get(source.name, NOWHERE)
            seen, right = seen + 1, right + share
            if seen >= task.window:
                step = (right / seen >= task.raise_at) - (right / seen <= task.lower_at)
                level, seen, right = min(max(level + step, 0), source.levels - 1), 0, 0.0
            following[source.name] = [level, seen, right]
        return following

    def levels(self, progress: dict[str, Any]) -> dict[str, float]:
        """The level of each data set."""
        return {source.name: float(_level(progress, source)) for source in self.training.sources}


def _check(source: Source, *, curriculum: bool) -> None:
    """Raises ValueError for a data set that cannot be used."""
    from reasoning_gym.factory import CURRICULA, DATASETS

    if source.name not in DATASETS or source.name == "composite":
        import difflib

        near = difflib.get_close_matches(source.name, DATASETS, n=3) or sorted(DATASETS)[:3]
        raise ValueError(f"{source.name!r} is no data set of reasoning-gym; near it are {', '.join(near)}")
    if source.name in HASH_SEEDED and not os.environ.get("PYTHONHASHSEED", "random").isdecimal():
        raise ValueError(
            f"{source.name} draws other problems in every process unless PYTHONHASHSEED is set; set it to 0 in all"
        )
    if curriculum and source.name not in CURRICULA:
        raise ValueError(f"task.curriculum is True; {source.name} has no curriculum")
    known = inspect.signature(DATASETS[source.name][1]).parameters
    for name, _ in source.parameters:
        if name in ("seed", "size") or name not in known:
            others = ", ".join(each for each in known if each not in ("seed", "size"))
            raise ValueError(f"{source.name} has no parameter {name!r}; it has {others}")
    try:
        source.open(0)
    except Exception as error:  # its checks are assertions
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"{source.name} refuses its parameters: {type(error).__name__}: {told}") from None


def _level(progress: dict[str, Any], source: Source) -> int:
    return progress.get(source.name, NOWHERE)[0]
