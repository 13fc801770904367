"""Calls as they arrive: the fixed ones of the benchmark, each from its seed."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

MINUTE: Final = 60.0
HOUR: Final = 3600.0
DAY: Final = 24 * HOUR

# A call to a help desk: the median of the published ones is about three minutes.
MEAN_CALL_SECONDS: Final = 180.0
LONGEST_CALL_SECONDS: Final = 1800.0


@dataclass(frozen=True, slots=True)
class Call:
    at: float  # seconds since the trace began
    seconds: float  # how long it would last, if it is answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Calls in the order of their arrival."""

    name: str
    calls: tuple[Call, ...]
    seconds: float  # from the trace's beginning to its end
    began: float = 0.0  # seconds since the epoch, for schedules

    def __repr__(self) -> str:
        return f"<Trace {self.name}: {len(self.calls)} calls in {self.seconds / HOUR:.1f} h>"


# --- fixed traces ------------------------------------------------------------------------------------------

Rate = Callable[[float], float]
"""Seconds since the beginning → calls per second."""


def drawn(
    name: str,
    rate: Rate,
    highest: float,
    seconds: float,
    seed: int,
    *,
    spikes: Sequence[tuple[float, int, float]] = (),
) -> Trace:
    """A Poisson process of that rate, by thinning (Lewis and Shedler 1979), with spikes on top.

    `highest` bounds the rate. A spike is (when, calls, over how many seconds). Lengths of calls are
    exponential, as in Erlang's model, and cut at the longest call.
    """
    chance = random.Random(seed)
    arrivals, at = [], 0.0
    while (at := at + chance.expovariate(highest)) < seconds:
        if chance.random() * highest < rate(at):
            arrivals.append(at)
    for when, calls, over in spikes:
        arrivals.extend(when + over * n / calls for n in range(calls))
    lengths = (
        min(chance.expovariate(1 / MEAN_CALL_SECONDS), LONGEST_CALL_SECONDS) for _ in arrivals
    )
    made = tuple(Call(at, length) for at, length in zip(sorted(arrivals), lengths, strict=True))
    return Trace(name=name, calls=made, seconds=seconds)


def erlangs(calls_at_a_time: float) -> float:
    """The rate at which so many calls are there at a time, by Little's law."""
    return calls_at_a_time / MEAN_CALL_SECONDS


def day_shape(hour: float) -> float:
    """0 … 1: a trough at 4 in the morning and a peak at 16 o'clock."""
    return 0.5 - 0.5 * math.cos((hour - 4.0) / 24.0 * 2 * math.pi)


def diurnal(scale: float = 1.0, seed: int = 1) -> Trace:
    """A day from 16 to 200 calls at a time."""

    def rate(at: float) -> float:
        return erlangs((16 + 184 * day_shape(at / HOUR)) * scale)

    return drawn("diurnal", rate, erlangs(200 * scale), DAY, seed)


def spike(scale: float = 1.0, seed: int = 2) -> Trace:
    """Six hours of 110 calls at a time, and twice 200 more within ten seconds."""
    steady = erlangs(110 * scale)
    spikes = [(at, round(200 * scale), 10.0) for at in (2 * HOUR, 4.5 * HOUR)]
    return drawn("spike", lambda _: steady, steady, 6 * HOUR, seed, spikes=spikes)


def flash_crowd(scale: float = 1.0, seed: int = 3) -> Trace:
    """Six hours of 45 calls at a time; within ten minutes a crowd of 315 comes, and stays for an hour."""

    def rate(at: float) -> float:
        since = at - 2 * HOUR
        if since < 0:
            crowd = 0.0
        elif since < 10 * MINUTE:
            crowd = since / (10 * MINUTE)
        else:
            crowd = math.exp(-max(since - 40 * MINUTE, 0.0) / (20 * MINUTE))
        return erlangs((45 + 315 * crowd) * scale)

    return drawn("flash crowd", rate, erlangs(360 * scale), 6 * HOUR, seed)


def slow_ramp(scale: float = 1.0, seed: int = 4) -> Trace:
    """Twelve hours in which 8 calls at a time become 220."""

    def rate(at: float) -> float:
        return erlangs((8 + 212 * at / (12 * HOUR)) * scale)

    return drawn("slow ramp", rate, erlangs(220 * scale), 12 * HOUR, seed)


def weekend(scale: float = 1.0, seed: int = 5) -> Trace:
    """Friday to Monday: up to 166 calls at a time on working days, up to 30 at the weekend."""

    def rate(at: float) -> float:
        busy = 160 if int(at // DAY) in (0, 3) else 24
        return erlangs((6 + busy * day_shape(at % DAY / HOUR)) * scale)

    return drawn("weekend", rate, erlangs(166 * scale), 4 * DAY, seed)


FIXED: Final[tuple[Callable[..., Trace], ...]] = (
    diurnal,
    spike,
    flash_crowd,
    slow_ramp,
    weekend,
)
"""The traces of the benchmark; the first argument scales their load, the second is another seed."""

HELD_OUT: Final = 100
"""Seeds from here on were looked at by nobody who wrote the decider or chose its settings."""
