"""Who decides about pods in a simulation: the decider of production, or a number that stays."""

from dataclasses import dataclass, field, replace
from typing import Final

from trunkline_operator.agent.spec import Autoscaling, Warm
from trunkline_operator.scaling.decision import Decision, Demand, Memory, decided
from trunkline_operator.scaling.prices import Stakes
from trunkline_operator.simulation.model import Seen

# A fixed number needs no looks; one an hour keeps the clock simple.
IDLE_PERIOD: Final = 3600.0


@dataclass(slots=True)
class Trunkline:
    """`scaling.decided`, on load events, as the operator calls it."""

    warm: Warm
    stakes: Stakes = field(default_factory=Stakes)
    start_seconds: float | None = None  # as measured; None = the hint of the agent
    began: float = 0.0  # seconds since the epoch at the trace's beginning
    period: float | None = None
    last: Decision | None = None

    def asked(self, seen: Seen, now: float) -> tuple[int, float | None]:
        """The decision about this load."""
        demand = Demand(
            busy=seen.busy,
            burst=seen.burst,
            arrivals=seen.arrivals,
            refused=seen.refused,
            known=True,
            active=seen.active,
            serving=seen.serving,
            start_seconds=self.start_seconds,
            stakes=self.stakes,
        )
        memory = Memory() if self.last is None else self.last.memory
        self.last = decided(self.warm, demand, self.began + now, memory)
        return self.last.pods, self.last.look_again


@dataclass(slots=True)
class Fixed:
    """So many pods, always."""

    pods: int
    period: float | None = IDLE_PERIOD

    def asked(self, seen: Seen, now: float) -> tuple[int, float | None]:
        """The number."""
        return self.pods, None


def externally(warm: Warm, replicas: int) -> int:
    """The pods that `autoscaling: external` makes of what somebody wrote to /scale."""
    demand = Demand(busy=0, burst=0, refused=0, known=True, active=0, serving=0)
    told = replace(warm, autoscaling=Autoscaling.EXTERNAL, replicas=replicas, schedule=())
    return decided(told, demand, 0.0, Memory()).pods
