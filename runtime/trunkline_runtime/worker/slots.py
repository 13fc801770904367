"""A worker's slots: which are free, reserved or live, and for which call.

The worker alone decides who has a slot, so this file is where double booking would have to happen. It
has no clock and makes no tickets: both come as arguments. Every transition is in `TRANSITIONS`; one that
is not there is a bug and raises `SlotError`. Having no room is a result, not an error.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from trunkline_runtime.contract import Settings


class State(StrEnum):
    FREE = "free"
    RESERVED = "reserved"  # a gateway holds a ticket and may open one data link with it
    LIVE = "live"  # the data link is open


class Step(StrEnum):
    """What happens to a slot. The words are those of the slot log."""

    RESERVED = "reserved"
    LIVE = "live"
    LAPSED = "lapsed"  # the ticket can no longer be used
    FREED = "freed"  # the call ended


TRANSITIONS: Final[Mapping[tuple[State, Step], State]] = {
    (State.FREE, Step.RESERVED): State.RESERVED,
    (State.FREE, Step.LIVE): State.LIVE,  # burst: the ticket is signed, so nothing was reserved
    (State.RESERVED, Step.LIVE): State.LIVE,
    (State.RESERVED, Step.LAPSED): State.FREE,
    (State.LIVE, Step.FREED): State.FREE,
}


class SlotError(RuntimeError):
    """A transition that no slot may make: a bug in the worker."""


@dataclass(frozen=True, slots=True)
class Change:
    """One transition, for the slot log."""

    step: Step
    slot: int
    call: str


@dataclass(frozen=True, slots=True)
class Seat:
    """A live slot: the call in it and what its gateway wants for it."""

    slot: int
    call: str
    settings: Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A grant that no data link has used yet."""

    call: str
    ticket: str
    link: int  # the control link that asked; its loss frees the slot
    deadline: float  # on the caller's clock
    settings: Settings


class Slots:
    """`count` slots. Methods that change one note it; `changes` hands the notes over, oldest first."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"a worker has at least one slot, not {count}")
        self._slots: list[Reservation | Seat | None] = [None] * count
        # Each admission asks these ten times: walks over 256 slots cost it more than all else that a worker does for it.
        self._calls: dict[str, int] = {}  # the slot of each call that has one
        self._tickets: dict[str, int] = {}  # the slot of each reservation
        self._free = list(range(count))  # a heap
        self._notes: list[Change] = []
        self.draining = False
        self.offered = (
            count  # so many may be in use; an engine that is slow offers fewer than it has
        )

    def __repr__(self) -> str:
        slots = " ".join(
            f"{number}:{_state(slot)}" + (f"({slot.call})" if slot else "")
            for number, slot in enumerate(self._slots)
        )
        return f"<Slots {slots}{' draining' if self.draining else ''}>"

    def __len__(self) -> int:
        return len(self._slots)

    def counts(self) -> dict[State, int]:
        """How many slots are in each state."""
        reserved, free = len(self._tickets), len(self._free)
        return {State.FREE: free, State.RESERVED: reserved, State.LIVE: self.busy - reserved}

    @property
    def busy(self) -> int:
        """Slots that are reserved or live."""
        return len(self._calls)

    @property
    def room(self) -> int:
        """Slots that a reserve would find now."""
        return 0 if self.draining else max(0, self.offered - self.busy)

    def changes(self) -> list[Change]:
        """What happened since the last time this was asked."""
        notes, self._notes = self._notes, []
        return notes

    def reserve(self, wanted: Reservation) -> str | None:
        """Holds the lowest free slot for a call; returns the ticket that opens it, None without room.

        A call that has a reservation keeps its slot and its ticket; link, deadline and settings become
        those of this request, for its gateway may have come back on a new link. A live call has its slot
        already and gets no second one.
        """
        number = self._calls.get(wanted.call)
        if number is not None:
            held = self._slots[number]
            if not isinstance(held, Reservation):
                return None
            self._slots[number] = replace(wanted, ticket=held.ticket)
            return held.ticket
        number = self._lowest_free()
        if number is None:
            return None
        self._move(number, Step.RESERVED, wanted)
        return wanted.ticket

    def claim(self, ticket: str, now: float) -> Seat | None:
        """Opens the data link of a ticket, once; None for a ticket that is wrong, lapsed or used."""
        number = self._tickets.get(ticket)
        if number is None:
            return None
        reservation = self._slots[number]
        assert isinstance(reservation, Reservation)
        if reservation.deadline <= now:
            return None
        seat = Seat(number, reservation.call, reservation.settings)
        self._move(number, Step.LIVE, seat)
        return seat

    def take(self, call: str) -> Seat | None:
        """Makes the lowest free slot live without a reservation; None without room."""
        number = self._lowest_free() if call not in self._calls else None
        if number is None:
            return None
        seat = Seat(number, call, Settings())
        self._move(number, Step.LIVE, seat)
        return seat

    def end(self, seat: Seat) -> None:
        """The call of this seat is over. Raises `SlotError` when it was over before."""
        if self._slots[seat.slot] is not seat:
            raise SlotError(f"slot {seat.slot} is not held by call {seat.call}: {self!r}")
        self._move(seat.slot, Step.FREED, None)

    def release(self, ticket: str) -> None:
        """The gateway will not use its grant. A ticket that is used or gone is none to release."""
        number = self._tickets.get(ticket)
        if number is not None:
            self._move(number, Step.LAPSED, None)

    def lose(self, link: int) -> None:
        """A control link is gone, and with it the use of its reservations. Live calls go on."""
        for number, reservation in self._reservations():
            if reservation.link == link:
                self._move(number, Step.LAPSED, None)

    def lapse(self, now: float) -> None:
        """Frees the reservations whose deadline has come."""
        for number, reservation in self._reservations():
            if reservation.deadline <= now:
                self._move(number, Step.LAPSED, None)

    @property
    def next_deadline(self) -> float | None:
        """When `lapse` will next have something to do."""
        return min((each.deadline for _, each in self._reservations()), default=None)

    def _reservations(self) -> list[tuple[int, Reservation]]:
        """In the order of their slots."""
        found = []
        for number in sorted(self._tickets.values()):
            reservation = self._slots[number]
            assert isinstance(reservation, Reservation)
            found.append((number, reservation))
        return found

    def _lowest_free(self) -> int | None:
        return self._free[0] if self.room else None

    def _move(self, number: int, step: Step, after: Reservation | Seat | None) -> None:
        before = self._slots[number]
        if TRANSITIONS.get((_state(before), step)) is not _state(after):
            raise SlotError(f"slot {number} is {_state(before)} and cannot be {step}")
        holder = after or before
        assert holder is not None
        self._slots[number] = after
        if isinstance(before, Reservation):
            del self._tickets[before.ticket]
        if isinstance(after, Reservation):
            self._tickets[after.ticket] = number
        if before is None:
            heapq.heappop(self._free)  # nothing but the lowest is ever taken
            self._calls[holder.call] = number
        elif after is None:
            heapq.heappush(self._free, number)
            del self._calls[holder.call]
        self._notes.append(Change(step, number, holder.call))


def _state(slot: Reservation | Seat | None) -> State:
    match slot:
        case None:
            return State.FREE
        case Reservation():
            return State.RESERVED
        case Seat():
            return State.LIVE
