"""When to look at which agent: at once when something happened, else now and then.

A look says when the next is due if nothing happens. One look at an agent at a time. What happens meanwhile is not
lost: it makes one more look, however much it was. A look that fails is tried again, later each time.
"""

import asyncio
import contextvars
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from trunkline_operator.cluster.client import ApiError

Look = Callable[[str], Awaitable[float | None]]
"""Looks at an agent and returns the seconds until it wants to look again, or None if the agent is gone."""

# Whoever wants a look sooner says so, and news makes one. This is for what nobody has thought of, and for numbers that
# only people read.
RESYNC_SECONDS: Final = 300.0
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
    """One agent. While nobody looks at it there is a timer and no task: a task that waits takes 6 KB."""

    agent: str
    news: bool = False  # something has happened since its last look began
    looked: bool = False  # once with success
    failures: int = 0  # in a row
    began: tuple[float, ...] = ()  # when its last looks did, the newest last
    earliest: float = 0.0  # when the next may
    timer: asyncio.TimerHandle | None = None
    waits: bool = False  # for its turn
    task: asyncio.Task[None] | None = None  # of a look that is taken

    def begin(self, now: float) -> None:
        self.news = False
        self.began = (*self.began, now)[-LOOKS_IN_HASTE:]
        if len(self.began) == LOOKS_IN_HASTE:
            self.earliest = self.began[0] + LOOKS_IN_HASTE * GAP_SECONDS


class Agenda:
    """Looks at each agent that was added until it is gone."""

    def __init__(self, look: Look, *, resync_seconds: float = RESYNC_SECONDS) -> None:
        self._look = look
        self._resync_seconds = resync_seconds
        self._entries: dict[str, _Entry] = {}
        self._turns: deque[_Entry] = deque()  # those that wait for one
        self._looking = 0
        self._done: dict[str, asyncio.Event] = {}  # for whoever waits for an agent's first look
        # Of whoever makes an agent known: kopf's holds the event that it tells of, 20 KB, and a timer or task that
        # took it over would keep that as long as the agent is there.
        self._context = contextvars.copy_context()
        self._closed = False

    def __repr__(self) -> str:
        return f"Agenda({sorted(self._entries)})"

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, agent: str) -> None:
        """Something happened to this agent."""
        if self._closed:
            return
        entry = self._entries.get(agent)
        if entry is None:
            entry = self._entries[agent] = _Entry(agent)
        entry.news = True
        if entry.task is None and not entry.waits:
            self._look_in(entry, 0.0)

    def wake(self, agent: str) -> None:
        """As `add`, for an agent that is looked after; others stay unknown."""
        if agent in self._entries:
            self.add(agent)

    async def looked_at(self, agents: Iterable[str]) -> None:
        """Waits until each of these was looked at with success, or is gone."""
        for agent in agents:
            entry = self._entries.get(agent)
            if entry is not None and not entry.looked:
                await self._done.setdefault(agent, asyncio.Event()).wait()

    async def close(self) -> None:
        self._closed = True
        entries = list(self._entries.values())
        tasks = [entry.task for entry in entries if entry.task]
        for entry in entries:
            if entry.timer:
                entry.timer.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for entry in entries:
            self._told(entry)
        self._entries.clear()
        self._turns.clear()

    def _look_in(self, entry: _Entry, seconds: float) -> None:
        """Has a look begin after so long, or as soon after that as one may."""
        if self._closed:
            return
        loop, now = asyncio.get_running_loop(), time.monotonic()
        wait = max(seconds, entry.earliest - now, 0.0)
        if timer := entry.timer:
            if timer.when() <= loop.time() + wait:
                return
            timer.cancel()
        entry.timer = loop.call_later(wait, self._take_turn, entry, context=self._context)

    def _take_turn(self, entry: _Entry) -> None:
        entry.timer = None
        if self._looking >= LOOKS_AT_ONCE:
            entry.waits = True
            self._turns.append(entry)
            return
        entry.waits = False
        self._looking += 1
        entry.task = asyncio.get_running_loop().create_task(
            self._attend(entry), name=f"agent {entry.agent}", context=self._context
        )

    async def _attend(self, entry: _Entry) -> None:
        """One look, and when the next is."""
        entry.begin(time.monotonic())
        try:
            after = await self._look(entry.agent)
        except Exception as error:  # noqa: BLE001  # logged; one agent's trouble is not another's
            log_failure(entry.agent, error, entry.failures)
            entry.failures += 1
            after = backoff(entry.failures, random.random())
            entry.earliest = time.monotonic() + min(after, HOPE_SECONDS)
        else:
            entry.failures = 0
            if after is None and not entry.news:
                del self._entries[entry.agent]
                self._told(entry)
                return
            self._told(entry)
            after = min(after or 0.0, self._resync_seconds * random.uniform(0.9, 1.1))
        finally:
            entry.task = None
            self._looking -= 1
            if self._turns and not self._closed:
                self._take_turn(self._turns.popleft())
        self._look_in(entry, 0.0 if entry.news else after)

    def _told(self, entry: _Entry) -> None:
        entry.looked = True
        if done := self._done.pop(entry.agent, None):
            done.set()


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
