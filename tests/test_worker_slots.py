"""The slots: every sequence of events keeps each slot with one call, and each call with one slot."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trunkline_runtime.worker.slots import (
    TRANSITIONS,
    Change,
    Seat,
    SlotError,
    Slots,
    State,
    Step,
)

CALLS = st.sampled_from([f"call-{number}" for number in range(6)])


def test_the_lowest_free_slot_is_given_first() -> None:
    slots = Slots(3)
    seats = {call: slots.take(call) for call in "abc"}
    assert slots.take("d") is None
    for call in "ba":
        seat = seats[call]
        assert seat is not None
        slots.end(seat)
    slots.take("e")
    assert slots.changes()[-3:] == [
        Change(Step.FREED, 1, "b"),
        Change(Step.FREED, 0, "a"),
        Change(Step.LIVE, 0, "e"),
    ]
    assert repr(slots) == "<Slots 0:live(e) 1:free 2:live(c)>"


def test_a_call_gets_no_second_slot() -> None:
    slots = Slots(2)
    assert slots.take("a") is not None
    assert slots.take("a") is None
    assert slots.busy == 1


def test_draining_gives_nothing_new_and_takes_nothing_away() -> None:
    slots = Slots(3)
    assert slots.take("a") is not None
    slots.draining = True
    assert slots.room == 0
    assert slots.take("b") is None
    assert slots.counts() == {State.FREE: 2, State.LIVE: 1}
    slots.draining = False
    assert slots.room == 2


def test_a_call_ends_once() -> None:
    slots = Slots(1)
    seat = slots.take("a")
    assert seat is not None
    slots.end(seat)
    with pytest.raises(SlotError, match="not held by call a"):
        slots.end(seat)
    again = slots.take("a")
    assert again == seat
    with pytest.raises(SlotError):
        slots.end(seat)  # equal, but of the call before
    assert slots.busy == 1


@pytest.mark.parametrize("count", [0, -1])
def test_a_worker_without_slots_is_none(count: int) -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        Slots(count)


class SlotMachine(RuleBasedStateMachine):
    """Gateways and callers do what they like; the log must still add up."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(3)
        self.seats: list[Seat] = []
        self.by_log: dict[int, tuple[State, str]] = {}

    @rule(call=CALLS)
    def take(self, call: str) -> None:
        room = self.slots.room
        live = any(seat.call == call for seat in self.seats)
        seat = self.slots.take(call)
        assert (seat is None) == (live or room == 0)
        if seat is not None:
            assert seat.call == call
            self.seats.append(seat)

    @precondition(lambda self: self.seats)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.seats) - 1))
        self.slots.end(self.seats.pop(number))

    @rule(draining=st.booleans())
    def drain(self, draining: bool) -> None:
        self.slots.draining = draining

    @invariant()
    def the_log_tells_the_whole_state(self) -> None:
        for change in self.slots.changes():
            before, holder = self.by_log.get(change.slot, (State.FREE, ""))
            assert before is State.FREE or holder == change.call, "two calls in one slot"
            self.by_log[change.slot] = TRANSITIONS[before, change.step], change.call
        states = [self.by_log.get(number, (State.FREE, "")) for number in range(3)]
        for state, count in self.slots.counts().items():
            assert count == sum(held is state for held, _ in states)
        holders = [call for state, call in states if state is not State.FREE]
        assert len(holders) == len(set(holders)), "one call in two slots"

    @invariant()
    def every_slot_is_counted_once(self) -> None:
        counts = self.slots.counts()
        assert counts[State.FREE] + self.slots.busy == len(self.slots) == 3
        assert self.slots.room == (0 if self.slots.draining else counts[State.FREE])
        assert counts[State.LIVE] == len(self.seats)


TestSlotMachine = SlotMachine.TestCase


def test_an_engine_may_offer_fewer_slots_than_there_are() -> None:
    slots = Slots(3)
    slots.offered = 2
    first = slots.take("a")
    assert first is not None
    assert slots.room == 1
    slots.offered = 0
    assert slots.room == 0
    assert slots.take("b") is None
    slots.end(first)
    assert slots.take("b") is None
    slots.offered = 3
    assert slots.take("b") is not None
