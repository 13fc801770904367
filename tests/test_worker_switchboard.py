"""The slots on a running loop: told of soon and at once, counted in order, and quiet in the end."""

import asyncio
import logging
import time

import pytest
from worker_rig import PATIENCE

from trunkline_runtime.worker.switchboard import LATER_SECONDS, SOON_SECONDS, STOPPING, Switchboard


async def told_of(board: Switchboard) -> None:
    """Returns when the board has told of all that has happened."""
    async with asyncio.timeout(PATIENCE):
        while board._telling is not None:
            await asyncio.sleep(SOON_SECONDS)


async def test_many_changes_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trunkline.slots")
    board = Switchboard(slots=4, worker="w", boot="b")
    told: list[int] = []
    board.on_change(lambda: told.append(board.busy))
    seats = [board.take(call) for call in "abc"]
    assert seats[0] is not None
    board.end(seats[0])
    board.drain(1)
    assert told == [], "nobody is called from inside a change"
    assert not caplog.records, "and nothing is logged while a gateway waits"
    await told_of(board)
    assert told == [2]
    steps = [(record.message, record.__dict__["call"]) for record in caplog.records]
    assert steps == [*(("live", each) for each in "abc"), ("freed", "a")]
    free = board.free()
    assert free == {"type": "free", "n": 0, "busy": 2, "draining": True, "seq": free["seq"]}
    board.drain(1)
    assert board.take("d") is None
    assert board.free() == free
    assert board._telling is None
    assert told == [2], "nothing changed"


async def test_what_was_not_told_yet_can_be_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trunkline.slots")
    board = Switchboard(slots=1, worker="w", boot="b")
    told: list[int] = []
    board.on_change(lambda: told.append(board.busy))
    before = time.time()
    board.take("a")
    after = time.time()
    board.tell()
    board.tell()
    (line,) = caplog.records
    assert before <= line.__dict__["t"] <= after, "of the change, not of its line"
    assert told == [1]
    await asyncio.sleep(2 * LATER_SECONDS)
    assert told == [1], "and is not told again"


async def test_what_callers_go_by_is_told_sooner_than_the_rest() -> None:
    loop = asyncio.get_running_loop()
    board = Switchboard(slots=2, worker="w", boot="b")
    began = loop.time()
    first = board.take("a")
    assert first is not None
    assert board._telling_at >= began + LATER_SECONDS
    second = board.take("b")  # the last
    assert second is not None
    assert began + SOON_SECONDS <= board._telling_at < began + LATER_SECONDS
    board.tell()
    board.end(first)  # there is room again
    assert board._telling_at < began + LATER_SECONDS
    soon = board._telling_at
    board.end(second)
    assert board._telling_at == soon, "what is due sooner stays due"
    board.tell()
    board.drain(1)
    assert board._telling_at < loop.time() + LATER_SECONDS


async def test_what_comes_later_has_a_higher_number() -> None:
    board = Switchboard(slots=2, worker="w", boot="b")
    counts = [board.free()]
    seat = board.take("a")
    assert seat is not None
    counts.append(board.free())
    board.drain(1)
    counts.append(board.free())
    board.drain(1, wanted=False)
    counts.append(board.free())
    board.offer(1)
    counts.append(board.free())
    board.end(seat)
    counts.append(board.free())
    numbers = [free["seq"] for free in counts]
    assert numbers == sorted(set(numbers))
    async with asyncio.timeout(PATIENCE):
        await board.quiet()


async def test_an_undrain_of_a_gateway_does_not_bring_back_a_worker_that_stops() -> None:
    board = Switchboard(slots=1, worker="w", boot="b")
    board.drain(7)
    board.drain(STOPPING)
    board.drain(7, wanted=False)
    assert board.draining
    assert board.take("a") is None
    assert repr(board) == "<Switchboard <Slots 0:free draining> drainers=['stopping']>"
    board.drain(STOPPING, wanted=False)
    assert board.take("a") is not None
