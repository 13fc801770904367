"""Restores that crash, as the operator meets them: it watches, falls a level, says so, and tries again."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from operator_rig import SPEC, World, operated
from worlds import BURST, DEPLOYED, INSTALLATION, NOW, a_pod, a_world, an_agent

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api
from trunkline_dev.modal.faults import Fault, Rule
from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import Config, Kind
from trunkline_operator.agent.spec import Snapshot
from trunkline_operator.burst.breaker import FIRST_WAIT, Breaker, noted
from trunkline_operator.burst.client import Burst
from trunkline_operator.burst.deployments import Deployments
from trunkline_operator.burst.sdk import Sdk
from trunkline_operator.decisions.conditions import Reason
from trunkline_operator.decisions.manifests import burst_app, burst_hash
from trunkline_operator.decisions.plan import planned
from trunkline_operator.decisions.status import reported
from trunkline_operator.decisions.steps import DeployBurst, Requeue, Step, WatchBurst
from trunkline_operator.decisions.world import BurstFacts
from trunkline_operator.scaling.decision import Memory

AGENT = an_agent(**BURST)
SOUND = Breaker.of(Snapshot.CPU)
FALLEN = noted(SOUND, good=0, bad=2, now=NOW)
CURRENT = replace(DEPLOYED, hash=burst_hash(AGENT, INSTALLATION), breaker=SOUND)
BELOW = burst_hash(AGENT, INSTALLATION, Snapshot.NONE)


def steps(facts: BurstFacts, now: float = NOW, calls: int = 0) -> tuple[Step, ...]:
    world = a_world([a_pod(AGENT, 0)], burst=facts)
    world = replace(world, traffic=replace(world.traffic, burst=calls))
    taken = planned(AGENT, world, now, Memory(wish=1, refused=0), INSTALLATION).steps
    return tuple(step for step in taken if isinstance(step, DeployBurst | Requeue | WatchBurst))


def test_starts_are_watched_while_calls_go_to_burst() -> None:
    assert not any(isinstance(step, WatchBurst) for step in steps(CURRENT))
    assert WatchBurst("app") in steps(CURRENT, calls=1)
    lately = replace(CURRENT, watched=NOW - 4)
    assert not any(isinstance(step, WatchBurst) for step in steps(lately, calls=1))
    (wait,) = (step for step in steps(lately, calls=1) if isinstance(step, Requeue))
    assert wait.after <= 6
    assert WatchBurst("app") in steps(lately, NOW + 6, calls=1)
    blind = replace(CURRENT, credentials="no Secret modal")
    assert not any(isinstance(step, WatchBurst) for step in steps(blind, calls=1))


def test_a_level_below_is_a_deployment_and_the_one_above_is_tried_in_time() -> None:
    fallen = replace(CURRENT, breaker=FALLEN)
    assert DeployBurst(burst_app(AGENT), BELOW) in steps(fallen)
    there = replace(fallen, hash=BELOW)
    assert steps(there) == (Requeue(FIRST_WAIT),)  # when the level above is tried
    # Nothing is restored any more, but containers are counted: they cost.
    assert steps(there, calls=1) == (WatchBurst("app"), Requeue(FIRST_WAIT))


def test_the_hash_of_a_level_is_its_own_and_that_of_no_fall_as_ever() -> None:
    assert burst_hash(AGENT, INSTALLATION, Snapshot.CPU) == burst_hash(AGENT, INSTALLATION)
    asking = an_agent(**BURST, burst__modal__snapshot="none")
    assert len({BELOW, burst_hash(AGENT, INSTALLATION), burst_hash(asking, INSTALLATION)}) == 3


def test_the_condition_says_that_calls_are_taken_by_slower_containers() -> None:
    world = a_world([a_pod(AGENT, 0)], burst=replace(CURRENT, breaker=FALLEN, hash=BELOW))
    plan = planned(AGENT, world, NOW, Memory(wish=1, refused=0), INSTALLATION)
    told = reported(AGENT, world, plan, {}, NOW)
    (burst,) = (one for one in told["conditions"] if one["type"] == "BurstReady")
    assert (burst["status"], burst["reason"]) == ("True", Reason.SNAPSHOT_FALLBACK)
    assert burst["message"].endswith(
        "its containers start with snapshot none because restores from cpu failed, "
        "tried again after 15 minutes"
    )


async def test_slow_restores_that_gateways_tell_of_open_the_breaker() -> None:
    """What was before the first look is old; Modal counts the slow ones as good, which they are not."""
    deployments = Deployments(Sdk(Burst), lambda _: None)
    deployments.facts("ns/a", CURRENT)
    assert [deployments.slower("ns/a", total) for total in (7, 7, 9, 9, 8)] == [0, 0, 2, 0, 0]
    assert noted(SOUND, 0, 2, NOW).fallen
    await deployments.close()


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> AsyncIterator[World]:
    async with operated(api, control_plane, namespace, tmp_path) as world:
        yield world


async def session(url: str) -> None:
    """One more session, which is kept; it must be given."""
    async with httpx.AsyncClient(timeout=30) as http:
        headers = {"Authorization": "Bearer wk-1.ws-1"}
        answer = await http.post(f"{url}/_modal/sessions/start", headers=headers)
    assert answer.status_code == 200, answer.text


async def test_an_operator_falls_back_says_so_and_remembers(world: World) -> None:
    modal_spec = {
        "credentialsSecretRef": {"name": "modal"},
        "gpu": [],
        "slotsPerContainer": 1,
        "scaledownWindowSeconds": 600,
    }
    config = Config(clones=0, proxy_tokens={"wk-1": "ws-1"})
    async with LocalModal(config) as modal:
        env = {"MODAL_SERVER_URL": modal.server_url}
        operator = await world.start(env=env)
        tokens = {"token-id": "ak-1", "token-secret": "as-1"}
        proxy = {"proxy-token-id": "wk-1", "proxy-token-secret": "ws-1"}
        await world.secret("modal", **tokens, **proxy)
        await world.apply({**SPEC, "burst": {"modal": modal_spec}})
        await world.condition("BurstReady", "BurstReady")
        url = (await world.api.get(world.agent_path))["status"]["burst"]["url"]
        (server,) = modal.state.servers.values()

        # Three sessions: the container that is warm, and two that should have been restored.
        await modal.inject(Rule(fault=Fault.RESTORE_CRASHES, seconds=0.0))
        for _ in range(3):
            await session(url)
        assert [boot.exit for boot in modal.boots if boot.kind is Kind.RESTORED] == [222, 222]
        held = [boot for boot in modal.boots if boot.ready_t]
        await world.serve_calls(0, burst=3)
        await world.condition("BurstReady", "SnapshotFallback")
        await world.agent(lambda it: it["status"]["burst"].get("snapshot") == "none")
        assert not server.definition.checkpointing_enabled
        assert all(boot.end_t is None for boot in held)  # their sessions stay where they are
        await session(url)
        assert modal.boots[-1].kind is Kind.COLD

        # A new operator finds the level deployed, and leaves it.
        (app,) = modal.state.apps.values()
        version, links = app.version, world.gateway.links
        operator.kill()
        await world.start(env=env)
        await world.gateway.until(lambda it: it.links > links)
        async with asyncio.timeout(30):
            await world.serve_calls(0, burst=4)
            await world.agent(lambda it: it["status"]["burst"]["calls"] == 4)
        await world.condition("BurstReady", "SnapshotFallback")
        assert app.version == version == 2
