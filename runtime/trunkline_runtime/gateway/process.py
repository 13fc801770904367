"""The gateway's process: its listeners, its clock, and its way out."""

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from trunkline_runtime.contract import (
    CHANGES_HEADER,
    MAX_CONTROL_BYTES,
    OPERATOR_PATH,
    WORKERS_PATH,
)
from trunkline_runtime.gateway.access.caller_tls import CallersTls
from trunkline_runtime.gateway.access.doorstep import Bounds
from trunkline_runtime.gateway.access.issuers import Pulse
from trunkline_runtime.gateway.access.pace import MOST_TIMES_REAL
from trunkline_runtime.gateway.access.proxies import Proxies
from trunkline_runtime.gateway.accounts.books import Books, keeping
from trunkline_runtime.gateway.breaker import Terms as Breaking
from trunkline_runtime.gateway.descriptors import raised
from trunkline_runtime.gateway.entrance import Before, Entrance, listener
from trunkline_runtime.gateway.gateway import Gateway
from trunkline_runtime.gateway.intake import Intake
from trunkline_runtime.gateway.ladder import Patience
from trunkline_runtime.gateway.operator_link import OperatorLink
from trunkline_runtime.gateway.renewal import Renewal
from trunkline_runtime.gateway.routes_file import RoutesFile
from trunkline_runtime.gateway.sockets import notice_dead_peer
from trunkline_runtime.gateway.terms import Identity, Terms
from trunkline_runtime.gateway.workers import WorkerLinks
from trunkline_runtime.process import QUIET, answer, listening, serving_health
from trunkline_runtime.tls import MountedIdentity

log = logging.getLogger("trunkline.gateway")

BACKLOG: Final = 4096  # a spike of callers within one turn of the loop; Linux's own bound


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """How a gateway is started; a port of 0 means any free one."""

    host: str
    port: int
    control_host: str
    control_port: int
    health_host: str
    health_port: int
    name: str
    operator_token: str = field(repr=False)
    control_tls: MountedIdentity | None = None  # None: plain control links
    calls_tls: CallersTls | None = None  # None: plain calls, or TLS that ends before the gateway
    proxies: Proxies = field(default_factory=Proxies)  # whose word on a caller's address counts
    proxy_header: bool = False  # they begin each connection with a PROXY header
    routes_file: Path | None = None
    default_namespace: str = "default"
    grace_seconds: float = 1860.0
    settle_seconds: float = (
        5.0  # the longest wait for workers; they look for new gateways that often
    )
    patience: Patience = field(default_factory=Patience)
    breaker: Breaking = field(default_factory=Breaking)
    bounds: Bounds = field(default_factory=Bounds)
    pulse: Pulse = field(default_factory=Pulse)
    audio_times_real: float = MOST_TIMES_REAL  # how fast a caller may send; 0: as it likes
    books: Books = field(default_factory=Books)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A gateway whose listeners are open."""

    gateway: Gateway
    port: int
    control_port: int
    health_port: int


async def run(config: GatewayConfig) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the grace."""
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def leave() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave)
    async with serving(config) as running:
        # A full collection that walked all imports would stop every call for 10 ms.
        gc.collect()
        gc.freeze()
        await stop.wait()
        await running.gateway.drain(config.grace_seconds, hurry)


@contextlib.asynccontextmanager
async def serving(config: GatewayConfig) -> AsyncIterator[Running]:
    """Opens the listeners; on the way out every call is closed with 1012 and nothing is left open.

    Raises CannotListen.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    identity = Identity(
        name=config.name,
        default_namespace=config.default_namespace,
        operator_token=config.operator_token,
    )
    async with contextlib.AsyncExitStack() as stack:
        keep = await stack.enter_async_context(keeping(config.books, registry))
        terms = Terms(
            patience=config.patience,
            breaker=config.breaker,
            bounds=config.bounds,
            proxies=config.proxies,
            pulse=config.pulse,
            audio_times_real=config.audio_times_real,
            descriptors=raised(),
            keep=keep,
        )
        gateway = Gateway(identity, registry, terms)
        health_port = await stack.enter_async_context(_observed(gateway, config, registry))
        control_port = await stack.enter_async_context(_controlling(gateway, config))
        stack.push_async_callback(gateway.close)
        port = await stack.enter_async_context(_answering(gateway, config))
        renewal = Renewal(registry, config.control_tls, config.calls_tls)
        await stack.enter_async_context(_working(gateway, config, renewal))
        running = Running(
            gateway=gateway, port=port, control_port=control_port, health_port=health_port
        )
        ports = {"calls": port, "control": control_port, "health": health_port}
        most = {"files": gateway.descriptors.limit, "calls_at_most": gateway.descriptors.calls}
        log.info("listening", extra={"gateway": config.name, "ports": ports, **most})
        yield running


def _observed(
    gateway: Gateway, config: GatewayConfig, registry: CollectorRegistry
) -> AbstractAsyncContextManager[int]:
    """The listener for probes, metrics and people."""
    return serving_health(
        config.health_host,
        config.health_port,
        gateway.unready,
        registry,
        state=lambda: {**gateway.state()},
    )


@contextlib.asynccontextmanager
async def _answering(gateway: Gateway, config: GatewayConfig) -> AsyncIterator[int]:
    """The callers' listener."""
    loop = asyncio.get_running_loop()
    tls = config.calls_tls
    before = Before(
        tls=None if tls is None else lambda: tls.context, proxy_header=config.proxy_header
    )
    if before:
        with listening(config.host, config.port, "calls", "--port"):
            bound = listener(config.host, config.port, BACKLOG)
        entrance = Entrance(bound, gateway, before)
        try:
            yield bound.getsockname()[1]
        finally:
            await entrance.close()
        return
    with listening(config.host, config.port, "calls", "--port"):
        server = await loop.create_server(
            lambda: Intake(gateway), config.host, config.port, backlog=BACKLOG
        )
    bound = next(iter(server.sockets))
    notice_dead_peer(bound)
    try:
        yield bound.getsockname()[1]
    finally:
        server.close()


@contextlib.asynccontextmanager
async def _controlling(gateway: Gateway, config: GatewayConfig) -> AsyncIterator[int]:
    """The listener for workers and the operator; keys are checked before the 101."""
    links: dict[str, WorkerLinks | OperatorLink] = {
        WORKERS_PATH: gateway.workers,
        OPERATOR_PATH: gateway.operator,
    }

    def refusal(_: ServerConnection, request: Request) -> Response | None:
        link = links.get(request.path)
        if link is None:
            return answer(404, f"there are {WORKERS_PATH} and {OPERATOR_PATH}\n")
        return link.refusal(request)

    def accept(connection: ServerConnection, request: Request, response: Response) -> None:
        if request.path == OPERATOR_PATH:
            response.headers[CHANGES_HEADER] = "1"

    async def follow(connection: ServerConnection) -> None:
        assert connection.request is not None
        try:
            await links[connection.request.path].serve(connection)
        except Exception:  # the boundary of a link: `websockets` would log it where nobody looks
            log.exception("a control link failed")

    with listening(config.control_host, config.control_port, "control links", "--control-port"):
        server = await serve(
            follow,
            config.control_host,
            config.control_port,
            process_request=refusal,
            process_response=accept,
            compression=None,
            ping_interval=None,  # both sides beat
            close_timeout=1,
            max_size=MAX_CONTROL_BYTES,
            ssl=config.control_tls.context if config.control_tls else None,
            logger=QUIET,
        )
    async with server:
        yield next(iter(server.sockets)).getsockname()[1]


@contextlib.asynccontextmanager
async def _working(
    gateway: Gateway, config: GatewayConfig, renewal: Renewal
) -> AsyncIterator[None]:
    """What runs beside the listeners."""
    work = [gateway.tick(), gateway.operator.report(), gateway.settle(config.settle_seconds)]
    if config.routes_file is not None:
        routes_file = RoutesFile(config.routes_file, lambda routes: gateway.take(routes, "file"))
        routes_file.look()
        work.append(routes_file.watch())
    if config.control_tls is not None or config.calls_tls is not None:
        work.append(renewal.watch())
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    for task in tasks:
        task.add_done_callback(_report_failure)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _report_failure(task: "asyncio.Task[None]") -> None:
    """These run for ever; one that fails is a bug, and must not end in silence."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("a part of the gateway has stopped", exc_info=error)
