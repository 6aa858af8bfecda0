"""The work that every peer does, and the pipe over which run.py asks for it. Needs NumPy alone, as peers share no more.

One round is one RL step of GRPO: 16 prompts of 16 tokens, 8 responses each, a reward, one update by AdamW. Responses
have exactly the lengths that lie in the folder, the same for all peers and in all rounds: 64 tokens each, or ragged.
The rollout is timed inside the round. Times are of the whole process, all its threads.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS, GROUP_SIZE, PROMPT_LENGTH, RESPONSE_LENGTH = 16, 8, 16, 64
ROWS = PROMPTS * GROUP_SIZE
VOCABULARY = 256
NO_TOKEN = VOCABULARY
"""The end and padding token: beyond the model's vocabulary, so that it is never sampled and ends no response."""
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0
BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8
CLIP = 0.2
LARGEST_LOGIT_ERROR = 1e-4
"""Between a peer's logits of the probe tokens and dcjax's."""

FIRST_CHARACTER = 0x4E00
"""Libraries that take text are given one character a token, from here on: none of them is white space."""


def text(tokens: Sequence[int]) -> str:
    """One character a token."""
    return "".join(chr(FIRST_CHARACTER + token) for token in tokens)


def tokens_of(characters: str) -> list[int]:
    """Undoes `text`."""
    return [ord(character) - FIRST_CHARACTER for character in characters]


def prompts(folder: Path) -> list[list[int]]:
    """The token ids of the 16 prompts, all of one length: no peer pads."""
    return np.load(folder / "prompts.npy").tolist()


def lengths(folder: Path) -> np.ndarray:
    """Tokens of each of the 128 responses, those to one prompt next to each other."""
    return np.load(folder / "lengths.npy")


def reward(response: Sequence[int]) -> float:
    """The share of even tokens."""
    return float(np.mean(np.asarray(response) % 2 == 0))


def check_logits(folder: Path, logits: Callable[[np.ndarray], Any]) -> float:
    """The largest difference of a peer's logits [B, S, V] of the probe tokens int [B, S] from dcjax's.

    Raises:
      SystemExit: it is not the same model.
    """
    probe = np.load(folder / "probe.npz")
    error = float(np.abs(np.asarray(logits(probe["tokens"])) - probe["logits"]).max())
    if not error <= LARGEST_LOGIT_ERROR:
        raise SystemExit(f"logits differ from dcjax's by {error:.1e}, more than {LARGEST_LOGIT_ERROR}")
    return error


class Timed:
    """A function that remembers what its last call took (CPU-seconds, seconds) and returned."""

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args, **kwargs):
        cpu, wall = time.process_time(), time.perf_counter()
        self.result = self._function(*args, **kwargs)
        self.seconds = (time.process_time() - cpu, time.perf_counter() - wall)
        return self.result


class Loop:
    """A library's own training loop in a thread, held before each step until `step` lets it go on."""

    def __init__(self):
        self._go, self._held = threading.Semaphore(0), threading.Semaphore(0)
        self._error: Exception | None = None

    def start(self, train: Callable[[], Any]) -> None:
        """Runs the loop up to its first `hold`."""
        threading.Thread(target=self._run, args=(train,), daemon=True).start()
        self._wait()

    def hold(self) -> None:
        """For the loop to call before each step."""
        self._held.release()
        self._go.acquire()

    def step(self) -> None:
        """One step of the loop."""
        self._go.release()
        self._wait()

    def _wait(self) -> None:
        self._held.acquire()
        if self._error is not None:
            raise RuntimeError("the training loop stopped") from self._error

    def _run(self, train: Callable[[], Any]) -> None:
        try:
            train()
            raise RuntimeError("it ended by itself")
        except Exception as error:
            self._error = error
            self._held.release()


def serve(
    about: dict[str, Any],
    *,
    step: Callable[[], Any],
    rollout: Timed,
    sampled: Callable[[Any], Sequence[Sequence[int]]],
    parameters: Callable[[], list[np.ndarray]],
    lengths: np.ndarray,
) -> None:
    """Answers run.py line by line: first `about` with the number of parameters, then each round, then what has moved.

    Args:
      about: versions and the logit error.
      step: one RL step, done when it returns; calls `rollout` once.
      rollout: samples the responses.
      sampled: of what `rollout` returned, the tokens of the 128 responses that are trained on.
      parameters: the policy's, copied to the host.
      lengths: tokens that each response must have.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints goes to the log

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    start, whole, previous = parameters(), Timed(step), None
    answer(**about, parameters=sum(leaf.size for leaf in start))
    while sys.stdin.readline().strip() == "round":
        whole()
        responses = sampled(rollout.result)
        tokens = np.concatenate(responses).astype(np.int32)
        if [len(response) for response in responses] != lengths.tolist():
            raise SystemExit(f"sampled {len(responses)} responses, {len(tokens)} tokens, not the {lengths.sum()} asked")
        if tokens.min() < 0 or tokens.max() >= VOCABULARY:
            raise SystemExit(f"sampled tokens from {tokens.min()} to {tokens.max()}")
        if (checksum := zlib.crc32(tokens.tobytes())) == previous:
            raise SystemExit("sampled the same tokens as in the round before")
        previous = checksum
        answer(rollout=rollout.seconds, step=whole.seconds)
    changes = np.concatenate([np.abs(new - old).ravel() for new, old in zip(parameters(), start, strict=True)])
    answer(moved=float(np.mean(changes > 0)), largest_change=float(changes.max()))
