"""What people read: numbers, conditions, and when there is nothing new to write."""

import math
from dataclasses import replace
from typing import Any

import pytest
from worlds import (
    BURST,
    DEPLOYED,
    INSTALLATION,
    NOW,
    a_pod,
    a_world,
    an_agent,
    an_object,
    pending,
)

from trunkline_operator.agent.parsing import parsed
from trunkline_operator.agent.policy import here
from trunkline_operator.agent.spec import SpecError, VoiceAgent
from trunkline_operator.burst.limit import Limit
from trunkline_operator.burst.standby import Standing
from trunkline_operator.decisions.conditions import Condition, Reason
from trunkline_operator.decisions.plan import planned, rfc3339
from trunkline_operator.decisions.reach import UNLINKED_SECONDS
from trunkline_operator.decisions.status import (
    only_numbers_differ,
    rejected,
    reported,
)
from trunkline_operator.decisions.template import refusal
from trunkline_operator.decisions.world import BurstFacts, Phase, PodFacts, Refusal, World
from trunkline_operator.scaling.decision import Memory
from trunkline_operator.scaling.staffing import Flow

Json = dict[str, Any]


def told(agent: VoiceAgent, world: World, previous: Json | None = None, now: float = NOW) -> Json:
    plan = planned(agent, world, now, Memory(wish=0, refused=0), INSTALLATION)
    return reported(agent, world, plan, previous or {}, now)


def condition(status: Json, kind: Condition) -> tuple[str, str, str]:
    (found,) = [c for c in status["conditions"] if c["type"] == kind]
    return found["status"], found["reason"], found["message"]


def test_numbers() -> None:
    agent = an_agent(warm__minPods=2)
    pods = [
        a_pod(agent, 0),
        a_pod(agent, 1),
        pending(agent, 2),
        a_pod(agent, 3, draining_since=NOW, ready=False),
        a_pod(agent, 4, terminating=True, ready=False),
        a_pod(agent, 5, phase=Phase.FAILED, ready=False),
        a_pod(agent, 6, owner="somebody else"),
    ]
    busy = {"desk-0": 4, "desk-1": 1, "desk-3": 2, "desk-4": 1}
    status = told(agent, a_world(pods, busy, burst=DEPLOYED))
    assert status["replicas"] == 3
    assert status["readyReplicas"] == 2
    assert status["pods"] == {"ready": 2, "starting": 1, "draining": 2}
    assert status["slots"] == {"total": 8, "busy": 8, "free": 3}
    assert status["selector"] == "trunkline.dev/agent=desk"
    assert status["observedGeneration"] == 1
    assert status["burst"] == {
        "calls": 0,
        "app": "app",
        "appId": "ap-1",
        "url": "https://burst",
        "regions": [{"name": "us-east", "url": "https://burst"}],
        "hash": "old",
    }


def test_an_operator_that_restarts_knows_the_app_from_the_status() -> None:
    limit = Limit(containers=3, since=NOW - 900, at=NOW - 60, refusals=2)
    deployed = replace(DEPLOYED, snapshot="cpu", first_boot=21.5, limit=limit)
    status = told(an_agent(**BURST), a_world(burst=deployed))
    assert BurstFacts.of(status) == replace(deployed, standing=Standing())
    assert BurstFacts.of({}) == BurstFacts()


def test_a_healthy_agent() -> None:
    agent = an_agent(**BURST)
    status = told(agent, a_world([a_pod(agent, 0)], burst=DEPLOYED))
    assert [c["type"] for c in status["conditions"]] == list(Condition)
    words = "at most 4 × 4 warm + 10 × 4 burst = 56 calls"
    assert condition(status, Condition.ACCEPTED) == ("True", "Accepted", words)
    assert condition(status, Condition.WARM_READY) == ("True", "PodsReady", "1 of 1 pods are ready")
    assert condition(status, Condition.BURST_READY) == (
        "True",
        "BurstReady",
        "app app takes calls in us-east",
    )
    assert condition(status, Condition.READY) == ("True", "Answering", "calls are answered")


UNSCHEDULABLE = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({}, Reason.PODS_STARTING, "0 of 1 pods are ready"),
        ({"unschedulable": UNSCHEDULABLE}, Reason.POD_UNSCHEDULABLE, f"desk-0: {UNSCHEDULABLE}"),
        (
            {"trouble": "ErrImagePull: no such image"},
            Reason.POD_FAILING,
            "desk-0: ErrImagePull: no",
        ),
    ],
)
def test_a_pod_that_does_not_come_speaks_for_itself(
    changes: Json, reason: Reason, words: str
) -> None:
    agent = an_agent()
    status = told(agent, a_world([pending(agent, 0, **changes)]))
    for kind in (Condition.WARM_READY, Condition.READY):
        found = condition(status, kind)
        assert found[:2] == ("False", reason)
        assert words in found[2]


def test_pods_above_the_minimum_may_be_starting() -> None:
    agent = an_agent()
    status = told(agent, a_world([a_pod(agent, 0), pending(agent, 1)], {"desk-0": 4}))
    assert condition(status, Condition.WARM_READY)[1:] == ("PodsStarting", "1 of 2 pods are ready")
    assert condition(status, Condition.READY)[0] == "True"


@pytest.mark.parametrize(
    ("facts", "reason", "words"),
    [
        (BurstFacts(), Reason.BURST_DEPLOYING, "the app is being deployed"),
        (BurstFacts(app="app", working=True), Reason.BURST_DEPLOYING, "the first container starts"),
        (
            BurstFacts(credentials="no Secret"),
            Reason.CREDENTIALS_MISSING,
            "no Secret; looked for every 10 s; until then calls past the warm slots are refused",
        ),
        (
            BurstFacts(failures=1, message="Bad token"),
            Reason.BURST_FAILING,
            (
                "Bad token; tried again after 5 s, at once if burst.modal is changed; "
                "until then calls past the warm slots are refused"
            ),
        ),
        (
            replace(DEPLOYED, failures=3, message="Bad GPU."),
            Reason.BURST_FAILING,
            (
                "Bad GPU; tried again after 20 s, at once if burst.modal is changed; "
                "the last deployment goes on"
            ),
        ),
    ],
)
def test_burst_that_is_not_ready_says_why(facts: BurstFacts, reason: Reason, words: str) -> None:
    agent = an_agent(**BURST)
    status = told(agent, a_world([a_pod(agent, 0)], burst=facts))
    assert condition(status, Condition.BURST_READY) == ("False", reason, words)
    assert condition(status, Condition.READY) == ("False", reason, words)
    assert status["burst"].get("message", "") == (facts.credentials or facts.message)


def test_what_gateways_meet_at_modal_is_told() -> None:
    agent = an_agent(**BURST)
    pods = [a_pod(agent, 0)]
    status = told(agent, a_world(pods, burst=DEPLOYED, burst_error="no session within 7 s"))
    assert condition(status, Condition.BURST_READY) == (
        "False",
        Reason.BURST_FAILING,
        "no session within 7 s; each call that finds no warm slot tries again",
    )


def test_a_limit_of_the_workspace_is_told_beside_what_gateways_meet() -> None:
    agent = an_agent(**BURST)
    facts = replace(DEPLOYED, limit=Limit(containers=3, since=NOW, at=NOW))
    status = told(agent, a_world([a_pod(agent, 0)], burst=facts, burst_error="no"))
    holds, reason, words = condition(status, Condition.BURST_READY)
    assert (holds, reason) == ("False", Reason.BURST_FAILING)
    assert words.startswith("no; each call that finds no warm slot tries again; Modal has refused")
    assert status["burst"]["limit"] == {
        "containers": 3,
        "since": rfc3339(NOW),
        "until": rfc3339(NOW + 300),
        "refusals": 1,
    }
    status = told(agent, a_world([a_pod(agent, 0)], burst=facts))
    assert condition(status, Condition.BURST_READY)[:2] == ("True", Reason.LIMIT_REACHED)
    assert condition(status, Condition.READY)[0] == "True"


def test_no_burst_is_no_trouble() -> None:
    agent = an_agent()
    status = told(agent, a_world([a_pod(agent, 0)]))
    assert condition(status, Condition.BURST_READY)[:2] == ("False", Reason.BURST_OFF)
    assert condition(status, Condition.READY)[0] == "True"
    phi = an_agent(**BURST, policy__dataClass="phi")
    status = told(phi, a_world([a_pod(phi, 0)]))
    assert condition(status, Condition.BURST_READY)[1:] == ("BurstOff", "calls stay in the cluster")


def test_keys_that_cannot_be_read_are_told() -> None:
    agent = an_agent(access={"apiKeysSecretRef": {"name": "callers"}})
    status = told(agent, a_world([a_pod(agent, 0)], access="Secret callers does not exist"))
    for kind in (Condition.ACCEPTED, Condition.READY):
        assert condition(status, kind) == (
            "False",
            Reason.KEYS_MISSING,
            "no key is good: Secret callers does not exist; until then callers with one are refused",
        )


def test_an_agent_that_nobody_could_reach_is_not_ready() -> None:
    agent = an_agent(warm={"minPods": 0, "bufferSlots": 0})
    status = told(agent, a_world())
    assert condition(status, Condition.WARM_READY)[:2] == ("True", Reason.NO_PODS_WANTED)
    assert condition(status, Condition.READY)[:2] == ("False", Reason.NO_CAPACITY)


def test_a_blocked_rollout_is_told() -> None:
    agent = an_agent(warm={"minPods": 1, "maxPods": 1})
    world = a_world([a_pod(agent, 0, template="old")], {"desk-0": 1})
    state, reason, words = condition(told(agent, world), Condition.WARM_READY)
    assert (state, reason) == ("True", Reason.ROLLOUT_BLOCKED)
    assert words.startswith("1 of 1 pods are ready; 1 of an older template stay until")


def test_a_rollout_to_a_pod_that_no_gateway_has_is_told_while_old_pods_answer() -> None:
    agent = an_agent()
    world = a_world([a_pod(agent, 0, template="old"), a_pod(agent, 1)], {"desk-0": 1})
    memory = Memory(unlinked={"pod-1": NOW - UNLINKED_SECONDS})
    plan = planned(agent, world, NOW, memory, INSTALLATION)
    status = reported(agent, world, plan, {}, NOW)
    state, reason, words = condition(status, Condition.WARM_READY)
    assert (state, reason) == ("False", Reason.POD_UNLINKED)
    assert words.startswith("1 of 2 pods take calls; desk-1: it runs, and no gateway has a link")
    assert words.endswith("; calls go to the ready pods, and are refused when those are full")
    assert condition(status, Condition.READY)[:2] == ("True", Reason.ANSWERING)


def test_without_a_word_of_any_gateway_nobody_knows_whether_calls_are_answered() -> None:
    agent = an_agent()
    silent = a_world([a_pod(agent, 0)], {}, known=False, silent=True)
    state, reason, words = condition(told(agent, silent), Condition.READY)
    assert (state, reason) == ("Unknown", Reason.GATEWAYS_SILENT)
    assert "no gateway reports to the operator" in words
    # What is known to be wrong is said all the same.
    none = a_world([], {}, known=False, silent=True)
    assert condition(told(agent, none), Condition.READY)[:2] == ("False", Reason.PODS_STARTING)


def test_a_pod_that_the_api_refuses_is_told() -> None:
    agent = an_agent()
    quota = 'pods "desk-0" is forbidden: exceeded quota: gpus'
    plan = planned(agent, a_world(), NOW, Memory(), INSTALLATION)
    status = reported(agent, a_world(), plan, {}, NOW, refused=Refusal(quota))
    state, reason, words = condition(status, Condition.READY)
    assert (state, reason) == ("False", Reason.PODS_REFUSED)
    assert words.startswith(
        f"0 of 1 pods are ready; no pod can be made: {quota}. It is tried again "
    )
    # What a pod that is there says comes first: it is nearer to the calls.
    world = a_world([pending(agent, 0, trouble="Oops")])
    status = reported(agent, world, plan, {}, NOW, refused=Refusal(quota))
    assert condition(status, Condition.READY)[1] == Reason.POD_FAILING


UNFIT = 'Pod "desk-0" is invalid: spec.tolerations[0].operator: Invalid value: "Equal"'


def test_a_template_that_the_api_takes_for_no_pod_is_told() -> None:
    agent = an_agent()
    plan = planned(agent, a_world(), NOW, Memory(), INSTALLATION)
    status = reported(agent, a_world(), plan, {}, NOW, Refusal(UNFIT, template=True))
    state, reason, words = condition(status, Condition.READY)
    assert (state, reason) == ("False", Reason.TEMPLATE_REJECTED)
    assert f"the API takes no such pod: {UNFIT}. Change that in warm" in words


def test_a_rollout_that_the_api_refuses_is_told_while_old_pods_answer() -> None:
    agent = an_agent()
    world = a_world([a_pod(agent, 0, template="old")])
    plan = planned(agent, world, NOW, Memory(), INSTALLATION)
    status = reported(agent, world, plan, {}, NOW, Refusal(UNFIT, template=True))
    state, reason, words = condition(status, Condition.WARM_READY)
    assert (state, reason) == ("True", Reason.TEMPLATE_REJECTED)
    assert words.startswith("1 of 1 pods are ready; 1 of an older template stay; the API takes no")
    assert words.endswith("; calls go on there")


@pytest.mark.parametrize(
    ("status", "words", "template"),
    [
        (422, UNFIT, True),
        (400, 'strict decoding error: unknown field "spec.affinity.nodeAffinty"', True),
        (403, 'pods "desk-0" is forbidden: exceeded quota: gold, requested: pods=1', False),
        (403, 'pods "desk-0" is forbidden: no PriorityClass with name gold was found', True),
        (403, 'pods "desk-0" is forbidden: no PriorityClass with name gold-2 was found', False),
    ],
)
def test_what_a_refusal_is_about(status: int, words: str, template: bool) -> None:
    agent = an_agent(warm__template={"priorityClassName": "gold"})
    assert refusal(agent, status, words) == Refusal(words, template)


def test_an_agent_of_another_region_has_no_pods_here_and_says_so() -> None:
    regions = {"regions": [{"name": "eu"}]}
    away = here(an_agent(warm=regions), "us")
    status = told(away, a_world())
    state, reason, words = condition(status, Condition.WARM_READY)
    assert (state, reason) == ("True", Reason.NOT_SERVED_HERE)
    assert words == "warm.regions is for eu and this operator is in us, so there are no pods here"
    state, reason, ready = condition(status, Condition.READY)
    assert (state, reason) == ("False", Reason.NOT_SERVED_HERE)
    assert ready == f"no rung: no call is taken; {words}"
    # Burst takes calls from anywhere.
    status = told(here(an_agent(**BURST, warm=regions), "us"), a_world(burst=DEPLOYED))
    assert condition(status, Condition.READY)[:2] == ("True", Reason.ANSWERING)


def test_a_product_that_no_node_has_is_named() -> None:
    agent = an_agent(warm__gpu={"product": "NVIDIA-L5"})
    said = "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."
    world = a_world([pending(agent, 0, unschedulable=said)])
    assert (
        "labelled nvidia.com/gpu.product=NVIDIA-L5; calls are refused"
        in condition(told(agent, world), Condition.WARM_READY)[2]
    )


@pytest.mark.parametrize(
    ("ready", "burst", "words"),
    [
        (False, False, "calls are refused"),
        (False, True, "calls go to burst"),
        (True, False, "calls go to the ready pods, and are refused when those are full"),
        (True, True, "calls go to the ready pods and to burst"),
    ],
)
def test_where_calls_go_meanwhile_is_told(ready: bool, burst: bool, words: str) -> None:
    agent = an_agent(**BURST if burst else {}, warm__minPods=2)
    pods = [pending(agent, 1, trouble="Oops"), *([a_pod(agent, 0)] if ready else [])]
    status = told(agent, a_world(pods, burst=DEPLOYED if burst else BurstFacts(stopped=True)))
    assert condition(status, Condition.WARM_READY)[2].endswith(f"; {words}")


def test_a_deletion_is_told() -> None:
    agent = an_agent(metadata={"deletionTimestamp": "2027-01-01T00:00:00Z"})
    status = told(agent, a_world([a_pod(agent, 0)]))
    assert condition(status, Condition.READY)[:2] == ("False", Reason.DELETING)
    words = "1 pods are left, and each ends with its last call"
    assert condition(status, Condition.WARM_READY) == ("False", Reason.DELETING, words)


def test_nothing_new_is_the_same_status() -> None:
    agent = an_agent()
    world = a_world([a_pod(agent, 0)])
    first = told(agent, world)
    assert told(agent, world, first, NOW + 100) == first


def test_the_time_of_a_condition_is_when_its_status_changed() -> None:
    agent = an_agent()
    starting = told(agent, a_world([pending(agent, 0)]))
    worse = told(agent, a_world([pending(agent, 0, trouble="Oops")]), starting, NOW + 10)
    ready = told(agent, a_world([a_pod(agent, 0)]), worse, NOW + 20)

    def since(status: Json) -> str:
        (found,) = [c for c in status["conditions"] if c["type"] == Condition.WARM_READY]
        stamp: str = found["lastTransitionTime"]
        return stamp

    assert since(starting) == since(worse) == "2027-01-15T08:00:00Z"
    assert since(ready) == "2027-01-15T08:00:20Z"


def test_calls_change_numbers_only() -> None:
    agent = an_agent(**BURST)
    pods = [a_pod(agent, 0)]
    quiet = told(agent, a_world(pods, burst=DEPLOYED))
    call = told(agent, a_world(pods, {"desk-0": 1}, burst=DEPLOYED), quiet)
    assert call != quiet
    assert only_numbers_differ(quiet, call)
    more = told(agent, a_world([*pods, a_pod(agent, 1)], {"desk-0": 1}, burst=DEPLOYED), quiet)
    assert not only_numbers_differ(quiet, more)
    assert not only_numbers_differ({}, quiet)


def test_the_last_decision_stays_until_another_number_is_wanted() -> None:
    agent = an_agent()
    pods = [a_pod(agent, 0)]
    quiet = told(agent, a_world(pods, {"desk-0": 1}))
    first = "1 warm and 0 burst calls and 1 spare slots at 4 a pod need 1"
    assert quiet["lastDecision"] == {"time": "2027-01-15T08:00:00Z", "pods": 1, "reason": first}
    busier = told(agent, a_world(pods, {"desk-0": 2}), quiet, NOW + 10)
    assert busier["lastDecision"] == quiet["lastDecision"]
    full = told(agent, a_world(pods, {"desk-0": 4}), busier, NOW + 20)
    assert full["lastDecision"] == {
        "time": "2027-01-15T08:00:20Z",
        "pods": 2,
        "reason": "4 warm and 0 burst calls and 1 spare slots at 4 a pod need 2",
    }
    assert only_numbers_differ(quiet, busier)
    assert not only_numbers_differ(busier, full)
    leaving = an_agent(metadata={"deletionTimestamp": "2027-01-01T00:00:00Z"})
    assert told(leaving, a_world(pods), full)["lastDecision"] == full["lastDecision"]


@pytest.mark.parametrize(
    ("growth", "busy", "seconds"),
    [
        (0.0, 1, None),  # nothing grows
        (0.01, 1, 300),  # 3 free slots, one more call each 100 s
        (0.2, 1, 10),
        (1.0, 1, 0),
        (0.2, 4, 0),  # none is free
        (0.0008, 1, None),  # more than an hour
    ],
)
def test_how_long_free_slots_last(growth: float, busy: int, seconds: int | None) -> None:
    agent = an_agent()
    world = a_world([a_pod(agent, 0)], {"desk-0": busy})
    plan = planned(agent, world, NOW, Memory(wish=0, refused=0), INSTALLATION)
    # The rate that stands out by so much from chance.
    arriving = (math.sqrt(1 / 600) + math.sqrt(1 / 600 + 4 * growth)) / 2
    flow = Flow(arriving=arriving**2 if growth else 0.0)
    assert flow.growth == pytest.approx(growth)
    plan = replace(plan, memory=replace(plan.memory, flow=flow))
    slots = reported(agent, world, plan, {}, NOW)["slots"]
    assert slots.get("runwaySeconds") == seconds
    assert only_numbers_differ({"slots": slots}, {"slots": {**slots, "runwaySeconds": 7}})


def test_without_slots_nothing_can_run_out() -> None:
    agent = an_agent()
    plan = planned(agent, a_world(), NOW, Memory(), INSTALLATION)
    plan = replace(plan, memory=replace(plan.memory, flow=Flow(arriving=1.0)))
    assert "runwaySeconds" not in reported(agent, a_world(), plan, {}, NOW)["slots"]


def test_a_long_message_is_cut() -> None:
    agent = an_agent()
    status = told(agent, a_world([pending(agent, 0, trouble="x" * 5000)]))
    assert len(condition(status, Condition.WARM_READY)[2]) == 1024


def test_a_rejected_object_keeps_its_numbers() -> None:
    agent = an_agent()
    before = told(agent, a_world([a_pod(agent, 0)]))
    obj = an_object(engine__replies=[{"match": "(", "say": "?"}], metadata={"generation": 2})
    with pytest.raises(SpecError) as caught:
        parsed(obj)
    status = rejected({**obj, "status": before}, caught.value, NOW + 5)
    assert (status["observedGeneration"], status["slots"]) == (2, before["slots"])
    state, reason, words = condition(status, Condition.ACCEPTED)
    assert (state, reason) == ("False", Reason.SPEC_INVALID)
    assert "engine.replies[0].match is not a regular expression" in words
    assert condition(status, Condition.WARM_READY)[0] == "True"
    assert rejected({**obj, "status": status}, caught.value, NOW + 9) == status
    new = rejected(obj, caught.value, NOW)
    assert [c["type"] for c in new["conditions"]] == [Condition.ACCEPTED]


# --- facts from pods -------------------------------------------------------------------------------------


def pod(**changes: Any) -> Json:
    metadata: Json = {"name": "desk-3", "uid": "u"}
    return {"metadata": metadata | changes.pop("metadata", {}), "status": changes}


def of_container(**changes: Any) -> PodFacts:
    worker = {"name": "worker", "restartCount": 2, **changes}
    return PodFacts.of(pod(phase="Running", containerStatuses=[worker]))


def test_facts_of_a_pod_that_was_just_made() -> None:
    facts = PodFacts.of({"metadata": {"name": "desk-3", "uid": "u"}})
    assert (facts.phase, facts.ordinal, facts.owner) == (Phase.PENDING, 3, "")
    assert PodFacts.of(pod(metadata={"name": "desk"})).ordinal == -1
    assert PodFacts.of(pod(metadata={"name": "desk-x"})).ordinal == -1


def test_facts_of_a_drain() -> None:
    def drained(stamp: str) -> PodFacts:
        return PodFacts.of(pod(metadata={"annotations": {"trunkline.dev/draining": stamp}}))

    assert drained("2026-01-01T00:00:00Z").draining_since == 1_767_225_600.0
    assert drained("yes").draining_since is None


def test_a_container_that_runs_may_hold_calls_unless_it_never_started() -> None:
    assert of_container(state={"running": {}}, started=True).started
    assert of_container(state={"running": {}}).started
    assert not of_container(state={"running": {}}, started=False).started
    assert not of_container(state={"terminated": {}}, started=True).started
    assert of_container(state={"running": {}}).restarts == 2


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"waiting": {"reason": "ContainerCreating"}}, ""),
        ({"waiting": {"reason": "ErrImagePull", "message": "denied"}}, "ErrImagePull: denied"),
        ({"waiting": {"reason": "CrashLoopBackOff"}}, "CrashLoopBackOff"),
        ({"terminated": {"reason": "Error", "message": "no weights"}}, "Error: no weights"),
        ({"terminated": {"reason": "OOMKilled", "exitCode": 137}}, "OOMKilled (exit code 137)"),
        ({"running": {}}, ""),
    ],
)
def test_trouble_in_the_kubelets_words(state: Json, words: str) -> None:
    assert of_container(state=state).trouble == words


def test_trouble_in_the_containers_own_last_words() -> None:
    log = "loading\n" * 100 + "RuntimeError: CUDA out of memory"
    ended = {"terminated": {"reason": "Error", "exitCode": 1, "message": log}}
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}
    loop = of_container(state={"waiting": waiting}, lastState=ended, ready=False).trouble
    assert loop.startswith(
        "CrashLoopBackOff: back-off 10s restarting failed container; it ended with Error (exit code 1): …"
    )
    assert loop.endswith("loading RuntimeError: CUDA out of memory")
    assert len(loop) < 600
    # It runs for a moment between two crashes.
    running = of_container(state={"running": {}}, lastState=ended, ready=False).trouble
    assert running.startswith("it was restarted; before, it ended with Error (exit code 1): …")
    assert of_container(state={"running": {}}, lastState=ended, ready=True).trouble == ""


def test_a_worker_that_was_ready_and_is_no_more() -> None:
    def since(stamp: str, status: str = "False") -> str:
        words = "containers with unready status: [worker]"
        ready = {"type": "Ready", "status": status, "lastTransitionTime": stamp, "message": words}
        state = {"running": {"startedAt": "2027-01-15T07:00:00Z"}}
        containers = [{"name": "worker", "state": state}]
        return PodFacts.of(
            pod(phase="Running", conditions=[ready], containerStatuses=containers)
        ).unready

    assert since("2027-01-15T06:59:58Z") == ""  # since the pod was made: it starts
    assert since("2027-01-15T07:30:00Z", "True") == ""
    assert since("2027-01-15T07:30:00Z") == (
        "not ready since 2027-01-15T07:30:00Z: containers with unready status: [worker]"
    )


def test_trouble_of_the_scheduler_and_of_a_whole_pod() -> None:
    scheduled = {"type": "PodScheduled", "status": "False", "message": UNSCHEDULABLE}
    assert PodFacts.of(pod(phase="Pending", conditions=[scheduled])).unschedulable == UNSCHEDULABLE
    evicted = PodFacts.of(pod(phase="Failed", reason="Evicted", message="low on memory"))
    assert (evicted.trouble, evicted.finished) == ("Evicted: low on memory", True)
