"""One call's conversation against an engine that answers when told to; time passes by hand."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trunkline_runtime.audio.pcm import Samples
from trunkline_runtime.contract import ReplyRule, Settings
from trunkline_runtime.engine import (
    Ended,
    Event,
    Heard,
    ReplyAudio,
    ReplyEnded,
    ReplyStarted,
    ReplyText,
    SpeechStarted,
    SpeechStopped,
    TurnDetection,
)
from trunkline_runtime.engine.speech.dialogue import MAX_UNRECOGNISED, Dialogue, Reply, Turn
from trunkline_runtime.engine.speech.replies import Script
from trunkline_runtime.engine.speech.turns import MAX_TURN_MS, WINDOW_MS

WINDOW = np.full(512, 0.1, np.float32)
QUIET = np.zeros(512, np.float32)
SETTINGS = Settings(
    greeting="Hello. Welcome.",
    replies=[ReplyRule(match="red", say="Red it is. Good.")],
    fallback="Pardon?",
)


@dataclass
class Desk:
    """The engine's side: events that were told, and work that waits to be done."""

    events: list[Event] = field(default_factory=list)
    recognitions: deque[tuple[Turn, Samples]] = field(default_factory=deque)
    syntheses: deque[tuple[Reply, str]] = field(default_factory=deque)
    prepared: list[str] = field(default_factory=list)
    alarm: float | None = None

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def recognise(self, turn: Turn, samples: Samples) -> None:
        self.recognitions.append((turn, samples))

    def synthesise(self, reply: Reply, sentence: str) -> None:
        self.syntheses.append((reply, sentence))

    def prepare(self, sentence: str) -> None:
        self.prepared.append(sentence)

    def wake(self, at: float) -> None:
        self.alarm = at


class Call:
    """A dialogue, its desk and its clock."""

    def __init__(self, script: Settings = SETTINGS) -> None:
        self.desk = Desk()
        self.dialogue = Dialogue(Script.of(script), self.desk)
        self.now = 0.0

    def speak(self, windows: int) -> None:
        for _ in range(windows):
            self.dialogue.window(WINDOW, 0.9, self.now)

    def pause(self, windows: int) -> None:
        for _ in range(windows):
            self.dialogue.window(QUIET, 0.0, self.now)

    def recognise(self, text: str) -> None:
        turn, _ = self.desk.recognitions.popleft()
        self.dialogue.recognised(turn, text, self.now)

    def make(self, seconds: float = 0.1) -> None:
        reply, _ = self.desk.syntheses.popleft()
        self.dialogue.synthesised(reply, bytes(int(seconds * 24_000) * 2), self.now)

    def finish(self) -> None:
        """Makes all that is asked for and lets time pass until the reply is over."""
        while self.desk.syntheses or self.desk.alarm is not None:
            if self.desk.syntheses:
                self.make()
            else:
                self.ring()

    def ring(self) -> None:
        assert self.desk.alarm is not None
        self.now, self.desk.alarm = max(self.now, self.desk.alarm), None
        self.dialogue.tick(self.now)

    def take(self) -> list[Event]:
        """What was told since the last take, but for audio."""
        told: list[Event] = [
            event for event in self.desk.events if not isinstance(event, ReplyAudio)
        ]
        self.desk.events.clear()
        return told


def test_a_turn_is_recognised_in_the_pause_and_answered_at_its_end() -> None:
    call = Call()
    call.speak(20)
    call.pause(4)
    call.recognise("Red, please.")
    assert call.take() == [SpeechStarted(0)]
    assert call.desk.prepared == ["Red it is."]
    call.pause(6)
    assert call.take() == [
        SpeechStopped(30 * WINDOW_MS),
        Heard("Red, please.", 23 * WINDOW_MS / 1000),
        ReplyStarted(),
    ]
    call.finish()
    assert call.take() == [
        ReplyText("Red it is."),
        ReplyText(" Good."),
        ReplyEnded(Ended.COMPLETED),
    ]
    assert not call.desk.recognitions


def test_what_was_recognised_in_a_pause_is_dropped_when_speech_goes_on() -> None:
    call = Call()
    call.speak(20)
    call.pause(4)
    turn, _ = call.desk.recognitions[0]
    call.speak(20)
    assert turn.dropped
    call.recognise("Re")
    call.pause(10)
    assert call.desk.prepared == []
    call.recognise("Red green")
    assert [e.text for e in call.take() if isinstance(e, Heard)] == ["Red green"]


def test_an_end_before_recognition_waits_for_it() -> None:
    call = Call()
    call.speak(20)
    call.pause(10)
    assert isinstance(call.take()[-1], SpeechStopped)
    call.recognise("blue")
    assert [type(event) for event in call.take()] == [Heard, ReplyStarted]


def test_the_turn_has_the_moment_before_the_voice() -> None:
    call = Call()
    call.pause(100)
    call.speak(20)
    call.pause(10)
    _, samples = call.desk.recognitions[0]
    assert len(samples) == (10 + 20 + 3) * 512  # 300 ms of padding, the voice, and the pause


def test_speech_interrupts_a_reply_at_once() -> None:
    call = Call()
    call.dialogue.greet(call.now)
    call.make(seconds=3)
    call.take()
    call.speak(2)
    assert call.take() == [SpeechStarted(0), ReplyEnded(Ended.INTERRUPTED)]
    call.ring()  # the alarm for the next frame comes all the same
    assert call.desk.events == []


def test_a_sentence_that_was_being_made_for_an_interrupted_reply_is_not_spoken() -> None:
    call = Call()
    call.dialogue.greet(call.now)
    call.speak(2)
    call.take()
    call.make()
    assert call.desk.events == []


def test_without_interruption_the_answer_comes_after_the_reply() -> None:
    call = Call()
    call.dialogue.configure(TurnDetection(interrupt_response=False))
    call.dialogue.greet(call.now)
    call.make(seconds=3)
    call.speak(20)
    call.pause(10)
    call.recognise("red")
    assert ReplyEnded(Ended.INTERRUPTED) not in call.take()
    call.finish()
    assert [e.text for e in call.take() if isinstance(e, ReplyText)] == [
        " Welcome.",
        "Red it is.",
        " Good.",
    ]


def test_speech_before_the_answer_takes_its_place() -> None:
    call = Call()
    call.speak(20)
    call.pause(10)
    call.speak(20)
    call.recognise("red")
    assert [type(event) for event in call.take()] == [
        SpeechStarted,
        SpeechStopped,
        SpeechStarted,
        Heard,
    ]


def test_a_committed_turn_is_answered_when_asked() -> None:
    call = Call()
    call.dialogue.configure(TurnDetection(enabled=False))
    call.speak(20)
    call.pause(30)
    assert not call.desk.events
    call.dialogue.commit(call.now)
    call.recognise("red")
    assert call.take() == [Heard("red", 50 * WINDOW_MS / 1000)]
    call.dialogue.respond(None, call.now)
    call.finish()
    assert call.take()[:2] == [ReplyStarted(), ReplyText("Red it is.")]


def test_a_reply_asked_for_before_recognition_comes_after_it() -> None:
    call = Call()
    call.dialogue.configure(TurnDetection(enabled=False))
    call.speak(20)
    call.dialogue.commit(call.now)
    call.dialogue.respond(None, call.now)
    assert not call.desk.events
    call.recognise("red")
    assert [type(event) for event in call.take()] == [Heard, ReplyStarted]


def test_a_commit_in_a_detected_turn_ends_it_now() -> None:
    call = Call()
    call.speak(20)
    call.dialogue.commit(call.now)
    call.recognise("red")
    assert [type(event) for event in call.take()] == [SpeechStarted, Heard, ReplyStarted]


def test_a_commit_without_speech_holds_nothing() -> None:
    call = Call()
    call.dialogue.commit(call.now)
    call.pause(5)
    call.dialogue.commit(call.now)
    call.dialogue.configure(TurnDetection(enabled=False))
    call.dialogue.commit(call.now)
    assert call.take() == [Heard("", 0.0), Heard("", 0.16), Heard("", 0.16)]
    assert not call.desk.recognitions


def test_clear_forgets_the_turn() -> None:
    call = Call()
    call.speak(20)
    call.dialogue.clear()
    call.pause(20)
    assert call.take() == [SpeechStarted(0)]
    assert not call.desk.recognitions


def test_respond_without_a_turn_greets_and_with_instructions_speaks_them() -> None:
    call = Call()
    call.dialogue.respond(None, call.now)
    call.finish()
    call.dialogue.respond("Say this.", call.now)
    call.finish()
    assert [e.text for e in call.take() if isinstance(e, ReplyText)] == [
        "Hello.",
        " Welcome.",
        "Say this.",
    ]


def test_instructions_end_the_reply_in_progress() -> None:
    call = Call()
    call.dialogue.greet(call.now)
    call.dialogue.respond(None, call.now)  # the greeting is what was asked for
    call.dialogue.respond("Say this.", call.now)
    assert call.take() == [ReplyStarted(), ReplyEnded(Ended.CANCELLED), ReplyStarted()]


def test_an_agent_with_nothing_to_say_says_nothing() -> None:
    call = Call(Settings(fallback=""))
    call.dialogue.greet(call.now)
    call.speak(20)
    call.pause(10)
    call.recognise("red")
    assert [type(event) for event in call.take()] == [SpeechStarted, SpeechStopped, Heard]
    call.dialogue.respond(None, call.now)
    assert call.take() == [ReplyStarted(), ReplyEnded(Ended.COMPLETED)]


def test_a_sentence_that_cannot_be_made_fails_the_reply() -> None:
    call = Call()
    call.dialogue.greet(call.now)
    reply, _ = call.desk.syntheses.popleft()
    call.dialogue.failed(reply)
    assert call.take() == [
        ReplyStarted(),
        ReplyEnded(Ended.FAILED, "the speech could not be made"),
    ]


@pytest.mark.parametrize("enabled", [True, False])
def test_audio_that_is_kept_is_bounded(enabled: bool) -> None:
    call = Call()
    call.dialogue.configure(TurnDetection(enabled=enabled))
    call.speak(5000)
    call.dialogue.commit(call.now)
    longest = max(len(samples) for _, samples in call.desk.recognitions)
    assert longest <= (MAX_TURN_MS + WINDOW_MS) * 16


class AnyCall(RuleBasedStateMachine):
    """Whatever comes in whatever order, what is told keeps the rules of the seam."""

    def __init__(self) -> None:
        super().__init__()
        self.call = Call()
        self.call.dialogue.greet(0.0)
        self.seen = 0
        self.commits = self.stops = self.heard = 0
        self.replying = self.texts = False
        self.interruptible = True

    @rule(windows=st.integers(1, 12))
    def speak(self, windows: int) -> None:
        self.call.speak(windows)

    @rule(windows=st.integers(1, 12))
    def pause(self, windows: int) -> None:
        self.call.pause(windows)

    @rule()
    def commit(self) -> None:
        self.commits += 1
        self.call.dialogue.commit(self.call.now)

    @rule()
    def clear(self) -> None:
        self.call.dialogue.clear()

    @rule()
    def cancel(self) -> None:
        self.call.dialogue.cancel()
        self.check()
        assert not self.replying

    @rule(instructions=st.sampled_from([None, "Say this. And that.", "..."]))
    def respond(self, instructions: str | None) -> None:
        self.call.dialogue.respond(instructions, self.call.now)

    @rule(enabled=st.booleans(), create=st.booleans(), interrupt=st.booleans())
    def configure(self, enabled: bool, create: bool, interrupt: bool) -> None:
        self.interruptible = interrupt
        self.call.dialogue.configure(
            TurnDetection(enabled=enabled, create_response=create, interrupt_response=interrupt)
        )

    @precondition(lambda self: self.call.desk.recognitions)
    @rule(text=st.sampled_from(["red", "", "blue"]))
    def recognise(self, text: str) -> None:
        self.call.recognise(text)

    @precondition(lambda self: self.call.desk.syntheses)
    @rule(seconds=st.sampled_from([0.0, 0.1, 3.0]))
    def make(self, seconds: float) -> None:
        self.call.make(seconds)

    @precondition(lambda self: self.call.desk.alarm is not None)
    @rule()
    def ring(self) -> None:
        self.call.ring()

    @invariant()
    def check(self) -> None:
        events = self.call.desk.events
        while self.seen < len(events):
            event = events[self.seen]
            self.seen += 1
            match event:
                case ReplyStarted():
                    assert not self.replying
                    self.replying, self.texts = True, False
                case ReplyText():
                    assert self.replying
                    self.texts = True
                case ReplyAudio():
                    assert self.replying
                    assert self.texts
                case ReplyEnded(how):
                    assert self.replying
                    assert how is not Ended.INTERRUPTED or self.interruptible
                    self.replying = False
                case SpeechStopped():
                    self.stops += 1
                case Heard():
                    self.heard += 1

    def teardown(self) -> None:
        while self.call.desk.recognitions:
            self.call.recognise("red")
        self.call.finish()
        self.check()
        assert self.heard == self.commits + self.stops
        assert not self.replying
        assert not self.call.dialogue.busy


AnyCall.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_call = AnyCall.TestCase


def test_a_caller_who_commits_faster_than_it_is_recognised_is_held_up() -> None:
    call = Call()
    call.dialogue.configure(TurnDetection(enabled=False))
    for count in range(MAX_UNRECOGNISED):
        assert not call.dialogue.busy, count
        call.speak(10)
        call.dialogue.commit(call.now)
    assert call.dialogue.busy
    call.recognise("red")
    assert not call.dialogue.busy
