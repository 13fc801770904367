"""What the cluster holds of agents and their pods: a look reads it here and asks the API server nothing.

Three tell of it: watches, the answers to our own writes, and a list of everything now and then.

Rules
- The newest version of an object counts, whoever brings it. Versions of one resource grow and compare as
  integers (Kubernetes API concepts, "Resource versions": guaranteed since 1.35, and so with etcd before).
- A uid that was deleted stays deleted.
- What a newer list does not have is deleted. So what a lost watch kept back is known by the next list.
- Pods are kept of all agents, known or not: a name may be taken before its agent comes.
- What is no newer than what is here was looked at, or is what a look has made: it makes no other look.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from trunkline_operator.agent.spec import Json
from trunkline_operator.cluster import listed
from trunkline_operator.cluster.client import AGENTS, PODS, ApiError, Cluster, path
from trunkline_operator.decisions.nodes import FINE, NodeFacts
from trunkline_operator.decisions.world import PodFacts
from trunkline_runtime.contract import LABEL_AGENT

# How long a pod or an agent may be wrong here after a watch was lost in silence.
LIST_SECONDS: Final = 30.0
# A watch that begins, or begins anew, does not tell what was deleted before. Nor does it tell when it has begun:
# so there is a list after this time, and others each twice as late.
SOON_SECONDS: Final = 1.0
# A page of pods is up to 3 MB; reading it takes 10 ms, in which nothing else happens.
PAGE: Final = 500
# Of uids that a late event may still name. What falls out may be shown until the next list.
REMEMBERED: Final = 4096
DELETED: Final = "DELETED"
GONE: Final = -1  # what is told of an object that is no more, instead of a version

log = logging.getLogger("trunkline.reconcile")


@dataclass(slots=True)
class _Agent:
    version: int
    uid: str
    text: bytes  # JSON: a tenth of what the same as dicts takes, and read in 20 µs


@dataclass(slots=True)
class _Pod:
    version: int
    agent: str
    facts: PodFacts
    going: bool = False  # the API has agreed to delete it


class Mirror:
    """All agents of these namespaces (none given: of all) and their pods. `changed(agent)`: look at it."""

    def __init__(
        self, cluster: Cluster, namespaces: Sequence[str], changed: Callable[[str], None]
    ) -> None:
        self.cluster = cluster
        self._namespaces = namespaces
        self._changed = changed
        self._agents: dict[str, _Agent] = {}
        self._pods: dict[str, _Pod] = {}  # by uid
        self._of: dict[str, set[str]] = {}  # uids of an agent's pods
        self._nodes: dict[str, NodeFacts] = {}  # those that are not fine
        self._gone: dict[str, None] = {}  # uids, the oldest first
        # Of agents that are being looked at: what was heard of which object, by uid.
        self._held: dict[str, set[tuple[str, int]]] = {}
        self._anew = asyncio.Event()  # a watch has begun

    def __repr__(self) -> str:
        return f"Mirror({len(self._agents)} agents, {len(self._pods)} pods)"

    @property
    def agents(self) -> "list[str]":
        """namespace/name of all that are there."""
        return sorted(self._agents)

    @property
    def uids(self) -> dict[str, str]:
        """uid → namespace/name of all agents that are there."""
        return {agent.uid: key for key, agent in self._agents.items()}

    def agent(self, key: str) -> Json | None:
        """The object without its managed fields, or None if there is none."""
        known = self._agents.get(key)
        if known is None:
            return None
        found: Json = msgspec.json.decode(known.text)
        return found

    def pods(self, key: str) -> tuple[PodFacts, ...]:
        """All pods with the agent's label, whoever owns them."""
        found = (self._placed(self._pods[uid].facts) for uid in self._of.get(key, ()))
        return tuple(sorted(found, key=lambda pod: pod.name))

    # --- watches --------------------------------------------------------------------------------------

    def hear_agent(self, kind: str | None, obj: Mapping[str, Any]) -> str:
        """Takes an event in; the agent that must be looked at, "" = none. `kind` None: a watch begins with it."""
        if kind == DELETED:
            gone = obj["metadata"]
            return self._unless_looking(self._drop_agent(gone), (gone["uid"], GONE))
        if kind is None:
            self._anew.set()
        return self._unless_looking(self._put_agent(obj), _news(obj["metadata"]))

    def hear_pod(self, kind: str | None, obj: Mapping[str, Any]) -> str:
        """Takes an event in; the agent that must be looked at, "" = none."""
        if kind == DELETED:
            uid = obj["metadata"]["uid"]
            return self._unless_looking(self._drop_pod(uid), (uid, GONE))
        if kind is None:
            self._anew.set()
        return self._unless_looking(self._put_pod(obj), _news(obj["metadata"]))

    def hear_node(self, kind: str | None, obj: Mapping[str, Any]) -> "list[str]":
        """Takes an event in; the agents that must be looked at, because something is new of a node of theirs."""
        name, facts = obj["metadata"]["name"], NodeFacts.of(obj)
        if kind == DELETED:
            facts = FINE  # Kubernetes deletes its pods
        if facts == self._nodes.get(name, FINE):
            return []
        if facts == FINE:
            del self._nodes[name]
        else:
            self._nodes[name] = facts
        return sorted({pod.agent for pod in self._pods.values() if pod.facts.node == name})

    def _placed(self, pod: PodFacts) -> PodFacts:
        node = self._nodes.get(pod.node)
        return pod.on(node) if node else pod

    # --- looks and what they write --------------------------------------------------------------------

    @contextlib.contextmanager
    def looking(self, key: str) -> Iterator[None]:
        """What is heard of this agent meanwhile is looked at afterwards, but for what the look has made."""
        self._held[key] = set()
        try:
            yield
        finally:
            if self._held.pop(key):
                self._changed(key)

    def wrote_agent(self, obj: Json, seen_generation: int) -> None:
        """Takes in what the API made of our write, after a look at that generation."""
        metadata = obj["metadata"]
        key = _key(metadata)
        self._held.get(key, set()).discard(_news(metadata))
        if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
            self._let_go(key, metadata["uid"])
            self._drop_agent(metadata)  # that was the last write to it
            return
        self._put_agent(obj)
        if metadata["generation"] != seen_generation:
            self._changed(key)

    def made_pod(self, obj: Json) -> None:
        """Takes in a pod that the API has just made for us."""
        self._put_pod(obj)
        self._held.get(_owner(obj["metadata"]), set()).discard(_news(obj["metadata"]))

    def marked_pod(self, obj: Json) -> None:
        """Takes in a pod that we have just annotated: its drain, or whether it may be evicted."""
        before = self._pods.get(obj["metadata"]["uid"])
        seen = before.facts if before else None
        if agent := self._put_pod(obj):  # else a watch was faster, and what it told is held
            after = self._pods[obj["metadata"]["uid"]].facts
            if seen is None or _but_for_marks(after, seen) != seen:
                self._changed(agent)  # it says more than the look has seen

    def ended_pod(self, obj: Json) -> None:
        """Takes in that a pod is gone, as the API has just answered."""
        self._let_go(_owner(obj["metadata"]), obj["metadata"]["uid"])
        self._drop_pod(obj["metadata"]["uid"])

    def asked_to_go(self, uid: str) -> None:
        """The API has agreed to delete a pod; a watch tells when it is gone."""
        if known := self._pods.get(uid):
            known.going = True
            known.facts = replace(known.facts, terminating=True)

    def missing(self, uid: str) -> None:
        """The API says that there is no such pod; a list soon tells whether it is so."""
        self._anew.set()
        self._tell(self._drop_pod(uid, for_ever=False))

    def _unless_looking(self, key: str, news: tuple[str, int]) -> str:
        if key in self._held:
            self._held[key].add(news)
            return ""
        return key

    def _let_go(self, key: str, uid: str) -> None:
        """Whatever was heard of what the look has seen gone, before or while it went: nobody need look at that."""
        held = self._held.get(key, set())
        held -= {news for news in held if news[0] == uid}

    # --- lists ----------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Lists everything once, then now and then."""
        await self.list()
        task = asyncio.create_task(self._list_again(), name="mirror")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def list(self) -> None:
        """Has everything as it is now."""
        # Pods first: an agent that is known has its pods known.
        await self._list("Pod", PODS, listed.pods, self._take_pod, LABEL_AGENT)
        await self._list("VoiceAgent", AGENTS, listed.agents, self._take_agent)

    async def _list_again(self) -> None:
        delay = SOON_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._anew.wait(), delay)
                await asyncio.sleep(SOON_SECONDS)
                self._anew.clear()
                delay = SOON_SECONDS
            delay = min(2 * delay, LIST_SECONDS)
            try:
                await self.list()
            except ApiError as error:
                log.warning("agents and pods cannot be listed: %s", error)

    async def _list(
        self,
        kind: str,
        everywhere: str,
        read: listed.Reader[listed.Item],
        take: Callable[[listed.Item], str],
        label: str = "",
    ) -> None:
        for namespace in self._namespaces or [""]:
            seen: set[str] = set()
            version = 0
            where = path(kind, namespace) if namespace else everywhere
            async for page in self.cluster.pages(where, read, PAGE, label):
                version = page.version
                seen.update(map(take, page.items))
            self._drop_all_but(seen, kind, namespace, version)

    def _take_pod(self, pod: listed.Pod) -> str:
        """Takes a listed pod in; its uid."""
        metadata = pod["metadata"]
        self._tell(self._unless_looking(self._put_pod(pod), _news(metadata)))
        return metadata["uid"]

    def _take_agent(self, agent: listed.Agent) -> str:
        """Takes a listed agent in; its uid."""
        known = self._agents.get(agent.name.key)
        if known is None or known.version < int(agent.name.version):
            obj = msgspec.json.decode(agent.text)
            self._tell(self._unless_looking(self._put_agent(obj), _news(obj["metadata"])))
        return agent.name.uid

    def _drop_all_but(self, seen: set[str], kind: str, namespace: str, version: int) -> None:
        """What a list of this version did not have."""
        here = f"{namespace}/" if namespace else ""
        if kind == "Pod":
            for uid, pod in list(self._pods.items()):
                if pod.agent.startswith(here) and pod.version <= version and uid not in seen:
                    self._tell(self._drop_pod(uid))
            return
        for key, agent in list(self._agents.items()):
            if key.startswith(here) and agent.version <= version and agent.uid not in seen:
                namespace_, _, name = key.partition("/")
                gone = {"namespace": namespace_, "name": name, "uid": agent.uid}
                self._tell(self._drop_agent(gone))

    def _tell(self, key: str) -> None:
        if key:
            self._changed(key)

    # --- one object -----------------------------------------------------------------------------------

    def _put_agent(self, obj: Mapping[str, Any]) -> str:
        """The agent, if this is news of it."""
        metadata = obj["metadata"]
        key, version = _key(metadata), _version(metadata)
        known = self._agents.get(key)
        if metadata["uid"] in self._gone or (known and known.version >= version):
            return ""
        slim = {name: value for name, value in metadata.items() if name != "managedFields"}
        text = msgspec.json.encode({**obj, "metadata": slim})
        self._agents[key] = _Agent(version, metadata["uid"], text)
        return key

    def _drop_agent(self, metadata: Json) -> str:
        """The agent, if it was here; another may have its name by now."""
        key, uid = _key(metadata), metadata["uid"]
        _remember(self._gone, uid)
        known = self._agents.get(key)
        if known is None or known.uid != uid:
            return ""
        del self._agents[key]
        return key

    def _put_pod(self, obj: Mapping[str, Any]) -> str:
        """The agent of a pod of which something is new that a look would see."""
        metadata = obj["metadata"]
        uid, version, agent = metadata["uid"], _version(metadata), _owner(metadata)
        known = self._pods.get(uid)
        if uid in self._gone or (known and known.version >= version):
            return ""
        facts, going = PodFacts.of(obj), known is not None and known.going
        if going:
            facts = replace(facts, terminating=True)
        if (
            known and known.agent != agent
        ):  # its label was changed, and the other agent has one less
            self._changed(known.agent)
            self._leave(known.agent, uid)
        self._pods[uid] = _Pod(version, agent, facts, going)
        self._of.setdefault(agent, set()).add(uid)
        return agent if known is None or known.agent != agent or known.facts != facts else ""

    def _drop_pod(self, uid: str, *, for_ever: bool = True) -> str:
        """The agent whose pod it was, if it was here."""
        if for_ever:
            _remember(self._gone, uid)
        known = self._pods.pop(uid, None)
        if known is None:
            return ""
        self._leave(known.agent, uid)
        return known.agent

    def _leave(self, agent: str, uid: str) -> None:
        self._of[agent].discard(uid)
        if not self._of[agent]:
            del self._of[agent]


def _but_for_marks(after: PodFacts, seen: PodFacts) -> PodFacts:
    """The pod, with what we write on it as it was seen."""
    return replace(after, draining_since=seen.draining_since, protected=seen.protected)


def _key(metadata: Mapping[str, Any]) -> str:
    return f"{metadata['namespace']}/{metadata['name']}"


def _owner(metadata: Mapping[str, Any]) -> str:
    return f"{metadata['namespace']}/{metadata['labels'][LABEL_AGENT]}"


def _news(metadata: Mapping[str, Any]) -> tuple[str, int]:
    """What is told by an object at this version."""
    return metadata["uid"], _version(metadata)


def _version(metadata: Mapping[str, Any]) -> int:
    return int(metadata["resourceVersion"])


def _remember(things: dict[str, None], thing: str) -> None:
    things[thing] = None
    if len(things) > REMEMBERED:
        del things[next(iter(things))]
