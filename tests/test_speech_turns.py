"""When the caller's turn begins, pauses and ends; and the pace of a reply."""

import math
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from trunkline_runtime.engine import FRAME_BYTES, SAMPLE_RATE, ReplyAudio, ReplyText, TurnDetection
from trunkline_runtime.engine.speech.playout import LEAD_SECONDS, Playout
from trunkline_runtime.engine.speech.turns import (
    MAX_TURN_MS,
    ONSET_WINDOWS,
    WINDOW_MS,
    Change,
    Phase,
    Turns,
)

VOICE, SILENCE = (0.9, -20.0), (0.02, -70.0)
Windows = Iterable[tuple[float, float]]


def changes(turns: Turns, windows: Windows) -> list[tuple[int, Change]]:
    """Each change, with the time at which it was found."""
    found = []
    for probability, level in windows:
        if change := turns.window(probability, level):
            found.append((turns.position_ms, change))
    return found


def heard(voice: int, silence: int) -> list[tuple[float, float]]:
    return [VOICE] * voice + [SILENCE] * silence


def test_a_turn() -> None:
    turns = Turns(TurnDetection())
    assert changes(turns, [SILENCE] * 20) == []
    assert changes(turns, heard(30, 20)) == [
        (22 * WINDOW_MS, Change.STARTED),
        (53 * WINDOW_MS, Change.PAUSED),
        (60 * WINDOW_MS, Change.STOPPED),  # 320 ms, the first multiple of 32 from 300 on
    ]
    assert turns.started_ms == 20 * WINDOW_MS - 300


def test_speech_that_goes_on_after_a_pause_is_one_turn() -> None:
    turns = Turns(TurnDetection())
    found = [change for _, change in changes(turns, heard(10, 5) + heard(10, 10))]
    assert found == [Change.STARTED, Change.PAUSED, Change.RESUMED, Change.PAUSED, Change.STOPPED]


def test_a_click_is_no_turn() -> None:
    assert changes(Turns(TurnDetection()), [SILENCE, VOICE, SILENCE] * 20) == []


def test_the_padding_before_a_turn_ends_at_the_start_of_the_call() -> None:
    turns = Turns(TurnDetection())
    changes(turns, heard(5, 0))
    assert turns.started_ms == 0


def test_a_softer_voice_goes_on_and_does_not_begin_a_turn() -> None:
    soft = (0.4, -30.0)
    turns = Turns(TurnDetection(threshold=0.5))
    assert changes(turns, [soft] * 20) == []
    assert changes(turns, [VOICE] * 5 + [soft] * 40) == [(22 * WINDOW_MS, Change.STARTED)]


def test_a_voice_that_has_gone_is_silence_before_the_detector_says_so() -> None:
    turns = Turns(TurnDetection())
    lagging = [(0.95, -60.0)] * 10
    assert [change for _, change in changes(turns, [VOICE] * 10 + lagging)][-1] is Change.STOPPED


def test_a_pause_as_long_as_the_end_is_only_the_end() -> None:
    turns = Turns(TurnDetection(silence_ms=64))
    assert [change for _, change in changes(turns, heard(10, 2))] == [
        Change.STARTED,
        Change.STOPPED,
    ]


def test_an_endless_turn_is_ended() -> None:
    found = changes(Turns(TurnDetection()), [VOICE] * 2000)
    stopped = [at for at, change in found if change is Change.STOPPED]
    assert stopped[0] <= MAX_TURN_MS + WINDOW_MS
    assert len(stopped) == 2000 * WINDOW_MS // MAX_TURN_MS


def test_without_detection_nothing_is_found_and_time_goes_on() -> None:
    turns = Turns(TurnDetection())
    changes(turns, heard(10, 0))
    turns.configure(TurnDetection(enabled=False))
    assert turns.phase is Phase.LISTENING
    assert changes(turns, heard(30, 30)) == []
    assert turns.position_ms == 70 * WINDOW_MS


window = st.tuples(st.floats(0, 1), st.floats(-120, 0))
NEXT = {
    None: {Change.STARTED},
    Change.STARTED: {Change.PAUSED, Change.STOPPED},
    Change.PAUSED: {Change.RESUMED, Change.STOPPED},
    Change.RESUMED: {Change.PAUSED, Change.STOPPED},
    Change.STOPPED: {Change.STARTED},
}


@given(
    st.lists(st.one_of(window, st.just(VOICE), st.just(SILENCE)), max_size=300),
    st.integers(0, 800),
    st.floats(0, 1),
)
def test_changes_come_in_order_whatever_is_heard(
    windows: list[tuple[float, float]], silence_ms: int, threshold: float
) -> None:
    turns = Turns(TurnDetection(silence_ms=silence_ms, threshold=threshold))
    before: Change | None = None
    for at, change in changes(turns, windows):
        assert change in NEXT[before]
        assert before is not None or at >= ONSET_WINDOWS * WINDOW_MS
        before = change
    assert (turns.phase is Phase.LISTENING) == (before in (None, Change.STOPPED))


def test_a_reply_leaves_a_little_ahead_of_the_ear() -> None:
    playout = Playout()
    playout.put("One.", bytes(SAMPLE_RATE * 2))  # a second
    at_once = playout.due(10.0)
    assert at_once[0] == ReplyText("One.")
    assert len(at_once) == 1 + math.floor(LEAD_SECONDS / 0.08) + 1
    assert playout.due(10.0) == []
    assert len(playout.due(10.0 + playout.wait(10.0))) == 1


@given(
    st.lists(st.integers(0, 5 * FRAME_BYTES).map(lambda n: n // 2 * 2), min_size=1, max_size=5),
    st.lists(st.floats(0, 0.5), max_size=40),
)
def test_playout_loses_nothing_and_is_never_far_ahead(sizes: list[int], waits: list[float]) -> None:
    playout, now, left = Playout(), 0.0, bytearray()
    heard_at = 0.0  # when a caller who plays what has come will have heard it
    sentences = [bytes([index]) * size for index, size in enumerate(sizes)]
    for index, pcm in enumerate(sentences):
        playout.put(str(index), pcm)
    texts = []
    for wait in [*waits, *([0.1] * 60)]:
        for event in playout.due(now):
            if isinstance(event, ReplyText):
                texts.append(event.text)
                assert bytes(left) == b"".join(sentences[: int(event.text)])
            else:
                assert isinstance(event, ReplyAudio)
                assert 0 < len(event.pcm) <= FRAME_BYTES
                left += event.pcm
                heard_at = max(heard_at, now) + len(event.pcm) / (2 * SAMPLE_RATE)
                assert heard_at - now <= LEAD_SECONDS + 0.08 + 1e-9
        now += wait
    assert bytes(left) == b"".join(sentences)
    assert texts == [str(index) for index in range(len(sentences))]
    assert not playout.pending
    assert abs(playout.seconds) < 1e-9
