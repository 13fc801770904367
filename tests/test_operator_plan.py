"""The steps: each rule by an example."""

from dataclasses import replace
from typing import Any

import pytest
from worlds import BURST, DEADLINE, DEPLOYED, INSTALLATION, NOW, a_pod, a_world, an_agent, pending

from trunkline_operator.agent.spec import Region, Snapshot, VoiceAgent
from trunkline_operator.burst.breaker import Breaker
from trunkline_operator.burst.limit import Limit
from trunkline_operator.burst.standby import Scaling, Standing
from trunkline_operator.decisions.manifests import burst_app, burst_hash
from trunkline_operator.decisions.plan import UNKNOWN_LOOK, Plan, planned, rfc3339
from trunkline_operator.decisions.reach import UNLINKED_SECONDS
from trunkline_operator.decisions.steps import (
    AddFinalizer,
    CreatePod,
    DeletePod,
    DeployBurst,
    Drain,
    EnsureSecret,
    IssueCertificate,
    RemoveFinalizer,
    Requeue,
    ScaleBurst,
    Step,
    StopBurst,
    Undrain,
    WatchBurst,
)
from trunkline_operator.decisions.world import (
    BurstFacts,
    Phase,
    PodFacts,
    Traffic,
    WorkerFacts,
    World,
)
from trunkline_operator.scaling.decision import Memory
from trunkline_runtime.contract import ANNOTATION_CA

SETTLED = Memory(wish=0, refused=0)
"""Of an operator that wished for nothing before: what falls, falls at once."""
AT_ONCE: dict[str, Any] = {"warm__scaleDown__delaySeconds": 0}
DELETED: dict[str, Any] = {"metadata": {"deletionTimestamp": rfc3339(NOW)}}


def plan(agent: VoiceAgent, world: World, now: float = NOW, memory: Memory = SETTLED) -> Plan:
    return planned(agent, world, now, memory, INSTALLATION)


def steps(agent: VoiceAgent, world: World, now: float = NOW) -> tuple[Step, ...]:
    return plan(agent, world, now).steps


def created(taken: tuple[Step, ...]) -> list[str]:
    return [step.name for step in taken if isinstance(step, CreatePod)]


def draining(agent: VoiceAgent, ordinal: int, **changes: Any) -> PodFacts:
    """A draining pod; its worker said so, and is not ready any more."""
    return a_pod(agent, ordinal, **{"draining_since": NOW - 10, "ready": False} | changes)


def of(step: type, pod: PodFacts) -> Any:
    """A step about a pod."""
    return step(pod.name, pod.uid, rfc3339(NOW)) if step is Drain else step(pod.name, pod.uid)


# --- from nothing ----------------------------------------------------------------------------------------


def test_a_new_agent_gets_its_secret_then_pods() -> None:
    agent = an_agent(warm__minPods=2, metadata={"finalizers": []})
    first, *pods = steps(agent, a_world(secret_exists=False))
    assert first == EnsureSecret("desk-trunkline")
    assert created(tuple(pods)) == ["desk-0", "desk-1"]


def test_an_agent_with_burst_gets_the_finalizer_before_all_else() -> None:
    """Kubernetes would end its pods, and nobody its app."""
    agent = an_agent(metadata={"finalizers": []}, **BURST)
    first, second, *_, last = steps(agent, a_world(secret_exists=False))
    assert (first, second) == (AddFinalizer(), EnsureSecret("desk-trunkline"))
    assert isinstance(last, DeployBurst)
    assert AddFinalizer() not in steps(an_agent(**BURST), a_world())


def test_a_certificate_is_there_before_the_pods_that_need_it() -> None:
    world = replace(a_world(secret_exists=False), certificate="there is no tls.crt")
    *_, secret, pod = steps(an_agent(), world)
    assert isinstance(secret, EnsureSecret)  # which has a certificate from the first
    assert isinstance(pod, CreatePod)
    *_, certificate, pod = steps(an_agent(), replace(world, secret_exists=True))
    assert certificate == IssueCertificate("desk-trunkline", "there is no tls.crt")
    assert isinstance(pod, CreatePod)


def test_a_new_certificate_restarts_no_pod() -> None:
    agent = an_agent()
    world = replace(a_world([a_pod(agent, 0)]), certificate="it ends on 2036-01-01")
    assert steps(agent, world) == (IssueCertificate("desk-trunkline", "it ends on 2036-01-01"),)


def test_a_pod_of_another_ca_gets_no_new_call_and_is_replaced_at_once() -> None:
    """Its calls may go on through gateways that leave; so it drains, for as long as the longest call."""
    agent = an_agent(warm__maxPods=2)
    old, installation = a_pod(agent, 0), replace(INSTALLATION, ca="new")

    def taken(world: World) -> tuple[Step, ...]:
        return planned(agent, world, NOW, SETTLED, installation).steps

    drain, pod = taken(a_world([old], busy={}))
    assert drain == of(Drain, old)
    assert isinstance(pod, CreatePod)
    assert pod.manifest["metadata"]["annotations"][ANNOTATION_CA] == "new"
    # One that gets no call says nothing of the load, but holds its hardware.
    (drained,) = taken(a_world([old, a_pod(agent, 1, ca="new")], {"desk-1": 0}))
    assert drained == of(Drain, old)
    busy = a_world([old, a_pod(agent, 1, ca="new")], {"desk-1": 4})
    assert of(Drain, old) in taken(busy)
    assert created(taken(busy)) == []
    # Unheard of though it is, the load is known: one new pod is enough.
    roomy = an_agent(warm__maxPods=4)
    pods = [old, replace(pending(roomy, 1), ca="new")]
    assert planned(roomy, a_world(pods, busy={}), NOW, SETTLED, installation).steps == (
        of(Drain, old),
    )
    # Gateways that are not heard of may be the old ones, with the pod linked to them.
    assert of(Drain, old) not in taken(a_world([old], busy={}, known=False))
    new = a_pod(agent, 1, ca="new")
    waits = taken(a_world([replace(old, draining_since=NOW - 10), new], {"desk-1": 0}))
    assert waits == (Requeue(DEADLINE - 10),)
    # Nor is its drain taken back when pods are needed.
    taken_up = taken(a_world([replace(old, draining_since=NOW - 10)], busy={}))
    assert created(taken_up) == ["desk-1"]
    assert of(Undrain, old) not in taken_up


def test_at_rest_there_are_no_steps() -> None:
    agent = an_agent(warm__minPods=2)
    assert steps(agent, a_world([a_pod(agent, 0), a_pod(agent, 1)])) == ()


def test_the_lowest_names_that_nobody_has_are_used() -> None:
    agent = an_agent(warm__minPods=3)
    pods = [
        a_pod(agent, 1),
        a_pod(agent, 2, terminating=True),
        a_pod(agent, 0, owner="an agent that had this name before"),
    ]
    assert created(steps(agent, a_world(pods))) == ["desk-3", "desk-4"]


def test_pods_of_somebody_else_are_left_alone() -> None:
    agent = an_agent(warm={"minPods": 0, "bufferSlots": 0})
    pods = [a_pod(agent, 0, owner="x"), a_pod(agent, 1, owner="x", phase=Phase.FAILED)]
    assert steps(agent, a_world(pods)) == ()


def test_ended_pods_are_replaced() -> None:
    agent = an_agent()
    for phase in (Phase.FAILED, Phase.SUCCEEDED):
        pod = a_pod(agent, 0, phase=phase, ready=False, started=False)
        taken = steps(agent, a_world([pod]))
        assert taken[0] == of(DeletePod, pod)
        assert created(taken) == ["desk-1"]


def test_pending_pods_count_as_intent() -> None:
    agent = an_agent(warm__minPods=2)
    pods = [pending(agent, 0, unschedulable="0/1 nodes"), pending(agent, 1)]
    assert steps(agent, a_world(pods)) == ()


def test_draining_pods_hold_hardware_up_to_max_pods() -> None:
    agent = an_agent(warm={"minPods": 4, "maxPods": 4})
    pods = [a_pod(agent, 0), draining(agent, 1, template="old"), draining(agent, 2, template="old")]
    taken = steps(agent, a_world(pods, {"desk-0": 0, "desk-1": 1, "desk-2": 1}))
    assert created(taken) == ["desk-3"]


# --- scaling down ----------------------------------------------------------------------------------------


def test_not_ready_then_fewest_calls_then_highest_ordinal() -> None:
    agent = an_agent(**AT_ONCE)
    pods = [a_pod(agent, n) for n in range(3)] + [a_pod(agent, 3, ready=False)]
    order: list[list[str]] = []
    for busy in ({0: 1, 1: 0, 2: 0}, {0: 1, 1: 0}, {0: 1, 1: 2}):
        here = [pod for pod in pods if pod.ordinal in busy or (pod.ordinal == 3 and not order)]
        taken = steps(agent, a_world(here, {f"desk-{n}": calls for n, calls in busy.items()}))
        order.append([step.name for step in taken if isinstance(step, Drain)])
    assert order == [["desk-3", "desk-2", "desk-1"], ["desk-1"], ["desk-0"]]


def test_a_pod_that_never_ran_goes_without_a_drain() -> None:
    agent = an_agent(**AT_ONCE)
    pod = pending(agent, 1)
    assert steps(agent, a_world([a_pod(agent, 0), pod])) == (of(DeletePod, pod),)


def test_a_pending_pod_whose_worker_is_heard_of_is_drained() -> None:
    agent = an_agent(**AT_ONCE)
    pod = pending(agent, 1)
    taken = steps(agent, a_world([a_pod(agent, 0), pod], {"desk-0": 0, "desk-1": 1}))
    assert taken == (of(Drain, pod),)


def test_a_draining_pod_goes_only_after_its_worker_said_so() -> None:
    agent = an_agent()
    base, pod = a_pod(agent, 0), draining(agent, 1)
    for busy, said, expected in ((1, True, ()), (0, False, ()), (0, True, (of(DeletePod, pod),))):
        workers = {
            "desk-0": WorkerFacts(slots=4, busy=0, draining=False),
            "desk-1": WorkerFacts(slots=4, busy=busy, draining=said),
        }
        assert steps(agent, a_world([base, pod], workers=workers)) == expected


def test_an_unknown_worker_is_busy_until_no_call_can_be_left() -> None:
    agent = an_agent()
    pod = draining(agent, 1, draining_since=NOW)
    world = a_world([a_pod(agent, 0), pod], {"desk-0": 0})
    assert steps(agent, world, NOW + 10) == (Requeue(DEADLINE - 10),)
    assert steps(agent, world, NOW + DEADLINE) == (of(DeletePod, pod),)


def test_a_busy_worker_is_waited_for_however_long() -> None:
    agent = an_agent()
    world = a_world(
        [a_pod(agent, 0), draining(agent, 1, draining_since=0.0)], {"desk-0": 0, "desk-1": 1}
    )
    assert steps(agent, world) == ()


def test_unknown_load_takes_no_pod_away() -> None:
    agent = an_agent(**AT_ONCE)
    pods = [a_pod(agent, n) for n in range(3)]
    again = (Requeue(UNKNOWN_LOOK),)
    assert steps(agent, a_world(pods, {"desk-0": 0, "desk-1": 0})) == again
    assert steps(agent, a_world(pods, known=False)) == again


def test_an_empty_draining_pod_that_is_needed_is_not_deleted() -> None:
    agent = an_agent()
    pod = draining(agent, 1)
    assert steps(agent, a_world([a_pod(agent, 0), pod], {"desk-0": 4, "desk-1": 0})) == (
        of(Undrain, pod),
    )


def test_a_draining_pod_whose_worker_died_goes() -> None:
    agent = an_agent()
    pod = draining(agent, 1, started=False)
    assert steps(agent, a_world([a_pod(agent, 0), pod], {"desk-0": 0})) == (of(DeletePod, pod),)


def test_a_delay_is_waited_for() -> None:
    agent = an_agent(warm__scaleDown__delaySeconds=30)
    world = a_world([a_pod(agent, 0), a_pod(agent, 1)])
    first = plan(agent, world, memory=Memory())
    assert first.steps == (Requeue(30),)
    later = plan(agent, world, NOW + 30, first.memory)
    assert later.steps == (Drain("desk-1", "pod-1", rfc3339(NOW + 30)),)


def test_load_that_returns_takes_a_drain_back_before_a_pod_is_made() -> None:
    agent = an_agent()
    idle, busy = draining(agent, 1), draining(agent, 2)
    pods = [a_pod(agent, 0), idle, busy]
    world = a_world(pods, {"desk-0": 4, "desk-1": 0, "desk-2": 2})  # 6 calls and 1 spare: 2 pods
    assert steps(agent, world) == (of(Undrain, busy), of(DeletePod, idle))
    full = a_world(pods, {"desk-0": 4, "desk-1": 4, "desk-2": 4})  # 12 and 1: 4 pods
    taken = steps(agent, full)
    assert taken[:2] == (of(Undrain, idle), of(Undrain, busy))
    assert created(taken) == ["desk-3"]


def test_the_route_lists_what_drains_once_the_steps_are_taken() -> None:
    agent = an_agent(**AT_ONCE)
    pods = [a_pod(agent, 0), a_pod(agent, 1), draining(agent, 2), a_pod(agent, 3, terminating=True)]
    world = a_world(pods, {"desk-0": 0, "desk-1": 0, "desk-2": 1, "desk-3": 1})
    assert plan(agent, world).draining == ("desk-1", "desk-2", "desk-3")
    busy = a_world(pods, {"desk-0": 4, "desk-1": 4, "desk-2": 1, "desk-3": 0})
    assert plan(agent, busy).draining == ("desk-3",)


# --- rollout ---------------------------------------------------------------------------------------------


def old(agent: VoiceAgent, ordinal: int, **changes: Any) -> PodFacts:
    return a_pod(agent, ordinal, template="old", **changes)


def test_a_rollout_with_room_makes_a_new_pod_first() -> None:
    agent = an_agent()
    pod = old(agent, 0)
    assert created(steps(agent, a_world([pod]))) == ["desk-1"]
    assert steps(agent, a_world([pod, pending(agent, 1)])) == ()
    ready = a_world([pod, a_pod(agent, 1)], {"desk-0": 0, "desk-1": 0})
    assert steps(agent, ready) == (of(Drain, pod),)
    busier = a_world([pod, a_pod(agent, 1)], {"desk-0": 3, "desk-1": 0})
    assert steps(agent, busier) == (of(Drain, pod),)


def test_a_new_pod_that_no_gateway_has_replaces_none() -> None:
    """It is ready for Kubernetes and gets no call: were it enough, a bad template would end in no pod that gets one."""
    agent = an_agent()
    pods = [old(agent, 0), a_pod(agent, 1)]
    waiting = plan(agent, a_world(pods, {"desk-0": 0}))
    assert waiting.steps == (Requeue(UNKNOWN_LOOK),)
    assert not waiting.blocked, "it is on its way"
    assert steps(agent, a_world(pods, {"desk-0": 0, "desk-1": 0})) == (of(Drain, pods[0]),)
    # Nor where somebody else says how many there are, who does not wait for what is unknown.
    told = an_agent(warm={"autoscaling": "external", "replicas": 1})
    pods = [old(told, 0), a_pod(told, 1)]
    assert steps(told, a_world(pods, {"desk-0": 0})) == (Requeue(UNKNOWN_LOOK),)
    assert steps(told, a_world(pods, {"desk-0": 0, "desk-1": 0})) == (of(Drain, pods[0]),)


def test_a_pod_that_no_gateway_has_is_told_of_after_a_while() -> None:
    agent = an_agent(warm={"minPods": 2})
    pods = [a_pod(agent, 0), a_pod(agent, 1)]
    all_have, one_lacks = a_world(pods), a_world(pods, {"desk-0": 0})
    first = plan(agent, one_lacks, NOW)
    assert (first.unlinked, first.memory.unlinked) == (frozenset(), {"pod-1": NOW})
    almost = plan(agent, one_lacks, NOW + UNLINKED_SECONDS - 1, first.memory)
    assert (almost.unlinked, almost.steps) == (frozenset(), (Requeue(1.0),))
    late = plan(agent, one_lacks, NOW + UNLINKED_SECONDS, almost.memory)
    assert (late.unlinked, late.steps) == (frozenset({"desk-1"}), (Requeue(UNKNOWN_LOOK),))
    assert plan(agent, all_have, NOW + UNLINKED_SECONDS, late.memory).memory.unlinked == {}
    # While a gateway is silent it may have it, and time begins anew.
    unknown = a_world(pods, {"desk-0": 0}, known=False)
    quiet = plan(agent, unknown, NOW + UNLINKED_SECONDS, late.memory)
    assert (quiet.unlinked, quiet.memory.unlinked) == (frozenset(), {})


@pytest.mark.parametrize(
    "changes",
    [{"ready": False}, {"draining_since": NOW}, {"terminating": True}, {"node_leaving": "cordon"}],
)
def test_a_pod_that_gets_no_call_anyway_needs_no_gateway(changes: dict[str, Any]) -> None:
    agent = an_agent()
    world = a_world([a_pod(agent, 0, **changes)], {})
    assert plan(agent, world).memory.unlinked == {}


def test_a_rollout_without_room_drains_an_empty_pod() -> None:
    agent = an_agent(warm={"minPods": 2, "maxPods": 2})
    pods = [old(agent, 0), old(agent, 1)]
    assert steps(agent, a_world(pods, {"desk-0": 0, "desk-1": 1})) == (of(Drain, pods[0]),)
    blocked = plan(agent, a_world(pods, {"desk-0": 1, "desk-1": 1}))
    assert (blocked.steps, blocked.outdated, blocked.blocked) == ((), 2, True)
    unknown_is_busy = steps(agent, a_world(pods, {"desk-0": 1}))
    assert unknown_is_busy == (Requeue(UNKNOWN_LOOK),)


def test_a_rollout_without_room_drains_a_busy_pod_where_burst_takes_calls() -> None:
    agent = an_agent(**BURST, warm={"minPods": 2, "maxPods": 2})
    pods = [old(agent, 0), old(agent, 1)]
    busy = {"desk-0": 2, "desk-1": 1}
    deployed = replace(DEPLOYED, hash=burst_hash(agent, INSTALLATION))
    assert steps(agent, a_world(pods, busy, burst=deployed)) == (of(Drain, pods[1]),)
    away = replace(deployed, urls={})
    assert steps(agent, a_world(pods, busy, burst=away)) == ()
    one_by_one = [pods[0], replace(pods[1], draining_since=NOW)]
    assert steps(agent, a_world(one_by_one, busy, burst=deployed)) == ()


def test_a_rollout_waits_for_the_pod_that_drains() -> None:
    agent = an_agent(**BURST, warm={"minPods": 2, "maxPods": 3})
    deployed = replace(DEPLOYED, hash=burst_hash(agent, INSTALLATION))
    pods = [old(agent, 0), a_pod(agent, 1), old(agent, 2, draining_since=NOW, ready=False)]
    busy = {"desk-0": 1, "desk-1": 1, "desk-2": 1}
    assert steps(agent, a_world(pods, busy, burst=deployed)) == ()


def test_a_rollout_frees_a_gpu_for_the_new_pod() -> None:
    agent = an_agent()
    pods = [
        old(agent, 0),
        pending(agent, 1, unschedulable="0/1 nodes: Insufficient nvidia.com/gpu"),
    ]
    assert steps(agent, a_world(pods, {"desk-0": 0})) == (of(Drain, pods[0]),)
    blocked = plan(agent, a_world(pods, {"desk-0": 1}))
    assert (blocked.steps, blocked.blocked) == ((), True)


def test_old_pods_that_do_not_run_are_replaced_at_once() -> None:
    agent = an_agent(warm__minPods=2)
    stuck = pending(agent, 0, template="old", trouble="ImagePullBackOff")
    crashing = old(agent, 1, ready=False, started=False, trouble="CrashLoopBackOff")
    taken = steps(agent, a_world([stuck, crashing]))
    assert taken[:2] == (of(DeletePod, stuck), of(Drain, crashing))
    assert created(taken) == ["desk-2", "desk-3"]


def test_a_drain_of_an_old_template_is_not_taken_back() -> None:
    agent = an_agent()
    pod = draining(agent, 0, template="old")
    assert created(steps(agent, a_world([pod], {"desk-0": 1}))) == ["desk-1"]


def test_what_travels_with_a_call_restarts_nothing() -> None:
    pods = [a_pod(an_agent(), 0)]
    edited = an_agent(
        engine={"type": "loopback", "greeting": "Good day."},
        session={"idleSeconds": 20, "answerSeconds": 9},
        access={"apiKeysSecretRef": {"name": "callers"}},
    )
    assert steps(edited, a_world(pods)) == ()


# --- burst -----------------------------------------------------------------------------------------------


def burst_steps(facts: BurstFacts, now: float = NOW, **changes: Any) -> tuple[Step, ...]:
    agent = an_agent(**BURST | changes)
    return steps(agent, a_world([a_pod(agent, 0)], burst=facts), now)


def test_burst_is_deployed_when_its_hash_differs() -> None:
    agent = an_agent(**BURST)
    goal = burst_hash(agent, INSTALLATION)
    deploy = DeployBurst(burst_app(agent), goal)
    assert burst_steps(BurstFacts()) == (deploy,)
    assert burst_steps(DEPLOYED) == (deploy,)
    assert burst_steps(replace(DEPLOYED, hash=goal)) == ()
    assert burst_steps(BurstFacts(working=True)) == ()


def test_a_failed_deployment_is_tried_again_later_each_time() -> None:
    goal = burst_hash(an_agent(**BURST), INSTALLATION)
    waits = []
    for failures in (1, 2, 3, 7, 500):
        facts = BurstFacts(failures=failures, failed_at=NOW, failed_hash=goal)
        (step,) = burst_steps(facts)
        assert isinstance(step, Requeue)
        waits.append(step.after)
        assert isinstance(burst_steps(facts, NOW + step.after)[0], DeployBurst)
    assert waits == [5, 10, 20, 300, 300]


def test_a_changed_deployment_is_tried_at_once() -> None:
    facts = BurstFacts(failures=7, failed_at=NOW, failed_hash="what was wrong before")
    assert isinstance(burst_steps(facts)[0], DeployBurst)


def test_missing_credentials_are_looked_for() -> None:
    assert burst_steps(BurstFacts(credentials="no Secret modal")) == (Requeue(10),)


def test_how_many_containers_there_are_is_no_deployment() -> None:
    containers = {"burst__modal__minContainers": 2, "burst__modal__maxContainers": 5}
    agent = an_agent(**BURST, **containers)
    assert burst_hash(agent, INSTALLATION) == burst_hash(an_agent(**BURST), INSTALLATION)
    facts = replace(DEPLOYED, hash=burst_hash(agent, INSTALLATION))
    (step,) = steps(agent, a_world([a_pod(agent, 0)], burst=facts))
    wanted = {Region.US_EAST: Scaling(minimum=2, buffer=0, maximum=5, window=60)}
    assert step == ScaleBurst("app", wanted)
    told = replace(facts, standing=Standing(scalings=wanted, since=NOW))
    assert steps(agent, a_world([a_pod(agent, 0)], burst=told)) == ()
    # Modal refused: tried again in a while. At the budget's cap none stands by.
    refused = replace(facts, unscaled_at=NOW)
    assert steps(agent, a_world([a_pod(agent, 0)], burst=refused)) == (Requeue(10.0),)
    capped = steps(agent, a_world([a_pod(agent, 0)], burst=replace(told, capped=True)))
    none = {Region.US_EAST: replace(wanted[Region.US_EAST], minimum=0)}
    assert capped == (ScaleBurst("app", none),)


def test_no_more_stands_by_than_the_workspace_has_until_more_is_asked_for_again() -> None:
    agent = an_agent(**BURST, burst__modal__minContainers=5)
    goal = burst_hash(agent, INSTALLATION)
    wanted = {Region.US_EAST: Scaling(minimum=5, buffer=0, maximum=10, window=60)}
    few = {Region.US_EAST: Scaling(minimum=3, buffer=0, maximum=10, window=60)}
    limit = Limit(containers=3, since=NOW, at=NOW)
    limited = replace(DEPLOYED, hash=goal, limit=limit, standing=Standing(scalings=wanted))

    def after(seconds: float, facts: BurstFacts) -> tuple[Step, ...]:
        return steps(agent, a_world([a_pod(agent, 0)], burst=facts), NOW + seconds)

    # What was raised a moment ago is not kept: Modal does not give it.
    moment = replace(limited, standing=Standing(scalings=wanted, since=NOW - 2))
    assert after(0, moment) == (ScaleBurst("app", few), Requeue(300.0))
    kept = replace(limited, standing=Standing(scalings=few, since=NOW))
    assert after(299.0, kept) == (Requeue(1.0),)
    assert after(300.0, kept) == (ScaleBurst("app", wanted), Requeue(300.0))


def test_after_the_first_refusal_for_a_limit_containers_are_counted_at_once() -> None:
    agent = an_agent(**BURST)
    facts = replace(
        DEPLOYED,
        hash=burst_hash(agent, INSTALLATION),
        breaker=Breaker.of(Snapshot.CPU),
        refused=True,
        watched=NOW - 1.0,
    )
    limit = Limit(containers=3, since=NOW - 5, at=NOW - 5)
    for known, step in (None, WatchBurst("app")), (limit, Requeue(9.0)):
        world = a_world([a_pod(agent, 0)], burst=replace(facts, limit=known))
        assert step in steps(agent, world)


def test_nothing_stands_by_while_the_last_calls_of_an_app_end() -> None:
    agent = an_agent()
    raised = {Region.US_EAST: Scaling(minimum=2, buffer=1, maximum=5, window=60)}
    none = {Region.US_EAST: Scaling(minimum=0, buffer=0, maximum=5, window=60)}
    facts = replace(DEPLOYED, standing=Standing(scalings=raised))
    world = a_world([a_pod(agent, 0)], burst=facts)
    world = replace(world, traffic=replace(world.traffic, burst=1))
    assert steps(agent, world) == (ScaleBurst("app", none), Requeue(2.0))


def test_burst_that_must_not_be_is_stopped_once_it_is_silent() -> None:
    agent = an_agent()
    pods = [a_pod(agent, 0)]
    assert steps(agent, a_world(pods, burst=DEPLOYED)) == (StopBurst("app"),)
    heard = Traffic(known=True, acknowledged=True)
    for change in ({"burst": 1}, {"acknowledged": False}, {"known": False}):
        loud = replace(a_world(pods, burst=DEPLOYED), traffic=replace(heard, **change))
        assert steps(agent, loud) == (Requeue(2),)
    phi = an_agent(**BURST, policy__dataClass="phi")
    assert steps(phi, a_world(pods, burst=DEPLOYED)) == (StopBurst("app"),)


# --- deletion --------------------------------------------------------------------------------------------


def test_a_deletion_drains_then_removes_then_lets_go() -> None:
    agent = an_agent(**DELETED)
    pods = [a_pod(agent, 0), pending(agent, 1), draining(agent, 2), draining(agent, 3)]
    taken = steps(agent, a_world(pods, {"desk-0": 1, "desk-2": 0, "desk-3": 1}))
    assert taken == (
        of(Drain, pods[0]),
        of(DeletePod, pods[1]),
        of(DeletePod, pods[2]),
        Requeue(DEADLINE),
    )
    going = a_world([replace(pods[0], terminating=True)], {"desk-0": 0})
    assert steps(agent, going) == (Requeue(DEADLINE),)
    assert steps(agent, a_world()) == (RemoveFinalizer(),)


def test_a_deletion_ends_by_its_deadline() -> None:
    agent = an_agent(**DELETED)
    pods = [a_pod(agent, 0), draining(agent, 1)]
    world = a_world(pods, {"desk-0": 1, "desk-1": 1})
    late = NOW + DEADLINE
    assert steps(agent, world, late) == (of(DeletePod, pods[0]), of(DeletePod, pods[1]))
    lost_node = a_world([replace(pod, terminating=True) for pod in pods])
    assert steps(agent, lost_node, late) == (RemoveFinalizer(),)


def test_a_deletion_stops_the_app_once_it_is_silent() -> None:
    agent = an_agent(**DELETED, **BURST)
    calls = replace(
        a_world(burst=DEPLOYED), traffic=Traffic(known=True, acknowledged=True, burst=1)
    )
    assert steps(agent, calls) == (Requeue(2),)
    assert steps(agent, a_world(burst=DEPLOYED)) == (StopBurst("app"), Requeue(DEADLINE))
    assert steps(agent, a_world(burst=BurstFacts())) == (
        StopBurst(burst_app(agent)),  # perhaps deployed by an operator that died before it said so
        Requeue(DEADLINE),
    )
    assert steps(agent, a_world(burst=BurstFacts(stopped=True))) == (RemoveFinalizer(),)


def test_a_deployment_that_is_under_way_is_waited_for() -> None:
    for agent in (an_agent(**DELETED), an_agent(**DELETED, **BURST)):
        for facts in (BurstFacts(working=True), BurstFacts(working=True, stopped=True)):
            assert steps(agent, a_world(burst=facts)) == (Requeue(DEADLINE),)


@pytest.mark.parametrize(
    "facts",
    [
        replace(DEPLOYED, credentials="no Secret modal"),
        replace(DEPLOYED, failures=5, failed_at=NOW),
    ],
)
def test_an_app_that_cannot_be_stopped_is_told_and_left_at_the_deadline(facts: BurstFacts) -> None:
    agent = an_agent(**DELETED, **BURST)
    assert not any(isinstance(step, RemoveFinalizer) for step in steps(agent, a_world(burst=facts)))
    taken = steps(agent, a_world(burst=facts), NOW + DEADLINE)
    assert taken == (RemoveFinalizer(left_behind="app"),)


def test_an_app_that_perhaps_never_was_is_not_waited_for() -> None:
    agent = an_agent(**DELETED, **BURST)
    assert steps(agent, a_world(burst=BurstFacts(credentials="no Secret"))) == (RemoveFinalizer(),)
    failing = BurstFacts(failures=5, failed_at=NOW)
    assert steps(agent, a_world(burst=failing)) == (RemoveFinalizer(burst_app(agent)),)


def test_somebody_elses_finalizer_is_not_ours_to_act_on() -> None:
    """Nor its app; pods drain, as nothing else would make of a deleted agent."""
    deleted = {"deletionTimestamp": rfc3339(NOW), "finalizers": ["other/one"]}
    agent = an_agent(metadata=deleted, **BURST)
    pod = a_pod(agent, 0)
    world = a_world([pod], {"desk-0": 1}, burst=DEPLOYED)
    assert steps(agent, world) == (of(Drain, pod), Requeue(DEADLINE))
    assert steps(agent, a_world(burst=DEPLOYED)) == ()
