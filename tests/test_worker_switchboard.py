"""The slots on a running loop: told of soon and at once, lapsing by themselves, and quiet in the end."""

import asyncio
import logging
import time

import pytest
from worker_rig import AGENT, PATIENCE

from trunkline_runtime.worker.orders import ReserveOrder
from trunkline_runtime.worker.slots import State
from trunkline_runtime.worker.switchboard import STOPPING, TELL_SECONDS, Switchboard


def wanted(call: str, seconds: float = 30) -> ReserveOrder:
    return ReserveOrder(call=call, agent=AGENT, settings={}, seconds=seconds)


async def told_of(board: Switchboard) -> None:
    """Returns when the board has told of all that has happened."""
    async with asyncio.timeout(PATIENCE):
        while board._telling is not None:
            await asyncio.sleep(TELL_SECONDS)


async def test_many_changes_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trunkline.slots")
    board = Switchboard(slots=4, worker="w", boot="b")
    told: list[int] = []
    board.on_change(lambda: told.append(board.busy))
    tickets = [board.reserve(wanted(call), 1) for call in "abc"]
    seat = board.claim(tickets[0] or "")
    assert seat is not None
    board.end(seat)
    board.drain(1)
    assert told == [], "nobody is called from inside a change"
    assert not caplog.records, "and nothing is logged while a gateway waits for its answer"
    await told_of(board)
    assert told == [2]
    steps = [(record.message, record.__dict__["call"]) for record in caplog.records]
    assert steps == [*(("reserved", each) for each in "abc"), ("live", "a"), ("freed", "a")]
    assert board.free() == {"type": "free", "n": 0, "busy": 2, "draining": True}
    board.drain(1)
    board.release("a ticket that is gone")
    assert board._telling is None
    assert told == [2], "nothing changed"


async def test_what_was_not_told_yet_can_be_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trunkline.slots")
    board = Switchboard(slots=1, worker="w", boot="b")
    told: list[int] = []
    board.on_change(lambda: told.append(board.busy))
    before = time.time()
    board.reserve(wanted("a"), 1)
    after = time.time()
    board.tell()
    board.tell()
    (line,) = caplog.records
    assert before <= line.__dict__["t"] <= after, "of the change, not of its line"
    assert told == [1]
    await asyncio.sleep(2 * TELL_SECONDS)
    assert told == [1], "and is not told again"


async def test_grants_lapse_by_themselves_each_at_its_own_time() -> None:
    board = Switchboard(slots=3, worker="w", boot="b")
    board.reserve(wanted("late", 0.2), 1)
    board.reserve(wanted("early", 0.05), 1)
    board.reserve(wanted("released", 0.1), 1)
    busy: list[int] = []
    board.on_change(lambda: busy.append(board.busy))
    board.release(board.reserve(wanted("released", 0.1), 1) or "")
    async with asyncio.timeout(PATIENCE):
        await board.quiet()
        await told_of(board)
    assert busy[0] == 2
    assert busy[-1] == 0
    assert board.counts()[State.FREE] == 3


async def test_an_undrain_of_a_gateway_does_not_bring_back_a_worker_that_stops() -> None:
    board = Switchboard(slots=1, worker="w", boot="b")
    board.drain(7)
    board.drain(STOPPING)
    board.drain(7, wanted=False)
    assert board.draining
    assert board.reserve(wanted("a"), 7) is None
    assert repr(board) == "<Switchboard <Slots 0:free draining> drainers=['stopping']>"
    board.drain(STOPPING, wanted=False)
    assert board.reserve(wanted("a"), 7) is not None
