"""The speech engine with its real models: real audio in, real audio out, nothing but its public seam."""

import threading
from collections.abc import Iterator

import pytest
from speech_rig import (
    DIGITS,
    SECOND,
    SHORT,
    Line,
    audio_of,
    number,
    recogniser,
    spoken,
    text_of,
)

from trunkline_runtime.audio.pcm import end_of_speech
from trunkline_runtime.contract import ReplyRule, Settings
from trunkline_runtime.engine import (
    FRAME_BYTES,
    Ended,
    Event,
    Failed,
    Heard,
    ReplyAudio,
    ReplyEnded,
    ReplyStarted,
    ReplyText,
    SpeechStarted,
    SpeechStopped,
    TurnDetection,
)
from trunkline_runtime.engine.speech import SpeechEngine
from trunkline_runtime.engine.speech.replies import DEFAULT_FALLBACK, readings
from trunkline_runtime.engine.speech.voice_activity import Detector, Windows

LONG = "Once upon a time there was a telephone. It rang all day and all night. Nobody answered it."


@pytest.fixture(scope="module")
def engine() -> Iterator[SpeechEngine]:
    engine = SpeechEngine(slots=4)
    engine.load()
    engine.resume()
    yield engine
    engine.close()


def digits_in(text: str) -> set[str]:
    return {"".join(filter(str.isdigit, reading)) for reading in readings(text)}


def speech_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("speech-")]


def test_a_greeting_is_spoken_first(engine: SpeechEngine) -> None:
    with Line(engine, Settings(greeting="Hello, how can I help you?")) as line:
        assert line.until(ReplyEnded) == ReplyEnded(Ended.COMPLETED)
    assert line.kinds() == ["ReplyStarted", "ReplyText", "ReplyAudio", "ReplyEnded"]
    assert text_of(line.told) == "Hello, how can I help you?"
    assert all(len(e.pcm) <= FRAME_BYTES for e in line.told if isinstance(e, ReplyAudio))
    assert recogniser()(audio_of(line.told)) == "Hello, how can I help you?"


def test_a_spoken_question_is_answered(engine: SpeechEngine) -> None:
    with Line(engine, Settings(replies=[DIGITS])) as line:
        question = spoken(number("4719"))
        line.conversation.hear(SECOND + question + SHORT)
        line.until(ReplyEnded)
    assert line.kinds() == [
        "SpeechStarted",
        "SpeechStopped",
        "Heard",
        "ReplyStarted",
        "ReplyText",
        "ReplyAudio",
        "ReplyEnded",
    ]
    started, stopped, heard = line.told[:3]
    assert isinstance(started, SpeechStarted)
    assert isinstance(stopped, SpeechStopped)
    assert isinstance(heard, Heard)
    assert 600 <= started.at_ms <= 1000  # the voice begins at 1000, and 300 of padding come before
    end = 1000 + end_of_speech(question) * 1000
    assert end + 300 <= stopped.at_ms <= end + 600
    assert "4719" in digits_in(heard.text)
    assert heard.seconds == pytest.approx((stopped.at_ms - started.at_ms) / 1000, abs=0.4)
    assert text_of(line.told) == "4 7 1 9."
    assert "4719" in digits_in(recogniser()(audio_of(line.told)))


def test_what_no_rule_knows_gets_the_fallback_sentence_by_sentence(engine: SpeechEngine) -> None:
    with Line(engine, Settings(replies=[DIGITS])) as line:
        line.conversation.hear(spoken("What time is it?") + SHORT)
        line.until(ReplyEnded)
    assert line.kinds()[-6:] == [
        "ReplyStarted",
        *["ReplyText", "ReplyAudio"] * 2,
        "ReplyEnded",
    ]
    assert text_of(line.told) == DEFAULT_FALLBACK


def test_silence_is_no_turn(engine: SpeechEngine) -> None:
    with Line(engine, Settings()) as line:
        line.conversation.hear(SECOND * 5)
        line.conversation.respond("Still here.")
        line.until(ReplyStarted)
    assert line.kinds() == ["ReplyStarted"]


def test_speech_stops_a_reply_and_nothing_of_it_follows(engine: SpeechEngine) -> None:
    with Line(engine, Settings(greeting=LONG, replies=[DIGITS])) as line:
        line.until(ReplyAudio)
        line.conversation.hear(spoken(number("2086")) + SHORT)
        assert line.until(ReplyEnded) == ReplyEnded(Ended.INTERRUPTED)
        assert line.kinds()[-2:] == ["SpeechStarted", "ReplyEnded"]
        before = line.take()
        line.until(ReplyEnded)
    assert len(audio_of(before)) < len(spoken(LONG))
    assert line.kinds()[:3] == ["SpeechStopped", "Heard", "ReplyStarted"]
    assert text_of(line.told) == "2 0 8 6."


def test_a_reply_that_may_not_be_interrupted_goes_on(engine: SpeechEngine) -> None:
    greeting = "I go on speaking whatever you say to me."
    with Line(engine, Settings(greeting=greeting, replies=[DIGITS])) as line:
        line.conversation.configure(TurnDetection(interrupt_response=False))
        line.until(ReplyAudio)
        line.conversation.hear(spoken(number("2086")) + SHORT)
        assert line.until(ReplyEnded) == ReplyEnded(Ended.COMPLETED)
        assert audio_of(line.told) == spoken(greeting)
        line.take()
        line.until(ReplyEnded)
    assert text_of(line.told) == "2 0 8 6."


def test_a_cancelled_reply_ends_at_once(engine: SpeechEngine) -> None:
    with Line(engine, Settings(greeting=LONG)) as line:
        line.until(ReplyAudio)
        line.conversation.cancel()
        assert line.until(ReplyEnded) == ReplyEnded(Ended.CANCELLED)
        assert len(audio_of(line.take())) < len(spoken(LONG))
        line.conversation.cancel()  # there is none
        line.conversation.respond("Now this.")
        line.until(ReplyEnded)
    assert line.kinds() == ["ReplyStarted", "ReplyText", "ReplyAudio", "ReplyEnded"]
    assert text_of(line.told) == "Now this."


def test_a_caller_may_end_turns_and_ask_for_answers(engine: SpeechEngine) -> None:
    with Line(engine, Settings(replies=[DIGITS])) as line:
        line.conversation.configure(TurnDetection(enabled=False))
        line.conversation.hear(spoken(number("1234")) + SECOND)
        line.conversation.clear()
        line.conversation.hear(spoken(number("5678")) + SECOND)
        line.conversation.commit()
        heard = line.until(Heard)
        assert "5678" in digits_in(heard.text)
        line.conversation.respond()
        line.until(ReplyEnded)
    assert line.kinds() == ["Heard", "ReplyStarted", "ReplyText", "ReplyAudio", "ReplyEnded"]
    assert text_of(line.told) == "5 6 7 8."


def test_two_calls_at_once_do_not_mix(engine: SpeechEngine) -> None:
    numbers = ("3141", "2718")
    calls = [spoken(number(digits)) + SECOND for digits in numbers]
    with (
        Line(engine, Settings(replies=[DIGITS])) as one,
        Line(engine, Settings(replies=[DIGITS])) as two,
    ):
        for at in range(0, max(map(len, calls)), 960):
            for line, pcm in zip((one, two), calls, strict=True):
                line.conversation.hear(pcm[at : at + 960])
        for line, digits in zip((one, two), numbers, strict=True):
            line.until(ReplyEnded)
            assert text_of(line.told) == f"{' '.join(digits)}."
            assert digits in digits_in(recogniser()(audio_of(line.told)))


def test_a_detector_forgets_the_call_before(engine: SpeechEngine) -> None:
    speech = spoken("What time is it?")
    with Line(engine, Settings()) as line:
        line.conversation.hear(speech[: len(speech) // 4 * 2])
        line.until(SpeechStarted)
    with Line(engine, Settings(greeting="Next.")) as line:  # by then the first is put away
        line.until(ReplyEnded)
    windows = Windows().cut(speech)
    used, fresh = engine.detector(), Detector()
    assert [used.probability(w) for w in windows] == [fresh.probability(w) for w in windows]


def test_bad_rules_are_refused_and_the_engine_goes_on(engine: SpeechEngine) -> None:
    rules = [DIGITS, ReplyRule(match="(", say="x")]
    with pytest.raises(ValueError, match=r"replies\[1\]\.match is not a regular expression"):
        engine.open(Settings(replies=rules), lambda event: None)
    with Line(engine, Settings(greeting="Hello.")) as line:
        line.until(ReplyEnded)


def test_audio_far_too_fast_fails_the_call(engine: SpeechEngine) -> None:
    with Line(engine, Settings()) as line:
        line.conversation.hear(SECOND * 600)
        assert "pace of speech" in line.until(Failed).detail
        line.conversation.hear(SECOND)
        line.conversation.respond("Too late.")
    assert line.kinds() == ["Failed"]


def test_half_a_sample_is_refused(engine: SpeechEngine) -> None:
    with Line(engine, Settings()) as line, pytest.raises(ValueError, match="whole number"):
        line.conversation.hear(b"\0\0\0")


def test_a_call_whose_listener_fails_ends_alone(
    engine: SpeechEngine, caplog: pytest.LogCaptureFixture
) -> None:
    failed = threading.Event()

    def emit(event: Event) -> None:
        failed.set()
        raise RuntimeError("Event loop is closed")

    engine.open(Settings(greeting="Hello."), emit)
    assert failed.wait(60)
    with Line(engine, Settings(greeting="Hello.")) as line:
        line.until(ReplyEnded)
    assert "a call failed in the speech engine" in caplog.text


def test_nothing_follows_close(engine: SpeechEngine) -> None:
    told: list[Event] = []
    opened, spoke = threading.Event(), threading.Event()

    def emit(event: Event) -> None:
        told.append(event)
        if isinstance(event, ReplyAudio):
            opened.wait(60)
            conversation.close()  # several frames were about to leave
            spoke.set()

    conversation = engine.open(Settings(greeting=LONG), emit)
    opened.set()
    assert spoke.wait(60)
    conversation.hear(spoken("What time is it?") + SHORT)
    conversation.respond("Hello?")
    with Line(engine, Settings(greeting="Meanwhile another call.")) as line:
        line.until(ReplyEnded)
    assert [type(event) for event in told] == [ReplyStarted, ReplyText, ReplyAudio]


def test_an_engine_closed_while_it_speaks_leaves_no_thread() -> None:
    before = speech_threads()
    engine = SpeechEngine(slots=1)
    with pytest.raises(RuntimeError, match="come before open"):
        engine.open(Settings(), lambda event: None)
    engine.load()
    assert speech_threads() == before  # a snapshot may be taken here
    engine.resume()
    line = Line(engine, Settings(greeting=LONG))
    line.until(ReplyText)
    line.conversation.hear(spoken("What time is it?") + SHORT)
    assert len(speech_threads()) == len(before) + 2
    engine.close()
    assert speech_threads() == before
    line.conversation.close()
