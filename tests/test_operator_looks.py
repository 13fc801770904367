"""A look at an agent costs a few requests, and a change of its route costs writing all routes: neither without need."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from api_relay import ApiRelay, Request
from node_cast import NODES
from operator_cast import played
from operator_rig import NAME, SPEC, World, operated, stranger_of
from operator_ward import WATCHES

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, is_true
from trunkline_operator.cluster.tidings import PAGE
from trunkline_operator.decisions.world import Phase, PodFacts
from trunkline_operator.gateways.fleet import COALESCE_SECONDS, LONGEST_COALESCE_SECONDS, push_delay
from trunkline_operator.handlers import LISTED_AT_ONCE
from trunkline_operator.observing import OWN_SECONDS, SECRETS_SECONDS, TOUCHED_SECONDS, own_lasts

EDITS = 10
ONE_POD: dict[str, Any] = {**SPEC, "warm": {"minPods": 1, "maxPods": 1, "gpu": {"count": 0}}}
LOOKS = "trunkline_operator_reconcile_seconds_count"


@pytest.fixture
async def relay(api: Api) -> AsyncIterator[ApiRelay]:
    async with ApiRelay(api).serving() as relay:
        yield relay


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> AsyncIterator[World]:
    async with operated(api, control_plane, namespace, tmp_path) as world, played(world):
        yield world


async def test_what_a_look_has_written_makes_no_other_look(world: World, relay: ApiRelay) -> None:
    await world.start(env={"KUBECONFIG": str(relay.kubeconfig(world.logs))})
    await world.apply()
    await world.agent(lambda it: is_true(it, "Ready"))
    relay.forget()
    before = await looks(world)
    for number in range(EDITS):
        told = relay.told[world.agents]
        await world.apply({**SPEC, "session": {"idleSeconds": 60 + number}})
        # The edit, and the status that it led to.
        await relay.until(lambda it, told=told: it.told[world.agents] >= told + 2)  # type: ignore[misc]
    assert EDITS <= await looks(world) - before <= EDITS + 1


async def test_a_look_reads_nothing_that_is_watched(world: World, relay: ApiRelay) -> None:
    await world.start(env={"KUBECONFIG": str(relay.kubeconfig(world.logs))})
    await relay.until(lambda it: sum(it.watches.values()) == WATCHES)
    relay.forget()
    await world.apply()
    await world.agent(lambda it: is_true(it, "Ready"))
    await world.api.delete(world.agent_path)
    await world.gateway.until(lambda it: it.routes == {})
    await relay.until(lambda it: bool(it.written("DELETE", world.pods)))
    # Every list is the mirror's own, page by page and now and then.
    read = [it for it in relay.seen if not it.writes and it.path not in (world.agents, world.pods)]
    assert read == []
    made = [(it.method, it.path.removeprefix(world.agent_path)) for it in relay.seen if it.writes]
    secret, pod, status = made[:3]
    assert secret == ("POST", world.secrets)
    assert pod == ("POST", world.pods)
    assert status == ("PATCH", "/status")
    assert [path for method, path in made if method == "DELETE"] == [f"{world.pods}/{NAME}-0"]


async def test_what_is_there_when_watches_begin_is_listed_page_by_page(
    world: World, relay: ApiRelay
) -> None:
    """Of 1,000 pods in one piece 80 MB of objects are made, of which none is needed."""
    await world.start(env={"KUBECONFIG": str(relay.kubeconfig(world.logs))})
    await relay.until(lambda it: sum(it.watches.values()) == WATCHES)
    limits = {it.path: it.limit for it in relay.seen if it.path in (world.pods, NODES)}
    assert limits == {world.pods: PAGE, NODES: PAGE}
    # The mirror's lists, and kopf's.
    assert {it.limit for it in relay.seen if it.path == world.agents} == {PAGE, LISTED_AT_ONCE}


@pytest.fixture
async def no_node(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> AsyncIterator[World]:
    """A world whose pods get no node, so that a deleted one is gone at once."""
    async with operated(api, control_plane, namespace, tmp_path) as world:
        yield world


async def test_a_pod_that_has_no_node_is_replaced_by_three_writes(
    no_node: World, relay: ApiRelay
) -> None:
    world = no_node
    await world.start(env={"KUBECONFIG": str(relay.kubeconfig(world.logs))})
    await world.apply(ONE_POD)
    await world.agent(lambda it: (it.get("status") or {}).get("replicas") == 1)
    told = relay.told[world.pods]
    relay.forget()
    await world.apply({**ONE_POD, "warm": {**ONE_POD["warm"], "image": "trunkline/worker:next"}})
    await world.agent(lambda it: it["status"]["observedGeneration"] == 2)
    # The old pod that goes and is gone, the new one, and one by which all of that has been heard.
    await world.api.create(world.pods, stranger_of(NAME))
    await relay.until(lambda it: it.told[world.pods] >= told + 4)
    made = [(it.method, it.path) for it in relay.seen if it.writes]
    assert made == [
        ("DELETE", f"{world.pods}/{NAME}-0"),
        ("POST", world.pods),
        ("PATCH", f"{world.agent_path}/status"),
    ]


async def test_an_agent_goes_without_a_watch_that_tells_of_its_pods_end(
    no_node: World, relay: ApiRelay
) -> None:
    """The API's answer to the delete says that the pod is gone, as it had no node."""
    world = no_node
    world.kept = True
    await world.start(env={"KUBECONFIG": str(relay.kubeconfig(world.logs))})
    await world.apply(ONE_POD)
    await world.agent(lambda it: (it.get("status") or {}).get("replicas") == 1)

    async def deaf_from_now_on(request: Request) -> None:
        relay.muted |= request.method == "DELETE"

    # A watch may tell of the status before the operator's own request is answered.
    await relay.until(lambda it: bool(it.written("PATCH", f"{world.agent_path}/status")))
    relay.forget()
    relay.before = deaf_from_now_on
    await world.api.delete(world.agent_path)
    await relay.until(
        lambda it: world.agent_path in it.written("PATCH", world.agent_path), seconds=10
    )
    made = [(it.method, it.path) for it in relay.seen]
    assert made == [("DELETE", f"{world.pods}/{NAME}-0"), ("PATCH", world.agent_path)]
    assert await world.api.list(world.agents) == []


async def test_no_pod_is_made_before_its_secret(no_node: World, relay: ApiRelay) -> None:
    world, left = no_node, iter(range(2))

    async def refuse(request: Request) -> web.Response | None:
        if (request.method, request.path) == ("POST", world.secrets) and next(
            left, None
        ) is not None:
            return web.json_response({"status": "Failure", "message": "by the test"}, status=403)
        return None

    relay.before = refuse
    await world.start(env={"KUBECONFIG": str(relay.kubeconfig(world.logs))})
    await world.apply(ONE_POD)
    await world.agent(lambda it: (it.get("status") or {}).get("replicas") == 1)
    made = [it.path for it in relay.seen if it.method == "POST"]
    made = [path for path in made if path in (world.secrets, world.pods)]
    assert made == [world.secrets] * 3 + [world.pods]


async def looks(world: World) -> float:
    """How many were taken."""
    async with httpx.AsyncClient(trust_env=False) as client:
        lines = (await client.get(f"{world.health}/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(LOOKS))


def test_the_own_secret_is_read_seldom_but_where_a_pod_may_miss_it() -> None:
    pod = PodFacts(name="desk-0", uid="u", owner="o", phase=Phase.PENDING)
    at_rest: list[list[PodFacts]] = [[], [pod], [replace(pod, node="n", ready=True)]]
    assert {own_lasts(pods, touched=False) for pods in at_rest} == {OWN_SECONDS}
    assert {own_lasts(pods, touched=True) for pods in at_rest} == {TOUCHED_SECONDS}
    assert own_lasts([pod, replace(pod, node="n")], touched=False) == SECRETS_SECONDS
    assert own_lasts([replace(pod, node="n")], touched=True, leaving=True) == math.inf


async def test_an_edit_of_the_spec_makes_no_look_but_its_own_and_a_label_has_the_secret_read(
    no_node: World, relay: ApiRelay
) -> None:
    world = no_node
    own = f"{world.secrets}/{NAME}-trunkline"

    def reads() -> int:
        return [it.path for it in relay.seen if it.method == "GET"].count(own)

    await world.start(env={"KUBECONFIG": str(relay.kubeconfig(world.logs))})
    await world.apply(ONE_POD)
    await world.agent(lambda it: (it.get("status") or {}).get("replicas") == 1)
    began = time.monotonic()
    await world.api.patch(world.agent_path, {"spec": {"slo": {"admissionMs": 400}}})
    await world.agent(lambda it: it["status"]["observedGeneration"] == it["metadata"]["generation"])
    await asyncio.sleep(SECRETS_SECONDS + 2 - (time.monotonic() - began))
    assert reads() == 0
    await world.api.patch(world.agent_path, {"metadata": {"labels": {"look": "now"}}})
    await relay.until(lambda _: reads() == 1)


def test_writing_all_routes_takes_a_twentieth_of_the_time_at_most() -> None:
    assert push_delay(since=60, writing=0.0001) == COALESCE_SECONDS
    assert push_delay(since=0, writing=0.0001) == COALESCE_SECONDS
    assert push_delay(since=0.02, writing=0.005) == pytest.approx(0.08)
    assert push_delay(since=0.02, writing=3) == LONGEST_COALESCE_SECONDS


async def test_nothing_is_told_of_an_agent_that_is_gone(world: World, relay: ApiRelay) -> None:
    await world.start(env={"KUBECONFIG": str(relay.kubeconfig(world.logs))})
    await world.apply()
    await world.agent(lambda it: is_true(it, "Ready"))
    await world.gateway.until(lambda it: world.key in it.routes)
    relay.forget()
    await world.api.delete(world.agent_path)
    await world.gateway.until(lambda it: it.routes == {})
    assert [str(it) for it, status in relay.answered if it.writes and status == 404] == []
    assert not await world.api.list(world.agents)
