"""The code blocks of README.md and docs/, the commands in them, and a terminal in which a reader follows a page."""

import itertools
import re
import shlex
import signal
import subprocess
import time
from contextlib import suppress
from os import killpg
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}

MARKER = "<!-- not run: "
BLOCK = re.compile(
    rf"^(?:{MARKER}(?P<reason>\S.*) -->\n)?(?P<fence>```)(?P<language>.*)\n(?P<text>(?s:.*?))^```$", re.MULTILINE
)
FILE = re.compile(r"# (?P<name>\w+\.py): (?P<command>dcjax .*)\n")
"""The first line of a block that is a whole file."""
SERVER = re.compile(r"# needs a server: (?P<command>dcjax serve .*)\n")
"""The first line of a block that asks one."""
OPERATOR = re.compile(r"[();<>|&]+")


class Block(NamedTuple):
    page: str
    line: int
    reason: str | None
    """Why it is not run; None where it is."""
    language: str
    text: str

    @property
    def place(self):
        return f"{self.page}:{self.line}"


def blocks(page):
    text = PAGES[page].read_text()
    return [
        Block(page, text.count("\n", 0, each.start("fence")) + 1, each["reason"], each["language"], each["text"])
        for each in BLOCK.finditer(text)
    ]


def commands(block):
    """The words behind `dcjax` of each of its commands, in a block of Python of those in its first line."""
    if block.language == "python":
        first = FILE.match(block.text) or SERVER.match(block.text)
        return list(_commands(first["command"])) if first else []
    return list(itertools.chain.from_iterable(map(_commands, _lines(block))))


def programs(block):
    """The first word of each of its lines, behind variables that are set there."""
    rows = ([word for word in _words(line) if "=" not in word] for line in _lines(block))
    return {words[0] for words in rows if words}


def _lines(block):
    return block.text.replace("\\\n", " ").splitlines() if block.language == "sh" else []


def _words(line):
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def _commands(line):
    words = _words(line)
    for number, word in enumerate(words):
        if " " in word:  # a line that another machine's shell is given
            yield from _commands(word)
        elif Path(word).name == "dcjax":
            following = itertools.takewhile(lambda word: not OPERATOR.fullmatch(word), words[number + 1 :])
            if command := list(following):
                yield command


PRELUDE = """
trap 'kill $(jobs -p) 2> /dev/null' EXIT
server=
serve_meanwhile() {
    stop_server
    : > serving.log
    dcjax serve "$@" --port 9000 2> serving.log &
    server=$!
    until grep -q listening serving.log; do
        if ! kill -0 $server; then cat serving.log && exit 1; fi
        sleep .2
    done
}
stop_server() {
    if [ "$server" ]; then kill -TERM $server; wait $server; fi
    server=
}
wait_for_the_others() {
    for job in $(jobs -p); do if [ "$job" != "$server" ]; then wait $job; fi; done
}
"""
"""A server goes on behind its line, until the next server or the next block of commands; it must end with status 0."""


class Terminal:
    """One bash for a whole page, which ends where a command fails.

    Args:
      directory: the one that it starts in.
      environment: its variables.
      ports: what stands in place of which port, by the text of the latter.
    """

    def __init__(self, directory, environment, ports):
        self.directory, self._ports = directory, ports
        self._done, self._log = directory / ".done", directory / ".terminal.log"
        with self._log.open("w") as log:
            self._bash = subprocess.Popen(
                ["bash", "-e", "-o", "pipefail"],
                cwd=directory,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def __enter__(self):
        print(self.with_free_ports(PRELUDE), file=self._bash.stdin)
        return self

    def __exit__(self, failed, *_):
        if not failed:
            self.run("")
        with suppress(ProcessLookupError):
            killpg(self._bash.pid, signal.SIGKILL)
        self._bash.communicate()

    def with_free_ports(self, text):
        for port, free in self._ports.items():
            text = text.replace(port, free)
        return text

    def run(self, text, seconds=900):
        """Runs a block until all but a server has ended."""
        text = re.sub(r"^dcjax serve ", "serve_meanwhile ", self.with_free_ports(text), flags=re.MULTILINE)
        print(f"stop_server\n{text}\nwait_for_the_others\ntouch {self._done}", file=self._bash.stdin, flush=True)
        ends = time.monotonic() + seconds
        while not self._done.exists() and self._bash.poll() is None and time.monotonic() < ends:
            time.sleep(0.1)
        said = self._log.read_text(errors="replace")
        # where a page stops a run, that is no error
        failed = re.search("dcjax: error: (?!stopped by SIGTERM)", said)
        assert self._done.exists() and not failed, f"{text}\n{said[-3000:]}"
        self._done.unlink()
