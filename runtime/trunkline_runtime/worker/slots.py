"""A worker's slots: which are free or live, and for which call.

The worker alone decides who has a slot, so this file is where double booking would have to happen. Every transition is
in `TRANSITIONS`; one that is not there is a bug and raises `SlotError`. Having no room is a result, not an error.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from trunkline_runtime.contract import Settings


class State(StrEnum):
    FREE = "free"
    LIVE = "live"  # its data link is open


class Step(StrEnum):
    """What happens to a slot. The words are those of the slot log."""

    LIVE = "live"
    FREED = "freed"  # the call ended


TRANSITIONS: Final[Mapping[tuple[State, Step], State]] = {
    (State.FREE, Step.LIVE): State.LIVE,
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


class Slots:
    """`count` slots. Methods that change one note it; `changes` hands the notes over, oldest first."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"a worker has at least one slot, not {count}")
        self._slots: list[Seat | None] = [None] * count
        # Each admission asks these: walks over 256 slots cost it more than all else that a worker does for it.
        self._calls: set[str] = set()
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
        return {State.FREE: len(self._free), State.LIVE: self.busy}

    @property
    def busy(self) -> int:
        """Slots that are live."""
        return len(self._calls)

    @property
    def room(self) -> int:
        """Slots that a call would find now."""
        return 0 if self.draining else max(0, self.offered - self.busy)

    def changes(self) -> list[Change]:
        """What happened since the last time this was asked."""
        notes, self._notes = self._notes, []
        return notes

    def take(self, call: str) -> Seat | None:
        """Makes the lowest free slot live; None without room, and for a call that has one already."""
        if not self.room or call in self._calls:
            return None
        number = self._free[0]
        seat = Seat(number, call, Settings())
        self._move(number, Step.LIVE, seat)
        return seat

    def end(self, seat: Seat) -> None:
        """The call of this seat is over. Raises `SlotError` when it was over before."""
        if self._slots[seat.slot] is not seat:
            raise SlotError(f"slot {seat.slot} is not held by call {seat.call}: {self!r}")
        self._move(seat.slot, Step.FREED, None)

    def _move(self, number: int, step: Step, after: Seat | None) -> None:
        before = self._slots[number]
        if TRANSITIONS.get((_state(before), step)) is not _state(after):
            raise SlotError(f"slot {number} is {_state(before)} and cannot be {step}")
        holder = after or before
        assert holder is not None
        self._slots[number] = after
        if after is None:
            heapq.heappush(self._free, number)
            self._calls.discard(holder.call)
        else:
            heapq.heappop(self._free)  # nothing but the lowest is ever taken
            self._calls.add(holder.call)
        self._notes.append(Change(step, number, holder.call))


def _state(slot: Seat | None) -> State:
    return State.FREE if slot is None else State.LIVE
