"""The simulated cluster: by hand-made traces whose outcome can be counted, and against `plan.py`."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import INSTALLATION, NOW, a_pod, a_world, an_agent

from trunkline_operator.agent.spec import VoiceAgent
from trunkline_operator.decisions.plan import planned
from trunkline_operator.decisions.steps import Drain
from trunkline_operator.scaling.decision import Memory
from trunkline_operator.scaling.prices import Stakes
from trunkline_operator.simulation import traces
from trunkline_operator.simulation.model import (
    Conditions,
    Outcome,
    Pod,
    Seen,
    Simulation,
    loss,
    packed,
)
from trunkline_operator.simulation.peers import Hpa, knative
from trunkline_operator.simulation.scalers import Fixed, Trunkline, externally
from trunkline_operator.simulation.traces import HOUR, Call, Trace

MODAL: dict[str, Any] = {"credentialsSecretRef": {"name": "modal"}, "slotsPerContainer": 2}


def an_agent_of(burst: dict[str, Any] | None = None, **warm: Any) -> VoiceAgent:
    fields: dict[str, Any] = {
        "slotsPerPod": 2,
        "minPods": 1,
        "maxPods": 10,
        "bufferSlots": 0,
    } | warm
    return an_agent(warm=fields, **({} if burst is None else {"burst__modal": MODAL | burst}))


def of(*calls: tuple[float, float], seconds: float = HOUR) -> Trace:
    return Trace(name="made", calls=tuple(Call(*call) for call in calls), seconds=seconds)


def run(agent: VoiceAgent, trace: Trace, scaler: Any = None, **conditions: float) -> Outcome:
    chosen = scaler or Trunkline(agent.warm, start_seconds=60.0)
    return Simulation(trace, agent, chosen, Conditions(**conditions)).run()


class Script:
    """Wants what it was told for each of its looks, ten seconds apart."""

    def __init__(self, *pods: int) -> None:
        self.period: float | None = 10.0
        self.pods = list(pods)
        self.seen: list[tuple[int, int, int]] = []

    def asked(self, seen: Seen, now: float) -> tuple[int, float | None]:
        self.seen.append((seen.active, seen.serving, seen.calls))
        return (self.pods.pop(0) if len(self.pods) > 1 else self.pods[0]), None


def test_a_pod_takes_calls_once_it_has_started() -> None:
    agent = an_agent_of()
    outcome = run(agent, of((59.0, 10.0), (61.0, 10.0), seconds=100.0), Fixed(1))
    assert (outcome.warm, outcome.refused, outcome.overflow) == (1, 1, 0.5)
    assert outcome.pod_hours == pytest.approx(100 / HOUR)


def test_the_fullest_pod_takes_the_next_call_so_that_others_empty() -> None:
    agent = an_agent_of()
    calls = of((70, 5.0), (71, 500.0), (72, 500.0), (80, 500.0), seconds=200.0)
    subject = Simulation(calls, agent, Fixed(2), Conditions())
    subject.run()
    assert sorted(pod.busy for pod in subject.pods) == [1, 2]


def test_a_drained_pod_holds_its_hardware_until_its_last_call_ends() -> None:
    agent = an_agent_of()
    script = Script(2, 2, 2, 2, 2, 2, 2, 2, 1)
    # Three calls at 70 s: pod 1 holds one, until second 150. It is drained in second 80.
    outcome = run(agent, of((70, 400.0), (70, 400.0), (70, 80.0), seconds=300.0), script)
    assert outcome.pod_hours == pytest.approx((300 + 150) / HOUR)
    assert outcome.created == 2


def test_with_mode_wait_a_pod_with_calls_stays_and_takes_more() -> None:
    agent = an_agent_of(scaleDown={"mode": "wait"})
    script = Script(2, 2, 2, 2, 2, 2, 2, 2, 1)
    calls = of((70, 400.0), (70, 400.0), (70, 80.0), (100, 400.0), seconds=300.0)
    assert run(agent, calls, script).warm == 4
    assert run(an_agent_of(), calls, Script(2, 2, 2, 2, 2, 2, 2, 2, 1)).warm == 3


def test_a_drain_is_taken_back_before_a_pod_is_made() -> None:
    agent = an_agent_of()
    script = Script(2, 2, 2, 2, 2, 2, 2, 2, 1, 2)
    outcome = run(agent, of((70, 400.0), (70, 400.0), (70, 200.0), (95, 9.0)), script)
    assert outcome.created == 2
    assert outcome.warm == 4


def test_pods_never_exceed_max_pods_draining_ones_included() -> None:
    agent = an_agent_of(maxPods=2)
    subject = Simulation(of((70, 99.0)), agent, Script(9), Conditions())
    subject.run()
    assert len(subject.pods) == 2


def test_overflow_boots_a_container_and_fills_it_before_the_next() -> None:
    agent = an_agent_of(burst={"scaledownWindowSeconds": 60}, maxPods=0, minPods=0)
    outcome = run(agent, of((0, 100.0), (1, 100.0), (2, 100.0)), Fixed(0), boot_seconds=5.0)
    assert (outcome.burst, outcome.refused) == (3, 0)
    # Answered at 5 s and gone 60 s after the last of two calls; a second one from 2 s, answered at 7 s.
    assert outcome.burst_hours == pytest.approx((165 + (7 + 100 + 60 - 2)) / HOUR)


def test_a_call_that_would_wait_past_the_deadline_is_refused_and_the_container_serves_later_ones() -> (
    None
):
    agent = an_agent_of(burst={"startDeadlineSeconds": 7}, maxPods=0, minPods=0)
    outcome = run(agent, of((0, 50.0), (2, 50.0), (4, 50.0)), Fixed(0), boot_seconds=10.0)
    assert (outcome.burst, outcome.refused) == (1, 2)


def test_at_max_containers_calls_are_refused() -> None:
    agent = an_agent_of(burst={"maxContainers": 1}, maxPods=0, minPods=0)
    outcome = run(agent, of(*((float(n), 300.0) for n in range(5))), Fixed(0))
    assert (outcome.burst, outcome.refused) == (2, 3)


def test_a_buffer_of_containers_is_there_only_while_there_are_calls() -> None:
    plain = an_agent_of(burst={}, maxPods=0, minPods=0)
    buffered = an_agent_of(burst={"bufferContainers": 1}, maxPods=0, minPods=0)
    calls = of((0, 100.0))
    more = run(buffered, calls, Fixed(0)).burst_hours - run(plain, calls, Fixed(0)).burst_hours
    assert more * HOUR == pytest.approx(125, abs=1)  # it boots 5 s, and idles in windows of 60 s


def test_the_decider_looks_at_once_when_the_last_slot_is_taken() -> None:
    agent = an_agent_of(minPods=1, slotsPerPod=1)
    early = of((100.0, 900.0), (159.0, 900.0))
    assert run(agent, early).refused == 1  # a pod that is asked for at 100.05 is ready at 160.05
    late = of((100.0, 900.0), (160.5, 900.0))
    assert run(agent, late).refused == 0
    assert run(an_agent_of(bufferSlots=2), early).refused == 0
    # Three tenths of a second after its last look, it does not wait for the second to end.
    again = of((100.0, 900.0), (100.3, 900.0), (160.6, 900.0))
    two = an_agent_of(minPods=2, slotsPerPod=1, bufferSlots=1)
    assert run(two, again, Trunkline(two.warm, Stakes(z=0), 60.0)).refused == 0


def test_the_same_inputs_give_the_same_result_to_the_bit() -> None:
    agent = an_agent_of(burst={}, maxPods=100)
    trace = traces.spike(0.1)
    assert run(agent, trace) == run(agent, traces.spike(0.1))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 3000), st.floats(0, 900)), max_size=60),
    st.integers(0, 4),
    st.integers(0, 6),
    st.booleans(),
    st.sampled_from(["trunkline", "hpa", "kpa"]),
)
def test_every_call_is_placed_or_refused_and_hours_are_bounded(
    calls: list[tuple[float, float]], low: int, more: int, burst: bool, who: str
) -> None:
    agent = an_agent_of(
        burst={"maxContainers": 3} if burst else None, minPods=low, maxPods=max(low + more, 1)
    )
    scalers = {
        "trunkline": Trunkline(agent.warm, Stakes(z=2.0)),
        "hpa": Hpa(agent.warm, 0.7),
        "kpa": knative(agent.warm),
    }
    outcome = run(agent, of(*sorted(calls)), scalers[who])
    assert outcome.warm + outcome.burst + outcome.refused == outcome.calls == len(calls)
    assert low - 1e-9 <= outcome.pod_hours <= agent.warm.max_pods + 1e-9
    assert outcome.burst_hours <= 3 + 1e-9
    slots = [sample.slots for sample in outcome.curve]
    assert max(slots) <= agent.warm.max_pods * agent.warm.slots_per_pod


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=6), st.integers(0, 6)
)
def test_victims_are_those_of_the_plan(pods: list[tuple[bool, int]], wanted: int) -> None:
    """The model's order, against the steps that production takes."""
    agent = an_agent(
        warm={"autoscaling": "external", "replicas": wanted, "minPods": 0, "maxPods": 9}
    )
    facts = [a_pod(agent, n, ready=ready) for n, (ready, _) in enumerate(pods)]
    world = a_world(facts, {f"desk-{n}": busy for n, (_, busy) in enumerate(pods)})
    steps = planned(agent, world, NOW, Memory(), INSTALLATION).steps
    modelled = [Pod(n, 0.0, ready=ready, busy=busy) for n, (ready, busy) in enumerate(pods)]
    expected = sorted(modelled, key=loss)[: max(len(pods) - wanted, 0)]
    drained = [step.name for step in steps if isinstance(step, Drain)]
    assert drained == [f"desk-{pod.ordinal}" for pod in expected]


def test_external_numbers_go_through_the_decider() -> None:
    warm = an_agent_of(minPods=2, maxPods=5).warm
    assert [externally(warm, asked) for asked in (0, 3, 9)] == [2, 3, 5]


def test_the_packed_floor_is_counted_at_every_event() -> None:
    # Three calls of 2 slots a pod: one pod, two while there are three calls, then one.
    calls = of((0, 100.0), (10, 100.0), (20, 50.0), seconds=200.0)
    assert packed(calls, 2, 10) == pytest.approx((110 + 50) / HOUR)
    assert packed(calls, 2, 1) == pytest.approx(110 / HOUR)


def test_nobody_is_below_the_floor_without_overflow() -> None:
    trace, agent = traces.diurnal(0.05), an_agent_of(maxPods=100)
    outcome = run(agent, trace, Fixed(40))
    assert outcome.overflow < 0.01
    assert outcome.pod_hours > packed(trace, 2, 100)


def test_at_no_more_overflow_fewer_hours_than_an_hpa_needs() -> None:
    """A small piece of bench/scaling.py, so that a change that gives the gain away is seen."""
    trace, agent = traces.diurnal(0.3), an_agent_of(burst={}, slotsPerPod=4, maxPods=100)
    ours = run(agent, trace, Trunkline(agent.warm, Stakes(z=2.4), 60.0))
    theirs = run(agent, trace, Hpa(agent.warm, 0.7, whole=True))
    assert ours.overflow <= theirs.overflow
    assert ours.pod_hours <= 0.90 * theirs.pod_hours


# --- the fixed traces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", traces.FIXED)
def test_a_trace_is_fixed_and_in_order(make: Any) -> None:
    trace = make(0.05)
    assert trace == make(0.05)
    times = [call.at for call in trace.calls]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= trace.seconds
    assert all(0 < call.seconds <= traces.LONGEST_CALL_SECONDS for call in trace.calls)


def test_the_load_is_what_it_says() -> None:
    spike = traces.spike()
    assert sum(2 * HOUR <= call.at < 2 * HOUR + 10 for call in spike.calls) >= 200
    quiet = [call for call in spike.calls if HOUR <= call.at < 2 * HOUR]
    assert sum(call.seconds for call in quiet) / HOUR == pytest.approx(110, rel=0.1)
    day = traces.diurnal()
    for hour, calls in ((4, 16), (16, 200)):
        now = [call for call in day.calls if abs(call.at / HOUR - hour) < 0.5]
        assert sum(call.seconds for call in now) / HOUR == pytest.approx(calls, rel=0.15)


def test_more_load_is_more_calls() -> None:
    assert len(traces.weekend(0.1).calls) == pytest.approx(
        len(traces.weekend(0.2).calls) / 2, rel=0.05
    )
    assert math.isclose(traces.erlangs(180), 1.0)
    assert replace(traces.spike(0.1), name="x") != traces.spike(0.1)
