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
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Final

from trunkline_runtime import __version__
from trunkline_runtime.contract import ENV_HEALTH_PORT, WORKER_PROTOCOL_VERSION, Hello
from trunkline_runtime.engine import Engine, EngineError, Watched
from trunkline_runtime.process import serving_health
from trunkline_runtime.worker.call import CallLimits
from trunkline_runtime.worker.config import ConfigError, WorkerConfig
from trunkline_runtime.worker.control import ControlLinks, Dialling
from trunkline_runtime.worker.metrics import Lateness, WorkerMetrics
from trunkline_runtime.worker.server import CallServer, Desk, spoken_protocols
from trunkline_runtime.worker.switchboard import STOPPING, Switchboard
from trunkline_runtime.worker.tickets import BurstTickets, LinkTickets, Tickets

__all__ = ["ConfigError", "WorkerConfig", "WorkerHost", "make_engine", "run_worker"]

log = logging.getLogger("trunkline.worker")

BROKEN_SECONDS: Final = 10.0  # for the calls of a broken engine; each has 5 s for its last messages
ANY_ADDRESS: Final = ("0.0.0.0", "::")


def make_engine(config: WorkerConfig) -> Engine:
    """The engine that the environment names; only that one is imported."""
    if config.engine == "speech":
        from trunkline_runtime.engine.speech import SpeechEngine

        return SpeechEngine(slots=config.slots)
    if config.engine == "moshi":
        from trunkline_runtime.engine.moshi.configured import moshi_engine

        return moshi_engine(config.slots, auto=config.auto_slots, **asdict(config.moshi))
    from trunkline_runtime.engine.loopback import LoopbackEngine

    return LoopbackEngine(slots=config.slots)


class WorkerHost:
    """One run of a worker. Make it after a snapshot is restored, for its boot id must be new.

    `prepare` brings the engine up, in a thread, once the ports listen; without it the engine is ready.
    `start` says how a container came up; "" where nobody asks.
    """

    def __init__(
        self,
        config: WorkerConfig,
        engine: Engine,
        prepare: Callable[[], None] | None = None,
        *,
        start: str = "",
    ) -> None:
        self._config = config
        self._engine = engine
        self._prepare = prepare
        self._start, self._began = start, time.monotonic()
        self._loaded = False
        self._broken: asyncio.Future[str] | None = None  # what the engine broke of
        self._switchboard: Switchboard | None = None
        self.boot = secrets.token_hex(8)
        self.port = 0  # where calls come in, once it listens
        self.health_port = 0

    def __repr__(self) -> str:
        return f"<WorkerHost {self._config.worker} {self.why_unready() or 'ready'}>"

    def why_unready(self) -> str | None:
        """A worker is ready when its engine is, with or without a gateway; not while it drains."""
        if not self._loaded:
            return self._engine.loading() if isinstance(self._engine, Watched) else "loading"
        if self._broken is not None and self._broken.done():
            return self._broken.result()
        if self._switchboard is not None and self._switchboard.draining:
            return f"draining: {self._switchboard.busy} busy"
        return None

    async def run(self, stop: asyncio.Event, listening: Callable[[], None] | None = None) -> None:
        """Serves until `stop`, then drains: live calls go on, at most for `max_seconds`.

        `listening` is called when both ports are open. Raises `CannotListen`, what `prepare` raises, and
        `EngineError` when the engine breaks, after its calls have been told.
        """
        config, metrics = self._config, WorkerMetrics()
        self._switchboard = switchboard = Switchboard(
            slots=config.slots, worker=config.worker, boot=self.boot
        )
        metrics.watch(switchboard)
        metrics.watch_engine(self._engine)
        async with contextlib.AsyncExitStack() as stack:
            warm = LinkTickets()
            tickets = BurstTickets(config.ticket_key, config.agent) if config.ticket_key else warm
            calls = CallServer(self._desk(switchboard, metrics, tickets))
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
            self._broken = asyncio.get_running_loop().create_future()
            self._watch_engine(switchboard, self._broken)
            self._loaded = True
            log.info("ready", extra={"worker": config.worker, "boot": self.boot})
            late = Lateness(self._engine).share
            links = ControlLinks(self._dialling(), config.gateways, switchboard, warm, late)
            metrics.watch_links(links)
            await self._serve(links, switchboard, stop)

    def _desk(self, switchboard: Switchboard, metrics: WorkerMetrics, tickets: Tickets) -> Desk:
        config = self._config
        return Desk(
            agent=config.agent,
            engine=self._engine,
            switchboard=switchboard,
            tickets=tickets,
            limits=CallLimits(max_seconds=config.max_seconds),
            metrics=metrics,
            protocols=spoken_protocols(),
            why_closed=lambda: None if self._loaded else "the engine is loading",
            started=self._started if self._start else None,
        )

    def _started(self) -> str:
        """The value of START_HEADER."""
        return f"{self._start} {time.monotonic() - self._began:.3f}"

    def _dialling(self) -> Dialling:
        config = self._config
        # A gateway reaches the data server at the address that the link comes from.
        source = None if config.host in ANY_ADDRESS else config.host
        return Dialling(
            hello=self._hello,
            agent=config.agent,
            key=config.worker_key,
            source=source,
            tls=config.tls.gateways if config.tls else None,
        )

    def _hello(self, link: int, ticket_key: str) -> Hello:
        config = self._config
        return Hello(
            type="hello",
            version=WORKER_PROTOCOL_VERSION,
            agent=config.agent,
            worker=config.worker,
            boot=self.boot,
            slots=min(config.slots, self._engine.slots),
            port=self.port,
            protocols=spoken_protocols(),
            build=__version__,
            link=link,
            ticketKey=ticket_key,
        )

    def _watch_engine(self, switchboard: Switchboard, broken: "asyncio.Future[str]") -> None:
        if not isinstance(self._engine, Watched):
            return
        loop = asyncio.get_running_loop()

        def note(what: str) -> None:
            if not broken.done():
                broken.set_result(what)

        def soon(call: Callable[..., None], *of: object) -> None:
            with contextlib.suppress(
                RuntimeError
            ):  # the loop is closed, and the process ends anyway
                loop.call_soon_threadsafe(call, *of)

        self._engine.watch(partial(soon, note), partial(soon, switchboard.offer))

    async def _serve(
        self, links: ControlLinks, switchboard: Switchboard, stop: asyncio.Event
    ) -> None:
        linking = asyncio.ensure_future(links.run())
        stopping = asyncio.ensure_future(stop.wait())
        assert self._broken is not None
        try:
            ending: set[asyncio.Future[Any]] = {linking, stopping, self._broken}
            await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
            # Links that fail are a bug, but no reason to end calls: they finish first.
            await self._drain(switchboard)
            await links.bye()
        finally:
            for task in (linking, stopping):
                task.cancel()
            await asyncio.wait({linking, stopping})
            switchboard.tell()  # what the loop has no time left for
        if self._broken.done():
            raise EngineError(self._broken.result())
        if not linking.cancelled():
            linking.result()

    async def _drain(self, switchboard: Switchboard) -> None:
        switchboard.drain(STOPPING)
        log.info("draining", extra={"worker": self._config.worker, "busy": switchboard.busy})
        assert self._broken is not None
        quiet = asyncio.ensure_future(switchboard.quiet())
        over: set[asyncio.Future[Any]] = {quiet, self._broken}
        await asyncio.wait(
            over,
            timeout=self._config.max_seconds,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not quiet.done() and self._broken.done():
            # Its calls have been told so and are closing.
            await asyncio.wait({quiet}, timeout=BROKEN_SECONDS)
        if not quiet.done():
            log.warning("calls are cut off", extra={"busy": switchboard.busy})
        quiet.cancel()


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
