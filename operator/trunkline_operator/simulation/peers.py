"""Models of two autoscalers that people use: Kubernetes' HorizontalPodAutoscaler and Knative's KPA.

Both are given what they would not have: their metrics are exact and never late, calls are packed as by
Trunkline's gateway, and the pods that they let go are chosen and drained by Trunkline
(`autoscaling: external`), so only the number of pods differs. Their arithmetic is that of their own
documentation, and its worked examples are tests.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from trunkline_operator.agent.spec import Warm
from trunkline_operator.simulation.model import Seen
from trunkline_operator.simulation.scalers import externally

# Defaults of the HorizontalPodAutoscaler (kube-controller-manager's flags, and `behavior`).
SYNC_SECONDS: Final = 15.0
TOLERANCE: Final = 0.1
STABILIZATION_SECONDS: Final = 300.0
MOST_UP_PODS, MOST_UP_FACTOR = 4, 2

# Defaults of Knative's config-autoscaler.
TICK_SECONDS: Final = 2.0
STABLE_SECONDS: Final = 60.0
PANIC_SECONDS: Final = 6.0
PANIC_THRESHOLD: Final = 2.0
MOST_UP_RATE: Final = 1000.0
MOST_DOWN_RATE: Final = 2.0
KPA_UTILIZATION: Final = 0.7

# 100 x 1.1 is a little more than 110 to a computer.
ROUNDING: Final = 1e-9


# --- HorizontalPodAutoscaler -------------------------------------------------------------------------------


def ratio_replicas(current: int, ratio: float) -> int:
    """ceil(current x ratio), or the current number within the tolerance: the basic formula."""
    if abs(ratio - 1) <= TOLERANCE + ROUNDING:
        return current
    return math.ceil(current * ratio - ROUNDING)


def pods_replicas(current: int, metrics: Sequence[float], unready: int, target: float) -> int:
    """For a metric of each pod. Pods that are not ready count as 0 where it would scale up.

    `metrics` are those of the pods that are ready. Where the damped ratio would turn the direction or is
    within the tolerance, nothing is done.
    """
    if not metrics:
        return current
    ratio = sum(metrics) / len(metrics) / target
    if not (unready and ratio > 1):
        return (
            current
            if abs(ratio - 1) <= TOLERANCE + ROUNDING
            else math.ceil(len(metrics) * ratio - ROUNDING)
        )
    damped = sum(metrics) / (len(metrics) + unready) / target
    if damped <= 1 + TOLERANCE + ROUNDING:
        return current
    return max(math.ceil((len(metrics) + unready) * damped - ROUNDING), current)


@dataclass(slots=True)
class Hpa:
    """An HPA on the share of slots that are in use, with default behaviour.

    With `whole` it reads one metric of the agent, calls at Modal included (type Object); without, one of
    each pod (type Pods), which knows nothing of calls that found no slot.
    """

    warm: Warm
    target: float  # share of slots
    whole: bool = False
    period: float | None = SYNC_SECONDS
    advised: deque[tuple[float, int]] = field(default_factory=deque)

    def asked(self, seen: Seen, now: float) -> tuple[int, float | None]:
        """The replicas that it writes to /scale."""
        current = max(seen.active, 1)
        slots = self.warm.slots_per_pod
        if self.whole:
            wish = ratio_replicas(current, seen.calls / (slots * current) / self.target)
        else:
            used = [calls / slots for calls in seen.loads]
            wish = pods_replicas(current, used, seen.active - seen.serving, self.target)
        wish = min(max(wish, self.warm.min_pods), self.warm.max_pods)
        return externally(self.warm, self._behaved(wish, current, now)), None

    def _behaved(self, wish: int, current: int, now: float) -> int:
        """Down only to the highest wish of the window; up by four pods or to the double in one period."""
        while self.advised and self.advised[0][0] <= now - STABILIZATION_SECONDS:
            self.advised.popleft()
        self.advised.append((now, wish))
        if wish < current:
            return min(max(advice for _, advice in self.advised), current)
        return min(wish, max(current + MOST_UP_PODS, current * MOST_UP_FACTOR))


# --- Knative's KPA -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Kpa:
    """A KPA on concurrency: the mean of a minute, or of six seconds while it panics."""

    target: float  # calls of a pod
    panic_since: float | None = None
    panic_pods: int = 0

    def desired(self, stable: float, panic: float, ready: int, now: float) -> int:
        """Pods for the concurrency of both windows, as knative's autoscaler.go."""
        ready = max(ready, 1)
        most, least = math.ceil(MOST_UP_RATE * ready), math.floor(ready / MOST_DOWN_RATE)

        def pods(concurrency: float) -> int:
            wanted = math.ceil(concurrency / self.target - ROUNDING)
            return min(max(wanted, least), most)

        wanted = pods(stable)
        if math.ceil(panic / self.target - ROUNDING) / ready >= PANIC_THRESHOLD:
            self.panic_since = now
        elif self.panic_since is not None and now > self.panic_since + STABLE_SECONDS:
            self.panic_since, self.panic_pods = None, 0
        if self.panic_since is None:
            return wanted
        self.panic_pods = max(
            self.panic_pods, wanted, pods(panic)
        )  # nothing is taken away in panic
        return self.panic_pods


@dataclass(slots=True)
class Knative:
    """A KPA that sees every call, wherever it is, each time it ticks."""

    warm: Warm
    kpa: Kpa
    period: float | None = TICK_SECONDS
    seen: deque[tuple[float, int]] = field(default_factory=deque)

    def asked(self, seen: Seen, now: float) -> tuple[int, float | None]:
        """The pods that it wants."""
        self.seen.append((now, seen.calls))
        while self.seen[0][0] <= now - STABLE_SECONDS:
            self.seen.popleft()
        stable = sum(calls for _, calls in self.seen) / len(self.seen)
        last = [calls for at, calls in self.seen if at > now - PANIC_SECONDS]
        wanted = self.kpa.desired(stable, sum(last) / len(last), seen.serving, now)
        return externally(self.warm, wanted), None


def knative(warm: Warm) -> Knative:
    """A KPA with Knative's defaults: 70 % of a pod's slots."""
    return Knative(warm, Kpa(KPA_UTILIZATION * warm.slots_per_pod))
