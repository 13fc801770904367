"""What is read of a list's answer: of a pod what a look sees, of an agent where and which it is.

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
    """Of a pod."""

    name: str
    namespace: str
    uid: str
    resourceVersion: str
    creationTimestamp: str | None
    deletionTimestamp: str | None
    labels: dict[str, str] | None
    annotations: dict[str, str] | None
    ownerReferences: list[dict[str, Any]] | None


class PodSpec(TypedDict, total=False):
    nodeName: str


class Pod(TypedDict, total=False):
    """As `PodFacts.of` takes it, and the mirror."""

    metadata: Metadata
    spec: PodSpec
    status: dict[str, Any]


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


class _ListMeta(msgspec.Struct):
    version: str = msgspec.field(name="resourceVersion")
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

_PODS: Final = msgspec.json.Decoder(_List[Pod])
_AGENTS: Final = msgspec.json.Decoder(_List[msgspec.Raw])
_NAMED: Final = msgspec.json.Decoder(_Named)


def pods(text: bytes) -> Page[Pod]:
    """A `Reader` of pods."""
    found = _PODS.decode(text)
    return Page(int(found.metadata.version), found.items or [], found.metadata.rest)


def agents(text: bytes) -> Page[Agent]:
    """A `Reader` of agents."""
    found = _AGENTS.decode(text)
    items = [Agent(_NAMED.decode(item).metadata, item) for item in found.items or []]
    return Page(int(found.metadata.version), items, found.metadata.rest)
