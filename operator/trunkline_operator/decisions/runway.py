"""When an agent has more slots: what gateways tell callers whom they cannot place. Pure.

A pod that starts is expected as long after its creation as the agent's pods took lately. It is an expectation and no
promise: one that is late stays expected, in a moment.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from trunkline_operator.agent.spec import VoiceAgent
from trunkline_operator.decisions.world import PodFacts


@dataclass(frozen=True, slots=True)
class Coming:
    """Slots of one pod, and when they can be had, in seconds since the epoch."""

    slots: int
    at: float


def measured_start(pods: Iterable[PodFacts]) -> float | None:
    """How long the agent's pods took to become ready, the middle one; None if none is known."""
    took = [pod.start_seconds for pod in pods if pod.start_seconds is not None]
    return statistics.median(took) if took else None


def start_seconds(agent: VoiceAgent, pods: Iterable[PodFacts]) -> float:
    """How long a pod takes until it is ready: as measured, or else as hinted."""
    measured = measured_start(pods)
    return float(agent.warm.startup_seconds_hint) if measured is None else measured


def runway(
    agent: VoiceAgent, pods: Iterable[PodFacts], made: int, now: float, slots: int
) -> tuple[Coming, ...]:
    """The slots on their way, `slots` a pod, the next first. `made` pods were created at this very look.

    A pod that cannot be scheduled, or whose container is in trouble, is expected by nobody.
    """
    pods = tuple(pods)
    took = start_seconds(agent, pods)
    starting = [
        pod.created
        for pod in pods
        if pod.active
        and not (pod.ready or pod.started)
        and not (pod.unschedulable or pod.trouble or pod.unmounted)
    ]
    times = sorted([created + took for created in starting] + [now + took] * made)
    return tuple(Coming(slots, at) for at in times)
