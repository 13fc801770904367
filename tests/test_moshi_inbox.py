"""What waits for the frame clock: nothing is heard twice, and no call drifts."""

from hypothesis import example, given
from hypothesis import strategies as st

from trunkline_runtime.engine import FRAME_BYTES
from trunkline_runtime.engine.moshi.inbox import (
    MAX_FRAMES,
    SILENCE,
    STALL_TICKS,
    WINDOW_TICKS,
    Inbox,
)


def frame(number: int) -> bytes:
    return number.to_bytes(2, "little") * (FRAME_BYTES // 2)


def test_frames_come_out_whole_and_in_order() -> None:
    inbox = Inbox()
    inbox.put(frame(1) + frame(2)[:100])
    assert inbox.take() == frame(1)
    assert inbox.take() is None, "a part of a frame waits for the rest"
    inbox.put(frame(2)[100:])
    assert inbox.take() == frame(2)


def test_a_caller_who_sends_nothing_is_silent_after_a_while() -> None:
    inbox = Inbox()
    inbox.put(frame(7)[:10])
    assert [inbox.take() for _ in range(STALL_TICKS)] == [None] * STALL_TICKS
    assert inbox.take() == frame(7)[:10] + SILENCE[10:], "the part is heard, and silence after it"
    assert inbox.take() == SILENCE
    inbox.put(frame(8))
    assert inbox.take() == frame(8)
    assert inbox.take() is None, "the next gap is waited for again"


def test_the_oldest_is_dropped_where_too_much_waits() -> None:
    inbox = Inbox()
    inbox.put(b"".join(frame(number) for number in range(MAX_FRAMES + 3)))
    assert inbox.take() == frame(3)
    assert inbox.dropped == 3


def test_a_backlog_that_stays_is_dropped_and_one_that_comes_and_goes_is_not() -> None:
    staying, going = Inbox(), Inbox()
    staying.put(b"".join(frame(number) for number in range(10)))
    for tick in range(WINDOW_TICKS):
        staying.put(frame(100 + tick))
        if tick % 5 == 0:
            going.put(b"".join(frame(200 + tick + n) for n in range(5)))
        staying.take()
        going.take()
    assert (staying.dropped, going.dropped) == (9, 0)
    assert staying.take() == frame(100 + WINDOW_TICKS - 1), "one frame behind"


@given(st.lists(st.integers(0, 40), min_size=1, max_size=200))
@example([0, 0, 0])
def test_whatever_comes_a_call_is_never_more_than_two_seconds_behind(sizes: list[int]) -> None:
    """Bytes are numbered by their frame; what comes out is in order and holds no more than came in."""
    inbox, number, said = Inbox(), 0, []
    for size in sizes:
        inbox.put(b"".join(frame(1 + number + n) for n in range(size)))
        number += size
        taken = inbox.take()
        if taken is not None and taken != SILENCE:
            said.append(int.from_bytes(taken[:2], "little"))
            assert number - said[-1] < MAX_FRAMES
    assert said == sorted(set(said))
    backlog = 0
    while inbox.take() not in (None, SILENCE):
        backlog += 1
    assert len(said) + inbox.dropped + backlog == number
