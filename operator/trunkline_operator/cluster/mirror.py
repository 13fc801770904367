"""What the cluster holds of agents and their pods: a look reads it here and asks the API server nothing.

Three tell of it: watches (kopf's of agents, `cluster.watch` of pods and nodes), the answers to our own writes, and lists
(`cluster.tidings`).

Rules
- The newest version of an object counts, whoever brings it. Versions of one resource grow and compare as
  integers (Kubernetes API concepts, "Resource versions": guaranteed since 1.35, and so with etcd before).
- A uid that was deleted stays deleted.
- What a newer list does not have is deleted. So what a lost watch kept back is known by the next list.
- Pods are kept of all agents, known or not: a name may be taken before its agent comes, and they outlive it.
- What is no newer than what is here was looked at, or is what a look has made: it makes no other look.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from trunkline_operator.agent.spec import Json
from trunkline_operator.cluster import listed
from trunkline_operator.cluster.client import Cluster
from trunkline_operator.cluster.nodes import Nodes
from trunkline_operator.decisions.world import PodFacts
from trunkline_runtime.contract import LABEL_AGENT

# Of uids that a late event may still name. What falls out may be shown until the next list.
REMEMBERED: Final = 4096
Edition = tuple[int, object, object]
DELETED: Final = "DELETED"
GONE: Final = -1  # what is told of an object that is no more, instead of a version


def edition_of(obj: Json) -> Edition:
    """What differs after an edit by anybody but the operator: of the spec, of a label, of an annotation."""
    metadata = obj["metadata"]
    return metadata["generation"], metadata.get("labels"), metadata.get("annotations")


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
    """Agents and their pods. `changed(agent)`: look at it. `cluster.tidings` fills it."""

    def __init__(self, cluster: Cluster, changed: Callable[[str], None]) -> None:
        self.cluster = cluster
        self._changed = changed
        self._agents: dict[str, _Agent] = {}
        self._pods: dict[str, _Pod] = {}  # by uid
        self._of: dict[str, set[str]] = {}  # uids of an agent's pods
        self._nodes = Nodes()
        self._gone: dict[str, None] = {}  # uids, the oldest first
        # Of agents that are being looked at: what was heard of which object, by uid.
        self._held: dict[str, set[tuple[str, int]]] = {}
        self.anew = asyncio.Event()
        """A list is due: a watch of agents has begun, or something was not as it was here. Its reader clears it."""

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
        found = (self._nodes.placed(self._pods[uid].facts) for uid in self._of.get(key, ()))
        return tuple(sorted(found, key=lambda pod: pod.name))

    def orphans(self, key: str) -> tuple[PodFacts, ...]:
        """Pods that nobody has asked to go though their agent, of this name, is gone."""
        return tuple(
            pod for pod in self.pods(key) if pod.owner in self._gone and not pod.terminating
        )

    def owners(self, space: str) -> set[str]:
        """uids of the agents that the pods of a namespace ("" = of all) have, or had."""
        return {pod.facts.owner for pod in self._pods.values() if _in(space, pod.agent)} - {""}

    # --- watches --------------------------------------------------------------------------------------

    def knows(self, kind: str | None, obj: Mapping[str, Any]) -> bool:
        """Whether an event says nothing that is not known: `hear_agent` would pass over it."""
        if kind in (None, DELETED):
            return False
        known = self._agents.get(_key(obj["metadata"]))
        return known is not None and known.version >= _version(obj["metadata"])

    def hear_agent(self, kind: str | None, obj: Mapping[str, Any]) -> str:
        """Takes an event in; the agent that must be looked at, "" = none. `kind` None: a watch begins with it."""
        if kind == DELETED:
            gone = obj["metadata"]
            return self._unless_looking(self._drop_agent(gone), (gone["uid"], GONE))
        if kind is None:
            self.anew.set()
        return self._unless_looking(self._put_agent(obj), _news(obj["metadata"]))

    def hear_pod(self, kind: str, obj: Mapping[str, Any]) -> str:
        """Takes an event in; the agent that must be looked at, "" = none."""
        if kind == DELETED:
            uid = obj["metadata"]["uid"]
            return self._unless_looking(self._drop_pod(uid), (uid, GONE))
        return self._unless_looking(self._put_pod(obj), _news(obj["metadata"]))

    def hear_node(self, kind: str, node: Mapping[str, Any]) -> "list[str]":
        """Takes an event in; the agents that must be looked at, because something is new of a node of theirs."""
        name = node["metadata"]["name"]
        news = self._nodes.drop(name) if kind == DELETED else self._nodes.put(node)
        return self._on(name) if news else []

    def _on(self, node: str) -> "list[str]":
        """The agents with a pod there."""
        return sorted({pod.agent for pod in self._pods.values() if pod.facts.node == node})

    def pod_event(self, kind: str, pod: listed.Pod) -> None:
        """As `hear_pod`, and whoever must be looked at is."""
        self._tell_known(self.hear_pod(kind, pod))

    def node_event(self, kind: str, node: listed.Node) -> None:
        """As `hear_node`, likewise."""
        self._tell_known(*self.hear_node(kind, node))

    def _tell_known(self, *keys: str) -> None:
        """Only agents that are there are looked at for their pods."""
        for key in keys:
            if key in self._agents:
                self._changed(key)

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

    def wrote_agent(self, obj: Json, seen: Json) -> None:
        """Takes in what the API made of our write, after a look at the object `seen`."""
        metadata = obj["metadata"]
        key = _key(metadata)
        self._held.get(key, set()).discard(_news(metadata))
        if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
            self._let_go(key, metadata["uid"])
            self._drop_agent(metadata)  # that was the last write to it
            return
        self._put_agent(obj)
        if edition_of(obj) != edition_of(seen):  # of that edit the watch will tell nothing new
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
        self.anew.set()
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

    def listed_agent(self, agent: listed.Agent) -> str:
        """Takes a listed agent in; its uid."""
        known = self._agents.get(agent.name.key)
        if known is None or known.version < int(agent.name.version):
            obj = msgspec.json.decode(agent.text)
            self._tell(self._unless_looking(self._put_agent(obj), _news(obj["metadata"])))
        return agent.name.uid

    def only_agents(self, space: str, uids: set[str], version: int, owners: set[str]) -> None:
        """A list of a namespace ("" = of all) at this version had no others; `owners` of pods were there before it."""
        for key, agent in list(self._agents.items()):
            if _in(space, key) and agent.version <= version and agent.uid not in uids:
                namespace, _, name = key.partition("/")
                left = {"namespace": namespace, "name": name, "uid": agent.uid}
                self._tell(self._drop_agent(left))
        if gone := owners - uids:
            for uid in gone:
                _remember(self._gone, uid)
            for key in {pod.agent for pod in self._pods.values() if pod.facts.owner in gone}:
                if self.orphans(key):
                    self._changed(key)

    def only_pods(self, space: str, uids: set[str], version: int) -> None:
        """Likewise."""
        for uid, pod in list(self._pods.items()):
            if _in(space, pod.agent) and pod.version <= version and uid not in uids:
                self._tell_known(self._drop_pod(uid))

    def only_nodes(self, names: set[str]) -> None:
        """There are no others."""
        for name in self._nodes.others(names):
            self._nodes.drop(name)
            self._tell_known(*self._on(name))

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


def _in(space: str, key: str) -> bool:
    """Whether namespace/name is of that namespace; all are of ""."""
    return not space or key.startswith(f"{space}/")


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
