"""Why a pod may not be placed on a node, in the scheduler's words. Pure."""

from collections.abc import Iterable, Iterator
from typing import Any

from trunkline_dev.node.resources import Amounts, demand, shortfall

Json = dict[str, Any]


def obstacles(pod: Json, node: Json, capacity: Amounts, placed: Iterable[Json]) -> list[str]:
    """Everything that keeps the pod off the node beside the pods that are placed there; empty if nothing.

    Regards the node's cordon, taints and labels, and the resources that are left.
    """
    spec = pod["spec"]
    return [
        *_of_node(spec, node.get("spec") or {}, node["metadata"].get("labels") or {}),
        *shortfall(capacity, map(demand, placed), demand(pod)),
    ]


def _of_node(pod: Json, node: Json, labels: Json) -> Iterator[str]:
    tolerations = pod.get("tolerations") or []
    if node.get("unschedulable"):
        yield "node(s) were unschedulable"
    for taint in node.get("taints") or []:
        # A cordoned node carries this one too.
        if taint["effect"] == "PreferNoSchedule" or taint["key"] == _CORDON:
            continue
        if not any(_tolerates(toleration, taint) for toleration in tolerations):
            yield f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"
    selector = pod.get("nodeSelector") or {}
    if any(labels.get(key) != value for key, value in selector.items()):
        yield "node(s) didn't match Pod's node affinity/selector"


_CORDON = "node.kubernetes.io/unschedulable"


def _tolerates(toleration: Json, taint: Json) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    same_value = toleration.get("value", "") == taint.get("value", "")
    return bool(toleration.get("key") == taint["key"] and same_value)
