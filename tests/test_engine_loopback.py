"""The loopback engine: a frame in, a frame out, on a clock that does not drift."""

import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline_runtime.engine import (
    FRAME_BYTES,
    Ended,
    Event,
    ReplyAudio,
    ReplyEnded,
    ReplyStarted,
    TurnDetection,
)
from trunkline_runtime.engine.loopback import (
    FRAME_SECONDS,
    LATE_SECONDS,
    MAX_QUEUED_BYTES,
    QUIET_TICKS,
    LoopbackConversation,
    LoopbackEngine,
    next_due,
)

MAX_FRAMES = MAX_QUEUED_BYTES // FRAME_BYTES


def frame(number: int) -> bytes:
    return number.to_bytes(2, "little") * (FRAME_BYTES // 2)


def opened(engine: LoopbackEngine) -> tuple[LoopbackConversation, list[Event]]:
    events: list[Event] = []
    return engine.open({}, events.append), events


def test_each_tick_gives_each_conversation_one_frame() -> None:
    engine = LoopbackEngine(slots=2)
    (first, to_first), (second, to_second) = opened(engine), opened(engine)
    first.hear(frame(1) + frame(2))
    second.hear(frame(3)[:-2])
    engine.tick()
    assert to_first == [ReplyStarted(), ReplyAudio(frame(1))]
    assert to_second == [], "a frame that is not whole waits"
    second.hear(frame(3)[-2:])
    engine.tick()
    assert to_first[2:] == [ReplyAudio(frame(2))]
    assert to_second == [ReplyStarted(), ReplyAudio(frame(3))]
    assert engine.totals() == {
        "frames": 3,
        "late_frames": 0,
        "dropped_frames": 0,
        "skipped_ticks": 0,
    }


def test_cancel_ends_the_reply_and_what_is_queued() -> None:
    engine = LoopbackEngine(slots=1)
    conversation, events = opened(engine)
    conversation.cancel()
    assert events == [], "there was no reply to cancel"
    conversation.hear(frame(1) + frame(2))
    engine.tick()
    conversation.cancel()
    engine.tick()
    assert events == [ReplyStarted(), ReplyAudio(frame(1)), ReplyEnded(Ended.CANCELLED)]
    conversation.hear(frame(3))
    engine.tick()
    assert events[3:] == [ReplyStarted(), ReplyAudio(frame(3))]


def test_silence_ends_the_reply() -> None:
    engine = LoopbackEngine(slots=1)
    conversation, events = opened(engine)
    conversation.hear(frame(1))
    for _ in range(QUIET_TICKS):
        engine.tick()
    assert events == [ReplyStarted(), ReplyAudio(frame(1))]
    engine.tick()
    assert events[2:] == [ReplyEnded(Ended.COMPLETED)]
    engine.tick()
    assert len(events) == 3


@pytest.mark.parametrize("ask", ["commit", "respond"])
def test_a_turn_that_is_over_is_given_back_to_its_last_sample(ask: str) -> None:
    engine = LoopbackEngine(slots=1)
    conversation, events = opened(engine)
    conversation.configure(TurnDetection())
    conversation.hear(frame(1) + frame(2)[:100])
    getattr(conversation, ask)()
    for _ in range(4):
        engine.tick()
    assert events == [
        ReplyStarted(),
        ReplyAudio(frame(1)),
        ReplyAudio(frame(2)[:100] + bytes(FRAME_BYTES - 100)),
        ReplyEnded(Ended.COMPLETED),
    ]


def test_a_reply_that_is_asked_for_comes_though_it_is_empty() -> None:
    engine = LoopbackEngine(slots=1)
    conversation, events = opened(engine)
    conversation.hear(frame(1))
    conversation.clear()
    conversation.respond("Say something.")
    engine.tick()
    engine.tick()
    assert events == [ReplyStarted(), ReplyEnded(Ended.COMPLETED)]


def test_the_oldest_audio_goes_when_too_much_waits() -> None:
    engine = LoopbackEngine(slots=1)
    conversation, events = opened(engine)
    conversation.hear(frame(0)[:2])
    for number in range(MAX_FRAMES + 3):
        conversation.hear(frame(number))
    assert engine.count.dropped_frames == 4, "the part of a frame counts as one"
    for _ in range(MAX_FRAMES):
        engine.tick()
    heard = b"".join(event.pcm for event in events if isinstance(event, ReplyAudio))
    assert len(heard) == (MAX_FRAMES - 1) * FRAME_BYTES
    assert heard.startswith(frame(3)[:2] + frame(4)[:2]), "the part shifts all by a sample"


@given(st.lists(st.integers(1, 3 * FRAME_BYTES // 2), max_size=40), st.integers(0, 3))
def test_what_is_given_back_is_what_was_heard(samples: list[int], ticks: int) -> None:
    engine = LoopbackEngine(slots=1)
    conversation, events = opened(engine)
    sent = bytearray()
    for number, count in enumerate(samples):
        pcm = number.to_bytes(2, "little") * count
        sent += pcm
        conversation.hear(pcm)
        for _ in range(ticks):
            engine.tick()
    for _ in range(MAX_FRAMES):
        engine.tick()
    heard = b"".join(event.pcm for event in events if isinstance(event, ReplyAudio))
    dropped = engine.count.dropped_frames * FRAME_BYTES
    assert len(heard) == (len(sent) - dropped) // FRAME_BYTES * FRAME_BYTES
    if not dropped:
        assert sent.startswith(heard)


def test_no_event_follows_close_and_the_slot_is_free_again() -> None:
    engine = LoopbackEngine(slots=1)
    conversation, events = opened(engine)
    conversation.hear(frame(1))
    with pytest.raises(RuntimeError, match="all 1 slots"):
        opened(engine)
    engine.tick()
    assert len(events) == 2
    conversation.close()
    conversation.cancel()  # of the reply that was being spoken
    conversation.hear(frame(2))
    conversation.respond()
    conversation.tick()  # the engine's thread may have been about to
    engine.tick()
    conversation.close()
    assert len(events) == 2
    opened(engine)


def test_late_frames_are_counted() -> None:
    engine = LoopbackEngine(slots=1)
    conversation, _ = opened(engine)
    conversation.hear(frame(1) + frame(2))
    engine.tick(late=LATE_SECONDS)
    engine.tick(late=LATE_SECONDS * 1.01)
    assert (engine.count.frames, engine.count.late_frames) == (2, 1)


@given(st.lists(st.floats(0, 1.9), min_size=1, max_size=50))
def test_the_clock_does_not_drift(delays: list[float]) -> None:
    due = now = 100.0
    for ticks, delay in enumerate(delays, start=1):
        now = max(now, due) if delay < 1 else max(now, due) + delay - 1
        if now - due > 1.9:
            return
        due, skipped = next_due(due, now)
        assert skipped == 0
        assert due == pytest.approx(100.0 + ticks * FRAME_SECONDS)


def test_a_process_that_stood_still_makes_no_burst() -> None:
    due, skipped = next_due(100.0, 3_700.0)
    assert skipped == pytest.approx(3_600 / FRAME_SECONDS, abs=1)
    assert 3_700.0 - FRAME_SECONDS <= due <= 3_700.0 + FRAME_SECONDS
    assert (due - 100.0) / FRAME_SECONDS == pytest.approx(round((due - 100.0) / FRAME_SECONDS))


def test_the_thread_keeps_the_pace_of_speech() -> None:
    engine = LoopbackEngine(slots=64)
    enough, times = threading.Event(), list[float]()

    def emit(event: Event) -> None:
        if isinstance(event, ReplyAudio):
            times.append(time.monotonic())
            if len(times) == 10:
                enough.set()

    conversation = engine.open({}, emit)
    conversation.hear(b"".join(map(frame, range(10))))
    engine.load()
    began = time.monotonic()
    engine.resume()
    try:
        assert enough.wait(20)
    finally:
        engine.close()
    # Never ahead of the clock; how far behind it depends on the machine.
    assert times[-1] - began >= 8.5 * FRAME_SECONDS
    assert engine.totals()["frames"] == 10


def test_an_engine_closes_before_it_ever_ran() -> None:
    LoopbackEngine(slots=1).close()


def test_repr_shows_what_waits() -> None:
    engine = LoopbackEngine(slots=3)
    conversation: Any = opened(engine)[0]
    conversation.hear(frame(1) + frame(1)[: FRAME_BYTES // 2])
    assert repr(conversation) == "<LoopbackConversation queued=1.5 speaking=False>"
    assert repr(engine).startswith("<LoopbackEngine 1 of 3 Totals(frames=0")
