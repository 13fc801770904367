"""When to look at which agent: at once when something happened, else now and then.

One look at an agent at a time. What happens meanwhile is not lost: it makes one more look, however much it
was. A look that fails is tried again, later each time.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from trunkline_operator.cluster.client import ApiError

Look = Callable[[str], Awaitable[float | None]]
"""Looks at an agent and returns the seconds until it wants to look again, or None if the agent is gone."""

RESYNC_SECONDS: Final = 30.0
# After a calm so many looks at an agent may follow each other at once, for who has no free slot waits for the
# first; then one each gap. A look takes about 2 ms: a hundred busy agents leave room for others.
LOOKS_IN_HASTE: Final = 3
GAP_SECONDS: Final = 0.1
BACKOFF_SECONDS: Final = (0.5, 30.0)
# What happens while an agent backs off is looked at, but not more often than this.
HOPE_SECONDS: Final = 1.0
# Each look that writes has one request in flight. The API server serves a few hundred at a time, and a dozen
# keep it as busy as more would; each open connection takes 100 KB.
LOOKS_AT_ONCE: Final = 16

log = logging.getLogger("trunkline.reconcile")


@dataclass(slots=True)
class _Entry:
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    looked: asyncio.Event = field(default_factory=asyncio.Event)  # once with success, or it is gone
    task: asyncio.Task[None] | None = None
    began: deque[float] = field(default_factory=lambda: deque(maxlen=LOOKS_IN_HASTE))

    def gap(self, now: float) -> float:
        """Seconds until the next look may begin."""
        if len(self.began) < LOOKS_IN_HASTE:
            return 0.0
        return max(self.began[0] + LOOKS_IN_HASTE * GAP_SECONDS - now, 0.0)


class Agenda:
    """Looks at each agent that was added until it is gone."""

    def __init__(self, look: Look, *, resync_seconds: float = RESYNC_SECONDS) -> None:
        self._look = look
        self._resync_seconds = resync_seconds
        self._entries: dict[str, _Entry] = {}
        self._room = asyncio.Semaphore(LOOKS_AT_ONCE)
        self._closed = False

    def __repr__(self) -> str:
        return f"Agenda({sorted(self._entries)})"

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, agent: str) -> None:
        """Something happened to this agent."""
        if self._closed:
            return
        entry = self._entries.setdefault(agent, _Entry())
        entry.wake.set()
        if entry.task is None:
            entry.task = asyncio.create_task(self._attend(agent, entry), name=f"agent {agent}")

    def wake(self, agent: str) -> None:
        """As `add`, for an agent that is looked after; others stay unknown."""
        if agent in self._entries:
            self.add(agent)

    async def looked_at(self, agents: Iterable[str]) -> None:
        """Waits until each of these was looked at with success, or is gone."""
        for entry in [self._entries[agent] for agent in agents if agent in self._entries]:
            await entry.looked.wait()

    async def close(self) -> None:
        self._closed = True
        tasks = [entry.task for entry in self._entries.values() if entry.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _attend(self, agent: str, entry: _Entry) -> None:
        failures = 0
        try:
            while True:
                entry.wake.clear()
                entry.began.append(time.monotonic())
                try:
                    async with self._room:
                        after = await self._look(agent)
                except Exception as error:  # noqa: BLE001  # logged; one agent's trouble is not another's
                    log_failure(agent, error, failures)
                    failures += 1
                    after = backoff(failures, random.random())
                    hope = min(after, HOPE_SECONDS)
                    await asyncio.sleep(hope)
                    after -= hope
                else:
                    failures = 0
                    if after is None and not entry.wake.is_set():
                        return
                    entry.looked.set()
                    after = min(after or 0.0, self._resync_seconds * random.uniform(0.9, 1.1))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(entry.wake.wait(), after)
                if gap := entry.gap(time.monotonic()):
                    await asyncio.sleep(gap)
        finally:
            entry.looked.set()
            del self._entries[agent]


def backoff(failures: int, chance: float) -> float:
    """Seconds to wait after so many failures in a row; `chance` is from 0 to 1."""
    first, longest = BACKOFF_SECONDS
    # 2 ** 6 is past the bound already; the exponent must not grow for weeks.
    return min(first * 2.0 ** min(failures - 1, 6), longest) * (0.5 + chance / 2)


def log_failure(agent: str, error: Exception, failures: int) -> None:
    """Logs a failed look: what the API said as a line, a bug with its traceback; repeats in short."""
    if isinstance(error, ApiError):
        log.warning("%s: %s", agent, error, extra={"agent": agent})
    elif failures:
        log.error("%s: again %r", agent, error, extra={"agent": agent})
    else:
        log.error("%s: cannot be looked at", agent, exc_info=error, extra={"agent": agent})
