"""Windows of time in which more pods are the floor, from cron expressions."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

LONGEST_WINDOW_SECONDS: Final = 7 * 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """`warm.schedule[]`: from each moment that `start` names, for so long, at least so many pods."""

    start: str  # five fields: minute hour day month weekday
    duration_seconds: int
    min_pods: int
    time_zone: str = "UTC"


@dataclass(frozen=True, slots=True)
class Floor:
    """Pods that the windows of a moment ask for, and the seconds until they ask for something else."""

    pods: int
    changes_in: float | None


def trouble(window: Window) -> str:
    """What is wrong with a window, as a sentence's end; "" = nothing."""
    try:
        ZoneInfo(window.time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return f"timeZone {window.time_zone!r} is not known: use a name such as Europe/Berlin"
    try:
        next(CronSim(window.start, datetime(2026, 1, 1)))
    except (CronSimError, StopIteration) as error:
        why = str(error) or "it names no moment"
        return f"start {window.start!r} is no cron expression of five fields: {why}"
    return ""


def floor(windows: Iterable[Window], now: float, start_seconds: float) -> Floor:
    """The highest floor of all windows. Each opens so much earlier as a pod needs to start."""
    pods, changes = 0, []
    for window in windows:
        opened, opens = _around(window, now + start_seconds)
        # Pods are there when the window opens, and stay until it closes.
        closes = opened + window.duration_seconds if opened is not None else None
        if closes is not None and now < closes:
            pods = max(pods, window.min_pods)
            changes.append(closes - now)
        if opens is not None:
            changes.append(opens - start_seconds - now)
    return Floor(pods, min(changes, default=None))


def _around(window: Window, at: float) -> tuple[float | None, float | None]:
    """The last moment of `start` that is not after a time, and the first that is."""
    there = datetime.fromtimestamp(at, ZoneInfo(window.time_zone))
    # It goes from minute to minute and leaves out the one that it is given.
    back = there.replace(second=0, microsecond=0) + timedelta(minutes=1)
    last = next(CronSim(window.start, back, reverse=True), None)
    first = next(CronSim(window.start, there), None)
    return (
        None if last is None else last.timestamp(),
        None if first is None else first.timestamp(),
    )
