"""The slot table and the ladder, without sockets, clocks or randomness of their own."""

import random
from collections.abc import Collection

import pytest
from gateway_rig import AGENT, a_route, routes_text
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from trunkline_runtime.contract import BurstRung, UpstreamRung, WaitRung, WarmRung
from trunkline_runtime.gateway import routes
from trunkline_runtime.gateway.ladder import (
    IN_LINE,
    LAST_SECONDS,
    MOST_SETTLING,
    MOST_STEPS,
    Attempt,
    Burst,
    Ladder,
    Patience,
    Placement,
    Rejected,
    Step,
    TryBurst,
    TryUpstream,
    TryWait,
    TryWarm,
    Upstream,
    Warm,
)
from trunkline_runtime.gateway.routes import Route
from trunkline_runtime.gateway.routes_reader import parse_routes
from trunkline_runtime.gateway.table import Row, Table

NAMES = [f"echo-{number}" for number in range(5)]
AGENTS = ["default/echo", "default/other"]


def a_row(worker: str, *, free: int = 4, agent: str = AGENT, boot: str = "b") -> Row:
    return Row(agent=agent, worker=worker, boot=boot, slots=8, free=free)


class TableMachine(RuleBasedStateMachine):
    """Any order of what links do, against a plain list of rows."""

    rows = Bundle("rows")

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.model: dict[tuple[str, str], Row] = {}

    @rule(
        target=rows,
        agent=st.sampled_from(AGENTS),
        worker=st.sampled_from(NAMES),
        free=st.integers(0, 8),
    )
    def dial_in(self, agent: str, worker: str, free: int) -> Row:
        row = a_row(worker, free=free, agent=agent, boot=str(len(self.model)))
        assert self.table.add(row) is self.model.get((agent, worker))
        self.model[agent, worker] = row
        return row

    @rule(row=rows)
    def go(self, row: Row) -> None:
        there = self.model.get((row.agent, row.worker)) is row
        assert self.table.remove(row) == there
        if there:
            del self.model[row.agent, row.worker]

    @rule(row=rows, free=st.integers(0, 8), draining=st.booleans(), seq=st.integers(0, 9))
    def report(self, row: Row, free: int, draining: bool, seq: int) -> None:
        before = (row.seq, row.free, row.draining)
        self.table.report(row, free=free, busy=8 - free, draining=draining, seq=seq)
        told = (seq, free, draining)
        assert (row.seq, row.free, row.draining) == (told if seq >= before[0] else before)

    @rule(row=rows, barred=st.booleans())
    def bar(self, row: Row, barred: bool) -> None:
        self.table.bar(row, barred)

    @rule(row=rows)
    def ask(self, row: Row) -> None:
        self.table.ask(row)

    @rule(row=rows, taken=st.booleans(), full=st.booleans())
    def settle(self, row: Row, taken: bool, full: bool) -> None:
        if row.asked:
            self.table.settle(row, taken=taken, full=full)

    @rule(agent=st.sampled_from(AGENTS), data=st.data(), seed=st.integers())
    def pick(self, agent: str, data: st.DataObject, seed: int) -> None:
        here = [row for row in self.model.values() if row.agent == agent]
        tried = set(data.draw(st.lists(st.sampled_from(here)))) if here else set()
        open_ = [row for row in here if row.view and row not in tried]
        picked = self.table.pick(agent, tried, random.Random(seed).randrange)
        if open_:
            assert picked in open_
            assert picked.view == min(row.view for row in open_)
        else:
            assert picked is None

    @invariant()
    def what_is_known_is_what_is_there(self) -> None:
        for agent in AGENTS:
            here = {row for row in self.model.values() if row.agent == agent}
            assert set(self.table.rows(agent)) == here
            assert self.table.free(agent) == sum(row.free for row in here)
            lying = [row for bucket in self.buckets(agent) for row in bucket]
            assert sorted(map(id, lying)) == sorted(id(row) for row in here if row.view)
        assert set(self.table.agents()) == {row.agent for row in self.model.values()}

    def buckets(self, agent: str) -> list[list[Row]]:
        pool = self.table._pools.get(agent)
        return pool.buckets if pool else []


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def test_equals_are_drawn_from_and_the_fullest_comes_first() -> None:
    table = Table()
    for name, free in (("empty", 8), ("half-a", 4), ("half-b", 4), ("full", 0)):
        table.add(a_row(name, free=free))
    picks = {
        row.worker
        for seed in range(50)
        if (row := table.pick(AGENT, (), random.Random(seed).randrange))
    }
    assert picks == {"half-a", "half-b"}


def test_a_call_on_its_way_counts_as_taken() -> None:
    table, row = Table(), a_row("one", free=2)
    table.add(row)
    table.ask(row)
    table.ask(row)
    assert table.pick(AGENT, (), lambda _: 0) is None
    table.settle(row, taken=True)
    assert (row.free, row.view) == (1, 0)
    table.settle(row, taken=False, full=True)
    assert (row.free, row.view) == (0, 0)
    table.report(row, free=1, busy=1, draining=False, seq=1)
    assert table.pick(AGENT, (), lambda _: 0) is row


@pytest.mark.parametrize(
    ("taken", "full", "seq", "free"),
    [
        (True, False, 6, 2),  # later than the report, which had 3 free
        (True, False, 5, 3),  # the report knows of it
        (True, False, 4, 3),
        (True, False, None, 2),
        (False, True, 6, 0),
        (False, True, 5, 0),  # whatever its reason is
        (False, True, 4, 3),  # one has come free since
        (False, True, None, 0),
        (False, False, None, 3),
    ],
)
def test_an_answer_counts_unless_a_report_knows_of_it(
    taken: bool, full: bool, seq: int | None, free: int
) -> None:
    table, row = Table(), a_row("one", free=8)
    table.add(row)
    table.report(row, free=3, busy=5, draining=False, seq=5)
    table.ask(row)
    told: list[int] = []
    table.risen = lambda _: told.append(row.view)
    table.settle(row, taken=taken, full=full, seq=seq)
    assert (row.free, row.asked) == (free, 0)
    assert bool(told) == (free == 3), "who waits is served where there is more room than before"


def test_the_table_tells_at_once_when_a_worker_has_more_room_and_only_then() -> None:
    table, row, told = Table(), a_row("one", free=0), list[str]()
    table.risen = told.append
    table.add(row)
    steps = [
        (lambda: table.report(row, free=2, busy=0, draining=False, seq=1), True),
        (lambda: table.report(row, free=2, busy=0, draining=False, seq=1), False),
        (lambda: table.ask(row), False),
        (lambda: table.settle(row, taken=False), True),
        (lambda: table.bar(row, True), False),
        (lambda: table.bar(row, False), True),
        (lambda: table.set_aside(row, True), False),
        (lambda: table.set_aside(row, False), True),
        (lambda: table.report(row, free=1, busy=1, draining=False, seq=1), False),
        (lambda: table.remove(row), False),
        (lambda: table.report(row, free=2, busy=0, draining=False, seq=1), False),  # it is gone
    ]
    for step, rises in steps:
        step()  # type: ignore[no-untyped-call]  # lambdas of one kind
        assert told == ([AGENT] if rises else [])
        told.clear()


# --- the ladder ----------------------------------------------------------------------------------------


def route_with(rungs: str, answer_seconds: float = 8.0, deadline: float = 7.0) -> Route:
    """`w` is a warm rung, `b` a burst rung, `u` an upstream, `l` the line."""
    burst = BurstRung(
        kind="burst",
        name="us-east",
        url="http://127.0.0.1:1",
        proxyToken="",
        ticketKey="k",
        deadlineSeconds=deadline,
    )
    upstream = UpstreamRung(
        kind="upstream", url="ws://127.0.0.1:1", model="m", token="", deadlineSeconds=deadline
    )
    kinds = {"w": WarmRung(kind="warm"), "b": burst, "u": upstream}
    kinds |= {"l": WaitRung(kind="wait", most=3)}
    parts = [kinds[rung] for rung in rungs]
    text = routes_text(a_route(rungs=parts, answerSeconds=answer_seconds))
    return parse_routes(text).by_agent[AGENT]


@given(
    rungs=st.text("wbul", max_size=5),
    workers=st.integers(0, 6),
    answer=st.floats(0.1, 10),
    deadline=st.floats(0.1, 20),
    spent=st.lists(st.floats(0, 1), max_size=30),
    success=st.integers(0, 40),
    offers=st.lists(st.booleans(), max_size=30),
    shut=st.sets(st.sampled_from(["burst/us-east", "upstream"])),
    settling=st.floats(-1, 12),
)
@settings(max_examples=300, deadline=None)
def test_a_ladder_ends_in_time_and_records_every_rung(
    rungs: str,
    workers: int,
    answer: float,
    deadline: float,
    spent: list[float],
    success: int,
    offers: list[bool],
    shut: set[str],
    settling: float,
) -> None:
    patience = Patience()
    rows = [a_row(f"echo-{number}") for number in range(workers)]
    table = Table()
    for row in rows:
        table.add(row)
    now, begun, attempts = 100.0, 100.0, list[Attempt]()
    ladder = Ladder(
        route_with(rungs, answer, deadline),
        begun,
        patience,
        lambda rung, _: "shut" if rung in shut else None,
        begun + settling,
    )
    times, offered = iter(spent), iter(offers)
    while True:
        attempt = ladder.next(now, lambda tried: table.pick(AGENT, tried, lambda _: 0))
        if isinstance(attempt, Rejected):
            placement = ladder.rejected(attempt, now)
            break
        if isinstance(attempt, TryWait):
            assert "l" in rungs or ("w" in rungs and settling > 0)
            most = answer - LAST_SECONDS if "l" in rungs else min(answer - LAST_SECONDS, settling)
            assert attempt.until == pytest.approx(begun + most)
            if not rows or not next(offered, False):
                now = attempt.until
                ladder.failed(now, "nothing came")
                continue
            now += (attempt.until - now) * next(times, 1.0)
            attempt = ladder.offered(now, rows[0])
            assert attempt.held
        assert attempt.answer_by <= begun + answer
        attempts.append(attempt)
        began = now
        # An attempt takes some part of its time, never more.
        now += (attempt.answer_by - now) * next(times, 1.0)
        if len(attempts) > success:
            placement = ladder.answered(now)
            break
        ladder.failed(now, "test")
        assert placement_ms(ladder) >= 0
        assert now >= began
    assert now <= begun + answer
    assert not {step.rung for step in placement.steps if step.why == "test"} & shut
    assert len(placement.steps) <= MOST_STEPS
    if len(placement.steps) < MOST_STEPS:
        check_record(placement, attempts, rungs, workers, patience)


def placement_ms(ladder: Ladder) -> float:
    return ladder._steps[-1].ms


def check_record(
    placement: Placement,
    attempts: list[Attempt],
    rungs: str,
    workers: int,
    patience: Patience,
) -> None:
    placed = not isinstance(placement.result, Rejected)
    warm = [each.row for each in attempts if isinstance(each, TryWarm) and not each.held]
    assert len(set(warm)) == len(warm), "no worker is asked twice"
    assert len(warm) <= patience.tries * rungs.count("w")
    bursts = sum(isinstance(attempt, TryBurst) for attempt in attempts)
    assert bursts <= rungs.count("b")
    failed = [step for step in placement.steps if step.why == "test"]
    assert len(failed) == len(attempts) - placed, "every attempt but the last is in the record"
    assert sum(isinstance(each, TryUpstream) for each in attempts) <= rungs.count("u")
    if not workers and placed:
        assert isinstance(placement.result, Burst | Upstream)
    assert placement.ms >= placement.answered_ms >= 0
    assert placed or not placement.answered_ms


def test_a_placement_says_every_rung_and_why() -> None:
    table, row = Table(), a_row("echo-0")
    table.add(row)
    ladder = Ladder(route_with("wb"), 10.0, Patience())

    def pick(tried: object) -> Row | None:
        return table.pick(AGENT, tried, lambda _: 0)  # type: ignore[arg-type]  # a set of rows

    first = ladder.next(10.0, pick)
    assert first == TryWarm(row, 10.5)
    ladder.failed(10.5, "did not answer its data link in time")
    second = ladder.next(10.5, pick)
    assert isinstance(second, TryBurst)
    assert second.answer_by == pytest.approx(17.5)
    placement = ladder.answered(12.0)
    assert placement.result == Burst("us-east")
    assert (placement.rung, placement.worker) == ("burst/us-east", "")
    assert (placement.ms, placement.answered_ms) == (2000.0, 1500.0)
    assert placement.steps == (
        Step("warm", "echo-0", "did not answer its data link in time", 500.0),
    )


def test_the_last_worker_may_be_slow() -> None:
    """Only while there is somewhere else to go does a silent worker cost no more than half a second."""
    table = Table()
    for name in ("echo-0", "echo-1"):
        table.add(a_row(name))
    ladder = Ladder(route_with("w", answer_seconds=8), 0.0, Patience())

    def pick(tried: Collection[Row]) -> Row | None:
        return table.pick(AGENT, tried, lambda _: 0)

    first = ladder.next(0.0, pick)
    assert isinstance(first, TryWarm)
    assert first.answer_by == 0.5
    ladder.failed(0.5, "did not answer its data link in time")
    last = ladder.next(0.5, pick)
    assert isinstance(last, TryWarm)
    assert last.answer_by == 8.0
    ladder.failed(8.0, "did not answer its data link in time")
    assert isinstance(ladder.next(8.0, pick), Rejected)


def test_a_burst_rung_gets_what_is_left_when_that_is_less_than_its_deadline() -> None:
    ladder = Ladder(route_with("b", answer_seconds=8, deadline=7), 0.0, Patience())
    attempt = ladder.next(5.0, lambda _: None)
    assert isinstance(attempt, TryBurst)
    assert attempt.answer_by == 8.0
    ladder.failed(8.0, "did not start a session in time")
    assert isinstance(ladder.next(8.0, lambda _: None), Rejected)


def test_who_waits_gets_a_slot_that_came_free_and_stays_in_line_when_another_was_faster() -> None:
    row = a_row("echo-0")
    ladder = Ladder(route_with("wl"), 0.0, Patience())
    first = ladder.next(0.0, lambda _: None)
    assert first == TryWait(ladder._route.rungs[1], 7.75)  # type: ignore[arg-type]  # a WaitRung
    assert ladder.offered(2.0, row) == TryWarm(row, 4.0, held=True)
    ladder.failed(2.1, "full")
    assert ladder.next(2.1, lambda _: row) == first, "it goes to its place, past what is free"
    ladder.offered(5.0, row)
    placement = ladder.answered(5.1)
    assert (placement.rung, placement.worker) == ("warm", "echo-0")
    assert [(step.rung, step.worker, step.why) for step in placement.steps] == [
        ("warm", "", "no free slot"),
        ("wait", "", IN_LINE),
        ("warm", "echo-0", "full"),
        ("wait", "", IN_LINE),
    ]
    assert placement.ms == 5100.0


def test_who_waited_in_vain_is_told_so_and_races_that_are_lost_do_not_fill_the_record() -> None:
    row = a_row("echo-0")
    ladder, now = Ladder(route_with("wl"), 0.0, Patience()), 0.0
    for _ in range(50):
        assert isinstance(ladder.next(now, lambda _: None), TryWait)
        ladder.offered(now, row)
        ladder.failed(now + 0.001, "full")
        now += 0.1
    assert isinstance(ladder.next(now, lambda _: None), TryWait)
    ladder.failed(7.75, "no slot came free in time")
    end = ladder.next(7.75, lambda _: None)
    assert end == Rejected("no slot of default/echo was free in time")
    placement = ladder.rejected(end, 7.75)
    assert len(placement.steps) == MOST_STEPS
    assert placement.steps[-1].why == "and so on"


def test_until_a_gateway_has_settled_there_is_a_line_behind_all_rungs_of_an_agent_with_pods() -> (
    None
):
    def attempts(rungs: str, settled_at: float) -> list[Attempt | Rejected]:
        ladder, found = Ladder(route_with(rungs), 0.0, Patience(), settled_at=settled_at), []
        while not isinstance(attempt := ladder.next(0.0, lambda _: None), Rejected):
            found.append(attempt)
            ladder.failed(0.0, "test")
        return [*found, attempt]

    settling = routes.WaitRung(MOST_SETTLING)
    assert attempts("w", 3.0)[0] == TryWait(settling, 3.0)
    assert attempts("w", 30.0)[0] == TryWait(settling, 7.75), "answerSeconds are what there is"
    assert [type(each) for each in attempts("wb", 3.0)] == [TryBurst, TryWait, Rejected]
    own = attempts("wl", 3.0)
    assert own == attempts("wl", 0.0), "who has a line of its own stands in that"
    assert attempts("bu", 3.0) == attempts("bu", 0.0), "without pods nobody is waited for"
    assert [type(each) for each in attempts("w", 0.0)] == [Rejected]
    row = a_row("echo-0")
    for settled_at in (3.0, 7.0):
        ladder = Ladder(route_with("w"), 5.0, Patience(), settled_at=settled_at)
        last = ladder.next(5.0, lambda tried: None if row in tried else row)
        assert last == TryWarm(row, 13.0), "a worker that is there may be slow all the same"


def test_a_rung_that_is_shut_is_passed_by_and_told() -> None:
    ladder = Ladder(route_with("bu"), 0.0, Patience(), lambda rung, by: f"{rung} until {by:g}")
    end = ladder.next(0.0, lambda _: None)
    assert end == Rejected("every slot of default/echo is taken")
    steps = ladder.rejected(end, 0.0).steps
    assert [step.why for step in steps] == ["burst/us-east until 7", "upstream until 7"]


def test_an_empty_ladder_and_a_full_table_are_told_apart_from_a_late_answer() -> None:
    full = Ladder(route_with("w"), 0.0, Patience()).next(0.0, lambda _: None)
    late = Ladder(route_with("w"), 0.0, Patience()).next(8.0, lambda _: None)
    assert full == Rejected("every slot of default/echo is taken")
    assert late == Rejected("no slot of default/echo was free in time")
    assert Ladder(route_with(""), 0.0, Patience()).next(0.0, lambda _: None) == full


def test_an_answer_without_an_attempt_is_a_bug() -> None:
    ladder = Ladder(route_with("w"), 0.0, Patience())
    with pytest.raises(AssertionError):
        ladder.answered(1.0)
    row = a_row("echo-0")
    ladder.next(0.0, lambda _: row)
    with pytest.raises(AssertionError):
        ladder.next(0.0, lambda _: row)
    assert ladder.answered(0.1).result == Warm("echo-0")
