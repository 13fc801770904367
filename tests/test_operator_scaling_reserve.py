"""The slots that are kept free: rates, their chance, and what they mean for pods."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline_operator.agent.spec import Percent, Warm
from trunkline_operator.scaling.decision import Decision, Demand, Memory, decided, spare
from trunkline_operator.scaling.prices import Stakes
from trunkline_operator.scaling.staffing import RATE_SECONDS, Count, Flow, followed, reserve

WARM = Warm(slots_per_pod=4, min_pods=1, max_pods=100, buffer_slots=1, scale_down_delay_seconds=0)


def steady(rate: float, calls: int, seconds: float, seed: int = 1) -> Flow:
    """The flow after so long of calls that come and go by chance at the same rate."""
    chance = random.Random(seed)
    flow, count, now = followed(Flow(), Count(calls=calls), 0.0), Count(calls=calls), 0.0
    while now < seconds:
        now += 1
        came = sum(chance.random() < rate / 10 for _ in range(10))
        went = sum(chance.random() < rate / 10 for _ in range(10))
        count = Count(arrivals=count.arrivals + came, calls=count.calls + came - went)
        flow = followed(flow, count, now)
    return flow


def test_rates_are_those_of_the_last_minutes() -> None:
    flow = steady(rate=0.5, calls=90, seconds=1800)
    assert flow.arriving == pytest.approx(0.5, rel=0.15)
    assert flow.leaving == pytest.approx(0.5, rel=0.15)


def test_how_often_it_is_looked_does_not_matter() -> None:
    """Ten arrivals in ten seconds are the same rate in one look and in ten."""
    began = followed(Flow(), Count(), 0.0)
    once = followed(began, Count(arrivals=10, calls=10), 10.0)
    often = began
    for n in range(1, 11):
        often = followed(often, Count(arrivals=n, calls=n), float(n))
    assert often.arriving == pytest.approx(once.arriving)


def test_a_second_look_at_the_same_moment_and_fallen_totals_are_no_news() -> None:
    flow = steady(rate=0.5, calls=90, seconds=600)
    assert flow.at is not None
    assert followed(flow, Count(arrivals=9999, calls=9999), flow.at) == flow
    restarted = followed(flow, Count(), flow.at + 1)
    assert restarted.arriving < flow.arriving
    assert restarted.leaving >= 0


def test_refused_calls_are_arrivals_that_did_not_leave() -> None:
    began = followed(Flow(), Count(), 0.0)
    flow = followed(began, Count(arrivals=10, refused=10), 10.0)
    assert flow.arriving > 0
    assert flow.leaving == 0


def test_chance_is_not_taken_for_growth() -> None:
    grown = [steady(0.5, 90, 1200, seed).growth for seed in range(40)]
    assert (
        sum(growth > 0 for growth in grown) < 20
    )  # of a normal distribution 16 % are past one deviation
    assert max(grown) * 60 < 5


def test_a_crowd_is_growth() -> None:
    flow = Flow(arriving=1.0, leaving=0.2)
    assert flow.growth == pytest.approx(0.8 - math.sqrt(1.2 / (2 * RATE_SECONDS)))
    assert Flow(arriving=0.2, leaving=1.0).growth == 0


def test_the_reserve_is_growth_and_the_root_of_what_arrives_while_a_pod_starts() -> None:
    flow = Flow(arriving=0.5, leaving=0.5)
    assert reserve(flow, start_seconds=100.0, z=2.0) == pytest.approx(2 * 10.0)
    assert reserve(flow, start_seconds=400.0, z=2.0) == pytest.approx(2 * 20.0)
    assert reserve(flow, start_seconds=100.0, z=0.0) == 0
    crowd = Flow(arriving=1.0, leaving=0.2)
    assert reserve(crowd, 60.0, 0.0) == pytest.approx(crowd.growth * 60)


@settings(deadline=None)
@given(st.floats(0, 50), st.floats(0, 50), st.floats(0, 3600), st.floats(0, 3))
def test_the_reserve_is_never_below_nothing(
    arriving: float, leaving: float, start: float, z: float
) -> None:
    assert reserve(Flow(arriving=arriving, leaving=leaving), start, z) >= 0


def decide(warm: Warm = WARM, flow: Flow | None = None, **demand: Any) -> Decision:
    """At a moment that was counted already, so that the flow is the given one."""
    facts = {"busy": 100, "burst": 0, "refused": 0, "known": True, "active": 26, "serving": 26}
    memory = Memory(wish=26, refused=0, flow=flow or Flow(at=1000.0))
    return decided(warm, Demand(**{**facts, **demand}), 1000.0, memory)


STEADY = Flow(at=1000.0, arriving=0.5, leaving=0.5)


def test_the_larger_of_buffer_and_reserve_is_kept_free() -> None:
    few = decide(flow=STEADY, start_seconds=100.0, stakes=Stakes(z=2.0))
    assert few.pods == 30  # 100 calls and 20 slots
    assert few.reason == (
        "100 warm and 0 burst calls and 20 slots for 30.0 calls a minute while a pod starts at 4 a pod need 30"
    )
    many = decide(replace(WARM, buffer_slots=40), flow=STEADY, start_seconds=100.0)
    assert many.pods == 35
    assert "40 spare slots" in many.reason


def test_a_pod_that_starts_slowly_needs_a_larger_reserve_and_the_hint_only_stands_in() -> None:
    hinted = replace(WARM, startup_seconds_hint=400)
    assert decide(hinted, flow=STEADY).pods == 35
    assert decide(hinted, flow=STEADY, start_seconds=100.0).pods == 30


def test_pods_that_start_are_not_asked_for_twice_and_hold_no_call() -> None:
    """The wish is the same however many of the pods are ready."""
    wishes = {decide(flow=STEADY, active=30, serving=n).pods for n in (0, 10, 30)}
    assert len(wishes) == 1


def test_a_pod_whose_calls_cost_less_at_modal_is_not_kept() -> None:
    stakes = Stakes(
        pays=False, words="a warm slot costs $2.00 an hour, and the same at Modal $1.00"
    )
    decision = decide(stakes=stakes)
    assert decision.pods == 1
    assert decision.reason.startswith(
        "a warm slot costs $2.00 an hour, and the same at Modal $1.00"
    )


def test_silent_gateways_are_no_news_for_the_rates() -> None:
    facts: dict[str, Any] = {"busy": 9, "burst": 0, "refused": 0, "active": 26, "serving": 26}
    for known in (True, False):
        demand = Demand(arrivals=10_000, known=known, **facts)
        decision = decided(WARM, demand, 1010.0, Memory(flow=STEADY))
        assert (decision.memory.flow == STEADY) == (not known)


def test_an_agent_that_may_have_no_pods_has_none_some_minutes_after_its_last_call() -> None:
    warm = replace(WARM, min_pods=0, buffer_slots=0)
    memory, wanted = Memory(wish=0, refused=0), []
    for minute in range(30):
        calls = 1 if minute == 1 else 0
        demand = Demand(
            busy=calls, burst=0, arrivals=min(minute, 1), refused=0, known=True, active=1, serving=1
        )
        decision = decided(warm, demand, minute * 60.0, memory)
        memory = decision.memory
        wanted.append(decision.pods)
    assert wanted[:2] == [0, 1]
    assert wanted[2] == 1  # where one has called, another may
    assert wanted[12:] == [0] * 18


@pytest.mark.parametrize(
    ("percent", "calls", "kept"), [(25, 75, 25), (25, 76, 26), (50, 7, 7), (0, 9, 0), (99, 1, 99)]
)
def test_a_percentage_is_of_all_slots(percent: int, calls: int, kept: int) -> None:
    warm = replace(WARM, buffer_slots=Percent(percent))
    assert spare(warm, calls) == kept
    assert kept >= (calls + kept) * percent / 100
