"""At rest nobody looks: until the moment that a plan names, the same world asks for nothing else.

What a look knows beside its world (memory, and facts that time alone changes) is carried on as the operator does.
"""

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import BURST, DEPLOYED, INSTALLATION, NOW, a_pod, a_world, an_agent, pending

from trunkline_operator.agenda import RESYNC_SECONDS
from trunkline_operator.agent.spec import Region, Snapshot, VoiceAgent
from trunkline_operator.burst.breaker import Breaker, probed
from trunkline_operator.burst.limit import Limit, current
from trunkline_operator.burst.standby import Scaling, Standing
from trunkline_operator.decisions.manifests import burst_hash
from trunkline_operator.decisions.plan import UNKNOWN_LOOK, Plan, planned
from trunkline_operator.decisions.status import only_numbers_differ, reported
from trunkline_operator.decisions.steps import DeletePod, Drain, Requeue
from trunkline_operator.decisions.world import BurstFacts, World
from trunkline_operator.scaling.decision import EBB_SECONDS, Memory
from trunkline_operator.scaling.spend import HOUR, Account
from trunkline_operator.scaling.staffing import (
    LONGEST_COUNT_SECONDS,
    RATE_SECONDS,
    Count,
    Flow,
    followed,
)
from trunkline_runtime.contract import FINALIZER

DAY = 86_400.0
EVICTING = replace(INSTALLATION, idle_seconds=600)


def due(plan: Plan) -> float | None:
    """Seconds until the plan wants to be made again."""
    return next((step.after for step in plan.steps if isinstance(step, Requeue)), None)


def acts(plan: Plan) -> list[object]:
    return [step for step in plan.steps if not isinstance(step, Requeue)]


def later(agent: VoiceAgent, world: World, now: float) -> World:
    """The same world then: what the observer makes of its facts."""
    facts = world.burst
    breaker = probed(facts.breaker, now) if facts.breaker else None
    return replace(world, burst=replace(facts, breaker=breaker, limit=current(facts.limit, now)))


# --- any world -------------------------------------------------------------------------------------------

agos = st.sampled_from([0.0, 1.0, 20.0, 250.0, 1000.0, 3000.0])
windows = st.sampled_from([[], [{"start": "0 * * * *", "durationSeconds": 1200, "minPods": 1}]])


@st.composite
def agents(draw: st.DrawFn) -> VoiceAgent:
    changes: dict[str, Any] = {
        "warm__minPods": draw(st.integers(0, 1)),
        "warm__maxPods": 3,
        "warm__bufferSlots": draw(st.integers(0, 2)),
        "warm__scaleDown": {"delaySeconds": draw(st.sampled_from([0, 90]))},
        "warm__schedule": draw(windows),
    }
    if draw(st.booleans()):
        changes |= BURST
    metadata: dict[str, Any] = {"finalizers": [FINALIZER]}
    if draw(st.integers(0, 5)) == 0:
        metadata["deletionTimestamp"] = "2027-01-15T07:00:00Z"  # an hour before NOW
    return an_agent(**changes, metadata=metadata)


@st.composite
def burst_facts(draw: st.DrawFn, agent: VoiceAgent) -> BurstFacts:
    if agent.burst is None or draw(st.integers(0, 4)) == 0:
        return BurstFacts(stopped=True)
    asked = Snapshot(agent.burst.snapshot)
    at = NOW - draw(agos)
    limit = Limit(containers=2, since=at, at=at, refusals=draw(st.integers(1, 2)))
    fallen = Breaker(asked=asked, level=Snapshot.NONE, since=NOW - draw(agos), trips=1)
    breaker = draw(st.sampled_from([Breaker.of(asked), fallen]))
    rest = Scaling(minimum=0, buffer=0, maximum=10, window=60)
    raised = replace(rest, minimum=2)
    told = draw(st.sampled_from([rest, raised]))
    return replace(
        DEPLOYED,
        hash=burst_hash(agent, INSTALLATION, probed(breaker, NOW).level),
        breaker=probed(breaker, NOW),
        limit=current(draw(st.sampled_from([None, limit])), NOW),
        standing=Standing(scalings={Region.US_EAST: told}, since=NOW - draw(agos)),
        watched=NOW - draw(agos),
        running=draw(st.sampled_from([{}, {"us-east": 1}])),
        failures=draw(st.integers(0, 2)),
        failed_at=NOW - draw(agos),
        unscaled_at=draw(st.sampled_from([0.0, NOW - 3])),
        capped=draw(st.booleans()),
    )


@st.composite
def scenes(draw: st.DrawFn) -> tuple[VoiceAgent, World, Memory]:
    """An agent, its world, and what looks before have left; the last had the same counts."""
    agent = draw(agents())
    kinds = st.sampled_from(["ready", "ready", "silent", "starting", "draining", "marked"])
    pods, busy = [], {}
    for ordinal, kind in enumerate(draw(st.lists(kinds, max_size=3))):
        pod = a_pod(agent, ordinal)
        match kind:
            case "starting":
                pod = pending(agent, ordinal)
            case "draining":
                pod = replace(pod, draining_since=NOW - draw(agos))
            case "marked":
                pod = replace(pod, protected=False)
        if kind not in ("silent", "starting") and draw(st.integers(0, 3)):
            busy[pod.name] = draw(st.integers(0, 2))
        pods.append(pod)
    world = a_world(
        pods,
        busy,
        burst=draw(burst_facts(agent)),
        known=draw(st.integers(0, 4)) > 0,
        acknowledged=draw(st.booleans()),
    )
    arrivals, memory = 0, Memory()
    waits = sorted(draw(st.lists(agos, min_size=0, max_size=3)), reverse=True)
    for wait in waits:
        arrivals += draw(st.integers(0, 60))
        then = replace(world, traffic=replace(world.traffic, arrivals=arrivals))
        memory = planned(agent, then, NOW - wait - 1, memory, EVICTING).memory
    world = replace(world, traffic=replace(world.traffic, arrivals=arrivals))
    return agent, world, planned(agent, world, NOW - 1, memory, EVICTING).memory


def fewer(after: Plan, before: Plan) -> bool:
    """Fewer pods are wanted than before."""
    return bool(after.scaling and before.scaling and after.scaling.pods < before.scaling.pods)


@settings(max_examples=400, deadline=None)
@given(scenes(), st.floats(0.01, 0.999))
def test_until_a_plan_asks_for_a_look_the_same_world_wants_nothing_else(
    scene: tuple[VoiceAgent, World, Memory], share: float
) -> None:
    agent, world, memory = scene
    plan = planned(agent, world, NOW, memory, EVICTING)
    if acts(plan):  # what they change is news
        return
    wait = due(plan)
    now = NOW + share * (DAY if wait is None else wait)
    then = later(agent, world, now)
    after = planned(agent, then, now, plan.memory, EVICTING)
    if wait is not None and wait <= EBB_SECONDS and fewer(after, plan):
        # Rates fall all the time and are looked at in steps. Nothing but that fall may have asked for less.
        assert all(isinstance(step, Drain | DeletePod) for step in acts(after))
        kept = replace(plan.memory, flow=replace(plan.memory.flow, at=now))
        after = planned(agent, then, now, kept, EVICTING)
    assert acts(after) == []
    assert (after.draining, after.blocked) == (plan.draining, plan.blocked)
    if plan.scaling and after.scaling:
        assert after.scaling.pods == plan.scaling.pods
    before = reported(agent, world, plan, {}, NOW)
    told = reported(agent, then, after, before, now)
    assert only_numbers_differ(before, told)
    assert told["slots"] == before["slots"]


# --- what would else be late -----------------------------------------------------------------------------


def test_an_agent_at_rest_asks_for_no_look() -> None:
    agent = an_agent(warm__minPods=1)
    world = a_world([a_pod(agent, 0)])
    assert due(planned(agent, world, NOW, Memory(), INSTALLATION)) is None
    assert RESYNC_SECONDS >= 240


def test_unknown_load_is_looked_at_again() -> None:
    agent = an_agent(warm__minPods=1)
    silent = a_world([a_pod(agent, 0)], {})
    assert due(planned(agent, silent, NOW, Memory(), INSTALLATION)) == UNKNOWN_LOOK


def test_what_past_calls_ask_for_is_looked_at_until_it_is_nothing() -> None:
    agent = an_agent(
        warm__minPods=0, warm__maxPods=9, warm__bufferSlots=0, warm__scaleDown={"delaySeconds": 0}
    )
    world = a_world([a_pod(agent, 0)])
    memory = Memory(flow=Flow(at=NOW - 1, arriving=0.2, leaving=0.2), wish=1, refused=0)
    now, looks = NOW, 0
    while (wait := due(plan := planned(agent, world, now, memory, INSTALLATION))) is not None:
        assert wait <= EBB_SECONDS
        now, memory, looks = now + wait, plan.memory, looks + 1
        assert looks < 200
    assert plan.scaling
    assert plan.scaling.pods == 0
    assert looks > 3


def test_a_window_is_looked_at_when_it_closes() -> None:
    opened = {"start": "0 * * * *", "durationSeconds": 1200, "minPods": 1}  # NOW is at a full hour
    agent = an_agent(warm__minPods=0, warm__bufferSlots=0, warm__schedule=[opened])
    world = a_world([a_pod(agent, 0)])
    assert due(planned(agent, world, NOW, Memory(), INSTALLATION)) == 1200


def test_a_pod_for_calls_that_were_refused_is_thought_over() -> None:
    agent = an_agent(warm__minPods=1, warm__maxPods=1, warm__bufferSlots=0)
    world = a_world([a_pod(agent, 0)], {"desk-0": 4}, refused=3)
    memory = Memory(wish=1, refused=0)
    assert due(planned(agent, world, NOW, memory, INSTALLATION)) == EBB_SECONDS


def test_a_limit_is_looked_at_when_more_is_asked_for_and_when_it_is_forgotten() -> None:
    agent = an_agent(warm__minPods=0, warm__bufferSlots=0, **BURST)
    limit = Limit(containers=2, since=NOW, at=NOW)
    facts = replace(DEPLOYED, hash=burst_hash(agent, INSTALLATION, None), limit=limit)
    waits = [
        due(planned(agent, a_world(burst=facts), now, Memory(), INSTALLATION))
        for now in (NOW, limit.until)
    ]
    assert waits == [limit.until - NOW, limit.forgotten - limit.until]


def test_what_an_hour_has_spent_is_looked_at_when_the_next_begins() -> None:
    agent = an_agent(warm__minPods=0, warm__bufferSlots=0, **BURST)
    deployed = replace(DEPLOYED, hash=burst_hash(agent, INSTALLATION, None))
    now = NOW - NOW % HOUR + 600
    waits = [
        due(planned(agent, a_world(burst=facts), now, Memory(), INSTALLATION))
        for spent in (1.2, 0.0)
        for facts in [replace(deployed, account=Account(at=now, hour=spent))]
    ]
    assert waits == [HOUR - 600, None]


def test_calls_after_a_long_rest_count_as_if_it_had_been_looked_all_the_time() -> None:
    began = Flow(at=0.0, arriving=0.1, leaving=0.1)
    rested = followed(began, Count(arrivals=5, calls=5), 3 * RATE_SECONDS)
    looked = began
    for look in range(1, int(3 * RATE_SECONDS / LONGEST_COUNT_SECONDS)):
        looked = followed(looked, Count(), look * LONGEST_COUNT_SECONDS)
    looked = followed(looked, Count(arrivals=5, calls=5), 3 * RATE_SECONDS)
    assert abs(rested.arriving - looked.arriving) < 1e-9
    assert abs(rested.leaving - looked.leaving) < 1e-9
