"""The mirror of agents and pods: events, answers and lists in any order end in what the cluster holds."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from api_relay import ApiRelay, Request
from hypothesis import given
from hypothesis import strategies as st
from operator_rig import NAME, SPEC, agents_served

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api
from trunkline_operator.cluster import listed
from trunkline_operator.cluster.client import Cluster
from trunkline_operator.cluster.mirror import Mirror
from trunkline_operator.cluster.tidings import SOON_SECONDS, Tidings
from trunkline_runtime.contract import (
    ANNOTATION_DRAINING,
    FINALIZER,
    GROUP,
    LABEL_AGENT,
    PLURAL,
    VERSION,
)

Json = dict[str, Any]
KEY = f"ns/{NAME}"


def agent(version: int, uid: str = "a", generation: int = 1, **metadata: Any) -> Json:
    known = {"namespace": "ns", "name": NAME, "uid": uid, "generation": generation}
    return {"metadata": {**known, "resourceVersion": str(version), **metadata}, "spec": {}}


def pod(version: int, uid: str = "p", of: str = NAME, phase: str = "Pending", **more: Any) -> Json:
    known = {"namespace": "ns", "name": f"{NAME}-{uid}", "uid": uid, "labels": {LABEL_AGENT: of}}
    metadata = {**known, "resourceVersion": str(version), **more}
    return {"metadata": metadata, "status": {"phase": phase}}


@dataclass
class Told:
    """The agents that must be looked at."""

    agents: list[str] = field(default_factory=list)

    def __call__(self, key: str) -> None:
        self.agents.append(key)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
async def cluster(control_plane: ControlPlane) -> AsyncIterator[Cluster]:
    async with await Cluster.connect({"KUBECONFIG": str(control_plane.kubeconfig)}) as cluster:
        yield cluster


@pytest.fixture
def mirror(cluster: Cluster, told: Told) -> Mirror:
    return Mirror(cluster, told)


@pytest.fixture
def tidings(mirror: Mirror, namespace: str) -> Tidings:
    return Tidings(mirror, [namespace])


# --- events -------------------------------------------------------------------------------------------


async def test_only_what_is_newer_and_seen_by_a_look_makes_one(mirror: Mirror) -> None:
    assert mirror.hear_agent("ADDED", agent(5, managedFields=[{"manager": "m"}])) == KEY
    found = mirror.agent(KEY)
    assert found
    assert "managedFields" not in found["metadata"]
    assert mirror.hear_agent("MODIFIED", agent(4)) == ""
    assert mirror.hear_agent("MODIFIED", agent(5)) == ""
    assert mirror.hear_pod("ADDED", pod(6)) == KEY
    assert mirror.hear_pod("MODIFIED", pod(7)) == ""  # its facts are the same
    assert mirror.hear_pod("MODIFIED", pod(8, phase="Running")) == KEY
    assert mirror.hear_pod("DELETED", pod(9)) == KEY
    assert mirror.hear_pod("MODIFIED", pod(8)) == ""
    assert mirror.pods(KEY) == ()


async def test_only_what_is_known_is_passed_over(mirror: Mirror) -> None:
    assert not mirror.knows("ADDED", agent(4))
    assert mirror.hear_agent("ADDED", agent(4)) == KEY
    for version, known in ((3, True), (4, True), (5, False)):
        assert mirror.knows("MODIFIED", agent(version)) == known
        assert bool(mirror.hear_agent("MODIFIED", agent(version))) != known
    assert not mirror.knows(None, agent(5)), "a watch begins, so a list is due"
    assert not mirror.knows("DELETED", agent(5))
    assert mirror.hear_agent("DELETED", agent(5)) == KEY


async def test_an_agent_that_took_the_name_of_another_stays(mirror: Mirror) -> None:
    mirror.hear_agent("ADDED", agent(5))
    assert mirror.hear_agent("ADDED", agent(9, uid="b")) == KEY
    assert mirror.hear_agent("DELETED", agent(8)) == ""  # kopf tells of two objects in any order
    found = mirror.agent(KEY)
    assert found
    assert found["metadata"]["uid"] == "b"
    assert mirror.hear_agent("DELETED", agent(10, uid="b")) == KEY
    assert mirror.agents == []


async def test_a_pod_goes_with_its_label(mirror: Mirror, told: Told) -> None:
    mirror.hear_pod("ADDED", pod(5))
    assert mirror.hear_pod("MODIFIED", pod(6, of="other")) == "ns/other"
    assert told.agents == [KEY]
    assert mirror.pods(KEY) == ()
    assert [it.uid for it in mirror.pods("ns/other")] == ["p"]


# --- looks ----------------------------------------------------------------------------------------------


async def test_what_was_told_of_a_pod_before_its_end_makes_no_other_look(
    mirror: Mirror, told: Told
) -> None:
    """To delete a pod that has no node the API server writes twice: that it goes, and that it is gone."""
    mirror.hear_agent("ADDED", agent(5))
    mirror.hear_pod("ADDED", pod(6))
    mirror.hear_pod("ADDED", pod(6, uid="q"))
    with mirror.looking(KEY):
        assert mirror.hear_pod("MODIFIED", pod(7, deletionTimestamp="2026-01-01T00:00:00Z")) == ""
        mirror.ended_pod(pod(8))
    assert told.agents == []
    with mirror.looking(KEY):
        mirror.hear_pod("MODIFIED", pod(9, uid="q", phase="Running"))
        mirror.ended_pod(pod(8))
    assert told.agents == [KEY]  # another pod's news is none of its


async def test_what_was_told_of_an_agent_before_its_end_makes_no_other_look(
    mirror: Mirror, told: Told
) -> None:
    mirror.hear_agent("ADDED", agent(5))
    with mirror.looking(KEY):
        mirror.hear_agent("MODIFIED", agent(6, deletionTimestamp="2026-01-01T00:00:00Z"))
        mirror.wrote_agent(agent(7, deletionTimestamp="2026-01-01T00:00:00Z"), agent(5))
    assert told.agents == []
    with mirror.looking(KEY):
        mirror.hear_agent("ADDED", agent(8, uid="b"))
        mirror.wrote_agent(agent(7, deletionTimestamp="2026-01-01T00:00:00Z"), agent(5))
    assert told.agents == [KEY]  # another has its name by now


async def test_the_echo_of_a_look_makes_no_other_look(mirror: Mirror, told: Told) -> None:
    mirror.hear_agent("ADDED", agent(5))
    with mirror.looking(KEY):
        mirror.wrote_agent(agent(6), agent(5))  # the answer first
        assert mirror.hear_agent("MODIFIED", agent(6)) == ""
        assert mirror.hear_agent("MODIFIED", agent(7)) == ""  # the event first
        mirror.wrote_agent(agent(7), agent(5))
        assert mirror.hear_pod("ADDED", pod(8)) == ""
        mirror.made_pod(pod(8))
    assert mirror.hear_agent("MODIFIED", agent(7)) == ""
    assert told.agents == []


@pytest.mark.parametrize("kind", ["labels", "annotations"])
async def test_an_edit_that_our_write_has_met_makes_another_look(
    mirror: Mirror, told: Told, kind: str
) -> None:
    """Somebody wants a look, and the watch tells of it only after the answer."""
    edited: dict[str, Any] = {kind: {"look": "now"}}
    mirror.hear_agent("ADDED", agent(5))
    with mirror.looking(KEY):
        mirror.wrote_agent(agent(7, **edited), agent(5))
        assert mirror.hear_agent("MODIFIED", agent(6, **edited)) == ""
    assert told.agents == [KEY]


async def test_what_happens_during_a_look_makes_another(mirror: Mirror, told: Told) -> None:
    mirror.hear_agent("ADDED", agent(5))
    mirror.hear_pod("ADDED", pod(5))
    with mirror.looking(KEY):
        mirror.hear_agent("MODIFIED", agent(6))
    assert told.agents == [KEY]
    with mirror.looking(KEY):  # our write met another spec than was looked at
        mirror.wrote_agent(agent(7, generation=2), agent(5))
    assert told.agents == [KEY] * 2
    drained = pod(8, annotations={ANNOTATION_DRAINING: "2026-11-27T08:00:00Z"})
    with mirror.looking(KEY):
        mirror.marked_pod(drained)
    assert told.agents == [KEY] * 2
    with mirror.looking(KEY):  # it began to run meanwhile
        mirror.marked_pod({**drained, "metadata": {**drained["metadata"], "resourceVersion": "9"}})
        mirror.marked_pod(pod(10, phase="Running"))
    assert told.agents == [KEY] * 3


async def test_a_pod_that_was_asked_to_go_is_going_whatever_late_news_says(mirror: Mirror) -> None:
    mirror.hear_pod("ADDED", pod(5))
    mirror.asked_to_go("p")
    mirror.hear_pod("MODIFIED", pod(6, phase="Running"))
    (facts,) = mirror.pods(KEY)
    assert facts.terminating


async def test_what_a_watch_tells_of_a_pod_that_a_look_has_ended_makes_no_other(
    mirror: Mirror, told: Told
) -> None:
    going = pod(6, deletionTimestamp="2026-11-27T08:00:00Z", deletionGracePeriodSeconds=0)
    for early in (0, 1, 2):  # how much of it comes before the answer
        mirror = Mirror(mirror.cluster, told)
        mirror.hear_pod("ADDED", pod(5))
        heard = [("MODIFIED", going), ("DELETED", pod(7))]
        with mirror.looking(KEY):
            assert [mirror.hear_pod(*it) for it in heard[:early]] == [""] * early
            mirror.ended_pod(going)
            assert mirror.pods(KEY) == ()
        assert [mirror.hear_pod(*it) for it in heard[early:]] == [""] * (2 - early)
        assert told.agents == []
        assert mirror.pods(KEY) == ()


async def test_what_a_watch_tells_of_an_agent_that_a_look_has_let_go_makes_no_other(
    mirror: Mirror, told: Told
) -> None:
    leaving: Json = {"deletionTimestamp": "2026-11-27T08:00:00Z"}
    mirror.hear_agent("ADDED", agent(5))
    with mirror.looking(KEY):
        assert mirror.hear_agent("DELETED", agent(6, **leaving)) == ""  # before the answer
        mirror.wrote_agent(agent(5, **leaving), agent(5))
    assert told.agents == []
    mirror.hear_agent("ADDED", agent(7, uid="b"))
    with mirror.looking(KEY):
        assert mirror.hear_agent("DELETED", agent(8, uid="b")) == ""
    assert told.agents == [KEY]  # another let that one go


async def test_another_pod_that_goes_during_a_look_makes_another(
    mirror: Mirror, told: Told
) -> None:
    mirror.hear_pod("ADDED", pod(5))
    mirror.hear_pod("ADDED", pod(6, "q"))
    with mirror.looking(KEY):
        assert mirror.hear_pod("DELETED", pod(7, "q")) == ""
        mirror.ended_pod(pod(8))
    assert told.agents == [KEY]


async def test_a_pod_that_the_api_does_not_know_is_gone(mirror: Mirror, told: Told) -> None:
    mirror.hear_pod("ADDED", pod(5))
    mirror.missing("p")
    mirror.missing("p")
    assert mirror.pods(KEY) == ()
    assert told.agents == [KEY]
    assert mirror.hear_pod("ADDED", pod(5)) == KEY  # which was wrong


async def test_the_last_write_to_an_agent_is_its_end(mirror: Mirror) -> None:
    mirror.hear_agent("ADDED", agent(5, finalizers=[FINALIZER, "x/y"]))
    leaving: Json = {"deletionTimestamp": "2026-11-27T08:00:00Z"}
    mirror.wrote_agent(agent(6, finalizers=["x/y"], **leaving), agent(5))
    assert mirror.agents == [KEY]
    mirror.wrote_agent(agent(7, **leaving), agent(5))
    assert mirror.agents == []
    assert mirror.hear_agent("MODIFIED", agent(6, **leaving)) == ""
    assert mirror.agents == []


async def test_pods_outlive_an_agent_that_a_later_list_does_not_have(
    mirror: Mirror, told: Told
) -> None:
    def owned(version: int, uid: str, by: str) -> Json:
        owner = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "VoiceAgent", "uid": by}
        return pod(version, uid, ownerReferences=[{**owner, "controller": True}])

    mirror.hear_pod("ADDED", owned(5, "p", by="a"))
    owners = mirror.owners("ns")
    # Its agent was made after the list, and nothing has told of it yet.
    mirror.hear_pod("ADDED", owned(9, "q", by="b"))
    mirror.only_agents("ns", set(), 8, owners)
    assert [orphan.uid for orphan in mirror.orphans(KEY)] == ["p"]
    assert told.agents == [KEY]
    mirror.asked_to_go("p")
    assert mirror.orphans(KEY) == ()


# --- any order --------------------------------------------------------------------------------------------


@given(st.data())
def test_news_that_is_late_or_comes_twice_changes_nothing(data: st.DataObject) -> None:
    """Of each pod its history, told in order by a watch, and in any order by answers beside it."""
    mirror = Mirror(None, Told())  # type: ignore[arg-type]  # nothing is asked
    left = set()
    for uid in "pqr":
        length = data.draw(st.integers(1, 4))
        history = [
            pod(10 * n, uid, phase=data.draw(st.sampled_from(["Pending", "Running"])))
            for n in range(1, length + 1)
        ]
        deleted = data.draw(st.booleans())
        watch = [("MODIFIED", it) for it in history] + [("DELETED", history[-1])] * deleted
        answers: list[Json] = data.draw(st.lists(st.sampled_from(history)))
        for kind, obj in watch:
            early = data.draw(st.booleans())
            if answers and early:
                mirror.made_pod(answers.pop())
            mirror.hear_pod(kind, obj)
        for late in answers:
            mirror.made_pod(late)
        if not deleted:
            left.add((uid, history[-1]["status"]["phase"]))
    assert {(it.uid, it.phase.value) for it in mirror.pods(KEY)} == left


# --- lists ------------------------------------------------------------------------------------------------


async def test_a_list_brings_what_a_lost_watch_missed(
    api: Api, mirror: Mirror, tidings: Tidings, told: Told, namespace: str
) -> None:
    await agents_served(api, namespace)
    pods = f"/api/v1/namespaces/{namespace}/pods"
    agents = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}"
    body = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "VoiceAgent",
        "metadata": {"name": NAME},
        "spec": SPEC,
    }
    labels = {LABEL_AGENT: NAME}
    spec = {"containers": [{"name": "c", "image": "i"}]}
    await api.apply(f"{agents}/{NAME}", body)
    await api.create(pods, {"metadata": {"name": "one", "labels": labels}, "spec": spec})
    await api.create(pods, {"metadata": {"name": "stranger"}, "spec": spec})
    key = f"{namespace}/{NAME}"
    async with asyncio.timeout(20):
        async with tidings.kept():
            assert mirror.agents == [key]
            assert [it.name for it in mirror.pods(key)] == ["one"]
            assert set(told.agents) == {key}
            told.agents.clear()
            await tidings.list()
            assert told.agents == []  # nothing is new
            await api.delete(f"{pods}/one")
            await api.delete(f"{agents}/{NAME}")
            await tidings.list()
            assert set(told.agents) == {key}
            assert (mirror.agents, mirror.pods(key)) == ([], ())


async def test_a_watch_of_agents_that_begins_anew_makes_a_list(
    api: Api, namespace: str, told: Told, tmp_path: Path
) -> None:
    """kopf's does not tell what was deleted while there was none."""
    agents = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}"
    await agents_served(api, namespace)
    async with (
        ApiRelay(api).serving() as relay,
        await Cluster.connect({"KUBECONFIG": str(relay.kubeconfig(tmp_path))}) as cluster,
    ):

        def listed(relay: ApiRelay) -> int:
            return sum(it.path == agents for it in relay.seen)

        mirror = Mirror(cluster, told)
        async with Tidings(mirror, [namespace]).kept():
            gone = agent(1)
            gone["metadata"]["namespace"] = namespace
            # At first and after 1 s; and the next would be after 2 and then 4 s.
            await relay.until(lambda it: listed(it) == 3)
            mirror.hear_agent(None, gone)
            await relay.until(lambda it: listed(it) == 4, 3 * SOON_SECONDS)
            async with asyncio.timeout(SOON_SECONDS):
                while mirror.agents:  # its list is being read
                    await asyncio.sleep(0.01)


async def test_pods_that_come_and_go_are_told_without_a_list(
    api: Api, namespace: str, told: Told, tmp_path: Path
) -> None:
    """Only of agents that are there: others have nobody to look at them."""
    key, unknown = f"{namespace}/{NAME}", f"{namespace}/unknown"
    pods = f"/api/v1/namespaces/{namespace}/pods"
    spec = {"containers": [{"name": "c", "image": "i"}]}

    async def refuse(_: Request) -> web.Response:
        return web.json_response({"reason": "Forbidden"}, status=403)

    async def happens(mirror: Mirror, of: str, count: int, agents: list[str]) -> None:
        async with asyncio.timeout(20):
            while len(mirror.pods(of)) != count or told.agents != agents:
                await asyncio.sleep(0.005)
        told.agents.clear()

    async with (
        ApiRelay(api).serving() as relay,
        await Cluster.connect({"KUBECONFIG": str(relay.kubeconfig(tmp_path))}) as cluster,
    ):
        mirror = Mirror(cluster, told)
        async with Tidings(mirror, [namespace]).kept():
            relay.before = refuse  # who lists after the first
            here = agent(1)
            here["metadata"]["namespace"] = namespace
            mirror.hear_agent("ADDED", here)
            for name in NAME, "unknown":
                metadata = {"name": name, "labels": {LABEL_AGENT: name}}
                await api.create(pods, {"metadata": metadata, "spec": spec})
            await happens(mirror, unknown, 1, [key])
            await api.delete(f"{pods}/unknown")
            await api.delete(f"{pods}/{NAME}")
            await happens(mirror, key, 0, [key, key])  # it is to go, and is gone
            assert mirror.pods(unknown) == ()


async def test_a_list_of_nodes_brings_what_a_lost_watch_missed(
    api: Api, mirror: Mirror, tidings: Tidings, told: Told, namespace: str
) -> None:
    name = f"node-of-{namespace}"
    mirror.hear_agent("ADDED", agent(5))
    mirror.hear_pod("ADDED", {**pod(6), "spec": {"nodeName": name}})
    await api.create("/api/v1/nodes", {"metadata": {"name": name}, "spec": {"unschedulable": True}})
    try:
        version = await tidings._list_nodes()
        assert version > 0
        assert told.agents == [KEY]
        assert mirror.pods(KEY)[0].node_leaving == "it is cordoned"
        await tidings._list_nodes()
        assert told.agents == [KEY]  # nothing is new
    finally:
        await api.delete(f"/api/v1/nodes/{name}")
    await tidings._list_nodes()
    assert told.agents == [KEY] * 2
    assert mirror.pods(KEY)[0].node_leaving == ""


async def test_a_list_leaves_what_is_newer_than_it(
    api: Api, mirror: Mirror, tidings: Tidings, namespace: str
) -> None:
    """An event of a pod that was made while the list was on its way."""
    await agents_served(api, namespace)
    key = f"{namespace}/{NAME}"
    newer = pod(2**60)
    newer["metadata"]["namespace"] = namespace
    mirror.hear_pod("ADDED", newer)
    await tidings.list()
    assert [it.uid for it in mirror.pods(key)] == ["p"]


async def test_pages_are_one_list(cluster: Cluster, api: Api, namespace: str) -> None:
    secrets = f"/api/v1/namespaces/{namespace}/secrets"
    for number in range(5):
        await api.create(secrets, {"metadata": {"name": f"s{number}", "labels": {"x": "y"}}})
    await api.create(secrets, {"metadata": {"name": "other"}})
    found = [page async for page in cluster.pages(secrets, listed.pods, 2, "x")]
    assert [len(page.items) for page in found] == [2, 2, 1]
    assert len({page.version for page in found}) == 1
