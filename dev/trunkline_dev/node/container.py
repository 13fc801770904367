"""One container of a pod, run as a process group of this machine."""

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import aiohttp

from trunkline_dev.kube import Api, Json
from trunkline_dev.leash import leashed
from trunkline_dev.node.environment import Environment, Misconfigured, expand
from trunkline_dev.node.probes import verdicts

BACKOFF_SECONDS, BACKOFF_MAX_SECONDS = 1.0, 60.0
"""The first restart is at once, then they back off, doubling: ten times sooner than the kubelet's."""
FORGIVEN_SECONDS: Final = 600.0
"""Who ran this long has its crashes forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """What the containers of one pod share."""

    api: Api
    prober: aiohttp.ClientSession
    images: Mapping[str, tuple[str, ...]]
    address: str
    host: str
    refusal: str | None
    pod: Callable[[], Json]
    log_file: Callable[[str], Path]
    changed: Callable[[], None]
    warn: Callable[[str, str], None]


def timestamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Container:
    """`status` is its entry in the pod's containerStatuses; its containerID is process://<pid>."""

    def __init__(self, spec: Json, sandbox: Sandbox, previous: Json) -> None:
        self.spec, self._sandbox = spec, sandbox
        self._process: asyncio.subprocess.Process | None = None
        self._leaving = False
        self.status: Json = {
            "name": spec["name"],
            "image": spec["image"],
            "imageID": "",
            "ready": False,
            "started": False,
            "state": {"waiting": {"reason": "ContainerCreating"}},
            "lastState": previous.get("state", {}),
            "restartCount": previous.get("restartCount", -1) + 1,
        }

    @property
    def begun(self) -> bool:
        """Whether it has ever run."""
        return self._process is not None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def terminate(self) -> None:
        """Asks it to end, and it is not started again. As in a pod, only its first process is told."""
        self._leaving = True
        if self._process and self.alive:
            self._process.terminate()

    async def run(self, policy: str) -> None:
        """Keeps it running as the pod's restart policy says; cancel it to kill the container."""
        crashes = 0
        while True:
            began = time.monotonic()
            try:
                code = await self._execute()
            except Misconfigured as error:
                self._hold("CreateContainerConfigError", str(error))
                # A missing Secret may come; what the node cannot do stays so.
                await asyncio.sleep(BACKOFF_SECONDS)
                continue
            if self._leaving or policy == "Never" or (policy == "OnFailure" and code == 0):
                return
            self._update(lastState=self.status["state"])
            crashes = 1 if time.monotonic() - began > FORGIVEN_SECONDS else crashes + 1
            if crashes > 1:
                delay = min(BACKOFF_SECONDS * 2 ** (crashes - 2), BACKOFF_MAX_SECONDS)
                self._hold("CrashLoopBackOff", f"back-off {delay:g}s restarting the container")
                await asyncio.sleep(delay)
            self.status["restartCount"] += 1

    def _update(self, **status: object) -> None:
        self.status |= status
        self._sandbox.changed()

    def _hold(self, reason: str, message: str) -> None:
        state = {"waiting": {"reason": reason, "message": message}}
        if self.status["state"] != state:
            self._update(state=state)
            self._sandbox.warn(reason, message)

    async def _execute(self) -> int:
        """Runs it once, from start to end, and returns the exit code."""
        if self._sandbox.refusal:
            raise Misconfigured(self._sandbox.refusal)
        process = self._process = await self._start()
        began = timestamp()
        self._update(
            state={"running": {"startedAt": began}},
            containerID=f"process://{process.pid}",
            started=not self.spec.get("startupProbe"),
            ready=not (self.spec.get("startupProbe") or self.spec.get("readinessProbe")),
        )
        async with asyncio.TaskGroup() as group:
            health = group.create_task(self._watch_health())
            try:
                code = await process.wait()
            finally:
                health.cancel()
                self._kill()
                await process.wait()
        code = code if code >= 0 else 128 - code
        ended = {"exitCode": code, "reason": "Error" if code else "Completed"}
        ended |= {"startedAt": began, "finishedAt": timestamp()}
        self._update(state={"terminated": ended}, started=False, ready=False)
        return code

    async def _start(self) -> asyncio.subprocess.Process:
        sandbox, spec = self._sandbox, self.spec
        environment = Environment(sandbox.api, sandbox.pod(), sandbox.address, sandbox.host)
        variables = await environment.of(spec)
        command = spec.get("command") or sandbox.images.get(spec["image"])
        if not command:
            raise Misconfigured(
                f"the development node knows no command for image {spec['image']}; "
                f"start it with --image '{spec['image']}=COMMAND'"
            )
        argv = [expand(word, variables) for word in (*command, *(spec.get("args") or ()))]
        if not shutil.which(argv[0], path=variables["PATH"]):
            raise Misconfigured(f"there is no program {argv[0]}")
        directory = spec.get("workingDir") or None
        if directory and not Path(directory).is_dir():
            raise Misconfigured(f"there is no folder {directory} to work in")
        try:
            with sandbox.log_file(spec["name"]).open("ab") as output:
                return await asyncio.create_subprocess_exec(
                    *leashed(argv),
                    env=variables,
                    cwd=directory,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:  # The latter for a null byte in the environment.
            raise Misconfigured(f"{argv[0]} cannot be started: {error}") from error

    def _kill(self) -> None:
        """Kills whatever is left of the process group."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _watch_health(self) -> None:
        if probe := self.spec.get("startupProbe"):
            patience = probe.get("failureThreshold", 3) * probe.get("periodSeconds", 10)
            patience += probe.get("initialDelaySeconds", 0)
            try:
                async with (
                    asyncio.timeout(patience),
                    contextlib.aclosing(self._verdicts(probe, healthy=False)) as found,
                ):
                    await anext(found)
            except TimeoutError:
                await self._give_up(probe)
                return
            self._update(started=True, ready=not self.spec.get("readinessProbe"))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_readiness())
            group.create_task(self._watch_liveness())

    async def _watch_readiness(self) -> None:
        if probe := self.spec.get("readinessProbe"):
            async with contextlib.aclosing(self._verdicts(probe, healthy=False)) as found:
                async for ready in found:
                    self._update(ready=ready)

    async def _watch_liveness(self) -> None:
        if probe := self.spec.get("livenessProbe"):
            async with contextlib.aclosing(self._verdicts(probe, healthy=True)) as found:
                await anext(found)
            await self._give_up(probe)

    def _verdicts(self, probe: Json, *, healthy: bool) -> AsyncGenerator[bool, None]:
        return verdicts(
            self._sandbox.prober, self.spec, probe, self._sandbox.address, healthy=healthy
        )

    async def _give_up(self, probe: Json) -> None:
        """Ends it for its own bad health; the restart policy takes it from there."""
        if self._leaving or not self._process:
            return
        self._process.terminate()
        spec = self._sandbox.pod()["spec"]
        grace = probe.get("terminationGracePeriodSeconds", spec["terminationGracePeriodSeconds"])
        await asyncio.sleep(grace)
        self._kill()
