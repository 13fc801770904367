"""The slots of a running worker: `Slots` with a clock, tickets, the slot log and those who want to know.

All of it runs on one event loop and nothing awaits, so each method is one step for everyone else. What only tells of a
step, its line in the slot log and the count of free slots, comes a moment after it: a caller waits for the step itself.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Final

from trunkline_runtime.contract import Free
from trunkline_runtime.worker.orders import ReserveOrder
from trunkline_runtime.worker.slots import Change, Reservation, Seat, Slots, State

slot_log = logging.getLogger("trunkline.slots")
"""One line per change: who had which slot when. Callers' logs are joined with it, so it names every one."""

TELL_SECONDS: Final = 0.002  # after a change: what an admission takes from its reserve to its 101

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
        self._unlogged: list[tuple[Change, float]] = []  # with the time of day in Unix seconds
        self._lapsing: asyncio.TimerHandle | None = None
        self._lapsing_at: float | None = None
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
        return Free(type="free", n=slots.room, busy=slots.busy, draining=slots.draining)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` within `TELL_SECONDS` of a change, and once for all that has changed by then."""
        self._listeners.append(listener)

    async def quiet(self) -> None:
        """Returns when no slot is reserved or live."""
        await self._quiet.wait()

    def reserve(self, order: ReserveOrder, link: int) -> str | None:
        """A ticket, or None when there is no room."""
        now = self._loop.time()
        self._slots.lapse(now)
        ticket = self._slots.reserve(
            Reservation(
                call=order.call,
                ticket=secrets.token_urlsafe(16),
                link=link,
                deadline=now + order.seconds,
                settings=order.settings,
            )
        )
        self._changed()
        return ticket

    def claim(self, ticket: str) -> Seat | None:
        """The seat that a warm ticket opens; None for one that is wrong, lapsed or used."""
        seat = self._slots.claim(ticket, self._loop.time())
        self._changed()
        return seat

    def take(self, call: str) -> Seat | None:
        """A seat without reservation, for burst; None when there is no room."""
        self._slots.lapse(self._loop.time())
        seat = self._slots.take(call)
        self._changed()
        return seat

    def end(self, seat: Seat) -> None:
        self._slots.end(seat)
        self._changed()

    def release(self, ticket: str) -> None:
        self._slots.release(ticket)
        self._changed()

    def lose(self, link: int) -> None:
        """A control link is gone."""
        self._slots.lose(link)
        self.drain(link, wanted=False)

    def drain(self, who: int | str, *, wanted: bool = True) -> None:
        """Notes that a control link, or the worker itself, wants the worker to drain or no longer does."""
        (self._drainers.add if wanted else self._drainers.discard)(who)
        draining = bool(self._drainers)
        if draining != self._slots.draining:
            self._slots.draining = draining
            self._tell_soon()
        self._changed()

    def offer(self, count: int) -> None:
        """Lets so many slots be in use at once; calls that are there go on."""
        self._slots.offered = min(count, len(self._slots))
        self._tell_soon()

    def _lapse(self) -> None:
        self._lapsing = self._lapsing_at = None
        self._slots.lapse(self._loop.time())
        self._changed()

    def tell(self) -> None:
        """Logs what has happened and tells the listeners of it: now, and not in a moment."""
        if self._telling is None:
            return
        self._telling.cancel()
        self._telling = None
        unlogged, self._unlogged = self._unlogged, []
        for change, t in unlogged:
            slot_log.info(
                change.step.value,
                extra={"call": change.call, "slot": change.slot, "t": t, **self._names},
            )
        for listener in self._listeners:
            listener()

    def _changed(self) -> None:
        """Sees to all that follows from what happened."""
        changes = self._slots.changes()
        if changes:
            t = time.time()
            self._unlogged += [(change, t) for change in changes]
            (self._quiet.clear if self._slots.busy else self._quiet.set)()
            self._tell_soon()
        self._set_timer()

    def _set_timer(self) -> None:
        deadline = self._slots.next_deadline
        if deadline == self._lapsing_at:
            return
        if self._lapsing is not None:
            self._lapsing.cancel()
        self._lapsing = None if deadline is None else self._loop.call_at(deadline, self._lapse)
        self._lapsing_at = deadline

    def _tell_soon(self) -> None:
        if self._telling is None:
            self._telling = self._loop.call_later(TELL_SECONDS, self.tell)
