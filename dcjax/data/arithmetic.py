r"""Chained arithmetic: a task small enough to learn on a laptop, where thinking aloud visibly pays.

The prompt `12-4-4+3-2-4=` may be answered at once, `\boxed{1}`, or after the intermediate results,
`12-4=8,8-4=4,4+3=7,7-2=5,5-4=1,\boxed{1}`. Problems are pure functions of their indices: nothing is stored,
and a resumed run sees the same prompts.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dcjax.data.task import Demonstration, Split, Task
from dcjax.rewards.boxed import integer_reward
from dcjax.rewards.processes import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BOX = r"\boxed{"  # one token
_SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
_VOCABULARY = (*_SPECIAL_TOKENS, *"0123456789+-=,", _BOX, "}")

# Second component of every seed. Demonstrations have a stream of their own: whatever the warm start draws,
# reinforcement learning sees the same prompts.
_STREAMS = {"train": 0, "heldout": 1, "demonstrations": 2}

_HELDOUT_ONE_IN = 10
_MAX_DRAWS = 10_000  # a tenth of a usual task's problems are held out: this many misses happen once in 10^457


@dataclass(frozen=True)
class Chain:
    """A start value and the operations on it, in order: (12, (("-", 4), ("+", 3))) asks for 12-4+3."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        """`12-4+3=`"""
        return f"{self.start}{''.join(f'{sign}{operand}' for sign, operand in self.steps)}="

    @property
    def values(self) -> tuple[int, ...]:
        """The running value: the start, then the result of each step."""
        values = [self.start]
        for sign, operand in self.steps:
            values.append(values[-1] + operand if sign == "+" else values[-1] - operand)
        return tuple(values)

    @property
    def scratchpad(self) -> str:
        """`12-4=8,8+3=11,`"""
        values = self.values
        return "".join(
            f"{before}{sign}{operand}={after},"
            for before, (sign, operand), after in zip(values[:-1], self.steps, values[1:], strict=True)
        )

    @property
    def answer(self) -> str:
        """`11`"""
        return str(self.values[-1])

    @property
    def boxed(self) -> str:
        r"""`\boxed{11}`"""
        return f"{_BOX}{self.answer}}}"

    def response(self, scratchpad: bool) -> str:
        """A right response, with or without the intermediate results before the box; no end token."""
        return self.scratchpad + self.boxed if scratchpad else self.boxed


@dataclass(frozen=True)
class ArithmeticTask(Task):
    """A distribution over problems, and its division into two disjoint splits.

    The start value is uniform on 0..max_value, the number of operations on min_operations..max_operations,
    and each operation on those with an operand of 1..max_operand that keep the running value in 0..max_value.
    One problem in ten is held out, by a checksum of its prompt: it is so under every seed.

    Raises:
        ValueError: a field is out of range.
    """

    min_operations: int = 3
    """Fewest operations in a problem."""
    max_operations: int = 5
    """Most operations in a problem."""
    max_operand: int = 9
    """Largest operand."""
    max_value: int = 20
    """Largest running value; the smallest is 0."""

    def __post_init__(self) -> None:
        if self.min_operations < 1:
            raise ValueError(f"task.min_operations is {self.min_operations}; it must be at least 1")
        if self.max_operations < self.min_operations:
            raise ValueError(
                f"task.max_operations is {self.max_operations}; "
                f"it must be at least min_operations, which is {self.min_operations}"
            )
        if self.max_operand < 1:
            raise ValueError(f"task.max_operand is {self.max_operand}; it must be at least 1")
        if self.max_value < 1:
            raise ValueError(f"task.max_value is {self.max_value}; it must be at least 1")

    def problem(self, split: Split, seed: int, index: int) -> Chain:
        """Problem `index` of a split: a pure function of the task and the arguments.

        Args:
            split: "train" or "heldout".
            seed: not negative.
            index: not negative. Different ones may draw equal problems.

        Raises:
            ValueError: an unknown split, a negative number, or a task so small that the split is empty.
        """
        if split not in ("train", "heldout"):
            raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
        return _draw(self, split, np.random.default_rng([seed, _STREAMS[split], index]))

    def problems(self, split: Split, seed: int, start: int, count: int) -> list[Chain]:
        """Problems start, start + 1, ..., start + count - 1 of a split; raises what `problem` raises."""
        return [self.problem(split, seed, index) for index in range(start, start + count)]

    @property
    def reward(self) -> Reward:
        """A box that holds the integer."""
        return integer_reward

    def build_tokenizer(self, pretrained: Path | None) -> "PreTrainedTokenizerFast":
        """The task's own, whatever the model starts from."""
        return build_tokenizer()

    def demonstrations(self, *, seed: int, step: int, count: int, scratchpad_fraction: float) -> list[Demonstration]:
        """Problems of the train split with right responses; each has a scratchpad with the given probability.

        Raises:
            ValueError: scratchpad_fraction is out of range.
        """
        if not 0.0 <= scratchpad_fraction <= 1.0:
            raise ValueError(f"scratchpad_fraction is {scratchpad_fraction}; it must be between 0 and 1")
        generator = np.random.default_rng([seed, _STREAMS["demonstrations"], step])
        thinks = (generator.random(count) < scratchpad_fraction).tolist()
        problems = [_draw(self, "train", generator) for _ in range(count)]
        pairs = zip(problems, thinks, strict=True)
        return [Demonstration(problem.prompt, problem.response(scratchpad)) for problem, scratchpad in pairs]

    def open(self, tokenizer: "PreTrainedTokenizerFast") -> "ArithmeticTask":
        """Itself: nothing is stored."""
        return self

    @property
    def golds(self) -> tuple[()]:
        """Empty: the task's own answers are integers."""
        return ()

    @property
    def fingerprint(self) -> dict[str, str]:
        """Empty: the task itself says all."""
        return {}

    @functools.cached_property
    def max_prompt_length(self) -> int:
        """Tokens of the longest prompt, including the equals sign."""
        return _longest_chain(
            self,
            start_length=_digits,
            step_length=lambda before, operand, after: 1 + _digits(operand),
            end_length=lambda answer: 1,
        )

    @functools.cached_property
    def max_response_length(self) -> int:
        """Tokens of the longest right response: scratchpad, box and end token."""
        return _longest_chain(
            self,
            start_length=lambda start: 0,
            step_length=lambda before, operand, after: _digits(before) + _digits(operand) + _digits(after) + 3,
            end_length=lambda answer: _digits(answer) + 3,  # the box opens, closes, and the end token follows
        )


def _digits(number: int) -> int:
    return len(str(number))


def _longest_chain(
    task: ArithmeticTask,
    *,
    start_length: Callable[[int], int],
    step_length: Callable[[int, int, int], int],
    end_length: Callable[[int], int],
) -> int:
    """The most tokens any problem of the task takes, in either split, where its parts have the given lengths.

    Dynamic programming over the running value; more operations always take more tokens. Taking every number
    at its widest would be shorter and wrong: with max_value 10 the value cannot stay at two digits.

    Args:
        start_length: of the start value.
        step_length: of a step's (value before, operand, value after).
        end_length: of the last value.
    """
    values = range(task.max_value + 1)
    lengths = [start_length(value) for value in values]
    for _ in range(task.max_operations):
        lengths = [
            max(
                lengths[before] + step_length(before, abs(after - before), after)
                for before in values[max(0, after - task.max_operand) : after + task.max_operand + 1]
                if before != after
            )
            for after in values
        ]
    return max(length + end_length(value) for value, length in zip(values, lengths, strict=True))


def _draw(task: ArithmeticTask, split: Split, generator: np.random.Generator) -> Chain:
    """The next problem of a split from `generator`: random problems, until one belongs to the split."""
    for _ in range(_MAX_DRAWS):
        # All the uniforms a problem can need in one call: the cost of a problem is that of calls into NumPy.
        problem = _random_problem(task, generator.random(2 + task.max_operations).tolist())
        heldout = zlib.crc32(problem.prompt.encode()) % _HELDOUT_ONE_IN == 0
        if heldout == (split == "heldout"):
            return problem
    raise ValueError(f"task: {task} has no {split!r} problem in {_MAX_DRAWS} draws; give it a larger range of problems")


def _random_problem(task: ArithmeticTask, uniforms: Sequence[float]) -> Chain:
    """A problem of either split from 2 + max_operations numbers in [0, 1)."""
    value = start = int(uniforms[0] * (task.max_value + 1))
    operations = task.min_operations + int(uniforms[1] * (task.max_operations - task.min_operations + 1))
    steps = []
    for uniform in uniforms[2 : 2 + operations]:
        largest_minus = min(value, task.max_operand)
        largest_plus = min(task.max_value - value, task.max_operand)
        choice = int(uniform * (largest_minus + largest_plus))
        change = -(choice + 1) if choice < largest_minus else choice - largest_minus + 1
        steps.append(("-" if change < 0 else "+", abs(change)))
        value += change
    return Chain(start, tuple(steps))


def build_tokenizer() -> "PreTrainedTokenizerFast":
    r"""The task's tokenizer: a token for each character and one for `\boxed{`, 19 with the special ones.

    Special are <pad>, <eos> and <unk>, which stands for any character the task does not use. The tokenizer
    adds no beginning or end by itself, and decoding what it encoded gives the text back exactly.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad, eos, unk = _SPECIAL_TOKENS
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(_VOCABULARY)}, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without a decoder, tokens are joined by spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
    )
