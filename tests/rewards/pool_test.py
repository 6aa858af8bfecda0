import importlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from dcjax.rewards.math import math_reward
from dcjax.rewards.pool import Counters, RewardError, RewardPool

pytestmark = pytest.mark.heavy

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.append(HERE)
hostile = importlib.import_module("hostile_answers").hostile
functions = importlib.import_module("reward_functions")

LIMIT = 0.5
HANGS = ["spin_in_c", "ignore_signals"]


def obeying(**settings):
    return RewardPool(functions.obey, **{"workers": 2, "timeout": LIMIT} | settings)


def tell(pool, *orders):
    """Scores of (deed, argument)."""
    deeds, arguments = zip(*orders, strict=True)
    return pool.score(deeds, arguments, [True] * len(orders)).tolist()


def wait_until(condition, seconds=10.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)


def processes():
    """The server and the workers of this process's pools."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "dcjax.rewards.processes" in process.cmdline() or process.status() == psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture(autouse=True)
def no_process_is_left():
    before = len(processes())
    yield
    assert len(processes()) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "rewards"]


@pytest.mark.parametrize("workers", [1, 3])
def test_scores_are_in_the_order_of_the_texts(workers):
    texts = ["x" * (37 * n % 101) for n in range(300)]
    golds = ["y" * (n % 7) for n in range(300)]
    finished = [n % 5 > 0 for n in range(300)]
    with RewardPool(functions.length, workers=workers) as pool:
        scores = pool.score(texts, golds, finished)
    assert scores.dtype == np.float32
    expected = [(len(t) + 10 * len(g)) * f for t, g, f in zip(texts, golds, finished, strict=True)]
    assert scores.tolist() == expected
    assert pool.counters == Counters()


def test_workers_work_at_the_same_time_and_the_caller_meanwhile():
    with obeying(timeout=10.0) as pool:
        tell(pool, ("length", "1"))
        began = time.monotonic()
        pending = [pool.submit(["sleep"], ["0.4"], [True]) for _ in range(4)]
        submitted = time.monotonic()
        assert [p.result().tolist() for p in pending] == [[0.0]] * 4
        scored = time.monotonic()
    assert submitted - began < 0.4
    assert 0.8 <= scored - began < 1.6


def test_several_threads_may_submit():
    results = {}

    def ask(pool, number):
        results[number] = pool.score(["x" * number] * 50, ["y"] * 50, [True] * 50).tolist()

    with RewardPool(functions.length, workers=2) as pool:
        threads = [threading.Thread(target=ask, args=(pool, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: [number + 10.0] * 50 for number in range(8)}


def test_no_answers_have_no_scores():
    with RewardPool(functions.length, workers=1) as pool:
        assert pool.score([], [], []).shape == (0,)


@pytest.mark.parametrize("deed", HANGS)
def test_what_hangs_scores_zero_in_time_and_the_others_are_scored(deed):
    with obeying() as pool:
        tell(pool, ("length", "1"))
        began = time.monotonic()
        scores = tell(pool, ("length", "12"), (deed, ""), ("length", "123"), (deed, ""), ("length", "1234"))
        took = time.monotonic() - began
    assert scores == [2.0, 0.0, 3.0, 0.0, 4.0]
    assert LIMIT <= took < 4 * LIMIT
    assert pool.counters == Counters(timeouts=2, restarts=2)


def test_what_a_reward_does_at_its_first_call_is_in_no_answers_time():
    """Nor after a worker was replaced."""
    with RewardPool(functions.slow_at_first, workers=2, timeout=LIMIT) as pool:
        pending = pool.submit(["7"] * 5 + ["hang"] + ["7"] * 6, [str(2 * LIMIT)] * 12, [True] * 12)
        assert pending.result().tolist() == [1.0] * 5 + [0.0] + [1.0] * 6
    assert pool.counters == Counters(timeouts=1, restarts=1) and pending.timeouts == 1


@pytest.mark.parametrize(
    "reward, gold, told",
    [
        ("slow_at_first", "60", r"took more than warm_up, 0\.5 s; raise reward\.warm_up, or load less in it"),
        ("large_at_first", str(1 << 29), r"needs more than 256 MiB; raise reward\.memory"),
        *(
            ("dies_at_first", status, f"ended 2 workers, the last with status {status}; try it in a process of its own")
            for status in ("0", "3", "7")
        ),
    ],
)
def test_a_first_call_that_fails_ends_the_pool_clearly(reward, gold, told):
    with RewardPool(getattr(functions, reward), workers=1, timeout=9.0, memory=1 << 28, warm_up=LIMIT) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"the reward function's first call in a worker {told}"):
                pool.score(["7"] * 3, [gold] * 3, [True] * 3)


def test_memory_that_the_first_call_takes_is_not_the_answers():
    with RewardPool(functions.large_at_first, workers=1, memory=1 << 28, timeout=60.0) as pool:
        assert pool.score(["7"] * 3, [str(1 << 25)] * 3, [True] * 3).tolist() == [1.0] * 3
    assert pool.counters == Counters()


def test_what_takes_too_much_memory_scores_zero():
    with obeying(workers=1, memory=1 << 28) as pool:
        scores = tell(pool, ("allocate", str(1 << 26)), ("allocate", str(1 << 29)), ("length", "12"))
    assert scores == [float(1 << 26), 0.0, 2.0]
    assert pool.counters == Counters(memory_kills=1, restarts=1)


def test_a_worker_that_has_grown_is_replaced_and_loses_nothing():
    # time enough to take the memory, whatever else the machine does
    with obeying(workers=1, memory=1 << 28, timeout=60.0) as pool:
        processes = tell(pool, ("process", ""), ("keep", str(3 << 26)), ("keep", str(1 << 26)), ("process", ""))
    assert processes[0] == processes[1] != processes[2] == processes[3]
    assert pool.counters == Counters(restarts=1)


@pytest.mark.parametrize("deed", [("die", ""), ("leave", "0"), ("leave", "3")], ids=" ".join)
def test_an_answer_at_which_two_workers_die_scores_zero(deed):
    with obeying() as pool:
        scores = tell(pool, ("length", "12"), deed, ("length", "123"))
    assert scores == [2.0, 0.0, 3.0]
    assert pool.counters == Counters(restarts=2)


def test_an_answer_at_which_a_worker_dies_once_is_scored_by_another(tmp_path):
    with obeying() as pool:
        assert tell(pool, ("length", "12"), ("die_at_first", str(tmp_path / "died")), ("length", "1")) == [
            2.0,
            1.0,
            1.0,
        ]
    assert pool.counters == Counters(restarts=1)


def test_workers_killed_from_outside_lose_nothing(tmp_path):
    said = tmp_path / "process"
    with obeying(timeout=20.0) as pool:
        pending = pool.submit(["say_process", "length", "length"], [str(said), "12", "123"], [True] * 3)
        wait_until(lambda: said.exists() and said.read_text())
        psutil.Process(int(said.read_text())).kill()
        assert pending.result().tolist() == [1.0, 2.0, 3.0]
        for process in {int(p) for p in tell(pool, *[("process", "")] * 20)}:  # idle ones
            psutil.Process(process).kill()
        assert tell(pool, *[("length", "12")] * 20) == [2.0] * 20
    assert 2 <= pool.counters.restarts <= 3 and pool.counters.timeouts == 0


@pytest.mark.parametrize("deed, name", [("error", "KeyError: 'why'"), ("end_python", "SystemExit: why"), ("?", "'?'")])
def test_an_exception_of_the_reward_reaches_the_caller_with_its_traceback(deed, name):
    with obeying() as pool:
        with pytest.raises(RewardError, match=r"raised on answer 1: .*\nTraceback") as raised:
            tell(pool, ("length", "12"), (deed, "why"), ("error", "later"))
        assert name in str(raised.value) and "in obey" in str(raised.value) and "later" not in str(raised.value)
        assert tell(pool, ("length", "12")) == [2.0]
    assert pool.counters == Counters()


@pytest.mark.parametrize("number", ["nan", "inf", "-1e39"])
def test_a_reward_that_is_not_finite_is_an_error(number):
    with obeying() as pool, pytest.raises(RewardError, match="raised on answer 1:") as raised:
        tell(pool, ("length", "12"), ("number", number))
    assert raised.value.answer == 1
    told, place = raised.value.told.split(" (", 1)
    assert told == f"ValueError: the reward is {float(number)}, for gold {number!r}; it must be a finite number"
    assert place == f"{functions.__file__}, line {functions.obey.__code__.co_firstlineno}, in obey)"


def test_a_reward_with_arguments_bound_and_any_text_travel():
    texts = ["\ud800", "\x00", "", "x" * 3_000_000, "七"]
    with RewardPool(partial(functions.length), workers=2) as pool:
        assert pool.score(texts, [""] * 5, np.ones(5, bool)).tolist() == [1.0, 1.0, 0.0, 3e6, 1.0]


def test_workers_import_neither_jax_nor_the_program_although_jax_runs_here():
    assert float(jax.jit(jnp.sum)(jnp.ones(8))) == 8.0
    with obeying() as pool:
        assert tell(pool, ("jax_is_imported", "")) == [0.0]


def test_settings_out_of_range_are_told_of():
    for settings, message in [
        ({"workers": 0}, "workers is 0; it must be at least 1"),
        ({"timeout": 0.0}, "timeout is 0.0; it must be more than 0 seconds"),
        ({"warm_up": 0.0}, "warm_up is 0.0; it must be more than 0 seconds"),
        ({"memory": 1000}, "memory is 1000 bytes; it must be at least 1048576"),
    ]:
        with pytest.raises(ValueError, match=message):
            obeying(**settings)
    with (
        obeying() as pool,
        pytest.raises(ValueError, match="1 texts, 2 golds, 1 finished and 1 known; give equally many of each"),
    ):
        pool.submit(["7"], ["7", "8"], [True])


def test_a_reward_of_the_program_itself_is_refused(monkeypatch):
    monkeypatch.setattr(functions.length, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "length", functions.length, raising=False)
    with pytest.raises(ValueError, match="of `__main__`, which workers do not import; give it a module of its own"):
        RewardPool(functions.length, workers=1)


def outer():
    def inner(text, gold, *, finished):
        return 1.0

    return inner


@pytest.mark.parametrize(
    "reward, name",
    [
        (lambda text, gold, *, finished: 1.0, "<lambda>"),
        (outer(), r"outer\.<locals>\.inner"),
        (partial(functions.length, lock=threading.Lock()), "length"),
    ],
)
def test_a_reward_that_cannot_be_sent_to_workers_is_refused_by_its_name_and_line(reward, name):
    with pytest.raises(ValueError, match=rf"the reward is {name} \(.*\.py, line \d+\), which worker processes cannot"):
        RewardPool(reward, workers=1)


def test_a_module_that_ends_python_in_workers_is_an_error_of_its_line(tmp_path, monkeypatch):
    (tmp_path / "ends.py").write_text(
        "import os, sys\nif 'PARENT' not in os.environ:\n    sys.exit()\ndef reward(*a, **k): return 1.0\n"
    )
    monkeypatch.setenv("PARENT", "1")
    monkeypatch.syspath_prepend(tmp_path)
    reward = importlib.import_module("ends").reward
    monkeypatch.delenv("PARENT")
    told = r"cannot import the reward function: SystemExit \(.*ends\.py, line 3, in <module>\)"
    with RewardPool(reward, workers=1) as pool, pytest.raises(RuntimeError, match=told):
        pool.score(["7"], ["7"], [True])


def test_a_reward_that_workers_cannot_import_is_an_error_with_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text(
        "import os\nassert 'PARENT' in os.environ\ndef reward(*a, **k): return 1.0\n"
    )
    monkeypatch.setenv("PARENT", "1")
    monkeypatch.syspath_prepend(tmp_path)
    reward = importlib.import_module("only_here").reward
    monkeypatch.delenv("PARENT")
    with RewardPool(reward, workers=1) as pool:
        told = r"cannot import the reward function: AssertionError \(.*only_here\.py, line 2, in <module>\)\nTraceback"
        with pytest.raises(RuntimeError, match=told):
            pool.score(["7"], ["7"], [True])
        with pytest.raises(RuntimeError, match="answers cannot be scored: workers cannot import"):
            pool.submit(["7"], ["7"], [True])


def test_a_pool_that_is_not_open_says_so():
    pool = obeying()
    with pytest.raises(RuntimeError, match="the pool was not entered"):
        tell(pool, ("length", "12"))
    with pool:
        pending = pool.submit(["sleep"] * 9, ["9"] * 9, [True] * 9)
    with pytest.raises(RuntimeError, match="answers were not scored: the pool was closed"):
        pending.result()
    with pytest.raises(RuntimeError, match="answers cannot be scored: the pool was closed"):
        tell(pool, ("length", "12"))


def test_closing_before_anything_has_started(capfd):
    with obeying() as pool:
        pending = pool.submit(["length"], ["1"], [True])
    with pytest.raises(RuntimeError, match="the pool was closed"):
        pending.result()
    assert capfd.readouterr().err == ""  # the server has nobody left to answer, which is no error


def test_an_exception_in_the_block_ends_the_processes():
    with pytest.raises(ZeroDivisionError), obeying(timeout=60.0) as pool:
        tell(pool, ("length", "1"))
        pool.submit(HANGS, ["", ""], [True, True])
        raise ZeroDivisionError


def test_without_the_server_callers_are_told():
    with obeying(timeout=60.0) as pool:
        tell(pool, ("length", "1"))
        (server,) = set(processes()) & set(psutil.Process().children())
        server.kill()
        with pytest.raises(RuntimeError, match="the process that forks the workers was ended from outside"):
            tell(pool, ("die", ""))


SCRIPT = """
    import sys, time
    sys.path.append({here!r})
    from dcjax.rewards.pool import RewardPool
    from reward_functions import obey
    with RewardPool(obey, workers=2, timeout=60.0) as pool:
        first = {{int(p) for p in pool.score(["process"] * 20, [""] * 20, [True] * 20)}}
        pending = pool.submit({hangs!r}, [""] * 2, [True] * 2)
        time.sleep(0.2)
        print("ready", flush=True)
        pending.result()
"""


@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -9), (signal.SIGINT, 1), (signal.SIGTERM, -15)])
def test_no_worker_outlives_its_program_and_a_script_needs_no_guard(tmp_path, number, status):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(here=HERE, hangs=HANGS)))
    program = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout.readline() == "ready\n"
    workers = psutil.Process(program.pid).children(recursive=True)
    assert len(workers) == 3  # and the server
    program.send_signal(number)
    _, errors = program.communicate(timeout=10)
    wait_until(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers))
    assert program.returncode in (status, -number)
    assert "Traceback" not in errors or "KeyboardInterrupt" in errors


@contextmanager
def watched():
    """The bytes resident in each process of a pool, time and again."""
    resident, done = [], threading.Event()

    def watch():
        while not done.wait(0.02):
            for process in processes():
                with suppress(psutil.NoSuchProcess):
                    resident.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield resident
    finally:
        done.set()
        watcher.join()


def survive(count, timeout, chunk=28, workers=2, memory=1 << 29) -> Counters:
    """Scores hostile answers, 28 at a time; returns the pool's counters."""
    _, texts, golds = zip(*hostile(count), strict=True)
    with RewardPool(math_reward, workers=workers, timeout=timeout, memory=memory) as pool, watched() as resident:
        assert pool.score([r"\boxed{0.5}"], ["1/2"], [True]) == 1.0  # the processes have started
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            began = time.monotonic()
            assert not pool.score(texts[part], golds[part], [True] * len(texts[part])).any()
            # all of a worker's share may hang, and is killed in time; another worker takes milliseconds
            assert time.monotonic() - began < (timeout + 0.25) * (chunk / workers + 1)
            assert len(processes()) <= workers + 1
        honest = pool.score([r"\boxed{\frac{2}{14}}", r"\boxed{1+x}"] * 10, [r"\frac{1}{7}", "x+1"] * 10, [True] * 20)
        assert honest.all()
    assert max(resident) < memory + (1 << 28)
    return pool.counters


def test_hostile_answers_score_zero_within_their_limits():
    assert survive(56, timeout=0.2).timeouts > 0


@pytest.mark.slow
def test_two_thousand_hostile_answers_score_zero_within_their_limits():
    assert survive(2000, timeout=2.0).timeouts > 0


def test_workers_score_as_this_process_does():
    harmless = [row for row in hostile(70, seed=1) if row[0] in ("code", "macro_bombs", "control_characters")]
    honest = [("", rf"\boxed{{\frac{{{n}}}{{8}}}}", rf"\frac{{{n // 2}}}{{4}}") for n in range(20)]
    _, texts, golds = zip(*harmless, *honest, strict=True)
    here = [math_reward(text, gold, finished=True) for text, gold in zip(texts, golds, strict=True)]
    with RewardPool(math_reward, workers=3, timeout=20.0) as pool:
        assert pool.score(texts, golds, [True] * len(texts)).tolist() == here
    assert sum(here) == 10
