"""Slots for crowds: what is remembered of them, for how long, and what pods it asks for."""

import math
import random
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline_operator.agent.parsing import parsed
from trunkline_operator.agent.spec import Warm
from trunkline_operator.scaling.crowds import (
    FADE_SECONDS,
    STEPS,
    UNKNOWN_SECONDS,
    Crowds,
    after,
    expected,
)
from trunkline_operator.scaling.decision import EBB_SECONDS, Decision, Demand, Memory, decided
from trunkline_operator.scaling.prices import Stakes
from trunkline_operator.scaling.staffing import Flow
from trunkline_operator.simulation.model import Conditions, Outcome, Seen, Simulation
from trunkline_operator.simulation.scalers import Trunkline
from trunkline_operator.simulation.traces import HOUR, Trace, drawn, erlangs

START = 60.0
FREE = 20.0
CALLS = 100
DEAR = 3.0  # z where a caller without a slot costs 740 times what the slot costs
WARM = Warm(slots_per_pod=4, min_pods=1, max_pods=100, scale_down_delay_seconds=0)


def quiet(crowds: Crowds, seconds: float, *, calls: int = CALLS) -> Crowds:
    """The record after so long of always as many calls, looked at each second."""
    for _ in range(round(seconds)):
        crowds = after(crowds, calls, FREE, START, crowds.at + 1)
    return crowds


def began() -> Crowds:
    return quiet(after(Crowds(), CALLS, FREE, START, 0.0), UNKNOWN_SECONDS)


def after_a_crowd(extra: int, seconds: float = START) -> Crowds:
    """100 calls with 20 slots beside them, and then so many more calls until pods for them are there."""
    return quiet(quiet(began(), seconds, calls=CALLS + extra), START + 1)


def test_nobody_is_waited_for_where_no_crowd_ever_came() -> None:
    assert expected(Crowds(), DEAR) == 0
    assert expected(quiet(began(), 600), DEAR) == 0
    # 20 calls more find the 20 slots that the reserve keeps.
    assert expected(after_a_crowd(20), DEAR) == 0


def test_what_the_reserve_was_short_of_is_kept_free_for_the_next_crowd() -> None:
    assert expected(after_a_crowd(20 + 16), DEAR) == 16
    # Larger ones in steps, rounded up.
    assert expected(after_a_crowd(20 + 165), DEAR) == 176


def test_a_cheap_call_is_not_waited_for() -> None:
    crowds = after_a_crowd(100)
    lasted = sum(seconds for _, seconds in crowds.seconds)
    assert lasted == pytest.approx(START, abs=2)
    just = NormalDist().inv_cdf(1 - lasted / FADE_SECONDS)
    assert expected(crowds, just + 0.001) == 80
    assert expected(crowds, just - 0.001) == 0


def test_more_crowds_make_it_pay_where_one_did_not() -> None:
    z = 2.6
    crowds = after_a_crowd(100)
    assert expected(crowds, z) == 0
    crowds = quiet(quiet(crowds, START, calls=CALLS + 100), START + 1)
    assert expected(crowds, z) == 0
    crowds = quiet(quiet(crowds, START, calls=CALLS + 100), START + 1)
    assert expected(crowds, z) == 80


def test_a_crowd_is_forgotten_after_some_hours() -> None:
    crowds = after_a_crowd(100)
    share = 1 - NormalDist().cdf(DEAR)
    lasts = FADE_SECONDS * math.log(crowds.seconds[0][1] / (share * FADE_SECONDS))
    assert 3 * HOUR < lasts < 4 * HOUR
    kept = after(crowds, CALLS, FREE, START, crowds.at + lasts - 60)
    assert expected(kept, DEAR) == 80
    assert expected(after(crowds, CALLS, FREE, START, crowds.at + lasts + 60), DEAR) == 0


def test_a_crowd_counts_with_its_peak_until_it_is_over() -> None:
    """It thins out while pods for it start; slots for its end alone would not have been enough."""
    crowds = began()
    for left in range(100, 20, -2):
        crowds = quiet(crowds, 1, calls=CALLS + left)
    assert {slots for slots, _ in crowds.seconds} == {80}


def test_calls_that_pods_were_asked_for_in_time_are_no_crowd() -> None:
    """As many more, over an hour."""
    crowds = began()
    for more in range(100):
        crowds = quiet(crowds, 36, calls=CALLS + more)
    assert expected(crowds, 0.0) == expected(crowds, DEAR) == 0


def test_what_a_new_operator_finds_is_no_crowd() -> None:
    crowds = after(Crowds(), 0, 0.0, START, 0.0)
    crowds = quiet(quiet(crowds, 5, calls=0), UNKNOWN_SECONDS - 10, calls=500)
    assert crowds.seconds == ()


def test_a_crowd_that_nobody_watched_end_counts_for_one_start() -> None:
    """Gateways were silent for an hour."""
    seen = quiet(began(), 1, calls=CALLS + 100)
    late = after(seen, CALLS, FREE, START, seen.at + HOUR)
    assert late.seconds == ((80, START),)


def test_a_second_look_at_the_same_moment_is_no_news() -> None:
    crowds = after_a_crowd(100)
    assert after(crowds, 9999, FREE, START, crowds.at) is crowds


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.floats(1, 3600), st.integers(1, 20_000))
def test_the_record_stays_small_and_the_dearer_a_call_the_more_slots(
    seed: int, start: float, most: int
) -> None:
    chance = random.Random(seed)
    crowds = Crowds()
    now = 0.0
    for _ in range(600):
        now += chance.expovariate(1 / 20)
        crowds = after(crowds, chance.randrange(most), chance.random() * 50, start, now)
    assert len(crowds.asked) <= STEPS + 2
    assert len(crowds.seconds) <= 8 * (most.bit_length() + 1)
    kept = [expected(crowds, z) for z in (0.0, 1.0, 2.0, 3.0)]
    assert kept == sorted(kept)
    assert kept[-1] <= most * 9 / 8


# --- pods --------------------------------------------------------------------------------------------------


def decide(crowds: Crowds, flow: Flow, warm: Warm = WARM, **demand: Any) -> Decision:
    """At a moment that was counted already, so that flow and record are the given ones."""
    facts = {"busy": 100, "burst": 0, "refused": 0, "known": True, "active": 26, "serving": 26}
    memory = Memory(wish=26, refused=0, flow=flow, crowds=crowds)
    stakes = Stakes(z=DEAR)
    told = Demand(**{**facts, **demand}, start_seconds=START, stakes=stakes)
    return decided(warm, told, crowds.at, memory)


def test_slots_for_a_crowd_are_kept_beside_the_reserve_and_the_reason_says_so() -> None:
    crowds = after_a_crowd(100)
    flow = Flow(at=crowds.at, arriving=0.5, leaving=0.5)
    decision = decide(crowds, flow)
    assert decision.pods == 51  # 100 calls, 23 slots of the reserve and 80
    assert decision.reason == (
        "100 warm and 0 burst calls and 103 slots for 30.0 calls a minute while a pod starts, "
        "80 of them for a crowd as in the last hours, at 4 a pod need 51"
    )
    assert decide(Crowds(began=0.0, at=crowds.at), flow).pods == 31
    # bufferSlots is a promise of free slots, whatever for.
    assert decide(crowds, flow, replace(WARM, buffer_slots=103)).pods == 51
    assert decide(crowds, flow, replace(WARM, max_pods=40)).pods == 40


def test_slots_that_are_held_for_crowds_do_not_make_them_forgotten() -> None:
    """It is asked what the reserve alone would have kept."""
    before = after_a_crowd(100)
    memory = Memory(flow=Flow(at=before.at, arriving=0.5, leaving=0.5), crowds=before)
    for second in range(1, 150):
        calls = CALLS if second < 80 else CALLS + 100
        told = Demand(
            busy=calls,
            burst=0,
            arrivals=second // 2,
            refused=0,
            known=True,
            active=51,
            serving=51,
            start_seconds=START,
            stakes=Stakes(z=DEAR),
        )
        memory = decided(WARM, told, before.at + second, memory).memory
    lasted = [sum(seconds for _, seconds in crowds.seconds) for crowds in (before, memory.crowds)]
    assert lasted[1] > 1.9 * lasted[0]
    assert expected(memory.crowds, DEAR) >= 72


def test_it_is_looked_again_while_a_crowd_is_there_or_is_waited_for() -> None:
    """Time alone makes a crowd worth slots, and forgets it."""
    crowds = after_a_crowd(100)
    flow = Flow(at=crowds.at, arriving=0.5, leaving=0.5)
    promised = replace(WARM, buffer_slots=40)  # more than the reserve, less than that with a crowd
    assert decide(crowds, flow, promised).look_again == EBB_SECONDS
    here = Crowds(began=0.0, at=crowds.at, missing=80)
    assert decide(here, flow, promised).look_again == EBB_SECONDS
    assert decide(replace(here, missing=0), flow, promised).look_again is None


def test_where_nobody_calls_any_more_no_crowd_is_waited_for() -> None:
    crowds = after_a_crowd(100)
    nobody = Flow(at=crowds.at, arriving=1e-5)
    decision = decide(crowds, nobody, replace(WARM, min_pods=0, buffer_slots=0), busy=0)
    assert decision.pods == 0


AGENT: dict[str, Any] = {
    "metadata": {"name": "fair", "namespace": "default", "uid": "fair"},
    "spec": {
        "engine": {"type": "loopback"},
        "access": {"public": True},
        "warm": {"slotsPerPod": 4, "minPods": 2, "maxPods": 100},
        "burst": {"modal": {"credentialsSecretRef": {"name": "modal"}, "maxContainers": 100}},
    },
}


def crowded(*hours: float) -> Trace:
    """Six hours of 30 calls at a time, and 60 more within ten seconds at these hours."""
    steady = erlangs(30)
    spikes = [(hour * HOUR, 60, 10.0) for hour in hours]
    return drawn("crowded", lambda _: steady, steady, 6 * HOUR, 7, spikes=spikes)


class Forgetful(Trunkline):
    """The same decider, which remembers no crowd."""

    def asked(self, seen: Seen, now: float) -> tuple[int, float | None]:
        if self.last is not None:
            self.last = replace(self.last, memory=replace(self.last.memory, crowds=Crowds()))
        return Trunkline.asked(self, seen, now)


def played(kind: type[Trunkline], z: float) -> Outcome:
    """Two crowds, two and a half hours apart."""
    agent = parsed(AGENT)
    scaler = kind(agent.warm, Stakes(z=z), START)
    return Simulation(crowded(2, 4.5), agent, scaler, Conditions()).run()


def test_the_second_crowd_finds_slots_where_callers_are_dear() -> None:
    ours, forgetful = played(Trunkline, DEAR), played(Forgetful, DEAR)
    assert forgetful.burst > 80
    assert ours.burst < forgetful.burst * 2 / 3
    assert ours.refused == 0


def test_crowds_cost_nothing_where_callers_are_cheap() -> None:
    """With the shipped prices of an L4 the crowds of this trace do not pay, and pods are the same."""
    ours, forgetful = played(Trunkline, 1.39), played(Forgetful, 1.39)
    assert ours.burst <= forgetful.burst
    assert ours.pod_hours == pytest.approx(forgetful.pod_hours, rel=0.005)
