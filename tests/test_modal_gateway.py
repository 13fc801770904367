"""Calls through a real gateway to real workers in the local Modal, while things go wrong there."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from gateway_rig import (
    AGENT,
    TICKET_KEY,
    a_gateway,
    a_route,
    call,
    events,
    give,
    metric,
    on_uvloop,
    until,
)
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from trunkline_dev.modal.faults import Fault, Rule
from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import Config, Kind
from trunkline_operator.burst.client import Burst, BurstApp, Credentials, Place
from trunkline_runtime.contract import ENV_ENGINE, BurstRung
from trunkline_runtime.gateway.accounts.books import Books
from trunkline_runtime.gateway.accounts.files import LedgerFile

GOOD: Final = Credentials(token_id="ak-1", token_secret="as-1")
PATIENCE: Final = 40.0
ANSWER_SECONDS: Final = 8.0  # the default of an agent
LATE: Final = 3.0  # seconds after that in which this machine must have said so
APP: Final = BurstApp(
    name="near",
    agent=AGENT,
    engine={ENV_ENGINE: "loopback"},
    ticket_key=TICKET_KEY,
    slots=1,
    max_containers=8,
    scaledown_window=600,
)


@contextlib.asynccontextmanager
async def modal(
    monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> AsyncIterator[tuple[LocalModal, Burst]]:
    config = Config(**{"clones": 0, "proxy_tokens": {"wk-1": "ws-1"}, **settings})
    async with LocalModal(config) as local:
        monkeypatch.setenv("MODAL_SERVER_URL", local.server_url)
        burst = Burst(call_seconds=10, deploy_seconds=PATIENCE)
        try:
            yield local, burst
        finally:
            await burst.close()


async def rung(burst: Burst, app: BurstApp, seconds: float = PATIENCE) -> BurstRung:
    """The app, deployed, with one container that is ready."""
    deployed = await burst.deploy(app, GOOD)
    (region,) = app.regions
    place = Place(app=app.name, environment=app.environment, credentials=GOOD)
    await burst.warm_up(place, region, PATIENCE)
    return BurstRung(
        kind="burst",
        name=region,
        url=deployed.urls[region],
        proxyToken="wk-1.ws-1",
        ticketKey=TICKET_KEY,
        deadlineSeconds=seconds,
    )


async def live(caller: ClientConnection) -> None:
    """The worker of this call answers."""
    await caller.send(json.dumps({"type": "input_audio_buffer.clear"}))
    async with asyncio.timeout(PATIENCE):
        while json.loads(await caller.recv())["type"] != "input_audio_buffer.cleared":
            pass


async def asked(gateway: Any) -> tuple[ClientConnection | int, float]:
    """A call or the status of the plain answer, and the seconds until then."""
    began = time.monotonic()
    try:
        found: ClientConnection | int = await call(gateway)
    except InvalidStatus as error:
        found = error.response.status_code
    return found, time.monotonic() - began


def test_six_in_ten_restores_crash_and_nobody_is_answered_without_a_slot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "calls"

    @on_uvloop
    async def run() -> None:
        async with modal(monkeypatch) as (local, burst):
            near = await rung(burst, APP)
            route = a_route(rungs=[near], answerSeconds=ANSWER_SECONDS)
            books = Books(file=LedgerFile(file))
            async with a_gateway(route, books=books) as gateway, call(gateway) as first:
                await live(first)
                # Whoever's restore crashes has no hope: the boot that follows takes a minute.
                await local.inject(
                    Rule(fault=Fault.RESTORE_CRASHES, share=0.6, seconds=0.5),
                    Rule(fault=Fault.BOOT_SLOW, name="*/cold", seconds=60),
                    seed=3,
                )
                outcomes = await asyncio.gather(*(asked(gateway) for _ in range(5)))
                restores = [boot for boot in local.boots if boot.kind is Kind.RESTORED]
                crashed = [boot for boot in restores if boot.exit == 222]
                assert len(restores) == 5
                assert 0 < len(crashed) < 5
                answered = [one for one, _ in outcomes if not isinstance(one, int)]
                told = [status for status, _ in outcomes if isinstance(status, int)]
                assert told == [503] * len(crashed)
                assert max(seconds for _, seconds in outcomes) < ANSWER_SECONDS + LATE
                for caller in (first, *answered):
                    await live(caller)
                for caller in answered:
                    await caller.close()
            (server,) = (edge.pool for edge in local._edges.values())
            assert server
            await until(lambda: server.sessions == 0)  # of those who gave up, too
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            ended = [line for line in lines if line["message"] == "ended"]
            assert len(ended) == 1 + len(answered)
            # Containers give an account of their calls, too, through whatever stands in front of them.
            assert all(line["audio_seconds_up"] == line["turns"] == 0 for line in ended)

    run()


def test_what_goes_wrong_in_one_region_sends_calls_to_the_next_and_touches_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults = {
        "has reached a limit of the workspace (HTTP 429)": Rule(
            fault=Fault.SESSION_REFUSED, name="*/us-east", status="429"
        ),
        "has no container free for a session (HTTP 503)": Rule(
            fault=Fault.SESSION_REFUSED, name="*/us-east"
        ),
        "does not let the proxy token into the app's environment (HTTP 403)": Rule(
            fault=Fault.SESSION_REFUSED, name="*/us-east", status="403"
        ),
        "did not start a session in time": Rule(fault=Fault.SESSION_HANGS, name="*/us-east"),
        "cannot be reached: All connection attempts failed": Rule(
            fault=Fault.REGION_DOWN, name="us-east"
        ),
    }

    @on_uvloop
    async def run() -> None:
        async with modal(monkeypatch) as (local, burst):
            near = await rung(burst, replace(APP, slots=8), seconds=1.5)
            far = await rung(burst, replace(APP, name="far", regions=("eu-west",), slots=8))
            route = a_route(rungs=[near, far], answerSeconds=PATIENCE)
            async with a_gateway(route) as gateway, call(gateway) as first:
                await live(first)
                for why, rule in faults.items():
                    await local.inject(rule)
                    with events("trunkline.calls") as lines:
                        async with call(gateway) as other:
                            await live(other)
                    (placed,) = (line for line in lines if line["message"] == "placed")
                    assert placed["rung"] == "burst/eu-west", why
                    assert [step["why"] for step in placed["passed_over"]] == [why]
                    await live(first)

                # The control plane is not in the way of a call.
                await local.inject(Rule(fault=Fault.CONTROL_PLANE_DOWN))
                give(gateway, a_route(rungs=[near]), epoch=2)
                async with call(gateway) as other:
                    await live(other)
                # A revoked token ends nothing, and is told.
                await local.inject(Rule(fault=Fault.TOKEN_REVOKED, name="wk-1"))
                assert (await asked(gateway))[0] == 503
                error = gateway.gateway.load()["agents"][AGENT]["burstError"]
                assert error == "Modal in us-east does not know the proxy token (HTTP 401)"
                await live(first)
                await local.inject()
                async with call(gateway) as other:
                    await live(other)

    run()


def test_starts_are_told_apart_and_a_slow_restore_counts_though_nobody_waited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A restore takes a second and a half, and more than one is slow."""

    @on_uvloop
    async def run() -> None:
        async with modal(monkeypatch, restore_seconds=1.5, clones=2) as (local, burst):
            near = await rung(burst, APP)
            # News are waited for a while only, in which a busy machine starts no process from nothing.
            await until(lambda: len(edges(local)[0].pool._clones) == 2)
            plain = await rung(burst, replace(APP, name="plain", snapshot="none"))
            patient = {**near, "slowSeconds": 1.0}
            hasty = {**patient, "deadlineSeconds": 0.5}

            async def started(gateway: Any) -> str:
                with events("trunkline.calls") as lines:
                    caller = await call(gateway)
                    await live(caller)
                    held.append(caller)
                (placed,) = (line for line in lines if line["message"] == "placed")
                return str(placed["burst_start"])

            def slow(gateway: Any) -> int:
                return int(gateway.gateway.load()["agents"][AGENT]["burstSlow"])

            held: list[ClientConnection] = []
            async with a_gateway(a_route(rungs=[plain])) as gateway:
                assert await started(gateway) == "warm"  # by the session that warmed it up
                assert await started(gateway) == "cold"
                assert slow(gateway) == 0
            async with a_gateway(a_route(rungs=[patient])) as gateway:
                assert await started(gateway) == "warm"
                assert slow(gateway) == 0
                assert await started(gateway) == "restored"
                assert slow(gateway) == 1
                for start in ("warm", "restored"):
                    name = "trunkline_burst_start_seconds_count"
                    assert await metric(gateway, name, agent=AGENT, start=start) == 1
                # Who is told in time that there is no slot leaves the news of the slow start behind.
                give(gateway, a_route(rungs=[hasty]), epoch=2)
                found, seconds = await asked(gateway)
                assert found == 503
                assert seconds < 0.5 + LATE
                await until(lambda: slow(gateway) == 2)
            await until(lambda: not any(edge.pool.sessions for edge in edges(local)))

    run()


def edges(local: LocalModal) -> list[Any]:
    return [edge for edge in local._edges.values() if edge.pool]
