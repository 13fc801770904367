"""How many slots to keep free for the callers of the next minutes: arrivals, departures, and their chance.

A pod that is asked for now takes calls only after it has started, T seconds later. Until then
- the number of calls grows by what arrives more than ends: growth = (arriving - leaving) x T, counted only
  where it stands out from chance;
- and it wanders. Arrivals and departures are each a Poisson process, so over T seconds their difference
  has the variance 2 x arriving x T, and z of its standard deviations are kept: the square-root staffing of
  telephony, over the time that a pod needs instead of over all time.

So the reserve follows the root of the load: twice the calls need 1.4 times the reserve, where a target of
utilisation would double it.
"""

import math
from dataclasses import dataclass, replace
from typing import Final

# Long against the gaps between calls, short against the hours in which a day turns.
RATE_SECONDS: Final = 300.0
# Of a normal distribution's one standard deviation: growth below it is taken for chance.
STANDS_OUT: Final = 1.0
# A reserve for 98 of 100 pod starts, where no price says what a call without a warm slot costs.
USUAL_Z: Final = 2.0
# Gateways' news make an agent looked at, so what a look finds after a longer rest has come at its end.
LONGEST_COUNT_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What gateways have counted so far, and the calls there are."""

    arrivals: int = 0
    refused: int = 0
    calls: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Calls per second, weighted over the last minutes. `Flow()` is that of a new operator."""

    at: float | None = None  # when it was last counted
    count: Count = Count()
    arriving: float = 0.0
    leaving: float = 0.0

    @property
    def growth(self) -> float:
        """Calls per second that arrive more than end, less what may be chance; never below 0."""
        # An exponentially weighted rate has the variance rate / (2 x window).
        deviation = math.sqrt((self.arriving + self.leaving) / (2 * RATE_SECONDS))
        return max(self.arriving - self.leaving - STANDS_OUT * deviation, 0.0)


def followed(flow: Flow, count: Count, now: float) -> Flow:
    """The flow after a new count. Totals that fall are those of a new operator: they begin anew."""
    if flow.at is None:
        return replace(flow, at=now, count=count)
    passed = now - flow.at
    if passed <= 0:
        return flow
    before = flow.count
    arrived = max(count.arrivals - before.arrivals, 0)
    refused = max(count.refused - before.refused, 0)
    left = max(arrived - refused - (count.calls - before.calls), 0)
    counted = min(passed, LONGEST_COUNT_SECONDS)
    weight, rest = -math.expm1(-counted / RATE_SECONDS), math.exp((counted - passed) / RATE_SECONDS)
    arriving, leaving = flow.arriving * rest, flow.leaving * rest
    return Flow(
        at=now,
        count=count,
        arriving=arriving + (arrived / counted - arriving) * weight,
        leaving=leaving + (left / counted - leaving) * weight,
    )


def reserve(flow: Flow, start_seconds: float, z: float) -> float:
    """Slots for the callers who come before a pod that is asked for now has started."""
    wander = math.sqrt(2 * flow.arriving * start_seconds)
    return flow.growth * start_seconds + z * wander
