"""What an agent's burst containers start from: the snapshot that is asked for, or less where restores go wrong.

Snapshots of GPU memory are young: of one Modal user's restores six in ten crashed, and each that does costs the
caller who waits for it a whole boot. So starts are counted. Two bad ones among the last five, and the agent falls
one level, gpu → cpu → none; after a while the level above is tried again, and after each trial that fails the while
is twice as long. A level is changed by a deployment, which Modal rolls: calls stay where they are.

Pure: what is known goes in and comes out as a value, and the time is an argument.
"""

from dataclasses import dataclass, replace
from typing import Final

from trunkline_operator.agent.spec import Snapshot

LEVELS: Final = (Snapshot.GPU, Snapshot.CPU, Snapshot.NONE)  # from the fastest to the surest
WINDOW: Final = 5  # starts that are looked at
# Bad ones among them that are too many. With six in ten bad it trips within five starts in 91 of 100 cases, and
# surely soon; with one in fifty, in 4 of 1000.
TRIP: Final = 2
HEALTHY: Final = 5  # good starts in a row at a level, after which its earlier trips are forgotten
# A restore that takes longer than the app's own first boot is worth nothing. Where no boot was measured, twice the
# mean of Modal's whole fleet in spring 2026 (13.8 s) counts; and one of less than ten seconds is never slow.
SLOW_SECONDS: Final = 27.6
NEVER_SLOW_SECONDS: Final = 10.0
FIRST_WAIT: Final = 900.0  # seconds at a lower level before the one above is tried again
LONGEST_WAIT: Final = 6 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """`Breaker.of(asked)` is that of a new agent."""

    asked: Snapshot
    level: Snapshot  # what containers start from
    since: float = 0.0  # when the level was taken
    trips: int = 0  # in a row, without a healthy while at a level between them
    recent: tuple[bool, ...] = ()  # the last starts at this level, oldest first; True = it was good

    @classmethod
    def of(cls, asked: Snapshot) -> "Breaker":
        return cls(asked=asked, level=asked)

    @property
    def fallen(self) -> bool:
        """The level is below what is asked for."""
        return self.level is not self.asked

    @property
    def bad(self) -> int:
        return sum(not good for good in self.recent)

    @property
    def wait(self) -> float:
        """Seconds at a fallen level before the one above is tried."""
        return float(min(FIRST_WAIT * 2 ** min(max(self.trips - 1, 0), 10), LONGEST_WAIT))


def following(breaker: Breaker, asked: Snapshot) -> Breaker:
    """For what is asked for now; another wish begins anew."""
    return breaker if breaker.asked is asked else Breaker.of(asked)


def recovered(asked: Snapshot, deployed: Snapshot, now: float) -> Breaker:
    """For a new operator that finds this level deployed, where another is asked for."""
    return Breaker(asked=asked, level=deployed, since=now, trips=int(deployed is not asked))


def noted(breaker: Breaker, good: int, bad: int, now: float) -> Breaker:
    """After starts that went well and others that did not, in an order that nobody knows.

    The bad ones count first: of starts that came together, those that failed are the news.
    """
    if breaker.level is Snapshot.NONE:  # nothing is restored
        return breaker
    recent = (*breaker.recent, *[False] * min(bad, WINDOW), *[True] * min(good, WINDOW))
    if _trips(recent):
        below = LEVELS[LEVELS.index(breaker.level) + 1]
        return replace(breaker, level=below, since=now, trips=breaker.trips + 1, recent=())
    recent = recent[-WINDOW:]
    healthy = len(recent) >= HEALTHY and all(recent[-HEALTHY:])
    return replace(breaker, recent=recent, trips=0 if healthy else breaker.trips)


def _trips(recent: tuple[bool, ...]) -> bool:
    """Any five in a row have too many bad ones."""
    windows = [recent[end - WINDOW : end] for end in range(WINDOW, len(recent) + 1)] or [recent]
    return any(sum(not good for good in window) >= TRIP for window in windows)


def slow_after(breaker: Breaker | None, first_boot: float) -> float:
    """The seconds after which a restore counts as bad; 0 = nothing is restored. `first_boot` 0 = unknown."""
    if breaker is None or breaker.level is Snapshot.NONE:
        return 0.0
    return round(max(first_boot or SLOW_SECONDS, NEVER_SLOW_SECONDS), 1)


def probed(breaker: Breaker, now: float) -> Breaker:
    """One level up again, when the wait at this one is over."""
    if not breaker.fallen or now < probe_at(breaker):
        return breaker
    above = LEVELS[LEVELS.index(breaker.level) - 1]
    return replace(breaker, level=above, since=now, recent=())


def probe_at(breaker: Breaker) -> float:
    """When the level above is tried, for one that has fallen."""
    return breaker.since + breaker.wait
