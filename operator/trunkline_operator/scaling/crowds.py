"""Crowds: slots for callers who come many at once, while it pays to be ready for the next ones.

The reserve of `staffing.py` takes callers to come one by one. Where they come in crowds, the normal
distribution knows nothing of it, so it is also watched how many slots that reserve would have been short
of, and for how long. The newsvendor's rule then asks of this record what it asks of the distribution: a
slot is kept free while the share of time in which it was missing is more than 1 - Phi(z), which is what
the slot costs over what a caller without one costs (`prices.py`).

- What would have been missing is counted, whatever was really free: else the slots that are held for a
  crowd would make it forgotten.
- A crowd counts with its peak until it is over, because slots for the half of it are not what was missing.
- Time fades over FADE_SECONDS, and time that nobody watched counts as quiet: one crowd is not taken for a
  habit because the operator is new.
"""

import itertools
import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Final

from trunkline_operator.scaling.staffing import RATE_SECONDS

# A working day. What was longer ago says little about the next hour.
FADE_SECONDS: Final = 8 * 3600.0
# Until its rates are known, what an operator finds would look like a crowd.
UNKNOWN_SECONDS: Final = 2 * RATE_SECONDS
# Steps in which a pod start is remembered: a step of a minute's start is two seconds.
STEPS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowds:
    """How many slots were missing for how long. `Crowds()` is that of a new operator."""

    began: float | None = None  # the first look
    at: float = 0.0  # the last one
    missing: int = 0  # slots then, at the peak of the crowd that is there
    # (when, slots), of one pod start: at most STEPS + 2
    asked: tuple[tuple[float, float], ...] = ()
    # (slots, faded seconds), most slots first: at most eight for each time that the slots double
    seconds: tuple[tuple[int, float], ...] = ()


def after(crowds: Crowds, calls: int, free: float, start_seconds: float, now: float) -> Crowds:
    """The record after a look at so many calls, beside which the reserve alone keeps so many slots free."""
    if crowds.began is None:
        return Crowds(began=now, at=now, asked=((now, calls + free),))
    if now <= crowds.at:
        return crowds
    asked = _since(crowds.asked, now - start_seconds)
    missing = _missing(asked[0][1], calls)
    if now - asked[-1][0] >= start_seconds / STEPS:
        asked = (*asked, (now, calls + free))
    return replace(
        crowds,
        at=now,
        missing=max(missing, crowds.missing) if missing else 0,
        asked=asked,
        seconds=_seconds(crowds, start_seconds, now),
    )


def expected(crowds: Crowds, z: float) -> int:
    """Slots to keep free beside the reserve: so many were missing for the share of time that z allows."""
    if not crowds.seconds:
        return 0
    enough = (1 - NormalDist().cdf(z)) * FADE_SECONDS
    longer = itertools.accumulate(seconds for _, seconds in crowds.seconds)
    pairs = zip(crowds.seconds, longer, strict=True)
    return next((slots for (slots, _), seconds in pairs if seconds >= enough), 0)


def _since(
    asked: tuple[tuple[float, float], ...], earliest: float
) -> tuple[tuple[float, float], ...]:
    """What was asked for since then, and before it the last that was."""
    first = 0
    while first + 1 < len(asked) and asked[first + 1][0] <= earliest:
        first += 1
    return asked[first:] if first else asked


def _missing(asked: float, calls: int) -> int:
    """Slots for calls that pods asked for one start ago would not have had, in steps of a sixteenth to an eighth."""
    if (short := math.ceil(calls - asked)) <= 0:
        return 0
    step = 1 << max(short.bit_length() - 4, 0)
    return -(-short // step) * step


def _seconds(crowds: Crowds, start_seconds: float, now: float) -> tuple[tuple[int, float], ...]:
    """The record with the time since the last look."""
    passed = now - crowds.at
    counts = crowds.began is not None and now - crowds.began >= UNKNOWN_SECONDS
    if not (crowds.seconds or (crowds.missing and counts)):
        return ()
    fade = math.exp(-passed / FADE_SECONDS)
    seconds = {slots: before * fade for slots, before in crowds.seconds}
    if crowds.missing and counts:
        # Pods that were asked for when the crowd came are there after one start: no look, no crowd.
        lasted = min(passed, start_seconds)
        seconds[crowds.missing] = seconds.get(crowds.missing, 0.0) + lasted
    return tuple(sorted(seconds.items(), reverse=True))
