"""Nodes as Kubernetes shows them, and what their kubelets and the scheduler do with an agent's pods."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from operator_rig import Json, World

from trunkline_dev.kube import Api, ApiError, is_true

NODES = "/api/v1/nodes"


@dataclass(frozen=True, slots=True)
class Node:
    """One node, by its name."""

    api: Api
    name: str

    @property
    def path(self) -> str:
        return f"{NODES}/{self.name}"

    async def make(self) -> None:
        """It joins, with a ready kubelet; nothing, if it is there."""
        with contextlib.suppress(ApiError):  # it is there
            await self.api.create(NODES, {"metadata": {"name": self.name}})
        await self.say("True")

    async def say(self, ready: str) -> None:
        """Its condition Ready: True, False, or Unknown where its kubelet is silent."""
        conditions = [{"type": "Ready", "status": ready}]
        await self.api.patch(f"{self.path}/status", {"status": {"conditions": conditions}})

    async def cordon(self, *, on: bool = True) -> None:
        await self.api.patch(self.path, {"spec": {"unschedulable": on or None}})

    async def remove(self) -> None:
        """The Node object goes; nothing, if it is gone."""
        with contextlib.suppress(ApiError):
            await self.api.delete(self.path)


@contextlib.asynccontextmanager
async def a_node(world: World, name: str = "node") -> AsyncIterator[Node]:
    """A node of this world with a ready kubelet."""
    node = Node(world.api, f"{name}-of-{world.namespace}")
    await node.make()
    try:
        yield node
    finally:
        await node.remove()


async def bind(world: World, pod: str, node: str) -> None:
    """What the scheduler does."""
    body = {"metadata": {"name": pod}, "target": {"kind": "Node", "name": node}}
    await world.api.create(f"{world.pods}/{pod}/binding", body)


class Nodes:
    """Two nodes. The scheduler prefers the first one that takes pods."""

    def __init__(self, world: World, first: Node, second: Node) -> None:
        self._world, self.first, self.second = world, first, second

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, world: World) -> AsyncIterator["Nodes"]:
        async with a_node(world, "first") as first, a_node(world, "second") as second:
            yield cls(world, first, second)

    def other(self, name: str) -> Node:
        return self.second if name == self.first.name else self.first

    def named(self, name: str) -> Node:
        return self.first if name == self.first.name else self.second

    async def serve(self, pod: Json) -> None:
        """What the scheduler and a kubelet do next with a pod: bind it, run it, or end it."""
        name, node = pod["metadata"]["name"], pod["spec"].get("nodeName", "")
        well = await self._well()
        if not node:
            if free := [each for each, takes in well.items() if takes]:
                await bind(self._world, name, free[0])
                await self._world.make_ready(name)
        elif node in well:  # else nobody is there who would do anything
            if "deletionTimestamp" in pod["metadata"]:
                await self._end(pod)
            elif not is_true(pod, "Ready"):
                await self._world.make_ready(name)

    async def _end(self, pod: Json) -> None:
        """Like a kubelet, that very pod: another may have its name by now."""
        path = f"{self._world.pods}/{pod['metadata']['name']}"
        uid = pod["metadata"]["uid"]
        await self._world.api.delete(path, {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}})

    async def _well(self) -> dict[str, bool]:
        """Nodes whose kubelet speaks, the first first, and whether they take pods."""
        found = {node["metadata"]["name"]: node for node in await self._world.api.list(NODES)}
        mine = [found[each.name] for each in (self.first, self.second) if each.name in found]
        return {
            node["metadata"]["name"]: not node["spec"].get("unschedulable")
            for node in mine
            if is_true(node, "Ready")
        }

    # --- what happens to the first one

    async def silence(self) -> None:
        """Its kubelet says nothing any more, so Kubernetes marks it and its pods as not ready."""
        with contextlib.suppress(ApiError):  # it is gone
            await self.first.say("Unknown")
            for pod in await self._here():
                conditions = [{"type": "Ready", "status": "False"}]
                path = f"{self._world.pods}/{pod['metadata']['name']}/status"
                await self._world.api.patch(path, {"status": {"conditions": conditions}})

    async def lose(self) -> None:
        """It is gone for good, and Kubernetes deletes its pods."""
        await self.first.remove()
        for pod in await self._here():
            with contextlib.suppress(ApiError):  # the operator was faster
                await self._end(pod)

    async def cordon(self, *, on: bool) -> None:
        with contextlib.suppress(ApiError):  # it is gone
            await self.first.cordon(on=on)

    async def heal(self) -> None:
        """It is there, ready, and takes pods; its kubelet looks after those it has."""
        await self.first.make()
        await self.first.cordon(on=False)
        for pod in await self._here():
            with contextlib.suppress(ApiError):  # it went meanwhile
                await self.serve(pod)

    async def _here(self) -> list[Json]:
        pods = await self._world.api.list(self._world.pods)
        return [pod for pod in pods if pod["spec"].get("nodeName") == self.first.name]
