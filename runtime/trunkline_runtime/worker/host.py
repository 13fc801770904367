"""A worker process, assembled: engine, slots, data server, links to gateways, health. Hosted by a Pod
through `run_worker`, and by a Modal container, which has loaded its engine before a snapshot, through
`WorkerHost`.
"""

import asyncio
import contextlib
import gc
import logging
import secrets
import signal
from collections.abc import Callable
from typing import Final

from trunkline_runtime import __version__
from trunkline_runtime.contract import ENV_HEALTH_PORT, PROTOCOL_VERSION, Hello
from trunkline_runtime.engine import Engine
from trunkline_runtime.process import serving_health
from trunkline_runtime.worker.call import CallLimits
from trunkline_runtime.worker.config import ConfigError, WorkerConfig
from trunkline_runtime.worker.control import ControlLinks, Dialling
from trunkline_runtime.worker.metrics import WorkerMetrics
from trunkline_runtime.worker.server import CallServer, Desk
from trunkline_runtime.worker.switchboard import STOPPING, Switchboard
from trunkline_runtime.worker.tickets import BurstTickets

__all__ = ["ConfigError", "WorkerConfig", "WorkerHost", "make_engine", "run_worker"]

log = logging.getLogger("trunkline.worker")

ANY_ADDRESS: Final = ("0.0.0.0", "::")


def make_engine(config: WorkerConfig) -> Engine:
    """The engine that the environment names; only that one is imported."""
    if config.engine == "speech":
        from trunkline_runtime.engine.speech import SpeechEngine

        return SpeechEngine(slots=config.slots)
    from trunkline_runtime.engine.loopback import LoopbackEngine

    return LoopbackEngine(slots=config.slots)


class WorkerHost:
    """One run of a worker. Make it after a snapshot is restored, for its boot id must be new.

    `prepare` brings the engine up, in a thread, once the ports listen; without it the engine is ready.
    """

    def __init__(
        self, config: WorkerConfig, engine: Engine, prepare: Callable[[], None] | None = None
    ) -> None:
        self._config = config
        self._engine = engine
        self._prepare = prepare
        self._loaded = False
        self._switchboard: Switchboard | None = None
        self.boot = secrets.token_hex(8)
        self.port = 0  # where calls come in, once it listens
        self.health_port = 0

    def __repr__(self) -> str:
        return f"<WorkerHost {self._config.worker} {self.why_unready() or 'ready'}>"

    def why_unready(self) -> str | None:
        """A worker is ready when its engine is, with or without a gateway; not while it drains."""
        if not self._loaded:
            return "loading"
        if self._switchboard is not None and self._switchboard.draining:
            return f"draining: {self._switchboard.busy} busy"
        return None

    async def run(self, stop: asyncio.Event, listening: Callable[[], None] | None = None) -> None:
        """Serves until `stop`, then drains: live calls go on, at most for `max_seconds`.

        `listening` is called when both ports are open. Raises `CannotListen`, and what `prepare` raises.
        """
        config, metrics = self._config, WorkerMetrics()
        self._switchboard = switchboard = Switchboard(
            slots=config.slots, worker=config.worker, boot=self.boot
        )
        metrics.watch(switchboard)
        metrics.watch_engine(self._engine)
        async with contextlib.AsyncExitStack() as stack:
            calls = CallServer(self._desk(switchboard, metrics))
            health = serving_health(
                config.host,
                config.health_port,
                self.why_unready,
                metrics.registry,
                ENV_HEALTH_PORT,
            )
            self.health_port = await stack.enter_async_context(health)
            self.port = await stack.enter_async_context(
                calls.serving(config.host, config.port, config.tls.calls if config.tls else None)
            )
            if listening is not None:
                listening()
            if self._prepare is not None:
                await asyncio.to_thread(self._prepare)
            self._loaded = True
            log.info("ready", extra={"worker": config.worker, "boot": self.boot})
            links = ControlLinks(self._dialling(), config.gateways, switchboard)
            metrics.watch_links(links)
            await self._serve(links, switchboard, stop)

    def _desk(self, switchboard: Switchboard, metrics: WorkerMetrics) -> Desk:
        config = self._config
        return Desk(
            agent=config.agent,
            engine=self._engine,
            switchboard=switchboard,
            tickets=BurstTickets(config.ticket_key, config.agent) if config.ticket_key else None,
            limits=CallLimits(max_seconds=config.max_seconds),
            metrics=metrics,
            why_closed=lambda: None if self._loaded else "the engine is loading",
        )

    def _dialling(self) -> Dialling:
        config = self._config
        # A gateway reaches the data server at the address that the link comes from.
        source = None if config.host in ANY_ADDRESS else config.host
        return Dialling(
            hello=self._hello(),
            key=config.worker_key,
            source=source,
            tls=config.tls.gateways if config.tls else None,
        )

    def _hello(self) -> Hello:
        config = self._config
        return Hello(
            type="hello",
            version=PROTOCOL_VERSION,
            agent=config.agent,
            worker=config.worker,
            boot=self.boot,
            slots=config.slots,
            port=self.port,
            protocols=["realtime"],
            build=__version__,
        )

    async def _serve(
        self, links: ControlLinks, switchboard: Switchboard, stop: asyncio.Event
    ) -> None:
        linking = asyncio.ensure_future(links.run())
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({linking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            # Links that fail are a bug, but no reason to end calls: they finish first.
            await self._drain(switchboard)
            await links.bye()
        finally:
            for task in (linking, stopping):
                task.cancel()
            await asyncio.wait({linking, stopping})
        if not linking.cancelled():
            linking.result()

    async def _drain(self, switchboard: Switchboard) -> None:
        switchboard.drain(STOPPING)
        log.info("draining", extra={"worker": self._config.worker, "busy": switchboard.busy})
        try:
            async with asyncio.timeout(self._config.max_seconds):
                await switchboard.quiet()
        except TimeoutError:
            log.warning("calls are cut off", extra={"busy": switchboard.busy})


async def run_worker(config: WorkerConfig) -> None:
    """A whole worker process: until SIGTERM or SIGINT and the end of its calls."""
    engine, stop = make_engine(config), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def prepare() -> None:
        engine.load()
        engine.resume()
        # A full collection over what the engine loaded would stop every call for 10 ms or more.
        gc.collect()
        gc.freeze()

    try:
        await WorkerHost(config, engine, prepare).run(stop)
    finally:
        engine.close()
