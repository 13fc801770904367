"""What a call's client is told, and how its agent is steered."""

from collections.abc import Sequence
from typing import Any

from trunkline_runtime.engine import (
    Ended,
    Event,
    Heard,
    HeardPart,
    HungUp,
    ReplyAudio,
    ReplyEnded,
    ReplyStarted,
    ReplyText,
    SpeechStarted,
    SpeechStopped,
)
from trunkline_runtime.engine.moshi.dialogue import (
    CANCEL_FRAMES,
    HOLD_FRAMES,
    MAX_REPLY_FRAMES,
    Dialogue,
    Outcome,
    Tokenizer,
)
from trunkline_runtime.engine.moshi.models import END_OF_PAD, PAD, Transcription
from trunkline_runtime.engine.moshi.policy import (
    Action,
    Hangup,
    Mute,
    NoPolicy,
    Note,
    Policy,
    ResetTranscript,
    Rules,
    Say,
    Unmute,
)
from trunkline_runtime.engine.moshi.transcript import Transcript, Word

TOKENIZER = Tokenizer(lambda token: f"▁{chr(token)}", lambda text: [ord(c) for c in text])
A, SILENT, VOICED = ord("a"), -90.0, -20.0
PCM = b"\1\0" * 1920


def dialogue(policy: Policy | None = None, *, transcribed: bool = True) -> Dialogue:
    decode = "".join
    transcript = Transcript(Transcription(), lambda ids: decode(map(chr, ids)))
    return Dialogue(policy or NoPolicy(), TOKENIZER, transcript if transcribed else None)


def outcome(text: int | None = PAD, **more: Any) -> Outcome:
    fields = {
        "drawn": PAD,
        "pcm": PCM,
        "level": SILENT,
        "word": PAD,
        "pause": 0.0,
        "heard_level": SILENT,
    }
    return Outcome(text, **{**fields, **more})


def after(subject: Dialogue, *outcomes: Outcome) -> list[Event]:
    return [event for each in outcomes for event in subject.advance(each)]


def without_audio(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, ReplyAudio)]


def test_a_reply_begins_with_a_word_and_ends_when_words_and_voice_are_gone() -> None:
    subject = dialogue()
    assert after(subject, outcome(None), outcome(PAD), outcome(END_OF_PAD)) == []
    assert after(subject, outcome(A)) == [ReplyStarted(), ReplyText(" a"), ReplyAudio(PCM)]
    held = after(subject, *[outcome(PAD)] * (HOLD_FRAMES - 1))
    assert held == [ReplyAudio(PCM)] * (HOLD_FRAMES - 1)
    assert after(subject, outcome(PAD)) == [ReplyAudio(PCM), ReplyEnded(Ended.COMPLETED)]
    assert after(subject, outcome(PAD)) == []


def test_a_voice_without_words_holds_a_reply_but_not_for_ever() -> None:
    subject = dialogue()
    after(subject, outcome(A))
    told = after(subject, *[outcome(PAD, level=VOICED)] * (2 * HOLD_FRAMES))
    assert told.count(ReplyAudio(PCM)) == 2 * HOLD_FRAMES
    assert told[-1] == ReplyEnded(Ended.COMPLETED)


def test_an_agent_that_does_not_stop_makes_several_replies() -> None:
    told = after(dialogue(), *[outcome(A)] * (MAX_REPLY_FRAMES + 1))
    assert told.count(ReplyStarted()) == 2
    assert told.count(ReplyEnded(Ended.COMPLETED)) == 1


def test_a_cancel_ends_the_reply_and_keeps_the_agent_silent_for_a_second() -> None:
    subject = dialogue()
    after(subject, outcome(A))
    subject.cancel()
    assert subject.told() == [ReplyEnded(Ended.CANCELLED)]
    for _ in range(CANCEL_FRAMES - 1):
        assert subject.silent
        assert after(subject, outcome(A)) == []
    assert subject.silent
    assert after(subject, outcome(A))[0] == ReplyStarted(), "the last forced frame is a frame late"
    assert not subject.silent
    subject.cancel()
    subject.respond(None)
    assert not subject.silent, "whoever asks for a reply lets the agent speak"


def test_a_reply_that_was_asked_for_begins_without_a_word() -> None:
    subject = dialogue()
    subject.respond(None)
    assert after(subject, outcome(PAD)) == [ReplyStarted(), ReplyAudio(PCM)]


def test_scripted_words_are_said_at_the_pace_of_speech() -> None:
    subject = dialogue(Rules(greeting="ab c"))
    said = [subject.next_text() for _ in range(9)]
    assert said == [END_OF_PAD, A, ord("b"), PAD, END_OF_PAD, ord("c"), PAD, PAD, None]
    subject.respond("longer")
    assert subject.next_text() == END_OF_PAD
    subject.cancel()
    assert subject.next_text() is None


def test_the_callers_turn_from_its_first_word_to_its_text() -> None:
    subject = dialogue()
    before = [outcome(word=PAD)] * 20
    told = after(subject, *before, *(outcome(word=w) for w in (END_OF_PAD, A, PAD)))
    assert told == [SpeechStarted(1180), HeardPart("a")]
    assert after(subject, *[outcome(pause=1.0)] * 2) == []
    assert subject.wants_flush
    told = subject.flushed([ord("b"), PAD])
    assert [type(event) for event in told] == [HeardPart, SpeechStopped, Heard]
    assert told[0] == HeardPart(" b")
    assert isinstance(told[2], Heard)
    assert told[2].text == "a b", "the parts of a turn are its text"
    assert (subject.wants_flush, subject.wants_restart) == (False, True)
    subject.restarted()
    assert not subject.wants_restart


def test_a_clear_forgets_the_turn_and_not_one_that_is_committed() -> None:
    subject = dialogue()
    word = [outcome(word=END_OF_PAD), outcome(word=A), outcome(word=PAD)]
    after(subject, *word)
    subject.clear()
    assert subject.wants_restart, "what is on its way through the model is forgotten, too"
    subject.restarted()
    started, part = after(subject, *word)
    assert isinstance(started, SpeechStarted), "the next word begins a turn"
    assert part == HeardPart("a"), "and is its first"
    subject.commit()
    subject.clear()
    (heard,) = [event for event in subject.flushed([]) if isinstance(event, Heard)]
    assert heard.text == "a"


def test_each_commit_is_answered_with_what_was_heard_also_without_a_transcript() -> None:
    for transcribed in (True, False):
        subject = dialogue(transcribed=transcribed)
        after(subject, outcome(word=END_OF_PAD), outcome(word=A))
        subject.commit()
        subject.commit()
        assert subject.wants_flush
        told = [event for event in subject.flushed([]) if isinstance(event, Heard)]
        assert [event.text for event in told] == ["a" if transcribed else "", ""]


class Everything(NoPolicy):
    """Does all there is at the first word."""

    def on_word(self, word: Word, turn: str, *, agent_speaks: bool) -> Sequence[Action]:
        return (Note("word"), ResetTranscript(), Mute(), Unmute(), Say(word.text), Hangup("bye"))


def test_what_a_policy_wants_is_done() -> None:
    subject = dialogue(Everything())
    after(subject, outcome(A))
    told = after(subject, outcome(word=A), outcome(word=PAD))
    assert without_audio(told) == [
        SpeechStarted(0),
        HeardPart("a"),
        ReplyEnded(Ended.INTERRUPTED),
        HungUp("bye"),
    ]
    assert subject.notes == {"word": 1}
    assert subject.wants_restart
    assert [subject.next_text() for _ in range(2)] == [END_OF_PAD, A]


def test_a_banned_word_cannot_be_ended_and_its_pieces_can_be_said_elsewhere() -> None:
    subject = dialogue(Rules(banned=("abc", "x")))

    def banned_after(*drawn: int) -> list[str]:
        after(subject, *(outcome(drawn=token) for token in drawn))
        return [chr(token) for token in subject.banned()]

    assert banned_after() == ["x"]
    assert banned_after(A) == ["x"]
    assert banned_after(PAD, ord("b"), PAD) == ["c", "x"]
    assert banned_after(ord("z")) == ["x"]
    assert banned_after(ord("b")) == ["x"], "there is no a before it"
    assert banned_after(A, ord("b")) == ["c", "x"]


def test_a_muted_agent_says_nothing_until_the_turn_is_over() -> None:
    subject = dialogue(Rules(hard_barge_in=True))
    after(subject, outcome(A))
    told = after(subject, outcome(A, word=A), outcome(A, word=PAD), outcome(A))
    assert without_audio(told)[-1] == ReplyEnded(Ended.INTERRUPTED)
    assert subject.silent
    subject.commit()
    subject.flushed([])
    assert not subject.silent
