"""Limits of tenants, the doorstep and the pace: pure cores, driven by a clock of the tests."""

from collections import defaultdict, deque
from collections.abc import Mapping

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from trunkline_runtime.gateway.access.doorstep import MAX_ADDRESSES, Arrival, Bounds, Doorstep
from trunkline_runtime.gateway.access.limits import (
    DAY_SECONDS,
    MAX_TENANTS,
    RECENT_SECONDS,
    Hold,
    Limits,
    Over,
    Tenancy,
    Tenants,
)
from trunkline_runtime.gateway.access.pace import AHEAD_SECONDS, MOST_TIMES_REAL, REAL_TIME, Pace

AGENT = "default/echo"
MORNING = 20_000.0 * DAY_SECONDS + 6 * 3600
NONE = Limits()


def start(
    tenants: Tenants,
    limits: Limits = NONE,
    now: float = MORNING,
    share: float = 1,
    tenant: str = "t",
) -> Hold | Over:
    return tenants.start(AGENT, tenant, limits, share, now)


def held(found: Hold | Over) -> Hold:
    assert isinstance(found, Hold), found
    return found


def over(found: Hold | Over) -> Over:
    assert isinstance(found, Over), found
    return found


# --- each limit ------------------------------------------------------------------------------------------


def test_without_limits_everything_goes() -> None:
    tenants = Tenants()
    assert all(isinstance(start(tenants), Hold) for _ in range(1000))


def test_calls_at_once_are_limited_from_before_they_are_placed_to_their_end() -> None:
    tenants, limits = Tenants(), Limits(concurrent_calls=2)
    first, _ = held(start(tenants, limits)), held(start(tenants, limits))
    refusal = over(start(tenants, limits))
    assert "at once" in refusal.why
    assert refusal.retry_seconds > 0
    assert isinstance(start(tenants, limits, tenant="another"), Hold)
    tenants.end(first, MORNING)
    held(start(tenants, limits))


def test_starts_come_back_with_time_and_one_that_was_refused_costs_nothing() -> None:
    tenants, limits = Tenants(), Limits(starts_per_minute=6)
    for _ in range(6):
        tenants.end(held(start(tenants, limits)), MORNING)
    assert [over(start(tenants, limits)).retry_seconds for _ in range(3)] == [10, 10, 10]
    assert over(start(tenants, limits, MORNING + 9)).retry_seconds == 1
    tenants.end(held(start(tenants, limits, MORNING + 10)), MORNING + 10)
    over(start(tenants, limits, MORNING + 10))
    for _ in range(6):  # and no more than a minute's, however long nobody called
        held(start(tenants, limits, MORNING + 4000))
    over(start(tenants, limits, MORNING + 4000))


def test_minutes_are_counted_from_the_answer_while_the_call_lives() -> None:
    tenants, limits = Tenants(), Limits(minutes_per_day=10)
    one, two = held(start(tenants, limits)), held(start(tenants, limits))
    tenants.answered(one, MORNING + 5, warm=True)
    tenants.answered(two, MORNING + 5, warm=False)
    held(start(tenants, limits, MORNING + 304))
    refusal = over(start(tenants, limits, MORNING + 305))
    assert refusal.retry_seconds == 18 * 3600 - 305
    tenants.end(one, MORNING + 305)
    tenants.end(two, MORNING + 305)
    over(start(tenants, limits, MORNING + 306))
    held(start(tenants, limits, MORNING + 18 * 3600))


def test_a_call_over_midnight_counts_for_each_day_what_it_had_of_it() -> None:
    tenants, limits = Tenants(), Limits(minutes_per_day=10)
    midnight = MORNING + 18 * 3600
    call = held(start(tenants, limits, midnight - 3600))
    tenants.answered(call, midnight - 3600, warm=True)
    over(start(tenants, limits, midnight - 1))
    held(start(tenants, limits, midnight + 599))
    over(start(tenants, limits, midnight + 600))
    tenants.end(call, midnight + 700)
    over(start(tenants, limits, midnight + 3600))


def test_a_call_that_was_never_answered_costs_no_minutes() -> None:
    tenants, limits = Tenants(), Limits(minutes_per_day=1)
    tenants.end(held(start(tenants, limits)), MORNING + 600)
    held(start(tenants, limits, MORNING + 601))


@given(
    st.integers(1, 50),
    st.integers(1, 8),
    st.sampled_from(["concurrent_calls", "starts_per_minute"]),
)
def test_what_gateways_give_together_is_the_limit_within_the_stated_tolerance(
    limit: int, gateways: int, kind: str
) -> None:
    limits = Limits(**{kind: limit})
    given_out = 0
    for _ in range(gateways):
        tenants = Tenants()
        while isinstance(start(tenants, limits, share=1 / gateways), Hold):
            given_out += 1
    assert given_out <= limit + gateways - 1
    assert given_out >= limit or kind == "starts_per_minute"


@given(
    st.integers(1, 30),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 300)), min_size=1, max_size=60),
    st.booleans(),
)
@example(2, 6, [(number, 20) for number in range(60)], False)
@example(2, 2, [(0, 20)] * 20, True)
def test_minutes_of_a_day_add_up_to_the_limit_over_gateways_and_over_a_restart(
    minutes: int, gateways: int, calls: list[tuple[int, int]], restarts: bool
) -> None:
    """Beyond it goes only what was live when the minutes were used up; a restart gives a G-th of them anew."""
    limits, now, share = Limits(minutes_per_day=minutes), MORNING, 1 / gateways
    books = [Tenants() for _ in range(gateways)]
    given_out, longest = 0.0, 0
    for place, (gateway, seconds) in enumerate(calls):
        if restarts and place == len(calls) // 2:
            books[0] = Tenants()
        tenants = books[gateway % gateways]
        hold = start(tenants, limits, now, share=share)
        if isinstance(hold, Hold):
            tenants.answered(hold, now, warm=True)
            now += seconds
            tenants.end(hold, now)
            given_out, longest = given_out + seconds, max(longest, seconds)
    anew = share if restarts else 0.0
    live = gateways + restarts  # the last call of each, which went on
    assert given_out <= minutes * 60 * (1 + anew) + live * longest


def test_the_account_that_was_quiet_for_longest_is_forgotten_and_none_with_a_call() -> None:
    tenants = Tenants()
    held(start(tenants, tenant="busy"))
    for number in range(MAX_TENANTS + 100):
        tenants.end(held(start(tenants, tenant=f"t{number}")), MORNING)
    accounts = tenants._accounts[AGENT]
    assert len(accounts) <= MAX_TENANTS
    assert "busy" in accounts
    assert "t0" not in accounts
    assert f"t{MAX_TENANTS + 99}" in accounts


class Books(RuleBasedStateMachine):
    """Random calls of two tenants against a second, naive book-keeping."""

    def __init__(self) -> None:
        super().__init__()
        self.now = MORNING
        self.tenants = Tenants()
        self.limits = {
            "a": Limits(concurrent_calls=3, minutes_per_day=30),
            "b": Limits(starts_per_minute=5, minutes_per_day=20),
        }
        self.calls: list[tuple[Hold, str]] = []
        self.spans: dict[str, list[list[float]]] = defaultdict(list)
        self.open: dict[int, list[float]] = {}
        self.starts: deque[float] = deque()

    def used(self, tenant: str) -> float:
        today = self.now // DAY_SECONDS * DAY_SECONDS
        ends = [(begun, end or self.now) for begun, end in self.spans[tenant]]
        return sum(max(0.0, end - max(begun, today)) for begun, end in ends)

    @rule(seconds=st.sampled_from([0.5, 7, 61, 400, 5000]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(tenant=st.sampled_from("ab"))
    def begin(self, tenant: str) -> None:
        limits = self.limits[tenant]
        found = self.tenants.start(AGENT, tenant, limits, 1, self.now)
        mine = sum(each == tenant for _, each in self.calls)
        full = bool(limits.concurrent_calls) and mine >= limits.concurrent_calls
        spent = self.used(tenant) >= limits.minutes_per_day * 60 - 1e-3
        if isinstance(found, Hold):
            assert not full
            assert self.used(tenant) < limits.minutes_per_day * 60 + 1e-3
            self.calls.append((found, tenant))
            if tenant == "b":
                self.starts.append(self.now)
        elif not full and not spent:
            assert tenant == "b", "only its starts are limited"

    @rule(data=st.data(), warm=st.booleans())
    def answer(self, data: st.DataObject, warm: bool) -> None:
        if waiting := [call for call in self.calls if not call[0].answered]:
            hold, tenant = data.draw(st.sampled_from(waiting))
            self.tenants.answered(hold, self.now, warm=warm)
            span = [self.now, 0.0]
            self.spans[tenant].append(span)
            self.open[id(hold)] = span

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.calls:
            call = data.draw(st.sampled_from(self.calls))
            self.calls.remove(call)
            self.tenants.end(call[0], self.now)
            if span := self.open.pop(id(call[0]), None):
                span[1] = self.now

    @invariant()
    def starts_of_any_minute_are_bounded(self) -> None:
        for first in self.starts:
            within = [start for start in self.starts if first <= start < first + 60]
            assert len(within) <= 2 * self.limits["b"].starts_per_minute

    @invariant()
    def accounts_hold_what_is_held(self) -> None:
        accounts = self.tenants._accounts.get(AGENT, {})
        for tenant, account in accounts.items():
            assert account.calls == sum(each == tenant for _, each in self.calls)
            warm = sum(hold.warm for hold, each in self.calls if each == tenant)
            assert account.warm == warm
            account.turn(self.now)
            assert account.used(self.now) == pytest.approx(self.used(tenant), abs=1e-2)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# --- a fair share of what is free --------------------------------------------------------------------------


def kept(tenants: Tenants, tenancy: Tenancy, tenant: str = "noisy", now: float = MORNING) -> int:
    return tenants.kept_for_others(AGENT, tenant, tenancy, now)


def guaranteed(**slots: int) -> Mapping[str, Limits]:
    return {name: Limits(guaranteed_slots=count) for name, count in slots.items()}


def test_what_a_tenant_does_not_use_of_its_guarantee_is_kept_from_others() -> None:
    tenants, tenancy = Tenants(), Tenancy(overrides=guaranteed(quiet=3, other=2))
    assert (kept(tenants, tenancy), kept(tenants, tenancy, "quiet")) == (5, 2)
    calls = [held(start(tenants, tenant="quiet")) for _ in range(2)]
    assert kept(tenants, tenancy) == 3
    tenants.answered(calls[0], MORNING, warm=False)  # it went to burst: its warm slot is free still
    assert kept(tenants, tenancy) == 4
    for call in calls:
        tenants.end(call, MORNING)
    assert kept(tenants, tenancy) == 5


def test_more_than_the_guarantee_takes_nothing_from_what_is_kept_for_a_third() -> None:
    tenants, tenancy = Tenants(), Tenancy(overrides=guaranteed(quiet=1, other=2))
    for _ in range(5):
        held(start(tenants, tenant="quiet"))
    assert kept(tenants, tenancy) == 2


def test_a_guarantee_for_everybody_is_kept_for_named_tenants_and_recent_ones() -> None:
    tenants = Tenants()
    tenancy = Tenancy(limits=Limits(guaranteed_slots=1), named=frozenset({"key-a", "noisy"}))
    assert kept(tenants, tenancy) == 1
    tenants.end(held(start(tenants, tenant="of a token")), MORNING)
    assert kept(tenants, tenancy) == 2
    assert kept(tenants, tenancy, now=MORNING + RECENT_SECONDS) == 1


def takes(
    tenants: Tenants, tenancy: Tenancy, tenant: str, free: int, **given: float
) -> Hold | None:
    """A call that takes a slot of those that are free, or is not let."""
    hold = held(start(tenants, tenant=tenant))
    now, share = given.get("now", MORNING), given.get("share", 1.0)
    if tenants.take(hold, tenancy, share, lambda: free, now):
        return hold
    tenants.end(hold, MORNING)
    return None


@given(
    st.integers(0, 6),
    st.lists(st.tuples(st.sampled_from(["noisy", "quiet"]), st.booleans()), max_size=80),
)
def test_a_noisy_tenant_never_keeps_a_quiet_one_below_its_guarantee(
    guarantee: int, events: list[tuple[str, bool]]
) -> None:
    """Slots as a gateway's table counts them, and callers that come and go in any order."""
    slots, tenants = 6, Tenants()
    tenancy = Tenancy(overrides=guaranteed(quiet=guarantee))
    live: dict[str, list[Hold]] = {"noisy": [], "quiet": []}
    for tenant, comes in events:
        free = slots - sum(map(len, live.values()))
        if not comes and live[tenant]:
            tenants.end(live[tenant].pop(), MORNING)
        elif comes and free and (hold := takes(tenants, tenancy, tenant, free)):
            live[tenant].append(hold)
        elif comes:
            assert tenant == "noisy" or len(live["quiet"]) >= guarantee
    while len(live["quiet"]) < guarantee:
        free = slots - sum(map(len, live.values()))
        assert free, "what was guaranteed is not free"
        hold = takes(tenants, tenancy, "quiet", free)
        assert hold
        live["quiet"].append(hold)


@given(st.integers(1, 6), st.integers(0, 12), st.integers(1, 12), st.data())
def test_gateways_that_are_flooded_in_one_moment_leave_what_is_kept(
    gateways: int, spare: int, guarantee: int, data: st.DataObject
) -> None:
    """None hears of the others' calls until a quarter of a second is over."""
    tenancy, share = Tenancy(overrides=guaranteed(quiet=guarantee)), 1 / gateways
    books = [Tenants() for _ in range(gateways)]
    free, now = guarantee + spare, MORNING
    for _ in range(4):
        heard, mine = free, [0] * gateways
        for number in data.draw(st.lists(st.integers(0, gateways - 1), max_size=40)):
            seen = heard - mine[number]
            if seen and takes(books[number], tenancy, "noisy", seen, share=share, now=now):
                mine[number] += 1
        free -= sum(mine)
        assert free >= guarantee
        now += 0.25


def test_what_a_gateway_gave_a_while_ago_is_in_what_it_sees() -> None:
    tenants, tenancy = Tenants(), Tenancy(overrides=guaranteed(quiet=2))
    assert [bool(takes(tenants, tenancy, "noisy", n, share=0.5)) for n in (8, 7, 6, 5)] == [
        True,
        True,
        True,
        False,
    ]
    assert takes(tenants, tenancy, "noisy", 5, share=0.5, now=MORNING + 0.25)


def test_without_guarantees_nobody_counts_what_is_free() -> None:
    tenants = Tenants()
    hold = held(start(tenants))
    assert tenants.take(hold, Tenancy(), 0.1, lambda: 1 // 0, MORNING)


# --- the doorstep ----------------------------------------------------------------------------------------


def test_connections_that_wait_are_bounded_by_address_and_in_all() -> None:
    doorstep = Doorstep(Bounds(waiting=5, waiting_per_address=2, per_second=0))
    arrivals = [doorstep.arrives("10.0.0.1", 0) for _ in range(3)]
    assert arrivals == [Arrival.WELCOME, Arrival.WELCOME, Arrival.TOO_MANY]
    assert [doorstep.arrives("10.0.0.2", 0) for _ in range(2)] == [Arrival.WELCOME] * 2
    assert doorstep.arrives("10.0.0.3", 0) is Arrival.CROWDED
    for peer in ("10.0.0.1",) * 3 + ("10.0.0.2",) * 2 + ("10.0.0.3",):
        doorstep.leaves(peer)
    assert doorstep.waiting == 0
    assert doorstep.arrives("10.0.0.1", 0) is Arrival.WELCOME


def test_an_address_opens_connections_at_its_rate_with_two_seconds_of_it_at_once() -> None:
    doorstep = Doorstep(Bounds(waiting=0, waiting_per_address=0, per_second=10))

    def welcome(now: float) -> int:
        found = [doorstep.arrives("10.0.0.1", now) for _ in range(50)]
        return found.count(Arrival.WELCOME)

    assert welcome(0) == 20
    assert welcome(0.5) == 5
    assert doorstep.arrives("10.0.0.2", 0.5) is Arrival.WELCOME
    assert welcome(1000) == 20


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
    ],
)
def test_an_address_of_ipv6_is_its_network(one: str, other: str, same: bool) -> None:
    doorstep = Doorstep(Bounds(waiting_per_address=1))
    assert doorstep.arrives(one, 0) is Arrival.WELCOME
    assert doorstep.arrives(other, 0) is (Arrival.TOO_MANY if same else Arrival.WELCOME)


def test_whose_address_is_not_known_counts_among_all_alone() -> None:
    doorstep = Doorstep(Bounds(waiting=3, waiting_per_address=1, per_second=0.001))
    assert [doorstep.arrives("", 0) for _ in range(4)] == [Arrival.WELCOME] * 3 + [Arrival.CROWDED]
    for _ in range(4):
        doorstep.leaves("")
    assert doorstep.waiting == 0


def test_addresses_are_forgotten_but_none_that_waits() -> None:
    doorstep = Doorstep(Bounds(waiting=0))
    doorstep.arrives("192.0.2.1", 0)
    for number in range(MAX_ADDRESSES + 10):
        peer = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        doorstep.arrives(peer, 0)
        doorstep.leaves(peer)
    assert len(doorstep._addresses) <= MAX_ADDRESSES
    doorstep.leaves("192.0.2.1")
    assert doorstep.waiting == 0


# --- the pace --------------------------------------------------------------------------------------------


def seconds_until_too_fast(times_real: float, step: float = 1.0, most: int = 3600) -> float | None:
    pace = Pace(100.0)
    for number in range(1, most + 1):
        if not pace.keeps(int(number * step * times_real * REAL_TIME), 100.0 + number * step):
            return number * step
    return None


@pytest.mark.parametrize("times", [0.1, 1.0, 1.49])
def test_speech_in_real_time_and_a_little_faster_goes_on_for_ever(times: float) -> None:
    assert seconds_until_too_fast(times) is None


@pytest.mark.parametrize(("times", "within"), [(1.6, 610), (2.0, 121), (3.0, 41), (100.0, 2)])
def test_what_is_sustained_above_the_bound_is_noticed(times: float, within: float) -> None:
    found = seconds_until_too_fast(times)
    assert found is not None
    assert found <= within
    assert found >= AHEAD_SECONDS / (times - MOST_TIMES_REAL) - 1


def test_a_minute_may_come_at_once_and_is_made_up_for_by_silence() -> None:
    pace = Pace(0.0)
    minute = int(60 * REAL_TIME)
    assert pace.keeps(minute, 0.0)
    assert not Pace(0.0).keeps(minute + 1, 0.0)
    assert pace.keeps(2 * minute, 40.0)
    assert not pace.keeps(2 * minute + 1, 40.0)


def test_silence_saves_nothing_up() -> None:
    pace = Pace(0.0)
    assert pace.keeps(0, 3600.0)
    assert not pace.keeps(int(60 * REAL_TIME) + 1, 3600.0)


def test_without_a_bound_any_pace_is_kept() -> None:
    assert Pace(0.0, 0).keeps(10**12, 1.0)
