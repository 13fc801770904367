"""Nothing paid is left behind: copies of credentials, and apps whose agents are gone."""

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from api_relay import ApiRelay, Request
from burst_rig import APP, GOOD, joined, until
from forked_operator import Nursery
from operator_cast import played
from operator_rig import SPEC, Json, World, operated
from operator_ward import Ward

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, condition
from trunkline_dev.modal.faults import Fault, Rule
from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import AppRecord
from trunkline_operator.burst.client import Burst, Found
from trunkline_operator.burst.deployments import Account
from trunkline_operator.burst.orphans import Sweeper, strays
from trunkline_operator.burst.sdk import Sdk
from trunkline_operator.cluster.client import Cluster
from trunkline_operator.cluster.custody import Custody, Entry
from trunkline_runtime.contract import TAG_INSTALLATION, TAG_NAMESPACE, TAG_UID

EVERY = bool(os.environ.get("TRUNKLINE_EVERY_KILL"))
"""Kill at every request. Without it, only at those that change something."""
CHANGING = frozenset(
    {"AppGetOrCreate", "FunctionCreate", "AppPublish", "FunctionUpdateSchedulingParams", "AppStop"}
)
MODAL = {"credentialsSecretRef": {"name": "modal"}, "gpu": [], "snapshot": "none"}
BURSTING = {**SPEC, "burst": {"modal": MODAL}}
Act = Callable[[], Coroutine[Any, Any, None]]
ACCOUNT = Account(credentials=GOOD, environment="")


def deployed(modal: LocalModal) -> list[AppRecord]:
    return [app for app in modal.state.apps.values() if app.deployed]


@pytest.fixture
async def world(
    api: Api, control_plane: ControlPlane, namespace: str, tmp_path: Path, modal: LocalModal
) -> AsyncIterator[World]:
    async with operated(api, control_plane, namespace, tmp_path) as world:
        world.flags = (f"--burst-secret={namespace}/trunkline-burst",)
        await joined(world, modal)
        yield world


async def copies(world: World) -> dict[str, Json]:
    """The operator's own, by the agent's uid."""
    secret = await world.api.get(f"{world.secrets}/trunkline-burst")
    data = (secret.get("data") or {}).items()
    return {uid: json.loads(base64.b64decode(text)) for uid, text in data}


async def no_copies(world: World) -> None:
    """The copy goes a moment after the agent."""
    where = f"{world.secrets}/trunkline-burst"
    await world.api.wait_for_one(where, lambda secret: not secret.get("data"))


# --- the operator as a process ----------------------------------------------------------------------


async def test_an_app_is_stopped_though_its_credentials_went_first(
    world: World, modal: LocalModal
) -> None:
    operator = await world.start()
    await world.apply(BURSTING)
    await world.condition("BurstReady", "BurstReady")
    agent = await world.api.get(world.agent_path)
    uid = agent["metadata"]["uid"]
    (app,) = deployed(modal)
    assert (await copies(world))[uid]["app"] == app.name == agent["status"]["burst"]["app"]
    home = await world.api.get(f"{world.secrets}/trunkline-burst")
    assert app.tags[TAG_INSTALLATION] == home["metadata"]["uid"]
    assert app.tags[TAG_UID] == uid
    log = (world.logs / "operator.log").read_text()
    assert GOOD.token_secret not in log
    # As when a namespace is deleted: its Secrets go at once, and the operator was away.
    operator.kill()
    await world.api.delete(f"{world.secrets}/modal")
    await world.api.delete(world.agent_path)
    await world.start()
    await world.gateway.until(lambda it: bool(it.told))
    await world.serve_calls()
    await world.api.wait_gone(world.agent_path)
    assert not deployed(modal)
    await no_copies(world)


async def test_an_agent_that_was_torn_out_leaves_no_app(world: World, modal: LocalModal) -> None:
    operator = await world.start()
    await world.apply(BURSTING)
    await world.condition("BurstReady", "BurstReady")
    operator.kill()
    await world.api.patch(world.agent_path, {"metadata": {"finalizers": None}})
    await world.api.delete(world.agent_path)
    await world.api.wait_gone(world.agent_path)
    assert len(deployed(modal)) == 1
    await world.start()
    await until(lambda: not deployed(modal))


async def test_burst_that_is_removed_takes_its_copy_along(world: World, modal: LocalModal) -> None:
    await world.start()
    await world.apply(BURSTING)
    await world.condition("BurstReady", "BurstReady")
    assert len(await copies(world)) == 1
    await world.serve_calls()
    await world.apply()
    await world.condition("BurstReady", "BurstOff")
    await until(lambda: not deployed(modal))
    await no_copies(world)


# --- a sweep ----------------------------------------------------------------------------------------


def test_only_apps_of_this_installation_whose_agent_is_gone_are_strays() -> None:
    def app(**tags: str) -> Found:
        return Found(name="a", tags={key.replace("_", "-"): value for key, value in tags.items()})

    mine = {"trunkline_installation": "here"}
    gone, lives = app(**mine, trunkline_uid="gone"), app(**mine, trunkline_uid="lives")
    other = app(trunkline_installation="there", trunkline_uid="gone")
    found = [gone, lives, other, app(**mine), app()]
    assert strays(found, "here", {"lives": "ns/a"}) == [gone]
    assert strays(found, "", {"lives": "ns/a"}) == []


async def test_a_sweep_stops_strays_and_forgets_an_entry_once_nothing_is_left(
    control_plane: ControlPlane, namespace: str, modal: LocalModal
) -> None:
    async def living() -> dict[str, str]:
        return {"lives": f"{namespace}/lives"}

    env = {"KUBECONFIG": str(control_plane.kubeconfig)}
    burst = Burst()
    async with await Cluster.connect(env) as cluster:
        custody = Custody(cluster, (namespace, "copies"))
        await custody.open()
        again = Custody(cluster, (namespace, "copies"))
        for uid in ("lives", "gone", "elsewhere"):
            where = "other" if uid == "elsewhere" else namespace
            tags = {TAG_INSTALLATION: custody.installation, TAG_NAMESPACE: where, TAG_UID: uid}
            name = f"trunkline-{uid}"
            await burst.deploy(replace(APP, name=name, tags=tags, snapshot="none"), GOOD)
            await custody.keep(uid, Entry(agent=f"{where}/{uid}", app=name, account=ACCOUNT))
        await again.open()
        assert again.entries == custody.entries
        assert GOOD.token_secret not in repr(again.entries)
        # One that no entry tells of, and one of somebody else.
        tags = {TAG_INSTALLATION: custody.installation, TAG_NAMESPACE: namespace, TAG_UID: "lost"}
        await burst.deploy(replace(APP, name="trunkline-lost", tags=tags), GOOD)
        theirs = {**tags, TAG_INSTALLATION: "another"}
        await burst.deploy(replace(APP, name="trunkline-theirs", tags=theirs), GOOD)

        sweeper = Sweeper(Sdk(lambda: burst), custody, living, lambda watched: watched == namespace)
        await modal.inject(Rule(fault=Fault.RPC_FAILS, name="AppStop", status="INTERNAL"))
        assert await sweeper.sweep() == 2
        assert len(deployed(modal)) == 5
        await modal.inject()
        assert await sweeper.sweep() == 2  # stopped now, and looked for once more
        stay = ["trunkline-elsewhere", "trunkline-lives", "trunkline-theirs"]
        assert sorted(app.name for app in deployed(modal)) == stay
        assert set(custody.entries) == {"lives", "gone", "elsewhere"}
        assert await sweeper.sweep() == 0
        assert set(custody.entries) == {"lives", "elsewhere"}
        assert await sweeper.sweep() == 0
        assert modal.state.sdk_calls.unimplemented == {}
    await burst.close()


# --- killed at any request ----------------------------------------------------------------------------


class Tape:
    """All that an operator asks of Kubernetes and of Modal, in one order; it may be killed at any of it."""

    def __init__(self, ward: Ward, modal: LocalModal) -> None:
        self._ward = ward
        self.seen: list[str] = []
        self.killed = asyncio.Event()
        self._counts = [0, 0]  # arrived, answered
        self._at: tuple[int, bool] | None = None
        ward.relay.before, ward.relay.after = self._kube_before, self._kube_after
        modal.before, modal.after = self._modal_before, self._modal_after

    def forget(self, at: tuple[int, bool] | None = None) -> None:
        """Counts from 1 again, and kills at the nth, before it has an effect or after."""
        self.seen, self._counts, self._at = [], [0, 0], at
        self.killed = asyncio.Event()

    def disarmed(self) -> bool:
        """From now on nothing kills; whether something has, for the last request may come after all was seen."""
        self._at = None
        return self.killed.is_set()

    async def _pass(self, name: str, *, answered: bool) -> None:
        if not answered:
            self.seen.append(name)
        self._counts[answered] += 1
        if self._at and self._at[1] == answered and self._counts[answered] >= self._at[0]:
            self._at = None
            self._ward.kill()
            self.killed.set()
            await asyncio.Event().wait()  # this ends when the connection does

    async def _kube_before(self, request: Request) -> web.Response | None:
        if EVERY or request.writes:
            await self._pass(f"{request.method} {request.path}", answered=False)
        return None

    async def _kube_after(self, request: Request, _: int) -> bool:
        if EVERY or request.writes:
            await self._pass(request.path, answered=True)
        return False

    async def _modal_before(self, name: str) -> None:
        if EVERY or name in CHANGING:
            await self._pass(name, answered=False)

    async def _modal_after(self, name: str) -> None:
        if EVERY or name in CHANGING:
            await self._pass(name, answered=True)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery.open() as nursery:
        yield nursery


@pytest.mark.timeout(3600 if EVERY else 400)
async def test_whatever_request_an_operator_dies_at_apps_are_what_agents_say(
    world: World, modal: LocalModal, api: Api, nursery: Nursery
) -> None:
    async def deploys() -> None:
        await world.apply(BURSTING)

    async def is_deployed() -> None:
        def told(agent: Json) -> bool:
            return condition(agent, "BurstReady").get("status") == "True"

        agent = await world.agent(told, 60)
        (app,) = deployed(modal)
        assert agent["status"]["burst"]["app"] == app.name
        assert agent["metadata"]["uid"] in await copies(world)
        # What stands by is told last.
        (server,) = (modal.state.servers[each] for each in app.functions.values())
        await until(lambda: server.overrides.max_containers == 10)

    async def removes() -> None:
        await world.api.delete(world.agent_path)

    async def is_gone() -> None:
        await world.api.wait_gone(world.agent_path, 60)
        await no_copies(world)
        await until(lambda: not deployed(modal))

    wishes: list[tuple[Act, Act]]
    wishes = [(deploys, is_deployed), (removes, is_gone)]
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(ApiRelay(api).serving())
        await stack.enter_async_context(played(world))
        ward = Ward(world, relay, nursery)
        tape = Tape(ward, modal)
        await ward.started()
        try:
            counts = []
            for ask, settled in wishes:
                tape.forget()
                await ask()
                await settled()
                counts.append(len(tape.seen))
                assert any(name in CHANGING for name in tape.seen), tape.seen
            kills = 0
            for turn in range(2 * max(counts)):
                for (ask, settled), count in zip(wishes, counts, strict=True):
                    tape.forget((turn // 2 % count + 1, bool(turn % 2)))
                    await ask()
                    ends: list[asyncio.Task[Any]] = [
                        asyncio.create_task(tape.killed.wait()),
                        asyncio.create_task(settled()),
                    ]
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                    killed = tape.disarmed()
                    for end in ends:
                        end.cancel()
                    await asyncio.gather(*ends, return_exceptions=True)
                    kills += killed
                    if killed:
                        await ward.next()
                    await settled()
            assert kills > 0.7 * 2 * sum(counts)
            assert not modal.pids
        finally:
            with suppress(ProcessLookupError):
                ward.kill()
