"""What became of a set of calls: the callers' own logs joined with the workers' slot logs. Pure.

Nothing here comes from a gateway, so that a gateway cannot vouch for itself.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trunkline_dev.slot_log import SlotRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One call as its caller saw it. Times are seconds since the epoch, of this machine's one clock."""

    offered: float  # the upgrade was sent
    call: str | None  # the call id in the answer
    answered: float | None = None  # the 101 came
    status: int | None = None  # of a refusal
    ended: float | None = None  # the caller hung up, or found the call gone
    dropped: bool = False  # the caller did not hang up, and yet the call ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """A call in a slot."""

    call: str
    place: str  # warm | burst
    worker: str
    boot: str
    slot: int
    began: float
    ended: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The sums that the promises are about."""

    offered: int
    warm: int
    burst: int
    refused: int
    dropped: int
    without_slot: int
    double_booked: int
    unanswered: int  # neither answered nor refused: the caller gave up, or nothing came

    @property
    def kept(self) -> bool:
        """Nobody was dropped, answered without a slot, given another's slot, or left without an answer."""
        return not (self.dropped or self.without_slot or self.double_booked or self.unanswered)


def stays(records: Iterable[SlotRecord]) -> list[Stay]:
    """Every time that a call held a slot, from `live` to `freed`."""
    began: dict[tuple[str, str, int], SlotRecord] = {}
    found = []

    def close(record: SlotRecord, ended: float | None) -> None:
        found.append(
            Stay(
                call=record.call,
                place=record.place,
                worker=record.worker,
                boot=record.boot,
                slot=record.slot,
                began=record.t,
                ended=ended,
            )
        )

    for record in sorted(records, key=lambda record: record.t):
        key = record.worker, record.boot, record.slot
        if record.what == "live":
            if key in began:  # a second call in the slot: both stays are told, and overlap
                close(began[key], None)
            began[key] = record
        elif record.what == "freed" and key in began:
            close(began.pop(key), record.t)
    for record in began.values():
        close(record, None)
    return sorted(found, key=lambda stay: stay.began)


def overlaps(found: Sequence[Stay]) -> int:
    """How many stays began in a slot that another call still held."""
    by_slot = defaultdict[tuple[str, str, int], list[Stay]](list)
    for stay in sorted(found, key=lambda stay: stay.began):
        by_slot[stay.worker, stay.boot, stay.slot].append(stay)
    return sum(
        earlier.ended is None or earlier.ended > later.began
        for row in by_slot.values()
        for earlier, later in pairwise(row)
    )


def written(outcomes: Iterable[Outcome], records: Iterable[SlotRecord]) -> bool:
    """Whether workers have told of every call that was answered. They do so a moment after they have answered."""
    held = {record.call for record in records if record.what == "live"}
    return all(outcome.call in held for outcome in outcomes if outcome.answered is not None)


def account(outcomes: Sequence[Outcome], records: Sequence[SlotRecord]) -> Account:
    """Joins by call id. A call answered before its worker held a slot for it, or held by no worker at
    all, was answered without a slot."""
    held = stays(records)
    by_call = defaultdict[str, list[Stay]](list)
    for stay in held:
        by_call[stay.call].append(stay)
    places = {"warm": 0, "burst": 0}
    without_slot = 0
    for outcome in outcomes:
        if outcome.answered is None:
            continue
        covering = [
            stay
            for stay in by_call.get(outcome.call or "", [])
            if stay.began <= outcome.answered
            and (stay.ended is None or stay.ended > outcome.answered)
        ]
        if covering:
            places[covering[0].place] += 1
        else:
            without_slot += 1
    return Account(
        offered=len(outcomes),
        warm=places["warm"],
        burst=places["burst"],
        refused=sum(outcome.status is not None for outcome in outcomes),
        dropped=sum(outcome.dropped for outcome in outcomes),
        without_slot=without_slot,
        double_booked=overlaps(held),
        unanswered=sum(outcome.answered is None and outcome.status is None for outcome in outcomes),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; 0 for no values."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else 0.0
