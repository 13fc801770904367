"""What the burst of the last day says about the number of pods, in dollars and in words."""

from dataclasses import dataclass, replace
from typing import Final

from trunkline_operator.agent.spec import Warm
from trunkline_operator.scaling.prices import Stakes

HOUR: Final = 3600.0
HOURS: Final = 24
# What a quarter of a day says is not yet a habit, but worth a look.
LEAST_HOURS: Final = 6
# Less is not worth a person's minute.
LEAST_DOLLARS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Hour:
    """One hour, in hours of what was there."""

    began: float
    burst: float = 0.0  # at least one call was at Modal
    full: float = 0.0  # of that, while there were maxPods
    containers: float = 0.0  # those that one more pod would have spared


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """The last 24 hours and the one that runs, the newest last. `Day()` is that of a new operator."""

    at: float | None = None
    burst: int = 0  # calls then
    full: bool = False
    hours: tuple[Hour, ...] = ()


def watched(day: Day, warm: Warm, stakes: Stakes, burst: int, full: bool, now: float) -> Day:
    """The day with what was there since the last look; a look that was long ago counts for an hour."""
    if day.at is None or now <= day.at:
        return replace(day, at=now, burst=burst, full=full)
    since = max(day.at, now - HOUR)
    passed = (now - since) / HOUR
    began = since - since % HOUR
    hours = day.hours
    if not hours or hours[-1].began != began:
        hours = (*hours, Hour(began))[-HOURS - 1 :]
    if day.burst:
        spared = -(-min(day.burst, warm.slots_per_pod) // stakes.slots_per_container)
        last = hours[-1]
        grown = replace(
            last,
            burst=last.burst + passed,
            full=last.full + (passed if day.full else 0.0),
            containers=last.containers + passed * spared,
        )
        hours = (*hours[:-1], grown)
    return Day(at=now, burst=burst, full=full, hours=hours)


def advice(day: Day, stakes: Stakes) -> str:
    """A sentence about one more pod, if it would have paid; "" else. It changes once an hour."""
    past = day.hours[:-1]  # of the hour that runs, nobody knows what it will hold
    if len(past) < LEAST_HOURS or stakes.pod_hour is None or stakes.container_hour is None:
        return ""
    burst, full = sum(hour.burst for hour in past), sum(hour.full for hour in past)
    per_day = HOURS / len(past)
    spared = sum(hour.containers for hour in past) * stakes.container_hour * per_day
    # Where maxPods was the limit the pod would come and go with the load; else it would stay all day.
    limited = full > burst / 2
    paid = (burst * per_day if limited else HOURS) * stakes.pod_hour
    if spared - paid < LEAST_DOLLARS:
        return ""
    setting = "warm.maxPods" if limited else "warm.minPods"
    return (
        f"{burst * per_day:.0f} h of burst a day: one more warm pod saves ${spared - paid:.0f} a day, "
        f"so raise {setting}"
    )
