"""What is read of a list's answer, and of a watch's events: of a pod or node what a look sees, of an agent where and
which it is, of an EndpointSlice its addresses.

A list is most of what an operator at rest does. Half of a pod's 6 KB of JSON are its managed fields, and of the rest
a look sees little. What is not declared here is passed over without being made into objects: 5 MB of a thousand pods
were read in 22 ms, where `json.loads` took 300 and orjson 3.13, which makes objects of everything, no less (2 cores of
a busy machine). An agent is text until its version says that it is news.
"""

from collections.abc import Callable
from typing import Any, Final, Generic, TypedDict, TypeVar

import msgspec

Item = TypeVar("Item")


class Metadata(TypedDict, total=False):
    """Of a pod or node."""

    name: str
    namespace: str
    uid: str
    resourceVersion: str
    creationTimestamp: str | None
    deletionTimestamp: str | None
    labels: dict[str, str] | None
    annotations: dict[str, str] | None
    ownerReferences: list[dict[str, Any]] | None


class Object(TypedDict):
    """Whatever has a name and a version."""

    metadata: Metadata


class PodSpec(TypedDict, total=False):
    nodeName: str


class Pod(Object, total=False):
    """As `PodFacts.of` takes it, and the mirror."""

    spec: PodSpec
    status: dict[str, Any]


class NodeSpec(TypedDict, total=False):
    taints: list[dict[str, Any]] | None
    unschedulable: bool


class NodeStatus(TypedDict, total=False):
    conditions: list[dict[str, Any]] | None


class Node(Object, total=False):
    """As `NodeFacts.of` takes it. Most of a node is the images that it holds."""

    spec: NodeSpec
    status: NodeStatus


class Endpoint(TypedDict):
    addresses: list[str]


class Slice(Object, total=False):
    """An EndpointSlice: some of the addresses behind a Service."""

    endpoints: list[Endpoint] | None


class Name(msgspec.Struct, frozen=True, gc=False):
    """Which agent it is, and in which version."""

    namespace: str
    name: str
    uid: str
    version: str = msgspec.field(name="resourceVersion")

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


class _Named(msgspec.Struct, gc=False):
    metadata: Name


class Agent(msgspec.Struct, frozen=True):
    """One agent; `text` is all of it as JSON, and holds the whole page in memory."""

    name: Name
    text: msgspec.Raw


class Mark(msgspec.Struct):
    """How far a list or a watch has come."""

    version: str = msgspec.field(name="resourceVersion")


class _ListMeta(Mark):
    rest: str = msgspec.field(name="continue", default="")


class _List(msgspec.Struct, Generic[Item]):
    metadata: _ListMeta
    items: list[Item] | None


class Page(msgspec.Struct, Generic[Item]):
    """Some of a list's items, the version of the whole list, and by which word it goes on; "" = it ends here."""

    version: int
    items: list[Item]
    rest: str


Reader = Callable[[bytes], Page[Item]]
"""Reads an answer; raises `msgspec.MsgspecError` for what is no such list."""

_POD: Final = msgspec.json.Decoder(Pod)
_NODE: Final = msgspec.json.Decoder(Node)
_SLICE: Final = msgspec.json.Decoder(Slice)
_PODS: Final = msgspec.json.Decoder(_List[Pod])
_NODES: Final = msgspec.json.Decoder(_List[Node])
_SLICES: Final = msgspec.json.Decoder(_List[Slice])
_AGENTS: Final = msgspec.json.Decoder(_List[msgspec.Raw])
_NAMED: Final = msgspec.json.Decoder(_Named)


def pods(text: bytes) -> Page[Pod]:
    """A `Reader` of pods."""
    found = _PODS.decode(text)
    return Page(int(found.metadata.version), found.items or [], found.metadata.rest)


def nodes(text: bytes) -> Page[Node]:
    """A `Reader` of nodes."""
    found = _NODES.decode(text)
    return Page(int(found.metadata.version), found.items or [], found.metadata.rest)


def slices(text: bytes) -> Page[Slice]:
    """A `Reader` of EndpointSlices."""
    found = _SLICES.decode(text)
    return Page(int(found.metadata.version), found.items or [], found.metadata.rest)


def agents(text: bytes) -> Page[Agent]:
    """A `Reader` of agents."""
    found = _AGENTS.decode(text)
    items = [Agent(_NAMED.decode(item).metadata, item) for item in found.items or []]
    return Page(int(found.metadata.version), items, found.metadata.rest)


def pod(text: bytes) -> Pod:
    """One pod; raises `msgspec.MsgspecError` for what is none."""
    return _POD.decode(text)


def node(text: bytes) -> Node:
    """One node; likewise."""
    return _NODE.decode(text)


def endpoint_slice(text: bytes) -> Slice:
    """One EndpointSlice; likewise."""
    return _SLICE.decode(text)
