"""The containers of one deployed definition of a server, and the sessions that they hold."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any, Final

from trunkline_dev.modal import autoscaler
from trunkline_dev.modal.clones import Clones
from trunkline_dev.modal.containers import Container, Machine, Session
from trunkline_dev.modal.faults import Fault, Strike
from trunkline_dev.modal.process import ContainerProcess, Launch, listening, reached
from trunkline_dev.modal.state import Boot, Gpu, Kind, ServerRecord, new_id, now

log = logging.getLogger("trunkline.modal")

TICK_SECONDS: Final = 0.25  # between looks at the clock; every change wakes the autoscaler at once
EXIT_SECONDS: Final = 30.0  # for exit hooks, then SIGKILL
SESSIONS_PER_CONTAINER: Final = 1000  # when the server sets no max_concurrency
BACKOFF_SECONDS: Final = (0.5, 30.0)  # after a start that failed, doubled up to the second
RESTORE_FAILED: Final = 222  # with which Modal's runtime ends a container that it cannot restore


class Pool:
    """Starts and stops containers as `autoscaler` decides, and places sessions in them."""

    def __init__(self, machine: Machine, record: ServerRecord, app: str, launch: Launch) -> None:
        self.definition_id = record.definition_id
        self.containers: dict[str, Container] = {}
        self.waiting: deque[asyncio.Future[Session]] = deque()
        self.drained = asyncio.Event()
        self._machine, self._record, self._app, self._launch = machine, record, app, launch
        self._clones = Clones(
            machine.config.clones,
            make=lambda: self._new_process(new_id("clone")),
            lose=machine.addresses.give_back,
        )
        self._snapshot = False  # a container may be restored
        self._plain_boots = 0  # starts to come without the snapshot, after restores that crashed
        self._draining = False
        self._failures = 0
        self.not_before = 0.0  # of the next start, after one that failed
        self._wake = asyncio.Event()
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
        return [process for process in own + self._clones.processes if process.pid]

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
        if now() >= self.not_before:
            for _ in range(decision.start):
                gpu = self._machine.room(self._app, self._record.gpus)
                if gpu is None:
                    break
                self._start(gpu)
        for name in decision.stop:
            self._stop(self.containers[name])
        calm = not waiting and all(m.ready and not m.sessions for m in members)
        if calm and self._snapshot and not decision.start and len(self._machine.addresses):
            self._clones.replenish()

    def stop(self, name: str) -> None:
        """Tells one container to go, as the autoscaler would."""
        if not self.containers[name].stopping:
            self._stop(self.containers[name])

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

    def _start(self, gpu: Gpu) -> None:
        plain = self._plain_boots > 0
        kind = Kind.RESTORED if self._snapshot and not plain else Kind.COLD
        boot = Boot(
            app=self._app,
            app_id=self._launch.app_id,
            function_id=self._launch.function_id,
            server=self._record.name,
            container=new_id("ta"),
            kind=kind,
            t=now(),
            gpu=gpu.type,
        )
        if kind is Kind.RESTORED:  # it loaded as another container than it goes on as, as at Modal
            process = self._clones.take() or self._new_process(new_id("clone"))
        else:
            process = self._new_process(boot.container, plain=plain)
        container = Container(
            boot=boot,
            process=process,
            port=self._launch.port,
            gpu=gpu,
        )
        self._plain_boots -= plain
        container.quiet.set()
        self.containers[boot.container] = container
        self._machine.take(gpu)
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
                await self._until_end(process)
        finally:
            await process.kill()
            self._ended(container)

    async def _until_end(self, process: ContainerProcess) -> None:
        strike = self._strike(Fault.CONTAINER_KILLED, self._app)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout((strike.seconds or 0.0) if strike else None):
                await process.ended.wait()

    def _strike(self, fault: Fault, subject: str) -> Strike | None:
        return self._machine.state.faults.strike(fault, subject, now())

    def _new_process(self, name: str, *, plain: bool = False) -> ContainerProcess:
        snapshot = bool(self._launch.definition.checkpointing_enabled) and not plain
        address = self._machine.addresses.take()
        return ContainerProcess(self._launch, address, name, snapshot=snapshot)

    async def _becomes_ready(self, container: Container, process: ContainerProcess) -> bool:
        boot, config = container.boot, self._machine.config
        limit = self._launch.definition.http_config.startup_timeout or 30
        least = config.cold_seconds if boot.kind is Kind.COLD else config.restore_seconds
        subject = f"{self._app}/{boot.kind}"
        slow = self._strike(Fault.BOOT_SLOW, subject)
        try:
            async with asyncio.timeout(limit + least):
                await asyncio.sleep((slow.seconds or 0.0) if slow else 0.0)
                if await self._crashes(container, subject, least):
                    return False
                if process.snapshot:
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

    async def _crashes(self, container: Container, subject: str, least: float) -> bool:
        """Ends a start as a fault wants it, after as long as a good one would have taken at least."""
        boot = container.boot
        strike = self._strike(Fault.BOOT_CRASHES, subject)
        if strike is None and boot.kind is Kind.RESTORED:
            strike = self._strike(Fault.RESTORE_CRASHES, self._app)
        if strike is None:
            return False
        await asyncio.sleep(least if strike.seconds is None else strike.seconds)
        boot.error = f"a fault of the local Modal: {strike.rule.fault}"
        if strike.rule.fault is Fault.RESTORE_CRASHES:
            boot.exit = RESTORE_FAILED
        return True

    def _ready(self, container: Container) -> None:
        container.boot.ready_t = container.idle_since = now()
        container.ready = True
        self._failures = 0
        self._snapshot = bool(self._launch.definition.checkpointing_enabled)
        log.info("container ready", extra=asdict(container.boot))
        self.wake()

    def _ended(self, container: Container) -> None:
        boot, process = container.boot, container.process
        boot.end_t = now()
        boot.exit = process.exit_code if boot.exit is None else boot.exit
        boot.error = boot.error or process.error
        if boot.exit == RESTORE_FAILED:
            self._plain_boots += 1  # Modal boots it again at once, without the snapshot
        elif not container.ready and not container.stopping:
            least, most = BACKOFF_SECONDS
            self.not_before = now() + min(most, least * 2**self._failures)
            self._failures += 1
        self._machine.give_back(container.gpu)
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

    # --- the end ----------------------------------------------------------------------------------

    def drain(self) -> None:
        """Starts no more containers; each goes when its sessions have ended."""
        if not self._draining:
            self._draining = True
            self._spawn(self._drain())

    async def _drain(self) -> None:
        await self._clones.close()
        for container in self.containers.values():
            if not container.stopping:
                self._stop(container)
        while self.containers:
            self._wake.clear()
            await self._wake.wait()
        self.drained.set()

    async def close(self) -> None:
        """Kills everything."""
        self._draining = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._clones.close()
        self.drained.set()
