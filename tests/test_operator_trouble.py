"""An API server in trouble, and agents that make trouble: the operator goes on, waits between tries, and leaves others alone."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from api_relay import ApiRelay, Request
from operator_cast import played
from operator_rig import NAME, NO_ACCOUNT, SPEC, World, operated
from operator_ward import WATCHES

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, is_true
from trunkline_runtime.contract import GROUP, LABEL_AGENT, VERSION

Json = dict[str, Any]

TRIES_IN_AN_OUTAGE = 60
TRIES_A_SECOND = 15


@pytest.fixture
async def relay(api: Api) -> AsyncIterator[ApiRelay]:
    async with ApiRelay(api).serving() as relay:
        yield relay


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path, relay: ApiRelay
) -> AsyncIterator[World]:
    """One whose operator reaches the API server through the relay."""
    async with operated(api, control_plane, namespace, tmp_path) as world, played(world):
        await world.start(env={"KUBECONFIG": str(relay.kubeconfig(tmp_path))})
        await relay.until(lambda it: sum(it.watches.values()) == WATCHES)
        yield world


async def another(world: World, name: str = "other") -> None:
    """A second agent gets its pod."""
    body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "VoiceAgent", "metadata": {"name": name}}
    await world.api.create(world.agents, {**body, "spec": SPEC})
    await world.api.wait_for(
        world.pods, lambda it: len(it) == 1, labelSelector=f"{LABEL_AGENT}={name}"
    )


def refusal(status: int, reason: str, message: str = "by the test", **more: str) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "code": status, "reason": reason}
    return web.json_response({**body, "message": message}, status=status, headers=more)


# --- the API server -----------------------------------------------------------------------------------------


async def test_throttled_it_waits_as_it_is_told_and_comes_through(
    world: World, relay: ApiRelay
) -> None:
    left = iter(range(3))

    async def before(request: Request) -> web.Response | None:
        if request.writes and next(left, None) is not None:
            return refusal(429, "TooManyRequests", **{"Retry-After": "1"})
        return None

    relay.before = before
    relay.forget()
    began = time.monotonic()
    await world.apply()
    await world.agent(lambda it: is_true(it, "Ready"))
    assert time.monotonic() - began >= 3
    assert next(left, None) is None
    # 3 that were refused; Secret, pod; and statuses.
    assert len([it for it in relay.seen if it.writes]) <= 3 + 2 + 4


async def test_an_agent_that_others_change_at_the_same_moment_is_read_again(
    world: World, relay: ApiRelay
) -> None:
    """Who adds the finalizer must not take away another's."""
    times = iter(range(2))

    async def before(request: Request) -> web.Response | None:
        if request.method == "PATCH" and request.path == world.agent_path:
            for number in itertools.islice(times, 1):
                note = {"annotations": {"note": str(number)}, "finalizers": ["x.y/mine"]}
                await world.api.patch(world.agent_path, {"metadata": note})
        return None

    relay.before = before
    await world.apply({**SPEC, "burst": NO_ACCOUNT})
    agent = await world.agent(lambda it: is_true(it, "WarmReady"))
    assert len(agent["metadata"]["finalizers"]) == 2
    conflicts = [it for it, status in relay.answered if status == 409]
    assert len(conflicts) == 2
    await world.api.patch(world.agent_path, {"metadata": {"finalizers": None}})


async def test_an_api_server_that_restarts_is_waited_for_and_nothing_is_missed(
    world: World, relay: ApiRelay
) -> None:
    await world.apply()
    await world.agent(lambda it: is_true(it, "Ready"))
    relay.away()
    await relay.until(lambda it: sum(it.watches.values()) == 0)
    await world.apply({**SPEC, "warm": {**SPEC["warm"], "minPods": 2}})
    await world.api.delete(f"{world.pods}/{NAME}-0", {"gracePeriodSeconds": 0})
    tried, began = len(relay.seen), time.monotonic()
    # The outage lasts for so many tries: who hammers has made them in a moment.
    await relay.until(lambda it: len(it.seen) - tried >= TRIES_IN_AN_OUTAGE)
    assert time.monotonic() - began > TRIES_IN_AN_OUTAGE / TRIES_A_SECOND
    relay.back()
    pods = await world.pod_count(2)
    assert {pod["metadata"]["name"] for pod in pods} == {f"{NAME}-0", f"{NAME}-1"}
    await world.agent(lambda it: (it.get("status") or {}).get("readyReplicas") == 2)


async def test_a_watch_whose_version_is_forgotten_begins_anew(
    world: World, relay: ApiRelay
) -> None:
    await world.apply()
    await world.agent(lambda it: is_true(it, "Ready"))
    gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
    await relay.say({"type": "ERROR", "object": gone})
    await world.apply({**SPEC, "warm": {**SPEC["warm"], "minPods": 2}})
    await world.pod_count(2)
    await relay.until(lambda it: sum(it.watches.values()) == WATCHES)


async def test_what_a_silent_watch_keeps_back_is_known_by_the_next_list(
    world: World, relay: ApiRelay
) -> None:
    await world.apply()
    await world.agent(lambda it: is_true(it, "Ready"))
    relay.muted = True
    await world.api.delete(f"{world.pods}/{NAME}-0", {"gracePeriodSeconds": 0})
    made = await world.api.wait_for(
        world.pods, lambda it: len(it) == 1, 45, labelSelector=f"{LABEL_AGENT}={NAME}"
    )
    assert made[0]["metadata"]["name"] == f"{NAME}-0"


# --- agents and others ----------------------------------------------------------------------------------------


async def test_an_agent_that_is_edited_all_the_time_is_no_hot_loop_and_others_are_unaffected(
    world: World, relay: ApiRelay
) -> None:
    await world.apply()
    await world.agent(lambda it: is_true(it, "Ready"))
    relay.forget()
    began = time.monotonic()

    async def edit() -> None:
        for number in range(60):
            await world.api.patch(
                world.agent_path, {"spec": {"session": {"idleSeconds": 60 + number}}}
            )
            await asyncio.sleep(0.05)

    editing = asyncio.create_task(edit())
    await another(world)
    assert not editing.done()
    await editing
    agent = await world.agent(
        lambda it: it["status"]["observedGeneration"] == it["metadata"]["generation"]
    )
    assert agent["spec"]["session"]["idleSeconds"] == 119
    told = [it for it in relay.seen if it.path == f"{world.agent_path}/status"]
    # One look each 100 ms at most, and each tells its generation once.
    assert len(told) <= 10 * (time.monotonic() - began) + 5
    await world.gateway.until(lambda it: it.routes[world.key]["settings"]["idleSeconds"] == 119)


async def test_in_a_namespace_that_ends_it_says_so_and_does_not_hammer(
    world: World, relay: ApiRelay
) -> None:
    """Nobody collects what is in it here, so it stays Terminating."""
    await world.apply()
    await world.agent(lambda it: is_true(it, "Ready"))
    await world.api.delete(f"/api/v1/namespaces/{world.namespace}")
    relay.forget()
    began = time.monotonic()
    await world.api.delete(f"{world.pods}/{NAME}-0", {"gracePeriodSeconds": 0})
    told = await world.condition("WarmReady", "PodsRefused")
    assert "because it is being terminated" in told["message"]
    await relay.until(lambda it: len(posts(it)) >= 3)
    assert len(posts(relay)) <= 3 + 2 * (time.monotonic() - began)
    # And what holds the namespace up is let go.
    await world.api.delete(world.agent_path)
    await world.api.wait_gone(world.agent_path)


def posts(relay: ApiRelay) -> list[Request]:
    return [it for it in relay.seen if it.method == "POST" and it.path.endswith("/pods")]


async def test_pods_of_others_are_neither_listed_nor_watched(world: World, relay: ApiRelay) -> None:
    """Not a byte of them reaches an operator that has restarted, so it is the same to it whether there are
    200 or 10,000; with 10,000 it is measured by bench/reconcile.py.
    """
    spec = {"containers": [{"name": "c", "image": "i"}]}
    async with asyncio.TaskGroup() as group:
        for number in range(200):
            stranger = {"metadata": {"name": f"stranger-{number}"}, "spec": spec}
            group.create_task(world.api.create(world.pods, stranger))
    world.processes[-1].kill()
    await relay.until(lambda it: sum(it.watches.values()) == 0)
    relay.forget()
    events = relay.told.get(world.pods, 0)
    await world.start(env={"KUBECONFIG": str(relay.kubeconfig(world.logs))})
    await relay.until(lambda it: sum(it.watches.values()) == WATCHES)
    await another(world, "new")
    asked = [it for it in [*relay.seen, *relay.watched] if it.path == world.pods and not it.writes]
    assert {it.selector for it in asked} == {LABEL_AGENT}
    assert len(asked) < 10  # a list now and then, each of one page
    assert relay.told.get(world.pods, 0) - events < 10
    # One pod is 4 KB here, and 200 of others would be 100 KB in each list.
    assert relay.read[world.pods] < 50_000
