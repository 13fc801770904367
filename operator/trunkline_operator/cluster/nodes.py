"""The nodes of which a look must know: those that are to go, or are not ready."""

from collections.abc import Iterable, Mapping
from typing import Any

from trunkline_operator.decisions.nodes import FINE, NodeFacts
from trunkline_operator.decisions.world import PodFacts


class Nodes:
    """Kept by name; one that is not here is fine, as far as is known."""

    def __init__(self) -> None:
        self._facts: dict[str, NodeFacts] = {}

    def __repr__(self) -> str:
        return f"Nodes({self._facts})"

    def put(self, node: Mapping[str, Any]) -> bool:
        """Whether this is news of it."""
        return self._now(node["metadata"]["name"], NodeFacts.of(node))

    def drop(self, name: str) -> bool:
        """Whether it was here. Kubernetes deletes the pods of a node that is gone."""
        return self._now(name, FINE)

    def others(self, names: Iterable[str]) -> "list[str]":
        """Those that are here and are none of these."""
        return sorted(self._facts.keys() - set(names))

    def placed(self, pod: PodFacts) -> PodFacts:
        """The pod, with what is known of its node."""
        node = self._facts.get(pod.node)
        return pod.on(node) if node else pod

    def _now(self, name: str, facts: NodeFacts) -> bool:
        if facts == self._facts.get(name, FINE):
            return False
        if facts == FINE:
            del self._facts[name]
        else:
            self._facts[name] = facts
        return True
