"""Operators that start in a moment: forked from a process that has imported what an operator needs.

    python forked_operator.py

An order is a line of JSON on stdin: `{"arguments": [...], "env": {...}, "log": "FILE"}`. The answer is the pid.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trunkline_dev.leash import leashed

PR_SET_PDEATHSIG = 1


class Nursery:
    """The process that forks them; a context manager. What it has forked ends with it."""

    def __init__(self) -> None:
        self._mother: subprocess.Popen[str] | None = None

    @classmethod
    @contextlib.contextmanager
    def open(cls) -> Iterator["Nursery"]:
        nursery = cls()
        command = leashed([sys.executable, __file__])
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as mother:
            nursery._mother = mother
            try:
                yield nursery
            finally:
                mother.kill()

    def start(self, arguments: Sequence[str], env: Mapping[str, str], log: Path) -> int:
        """The pid of a new operator."""
        mother = self._mother
        assert mother is not None
        assert mother.stdin is not None
        assert mother.stdout is not None
        order = {"arguments": list(arguments), "env": dict(env), "log": str(log)}
        mother.stdin.write(json.dumps(order) + "\n")
        mother.stdin.flush()
        return int(mother.stdout.readline())


def become_operator(order: dict[str, Any]) -> int:
    """The exit status."""
    from trunkline_operator.__main__ import run

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(order["env"])
    return run(order["arguments"], os.environ)


def main() -> None:
    import trunkline_operator.assembly  # noqa: F401  # the two seconds of imports that this is about

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries children
    for line in sys.stdin:
        if child := os.fork():
            print(child, flush=True)
        else:
            status = 1
            try:
                status = become_operator(json.loads(line))
            finally:
                sys.stdout.flush()
                os._exit(status)


if __name__ == "__main__":
    main()
