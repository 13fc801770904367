"""Whether gateways have the agent's workers. Pure.

A worker is ready when its engine is, and dials gateways by itself. If it cannot, because a network policy forbids it,
say, then Kubernetes sees nothing wrong and callers are refused.
"""

from collections.abc import Mapping
from typing import Final

from trunkline_operator.decisions.view import View

# A worker that is ready dials within seconds, and as soon again when gateways have restarted.
UNLINKED_SECONDS: Final = 30.0


def missing(view: View, before: Mapping[str, float]) -> dict[str, float]:
    """Pods that are ready and that no gateway has a link from, by uid, and since when; `before` is that of the last look.

    None while a gateway is silent, for it may have them.
    """
    if not view.world.traffic.known:
        return {}
    return {
        pod.uid: before.get(pod.uid, view.now)
        for pod in view.pods
        if pod.active and pod.ready and not view.must_go(pod)
        if pod.name not in view.world.traffic.workers
    }


def unlinked(view: View, since: Mapping[str, float]) -> frozenset[str]:
    """Names of those that have been without a link for too long."""
    return frozenset(
        pod.name for pod in view.pods if since.get(pod.uid, view.now) + UNLINKED_SECONDS <= view.now
    )


def look_in(view: View, since: Mapping[str, float]) -> float | None:
    """Seconds until another one will have been; None: of none as things are."""
    waits = (began + UNLINKED_SECONDS - view.now for began in since.values())
    return min((wait for wait in waits if wait > 0), default=None)
