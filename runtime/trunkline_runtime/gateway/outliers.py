"""Which workers get no call for a while, because they failed those before. Pure: the time is an argument.

A worker collects demerits and is set aside at one whole. Whatever ends in a call takes some back. It comes back
by itself, and a next demerit soon after sets it aside for twice as long: so a worker that is broken costs few
callers a moment each, and one that was only slow is back in seconds.

Never more than half of an agent's workers are aside, and never the only one: when everybody fails, the fault is
not theirs, and a bad slot is better than none.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from trunkline_runtime.gateway.table import Row


class Demerit(StrEnum):
    """What a worker did wrong."""

    REFUSED = "offered a slot and did not take a call"  # or could not be dialled
    SILENT = "did not answer a call in time"
    SLOW = "was slow to answer a call"
    LATE = "missed deadlines of its frames"


WEIGHTS: Final[Mapping[Demerit, float]] = {
    Demerit.REFUSED: 1.0,  # its word is worth nothing: once is enough
    Demerit.SILENT: 0.5,
    Demerit.SLOW: 0.2,
    Demerit.LATE: 0.34,  # three reports, which come each second
}
GOOD: Final = 0.5  # what an answered call takes back
SLOW_SECONDS: Final = (
    0.1  # an answer takes 1 ms; a worker that needs 100 times as long is short of something
)
LATE_SHARE: Final = 0.05  # of the frames of a second: callers hear it
ASIDE_SECONDS: Final = (5.0, 120.0)  # the first time, and the longest
MERCY_SECONDS: Final = (
    300.0  # after so long without being set aside, it counts as the first time again
)


@dataclass(slots=True)
class _Mark:
    """What is held against one worker."""

    demerits: float = 0.0
    until: float = 0.0  # aside until then
    wait: float = 0.0  # for so long it was set aside last


class Outliers:
    """The marks of all workers at one gateway. Rows are told apart by identity: a new boot begins anew."""

    def __init__(self) -> None:
        self._marks: dict[Row, _Mark] = {}

    def __repr__(self) -> str:
        marks = {row.worker: round(mark.demerits, 2) for row, mark in self._marks.items()}
        return f"<Outliers {marks}>"

    def bad(self, row: Row, demerit: Demerit, now: float, peers: Collection[Row]) -> float | None:
        """Notes a demerit; for how many seconds the worker is to be set aside, None if it is not.

        `peers` are all workers of its agent, itself among them.
        """
        mark = self._marks.setdefault(row, _Mark())
        mark.demerits += WEIGHTS[demerit]
        if mark.demerits < 1.0 or row.aside or not _may_miss_one_more(peers):
            mark.demerits = min(mark.demerits, 1.0)
            return None
        if now - mark.until > MERCY_SECONDS:
            mark.wait = 0.0
        mark.wait = min(2 * mark.wait or ASIDE_SECONDS[0], ASIDE_SECONDS[1])
        mark.until, mark.demerits = now + mark.wait, 0.5
        return mark.wait

    def good(self, row: Row) -> None:
        """A call was answered there."""
        if mark := self._marks.get(row):
            mark.demerits = max(0.0, mark.demerits - GOOD)

    def back(self, now: float) -> list[Row]:
        """Those that were set aside and may have calls again."""
        return [row for row, mark in self._marks.items() if row.aside and now >= mark.until]

    def aside(self) -> dict[str, int]:
        """How many are set aside, by agent."""
        return dict(Counter(row.agent for row in self._marks if row.aside))

    def forget(self, row: Row) -> None:
        """The worker is gone."""
        self._marks.pop(row, None)


def _may_miss_one_more(peers: Collection[Row]) -> bool:
    return 2 * (sum(row.aside for row in peers) + 1) <= len(peers)
