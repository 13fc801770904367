"""Trouble at Modal as people read it: a condition and an event, and calls that go on."""

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from burst_rig import GOOD, PATIENCE, PROXY, answered, call, joined, session, until
from operator_rig import SPEC, Json, World, operated

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, condition
from trunkline_dev.modal.faults import Fault, Rule
from trunkline_dev.modal.server import LocalModal

MODAL: Final = {
    "credentialsSecretRef": {"name": "modal"},
    "gpu": [],
    "snapshot": "none",
    "regions": ["us-east", "eu-west"],
    "slotsPerContainer": 2,
}


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path, modal: LocalModal
) -> AsyncIterator[World]:
    async with operated(api, control_plane, namespace, tmp_path) as world:
        await joined(world, modal)
        yield world


async def told(world: World, reason: str, words: str) -> str:
    """BurstReady says so, and an Event of that reason has been told. Returns the message."""

    def holds(agent: Json) -> bool:
        found = condition(agent, "BurstReady")
        return found.get("reason") == reason and words in found.get("message", "")

    message = str(condition(await world.agent(holds, 40), "BurstReady")["message"])
    events = f"/api/v1/namespaces/{world.namespace}/events"

    def tells(found: list[Json]) -> bool:
        return any(event["reason"] == reason for event in found)  # the same again is told once

    await world.api.wait_for(events, tells)
    return message


async def test_whatever_fails_at_modal_is_told_and_the_call_that_is_there_goes_on(
    world: World, modal: LocalModal
) -> None:
    await world.start()
    await world.apply({**SPEC, "burst": {"modal": MODAL}})
    await world.condition("BurstReady", "BurstReady")
    urls = (await world.api.get(world.agent_path))["status"]["burst"]["regions"]
    assert [one["name"] for one in urls] == ["us-east", "eu-west"]
    near = urls[0]["url"]
    ticket = await the_ticket_key(world)
    async with call(near, await session(near), key=ticket, agent=world.key) as link:
        await answered(link)

        # Gateways pass a region over: the others take calls, and the agent stays ready for them.
        await world.serve_calls(0, shut={"burst/us-east": "open"}, burst=1)
        message = await told(world, "RegionDown", "us-east is passed over")
        assert "takes calls in eu-west" in message
        # All of them.
        await world.serve_calls(0, shut={"burst/us-east": "open", "burst/eu-west": "open"})
        await told(world, "BurstFailing", "each call that finds no warm slot tries again")
        # A quota, a proxy token that is no good any more: gateways' own words.
        for why in (
            "has reached a limit of the workspace (HTTP 429)",
            "does not know the proxy token",
        ):
            await world.serve_calls(0, burstError=f"Modal in us-east {why}")
            await told(world, "BurstFailing", why)
        await world.serve_calls(0)
        await world.condition("BurstReady", "BurstReady")

        # The API token revoked, then Modal's API away: what is deployed goes on, and it is said.
        await modal.inject(Rule(fault=Fault.TOKEN_REVOKED, name=GOOD.token_id))
        await world.apply({**SPEC, "burst": {"modal": {**MODAL, "slotsPerContainer": 3}}})
        message = await told(world, "BurstFailing", "CredentialsRefused")
        assert "the last deployment goes on" in message
        await modal.inject(Rule(fault=Fault.CONTROL_PLANE_DOWN))
        await world.apply({**SPEC, "burst": {"modal": {**MODAL, "slotsPerContainer": 4}}})
        await told(world, "BurstFailing", "ModalUnreachable")
        assert await session(near), "sessions do not need the API"
        route: Any = world.gateway.routes[world.key]
        assert [rung["kind"] for rung in route["rungs"]] == ["warm", "burst", "burst"]
        await link.ping()
        assert link.close_code is None

        await modal.inject()
        await world.condition("BurstReady", "BurstReady", 60)
        await until(lambda: next(iter(modal.state.apps.values())).version == 2)
        await link.ping()
        assert link.close_code is None


async def the_ticket_key(world: World) -> str:
    secret = await world.api.get(f"{world.secrets}/front-desk-trunkline")
    return base64.b64decode(secret["data"]["ticket-key"]).decode()


async def test_more_containers_stand_by_while_warm_slots_run_short(
    world: World, modal: LocalModal
) -> None:
    await world.start()
    await world.one_ready_pod()
    await world.apply({**SPEC, "burst": {"modal": {**MODAL, "maxContainers": 4}}})
    await world.condition("BurstReady", "BurstReady")
    servers = {record.name: record for record in modal.state.servers.values()}
    near, far = servers["worker-us-east"], servers["worker-eu-west"]
    # Nothing stands by at rest, as the agent asks for.
    await until(lambda: near.overrides.max_containers == 4)
    assert near.settings().min_containers == 0
    (app,) = modal.state.apps.values()
    version, arrivals = app.version, 0
    # All warm slots are taken, more callers come each moment, and some have gone to burst already.
    async with asyncio.timeout(30):
        while near.settings().min_containers < 3:
            arrivals += 1
            await world.serve_calls(4, arrivals=4 + arrivals, burst=arrivals)
            await asyncio.sleep(0.1)  # the pace of the callers
    assert near.settings().buffer_containers > 0
    assert near.settings().min_containers <= 4
    assert far.settings().min_containers == 0
    assert app.version == version


async def test_at_the_cap_of_its_budget_no_container_stands_by_until_there_is_room_again(
    world: World, modal: LocalModal
) -> None:
    """On a live server, at the prices that come with Trunkline: $0.08 for a container's hour."""
    await world.start()
    standing = {"minContainers": 1, "bufferContainers": 1, "maxContainers": 4}
    budget = {"budget": {"perHour": 0.5}}
    await world.apply({**SPEC, "burst": {"modal": {**MODAL, **standing, **budget}}})
    await world.condition("BurstReady", "BurstReady")
    await world.serve_calls()
    near = next(each for each in modal.state.servers.values() if each.name == "worker-us-east")
    await until(lambda: near.settings().min_containers == 1)
    assert near.settings().buffer_containers == 1
    await world.condition("WithinBudget", "WithinBudget")
    (app,) = modal.state.apps.values()
    version, starts, reason = app.version, 0, ""
    # Callers come, and what their calls may cost at worst is all that the hour has.
    async with asyncio.timeout(30):
        while near.settings().min_containers or reason != "BudgetSpent":
            starts += 16  # each may have a container of its own, until Modal has counted them
            spend = {"spent": 0.0, "reserved": 10.0, "ceiling": 10.0, "starts": starts}
            await world.serve_calls(burst=8, spend=spend)
            await asyncio.sleep(0.1)  # the pace of the callers
            reason = condition(await world.api.get(world.agent_path), "WithinBudget")["reason"]
    assert (near.settings().min_containers, near.settings().buffer_containers) == (0, 0)
    assert near.settings().max_containers == 4
    # They end early, and the rest of what was reserved is there again.
    over = {"spent": 0.01, "reserved": 0.0, "ceiling": 10.0, "starts": starts}
    await world.serve_calls(spend=over)
    await until(lambda: near.settings().min_containers == 1)
    assert near.settings().buffer_containers == 1
    await world.condition("WithinBudget", "WithinBudget")
    assert app.version == version


async def test_no_more_stands_by_than_ran_when_modal_refused_for_a_limit(
    world: World, modal: LocalModal
) -> None:
    await world.start()
    await world.one_ready_pod()
    await world.apply({**SPEC, "burst": {"modal": {**MODAL, "maxContainers": 4}}})
    await world.condition("BurstReady", "BurstReady")
    near = next(each for each in modal.state.servers.values() if each.name == "worker-us-east")
    url = (await world.api.get(world.agent_path))["status"]["burst"]["regions"][0]["url"]
    # Three calls in two containers, and that is all that the workspace has.
    for _ in range(3):
        await session(url)
    assert len(modal.boots) == 2
    none = Rule(fault=Fault.NO_CAPACITY), Rule(fault=Fault.SESSION_REFUSED, status="429")
    await modal.inject(*none)
    arrivals = 0

    async def rush(**more: Any) -> None:
        nonlocal arrivals
        arrivals += 1
        await world.serve_calls(4, arrivals=4 + arrivals, burst=arrivals, **more)
        await asyncio.sleep(0.1)  # the pace of the callers

    async with asyncio.timeout(30):
        while near.settings().min_containers < 3:
            await rush()
    async with httpx.AsyncClient(timeout=PATIENCE) as http:
        answer = await http.post(f"{url}/_modal/sessions/start", headers=PROXY)
    assert answer.status_code == 429
    # A gateway tells of it; callers go on coming as fast as before.
    async with asyncio.timeout(30):
        while near.settings().min_containers != 2:
            await rush(burstLimited=1)
    message = await told(world, "LimitReached", "Modal has refused more than 2 containers since ")
    assert "takes calls in us-east and eu-west" in message
    limit = (await world.api.get(world.agent_path))["status"]["burst"]["limit"]
    assert (limit["containers"], limit["refusals"]) == (2, 1)
    assert near.settings().max_containers == 4
    assert len(modal.boots) == 2
