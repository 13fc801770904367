"""A look at an agent costs a few requests, and a change of its route costs writing all routes: neither without need."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from api_relay import ApiRelay
from operator_cast import played
from operator_rig import SPEC, World, operated

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, is_true
from trunkline_operator.agenda import GAP_SECONDS
from trunkline_operator.fleet import COALESCE_SECONDS, LONGEST_COALESCE_SECONDS, push_delay

EDITS = 10


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
    for number in range(EDITS):
        await world.apply({**SPEC, "session": {"idleSeconds": 60 + number}})
        await world.agent(
            lambda it: it["status"]["observedGeneration"] == it["metadata"]["generation"]
        )
        await asyncio.sleep(2 * GAP_SECONDS)  # a look that something has made would come now
    looks = [it for it in relay.seen if it.method == "GET" and it.path == world.agent_path]
    # Now and then an echo comes before the answer to what it echoes.
    assert EDITS <= len(looks) <= EDITS * 1.5


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
