"""Which pods an autoscaler of nodes may evict. Pure.

A pod is protected from its creation on. The protection is taken away once the pod could have gone for `idle_seconds` on
end: it had no call, and without it callers still find a slot, on burst or in the slots that `warm.bufferSlots` keeps
free in pods that stay. It comes back as soon as one of the two is no longer so, for which nobody looks oftener than
the gateways tell of calls anyway.

So a pod costs at most two writes in `idle_seconds`, however many calls come and go. A pod that is evicted in the moment
between its first call and its protection drains as any other, and goes after its last call; how long for, is up to
whoever evicts.

Unknown counts as busy. Only a new operator leaves the marks as it finds them until gateways have told it of calls, or
each restart would write to every pod.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from trunkline_operator.decisions.steps import AllowEviction, ForbidEviction, Requeue, Step
from trunkline_operator.decisions.view import View
from trunkline_operator.decisions.world import DO_NOT_DISRUPT, SAFE_TO_EVICT, PodFacts

PROTECTED: Final[Mapping[str, str]] = {SAFE_TO_EVICT: "false", DO_NOT_DISRUPT: "true"}
# Left to itself the cluster autoscaler evicts no pod of a controller that it does not know, hence "true".
EVICTABLE: Final[Mapping[str, str | None]] = {SAFE_TO_EVICT: "true", DO_NOT_DISRUPT: None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What to write, and what the next look must know: uid → since when a pod could go; None = nothing was heard yet."""

    steps: tuple[Step, ...] = ()
    idle: Mapping[str, float] | None = None


def marks(view: View, kept: int, idle: Mapping[str, float] | None, going: Collection[str]) -> Marks:
    """The marks that must change. `kept` slots are to stay free where no burst is; `going` are uids of pods that
    this look drains or deletes anyway.
    """
    known, patience = view.world.traffic.known, view.installation.idle_seconds
    if idle is None and not known:
        return Marks()
    here = [pod for pod in view.pods if not (pod.terminating or pod.finished or pod.uid in going)]
    active = [pod for pod in here if pod.active]
    spared = _spared(view, active, kept) if known and patience else []
    since = {pod.uid: (idle or {}).get(pod.uid, view.now) for pod in spared}
    steps: list[Step] = []
    for pod in here:
        if pod.uid not in since:
            empty = pod.draining and view.busy(pod) == 0  # it is deleted in a moment
            steps += [] if pod.protected or empty else [ForbidEviction(pod.name, pod.uid)]
        elif pod.protected:
            wait = since[pod.uid] + patience - view.now
            steps.append(Requeue(wait) if wait > 0 else AllowEviction(pod.name, pod.uid))
    return Marks(steps=tuple(steps), idle=since)


def _spared(view: View, pods: list[PodFacts], kept: int) -> list[PodFacts]:
    """Pods that have no call and that callers could do without, all at once. One that starts is waited for."""
    free = {pod.uid: _free(view, pod) for pod in pods}
    left, spared = sum(free.values()), []
    enough = 0 if view.overflows() and not view.world.burst.capped else kept
    for pod in sorted(pods, key=view.loss):
        idle = view.busy(pod) == 0 and (pod.ready or bool(pod.trouble)) and not view.must_go(pod)
        if idle and left - free[pod.uid] >= enough:
            left -= free[pod.uid]
            spared.append(pod)
    return spared


def _free(view: View, pod: PodFacts) -> int:
    """Slots that callers find on it."""
    worker = view.world.traffic.workers.get(pod.name)
    if worker is None or worker.draining or not pod.ready or view.must_go(pod):
        return 0
    return worker.slots - worker.busy
