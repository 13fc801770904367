"""Processes that are measured, and the load generator that is driven from here.

What is measured has one core, all else another. CPU time and memory are the kernel's own, of a process and all its
children: on a shared machine a clock on the wall would measure the neighbours.
"""

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

SOURCE: Final = Path(__file__).with_name("load.c")
START_SECONDS: Final = 30.0
ANSWER_SECONDS: Final = 30.0  # of the generator; all callers have been answered by then


class BenchError(Exception):
    """A benchmark cannot go on; the text says why, and what to do where something can be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process runs: on which core (None: any), and how urgent it is (0: as others)."""

    core: int | None
    urgency: int

    def around(self, command: Sequence[str]) -> list[str]:
        """A command that runs there."""
        urgent = ["chrt", "-f", str(self.urgency)] if self.urgency else []
        pinned = ["taskset", "-c", str(self.core)] if self.core is not None else []
        return [*urgent, *pinned, *command]


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """`subject` is for what is measured, `load` for the generator.

    `beside` is for what both wait for: a worker that a busy generator kept from its beat would be taken for dead.
    """

    subject: Place
    load: Place
    beside: Place

    @classmethod
    def of_this_machine(cls, *, urgent: bool) -> "Places":
        """Two cores where there are two; before all others where `urgent` and permitted.

        Without that, a neighbour's time slice would be in every 99th percentile, of any relay.
        """
        cores: list[int | None] = [*sorted(os.sched_getaffinity(0))]
        if len(cores) < 2 or shutil.which("taskset") is None:
            cores = [None, None]
        urgent = urgent and _may_be_urgent()
        return cls(
            subject=Place(core=cores[0], urgency=10 * urgent),
            load=Place(core=cores[1], urgency=20 * urgent),
            beside=Place(core=cores[1], urgency=30 * urgent),
        )


def _may_be_urgent() -> bool:
    if shutil.which("chrt") is None:
        return False
    return (
        subprocess.run(["chrt", "-f", "1", "true"], capture_output=True, check=False).returncode
        == 0
    )


# Whoever is less urgent than all others, and ends with who started it.
_SPINNER: Final = """
import os, sys
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Keeps all cores from sleeping while the block runs; whoever else has something to do goes first.

    A virtual machine gives a core that sleeps back to its host, and may wait for milliseconds until it has it again.
    That would be in every 99th percentile, and the oftener the more processes take part in what is measured.
    """
    with contextlib.ExitStack() as stack:
        for core in os.sched_getaffinity(0):
            spinner = subprocess.Popen([sys.executable, "-c", _SPINNER, str(core)])
            stack.callback(spinner.wait)
            stack.callback(spinner.kill)
        yield


class Process:
    """A program and its children, from start to `stop`."""

    def __init__(
        self,
        command: Sequence[str],
        place: Place,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._name = " ".join(command)
        self._log = Path(tempfile.mkstemp(dir=folder, prefix="process-")[1])
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                place.around(command),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def listens(self, port: int) -> None:
        """Waits until somebody answers on a port of loopback. Raises `BenchError`."""
        self._until(lambda: _answers(port), f"nothing listens on port {port}")

    def says(self, word: str) -> None:
        """Waits until a word is in the output. Raises `BenchError`."""
        self._until(lambda: word in self._log.read_text(), f"it never said {word!r}")

    def answers(self, url: str) -> None:
        """Waits until a GET of `url` is answered with 200. Raises `BenchError`."""
        self._until(lambda: _is_ok(url), f"{url} is never answered with 200")

    def cpu(self) -> float:
        """Seconds of CPU time so far, in user and kernel."""
        return sum(_cpu(pid) for pid in self._family())

    def memory(self) -> float:
        """KiB of memory, of which pages that are shared count in part."""
        return sum(_kib(pid, "smaps_rollup", "Pss:") for pid in self._family())

    def resident(self) -> float:
        """KiB of resident memory."""
        return sum(_kib(pid, "status", "VmRSS:") for pid in self._family())

    def files(self) -> int:
        """How many file descriptors are open."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self._family())

    def stop(self) -> None:
        self._child.terminate()
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _until(self, what: Callable[[], bool], why: str) -> None:
        end = time.monotonic() + START_SECONDS
        while not what():
            if self._child.poll() is not None:
                raise BenchError(f"{self._name} ended: {self._last_words()}")
            if time.monotonic() > end:
                raise BenchError(f"{self._name}: {why}: {self._last_words()}")
            time.sleep(0.02)

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def _family(self) -> list[int]:
        found, todo = [], [self._child.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        return found


def _is_ok(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1) as response:
        return bool(response.status == 200)
    return False


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _cpu(pid: int) -> float:
    """Of all threads, in nanoseconds where the kernel keeps them; /proc/PID/stat counts in 10 ms."""
    nanoseconds = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            nanoseconds += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            ticks = int(fields[11]) + int(fields[12])
            nanoseconds += ticks * 10**9 // os.sysconf("SC_CLK_TCK")
    return nanoseconds / 1e9


def _kib(pid: int, file: str, key: str) -> float:
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(key):
            return float(line.split()[1])
    return 0.0


def tell(sentence: str) -> None:
    """How far a benchmark is."""
    print(sentence, file=sys.stderr, flush=True)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """The compiled load generator; `tls` where it can be a worker that speaks TLS."""

    program: Path
    tls: bool


def build(folder: Path) -> Generator:
    """Compiles it. Raises `BenchError`."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise BenchError("there is no C compiler for the load generator: install gcc and libc6-dev")
    program = folder / "load"
    plain = [compiler, "-O2", "-o", str(program), str(SOURCE)]
    with_tls = [*plain, "-DWITH_TLS", "-lssl", "-lcrypto"]
    if subprocess.run(with_tls, capture_output=True, check=False).returncode == 0:
        return Generator(program=program, tls=True)
    done = subprocess.run(plain, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"the load generator does not compile: {done.stderr}")
    return Generator(program=program, tls=False)


class Load:
    """A running load generator."""

    def __init__(self, generator: Generator, place: Place, *options: object) -> None:
        self._child = subprocess.Popen(
            place.around([str(generator.program), *map(str, options)]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def calls(self, count: int) -> None:
        """Has so many calls; returns when all are live. Raises `BenchError`."""
        self._say(f"calls {count}")
        if self._hear(ANSWER_SECONDS) is None:
            raise BenchError(f"{count} calls were not answered: {self.report()}")

    def admit(self, callers: int) -> None:
        """Has so many callers that come one after the other, with -a."""
        self._say(f"calls {callers}")

    def reset(self) -> None:
        self._ask("reset")

    def report(self) -> dict[str, Any]:
        """What was counted since `reset`; delays are in microseconds."""
        return self._ask("report")

    def close(self) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()

    def _ask(self, command: str) -> dict[str, Any]:
        self._say(command)
        answer = self._hear(ANSWER_SECONDS)
        if answer is None:
            raise BenchError(f"the load generator does not answer {command!r}")
        return answer

    def _say(self, command: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(f"{command}\n".encode())

    def _hear(self, seconds: float) -> dict[str, Any] | None:
        """Its next line, which it writes in one piece; None when none comes in time."""
        assert self._child.stdout is not None
        if not select.select([self._child.stdout], [], [], seconds)[0]:
            return None
        line = self._child.stdout.readline()
        if not line:
            raise BenchError("the load generator ended; what it said is above")
        found: dict[str, Any] = json.loads(line)
        return found


@contextlib.contextmanager
def loading(generator: Generator, place: Place, *options: object) -> Iterator[Load]:
    """A load generator while the block runs. When it ends, its calls do."""
    load = Load(generator, place, *options)
    try:
        yield load
    finally:
        load.close()
