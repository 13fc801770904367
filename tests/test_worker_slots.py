"""The slots: every sequence of events keeps each slot with one call, and each ticket with one link."""

import itertools

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trunkline_runtime.contract import Settings
from trunkline_runtime.worker.slots import (
    TRANSITIONS,
    Change,
    Reservation,
    Seat,
    SlotError,
    Slots,
    State,
    Step,
)

CALLS = st.sampled_from([f"call-{number}" for number in range(6)])
LINKS = st.integers(1, 3)
SECONDS = st.integers(1, 10)


def wanted(call: str, ticket: str, *, link: int = 1, deadline: float = 10) -> Reservation:
    return Reservation(
        call=call, ticket=ticket, link=link, deadline=deadline, settings=Settings(greeting=call)
    )


def test_the_lowest_free_slot_is_given_first() -> None:
    slots = Slots(3)
    for call in "abc":
        assert slots.reserve(wanted(call, f"ticket-{call}")) == f"ticket-{call}"
    assert slots.reserve(wanted("d", "ticket-d")) is None
    slots.release("ticket-b")
    slots.release("ticket-a")
    slots.reserve(wanted("e", "ticket-e"))
    assert slots.changes()[-3:] == [
        Change(Step.LAPSED, 1, "b"),
        Change(Step.LAPSED, 0, "a"),
        Change(Step.RESERVED, 0, "e"),
    ]
    assert repr(slots) == "<Slots 0:reserved(e) 1:free 2:reserved(c)>"


def test_a_call_that_asks_again_keeps_its_ticket_and_moves_to_the_link_that_asked() -> None:
    slots = Slots(2)
    slots.reserve(wanted("a", "first", link=1, deadline=10))
    assert slots.reserve(wanted("a", "second", link=2, deadline=20)) == "first"
    assert slots.busy == 1
    slots.lose(1)
    slots.lapse(15)
    assert slots.next_deadline == 20
    assert slots.claim("second", 15) is None
    assert slots.claim("first", 15) == Seat(0, "a", Settings(greeting="a"))


def test_a_live_call_gets_no_second_slot() -> None:
    slots = Slots(2)
    slots.reserve(wanted("a", "ticket"))
    slots.claim("ticket", 0)
    assert slots.reserve(wanted("a", "another")) is None
    assert slots.take("a") is None
    assert slots.busy == 1


def test_a_ticket_is_good_until_its_deadline_and_not_at_it() -> None:
    slots = Slots(2)
    slots.reserve(wanted("a", "early", deadline=10))
    slots.reserve(wanted("b", "late", deadline=10))
    assert slots.claim("early", 9.999) is not None
    assert slots.claim("late", 10) is None
    slots.lapse(10)
    assert slots.counts() == {State.FREE: 1, State.RESERVED: 0, State.LIVE: 1}


def test_draining_grants_nothing_new_and_keeps_what_was_promised() -> None:
    slots = Slots(3)
    slots.reserve(wanted("a", "ticket"))
    slots.draining = True
    assert slots.room == 0
    assert slots.reserve(wanted("b", "other")) is None
    assert slots.take("c") is None
    assert slots.claim("ticket", 0) is not None
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
    """Gateways, callers and the clock do what they like; the log must still add up."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(3)
        self.now = 0.0
        self.numbers = itertools.count()
        self.granted: list[str] = []
        self.opened: set[str] = set()
        self.seats: list[Seat] = []
        self.by_log: dict[int, tuple[State, str]] = {}

    @rule(call=CALLS, link=LINKS, seconds=SECONDS)
    def reserve(self, call: str, link: int, seconds: int) -> None:
        room = self.slots.room
        busy_before = self.slots.busy
        ticket = self.slots.reserve(
            wanted(call, f"t{next(self.numbers)}", link=link, deadline=self.now + seconds)
        )
        assert self.slots.busy <= busy_before + 1
        if ticket is None:
            live = any(seat.call == call for seat in self.seats)
            assert live or room == 0
        else:
            assert ticket not in self.opened
            self.granted.append(ticket)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.granted))
        seat = self.slots.claim(ticket, self.now)
        if seat is not None:
            assert ticket not in self.opened
            self.opened.add(ticket)
            self.seats.append(seat)

    @rule(call=CALLS)
    def take(self, call: str) -> None:
        room = self.slots.room
        seat = self.slots.take(call)
        if seat is not None:
            assert room > 0
            self.seats.append(seat)

    @precondition(lambda self: self.seats)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.seats) - 1))
        self.slots.end(self.seats.pop(number))

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.slots.release(data.draw(st.sampled_from(self.granted)))

    @rule(link=LINKS)
    def lose(self, link: int) -> None:
        self.slots.lose(link)

    @rule(seconds=SECONDS)
    def pass_time(self, seconds: int) -> None:
        self.now += seconds
        self.slots.lapse(self.now)
        deadline = self.slots.next_deadline
        assert deadline is None or deadline > self.now

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
