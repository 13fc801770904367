"""What brings the mirror its news, but for kopf's watch of agents: watches of pods and nodes, and lists.

All of it is of the operator that acts: one that stands by has no mirror.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Final

from trunkline_operator import parts
from trunkline_operator.cluster import listed
from trunkline_operator.cluster.client import AGENTS, NODES, PODS, ApiError, path
from trunkline_operator.cluster.mirror import Mirror
from trunkline_operator.cluster.watch import Watch
from trunkline_runtime.contract import LABEL_AGENT

# How long a pod or an agent may be wrong here after a watch was lost in silence.
LIST_SECONDS: Final = 30.0
# A watch of kopf's that begins, or begins anew, does not tell what was deleted before. Nor does it tell when it has
# begun: so there is a list after this time, and others each twice as late.
SOON_SECONDS: Final = 1.0
# A page of pods is up to 3 MB; reading it takes 10 ms, in which nothing else happens.
PAGE: Final = 500
log = logging.getLogger("trunkline.reconcile")


class Tidings:
    """Of these namespaces (none given: of all), for one mirror. `nodes`: they may be watched."""

    def __init__(self, mirror: Mirror, namespaces: Sequence[str], *, nodes: bool = False) -> None:
        self._mirror = mirror
        self._namespaces = namespaces or [""]
        self._nodes = nodes

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Lists everything once, then now and then, and watches pods and nodes."""
        versions = await self.list()
        watches = [self._pods_of(space).follow(version) for space, version in versions.items()]
        if self._nodes:
            watches.append(self._all_nodes().follow())
        async with parts.running(self._list_again(), *watches, name="what tells of the cluster"):
            yield

    async def list(self) -> dict[str, int]:
        """Has all agents and pods as they are now; by namespace, the version of the list of its pods."""
        # Pods first: an agent that is known has its pods known.
        versions = {space: await self._list_pods(space) for space in self._namespaces}
        for space in self._namespaces:
            await self._list_agents(space)
        return versions

    async def _list_again(self) -> None:
        delay, anew = SOON_SECONDS, self._mirror.anew
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(anew.wait(), delay)
                await asyncio.sleep(SOON_SECONDS)
                anew.clear()
                delay = SOON_SECONDS
            delay = min(2 * delay, LIST_SECONDS)
            try:
                await self.list()
            except ApiError as error:
                log.warning("agents and pods cannot be listed: %s", error)

    def _pods_of(self, space: str) -> Watch[listed.Pod]:
        return Watch(
            cluster=self._mirror.cluster,
            path=where("Pod", space),
            label=LABEL_AGENT,
            read=listed.pod,
            lists=lambda: self._list_pods(space),
            hear=self._mirror.pod_event,
        )

    def _all_nodes(self) -> Watch[listed.Node]:
        return Watch(
            cluster=self._mirror.cluster,
            path=NODES,
            read=listed.node,
            lists=self._list_nodes,
            hear=self._mirror.node_event,
        )

    async def _list_pods(self, space: str) -> int:
        """Has the pods of a namespace as they are now; the version of that."""
        seen, version = set[str](), 0
        pages = self._mirror.cluster.pages(where("Pod", space), listed.pods, PAGE, LABEL_AGENT)
        async for page in pages:
            version = page.version
            for pod in page.items:
                seen.add(pod["metadata"]["uid"])
                self._mirror.pod_event("", pod)
        self._mirror.only_pods(space, seen, version)
        return version

    async def _list_agents(self, space: str) -> None:
        seen, version = set[str](), 0
        owners = self._mirror.owners(space)
        pages = self._mirror.cluster.pages(where("VoiceAgent", space), listed.agents, PAGE)
        async for page in pages:
            version = page.version
            seen.update(map(self._mirror.listed_agent, page.items))
        self._mirror.only_agents(space, seen, version, owners)

    async def _list_nodes(self) -> int:
        """Has all nodes as they are now; the version of that."""
        seen, version = set[str](), 0
        async for page in self._mirror.cluster.pages(NODES, listed.nodes, PAGE):
            version = page.version
            for node in page.items:
                seen.add(node["metadata"]["name"])
                self._mirror.node_event("", node)
        self._mirror.only_nodes(seen)
        return version


def where(kind: str, space: str) -> str:
    """The path of all of a kind in a namespace; "" = in all."""
    return path(kind, space) if space else {"Pod": PODS, "VoiceAgent": AGENTS}[kind]
