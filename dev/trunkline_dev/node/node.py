"""The node itself: binds the pods that fit, runs those that are bound to it, and sends heartbeats."""

import asyncio
import contextlib
import logging
import platform
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import aiohttp

from trunkline_dev.kube import STRATEGIC, Api, ApiError, Json, condition
from trunkline_dev.node.config import NodeConfig
from trunkline_dev.node.container import timestamp
from trunkline_dev.node.events import warn
from trunkline_dev.node.logs import serving_logs
from trunkline_dev.node.placement import obstacles
from trunkline_dev.node.pod import Pod, log_file, pod_path

HOST: Final = "127.0.0.1"
HEARTBEAT_SECONDS: Final = 10.0
LEASE_SECONDS: Final = 40
FAREWELL_SECONDS: Final = 2.0
"""What a node that ends spends at most on saying so: the API server may be gone before it."""
FIELD_MANAGER: Final = "trunkline-dev-node"

log = logging.getLogger("trunkline.dev.node")


class Node:
    """Runs until cancelled; then all its containers are killed."""

    def __init__(self, api: Api, config: NodeConfig) -> None:
        self._api, self._config = api, config
        self._hosts, self._capacity = config.hosts(), config.amounts()
        self._labels = {
            "kubernetes.io/hostname": config.name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": {"x86_64": "amd64"}.get(platform.machine(), platform.machine()),
        }
        self._pods: dict[str, tuple[Pod, asyncio.Task[None]]] = {}
        self._since = timestamp()
        self._known: dict[str, Json] = {}
        self._self: dict[str, Json] = {}
        self._selector = f"metadata.name={config.name}"
        self._news = asyncio.Event()
        self.ready = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Node {self._config.name} {[pod for pod, _ in self._pods.values()]}>"

    async def run(self) -> None:
        namespace = self._config.namespace
        path = f"/api/v1/namespaces/{namespace}/pods" if namespace else "/api/v1/pods"
        self._config.logs.mkdir(parents=True, exist_ok=True)
        # A kept connection would make a server that stops wait for it.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        try:
            async with (
                aiohttp.ClientSession(connector=connector) as self._prober,
                serving_logs(self._api, HOST, self._log_file, self._runs) as port,
                asyncio.TaskGroup() as self._group,
            ):
                self._group.create_task(self._heartbeat(port))
                self._group.create_task(self._follow(path, self._known))
                self._group.create_task(self._follow("/api/v1/nodes", self._self, self._selector))
                while True:
                    await self._news.wait()
                    self._news.clear()
                    await self._sync(dict(self._known))
        finally:
            await self._say_farewell()

    async def _follow(self, path: str, known: dict[str, Json], selector: str = "") -> None:
        """Keeps `known` as the API server has it, and calls for a look whenever it changes."""
        changes = self._api.follow(path, fieldSelector=selector)
        async with contextlib.aclosing(changes):
            async for objects in changes:
                known.clear()
                known.update(objects)
                self._news.set()

    # Pods

    async def _sync(self, pods: dict[str, Json]) -> None:
        for uid, (_, task) in list(self._pods.items()):
            if uid not in pods:
                if task.done():  # Until then it holds its address.
                    del self._pods[uid]
                elif not task.cancelling():
                    task.cancel()
        active = [pod for pod in pods.values() if _phase(pod) not in ("Succeeded", "Failed")]
        active.sort(key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))
        for pod in active:
            bound = pod["spec"].get("nodeName")
            if bound == self._config.name:
                self._advance(pod, active)
            elif not bound and self._config.binds and _schedulable(pod):
                for node in self._self.values():  # None before it is registered.
                    await self._schedule(pod, node, active)
        for uid, (running, _) in self._pods.items():
            if uid in pods:
                running.update(pods[uid])

    async def _schedule(self, pod: Json, node: Json, active: list[Json]) -> None:
        placed = [p for p in active if p["spec"].get("nodeName") == self._config.name]
        found = obstacles(pod, node, self._capacity, placed)
        try:
            if not found:
                await self._bind(pod)
                self._advance(pod, active)
                return
            message = f"0/1 nodes are available: {', '.join(f'1 {each}' for each in found)}."
            if condition(pod, "PodScheduled").get("message") != message:
                await self._report_unschedulable(pod, message)
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            # The pod has changed or the server is away; either way the next list brings it again.
            log.warning("%s: %r", pod_path(pod), error)

    async def _bind(self, pod: Json) -> None:
        metadata = {"name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
        target = {"apiVersion": "v1", "kind": "Node", "name": self._config.name}
        binding = {"metadata": metadata, "target": target}
        await self._api.create(f"{pod_path(pod)}/binding", binding)
        pod["spec"]["nodeName"] = self._config.name

    async def _report_unschedulable(self, pod: Json, message: str) -> None:
        unscheduled = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": message,
            "lastTransitionTime": timestamp(),
        }
        body = {"status": {"conditions": [unscheduled]}}
        await self._api.patch(f"{pod_path(pod)}/status", body, media=STRATEGIC)
        await warn(self._api, pod, "FailedScheduling", message)

    def _advance(self, manifest: Json, active: list[Json]) -> None:
        """Starts a pod that is not yet running here."""
        uid = manifest["metadata"]["uid"]
        if uid in self._pods:
            return
        taken = {pod.address for pod, _ in self._pods.values()}
        own = manifest.get("status", {}).get("podIP")
        # A status keeps every address that it ever had, so a pod keeps its own over our restart.
        taken |= {_address(pod) for pod in active if pod is not manifest}
        free = (host for host in self._hosts if host not in taken)
        address = own if own in self._hosts and own not in taken else next(free, "")
        if not address:
            log.warning("%s waits: no address of the node is free", pod_path(manifest))
            return
        pod = Pod(
            manifest,
            api=self._api,
            prober=self._prober,
            images=self._config.images,
            logs=self._config.logs,
            address=address,
            host=HOST,
            pull_seconds=self._config.pull_seconds,
        )
        self._pods[uid] = pod, self._group.create_task(self._run_pod(pod))

    async def _run_pod(self, pod: Pod) -> None:
        try:
            await pod.run()
        except Exception:  # A boundary: one pod's trouble is not the others'.
            log.exception("%r", pod)

    def _log_file(self, namespace: str, pod: str, container: str) -> Path:
        return log_file(self._config.logs, namespace, pod, container)

    def _runs(self, namespace: str, name: str) -> bool:
        return any(
            pod.is_called(namespace, name) and not pod.ended for pod, _ in self._pods.values()
        )

    # Heartbeats

    async def _heartbeat(self, port: int) -> None:
        while True:
            try:
                await self._register(port)
                self.ready.set()
                await self._renew_lease()
            except (aiohttp.ClientError, TimeoutError, ApiError) as error:
                log.warning("heartbeat: %r", error)
                await asyncio.sleep(1.0)
                continue
            await asyncio.sleep(HEARTBEAT_SECONDS)

    @property
    def _path(self) -> str:
        return f"/api/v1/nodes/{self._config.name}"

    async def _register(self, port: int) -> None:
        metadata = {"name": self._config.name, "labels": self._labels}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": metadata}
        await self._api.apply(self._path, node, FIELD_MANAGER)
        capacity = dict(self._config.capacity)
        status = {
            "capacity": capacity,
            "allocatable": capacity,
            "conditions": [self._readiness("True", "NodeReady", "pods run as local processes")],
            "nodeInfo": {"kubeletVersion": FIELD_MANAGER, "operatingSystem": "linux"},
            "addresses": [{"type": "InternalIP", "address": HOST}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
        }
        await self._api.patch(f"{self._path}/status", {"status": status}, media=STRATEGIC)

    async def _renew_lease(self) -> None:
        path = f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{self._config.name}"
        spec = {
            "holderIdentity": self._config.name,
            "leaseDurationSeconds": LEASE_SECONDS,
            "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        }
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._config.name},
            "spec": spec,
        }
        await self._api.apply(path, lease, FIELD_MANAGER)

    def _readiness(self, status: str, reason: str, message: str) -> Json:
        return {
            "type": "Ready",
            "status": status,
            "reason": reason,
            "message": message,
            "lastHeartbeatTime": timestamp(),
            "lastTransitionTime": self._since,
        }

    async def _say_farewell(self) -> None:
        self._since = timestamp()
        gone = self._readiness("False", "NodeStopped", "the development node was stopped")
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                body = {"status": {"conditions": [gone]}}
                await self._api.patch(f"{self._path}/status", body, media=STRATEGIC)
        except (aiohttp.ClientError, TimeoutError, ApiError) as error:
            log.info("the node stops without the API server's knowing: %r", error)


@contextlib.asynccontextmanager
async def running(api: Api, config: NodeConfig) -> AsyncIterator[Node]:
    """A node in this process, Ready on entry; on exit it and all its containers are gone."""
    node = Node(api, config)
    task = asyncio.create_task(node.run())
    registered = asyncio.create_task(node.ready.wait())
    try:
        await asyncio.wait({task, registered}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        yield node
    finally:
        registered.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _phase(pod: Json) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def _address(pod: Json) -> str:
    return str(pod.get("status", {}).get("podIP", ""))


def _schedulable(pod: Json) -> bool:
    spec, metadata = pod["spec"], pod["metadata"]
    mine = spec.get("schedulerName", "default-scheduler") == "default-scheduler"
    return mine and "deletionTimestamp" not in metadata and not spec.get("schedulingGates")
