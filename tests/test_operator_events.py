"""What an on-call person is told as Events: the news, each once, by whom, and no flood."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_rig import NAME, World, operated
from worlds import BURST, DEPLOYED, INSTALLATION, NOW, a_pod, a_world, an_agent, pending

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, is_true
from trunkline_operator.agent.spec import VoiceAgent
from trunkline_operator.decisions.events import (
    BURST as AT_ONCE,
)
from trunkline_operator.decisions.events import (
    REFILL_SECONDS,
    REPEAT_SECONDS,
    Event,
    Kind,
    Look,
    Memory,
    chosen,
    of_look,
    of_status,
    remembered,
)
from trunkline_operator.decisions.plan import planned
from trunkline_operator.decisions.status import reported
from trunkline_operator.decisions.steps import IssueCertificate, RemoveFinalizer, Step
from trunkline_operator.decisions.world import BurstFacts, Phase
from trunkline_operator.decisions.world import World as Seen
from trunkline_operator.scaling.decision import Memory as ScalingMemory

Json = dict[str, Any]


def looked(agent: VoiceAgent, world: Seen, *more: Step, wish: int = 0) -> Look:
    """A look whose steps were all taken, and more."""
    memory = ScalingMemory(wish=wish, refused=0)
    plan = planned(agent, world, NOW, memory, INSTALLATION)
    return Look(
        agent=agent,
        world=world,
        plan=plan,
        taken=(*plan.steps, *more),
        installation=INSTALLATION,
        now=NOW,
    )


def told(look: Look, before: Look | None = None) -> list[tuple[str, str, str]]:
    memory = remembered(before, Memory()) if before else Memory()
    return [(it.kind, it.reason, it.message) for it in of_look(look, memory)]


# --- steps -----------------------------------------------------------------------------------------------


def test_a_drain_says_who_wants_it() -> None:
    agent = an_agent()
    two = [a_pod(agent, 0), a_pod(agent, 1)]
    less = "desk-1 takes no new call and goes after its last: 1 pods are wanted: "
    load = "0 warm and 0 burst calls and 1 spare slots at 4 a pod need 1"
    assert told(looked(agent, a_world(two))) == [("Normal", "DrainBegan", less + load)]

    older = [a_pod(agent, 0, template="old"), a_pod(agent, 1)]
    ((_, _, words),) = told(looked(agent, a_world(older)))
    assert (
        words
        == "desk-0 takes no new call and goes after its last: its template is older than the agent's"
    )

    leaving = an_agent(metadata={"deletionTimestamp": "2027-01-15T08:00:00Z"})
    ((_, _, words),) = told(looked(leaving, a_world([a_pod(leaving, 0)], {"desk-0": 1})))
    assert words.endswith("goes after its last: the agent is being deleted")

    stranded = [a_pod(agent, 0, ca="another"), a_pod(agent, 1)]
    ((_, _, words),) = told(looked(agent, a_world(stranded)))
    assert words.endswith("its certificate is of another CA than that of the gateways")


def test_a_drain_ends_or_is_taken_back() -> None:
    agent = an_agent()
    drained = [a_pod(agent, 0), a_pod(agent, 1, draining_since=NOW - 5)]
    assert told(looked(agent, a_world(drained))) == [
        ("Normal", "DrainEnded", "desk-1 is drained and removed")
    ]
    busy = a_world(drained, {"desk-0": 4, "desk-1": 1})
    assert told(looked(agent, busy)) == [
        ("Normal", "DrainCancelled", "desk-1 takes calls again: it is wanted after all")
    ]


def test_certificates_and_apps_left_behind() -> None:
    agent = an_agent()
    world = a_world([a_pod(agent, 0)])
    look = looked(agent, world, IssueCertificate("desk-trunkline", "it ends soon"))
    assert told(look) == [
        (
            "Normal",
            "CertificateIssued",
            "a new certificate for the workers is in Secret desk-trunkline: it ends soon",
        )
    ]
    ((kind, reason, words),) = told(looked(agent, world, RemoveFinalizer("desk-app")))
    assert (kind, reason) == ("Warning", "BurstLeftBehind")
    assert "modal app stop desk-app" in words
    assert told(looked(agent, world, RemoveFinalizer())) == []


# --- pods ------------------------------------------------------------------------------------------------


def test_a_pod_that_ended_is_lost_in_its_own_words() -> None:
    agent = an_agent()
    words = "Evicted: The node was low on resource: memory"
    ended = a_pod(agent, 0, phase=Phase.FAILED, ready=False, started=False, trouble=words)
    assert told(looked(agent, a_world([ended]))) == [
        ("Warning", "PodLost", f"desk-0 has ended and is replaced: {words}")
    ]


def test_a_pod_that_somebody_took_away_is_lost() -> None:
    agent = an_agent()
    before = looked(agent, a_world([a_pod(agent, 0)]))
    after = looked(agent, a_world())
    ((kind, reason, words),) = told(after, before)
    assert (kind, reason) == ("Warning", "PodLost")
    assert words.startswith("desk-0 is gone, and with it its calls")
    going = looked(agent, a_world([a_pod(agent, 0, terminating=True)]))
    ((_, _, words),) = told(going, before)
    assert "is being deleted, and its calls must end within its grace period" in words
    # Once: a pod that is going has been told of when it is gone.
    assert told(after, going) == []


def test_a_pod_that_the_operator_took_away_is_not_lost() -> None:
    agent = an_agent()
    for pod in (pending(agent, 1), a_pod(agent, 1, draining_since=NOW - 5)):
        before = looked(agent, a_world([a_pod(agent, 0), pod]))
        assert told(looked(agent, a_world([a_pod(agent, 0)])), before) == []


def test_a_new_operator_takes_what_it_finds_for_old() -> None:
    agent = an_agent()
    pods = [a_pod(agent, 0), a_pod(agent, 1, draining_since=NOW, ready=False)]
    assert told(looked(agent, a_world(pods, {"desk-0": 0, "desk-1": 1}))) == []
    assert told(looked(agent, a_world())) == []


def test_a_namespace_that_goes_loses_no_pods() -> None:
    agent = an_agent()
    leaving = an_agent(metadata={"deletionTimestamp": "2027-01-15T08:00:00Z"})
    before = looked(agent, a_world([a_pod(agent, 0)]))
    assert told(looked(leaving, a_world()), before) == []


def test_a_drain_by_somebody_else_is_told() -> None:
    agent = an_agent()
    pods = [a_pod(agent, 0), a_pod(agent, 1)]
    before = looked(agent, a_world(pods, {"desk-0": 1, "desk-1": 3}))
    drained = [pods[0], a_pod(agent, 1, draining_since=NOW, ready=False)]
    after = looked(agent, a_world(drained, {"desk-0": 1, "desk-1": 1}))
    words = "desk-1 takes no new call and goes after its last: somebody annotated it so"
    assert told(after, before) == [("Normal", "DrainBegan", words)]
    assert told(after, after) == []


def test_the_operators_own_drain_is_nobody_elses() -> None:
    agent = an_agent()
    began = looked(agent, a_world([a_pod(agent, 0), a_pod(agent, 1)]))
    drained = [a_pod(agent, 0), a_pod(agent, 1, draining_since=NOW, ready=False)]
    assert told(looked(agent, a_world(drained, {"desk-0": 1, "desk-1": 1})), began) == []


def test_a_pod_that_was_taken_back_can_be_lost_again() -> None:
    agent = an_agent()
    drained = [a_pod(agent, 0), a_pod(agent, 1, draining_since=NOW - 5)]
    back = looked(agent, a_world(drained, {"desk-0": 4, "desk-1": 1}))
    lost = told(looked(agent, a_world([a_pod(agent, 0)], {"desk-0": 4})), back)
    assert [reason for _, reason, _ in lost] == ["PodLost"]


# --- conditions ------------------------------------------------------------------------------------------


def status_of(agent: VoiceAgent, world: Seen, previous: Json | None = None) -> Json:
    return reported(agent, world, looked(agent, world).plan, previous or {}, NOW)


def news(before: Json, after: Json) -> list[tuple[str, str]]:
    return [(it.kind, it.reason) for it in of_status(before, after)]


def test_a_condition_with_another_reason_is_news() -> None:
    agent = an_agent(**BURST)
    starting = status_of(agent, a_world([pending(agent, 0)], burst=BurstFacts()))
    assert news({}, starting) == []
    image = a_world([pending(agent, 0, trouble="ErrImagePull: no")], burst=BurstFacts())
    failing = status_of(agent, image, starting)
    assert news(starting, failing) == [("Warning", "PodFailing")]
    (event,) = of_status(starting, failing)
    assert "desk-0: ErrImagePull: no. The pull is tried again" in event.message
    assert news(failing, failing) == []
    ready = status_of(agent, a_world([a_pod(agent, 0)], burst=DEPLOYED), failing)
    assert news(failing, ready) == [("Normal", "PodsReady"), ("Normal", "BurstDeployed")]
    again = status_of(
        agent,
        a_world([a_pod(agent, 0)], burst=replace(DEPLOYED, hash="new", snapshot="cpu")),
        ready,
    )
    (event,) = of_status(ready, again)
    assert event.message == "app app is deployed at Modal, and starts with snapshot cpu"
    off = status_of(an_agent(), a_world([a_pod(agent, 0)]), ready)
    assert news(ready, off) == [("Normal", "BurstStopped")]
    # Growth and its end is no news.
    more = status_of(
        agent, a_world([a_pod(agent, 0), pending(agent, 1)], {"desk-0": 4}, burst=DEPLOYED)
    )
    assert news(ready, more) == news(more, ready) == []


# --- no flood --------------------------------------------------------------------------------------------


def an_event(number: int = 0, reason: str = "PodFailing") -> Event:
    return Event(kind=Kind.WARNING, reason=reason, message="m", about=f"desk-{number}")


def test_what_comes_and_goes_is_told_once_in_a_while() -> None:
    first, memory = chosen([an_event(), an_event()], Memory(), NOW)
    assert len(first) == 1
    for later in (1.0, REPEAT_SECONDS - 1):
        again, memory = chosen([an_event()], memory, NOW + later)
        assert again == ()
    again, memory = chosen([an_event(1), an_event(reason="PodLost")], memory, NOW + 300)
    assert len(again) == 2
    again, memory = chosen([an_event()], memory, NOW + REPEAT_SECONDS)
    assert len(again) == 1


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.lists(st.integers(0, 500), max_size=40)), max_size=40)
)
def test_however_much_happens_events_are_few(moments: "list[tuple[float, list[int]]]") -> None:
    now, memory, count = NOW, Memory(), 0
    for passed, numbers in moments:
        now += passed
        out, memory = chosen([an_event(number) for number in numbers], memory, now)
        count += len(out)
        assert len(memory.told) <= AT_ONCE + REPEAT_SECONDS / REFILL_SECONDS + 1
    assert count <= AT_ONCE + (now - NOW) / REFILL_SECONDS + 1


# --- on a real API server --------------------------------------------------------------------------------


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> AsyncIterator[World]:
    async with operated(api, control_plane, namespace, tmp_path) as world:
        yield world


async def events_of(world: World, *reasons: str) -> list[Json]:
    """The agent's, once there is one of each of these reasons, sorted by reason."""
    path = f"/api/v1/namespaces/{world.namespace}/events"
    found = await world.api.wait_for(
        path,
        lambda them: set(reasons) <= {one["reason"] for one in them},
        fieldSelector=f"involvedObject.name={NAME}",
    )
    return sorted(found, key=lambda one: str(one["reason"]))


async def no_image(world: World) -> None:
    """The kubelet cannot pull the first pod's image."""
    waiting = {"reason": "ErrImagePull", "message": "registry.example/worker:1: not found"}
    state = {"name": "worker", "image": "i", "imageID": "", "restartCount": 0, "ready": False}
    containers = [{**state, "state": {"waiting": waiting}}]
    body = {"status": {"phase": "Pending", "containerStatuses": containers}}
    await world.api.patch(f"{world.pods}/{NAME}-0/status", body)


async def test_events_are_there_to_describe_the_agent_and_a_new_operator_repeats_none(
    world: World, tmp_path: Path
) -> None:
    async with world.charted({"watchNamespaces": [world.namespace]}, "rbac.yaml", "operator.yaml"):
        env = {"KUBECONFIG": str(await world.kubeconfig_of("trunkline-operator", tmp_path))}
        operator = await world.start(env=env)
        await world.apply()
        await world.pod_count(1)
        await no_image(world)
        await world.condition("WarmReady", "PodFailing")
        (event,) = await events_of(world, "PodFailing")
        agent = await world.api.get(world.agent_path)
        assert event["involvedObject"]["uid"] == agent["metadata"]["uid"]
        assert event["type"] == "Warning"
        assert "ErrImagePull: registry.example/worker:1: not found" in event["message"]

        operator.kill()
        links = world.gateway.links
        await world.start(env=env)
        await world.gateway.until(lambda it: it.links > links)
        await world.make_ready(f"{NAME}-0")
        await world.serve_calls(0)
        await world.agent(lambda it: is_true(it, "Ready"))
        await world.api.delete(f"{world.pods}/{NAME}-0", {"gracePeriodSeconds": 0})
        found = await events_of(world, "PodFailing", "PodsReady", "PodLost")
        assert [one["reason"] for one in found] == ["PodFailing", "PodLost", "PodsReady"]
    assert not [line for line in world.log if line["logger"] == "trunkline.events"]


async def test_without_the_right_to_tell_it_goes_on_and_complains_once(
    world: World, tmp_path: Path
) -> None:
    async with world.charted({"watchNamespaces": [world.namespace]}, "rbac.yaml", "operator.yaml"):
        role = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{world.namespace}/roles/trunkline-operator"
        rules = (await world.api.get(role))["rules"]
        kept = [rule for rule in rules if rule["resources"] != ["events"]]
        await world.api.patch(role, {"rules": kept})
        file = await world.kubeconfig_of("trunkline-operator", tmp_path)
        await world.start(env={"KUBECONFIG": str(file)})
        await world.apply()
        await world.pod_count(1)
        await no_image(world)
        await world.condition("WarmReady", "PodFailing")
        await world.make_ready(f"{NAME}-0")
        await world.condition("WarmReady", "PodsReady")
        refused = 'resource="events",status="403",verb="create"} 2.0'
        async with asyncio.timeout(20), httpx.AsyncClient(trust_env=False) as client:
            while refused not in (await client.get(f"{world.health}/metrics")).text:
                await asyncio.sleep(0.1)
    (line,) = [line for line in world.log if line["logger"] == "trunkline.events"]
    assert line["message"].startswith("Events cannot be posted: 403 Forbidden: ")
