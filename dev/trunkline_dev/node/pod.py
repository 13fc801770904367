"""A pod on the development node: its containers, its status, and its end."""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import aiohttp

from trunkline_dev.kube import STRATEGIC, Api, ApiError, Json
from trunkline_dev.node.container import Container, Sandbox, timestamp
from trunkline_dev.node.events import warn
from trunkline_dev.node.support import refusal

RETRY_SECONDS: Final = 1.0

log = logging.getLogger("trunkline.dev.node")


def pod_path(pod: Json) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def log_file(folder: Path, namespace: str, pod: str, container: str) -> Path:
    """Where a container's output goes, appended over restarts, and over pods of the same name."""
    return folder / f"{namespace}_{pod}_{container}.log"


class Pod:
    """Runs from its start until it is deleted; cancel `run` to kill it."""

    def __init__(
        self,
        manifest: Json,
        *,
        api: Api,
        prober: aiohttp.ClientSession,
        images: Mapping[str, tuple[str, ...]],
        logs: Path,
        address: str,
        host: str,
        pull_seconds: float = 0.0,
    ) -> None:
        self.address, self.host = address, host
        self._api, self._manifest, self._logs = api, manifest, logs
        self._changed, self._updated = asyncio.Event(), asyncio.Event()
        self._conditions: dict[str, Json] = {}
        # More at once than this would be a flood, not news.
        self._warnings: deque[tuple[str, str]] = deque(maxlen=10)
        self.ended = False
        known = {
            each["name"]: each for each in manifest["status"].get("containerStatuses") or []
        }  # There are some if the node itself was started again.
        self._pull_seconds = 0.0 if known else pull_seconds
        sandbox = Sandbox(
            api=api,
            prober=prober,
            images=images,
            address=address,
            host=host,
            refusal=refusal(manifest["spec"]),
            pod=lambda: self._manifest,
            log_file=self.log_file,
            changed=self._changed.set,
            warn=lambda reason, message: self._warnings.append((reason, message)),
        )
        self._containers = [
            Container(spec, sandbox, known.get(spec["name"], {}))
            for spec in manifest["spec"]["containers"]
        ]

    def __repr__(self) -> str:
        states = ", ".join(f"{c.status['name']} {c.status['state']}" for c in self._containers)
        return f"<Pod {pod_path(self._manifest)} {self.address}: {states}>"

    def update(self, manifest: Json) -> None:
        """Tells it what the API server has of it now."""
        self._manifest = manifest
        self._updated.set()

    def log_file(self, container: str) -> Path:
        metadata = self._manifest["metadata"]
        return log_file(self._logs, metadata["namespace"], metadata["name"], container)

    def is_called(self, namespace: str, name: str) -> bool:
        metadata = self._manifest["metadata"]
        return bool(metadata["namespace"] == namespace and metadata["name"] == name)

    @property
    def leaving(self) -> bool:
        return "deletionTimestamp" in self._manifest["metadata"]

    async def run(self) -> None:
        """Runs the containers until the pod is to leave; ends them, and then the pod."""
        if not self.leaving:  # It may be, when the node itself was started again.
            await self._run_containers(self._manifest["spec"]["restartPolicy"])
        self.ended = True
        await self._finish()

    async def _run_containers(self, policy: str) -> None:
        async with asyncio.TaskGroup() as group:
            reporter = group.create_task(self._report())
            runs = [group.create_task(self._run(each, policy)) for each in self._containers]
            for run in runs:
                run.add_done_callback(self._note_end)
            self._runs = runs
            await self._until_leaving()
            await self._end(runs)
            reporter.cancel()

    async def _run(self, container: Container, policy: str) -> None:
        await asyncio.sleep(self._pull_seconds)
        await container.run(policy)

    def _note_end(self, _: asyncio.Task[None]) -> None:
        self.ended = all(run.done() for run in self._runs)
        self._changed.set()

    async def _until_leaving(self) -> None:
        while not self.leaving:
            self._updated.clear()
            await self._updated.wait()

    async def _end(self, runs: list[asyncio.Task[None]]) -> None:
        """Gives the containers their grace, which a second deletion may shorten, and kills the rest."""
        for container, run in zip(self._containers, runs, strict=True):
            container.terminate()
            if not container.alive:  # Waiting to be started; nothing there to end.
                run.cancel()
        loop = asyncio.get_running_loop()
        began, pending = loop.time(), set(runs)
        while pending:
            grace = self._manifest["metadata"].get("deletionGracePeriodSeconds") or 0
            if (left := began + grace - loop.time()) <= 0:
                break
            self._updated.clear()
            news = asyncio.create_task(self._updated.wait())
            try:
                await asyncio.wait(
                    {news, *pending}, timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                news.cancel()
            pending = {run for run in pending if not run.done()}
        for run in pending:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)

    async def _finish(self) -> None:
        """Reports the end, for those who watch, and lets the API server drop the pod."""
        uid = {"uid": self._manifest["metadata"]["uid"]}
        options = {"gracePeriodSeconds": 0, "preconditions": uid}
        while True:
            try:
                await self._write_status()
                await self._api.delete(pod_path(self._manifest), options)
                return
            except ApiError as error:
                if error.status in (404, 409):  # Gone, or another pod of the name is there.
                    return
                log.warning("%s: %s", pod_path(self._manifest), error)
            except (aiohttp.ClientError, TimeoutError) as error:
                log.warning("%s: %r", pod_path(self._manifest), error)
            await asyncio.sleep(RETRY_SECONDS)

    async def _report(self) -> None:
        while True:
            self._changed.clear()
            try:
                await self._write_status()
            except (aiohttp.ClientError, TimeoutError, ApiError) as error:
                log.warning("%s: %r", pod_path(self._manifest), error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            while self._warnings:
                await warn(self._api, self._manifest, *self._warnings.popleft())
            await self._changed.wait()

    async def _write_status(self) -> None:
        body = {"metadata": {"uid": self._manifest["metadata"]["uid"]}, "status": self._status()}
        await self._api.patch(f"{pod_path(self._manifest)}/status", body, media=STRATEGIC)

    def _status(self) -> Json:
        phase = self._phase()
        running = phase == "Running"
        unready = [c.status["name"] for c in self._containers if not c.status["ready"]]
        self._set_condition("PodScheduled", True)
        self._set_condition("Initialized", True)
        self._set_condition("ContainersReady", running and not unready, unready)
        self._set_condition("Ready", running and not unready, unready)
        return {
            "phase": phase,
            "conditions": list(self._conditions.values()),
            "startTime": self._manifest["status"].get("startTime") or timestamp(),
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "hostIP": self.host,
            "hostIPs": [{"ip": self.host}],
            "containerStatuses": [container.status for container in self._containers],
        }

    def _phase(self) -> str:
        if self.ended:
            ends = [c.status["state"].get("terminated", {}) for c in self._containers]
            return "Failed" if any(end.get("exitCode", 1) for end in ends) else "Succeeded"
        return "Running" if all(c.begun for c in self._containers) else "Pending"

    def _set_condition(self, kind: str, holds: bool, unready: list[str] | None = None) -> None:
        old, value = self._conditions.get(kind, {}), str(holds)
        # Null takes away what an earlier word was, such as why the pod was not placed.
        reason = message = None
        if not holds:
            reason, message = "ContainersNotReady", f"containers with unready status: {unready}"
        since = old.get("lastTransitionTime") if old.get("status") == value else timestamp()
        self._conditions[kind] = {
            "type": kind,
            "status": value,
            "reason": reason,
            "message": message,
            "lastTransitionTime": since,
        }
