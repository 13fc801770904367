"""Ports for processes that must be told theirs."""

import contextlib
import itertools
import os
import socket

# Below those that Linux gives to connections: one of those may be taken before a process listens on it. Each test
# process has others.
_ports = itertools.cycle(range(20_000 + os.getpid() * 37 % 10_000, 32_000))


def free_port() -> int:
    """One on which nobody listens."""
    for port in _ports:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("it goes round for ever")


def free_ports(count: int) -> list[int]:
    """So many, each another."""
    return [free_port() for _ in range(count)]
