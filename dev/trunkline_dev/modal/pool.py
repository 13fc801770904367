"""The containers of one deployed definition of a server, and the sessions that they hold."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any, Final

from trunkline_dev.modal import autoscaler
from trunkline_dev.modal.containers import Container, Machine, Session
from trunkline_dev.modal.process import ContainerProcess, Launch
from trunkline_dev.modal.state import Boot, Kind, ServerRecord, new_id, now

log = logging.getLogger("trunkline.modal")

TICK_SECONDS: Final = 0.25  # between looks at the clock; every change wakes the autoscaler at once
PROBE_SECONDS: Final = 0.02  # between tries of a container's port
EXIT_SECONDS: Final = 30.0  # for exit hooks, then SIGKILL
SESSIONS_PER_CONTAINER: Final = 1000  # when the server sets no max_concurrency
BACKOFF_SECONDS: Final = (0.5, 30.0)  # after a start that failed, doubled up to the second
CLONE_FAILURES: Final = 3  # in a row, after which no more clones are made


class Pool:
    """Starts and stops containers as `autoscaler` decides, and places sessions in them."""

    def __init__(self, machine: Machine, record: ServerRecord, app: str, launch: Launch) -> None:
        self.definition_id = record.definition_id
        self.containers: dict[str, Container] = {}
        self.waiting: deque[asyncio.Future[Session]] = deque()
        self.drained = asyncio.Event()
        self._machine, self._record, self._app, self._launch = machine, record, app, launch
        self._clones: list[ContainerProcess] = []
        self._snapshot = False  # a container may be restored
        self._draining = False
        self._failures = self._clone_failures = 0
        self._not_before = 0.0  # of the next start, after one that failed
        self._wake = asyncio.Event()
        self._parking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._spawn(self._scale())

    def __repr__(self) -> str:
        ready = sum(container.ready for container in self.containers.values())
        return (
            f"<Pool {self._record.name} containers={len(self.containers)} ready={ready} "
            f"sessions={self.sessions} waiting={len(self.waiting)} clones={len(self._clones)}>"
        )

    @property
    def sessions(self) -> int:
        return sum(len(container.sessions) for container in self.containers.values())

    @property
    def processes(self) -> list[ContainerProcess]:
        """All that live, clones included."""
        own = [container.process for container in self.containers.values()]
        return [process for process in own + self._clones if process.pid]

    def wake(self) -> None:
        self._wake.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a pool's task failed", exc_info=error)

    # --- the autoscaler ---------------------------------------------------------------------------

    def _settings(self) -> autoscaler.Settings:
        settings = self._record.settings()
        return autoscaler.Settings(
            minimum=settings.min_containers,
            maximum=settings.max_containers,
            buffer=settings.buffer_containers,
            scaledown_window=settings.scaledown_window,
            target=settings.target_concurrency_float or settings.target_concurrency,
        )

    async def _scale(self) -> None:
        while not self._draining:
            self._wake.clear()
            self._place()
            self._adjust()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._wake.wait()

    def _adjust(self) -> None:
        members = [
            autoscaler.Member(
                name=container.boot.container,
                ready=container.ready,
                sessions=len(container.sessions),
                idle_since=container.idle_since,
            )
            for container in self.containers.values()
            if not container.stopping
        ]
        waiting = sum(not future.done() for future in self.waiting)
        decision = autoscaler.decide(self._settings(), members, waiting, now())
        if now() >= self._not_before:
            for _ in range(min(decision.start, self._machine.room)):
                self._start()
        for name in decision.stop:
            self._stop(self.containers[name])
        calm = not waiting and all(m.ready and not m.sessions for m in members)
        if calm and not decision.start:
            self._park()

    def _place(self) -> None:
        """Gives those who wait a container, the emptiest first."""
        most = self._launch.definition.max_concurrent_inputs or SESSIONS_PER_CONTAINER
        while self.waiting:
            if self.waiting[0].done():  # whoever waited has gone
                self.waiting.popleft()
                continue
            free = [
                container
                for container in self.containers.values()
                if container.ready and not container.stopping and len(container.sessions) < most
            ]
            if not free:
                return
            container = min(free, key=lambda container: len(container.sessions))
            session = Session(container, self._release)
            container.sessions.add(session)
            container.quiet.clear()
            self.waiting.popleft().set_result(session)

    def _release(self, session: Session) -> None:
        container = session.container
        if session not in container.sessions:
            return
        container.sessions.remove(session)
        if not container.sessions:
            container.idle_since = now()
            container.quiet.set()
        self.wake()

    # --- a container's life -----------------------------------------------------------------------

    def _start(self) -> None:
        kind = Kind.RESTORED if self._snapshot else Kind.COLD
        boot = Boot(
            app=self._app, server=self._record.name, container=new_id("ta"), kind=kind, t=now()
        )
        process = self._clone() if kind is Kind.RESTORED else None
        container = Container(
            boot=boot,
            process=process or self._new_process(boot.container),
            port=self._launch.port,
        )
        container.quiet.set()
        self.containers[boot.container] = container
        self._machine.running += 1
        self._machine.state.boots.append(boot)
        self._spawn(self._live(container))

    async def _live(self, container: Container) -> None:
        process = container.process
        log.info("container starting", extra=asdict(container.boot))
        try:
            if not process.started:
                await process.start()
            if await self._becomes_ready(container, process):
                self._ready(container)
                await process.ended.wait()
        finally:
            await process.kill()
            self._ended(container)

    def _clone(self) -> ContainerProcess | None:
        """A clone at the snapshot point, or else one on its way there."""
        alive = [clone for clone in self._clones if clone.pid]
        clone = min(alive, key=lambda clone: not clone.at_snapshot.is_set(), default=None)
        if clone:
            self._clones.remove(clone)
        return clone

    def _new_process(self, name: str) -> ContainerProcess:
        snapshot = bool(self._launch.definition.checkpointing_enabled)
        address = self._machine.addresses.take()
        return ContainerProcess(self._launch, address, name, snapshot=snapshot)

    async def _becomes_ready(self, container: Container, process: ContainerProcess) -> bool:
        boot, config = container.boot, self._machine.config
        limit = self._launch.definition.http_config.startup_timeout or 30
        least = config.cold_seconds if boot.kind is Kind.COLD else config.restore_seconds
        try:
            async with asyncio.timeout(limit + least):
                if self._launch.definition.checkpointing_enabled:
                    if not await reached(process, process.at_snapshot):
                        return False
                    process.restore(boot.container)
                if not await reached(process, process.lifecycle_ready):
                    return False
                await listening(process, self._launch.port)
                await asyncio.sleep(boot.t + least - now())
        except TimeoutError:
            boot.error = f"did not listen on port {self._launch.port} within {limit} s"
            return False
        return process.pid is not None

    def _ready(self, container: Container) -> None:
        container.boot.ready_t = container.idle_since = now()
        container.ready = True
        self._failures = 0
        self._snapshot = bool(self._launch.definition.checkpointing_enabled)
        log.info("container ready", extra=asdict(container.boot))
        self.wake()

    def _ended(self, container: Container) -> None:
        boot, process = container.boot, container.process
        boot.end_t, boot.exit = now(), process.exit_code
        boot.error = boot.error or process.error
        if not container.ready and not container.stopping:
            least, most = BACKOFF_SECONDS
            self._not_before = now() + min(most, least * 2**self._failures)
            self._failures += 1
        self._machine.running -= 1
        self._machine.addresses.give_back(process.address)
        del self.containers[boot.container]
        container.ready = False
        log.info("container ended", extra=asdict(boot))
        self.wake()

    def _stop(self, container: Container) -> None:
        container.stopping = True
        self._spawn(self._see_off(container))

    async def _see_off(self, container: Container) -> None:
        """Waits for its sessions, at most the grace period; then SIGTERM, exit hooks, SIGKILL."""
        process = container.process
        if container.ready:
            grace = self._launch.definition.http_config.exit_grace_period
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await container.quiet.wait()
            process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXIT_SECONDS):
                    await process.ended.wait()
        await process.kill()

    # --- clones -----------------------------------------------------------------------------------

    def _park(self) -> None:
        """Makes the next clone, one at a time and only while nothing else goes on."""
        busy = self._parking is not None and not self._parking.done()
        enough = len(self._clones) >= self._machine.config.clones
        able = self._clone_failures < CLONE_FAILURES and len(self._machine.addresses) > 0
        if self._snapshot and able and not busy and not enough:
            self._parking = self._spawn(self._make_clone())

    async def _make_clone(self) -> None:
        clone = self._new_process(new_id("clone"))
        try:
            await clone.start()
        except BaseException:
            await clone.discard()
            self._machine.addresses.give_back(clone.address)
            raise
        self._clones.append(clone)
        if await reached(clone, clone.at_snapshot):
            self._clone_failures = 0
            if clone in self._clones:
                clone.freeze()
        elif clone in self._clones:
            self._clone_failures += 1
            log.warning("a clone failed to reach the snapshot point", extra={"error": clone.error})
            self._clones.remove(clone)
            self._machine.addresses.give_back(clone.address)
        self.wake()

    # --- the end ----------------------------------------------------------------------------------

    def drain(self) -> None:
        """Starts no more containers; each goes when its sessions have ended."""
        if not self._draining:
            self._draining = True
            self._spawn(self._drain())

    async def _drain(self) -> None:
        await self._kill_clones()
        for container in self.containers.values():
            if not container.stopping:
                self._stop(container)
        while self.containers:
            self._wake.clear()
            await self._wake.wait()
        self.drained.set()

    async def _kill_clones(self) -> None:
        if self._parking:
            self._parking.cancel()
            await asyncio.wait([self._parking])
        for clone in self._clones:
            await clone.discard()
            self._machine.addresses.give_back(clone.address)
        self._clones.clear()

    async def close(self) -> None:
        """Kills everything."""
        self._draining = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._kill_clones()
        self.drained.set()


async def reached(process: ContainerProcess, event: asyncio.Event) -> bool:
    """Waits for the event; False when the process ends first."""
    waits = [asyncio.create_task(event.wait()), asyncio.create_task(process.ended.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return event.is_set() and not process.ended.is_set()


async def listening(process: ContainerProcess, port: int) -> None:
    """Returns when the process accepts connections, or has ended."""
    while process.pid is not None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(process.address, port)
            writer.close()
            return
        await asyncio.sleep(PROBE_SECONDS)
