"""A look at an agent costs a few requests, and a change of its route costs writing all routes: neither without need."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from api_relay import ApiRelay
from operator_cast import played
from operator_rig import SPEC, World, operated
from operator_ward import WATCHES

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, is_true
from trunkline_operator.fleet import COALESCE_SECONDS, LONGEST_COALESCE_SECONDS, push_delay

EDITS = 10
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
    # Every list is the mirror's own, page by page and now and then.
    read = [it for it in relay.seen if not it.writes and it.path not in (world.agents, world.pods)]
    assert read == []
    made = [(it.method, it.path.removeprefix(world.agent_path)) for it in relay.seen if it.writes]
    finalizer, secret, pod, status = made[:4]
    assert finalizer == ("PATCH", "")
    assert secret == ("POST", world.secrets)
    assert pod == ("POST", world.pods)
    assert status == ("PATCH", "/status")


async def looks(world: World) -> float:
    """How many were taken."""
    async with httpx.AsyncClient(trust_env=False) as client:
        lines = (await client.get(f"{world.health}/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(LOOKS))


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
