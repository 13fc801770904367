"""Child processes that end with the program that started them, each with a log file."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from trunkline_dev.leash import leashed

POLL_SECONDS = 0.05
LOG_TAIL = 2_000  # characters of a log that an error shows


class ProcessFailed(RuntimeError):
    """A process of the machine ended or never became ready; the message holds the end of its log."""


class Process:
    """One child: started once, stopped once; `log` is a file that outlives it."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str]
    ) -> None:
        self.name, self.log, self._command, self._env = name, log, command, env
        self._child: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        state = "not started" if self._child is None else f"pid {self._child.pid}"
        return f"<Process {self.name} {state}>"

    @property
    def pid(self) -> int:
        assert self._child is not None, f"{self.name} was not started"
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        # Popen and not asyncio's: the child must belong to the main thread, for the leash.
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                leashed(self._command),
                env=dict(self._env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for us; we end them in order
            )

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    async def stop(self, patience: float = 10.0) -> int:
        """SIGTERM, then SIGKILL after `patience` seconds; returns the exit status."""
        child = self._child
        if child is None:
            return 0
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(child.wait, patience)
            except subprocess.TimeoutExpired:
                child.kill()
        return child.wait()

    def failed(self, what: str) -> ProcessFailed:
        tail = self.log.read_text(errors="replace")[-LOG_TAIL:] if self.log.exists() else ""
        return ProcessFailed(f"{self.name} {what}; the end of {self.log}:\n{tail}")

    async def first_line(self, timeout: float) -> str:
        """Waits for the first whole line that starts with a brace: a process's ready line."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for line in self.log.read_text(errors="replace").splitlines(keepends=True):
                if line.startswith("{") and line.endswith("\n"):
                    return line
            if not self.running:
                raise self.failed("ended before it was ready")
            await asyncio.sleep(POLL_SECONDS)
        raise self.failed(f"printed no ready line in {timeout:g} s")

    async def ready(self, url: str, timeout: float) -> None:
        """Waits until `url` answers 200."""
        deadline, last = time.monotonic() + timeout, "no answer"
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                if not self.running:
                    raise self.failed("ended before it was ready")
                with contextlib.suppress(httpx.TransportError):
                    answer = await client.get(url)
                    if answer.status_code == 200:
                        return
                    last = f"{answer.status_code} {answer.text.strip()}"
                await asyncio.sleep(POLL_SECONDS)
        raise self.failed(f"is not ready after {timeout:g} s ({url}: {last})")


def descendants(pid: int) -> set[int]:
    """The pids of all living children, grandchildren and so on (Linux: from /proc)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # "pid (name) state ppid …"; the name may hold spaces and parentheses.
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    found, frontier = set[int](), {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found |= frontier
    return found


def base_environment() -> dict[str, str]:
    """What children inherit: no credentials and no kubeconfig of the user's."""
    kept = ("HOME", "LANG", "PATH", "TMPDIR", "XDG_CACHE_HOME")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
