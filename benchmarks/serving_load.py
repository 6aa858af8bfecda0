"""`dcjax serve` under load, under nonsense, at its end, and for long: every answer is checked, its cost measured.

    python benchmarks/serving_load.py load [--protocol http] [--model smollm2] [--requests 1000] [--long TOKENS]
    python benchmarks/serving_load.py fuzz [--rounds 20] [--seed 0]
    python benchmarks/serving_load.py ends [--protocol http]
    python benchmarks/serving_load.py soak [--protocol http] [--minutes 15] [--reload 5]

- load: several client processes send all requests at once: long and short ones, ones that are cancelled midway, too
  large ones and malformed ones; over HTTP also streams, slow readers, and what is no JSON or means harm. Tokens of each
  answer are those that the engine's own loop (`sample_responses`) samples with the same key in this process, in
  float32. Times are of a saturated server, queueing included; beside them stand those of single requests. CPU-seconds a
  token are the server process's, beside those of the loop.
- fuzz, over gRPC: random bytes as messages, valid messages of random fields, random metadata, and bytes that are no
  HTTP/2. The server must stay alive and small, fail at nothing itself (UNKNOWN, INTERNAL), and answer a normal request
  as before. (Over HTTP schemathesis does that, `tests/serving/server/http`.)
- ends: a server that is told to stop under load finishes what it has begun, and refuses what comes later; one that is
  killed leaves no wrong token behind, and the next one at its port answers as it did.
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
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import serving_grpc  # pyrefly: ignore[missing-import]  (beside this file)
import serving_http  # pyrefly: ignore[missing-import]
from serving_clients import Seen, Server, Work, ask_all, from_processes, served  # pyrefly: ignore[missing-import]
from serving_subject import (  # pyrefly: ignore[missing-import]
    MODELS,
    PROMPTS,
    Direct,
    Subject,
    sample_directly,
    tiny,
)
from timing import environment  # pyrefly: ignore[missing-import]

from dcjax.allocator import keep_freed_memory
from dcjax.serving.server.contract import STOP
from dcjax.types import Rollout

RESULTS = Path(__file__).parent / "results"
PROTOCOLS = {"grpc": serving_grpc, "http": serving_http}
ALONE = 20
"""Requests that are sent one after another to a server that does nothing else."""
CLOSE = 1e-4
"""How far a log-prob may be from the loop's, in nats: batches of other shapes round float32 differently."""
SAMPLE_EVERY, WORKERS, PAUSE = 10.0, 16, 0.05
"""Of the soak: seconds between two looks at the process, requests at once, and each one's pause before the next (s)."""

GROWTH = 256
"""MiB that nonsense may take for good."""


# --- requests ---


def draw_kinds(protocol: ModuleType, total: int) -> tuple[list[str], int]:
    """Kinds of so many requests, those that are sampled first, and how many these are."""
    kinds = random.Random(0).choices(list(protocol.SHARES), list(protocol.SHARES.values()), k=total)
    kinds.sort(key=lambda kind: kind in protocol.REFUSED)
    return kinds, sum(kind not in protocol.REFUSED for kind in kinds)


def plan(protocol: ModuleType, subject: Subject, kinds: Sequence[str], keys: np.ndarray) -> list[Work]:
    """Requests in the order that they are sent; the direct samples are numbered as those that are sampled."""
    draw, works = random.Random(1), []
    for number, kind in enumerate(kinds):
        if kind in protocol.REFUSED:
            works.append(protocol.invalid(subject, number, kind, draw))
            continue
        limit = draw.randint(1, 4) if kind == "short" else subject.long
        parts = draw.randint(0, 2) if kind == "cancelled" else None
        works.append(protocol.valid(subject, keys, number, limit, kind=kind, parts=parts))
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


def faults_of(
    protocol: ModuleType, subject: Subject, direct: Rollout, works: list[Work], answers: list[Seen], full: bool
) -> list[str]:
    """What is wrong with the answers to a plan; `full` is whether the server may refuse for want of room."""
    step = subject.model.step or 0
    numbers = Counter(seen.work.number for seen in answers)
    faults = [f"request {work.number}: {numbers[work.number]} answers" for work in works if numbers[work.number] != 1]
    for seen in answers:
        kind, number = seen.work.kind, seen.work.number
        legal = {protocol.REFUSAL} if kind in protocol.REFUSED else {"OK"}
        if seen.status == protocol.FULL and full:
            continue
        fault = None
        if seen.status not in legal | ({"CANCELLED"} if seen.work.parts is not None else set()):
            fault = f"the status is {seen.status}: {seen.details}"
        elif kind not in protocol.REFUSED:
            fault = fault_of(subject, direct, seen.work.limit, seen, (step, step))
        if fault:
            faults.append(f"request {number}, {kind}: {fault}")
    return faults


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile of seconds."""
    return {f"p{rank}": round(float(np.percentile(values, rank)) * 1e3, 1) for rank in (50, 99)}


# --- load ---


def load(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Figures and faults."""
    protocol, subject = PROTOCOLS[args.protocol], MODELS[args.model](folder)
    subject = dataclasses.replace(subject, long=args.long or subject.long)
    kinds, sampled = draw_kinds(protocol, args.requests)
    direct = sample_directly(subject, min(math.ceil(sampled / len(subject.prompts)), subject.group))
    works = plan(protocol, subject, kinds, direct.keys)
    waiting = args.requests if args.waiting is None else args.waiting
    with served(subject.source, *options_of(args.protocol, subject), "--waiting", str(waiting)) as server:
        alone = one_by_one(protocol, server, [work for work in works if work.kind == protocol.STREAM][:ALONE])
        before, cpu = server.rss(), server.cpu()
        answers = from_processes(protocol, server.port, works, args.clients)
        figures = figures_of(protocol, answers, server.cpu() - cpu, direct.cpu)
        figures["rss"] = {"before": round(before), "after": round(server.rss())}
    figures["alone"] = times_of(alone)
    faults = faults_of(protocol, subject, direct.rollout, works, answers, waiting < args.requests)
    held = {"slots": subject.model.config.serving.slots, "waiting": waiting, "long": subject.long}
    return held | figures, faults


def options_of(protocol: str, subject: Subject) -> list[str]:
    """Options of a server of a protocol."""
    return [*subject.options, "--protocol", protocol, *(["--log", "none"] if protocol == "http" else [])]


def one_by_one(protocol: ModuleType, server: Server, works: Sequence[Work]) -> list[Seen]:
    """Answers of a server that has nothing else to do."""

    async def run() -> list[Seen]:
        async with protocol.connected(server.port) as client:
            return [await protocol.ask(client, work) for work in works]

    return asyncio.run(run())


def times_of(answers: Sequence[Seen]) -> dict[str, Any]:
    """Milliseconds from sending to the first tokens and to the end, of answers that are whole."""
    whole = [seen for seen in answers if seen.status == "OK"]
    times = {"first tokens": [seen.first for seen in whole], "request": [seen.seconds for seen in whole]}
    return {
        name: {f"p{rank}": round(float(np.percentile(values, rank)) * 1e3, 1) for rank in (50, 99)}
        for name, values in times.items()
    }


def figures_of(protocol: ModuleType, answers: Sequence[Seen], server_cpu: float, direct_cpu: float) -> dict[str, Any]:
    """What the JSON says of a load."""
    tokens = sum(len(seen.tokens) for seen in answers)
    wall = max(seen.began + seen.seconds for seen in answers) - min(seen.began for seen in answers)
    return {
        "statuses": {kind: dict(Counter(s.status for s in answers if s.work.kind == kind)) for kind in protocol.SHARES},
        "tokens": tokens,
        "seconds": round(wall, 2),
        "tokens_per_second": round(tokens / wall, 1),
        "saturated": times_of(answers),
        "server_cpu_milliseconds_a_token": round(server_cpu / tokens * 1e3, 4),
        "direct_cpu_milliseconds_a_token": round(direct_cpu * 1e3, 4),
        "ratio": round(server_cpu / tokens / direct_cpu, 3),
    }


# --- fuzz ---


def fuzz(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Figures and faults: rounds of 100 requests and 5 connections, and a normal request behind each."""
    subject, draw, grpc = tiny(folder), random.Random(args.seed), serving_grpc
    direct = sample_directly(subject, 1)
    statuses: dict[str, Counter] = {"bytes": Counter(), "fields": Counter(), "metadata": Counter()}
    faults = []

    async def one_round(port: int, turn: int) -> None:
        for _ in range(5):
            await asyncio.to_thread(grpc.no_http, port, draw)
        works = [grpc.nonsense(draw, number, subject.model.config.model.vocab_size) for number in range(99)]
        large = grpc.proto.DecodeRequest(text_content={"text": "1+2=" * 10**6})
        works.append(Work(99, "fields", large.SerializeToString()))
        for seen in await ask_all(grpc, port, works):
            statuses[seen.work.kind][seen.status] += 1
            if seen.status in grpc.OWN_FAULTS:
                faults.append(f"{seen.work}: {seen.status}: {seen.details}")
        normal = grpc.valid(subject, direct.keys, turn % PROMPTS, subject.long, kind="long")
        (seen,) = await ask_all(grpc, port, [normal])
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


# --- ends ---


def ends(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Figures and faults of servers that are stopped, and killed, under load."""
    protocol, subject = PROTOCOLS[args.protocol], tiny(folder)
    direct, options = sample_directly(subject, 16), options_of(args.protocol, subject)
    kinds = [kind for kind in protocol.SHARES if kind not in (*protocol.REFUSED, "cancelled")]
    works = plan(protocol, subject, [kinds[number % len(kinds)] for number in range(256)], direct.keys)
    statuses, faults = {}, []
    port = 0
    for end in ("stopped", "killed"):
        with served(subject.source, *options, port=port, killed=end == "killed") as server:
            port = server.port
            asking = _Asking(protocol, port, works)
            asking.wait_for_some()
        answers = asking.result()
        statuses[end] = dict(Counter(seen.status for seen in answers))
        for seen in answers:
            # what was told before the end is right, and what was told whole is whole
            whole = seen if seen.status == "OK" else dataclasses.replace(seen, status="CANCELLED")
            step = subject.model.step or 0
            if fault := fault_of(subject, direct.rollout, seen.work.limit, whole, (step, step)):
                faults.append(f"{end}, request {seen.work.number}: {fault}")
            if end == "stopped" and seen.tokens and seen.status != "OK":
                faults.append(f"request {seen.work.number} had begun, and was not finished: {seen.status}")
    with served(subject.source, *options, port=port) as server:
        answers = asyncio.run(ask_all(protocol, server.port, works))
        statuses["after"] = dict(Counter(seen.status for seen in answers))
        faults += faults_of(protocol, subject, direct.rollout, works, answers, False)
    return {"statuses": statuses}, faults


class _Asking:
    """All requests at once, in a thread."""

    def __init__(self, protocol: ModuleType, port: int, works: Sequence[Work]):
        self._answers: list[Seen] = []
        self._some = threading.Event()

        async def one(client: Any, work: Work) -> None:
            self._answers.append(await protocol.ask(client, work))
            self._some.set()

        async def run() -> None:
            async with protocol.connected(port) as client:
                await asyncio.gather(*(one(client, work) for work in works))

        self._thread = threading.Thread(target=asyncio.run, args=(run(),))
        self._thread.start()

    def wait_for_some(self) -> None:
        """Until the first answer is whole."""
        self._some.wait()

    def result(self) -> list[Seen]:
        """All answers."""
        self._thread.join()
        return self._answers


# --- soak ---


class Soak:
    """Steady load on a server whose weights change under it, until a time.

    Args:
      protocol: that the server speaks.
      subject: a run.
      direct: what it answers, whichever copy of its checkpoint is served.
      server: of it.
      reload: seconds between two new checkpoints.
      seconds: how long.
    """

    def __init__(
        self,
        protocol: ModuleType,
        subject: Subject,
        direct: Direct,
        server: Server,
        *,
        reload: float,
        seconds: float,
    ):
        self._protocol = protocol
        self._subject, self._direct, self._server, self._reload = subject, direct, server, reload
        self._began = time.monotonic()
        self._until, self.newest = self._began + seconds, subject.model.step or 0
        self.statuses: Counter = Counter()
        self.faults: list[str] = []
        # minutes, RSS in MiB, threads, open files, requests until then, newest version
        self.looks: list[tuple[float, ...]] = []

    async def run(self) -> None:
        """Loads, saves and looks until the time is over."""
        async with self._protocol.connected(self._server.port) as client, asyncio.TaskGroup() as group:
            for number in range(WORKERS):
                group.create_task(self._work(client, random.Random(number)))
            group.create_task(self._every(self._reload, lambda: asyncio.to_thread(self._save)))
            group.create_task(self._every(SAMPLE_EVERY, self._look))

    async def _every(self, seconds: float, act: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() + seconds < self._until:
            await asyncio.sleep(seconds)
            await act()

    async def _work(self, client: Any, draw: random.Random) -> None:
        keys, longest = self._direct.keys, self._subject.long
        while time.monotonic() < self._until:
            parts = draw.randint(0, 2) if draw.random() < 0.2 else None
            version = self.newest if draw.random() < 0.1 else 0
            number = draw.randrange(len(keys))
            work = self._protocol.valid(self._subject, keys, number, longest, version, kind="soak", parts=parts)
            seen = await self._protocol.ask(client, work)
            self.statuses[seen.status] += 1
            within = (max(version, 1) if self._protocol is serving_grpc else 1, self.newest)
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
    with served(subject.source, *options_of(args.protocol, subject)) as server:
        soaking = Soak(PROTOCOLS[args.protocol], subject, direct, server, reload=args.reload, seconds=60 * args.minutes)
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
    ending = commands.add_parser("ends", help="a server that stops, or is killed")
    for command in (loading, ending, soaking):
        command.add_argument("--protocol", choices=PROTOCOLS, default="grpc")
    for command in (loading, fuzzing, ending, soaking):
        command.add_argument("--json", type=Path, metavar="PATH", help="add the figures to those that are there")
    return parser.parse_args()


def main() -> None:
    """Runs one of the four, prints and writes its figures, and fails where an answer was wrong."""
    args = parse()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        figures, faults = {"load": load, "fuzz": fuzz, "ends": ends, "soak": soak}[args.what](args, Path(folder))
    name = args.what if args.what == "fuzz" or args.protocol == "grpc" else f"{args.protocol} {args.what}"
    if args.what == "load":
        name = f"{name} {args.model}, {args.requests} requests, long ones of {figures['long']}"
    figures = {"faults": len(faults), **figures, "environment": environment(args)}
    print(json.dumps(figures, indent=2))
    if args.json:
        held = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(held | {name: figures}, indent=2) + "\n")
    if faults:
        sys.exit("\n".join(fault[:500] for fault in faults[:20]))


if __name__ == "__main__":
    main()
