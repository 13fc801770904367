"""What people read: numbers, conditions, and when there is nothing new to write."""

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

from trunkline_operator.parsing import parsed
from trunkline_operator.plan import planned
from trunkline_operator.scaling import Memory
from trunkline_operator.spec import SpecError, VoiceAgent
from trunkline_operator.status import Condition, Reason, only_numbers_differ, rejected, reported
from trunkline_operator.world import BurstFacts, Phase, PodFacts, World

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
        "hash": "old",
    }


def test_an_operator_that_restarts_knows_the_app_from_the_status() -> None:
    status = told(an_agent(**BURST), a_world(burst=replace(DEPLOYED, snapshot="cpu")))
    assert BurstFacts.of(status) == replace(DEPLOYED, snapshot="cpu")
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
        (BurstFacts(credentials="no Secret"), Reason.CREDENTIALS_MISSING, "no Secret"),
        (BurstFacts(failures=1, message="Bad token"), Reason.BURST_FAILING, "Bad token"),
        (
            replace(DEPLOYED, failures=1, message="Bad GPU"),
            Reason.BURST_FAILING,
            "the last deployment goes on; Bad GPU",
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
        "no session within 7 s",
    )


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
            "no key is good: Secret callers does not exist",
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
        ({"running": {}}, ""),
    ],
)
def test_trouble_in_the_kubelets_words(state: Json, words: str) -> None:
    assert of_container(state=state).trouble == words


def test_trouble_of_the_scheduler_and_of_a_whole_pod() -> None:
    scheduled = {"type": "PodScheduled", "status": "False", "message": UNSCHEDULABLE}
    assert PodFacts.of(pod(phase="Pending", conditions=[scheduled])).unschedulable == UNSCHEDULABLE
    evicted = PodFacts.of(pod(phase="Failed", reason="Evicted", message="low on memory"))
    assert (evicted.trouble, evicted.finished) == ("Evicted: low on memory", True)
