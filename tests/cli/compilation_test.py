"""Programs are cached between processes, and reported while they are compiled."""

import io
import json
import os
import subprocess
import sys
import threading
import time
import zlib

import jax
import pytest

from dcjax.cli import compilation
from dcjax.cli.compilation import cache_folder, enable_compilation_cache, report_slow_compilations

pytestmark = pytest.mark.heavy

PROCESS = """
import json, sys
import jax
from dcjax.cli.compilation import enable_compilation_cache

read = []
jax.monitoring.register_event_listener(lambda event, **about: read.append(event))
enable_compilation_cache()
value = jax.jit(lambda x: jax.numpy.sin(x) + 1)(jax.numpy.float32(0.5)).item()
hits = sum(event.endswith("/cache_hits") for event in read)
print(json.dumps({"value": value, "hits": hits, "bound": jax.config.jax_compilation_cache_max_size}))
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder of one's own, that no earlier setting of JAX stands before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "cache"
    jax.config.update("jax_compilation_cache_dir", before)


def run(code=PROCESS):
    """What a process of its own printed, and what it said on standard error."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), [line for line in done.stderr.splitlines() if line.startswith("dcjax")]


def kept():
    return sorted(cache_folder().glob("*-cache"))


def test_a_second_process_reads_what_the_first_compiled_and_a_third_compiles_again_what_is_damaged(home):
    first, _ = run()
    assert first["hits"] == 0 and first["bound"] == compilation.MAX_BYTES
    assert kept() and home in kept()[0].parents
    assert cache_folder().stat().st_mode & 0o777 == 0o700
    # which also notes the checksums of what the first wrote
    second, told = run()
    assert second["hits"] == len(kept())
    assert second["value"] == first["value"] and told == []
    flipped, torn, *others = kept()
    sound = flipped.read_bytes()
    flipped.write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])
    # as a process leaves it that is killed while it writes
    torn.write_bytes(torn.read_bytes()[:40])
    torn.with_name(torn.name.replace("-cache", "-atime")).unlink()
    again, told = run()
    assert again["hits"] == len(others)
    assert again["value"] == first["value"] and told == []
    assert flipped.read_bytes() != sound[:-9] and run()[0]["hits"] == len(others) + 2


def test_what_is_kept_stays_within_the_bound(home):
    """Of programs that take about 2.5 kB each; what was used last stays."""
    bounded = PROCESS.replace(
        "enable_compilation_cache()",
        "import dcjax.cli.compilation as c; c.MAX_BYTES = 8_000; enable_compilation_cache()",
    )
    seen = set()
    for factor in (2, 3, 4):
        run(bounded.replace("+ 1", f"+ jax.numpy.cos(x * {factor})"))
        assert sum(path.stat().st_size for path in kept()) <= 8_000
        seen |= set(kept())
    assert len(kept()) < len(seen)
    assert run(bounded.replace("+ 1", "+ jax.numpy.cos(x * 4)"))[0]["hits"] == 2


@pytest.mark.parametrize("noted", ["", "[1]", "no JSON", '{"a": 1}'])
def test_checksums_that_are_lost_or_odd_cost_nothing(home, noted):
    folder = cache_folder()
    folder.mkdir(parents=True, mode=0o700)
    (folder / "x-cache").write_bytes(b"program")
    (folder / "x-atime").write_bytes(b"12345678")
    (folder / compilation.CHECKSUMS).write_text(noted)
    compilation._prepare_folder(folder)
    assert json.loads((folder / compilation.CHECKSUMS).read_text()) == {"x-cache": zlib.crc32(b"program")}
    assert {path.name for path in folder.iterdir()} == {"x-cache", "x-atime", ".lockfile", compilation.CHECKSUMS}


def test_a_folder_into_which_others_can_write_is_not_used(home, capsys):
    cache_folder().mkdir(parents=True)
    cache_folder().chmod(0o777)
    enable_compilation_cache()
    told = capsys.readouterr().err
    assert told.startswith("dcjax: compiled programs are not cached: ") and told.count("\n") == 1
    assert "others can write into it" in told and str(cache_folder()) in told
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_made_costs_a_line(home, tmp_path):
    (tmp_path / "cache").write_text("a file")
    found, told = run()
    assert found["hits"] == 0 and len(told) == 1
    assert told[0].startswith("dcjax: compiled programs are not cached: ") and "Not a directory" in told[0]


def test_a_folder_that_another_process_holds_for_long_costs_a_line(home, capsys, monkeypatch):
    cache_folder().mkdir(parents=True, mode=0o700)

    class Held(compilation.filelock.FileLock):
        def __init__(self, path, timeout):
            super().__init__(path, timeout=0.05)

    with compilation.filelock.FileLock(cache_folder() / ".lockfile"):
        monkeypatch.setattr(compilation.filelock, "FileLock", Held)
        enable_compilation_cache()
    assert "not cached" in capsys.readouterr().err


def test_programs_are_of_a_compiler_and_a_kind_of_cpu(home, monkeypatch):
    ours = cache_folder()
    assert cache_folder() == ours
    monkeypatch.setattr(compilation, "_cpu_features", lambda: ["avx2", "fma"])
    other = cache_folder()
    monkeypatch.setattr(compilation.metadata, "version", lambda name: "0.0.1")
    assert len({ours, other, cache_folder()}) == 3


@pytest.mark.slow
def test_without_a_cache_nothing_is_kept(home):
    code = "from dcjax.cli import main; print(main([{0}'evaluate', '{1}']))"
    missing = home / "no-run"
    assert run(code.format("'--no-compilation-cache', ", missing))[0] == 2
    assert not cache_folder().exists()
    assert run(code.format("", missing))[0] == 2
    assert cache_folder().exists()


def test_a_folder_that_jax_has_already_is_left_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def compile_for(seconds, name="jit(train_step)"):
    """What JAX reports of a program that compiles for so long."""
    jax.monitoring.record_scalar(compilation._COMPILATION_EVENT, 0.0, fun_name=name)
    time.sleep(seconds)
    jax.monitoring.record_event_duration_secs(compilation._COMPILATION_EVENT, 31.4, fun_name=name)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(compilation, "REPORT_AFTER_SECONDS", 0.05)


def test_a_long_compilation_is_reported_while_it_goes_on(quick):
    seen, stream = [], io.StringIO()
    with report_slow_compilations(stream):
        jax.monitoring.record_scalar(compilation._COMPILATION_EVENT, 0.0, fun_name="jit(_begin)")
        for _ in range(400):
            if stream.getvalue():
                break
            time.sleep(0.01)
        seen.append(stream.getvalue())
        jax.monitoring.record_event_duration_secs(compilation._COMPILATION_EVENT, 31.4, fun_name="jit(_begin)")
    assert seen == ["compiling begin …"]
    assert stream.getvalue() == "compiling begin … 31 s\n"


def test_a_short_compilation_is_not_reported():
    stream = io.StringIO()
    with report_slow_compilations(stream):
        jax.monitoring.record_scalar(compilation._COMPILATION_EVENT, 0.0, fun_name="jit(add)")
        jax.monitoring.record_event_duration_secs(compilation._COMPILATION_EVENT, 0.02, fun_name="jit(add)")
        jax.monitoring.record_event_duration_secs("/jax/core/compile/other", 31.0, fun_name="jit(add)")
    assert stream.getvalue() == ""


def test_after_the_context_nothing_is_reported(quick):
    stream = io.StringIO()
    with report_slow_compilations(stream):
        pass
    compile_for(0.2)
    assert stream.getvalue() == ""


def test_what_threads_compile_is_reported_after_the_line_that_is_begun(quick):
    stream = io.StringIO()
    with report_slow_compilations(stream):
        jax.monitoring.record_scalar(compilation._COMPILATION_EVENT, 0.0, fun_name="jit(train_step)")
        while not stream.getvalue():
            time.sleep(0.01)
        beside = threading.Thread(target=compile_for, args=(0, "jit(decode)"))
        beside.start()
        beside.join()
        jax.monitoring.record_event_duration_secs(compilation._COMPILATION_EVENT, 5.0, fun_name="jit(train_step)")
    assert stream.getvalue() == "compiling train step … 5 s\ncompiling decode … 31 s\n"


def test_on_a_terminal_a_line_is_left_above_the_bars(quick):
    stream = Terminal()
    with report_slow_compilations(stream):
        compile_for(0.3)
    assert "compiling train step … 31 s\n" in stream.getvalue()
