"""How many pods are wanted: bounds, arithmetic, and memory."""

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline_operator.agent.spec import Autoscaling, Percent, Warm
from trunkline_operator.scaling.decision import (
    EBB_SECONDS,
    Decision,
    Demand,
    Memory,
    decided,
    spare,
)
from trunkline_operator.scaling.schedule import Window
from trunkline_operator.scaling.staffing import RATE_SECONDS

IDLE = Demand(busy=0, burst=0, refused=0, known=True, active=1, serving=1)
WARM = Warm(slots_per_pod=4, min_pods=1, max_pods=4, buffer_slots=1, scale_down_delay_seconds=60)
ONE = Memory(wish=1, refused=0)
# A hundred calls in the second before: they ask for a slot as long.
LONGEST_EBB = 10 * RATE_SECONDS

# None or very many: load that comes and goes asks for the same numbers again.
counts = st.one_of(st.integers(0, 40), st.sampled_from([0, 100]))
warms = st.builds(
    lambda low, more, slots, buffer, delay, open_: Warm(
        min_pods=low,
        max_pods=low + more,
        slots_per_pod=slots,
        buffer_slots=buffer,
        scale_down_delay_seconds=delay,
        schedule=(Window(start="*/5 * * * *", duration_seconds=open_, min_pods=low + more),),
    ),
    st.integers(0, 5),
    st.integers(0, 8),
    st.integers(1, 8),
    st.one_of(st.integers(0, 12), st.builds(Percent, st.integers(0, 99))),
    st.integers(0, 100),
    st.sampled_from([60, 240]),
)
demands = st.builds(
    lambda busy, burst, arrivals, refused, known, active, share: Demand(
        busy=busy,
        burst=burst,
        arrivals=arrivals,
        refused=refused,
        known=known,
        active=active,
        serving=min(active, share),
    ),
    counts,
    counts,
    counts,
    counts,
    st.booleans(),
    st.integers(0, 14),
    st.integers(0, 14),
)
# Whole seconds, so that sums are exact.
looks = st.lists(st.tuples(st.integers(0, 200).map(float), demands), min_size=1, max_size=20)


def looked(
    warm: Warm, sequence: list[tuple[float, Demand]]
) -> list[tuple[float, Demand, Decision]]:
    """The decisions of one operator that looks again and again; times are the waits between."""
    now, memory, seen = 0.0, Memory(), []
    for wait, demand in sequence:
        now += wait
        decision = decided(warm, demand, now, memory)
        memory = decision.memory
        seen.append((now, demand, decision))
    return seen


def needed(warm: Warm, demand: Demand) -> int:
    """Pods whose slots hold every call and the buffer, as far as maxPods allows."""
    calls = demand.busy + demand.burst + spare(warm, demand.busy + demand.burst)
    return min(-(-calls // warm.slots_per_pod), warm.max_pods)


@settings(deadline=None)
@given(warms, looks)
def test_never_outside_min_and_max(warm: Warm, sequence: list[tuple[float, Demand]]) -> None:
    for _, _, decision in looked(warm, sequence):
        assert warm.min_pods <= decision.pods <= warm.max_pods


@settings(deadline=None)
@given(warms, looks)
def test_never_below_what_the_load_needs(warm: Warm, sequence: list[tuple[float, Demand]]) -> None:
    for _, demand, decision in looked(warm, sequence):
        assert decision.pods >= needed(warm, demand)


@settings(deadline=None)
@given(warms, looks)
def test_falls_only_below_wishes_older_than_the_delay(
    warm: Warm, sequence: list[tuple[float, Demand]]
) -> None:
    seen = looked(warm, sequence)
    for at, (now, _, decision) in enumerate(seen):
        for before, (_, _, earlier) in enumerate(seen[:at]):
            held_until = seen[before + 1][0]  # nothing else was wished before the look after it
            if now - held_until < warm.scale_down_delay_seconds:
                assert earlier.memory.wish is not None
                assert decision.pods >= earlier.memory.wish


@settings(deadline=None)
@given(warms, looks)
def test_memory_is_bounded_and_ordered(warm: Warm, sequence: list[tuple[float, Demand]]) -> None:
    for _, _, decision in looked(warm, sequence):
        pods = [peak.pods for peak in decision.memory.peaks]
        times = [peak.until for peak in decision.memory.peaks]
        assert pods == sorted(set(pods), reverse=True)
        assert times == sorted(times)


@settings(deadline=None)
@given(warms, looks, demands, st.integers(0, 20), st.integers(0, 20))
def test_more_load_never_wants_fewer_pods(
    warm: Warm,
    sequence: list[tuple[float, Demand]],
    demand: Demand,
    more_busy: int,
    more_burst: int,
) -> None:
    now, _, last = looked(warm, sequence)[-1]
    heavier = replace(demand, busy=demand.busy + more_busy, burst=demand.burst + more_burst)
    less = decided(warm, demand, now + 1, last.memory)
    more = decided(warm, heavier, now + 1, last.memory)
    assert more.pods >= less.pods


@settings(deadline=None)
@given(warms, looks)
def test_it_falls_when_it_said_it_would(warm: Warm, sequence: list[tuple[float, Demand]]) -> None:
    """At rest it only falls, and it ends: each fall of the reserve may bring one more, and rates ebb for a while."""
    warm = replace(warm, schedule=())
    now, demand, decision = looked(warm, sequence)[-1]
    rest = 0
    while decision.look_again is not None:
        assert 0 < decision.look_again <= max(warm.scale_down_delay_seconds, EBB_SECONDS)
        now, before = now + decision.look_again, decision
        decision = decided(warm, demand, now, before.memory)
        assert decision.pods <= before.pods
        rest += 1
        assert rest <= len(sequence) + 1 + warm.max_pods + LONGEST_EBB / EBB_SECONDS
    assert decision.memory.peaks == ()


@settings(deadline=None)
@given(warms, looks, demands, st.integers(1, 100))
def test_more_arrivals_never_want_fewer_pods(
    warm: Warm, sequence: list[tuple[float, Demand]], demand: Demand, more: int
) -> None:
    now, before, last = looked(warm, sequence)[-1]
    demand = replace(demand, arrivals=before.arrivals + demand.arrivals, refused=before.refused)
    heavier = replace(
        demand, arrivals=demand.arrivals + more, refused=demand.refused, busy=demand.busy + more
    )
    less = decided(warm, demand, now + 1, last.memory)
    assert decided(warm, heavier, now + 1, last.memory).pods >= less.pods


@settings(deadline=None)
@given(warms, looks)
def test_an_open_window_is_a_floor(warm: Warm, sequence: list[tuple[float, Demand]]) -> None:
    for autoscaling in Autoscaling:
        always = Window(start="* * * * *", duration_seconds=120, min_pods=warm.max_pods)
        subject = replace(warm, schedule=(always,), autoscaling=autoscaling, replicas=0)
        assert {decision.pods for _, _, decision in looked(subject, sequence)} == {warm.max_pods}


def decide(warm: Warm = WARM, memory: Memory = ONE, **demand: Any) -> Decision:
    return decided(warm, replace(IDLE, **demand), 1000.0, memory)


def test_up_at_once_with_the_arithmetic() -> None:
    decision = decide(busy=4, burst=3)
    assert decision.pods == 2
    assert decision.reason == "4 warm and 3 burst calls and 1 spare slots at 4 a pod need 2"


def test_the_limit_is_told() -> None:
    decision = decide(busy=30)
    assert decision.pods == 4
    assert decision.reason.endswith("need 8, within 1 … 4 pods")


def test_down_only_after_the_delay() -> None:
    falling = decide(memory=Memory(wish=3, refused=0), active=3, serving=3)
    assert (falling.pods, falling.look_again) == (3, 60.0)
    still = decided(WARM, IDLE, 1059.0, falling.memory)
    assert (still.pods, still.look_again) == (3, 1.0)
    assert still.reason.startswith("3 were needed 59 s ago; now 0 warm")
    assert decided(WARM, IDLE, 1060.0, still.memory).pods == 1


def test_a_restarted_operator_waits_before_it_takes_away() -> None:
    decision = decide(memory=Memory(), active=3, serving=3)
    assert decision.pods == 3
    assert decided(WARM, IDLE, 1060.0, decision.memory).pods == 1


def test_unknown_load_takes_nothing_away() -> None:
    decision = decide(known=False, active=3, serving=3)
    assert decision.pods == 3
    assert "unknown" in decision.reason


def test_a_refusal_asks_for_one_more_than_are_ready() -> None:
    decision = decide(refused=2, active=2, serving=2)
    assert decision.pods == 3
    assert decision.reason == "2 calls were refused with 2 pods ready"


def test_pods_that_are_starting_answer_a_refusal() -> None:
    assert decide(refused=2, active=2, serving=1).pods == 2


def test_old_refusals_and_a_restarted_gateway_ask_for_nothing() -> None:
    assert decide(memory=Memory(wish=1), refused=9).pods == 1
    assert decide(memory=Memory(wish=1, refused=9), refused=2).pods == 1


def test_external_is_followed_within_bounds_at_once() -> None:
    external = replace(WARM, autoscaling=Autoscaling.EXTERNAL, min_pods=2)
    for replicas, pods in ((3, 3), (9, 4), (0, 2), (None, 2)):
        decision = decide(replace(external, replicas=replicas), busy=16, known=False)
        assert (decision.pods, decision.look_again) == (pods, None)


def test_load_that_comes_and_goes_is_remembered_once() -> None:
    memory, now = ONE, 1000.0
    for busy in (12, 0, 12, 0, 12, 0):
        now += 1
        memory = decided(WARM, replace(IDLE, busy=busy), now, memory).memory
    assert [(peak.pods, peak.until) for peak in memory.peaks] == [(4, now)]


def test_who_waits_for_a_slot_wants_one() -> None:
    demand = replace(IDLE, busy=4, waiting=3)
    found = decided(Warm(slots_per_pod=4, buffer_slots=0, max_pods=9), demand, 0.0, Memory())
    assert found.pods == 2
    assert "4 warm and 0 burst calls and 3 who wait and 0 spare slots" in found.reason
