"""When a caller that finds no slot should call again: what is known of slots that will come. Pure.

Slots come free in two ways: calls end, at the pace at which they ended lately, and pods that are starting become
ready. Whoever waits already, and whoever was told to come back a moment ago, comes first.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

LEAST_SECONDS: Final = 1
MOST_SECONDS: Final = (
    120  # what is further off is a guess, and a caller that is told more does not come back
)
UNKNOWN_SECONDS: Final = (2, 5)  # where nothing is known: one more call will have ended, perhaps
SPREAD: Final = 0.25  # of the answer, at random, so that refused callers do not come back as one
LOOK_BACK_SECONDS: Final = 60.0  # for the pace of endings
MOST_ENDINGS: Final = 256  # beyond four a second the pace is that of fewer seconds
MOST_RETURNING: Final = 512  # refused callers who are expected back; 20 us to count
LATE_POD_SECONDS: Final = 5.0  # a pod that is late is expected in a moment, again and again


@dataclass(frozen=True, slots=True)
class Coming:
    """Slots that a pod will bring, and when, in seconds of the asker's clock."""

    slots: int
    at: float


Runway = Mapping[str, Sequence[tuple[int, float]]]
"""By agent: slots that are on their way, and in how many seconds they can be had."""


class Prospects:
    """What one gateway knows of an agent's slots to come. It is told of ends, refusals and pods."""

    def __init__(self) -> None:
        self.coming: tuple[Coming, ...] = ()
        self._ended: deque[float] = deque(maxlen=MOST_ENDINGS)
        self._due: deque[float] = deque(maxlen=MOST_RETURNING)  # when refused callers come back

    def __repr__(self) -> str:
        return f"<Prospects ended={len(self._ended)} coming={self.coming}>"

    def ended(self, now: float) -> None:
        """A call has given its warm slot back."""
        self._ended.append(now)

    def refused(self, waiting: int, now: float, chance: float) -> int:
        """What a caller that is refused now is told. `waiting` callers stand in line, `chance` is from 0 to 1."""
        ahead = waiting + sum(due > now for due in self._due)
        seconds = retry_after(ahead, self.pace(now), self.coming, now, chance)
        self._due.append(now + seconds)
        return seconds

    def pace(self, now: float) -> float:
        """Slots a second that come free by calls' ends; 0 where too few ended to tell."""
        while self._ended and self._ended[0] <= now - LOOK_BACK_SECONDS:
            self._ended.popleft()
        if len(self._ended) < 2:
            return 0.0
        full = len(self._ended) == MOST_ENDINGS
        return len(self._ended) / (now - self._ended[0] if full else LOOK_BACK_SECONDS)


class Outlook:
    """The prospects of all agents."""

    def __init__(self) -> None:
        self._prospects: dict[str, Prospects] = {}

    def __repr__(self) -> str:
        return f"<Outlook {self._prospects}>"

    def of(self, agent: str) -> Prospects:
        return self._prospects.setdefault(agent, Prospects())

    def replace(self, runway: Runway, now: float) -> None:
        """Takes the operator's word. Agents that are not in it can expect no pod."""
        for prospects in self._prospects.values():
            prospects.coming = ()
        self.update(runway, now)

    def update(self, runway: Runway, now: float) -> None:
        """The same, and others can expect what they could."""
        for agent, starting in runway.items():
            coming = (Coming(slots, now + seconds) for slots, seconds in starting)
            self.of(agent).coming = tuple(coming)

    def keep(self, agents: Collection[str]) -> None:
        """There are no others."""
        for agent in self._prospects.keys() - agents:
            del self._prospects[agent]


def seconds_until(wanted: int, pace: float, coming: Iterable[Coming], now: float) -> float | None:
    """How long until so many slots have come free; None where what is known does not bring them."""
    steps = sorted(
        (each.at if each.at > now else now + LATE_POD_SECONDS, each.slots) for each in coming
    )
    have, since = 0.0, now
    for at, slots in (*steps, (float("inf"), 0)):
        if pace and (reached := since + (wanted - have) / pace) <= at:
            return reached - now
        if at == float("inf"):
            break
        have += pace * (at - since) + slots
        since = at
        if have >= wanted:
            return at - now
    return None


def retry_after(
    ahead: int, pace: float, coming: Sequence[Coming], now: float, chance: float
) -> int:
    """Seconds for `Retry-After`. `ahead` callers come first, `chance` is from 0 to 1."""
    expected = seconds_until(ahead + 1, pace, coming, now)
    if expected is None:
        least, most = UNKNOWN_SECONDS
        return least + round((most - least) * chance)
    spread = min(expected * (1 + SPREAD * chance), MOST_SECONDS)
    return max(LEAST_SECONDS, ceil(spread))
