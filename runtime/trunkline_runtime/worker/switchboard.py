"""The slots of a running worker: `Slots` with the slot log and those who want to know.

All of it runs on one event loop and nothing awaits, so each method is one step for everyone else. What only tells of a
step, its line in the slot log and the count of free slots, comes a moment after it: a caller waits for the step itself.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from trunkline_runtime.contract import Free
from trunkline_runtime.worker.slots import Change, Seat, Slots, State

slot_log = logging.getLogger("trunkline.slots")
"""One line per change: who had which slot when. Callers' logs are joined with it, so it names every one."""

SOON_SECONDS: Final = (
    0.002  # after the last free slot went, or the first came back: callers go by that
)
LATER_SECONDS: Final = (
    0.025  # after any other change: the gateway that asked has been told with its answer
)

STOPPING: Final = "stopping"
"""The worker's own wish to drain, beside those of its gateways."""


class Switchboard:
    """Grants slots, tells of every change soon and of many at once, and knows when all is quiet.

    A worker drains while anyone wants it to: each gateway speaks for itself, and one that is gone has
    no say, so that a lost `undrain` cannot keep a worker out for ever.
    """

    def __init__(self, *, slots: int, worker: str, boot: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._slots = Slots(slots)
        self._names = {"worker": worker, "boot": boot}
        self._drainers: set[int | str] = set()
        self._listeners: list[Callable[[], None]] = []
        self._telling: asyncio.TimerHandle | None = None
        self._telling_at = 0.0
        self._had_room = True
        self._unlogged: list[tuple[Change, float]] = []  # with the time of day in Unix seconds
        self._logging: asyncio.Handle | None = None
        self._seq = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    def __repr__(self) -> str:
        return f"<Switchboard {self._slots!r} drainers={sorted(map(str, self._drainers))}>"

    @property
    def busy(self) -> int:
        return self._slots.busy

    @property
    def draining(self) -> bool:
        return self._slots.draining

    def counts(self) -> dict[State, int]:
        return self._slots.counts()

    def free(self) -> Free:
        """What gateways are told."""
        slots = self._slots
        return Free(
            type="free", n=slots.room, busy=slots.busy, draining=slots.draining, seq=self._seq
        )

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` soon after a change, and once for all that has changed by then."""
        self._listeners.append(listener)

    async def quiet(self) -> None:
        """Returns when no slot is live."""
        await self._quiet.wait()

    def take(self, call: str) -> Seat | None:
        """A seat for a call, to be given back by `end`; None when there is no room."""
        seat = self._slots.take(call)
        self._changed()
        return seat

    def end(self, seat: Seat) -> None:
        self._slots.end(seat)
        self._changed()

    def lose(self, link: int) -> None:
        """A control link is gone."""
        self.drain(link, wanted=False)

    def drain(self, who: int | str, *, wanted: bool = True) -> None:
        """Notes that a control link, or the worker itself, wants the worker to drain or no longer does."""
        (self._drainers.add if wanted else self._drainers.discard)(who)
        draining = bool(self._drainers)
        if draining != self._slots.draining:
            self._slots.draining = draining
            self._noted()

    def offer(self, count: int) -> None:
        """Lets so many slots be in use at once; calls that are there go on."""
        self._slots.offered = min(count, len(self._slots))
        self._noted()

    def tell(self) -> None:
        """Logs what has happened and tells the listeners of it: now, and not in a moment."""
        self._log()
        if self._telling is None:
            return
        self._telling.cancel()
        self._telling = None
        for listener in self._listeners:
            listener()

    def _log(self) -> None:
        """Line by line, each soon: twenty at once would keep a caller waiting for a millisecond."""
        self._logging = None
        unlogged, self._unlogged = self._unlogged, []
        for change, t in unlogged:
            slot_log.info(
                change.step.value,
                extra={"call": change.call, "slot": change.slot, "t": t, **self._names},
            )

    def _changed(self) -> None:
        """Sees to all that follows from what happened."""
        changes = self._slots.changes()
        if changes:
            t = time.time()
            self._unlogged += [(change, t) for change in changes]
            if self._logging is None:
                self._logging = self._loop.call_soon(self._log)
            (self._quiet.clear if self._slots.busy else self._quiet.set)()
            self._noted()

    def _noted(self) -> None:
        """What gateways know is not true any more."""
        self._seq += 1
        had_room, self._had_room = self._had_room, self._slots.room > 0
        soon = not had_room or not self._had_room
        at = self._loop.time() + (SOON_SECONDS if soon else LATER_SECONDS)
        if self._telling is not None:
            if self._telling_at <= at:
                return
            self._telling.cancel()
        self._telling, self._telling_at = self._loop.call_at(at, self.tell), at
