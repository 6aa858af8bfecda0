"""`dcjax serve` under load, under nonsense, and for a long time: every answer is checked, and its cost measured.

    python benchmarks/serving_load.py load [--model smollm2] [--requests 1000] [--long TOKENS] [--waiting N]
    python benchmarks/serving_load.py fuzz [--rounds 20] [--seed 0]
    python benchmarks/serving_load.py soak [--minutes 15] [--reload 5]

- load: several client processes send all requests at once: long and short ones, ones that are cancelled midway, too
  large ones and malformed ones. Tokens of each answer are those that the engine's own loop (`sample_responses`) samples
  with the same key in this process, in float32. Times are of a saturated server, queueing included; beside them stand
  those of single requests. CPU-seconds a token are the server process's, beside those of the loop.
- fuzz: random bytes as messages, valid messages of random fields, random metadata, and bytes that are no HTTP/2. The
  server must stay alive and small, fail at nothing itself (UNKNOWN, INTERNAL), and answer a normal request as before.
- soak: steady load with cancellations while newer checkpoints appear (copies of one, so that each seed has one right
  answer), and the server's memory, threads and open files every 10 seconds.

The tiny model is a run of one step that it trains itself; smollm2 has SmolLM2-135M's sizes and random weights, as a
Hugging Face folder. The exit status is 1 if an answer is wrong or lost.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from depth import WIDTHS  # pyrefly: ignore[missing-import]  (beside this file)
from serving_clients import (  # pyrefly: ignore[missing-import]
    Seen,
    Server,
    Work,
    ask,
    ask_all,
    from_processes,
    open_channel,
    proto,
    served,
)
from timing import environment  # pyrefly: ignore[missing-import]

from dcjax.allocator import keep_freed_memory
from dcjax.data.tokenizers import byte_tokenizer
from dcjax.models import init_params, save_hf
from dcjax.recipe.build import build_engine
from dcjax.serving.rollout import Sampling, sample_keys, sample_responses
from dcjax.serving.server.contract import STOP
from dcjax.serving.server.grpc.wire import Asked
from dcjax.tools.open_model import OpenedModel, open_model
from dcjax.types import Rollout

RESULTS = Path(__file__).parent / "results"
TRAIN = ["--steps", "1", "--warm_start.steps", "5", "--warm_start.warmup_steps", "1", "--evaluation.prompts", "8"]
TRAIN += ["--rollout.prompts", "4", "--rollout.group_size", "4", "--serving.format", "float32"]
"""Of the quickstart's recipe: a run that is served in float32."""
SHARES = {"long": 0.4, "short": 0.3, "cancelled": 0.14, "too large": 0.08, "malformed": 0.08}
"""Kinds of requests, and how many of all they are."""
REFUSED = ("too large", "malformed")
PROMPTS = 16
"""Different prompts, in turn as text and as tokens."""
ALONE = 20
"""Requests that are sent one after another to a server that does nothing else."""
CLOSE = 1e-4
"""How far a log-prob may be from the loop's, in nats: batches of other shapes round float32 differently."""
SAMPLE_EVERY, WORKERS, PAUSE = 10.0, 16, 0.05
"""Of the soak: seconds between two looks at the process, requests at once, and each one's pause before the next (s)."""

OWN_FAULTS = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED")
"""Statuses of a server that fails, rather than of a request that does."""

GROWTH = 256
"""MiB that nonsense may take for good."""


@dataclass(frozen=True)
class Subject:
    """A policy that is served, and what it answers."""

    source: Path
    options: list[str]
    model: OpenedModel
    # token ids, and the same as texts
    prompts: list[list[int]]
    texts: list[str]
    # samples of each prompt at most; further requests ask for the same ones again
    group: int
    # tokens of a long response
    long: int


@dataclass(frozen=True)
class Direct:
    """What the engine's own loop samples: each sample in full, [N, T], and its cost (CPU-seconds a token)."""

    rollout: Rollout
    keys: np.ndarray
    cpu: float


# --- what is served ---


def open_subject(source: Path, options: dict[str, int | str], group: int = 1000, long: int | None = None) -> Subject:
    """A run or a folder with `dcjax serve`'s options, and prompts that its tokenizer reads back as they were.

    Args:
      source: the run or folder.
      options: names and values.
      group: samples of each prompt at most.
      long: tokens of a long response; None are as many as are served.
    """
    names = ("max_prompt_length", "max_response_length")
    lengths = {name: options[name] for name in names if name in options}
    serving = {name: value for name, value in options.items() if name not in lengths}
    model = open_model(source, serving=serving, rollout=lengths)
    decode, vocabulary = model.tokenizer.backend_tokenizer.decode, model.tokenizer.get_vocab().values()
    shown = [(token, decode([token], skip_special_tokens=True)) for token in sorted(vocabulary)]
    usable = [token for token, text in shown if len(text) == 1 and text.isascii() and text.isprintable()]
    draw = random.Random(0)
    limits = model.config.rollout
    chosen = [draw.choices(usable, k=draw.randint(1, limits.max_prompt_length)) for _ in range(PROMPTS)]
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    texts = [decode(prompt) for prompt in chosen]
    return Subject(source, flags, model, chosen, texts, group, limits.max_response_length if long is None else long)


def tiny(folder: Path) -> Subject:
    """The quickstart's model after one step."""
    run = folder / "run"
    command = [sys.executable, "-m", "dcjax", "train", "quickstart", "--run-dir", str(run), *TRAIN]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return open_subject(run, {})


def smollm2(folder: Path) -> Subject:
    """SmolLM2-135M's sizes; few slots and tokens, and 96 different samples, so that it takes minutes on two cores."""
    tokenizer, source = byte_tokenizer(), folder / "smollm2"
    tokenizer.save_pretrained(folder / "tokenizer")
    save_hf(source, WIDTHS, init_params(WIDTHS, jax.random.key(0)), tokenizer_from=folder / "tokenizer")
    sizes = {"slots": 8, "steps_per_call": 4, "max_prompt_length": 16, "max_response_length": 48}
    return open_subject(source, {"format": "float32", **sizes}, group=6, long=8)


def sample_directly(subject: Subject, group: int) -> Direct:
    """A group of samples of each prompt by the engine's own loop, all of them to their ends."""
    model, key = subject.model, jax.random.key(1)
    engine = build_engine(model.config, model.mesh, model.end_tokens)
    params = engine.sync(model.params(), model.step or 0)
    settings = {"samples_per_prompt": group, "temperature": model.config.rollout.temperature, "key": key}
    Sampling(engine, params, subject.prompts, **settings).advance(params)
    began = time.process_time()
    rollout = sample_responses(engine, params, subject.prompts, **settings)
    taken = time.process_time() - began
    keys = np.asarray(sample_keys(key, np.arange(group * len(subject.prompts))))
    return Direct(rollout, keys, taken / int(rollout.response_mask.sum()))


# --- requests ---


def valid(subject: Subject, keys: np.ndarray, number: int, limit: int, version: int = 0, **of_work: Any) -> Work:
    """A request for one of the direct samples: of every second prompt as text."""
    sample = number % len(keys)
    row = sample // (len(keys) // len(subject.prompts))
    content: dict[str, Any] = (
        {"text_content": proto.DecodeRequest.TextContent(text=subject.texts[row])}
        if row % 2
        else {"token_content": proto.DecodeRequest.TokenContent(token_ids=subject.prompts[row])}
    )
    high, low = keys[sample].tolist()
    asked = Asked(seed=high << 32 | low, log_probs=True, weights_version=version)
    message = proto.DecodeRequest(max_tokens=limit, **content).SerializeToString()
    return Work(number, message=message, metadata=asked.to_metadata(), **of_work)


def invalid(subject: Subject, number: int, kind: str, draw: random.Random) -> Work:
    """A request that is to be refused."""
    limits, (prompt, metadata) = subject.model.config.rollout, ([1], [])
    tokens, fields = proto.DecodeRequest.TokenContent, {}
    if kind == "too large":
        prompt, fields = draw.choice(
            [([1] * (limits.max_prompt_length + 1), {}), ([1], {"max_tokens": limits.max_response_length + 1})]
        )
    else:
        prompt, metadata = draw.choice(
            [
                ([], []),
                ([subject.model.config.model.vocab_size], []),
                ([-1], []),
                ([1], [("dcjax-sneed", "1")]),
                ([1], [("dcjax-seed", "one")]),
            ]
        )
    message = proto.DecodeRequest(token_content=tokens(token_ids=prompt), **fields).SerializeToString()
    return Work(number, kind, message, metadata)


def draw_kinds(total: int) -> tuple[list[str], int]:
    """Kinds of so many requests, those that are sampled first, and how many these are."""
    kinds = random.Random(0).choices(list(SHARES), list(SHARES.values()), k=total)
    kinds.sort(key=lambda kind: kind in REFUSED)
    return kinds, sum(kind not in REFUSED for kind in kinds)


def plan(subject: Subject, kinds: Sequence[str], keys: np.ndarray) -> list[Work]:
    """Requests in the order that they are sent; the direct samples are numbered as those that are sampled."""
    draw, works = random.Random(1), []
    for number, kind in enumerate(kinds):
        if kind in REFUSED:
            works.append(invalid(subject, number, kind, draw))
            continue
        limit = draw.randint(1, 4) if kind == "short" else subject.long
        parts = draw.randint(0, 2) if kind == "cancelled" else None
        works.append(valid(subject, keys, number, limit, kind=kind, parts=parts))
    draw.shuffle(works)
    return works


# --- answers ---


def fault_of(subject: Subject, direct: Rollout, limit: int, seen: Seen, versions: tuple[int, int]) -> str | None:
    """What is wrong with an answer to a valid request, or with its beginning if it was cancelled.

    Args:
      direct: the right samples.
      limit: of the request (tokens).
      seen: the answer.
      versions: of the weights that it may be from, the oldest and the newest.
    """
    number, width = seen.work.number % len(direct.tokens), direct.response_mask.shape[1]
    mask = direct.response_mask[number].copy()
    mask[limit:] = False
    right = direct.tokens[number, -width:][mask].tolist()
    if seen.status == "CANCELLED":
        return None if seen.tokens == right[: len(seen.tokens)] else f"{seen.tokens} do not begin {right}"
    if seen.tokens != right:
        return f"the tokens are {seen.tokens}, not {right}"
    answer = seen.answer
    if answer is None or not len(seen.tokens) == len(answer.log_probs or ()) == len(answer.versions):
        return f"{len(seen.tokens)} tokens have other numbers of log-probs or versions"
    apart = np.abs(np.array(answer.log_probs) - direct.rollout_logps[number][mask]).max()
    if not apart <= CLOSE:
        return f"log-probs are {apart} from the loop's"
    if list(answer.versions) != sorted(answer.versions) or not versions[0] <= answer.versions[0] <= versions[1]:
        return f"versions are {answer.versions}, not from {versions[0]} to {versions[1]}"
    ended = bool(direct.finished[number]) and len(right) == direct.response_mask[number].sum()
    if (answer.finish_reason == STOP) != ended:
        return f"the reason to finish is {answer.finish_reason}"
    if number // (len(direct.tokens) // len(subject.prompts)) % 2:
        text = subject.model.tokenizer.backend_tokenizer.decode(right[: len(right) - ended], skip_special_tokens=True)
        return None if seen.text == text else f"the text is {seen.text!r}, not {text!r}"
    return None


def faults_of(subject: Subject, direct: Rollout, works: list[Work], answers: list[Seen], full: bool) -> list[str]:
    """What is wrong with the answers to a plan; `full` is whether the server may refuse for want of room."""
    step = subject.model.step or 0
    numbers = Counter(seen.work.number for seen in answers)
    faults = [f"request {work.number}: {numbers[work.number]} answers" for work in works if numbers[work.number] != 1]
    for seen in answers:
        kind, number = seen.work.kind, seen.work.number
        legal = {"cancelled": {"CANCELLED", "OK"}, "long": {"OK"}, "short": {"OK"}}.get(kind, {"INVALID_ARGUMENT"})
        if seen.status == "RESOURCE_EXHAUSTED" and full:
            continue
        fault = None
        if seen.status not in legal:
            fault = f"the status is {seen.status}: {seen.details}"
        elif "INVALID_ARGUMENT" not in legal:
            limit = proto.DecodeRequest.FromString(seen.work.message).max_tokens
            fault = fault_of(subject, direct, limit, seen, (step, step))
        if fault:
            faults.append(f"request {number}, {kind}: {fault}")
    return faults


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile of seconds."""
    return {f"p{rank}": round(float(np.percentile(values, rank)) * 1e3, 1) for rank in (50, 99)}


# --- load ---


def load(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Figures and faults."""
    subject = MODELS[args.model](folder)
    subject = dataclasses.replace(subject, long=args.long or subject.long)
    kinds, sampled = draw_kinds(args.requests)
    direct = sample_directly(subject, min(math.ceil(sampled / len(subject.prompts)), subject.group))
    works = plan(subject, kinds, direct.keys)
    waiting = args.requests if args.waiting is None else args.waiting
    with served(subject.source, *subject.options, "--waiting", str(waiting)) as server:
        alone = one_by_one(server, [work for work in works if work.kind == "long"][:ALONE])
        before, cpu = server.rss(), server.cpu()
        answers = from_processes(server.port, works, args.clients)
        figures = figures_of(answers, server.cpu() - cpu, direct.cpu)
        figures["rss"] = {"before": round(before), "after": round(server.rss())}
    figures["alone"] = times_of(alone)
    faults = faults_of(subject, direct.rollout, works, answers, waiting < args.requests)
    held = {"slots": subject.model.config.serving.slots, "waiting": waiting, "long": subject.long}
    return held | figures, faults


def one_by_one(server: Server, works: Sequence[Work]) -> list[Seen]:
    """Answers of a server that has nothing else to do."""

    async def run() -> list[Seen]:
        async with open_channel(server.port) as channel:
            return [await ask(channel, work) for work in works]

    return asyncio.run(run())


def times_of(answers: Sequence[Seen]) -> dict[str, Any]:
    """Milliseconds from sending to the first tokens and to the end, of answers that are whole."""
    whole = [seen for seen in answers if seen.status == "OK"]
    times = {"first tokens": [seen.first for seen in whole], "request": [seen.seconds for seen in whole]}
    return {
        name: {f"p{rank}": round(float(np.percentile(values, rank)) * 1e3, 1) for rank in (50, 99)}
        for name, values in times.items()
    }


def figures_of(answers: Sequence[Seen], server_cpu: float, direct_cpu: float) -> dict[str, Any]:
    """What the JSON says of a load."""
    tokens = sum(len(seen.tokens) for seen in answers)
    wall = max(seen.began + seen.seconds for seen in answers) - min(seen.began for seen in answers)
    return {
        "statuses": {kind: dict(Counter(s.status for s in answers if s.work.kind == kind)) for kind in SHARES},
        "tokens": tokens,
        "seconds": round(wall, 2),
        "tokens_per_second": round(tokens / wall, 1),
        "saturated": times_of(answers),
        "server_cpu_milliseconds_a_token": round(server_cpu / tokens * 1e3, 4),
        "direct_cpu_milliseconds_a_token": round(direct_cpu * 1e3, 4),
        "ratio": round(server_cpu / tokens / direct_cpu, 3),
    }


# --- fuzz ---


def nonsense(draw: random.Random, number: int, vocabulary: int) -> Work:
    """A request of random bytes, of random fields, or of random metadata."""
    kind = draw.choice(["bytes", "fields", "metadata"])
    message, metadata = proto.DecodeRequest(token_content={"token_ids": [1]}).SerializeToString(), []
    if kind == "bytes":
        message = draw.randbytes(draw.choice([0, 1, 3, 10, 100, 10_000, 5_000_000 if number == 0 else 50]))
    elif kind == "fields":
        message = random_fields(draw, vocabulary).SerializeToString()
    else:
        metadata = [random_setting(draw) for _ in range(draw.randint(1, 4))]
    return Work(number, kind, message, metadata, parts=draw.choice([None, None, 0, 1]))


def random_fields(draw: random.Random, vocabulary: int) -> Any:
    """A DecodeRequest that is one, whatever it asks for."""
    integer = partial(draw.choice, [0, 1, -1, 5, 2**31 - 1, -(2**31), vocabulary, vocabulary - 1])
    request = proto.DecodeRequest(priority=integer(), max_tokens=integer())
    if draw.random() < 0.2:
        request.session_cache = draw.choice(["a", "\0", "é" * 5000])
    if draw.random() < 0.5:
        request.text_content.text = "".join(
            chr(draw.choice([0, 10, 48, 61, 233, 0x1F600])) for _ in range(length(draw))
        )
    elif draw.random() < 0.9:
        request.token_content.token_ids.extend(integer() for _ in range(length(draw)))
    return request


def length(draw: random.Random) -> int:
    """Of a prompt, mostly one that would do."""
    return draw.choice([0, 1, 2, 3, 10, 14, 1000])


def random_setting(draw: random.Random) -> tuple[str, str | bytes]:
    """A pair of metadata that gRPC sends."""
    names = [field.name.replace("_", "-") for field in dataclasses.fields(Asked)]
    values = [
        "",
        "0",
        "1",
        "-1",
        "nan",
        "inf",
        "1e400",
        "1e-46",
        "0.5",
        "true",
        "1,2",
        ",",
        "1," * 50,
        "9" * 30,
        "9" * 5000,
    ]
    values += ["".join(chr(draw.randint(32, 126)) for _ in range(20)).strip()]
    key = "dcjax-" + draw.choice([*names, "log-probs-bin", "x" * 100])
    return (key, draw.randbytes(20)) if key.endswith("-bin") else (key, draw.choice(values))


def no_http(port: int, draw: random.Random) -> None:
    """Bytes that are no gRPC on a connection of their own, which is closed, or left behind half open for a moment."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        preface = draw.choice([b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
        connection.sendall(preface + draw.randbytes(draw.choice([0, 9, 1000])))


def fuzz(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Figures and faults: rounds of 100 requests and 5 connections, and a normal request behind each."""
    subject, draw = tiny(folder), random.Random(args.seed)
    direct = sample_directly(subject, 1)
    statuses: dict[str, Counter] = {"bytes": Counter(), "fields": Counter(), "metadata": Counter()}
    faults = []

    async def one_round(port: int, turn: int) -> None:
        for _ in range(5):
            await asyncio.to_thread(no_http, port, draw)
        works = [nonsense(draw, number, subject.model.config.model.vocab_size) for number in range(99)]
        works.append(Work(99, "fields", proto.DecodeRequest(text_content={"text": "1+2=" * 10**6}).SerializeToString()))
        for seen in await ask_all(port, works):
            statuses[seen.work.kind][seen.status] += 1
            if seen.status in OWN_FAULTS:
                faults.append(f"{seen.work}: {seen.status}: {seen.details}")
        (seen,) = await ask_all(port, [valid(subject, direct.keys, turn % PROMPTS, subject.long, kind="long")])
        if fault := fault_of(subject, direct.rollout, subject.long, seen, (1, 1)):
            faults.append(f"a normal request after round {turn}: {fault}")

    async def all_rounds(port: int) -> None:
        for turn in range(args.rounds):
            await one_round(port, turn)

    with served(subject.source, *subject.options) as server:
        before = server.rss()
        asyncio.run(all_rounds(server.port))
        rss = {"before": round(before), "after": round(server.rss())}
    if rss["after"] - rss["before"] > GROWTH:
        faults.append(f"the server's memory has grown from {rss['before']} to {rss['after']} MiB")
    figures = {"rounds": args.rounds, "seed": args.seed, "rss": rss}
    return figures | {"statuses": {kind: dict(counts) for kind, counts in statuses.items()}}, faults


# --- soak ---


class Soak:
    """Steady load on a server whose weights change under it, until a time.

    Args:
      subject: a run.
      direct: what it answers, whichever copy of its checkpoint is served.
      server: of it.
      reload: seconds between two new checkpoints.
      seconds: how long.
    """

    def __init__(self, subject: Subject, direct: Direct, server: Server, *, reload: float, seconds: float):
        self._subject, self._direct, self._server, self._reload = subject, direct, server, reload
        self._began = time.monotonic()
        self._until, self.newest = self._began + seconds, subject.model.step or 0
        self.statuses: Counter = Counter()
        self.faults: list[str] = []
        # minutes, RSS in MiB, threads, open files, requests until then, newest version
        self.looks: list[tuple[float, ...]] = []

    async def run(self) -> None:
        """Loads, saves and looks until the time is over."""
        async with open_channel(self._server.port) as channel, asyncio.TaskGroup() as group:
            for number in range(WORKERS):
                group.create_task(self._work(channel, random.Random(number)))
            group.create_task(self._every(self._reload, lambda: asyncio.to_thread(self._save)))
            group.create_task(self._every(SAMPLE_EVERY, self._look))

    async def _every(self, seconds: float, act: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() + seconds < self._until:
            await asyncio.sleep(seconds)
            await act()

    async def _work(self, channel: Any, draw: random.Random) -> None:
        keys, longest = self._direct.keys, self._subject.long
        while time.monotonic() < self._until:
            parts = draw.randint(0, 2) if draw.random() < 0.2 else None
            version = self.newest if draw.random() < 0.1 else 0
            number = draw.randrange(len(keys))
            seen = await ask(channel, valid(self._subject, keys, number, longest, version, kind="soak", parts=parts))
            self.statuses[seen.status] += 1
            within = (max(version, 1), self.newest)
            fault = f"the status is {seen.status}: {seen.details}" if seen.status not in ("OK", "CANCELLED") else None
            if fault := fault or fault_of(self._subject, self._direct.rollout, longest, seen, within):
                self.faults.append(f"request {number}: {fault}")
            await asyncio.sleep(2 * PAUSE * draw.random())

    def _save(self) -> None:
        """One more checkpoint appears as a whole, and the third before it goes."""
        checkpoints = self._subject.source / "checkpoints"
        copy = self._subject.source / "copy"
        shutil.copytree(checkpoints / str(self.newest), copy)
        # before it can be served
        self.newest += 1
        copy.rename(checkpoints / str(self.newest))
        shutil.rmtree(checkpoints / str(self.newest - 3), ignore_errors=True)

    async def _look(self) -> None:
        process = self._server.process
        minutes = (time.monotonic() - self._began) / 60
        counts = (process.num_threads(), process.num_fds(), self.statuses.total(), self.newest)
        self.looks.append((round(minutes, 2), round(self._server.rss(), 1), *counts))


def soak(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Figures and faults."""
    subject = tiny(folder)
    direct = sample_directly(subject, 16)
    with served(subject.source, *subject.options) as server:
        soaking = Soak(subject, direct, server, reload=args.reload, seconds=60 * args.minutes)
        asyncio.run(soaking.run())
    looks = np.array(soaking.looks)
    settled = looks[looks[:, 0] >= min(3, args.minutes / 3)]
    if args.picture:
        draw_soak(looks, args.picture)
    slopes = {
        name: round(float(np.polyfit(settled[:, 0] / 60, settled[:, column], 1)[0]), 2)
        for column, name in enumerate(("MiB", "threads", "files"), 1)
    }
    figures = {
        "minutes": args.minutes,
        "statuses": dict(soaking.statuses),
        "checkpoints": soaking.newest - 1,
        "slopes_per_hour": slopes,
        "first_settled_and_last": [settled[0].tolist(), settled[-1].tolist()],
        "looks": soaking.looks,
    }
    return figures, soaking.faults


def draw_soak(looks: np.ndarray, path: Path) -> None:
    """A picture of memory, threads and files over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    names = ("resident memory (MiB)", "threads", "open files")
    for axes, name, values in zip(figure.subplots(1, 3), names, looks.T[1:4], strict=True):
        axes.plot(looks[:, 0], values)
        axes.set(xlabel="minutes", ylabel=name, ylim=(0, 1.2 * values.max()))
    figure.savefig(path, dpi=150)


# --- command line ---

MODELS = {"tiny": tiny, "smollm2": smollm2}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(cores=0, rounds=1)
    commands = parser.add_subparsers(dest="what", required=True)
    loading = commands.add_parser("load", help="many requests at once")
    loading.add_argument("--model", choices=MODELS, default="tiny")
    loading.add_argument("--requests", type=int, default=1000, help="of all kinds (default: 1000)")
    loading.add_argument("--clients", type=int, default=4, help="processes that send them (default: 4)")
    loading.add_argument("--long", type=int, metavar="TOKENS", help="of a long response (default: 48, smollm2's: 8)")
    loading.add_argument("--waiting", type=int, metavar="N", help="of the server (default: room for all of them)")
    fuzzing = commands.add_parser("fuzz", help="nonsense")
    fuzzing.add_argument("--rounds", type=int, default=20, help="of 100 requests (default: 20)")
    fuzzing.add_argument("--seed", type=int, default=0, help="of the nonsense (default: 0)")
    soaking = commands.add_parser("soak", help="for a long time")
    soaking.add_argument("--minutes", type=float, default=15, help="how long (default: 15)")
    soaking.add_argument("--reload", type=float, default=5, help="seconds between new checkpoints (default: 5)")
    soaking.add_argument("--picture", type=Path, metavar="PATH", help="draw memory, threads and files there")
    for command in (loading, fuzzing, soaking):
        command.add_argument("--json", type=Path, metavar="PATH", help="add the figures to those that are there")
    return parser.parse_args()


def main() -> None:
    """Runs one of the three, prints and writes its figures, and fails where an answer was wrong."""
    args = parse()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        figures, faults = {"load": load, "fuzz": fuzz, "soak": soak}[args.what](args, Path(folder))
    name = args.what
    if name == "load":
        name = f"load {args.model}, {args.requests} requests, long ones of {figures['long']}"
    figures = {"faults": len(faults), **figures, "environment": environment(args)}
    print(json.dumps(figures, indent=2))
    if args.json:
        held = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(held | {name: figures}, indent=2) + "\n")
    if faults:
        sys.exit("\n".join(fault[:500] for fault in faults[:20]))


if __name__ == "__main__":
    main()
