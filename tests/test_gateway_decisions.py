"""What decides beside the ladder: the line, breakers, outliers and Retry-After. No sockets, no clocks."""

from collections.abc import Callable

import pytest
from gateway_rig import AGENT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trunkline_runtime.gateway.access.limits import Hold, Limits, Tenancy, Tenants
from trunkline_runtime.gateway.breaker import Breaker, Breakers, Outcome, State, Terms, shut, told
from trunkline_runtime.gateway.breaker import tried as begun
from trunkline_runtime.gateway.line import Lines, Nothing, Waiter
from trunkline_runtime.gateway.outliers import ASIDE_SECONDS, MERCY_SECONDS, Demerit, Outliers
from trunkline_runtime.gateway.runway import (
    LEAST_SECONDS,
    MOST_SECONDS,
    UNKNOWN_SECONDS,
    Coming,
    Prospects,
    retry_after,
    seconds_until,
)
from trunkline_runtime.gateway.table import Row, Table


def a_row(worker: str, free: int = 0) -> Row:
    return Row(agent=AGENT, worker=worker, boot="b", slots=8, free=free)


# --- the line ---------------------------------------------------------------------------------------------


class LineMachine(RuleBasedStateMachine):
    """Tenants with guarantees, slots that come and go: who is served, against a plain list."""

    TENANCY = Tenancy(overrides={"kept": Limits(guaranteed_slots=2)})

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lines, self.tenants = Table(), Lines(), Tenants()
        self.row = a_row("echo-0")
        self.table.add(self.row)
        self.table.risen = self.serve
        self.line: list[tuple[Waiter, Hold]] = []  # in the order in which they came
        self.served: list[Waiter] = []
        self.live: list[Hold] = []

    def serve(self, agent: str) -> None:
        self.lines.serve(agent, self.give)

    def give(self, waiter: Waiter) -> Row | Nothing:
        row = self.table.pick(AGENT, waiter.avoid, lambda _: 0)
        if row is None:
            return Nothing.FOR_CALLER if self.table.view(AGENT) else Nothing.FOR_ANYBODY
        if not waiter.take(lambda: self.table.view(AGENT)):
            return Nothing.FOR_TENANT
        self.table.ask(row)
        return row

    @rule(tenant=st.sampled_from(["kept", "one", "two"]), avoids=st.booleans())
    def come(self, tenant: str, avoids: bool) -> None:
        hold = self.tenants.start(AGENT, tenant, Limits(), 1.0, 0.0)
        assert isinstance(hold, Hold)

        def take(free: Callable[[], int]) -> bool:
            return self.tenants.take(hold, self.TENANCY, 1.0, free, 0.0)

        waiter = Waiter(tenant, take, lambda row: self.woken(waiter))
        if avoids and self.lines.waiting(AGENT) % 3 == 0:
            waiter.avoid.add(self.row)
        room = self.lines.waiting(AGENT) < 6
        assert self.lines.join(AGENT, waiter, 6) == room
        if not room:
            self.tenants.end(hold, 0.0)
            return
        self.tenants.waits(hold)
        self.line.append((waiter, hold))
        self.serve(AGENT)

    def woken(self, waiter: Waiter) -> None:
        (index,) = (n for n, (each, _) in enumerate(self.line) if each is waiter)
        hold = self.line[index][1]
        earlier = [each for each, _ in self.line[:index] if each.tenant == waiter.tenant]
        assert all(self.row in each.avoid for each in earlier), "first come, first served"
        others = [each for each, _ in self.line if each.tenant == "kept" and not each.avoid]
        if waiter.tenant != "kept" and others:
            kept_has = sum(each.tenant == "kept" for each in self.live)
            assert self.table.view(AGENT) >= 2 - kept_has, "taken from a guarantee"
        del self.line[index]
        self.served.append(waiter)
        self.live.append(hold)

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def hang_up(self, data: st.DataObject) -> None:
        waiter, hold = self.line.pop(data.draw(st.integers(0, len(self.line) - 1)))
        self.lines.leave(AGENT, waiter)
        self.lines.leave(AGENT, waiter)  # a second time is nothing
        self.tenants.end(hold, 0.0)

    @precondition(lambda self: self.live)
    @rule()
    def end_a_call(self) -> None:
        self.tenants.end(self.live.pop(0), 0.0)
        self.row.asked -= 1  # its slot came free
        self.table.report(self.row, free=self.row.free, busy=0, draining=False, seq=0)
        self.serve(AGENT)  # what a tenant may have has changed, too

    @rule(free=st.integers(0, 4))
    def report(self, free: int) -> None:
        self.table.report(
            self.row, free=free + self.row.asked if free else 0, busy=0, draining=False, seq=0
        )

    @invariant()
    def nobody_waits_while_there_is_something_for_them(self) -> None:
        assert self.lines.waiting(AGENT) == len(self.line)
        for waiter, hold in self.line:
            assert not hold.warm
            if self.table.view(AGENT) and not waiter.avoid:
                kept = self.tenants.kept_for_others(AGENT, waiter.tenant, self.TENANCY, 0.0)
                assert kept, "a slot is free that this one may have"


TestLine = LineMachine.TestCase
TestLine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_who_lost_a_race_has_its_old_place() -> None:
    lines, woken = Lines(), list[str]()
    waiters = [
        Waiter(name, lambda _: True, lambda _, name=name: woken.append(name))  # type: ignore[misc]
        for name in "abc"
    ]
    for waiter in waiters:
        assert lines.join(AGENT, waiter, 3)
    row = a_row("echo-0", free=1)
    gifts = iter([row])
    lines.serve(AGENT, lambda _: next(gifts, Nothing.FOR_ANYBODY))
    assert woken == ["a"]
    assert lines.join(AGENT, waiters[0], 1), (
        "a place that was had is kept, however long the line is"
    )
    lines.serve(AGENT, lambda _: row)
    assert woken == ["a", "a", "b", "c"]
    assert not lines.agents()


def test_a_slot_for_one_that_has_just_given_up_goes_to_the_next_once() -> None:
    lines, slots, woken = Lines(), [a_row("echo-0")], list[str]()

    def give(_: Waiter) -> Row | Nothing:
        return slots.pop() if slots else Nothing.FOR_ANYBODY

    def gone(row: Row) -> None:
        slots.append(row)  # it gives the slot back, and whoever waits is served at once
        lines.serve(AGENT, give)

    for name, wake in (("a", gone), ("b", None), ("c", None)):
        waiter = Waiter(name, lambda _: True, wake or (lambda _, name=name: woken.append(name)))  # type: ignore[misc]
        lines.join(AGENT, waiter, 9)
    lines.serve(AGENT, give)
    assert woken == ["b"]
    assert lines.waiting(AGENT) == 1


# --- breakers ---------------------------------------------------------------------------------------------

TERMS = Terms(row=3, share=0.5, window=10.0, least=6, first=5.0, longest=20.0)
GOOD, FAULT, NEITHER = Outcome.GOOD, Outcome.FAULT, Outcome.NEITHER


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ([], State.CLOSED),
        ([FAULT, FAULT], State.CLOSED),
        ([FAULT, FAULT, FAULT], State.OPEN),
        ([FAULT, FAULT, GOOD, FAULT, FAULT], State.CLOSED),
        ([FAULT, NEITHER, FAULT, NEITHER, NEITHER], State.CLOSED),
        ([FAULT, NEITHER, FAULT, NEITHER, FAULT], State.OPEN),
        ([GOOD, FAULT] * 2, State.CLOSED),  # too few to tell
        ([GOOD, FAULT] * 3, State.OPEN),  # half of six
        ([GOOD, GOOD, FAULT] * 10, State.CLOSED),
    ],
)
def test_what_opens_a_breaker(outcomes: list[Outcome], state: State) -> None:
    breaker = Breaker()
    for number, outcome in enumerate(outcomes):
        breaker = told(breaker, outcome, number * 0.1, TERMS)
    assert breaker.state is state


def test_old_faults_are_forgotten() -> None:
    breaker = Breaker()
    for number in range(20):
        breaker = told(breaker, FAULT if number % 2 else GOOD, number * 6.0, TERMS)
    assert breaker.state is State.CLOSED


def test_an_open_breaker_is_probed_by_one_call_at_a_time_and_waits_longer_each_time() -> None:
    breakers, rung = Breakers(TERMS), (AGENT, "upstream")
    for _ in range(3):
        assert breakers.why_not(rung, 0.0, 1.0) is None
        opened = breakers.told(rung, FAULT, 0.0)
    assert opened
    for wait, now in ((5.0, 0.0), (10.0, 5.0), (20.0, 15.0), (20.0, 35.0)):
        assert shut(breakers.state(rung), now) == wait
        assert breakers.why_not(rung, now + wait - 0.1, 0.0) is not None
        assert breakers.why_not(rung, now + wait, now + wait + 3) is None, "the probe"
        assert breakers.why_not(rung, now + wait, 0.0) == "failed too often: another call tries it"
        assert not breakers.told(rung, FAULT, now + wait)
    assert breakers.why_not(rung, 75.0, 78.0) is None
    assert breakers.told(rung, GOOD, 76.0)
    assert breakers.state(rung) == Breaker()
    breakers.keep(set())
    assert repr(breakers) == "<Breakers {}>"


def test_an_answer_to_an_earlier_call_lets_the_next_one_try_an_open_breaker_at_once() -> None:
    breakers, rung = Breakers(TERMS), (AGENT, "burst")
    for _ in range(5):
        assert breakers.why_not(rung, 0.0, 3.0) is None
    for _ in range(3):
        breakers.told(rung, FAULT, 3.0)
    assert breakers.why_not(rung, 3.1, 6.0) is not None
    assert not breakers.told(rung, GOOD, 3.5), "it is not closed by that"
    assert breakers.why_not(rung, 3.5, 6.5) is None, "the probe"
    assert breakers.why_not(rung, 3.5, 6.5) == "failed too often: another call tries it"
    assert not breakers.told(rung, FAULT, 3.6)
    assert shut(breakers.state(rung), 3.6) == 2 * TERMS.first
    assert not breakers.told(rung, GOOD, 3.7)
    assert breakers.why_not(rung, 3.7, 6.7) is None
    assert breakers.told(rung, GOOD, 3.8)
    assert breakers.state(rung) == Breaker()


def test_a_probe_that_tells_nothing_leaves_the_way_to_the_next() -> None:
    breaker = Breaker(state=State.OPEN, until=5.0, wait=5.0)
    probing = begun(breaker, 5.0, 8.0)
    assert shut(probing, 7.9) > 0
    assert shut(probing, 8.0) == 0, "it is lost, whatever became of it"
    assert shut(told(probing, NEITHER, 6.0, TERMS), 6.0) == 0


@given(st.lists(st.tuples(st.sampled_from(list(Outcome)), st.floats(0, 30)), max_size=60))
@settings(deadline=None)
def test_no_breaker_is_shut_for_ever(steps: list[tuple[Outcome, float]]) -> None:
    breakers, now = Breakers(TERMS), 0.0
    for outcome, passed in steps:
        now += passed
        if breakers.why_not("rung", now, now + 1.0) is None:
            breakers.told("rung", outcome, now)
        assert shut(breakers.state("rung"), now) <= TERMS.longest + 1e-9  # sums of floats
        assert len(breakers.state("rung").recent) <= 64
    now += TERMS.longest
    assert breakers.why_not("rung", now, now + 1.0) is None


# --- outliers ---------------------------------------------------------------------------------------------


def test_a_worker_that_breaks_its_word_is_set_aside_at_once_and_longer_each_time() -> None:
    outliers, rows = Outliers(), [a_row(f"echo-{number}") for number in range(4)]
    now = 0.0
    for wait in (5.0, 10.0, 20.0, 40.0, 80.0, 120.0, 120.0):
        assert outliers.bad(rows[0], Demerit.REFUSED, now, rows) == wait
        rows[0].aside = True
        assert outliers.bad(rows[0], Demerit.REFUSED, now, rows) is None, "it is aside already"
        assert outliers.back(now + wait - 0.1) == []
        now += wait
        assert outliers.back(now) == [rows[0]]
        rows[0].aside = False
    assert outliers.bad(rows[0], Demerit.REFUSED, now + MERCY_SECONDS + 1, rows) == ASIDE_SECONDS[0]


@pytest.mark.parametrize(
    ("demerit", "times"),
    [(Demerit.REFUSED, 1), (Demerit.SILENT, 2), (Demerit.LATE, 3), (Demerit.SLOW, 5)],
)
def test_how_often_a_worker_may_fail(demerit: Demerit, times: int) -> None:
    outliers, rows = Outliers(), [a_row("echo-0"), a_row("echo-1")]
    found = [outliers.bad(rows[0], demerit, 0.0, rows) for _ in range(times)]
    assert found == [None] * (times - 1) + [5.0]


def test_a_call_that_was_taken_makes_up_for_one_that_was_not() -> None:
    outliers, rows = Outliers(), [a_row("echo-0"), a_row("echo-1")]
    for _ in range(20):
        assert outliers.bad(rows[0], Demerit.SILENT, 0.0, rows) is None
        outliers.good(rows[0])
    outliers.forget(rows[0])
    assert repr(outliers) == "<Outliers {}>"


@given(st.integers(1, 9), st.lists(st.integers(0, 8), max_size=40))
@settings(deadline=None)
def test_never_more_than_half_are_aside_and_never_the_only_one(
    count: int, faults: list[int]
) -> None:
    outliers, rows = Outliers(), [a_row(f"echo-{number}") for number in range(count)]
    for now, number in enumerate(faults):
        row = rows[number % count]
        if outliers.bad(row, Demerit.REFUSED, float(now), rows) is not None:
            row.aside = True
        assert 2 * sum(each.aside for each in rows) <= count
        for each in outliers.back(float(now)):
            each.aside = False


def test_who_is_aside_is_not_picked_and_not_counted_as_free() -> None:
    table, row = Table(), a_row("echo-0", free=3)
    table.add(row)
    table.set_aside(row, True)
    assert table.pick(AGENT, (), lambda _: 0) is None
    assert (table.view(AGENT), table.census(AGENT).aside) == (0, 1)
    table.set_aside(row, False)
    assert table.pick(AGENT, (), lambda _: 0) is row


# --- Retry-After ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "pace", "coming", "expected"),
    [
        (1, 0.0, [], None),
        (1, 0.5, [], 2.0),
        (10, 0.5, [], 20.0),
        (1, 0.0, [Coming(4, 130.0)], 30.0),
        (4, 0.0, [Coming(4, 130.0)], 30.0),
        (5, 0.0, [Coming(4, 130.0)], None),
        (5, 0.0, [Coming(4, 160.0), Coming(4, 130.0)], 60.0),
        (5, 0.1, [Coming(4, 130.0)], 30.0),  # three calls end until then
        (9, 0.1, [Coming(4, 130.0)], 50.0),  # and two more after it
        (1, 0.0, [Coming(4, 90.0)], 5.0),  # the pod is late
    ],
)
def test_when_slots_come_free(
    wanted: int, pace: float, coming: list[Coming], expected: float | None
) -> None:
    assert seconds_until(wanted, pace, coming, 100.0) == (
        None if expected is None else pytest.approx(expected)
    )


@given(
    ahead=st.integers(0, 10_000),
    pace=st.floats(0, 100),
    coming=st.lists(st.builds(Coming, st.integers(0, 64), st.floats(0, 1e4)), max_size=8),
    chance=st.floats(0, 1),
)
@settings(deadline=None)
def test_retry_after_is_bounded_and_never_sooner_for_who_comes_later(
    ahead: int, pace: float, coming: list[Coming], chance: float
) -> None:
    found = retry_after(ahead, pace, coming, 100.0, chance)
    assert LEAST_SECONDS <= found <= MOST_SECONDS
    if seconds_until(ahead + 2, pace, coming, 100.0) is not None:
        assert found <= retry_after(ahead + 1, pace, coming, 100.0, chance)


def test_refused_callers_are_told_different_times() -> None:
    prospects = Prospects()
    assert UNKNOWN_SECONDS[0] <= prospects.refused(0, 100.0, 0.5) <= UNKNOWN_SECONDS[1]
    for second in range(60):
        prospects.ended(100.0 + second)
    told = [prospects.refused(2, 160.0, 0.0) for _ in range(20)]
    assert told == [4 + number for number in range(20)][: len(told)] or told == sorted(told)
    assert told[0] == pytest.approx(3, abs=1)
    assert told[-1] == pytest.approx(22, abs=2)
    prospects.coming = (Coming(40, 170.0),)
    assert prospects.refused(2, 160.0, 0.0) == 10
