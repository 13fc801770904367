"""A stage for burst: a gateway, warm workers and a local Modal whose containers run the same worker.

Gateway, callers and Modal share this process; workers and containers are processes of their own.
"""

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gateway_rig import AGENT, TICKET_KEY, WORKER_KEY, a_gateway, a_route, call, give
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import Boot, Config
from trunkline_dev.processes import Process, base_environment
from trunkline_operator.agent.spec import Region
from trunkline_operator.burst.client import Burst, BurstApp, Credentials, Place
from trunkline_operator.burst.standby import Scaling
from trunkline_runtime.contract import (
    ENV_AGENT,
    ENV_ENGINE,
    ENV_GATEWAYS,
    ENV_HEALTH_PORT,
    ENV_HOST,
    ENV_PORT,
    ENV_SLOTS,
    ENV_WORKER,
    ENV_WORKER_KEY,
    BurstRung,
    WarmRung,
)
from trunkline_runtime.gateway.process import Running

WORKER: Final = (
    "from trunkline_runtime.cli import main; import sys; sys.argv[1:] = ['worker']; main()"
)
REGION: Final = Region.US_EAST
GOOD: Final = Credentials(token_id="ak-1", token_secret="as-1")
SECONDS: Final = 120.0  # for containers to come up, on a busy machine
APP: Final = BurstApp(
    name="trunkline-stage",
    agent=AGENT,
    engine={ENV_ENGINE: "loopback"},
    ticket_key=TICKET_KEY,
    slots=16,
    max_containers=10,
    scaledown_window=3,  # 300 s at Modal, a hundred times as fast
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One caller: when it came and how long it waited, in seconds, and its call, or None for a 503."""

    came: float
    waited: float
    call: ClientConnection | None


class Stage:
    """What is there, and what can be asked of it."""

    def __init__(self, gateway: Running, local: LocalModal, burst: Burst, app: BurstApp) -> None:
        self.gateway, self.local, self.burst, self.app = gateway, local, burst, app
        self.place = Place(app=app.name, environment="", credentials=GOOD)

    @property
    def there(self) -> list[Boot]:
        """Containers that are ready."""
        return [boot for boot in self.local.boots if boot.ready_t and not boot.end_t]

    async def stand_by(self, containers: int) -> None:
        """So many of Modal's containers are there without a call; those above go after the window."""
        scaling = Scaling(
            minimum=containers,
            buffer=0,
            maximum=self.app.max_containers,
            window=self.app.scaledown_window,
        )
        await self.burst.scale(self.place, {REGION: scaling})

    async def ready(self, containers: int) -> None:
        await until(lambda: len(self.there) >= containers)

    async def clones(self, count: int) -> None:
        """So many processes stand at the snapshot, so that a restore needs no processor."""
        (edge,) = self.local._edges.values()
        await until(lambda: edge.pool and len(edge.pool._clones) >= count)

    async def callers(self, count: int, seconds: float) -> list[Outcome]:
        """So many callers, evenly over so many seconds; returns when all have their answer."""
        began = time.monotonic()

        async def caller(number: int) -> Outcome:
            due = began + number * seconds / count
            await asyncio.sleep(due - time.monotonic())
            came = time.monotonic()
            found = await _answer(self.gateway)
            return Outcome(came - began, time.monotonic() - came, found)

        return list(await asyncio.gather(*map(caller, range(count))))


async def _answer(gateway: Running) -> ClientConnection | None:
    """A call, or None for a 503; any other answer is an error."""
    try:
        return await call(gateway)
    except InvalidStatus as error:
        if error.response.status_code != 503:
            raise
        return None


@contextlib.asynccontextmanager
async def staged(
    *, pods: int, slots: int = 16, app: BurstApp = APP, route: Any = None, **modal: Any
) -> AsyncIterator[Stage]:
    """With so many warm pods of so many slots, and one container that has been up, so that others are restored."""
    config = Config(**{"clones": 0, "proxy_tokens": {"wk-1": "ws-1"}, **modal})
    async with contextlib.AsyncExitStack() as stack:
        local = await stack.enter_async_context(LocalModal(config))
        stack.enter_context(_modal_at(local.server_url))
        burst = Burst(call_seconds=20, deploy_seconds=SECONDS)
        stack.push_async_callback(burst.close)
        deployed = await burst.deploy(app, GOOD)
        gateway = await stack.enter_async_context(a_gateway(a_route(rungs=[WarmRung(kind="warm")])))
        stage = Stage(gateway, local, burst, app)
        await burst.warm_up(stage.place, REGION, SECONDS)
        rung = BurstRung(
            kind="burst",
            name=REGION.value,
            url=deployed.urls[REGION],
            proxyToken="wk-1.ws-1",
            ticketKey=TICKET_KEY,
            deadlineSeconds=SECONDS,
        )
        give(gateway, a_route(rungs=[WarmRung(kind="warm"), rung], **(route or {})), epoch=2)
        await stack.enter_async_context(_workers(gateway, pods, slots))
        yield stage


@contextlib.asynccontextmanager
async def _workers(gateway: Running, pods: int, slots: int) -> AsyncIterator[None]:
    env = base_environment() | {
        ENV_AGENT: AGENT,
        ENV_ENGINE: "loopback",
        ENV_SLOTS: str(slots),
        ENV_WORKER_KEY: WORKER_KEY,
        ENV_GATEWAYS: f"127.0.0.1:{gateway.control_port}",
        ENV_HOST: "127.0.0.1",
        ENV_PORT: "0",
        ENV_HEALTH_PORT: "0",
    }
    with tempfile.TemporaryDirectory() as logs:
        processes = [
            Process(
                f"echo-{number}",
                [sys.executable, "-c", WORKER],
                Path(logs) / f"{number}.log",
                env | {ENV_WORKER: f"echo-{number}"},
            )
            for number in range(pods)
        ]
        try:
            for process in processes:
                process.start()
            await until(lambda: _free(gateway) == pods * slots)
            yield
        finally:
            await asyncio.gather(*(process.stop() for process in processes))


def _free(gateway: Running) -> int:
    load = gateway.gateway.load()["agents"].get(AGENT)
    return sum(worker["free"] for worker in load["workers"].values()) if load else 0


@contextlib.contextmanager
def _modal_at(url: str) -> Iterator[None]:
    before = os.environ.get("MODAL_SERVER_URL")
    os.environ["MODAL_SERVER_URL"] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ["MODAL_SERVER_URL"]
        else:
            os.environ["MODAL_SERVER_URL"] = before


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS):
        while not true():
            await asyncio.sleep(0.02)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def waits(
    came: Sequence[float], ready: Sequence[float], slots: int, patience: float
) -> list[float | None]:
    """How long each caller waits for a slot of a container, None = nobody can answer them in time.

    The arithmetic of a line: callers come at these times, each container brings its slots when it is ready, and
    whoever has waited longest is served first and keeps the slot.
    """
    free = sorted(moment for moment in ready for _ in range(slots))
    found: list[float | None] = []
    for moment in came:
        if free and free[0] <= moment + patience:
            found.append(max(free.pop(0) - moment, 0.0))
        else:
            found.append(None)
    return found
