"""The demo's verdict: it must see what a careless gateway would hide."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from trunkline_dev.accounts import Outcome, account, overlaps, percentile, stays, written
from trunkline_dev.slot_log import SlotRecord


def record(what: str, call: str, t: float, slot: int = 0, place: str = "warm") -> SlotRecord:
    return SlotRecord(what, call, place, "echo-0", "boot", slot, t)


def outcome(call: str, answered: float = 2.0) -> Outcome:
    return Outcome(offered=1.0, call=call, answered=answered, ended=5.0)


def test_a_quiet_hour() -> None:
    records = [
        record("reserved", "a", 1.5),
        record("live", "a", 1.8),
        record("live", "b", 1.9, slot=1, place="burst"),
        record("freed", "a", 5.1),
    ]
    refused = Outcome(offered=1.0, call="c", status=503)
    found = account([outcome("a"), outcome("b"), refused], records)
    assert (found.offered, found.warm, found.burst, found.refused) == (3, 1, 1, 1)
    assert found.kept


def test_answered_without_a_slot() -> None:
    found = account([outcome("a"), outcome("ghost")], [record("live", "a", 1.8)])
    assert found.without_slot == 1
    assert not found.kept


def test_workers_have_written_of_all_that_was_answered_or_have_not_yet() -> None:
    refused = Outcome(offered=1.0, call="c", status=503)
    records = [record("reserved", "a", 1.5), record("live", "b", 1.8, slot=1)]
    assert not written([outcome("a"), outcome("b"), refused], records)
    assert written([outcome("a"), outcome("b"), refused], [*records, record("live", "a", 1.9)])
    assert written([refused], [])


def test_answered_before_the_slot_was_held() -> None:
    assert account([outcome("a", answered=1.7)], [record("live", "a", 1.8)]).without_slot == 1


def test_answered_after_the_slot_was_freed() -> None:
    records = [record("live", "a", 1.2), record("freed", "a", 1.5)]
    assert account([outcome("a")], records).without_slot == 1


def test_two_calls_in_one_slot() -> None:
    records = [record("live", "a", 1.0), record("live", "b", 1.5), record("freed", "b", 3.0)]
    found = account([outcome("a"), outcome("b")], records)
    assert found.double_booked == 1
    assert not found.kept


def test_a_dropped_call_and_an_unanswered_one() -> None:
    dropped = replace(outcome("a"), dropped=True)
    silent = Outcome(offered=1.0, call=None)
    found = account([dropped, silent], [record("live", "a", 1.8)])
    assert (found.dropped, found.unanswered) == (1, 1)
    assert not found.kept


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.1, 5), st.floats(0.1, 5)), max_size=30))
def test_calls_one_after_the_other_never_overlap(
    rows: list[tuple[int, float, float]],
) -> None:
    clock = dict.fromkeys(range(4), 0.0)
    records = []
    for number, (slot, gap, length) in enumerate(rows):
        began = clock[slot] + gap
        clock[slot] = began + length
        records.append(record("live", f"c{number}", began, slot))
        records.append(record("freed", f"c{number}", clock[slot], slot))
    found = stays(records)
    assert len(found) == len(rows)
    assert all(stay.ended is not None for stay in found)
    assert overlaps(found) == 0


def test_percentile() -> None:
    assert percentile([], 0.5) == 0
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile(list(range(100)), 0.99) == 99
