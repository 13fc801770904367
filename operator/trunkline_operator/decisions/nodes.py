"""What a Node says about the pods on it: whether they must leave it, and whether it is there at all. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

# Taints by which whoever removes a node announces it; the sources are their own documentation.
GOING: Final[Mapping[str, str]] = {
    "ToBeDeletedByClusterAutoscaler": "the cluster autoscaler removes it",
    "karpenter.sh/disrupted": "Karpenter removes it",
    "karpenter.sh/disruption": "Karpenter removes it",  # before its version 1
    "cloud.google.com/impending-node-termination": "Google Cloud shuts it down",
    "aws-node-termination-handler/spot-itn": "AWS takes the spot instance back",
    "aws-node-termination-handler/asg-lifecycle-termination": "its AWS scaling group removes it",
    "aws-node-termination-handler/scheduled-maintenance": "AWS maintains it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """One node."""

    leaving: str = ""  # why no pod should stay on it; "" = it stays
    lost: bool = False  # its kubelet is not ready, or silent

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Self:
        spec, status = node.get("spec") or {}, node.get("status") or {}
        taints = [taint["key"] for taint in spec.get("taints") or ()]
        leaving = next((GOING[key] for key in taints if key in GOING), "")
        # Whoever drains a node cordons it first.
        if not leaving and spec.get("unschedulable"):
            leaving = "it is cordoned"
        ready = [c["status"] for c in status.get("conditions") or () if c["type"] == "Ready"]
        return cls(leaving=leaving, lost=any(word != "True" for word in ready))


FINE: Final = NodeFacts()
"""A node that stays and is ready; one of which nothing is known is taken for such."""
