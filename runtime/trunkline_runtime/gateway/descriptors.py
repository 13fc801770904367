"""File descriptors: how many a gateway has, how many calls that allows, and what becomes of callers when none are left.

A call has two, its caller's socket and its worker's. Linux gives each new socket the lowest number that is free, so a
number near the limit says that all below it are taken: nothing has to be counted.
"""

import asyncio
import errno
import logging
import os
import resource
from enum import StrEnum
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter

log = logging.getLogger("trunkline.gateway")

MOST: Final = Path("/proc/sys/fs/nr_open")  # that a process may have, whatever its hard limit
SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE})
LOG_SECONDS: Final = 60.0  # between two lines about it
NO_DESCRIPTOR: Final = "this gateway has no file descriptor left for another call"


class At(StrEnum):
    """Where there was none. For metrics: a closed set."""

    ARRIVAL = "arrival"  # a caller was told 503, by one of the spare ones
    ACCEPT = "accept"  # callers were left in the backlog
    DIAL = "dial"  # the caller had its own, and its worker or Modal could not be reached


def raised() -> int:
    """Raises the soft limit as far as the hard one allows; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = int(MOST.read_text()) if MOST.exists() else soft
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def is_short(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, says that there is no descriptor."""
    for _ in range(8):  # libraries wrap one in the other
        if error is None:
            return False
        if isinstance(error, OSError) and error.errno in SHORT:
            return True
        error = error.__cause__ or error.__context__
    return False


class Descriptors:
    """Of one gateway, with a limit of so many."""

    def __init__(self, registry: CollectorRegistry, limit: int) -> None:
        self.limit = limit
        # For telling callers so, and for the links of workers and of the operator, health checks and Modal.
        self.spare = min(256, max(24, limit // 16))
        self._quiet_until = 0.0
        self._short = Counter(
            "trunkline_descriptor_shortages",
            "Times that a file descriptor was missing: at a caller's arrival (told 503), its accept (left in the "
            "backlog), or at dialling for it (told 503)",
            ["at"],
            registry=registry,
        )

    def __repr__(self) -> str:
        return f"<Descriptors limit={self.limit} spare={self.spare}>"

    @property
    def calls(self) -> int:
        """How many calls there may be, besides what is open now."""
        return max(0, self.limit - self.spare - len(os.listdir("/proc/self/fd"))) // 2

    def are_for(self, number: int, waiting: int) -> bool:
        """Whether a caller may stay whose socket has this number, while so many, with it, wait for a worker's."""
        return number + waiting < self.limit - self.spare

    def short(self, at: At) -> None:
        """There was none. The log is told of it once in a while only: it comes with each caller."""
        self._short.labels(at.value).inc()
        now = asyncio.get_running_loop().time()
        if now >= self._quiet_until:
            self._quiet_until = now + LOG_SECONDS
            extra = {"limit": self.limit, "spare": self.spare, "at": at.value}
            log.error("no file descriptor is left: callers are told 503", extra=extra)
