"""Burst: from a caller to the first audio of a container, how many sessions a second, and what calls cost.

    python bench/burst.py [--quick] [--json FILE]

The local Modal starts real containers with the worker that Modal runs, with no weights to load and no network in
between: so the times are what Trunkline itself adds to a start, not what Modal takes. The peer is a plain client
of the same server: the SDK's own `sessions.start`, then a WebSocket. So a row's ratio is what the gateway costs: it
admits, chooses, signs a ticket and relays. The bounds are of that: a tenth of what a start takes anyway, and a
twentieth to aim at; of sessions a second, where both ends share the processor, a fifth and a tenth.

What is Modal's own stands in rows that say so: what calls cost is arithmetic over the price table, and what a restore
of a model takes is quoted. Nothing of that was measured here.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import jwt
import modal
import report

# Who plays caller and gateway in the tests does so here.
sys.path.append(str(Path(__file__).parents[1] / "tests"))

from burst_stage import APP, REGION, Stage, staged, until
from gateway_rig import AGENT, TICKET_KEY, call
from websockets.asyncio.client import ClientConnection, connect

from trunkline_operator.agent.spec import Burst, Gpu, Warm
from trunkline_operator.scaling.prices import (
    HOUR,
    USUAL_CALL_SECONDS,
    container_rate,
    pod_rate,
    read,
)
from trunkline_runtime.contract import REALTIME_PATH, SETTINGS_TYPE, TICKET_HEADER
from trunkline_runtime.modal_app import server_name

FRAME_MS: Final = 80  # of the loopback engine: what is spoken comes back with the next
SILENCE: Final = "AAAA" * 1280  # 80 ms at 24 kHz, 16 bits, as base64
GPU: Final = "L4"
FULL: Final = 0.7  # of its slots, over a burst


def measure(quick: bool) -> list[report.Row]:
    rounds = 4 if quick else 24
    return [*asyncio.run(_measured(rounds, 20 if quick else 100)), _costs(), _fleet()]


async def _measured(rounds: int, sessions: int) -> list[report.Row]:
    """One container stands by for the warm ones; each other start is of a container that is there for nothing else."""
    warm_app = replace(APP, slots=200, max_containers=1, scaledown_window=600)
    rows = []
    async with staged(pods=0, app=warm_app) as stage, _sdk(stage) as peer:
        await stage.stand_by(1)
        await stage.ready(1)
        warm = await _rounds(rounds, lambda: _ours(stage), lambda: _theirs(stage, peer))
        rows.append(_start("warm", *warm))
        rates = await _rounds(
            max(3, rounds // 3),
            lambda: _rate(sessions, lambda: _started(stage)),
            lambda: _rate(sessions, lambda: _session(peer)),
        )
        rows.append(
            _row("sessions started and ended a second, 20 at once", "/s", rates, (0.8, 0.9))
        )
    one = replace(APP, slots=1, max_containers=1, scaledown_window=2)
    for kind, app in (("restored", one), ("cold", replace(one, snapshot="none"))):
        async with staged(pods=0, app=app, clones=2) as stage, _sdk(stage) as peer:
            few = max(2, rounds // 2)
            found = await _rounds(
                few, lambda: _alone(stage, _ours), lambda: _alone(stage, _theirs, peer)
            )
            rows.append(_start(kind, *found))
    return rows


async def _rounds(
    count: int, ours: Callable[[], Awaitable[float]], theirs: Callable[[], Awaitable[float]]
) -> tuple[list[float], list[float]]:
    """In turn; the first round is not kept."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(count + 1):
        for kept, run in zip(found, (ours, theirs), strict=True):
            value = await run()
            if number:
                kept.append(value)
    return found


def _start(kind: str, ours: list[float], theirs: list[float]) -> report.Row:
    return _row(f"{kind} container: caller → first audio", "ms", (ours, theirs), (1.1, 1.05))


def _row(
    what: str, unit: str, found: tuple[list[float], list[float]], bounds: tuple[float, float]
) -> report.Row:
    return report.Row(
        what=f"local Modal, no weights: {what}",
        against="the SDK's sessions.start and a WebSocket, without a gateway",
        unit=unit,
        ours=found[0],
        theirs=found[1],
        floor=bounds[0],
        target=bounds[1],
        at_most=unit == "ms",
    )


# --- one call ----------------------------------------------------------------------------------------


async def _ours(stage: Stage) -> float:
    """Milliseconds from a caller's request to the first audio that comes back."""
    began = time.perf_counter()
    async with call(stage.gateway) as link:
        return await _first_audio(link, began)


async def _theirs(stage: Stage, server: Any) -> float:
    """The same without a gateway."""
    url = await server.get_url.aio()
    began = time.perf_counter()
    session = await server.sessions.start.aio(idle_timeout=30)
    try:
        async with _dial(url, session.token) as link:
            settings = {"type": SETTINGS_TYPE, "settings": {}}
            await link.send(json.dumps(settings))
            return await _first_audio(link, began)
    finally:
        await server.sessions.terminate.aio(session.token)


async def _first_audio(link: ClientConnection, began: float) -> float:
    speech = json.dumps({"type": "input_audio_buffer.append", "audio": SILENCE})
    speaking = asyncio.create_task(_speak(link, speech))
    try:
        async with asyncio.timeout(60):
            while "output_audio.delta" not in json.loads(await link.recv())["type"]:
                pass
        return (time.perf_counter() - began) * 1000
    finally:
        speaking.cancel()
        await asyncio.gather(speaking, return_exceptions=True)


async def _speak(link: ClientConnection, speech: str) -> None:
    while True:
        await link.send(speech)
        await asyncio.sleep(FRAME_MS / 1000)


def _dial(url: str, token: str) -> connect:
    now = int(time.time())
    claims = {"aud": AGENT, "call": token, "jti": token, "iat": now, "exp": now + 30}
    headers = {
        "Modal-Authorization": f"Bearer {token}",
        TICKET_HEADER: jwt.encode(claims, TICKET_KEY, algorithm="HS256"),
    }
    address = url.replace("http", "ws", 1) + REALTIME_PATH
    return connect(address, additional_headers=headers, proxy=None, open_timeout=60)


async def _alone(stage: Stage, run: Callable[..., Awaitable[float]], *peer: Any) -> float:
    """With no container there before."""
    await until(lambda: not stage.there)
    return await run(stage, *peer)


@contextlib.asynccontextmanager
async def _sdk(stage: Stage) -> AsyncIterator[Any]:
    client = await modal.Client.from_credentials.aio("ak-1", "as-1")
    try:
        yield modal.Server.from_name(stage.app.name, server_name(REGION), client=client)
    finally:
        await client.close.aio()


# --- many sessions -----------------------------------------------------------------------------------


async def _rate(count: int, start: Callable[[], Awaitable[None]]) -> float:
    """Sessions a second, twenty at a time."""
    room = asyncio.Semaphore(20)

    async def one() -> None:
        async with room:
            await start()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(count)))
    return count / (time.perf_counter() - began)


async def _started(stage: Stage) -> None:
    """A whole call: its session, its data link and its end."""
    await (await call(stage.gateway)).close()


async def _session(server: Any) -> None:
    session = await server.sessions.start.aio(idle_timeout=30)
    url = await server.get_url.aio()
    async with _dial(url, session.token):
        pass
    await server.sessions.terminate.aio(session.token)


# --- what is Modal's: computed and quoted -----------------------------------------------------------------


def _costs() -> report.Row:
    """1,000 calls of three minutes, at burst and in a warm pod that is used all the time; arithmetic alone."""
    prices = read()
    burst, warm = Burst(credentials_secret="", gpu=(GPU,)), Warm(gpu=Gpu(count=1))
    container, pod = container_rate(burst, prices, ""), pod_rate(warm, burst, prices)
    assert container
    assert pod
    hours = 1000 * USUAL_CALL_SECONDS / HOUR
    return report.Row(
        what=f"computed from the price table: 1,000 calls of {USUAL_CALL_SECONDS / 60:g} min at burst, "
        f"{burst.slots_per_container} a container, {FULL:.0%} of its slots used",
        against=f"the same in a warm pod with the {GPU}, all {warm.slots_per_pod} slots used",
        unit="$",
        ours=[hours * container.hour / (burst.slots_per_container * FULL)],
        theirs=[hours * pod.hour / warm.slots_per_pod],
        at_most=True,
    )


def _fleet() -> report.Row:
    """What comes on top of a restored start at Modal itself: it is Modal's, and no measurement of ours."""
    return report.Row(
        what="quoted from Modal: a vLLM server's start from a GPU snapshot, the mean of its fleet, spring 2026",
        against="the same without a snapshot",
        unit="s",
        ours=[13.8],
        theirs=[95.7],
        at_most=True,
    )


if __name__ == "__main__":
    report.main("burst", measure)
