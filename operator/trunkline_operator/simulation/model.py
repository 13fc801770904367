"""A cluster and a Modal on a clock of their own, calls that arrive, and whoever decides about pods.

What is modelled is what decides the bill: pods take time to start, a call stays where it was placed, a pod
that should go is drained and holds its hardware until its last call ends, containers at Modal boot and
linger. The rules are those of `plan.py` and of the gateway: the fullest pod first, victims with the fewest
calls, drains taken back before pods are made. The same inputs give the same result, to the bit.
"""

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from trunkline_operator.agent.spec import Burst, ScaleDown, VoiceAgent
from trunkline_operator.simulation.traces import HOUR, Call, Trace

# Gateways tell of a change that matters at once, and of the rest once a second.
URGENT_SECONDS: Final = 0.05
LOAD_SECONDS: Final = 1.0
# A restored snapshot of a 7B model; a caller's answer waits for it.
BOOT_SECONDS: Final = 5.0
POD_START_SECONDS: Final = 60.0
SAMPLES: Final = 720
"""Points of a curve: two for each pixel column that a plot in the docs has."""


@dataclass(slots=True)
class Pod:
    ordinal: int
    created: float
    ready: bool = False
    draining: bool = False
    busy: int = 0


@dataclass(slots=True, eq=False)
class Container:
    created: float
    booted: float  # when it takes calls
    busy: int = 0
    idle_since: float = 0.0


@dataclass(slots=True)
class Seen:
    """What a scaler may look at: what gateways and the API server tell."""

    busy: int = 0
    burst: int = 0
    refused: int = 0
    arrivals: int = 0
    active: int = 0
    serving: int = 0
    loads: tuple[int, ...] = ()  # calls of each pod that serves

    @property
    def calls(self) -> int:
        return self.busy + self.burst


class Scaler(Protocol):
    """Decides how many pods there should be."""

    period: float | None
    """Seconds between its looks; None = it looks whenever the load changes."""

    def asked(self, seen: Seen, now: float) -> tuple[int, float | None]:
        """Pods wanted now, and the seconds until it wants to look again, if it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What the simulation must be told of the world, beside the agent."""

    pod_start_seconds: float = POD_START_SECONDS
    boot_seconds: float = BOOT_SECONDS


@dataclass(frozen=True, slots=True)
class Sample:
    at: float
    calls: int
    burst: int
    slots: int  # of pods that are ready
    pods: int  # all that hold hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the calls, and what was paid for."""

    calls: int
    warm: int
    burst: int
    refused: int
    pod_hours: float
    burst_hours: float  # of containers
    burst_call_hours: float
    created: int  # pods
    curve: tuple[Sample, ...] = field(repr=False, default=())

    @property
    def overflow(self) -> float:
        """The share of calls that found no warm slot."""
        return 1 - self.warm / self.calls if self.calls else 0.0


class Simulation:
    """One run of one trace."""

    def __init__(
        self, trace: Trace, agent: VoiceAgent, scaler: Scaler, conditions: Conditions
    ) -> None:
        self._trace, self._agent, self._scaler = trace, agent, scaler
        self._warm, self._modal = agent.warm, agent.burst
        self._conditions = conditions
        self.now = 0.0
        self.pods: list[Pod] = []
        self.containers: list[Container] = []
        self.seen = Seen()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._look_at = math.inf  # the next look that is due
        self._looked = -math.inf
        self._pod_seconds = self._container_seconds = self._burst_call_seconds = 0.0
        self._placed = {"warm": 0, "burst": 0}
        self._created = 0
        self._curve: list[Sample] = []

    def run(self, progress: Callable[[float], None] | None = None) -> Outcome:
        """Plays the whole trace; `progress` is told the share that is done, now and then."""
        self._look()
        step = self._trace.seconds / SAMPLES
        self._at(step, lambda: self._sample(step, progress))
        for call in self._trace.calls:
            self._until(call.at)
            self._arrive(call)
        self._until(self._trace.seconds)
        return self._outcome()

    # --- the clock ----------------------------------------------------------------------------------

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    def _until(self, when: float) -> None:
        events = self._events
        while events and events[0][0] <= when:
            self.now, _, act = heapq.heappop(events)
            act()
        self.now = when

    def _sample(self, step: float, progress: Callable[[float], None] | None) -> None:
        seen, slots = self.seen, self._warm.slots_per_pod
        ready = sum(pod.ready for pod in self.pods)
        sample = Sample(self.now, seen.calls, seen.burst, ready * slots, len(self.pods))
        self._curve.append(sample)
        if progress:
            progress(self.now / self._trace.seconds)
        self._at(self.now + step, lambda: self._sample(step, progress))

    # --- calls --------------------------------------------------------------------------------------

    def _arrive(self, call: Call) -> None:
        self.seen.arrivals += 1
        seconds = min(call.seconds, self._agent.session.max_seconds)
        slots = self._warm.slots_per_pod
        room = [pod for pod in self.pods if pod.ready and not pod.draining and pod.busy < slots]
        if room:
            pod = max(room, key=lambda pod: (pod.busy, -pod.ordinal))
            pod.busy += 1
            self.seen.busy += 1
            self._placed["warm"] += 1
            self._at(self.now + seconds, lambda: self._leave(pod))
            self._changed(urgent=len(room) == 1 and pod.busy == slots)
            return
        if self._modal is None or not self._overflow(self._modal, seconds):
            self.seen.refused += 1
        self._changed(urgent=True)

    def _leave(self, pod: Pod) -> None:
        pod.busy -= 1
        self.seen.busy -= 1
        if pod.draining and pod.busy == 0:
            self._remove(pod)
        self._changed(urgent=False)

    def _overflow(self, modal: Burst, seconds: float) -> bool:
        """Places a call at Modal; False if no container can take it within the deadline."""
        latest = self.now + modal.start_deadline_seconds
        slots = modal.slots_per_container
        room = [one for one in self.containers if one.busy < slots and one.booted <= latest]
        if not room and len(self.containers) < modal.max_containers:
            room = [one for one in [self._boot()] if one.booted <= latest]
        if not room:
            return False
        one = max(room, key=lambda one: (one.booted <= self.now, one.busy))
        one.busy += 1
        self.seen.burst += 1
        self._placed["burst"] += 1
        self._burst_call_seconds += min(seconds, self._trace.seconds - self.now)
        self._at(max(one.booted, self.now) + seconds, lambda: self._hang_up(modal, one))
        self._stock(modal)
        return True

    def _hang_up(self, modal: Burst, one: Container) -> None:
        one.busy -= 1
        self.seen.burst -= 1
        if one.busy == 0:
            self._idle(modal, one)
        self._changed(urgent=True)

    # --- containers ---------------------------------------------------------------------------------

    def _boot(self) -> Container:
        one = Container(self.now, self.now + self._conditions.boot_seconds)
        self.containers.append(one)
        return one

    def _stock(self, modal: Burst) -> None:
        """The minimum, and while there are calls the buffer of empty containers."""
        empty = sum(one.busy == 0 for one in self.containers)
        wanted = max(modal.buffer_containers - empty, modal.min_containers - len(self.containers))
        for _ in range(min(wanted, modal.max_containers - len(self.containers))):
            self._idle(modal, self._boot())

    def _idle(self, modal: Burst, one: Container) -> None:
        since = one.idle_since = max(self.now, one.booted)
        self._at(since + modal.scaledown_window_seconds, lambda: self._expire(modal, one, since))

    def _expire(self, modal: Burst, one: Container, since: float) -> None:
        """An idle container goes after the window, unless it is one of the minimum or of the buffer."""
        if one.busy or one.idle_since != since or one not in self.containers:
            return
        empty = sum(other.busy == 0 for other in self.containers)
        buffered = self.seen.burst > 0 and empty <= modal.buffer_containers
        if buffered or len(self.containers) <= modal.min_containers:
            self._idle(modal, one)
            return
        self.containers.remove(one)
        self._container_seconds += self.now - one.created

    # --- pods ---------------------------------------------------------------------------------------

    def _changed(self, *, urgent: bool) -> None:
        """Something happened to the load: the scaler looks, at once or within a second."""
        if self._scaler.period is not None:
            return
        due = self.now + URGENT_SECONDS if urgent else max(self._looked + LOAD_SECONDS, self.now)
        self._look_by(due)

    def _look_by(self, due: float) -> None:
        if due < self._look_at:
            self._look_at = due
            self._at(due, lambda: self._look() if self._look_at == due else None)

    def _look(self) -> None:
        self._look_at, self._looked = math.inf, self.now
        seen = self.seen
        active = [pod for pod in self.pods if not pod.draining]
        serving = [pod for pod in active if pod.ready]
        seen.active = len(active)
        seen.serving = len(serving)
        seen.loads = tuple(pod.busy for pod in serving)
        wanted, again = self._scaler.asked(seen, self.now)
        if wanted != len(active):
            self._steer(active, wanted)
        waits = [wait for wait in (again, self._scaler.period) if wait is not None]
        if waits:
            self._look_by(self.now + min(waits))

    def _steer(self, active: list[Pod], wanted: int) -> None:
        """As `plan.py`: drains are taken back first, then pods are made; victims lose the fewest calls."""
        if len(active) < wanted:
            draining = [pod for pod in self.pods if pod.draining]
            draining.sort(key=lambda pod: (not pod.ready, -pod.busy, pod.ordinal))
            returning = draining[: wanted - len(active)]
            for pod in returning:
                pod.draining = False
            missing = wanted - len(active) - len(returning)
            for _ in range(min(missing, self._warm.max_pods - len(self.pods))):
                self._create()
        for pod in sorted(active, key=loss)[: max(len(active) - wanted, 0)]:
            if pod.busy == 0:
                self._remove(pod)
            elif self._warm.scale_down_mode is ScaleDown.DRAIN:
                pod.draining = True

    def _create(self) -> None:
        taken = {pod.ordinal for pod in self.pods}
        ordinal = next(n for n in itertools.count() if n not in taken)
        pod = Pod(ordinal, self.now)
        self.pods.append(pod)
        self._created += 1

        def ready() -> None:
            pod.ready = True
            self._changed(urgent=True)

        self._at(self.now + self._conditions.pod_start_seconds, ready)

    def _remove(self, pod: Pod) -> None:
        self.pods.remove(pod)
        self._pod_seconds += self.now - pod.created

    def _outcome(self) -> Outcome:
        end = self._trace.seconds
        pods = self._pod_seconds + sum(end - pod.created for pod in self.pods)
        containers = self._container_seconds + sum(end - one.created for one in self.containers)
        return Outcome(
            calls=len(self._trace.calls),
            warm=self._placed["warm"],
            burst=self._placed["burst"],
            refused=self.seen.refused,
            pod_hours=pods / HOUR,
            burst_hours=containers / HOUR,
            burst_call_hours=self._burst_call_seconds / HOUR,
            created=self._created,
            curve=tuple(self._curve),
        )


def loss(pod: Pod) -> tuple[bool, int, int]:
    """How much is lost with a pod, least first: as `plan._loss`."""
    return pod.ready, pod.busy, -pod.ordinal


def packed(trace: Trace, slots: int, most_pods: int) -> float:
    """Pod-hours of the floor that nobody reaches: pods start at once and calls are repacked at every event."""
    ends: list[float] = []
    total, last = 0.0, 0.0

    def pass_to(when: float) -> None:
        nonlocal total, last
        total += min(-(-len(ends) // slots), most_pods) * (when - last)
        last = when

    for call in trace.calls:
        while ends and ends[0] <= call.at:
            pass_to(ends[0])
            heapq.heappop(ends)
        pass_to(call.at)
        heapq.heappush(ends, call.at + call.seconds)
    while ends and ends[0] <= trace.seconds:
        pass_to(ends[0])
        heapq.heappop(ends)
    pass_to(trace.seconds)
    return total / HOUR
