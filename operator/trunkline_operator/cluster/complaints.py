"""What the kubelet says of pods whose volumes do not come. It tells that in Events alone: the pod itself stays
"ContainerCreating" without a word for as long as a ConfigMap is missing.

Events are asked for only of an agent whose template names volumes, of the pod that waits longest, and only once that
waits for longer than a mount takes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from trunkline_operator.agent.spec import VoiceAgent
from trunkline_operator.cluster.client import ApiError, Cluster, path
from trunkline_operator.decisions.world import PodFacts

# A kubelet mounts what is there within a second or two. Times of pods are whole seconds.
PATIENCE_SECONDS: Final = 3.0
AGAIN_SECONDS: Final = 10.0
# Without the right, a pod is not asked for again until somebody may have given it.
DENIED_SECONDS: Final = 600.0
MOST: Final = 50  # of one pod's warnings; equal ones are one Event with a count
TELLING: Final = frozenset({"FailedMount", "FailedAttachVolume"})

log = logging.getLogger("trunkline.reconcile")


@dataclass(frozen=True, slots=True)
class _Heard:
    """What was said of a pod, and from when on it is worth asking again, in seconds since the epoch."""

    uid: str
    words: str
    again: float


class Complaints:
    """Asks for them, for one agent at a time."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._heard: dict[str, _Heard] = {}  # by agent
        self._denied_until = 0.0

    def __repr__(self) -> str:
        return f"Complaints({len(self._heard)} agents)"

    async def added(
        self, agent: VoiceAgent, pods: Sequence[PodFacts], now: float
    ) -> tuple[PodFacts, ...]:
        """The pods, one of them with the words of its kubelet if it waits for a volume."""
        waiting = [
            (pod.mounting, pod.name, pod)
            for pod in pods
            if pod.owner == agent.uid and pod.active and pod.mounting is not None
        ]
        if not (waiting and agent.warm.template.volumes):
            self.forget(agent.key)
            return tuple(pods)
        since, _, first = min(waiting)
        known = self._heard.get(agent.key)
        if known is None or known.uid != first.uid:
            known = _Heard(first.uid, "", since + PATIENCE_SECONDS)
        if now >= known.again:
            known = _Heard(first.uid, await self._words(agent, first, now), now + AGAIN_SECONDS)
        self._heard[agent.key] = known
        return tuple(replace(pod, unmounted=known.words) if pod is first else pod for pod in pods)

    def look_in(self, key: str, now: float) -> float | None:
        """Seconds until it is worth looking at this agent again; None = nobody waits."""
        known = self._heard.get(key)
        return None if known is None else max(known.again - now, 0.0)

    def forget(self, key: str) -> None:
        self._heard.pop(key, None)

    async def _words(self, agent: VoiceAgent, pod: PodFacts, now: float) -> str:
        if now < self._denied_until:
            return ""
        fields = {"involvedObject.uid": pod.uid, "type": "Warning"}
        try:
            events = await self._cluster.some(path("Event", agent.namespace), fields, MOST)
        except ApiError as error:  # a status does without
            if error.status == 403:
                self._denied_until = now + DENIED_SECONDS
            log.warning("%s: why %s waits is not known: %s", agent.key, pod.name, error)
            return ""
        told = [
            (event.get("lastTimestamp") or event.get("eventTime") or "", event.get("message") or "")
            for event in events
            if event.get("reason") in TELLING
        ]
        return " ".join(max(told)[1].split()) if told else ""
