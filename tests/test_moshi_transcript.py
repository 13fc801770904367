"""Words, pauses and the watchdog, from tokens; and the policies that act on them."""

import re
from collections.abc import Sequence

import pytest

from trunkline_runtime.contract import ReplyRule, Settings
from trunkline_runtime.engine import TurnDetection
from trunkline_runtime.engine.moshi.models import END_OF_PAD, PAD, Transcription
from trunkline_runtime.engine.moshi.policy import (
    Guard,
    Hangup,
    Mute,
    NoPolicy,
    Note,
    Rules,
    Say,
    Unmute,
)
from trunkline_runtime.engine.moshi.policy_settings import rules_of
from trunkline_runtime.engine.moshi.transcript import (
    DEAF_FRAMES,
    STUCK_WORDS,
    WARM_UP_FRAMES,
    Heard,
    Partial,
    Pause,
    Restart,
    Transcript,
    Word,
)

QUIET, LOUD = -70.0, -20.0


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(number) for number in ids)


def transcript(**timing: float | None) -> Transcript:
    return Transcript(Transcription(**timing), decode)  # type: ignore[arg-type]


def hear(
    subject: Transcript, tokens: Sequence[int | str], pause: float = 0.0, level: float = QUIET
) -> list[Heard]:
    """Feeds tokens; a letter is its own piece."""
    ids = [ord(token) if isinstance(token, str) else token for token in tokens]
    return [heard for token in ids for heard in subject.hear(token, pause, level)]


def test_words_begin_at_their_mark_and_end_at_the_next() -> None:
    subject = transcript(delay_seconds=0.48)
    heard = hear(subject, [PAD] * 9 + [END_OF_PAD, "h", "i", PAD, END_OF_PAD, "y", END_OF_PAD])
    assert heard == [
        Partial("h"),
        Partial("hi"),
        Word("hi", pytest.approx(0.32), pytest.approx(0.56)),  # type: ignore[arg-type]
        Partial("y"),
        Word("y", pytest.approx(0.64), pytest.approx(0.80)),  # type: ignore[arg-type]
    ]
    assert subject.text == "hi y"


def test_a_pause_ends_a_turn_that_has_words_and_only_then() -> None:
    subject = transcript()
    assert hear(subject, [PAD] * 50, pause=1.0) == []
    hear(subject, [END_OF_PAD, "a", PAD])
    assert hear(subject, [PAD], pause=1.0) == [], "one frame may be a breath"
    assert hear(subject, [PAD], pause=1.0) == [Pause(pytest.approx(55 / 12.5 - 0.5))]  # type: ignore[arg-type]
    assert [type(h) for h in subject.flush([PAD, END_OF_PAD, ord("b")])] == [Partial, Word]
    text, seconds = subject.end_turn()
    assert text == "a b"
    assert seconds > 0
    assert hear(subject, [PAD] * 5, pause=1.0) == [], "the next turn has no word yet"


def test_pauses_of_a_model_that_has_just_begun_are_not_believed() -> None:
    subject = transcript()
    hear(subject, [END_OF_PAD, "a", PAD])
    assert hear(subject, [PAD] * (WARM_UP_FRAMES - 3), pause=1.0) == []
    assert hear(subject, [PAD], pause=1.0) != []


def test_without_a_head_for_pauses_silence_ends_the_turn() -> None:
    subject = transcript(pause_head=None)
    subject.detection = TurnDetection(silence_ms=460)
    hear(subject, [END_OF_PAD, "a"])
    assert hear(subject, [PAD] * 11, pause=1.0) == [Word("a", 0.0, 0.0)]
    assert hear(subject, [PAD]) == [Pause(pytest.approx(14 / 12.5 - 0.5))]  # type: ignore[arg-type]


def test_a_client_that_finds_turns_itself_is_told_of_no_pause() -> None:
    subject = transcript()
    subject.detection = TurnDetection(enabled=False)
    hear(subject, [END_OF_PAD, "a", PAD])
    assert hear(subject, [PAD] * 50, pause=1.0) == []


def test_the_watchdog_sees_a_model_that_has_gone_deaf_or_repeats_itself() -> None:
    subject = transcript()
    assert hear(subject, [PAD] * (DEAF_FRAMES - 1), level=LOUD) == []
    assert hear(subject, [PAD], level=LOUD) == [Restart("deaf")]
    subject.restart()
    assert hear(subject, [PAD] * DEAF_FRAMES, level=QUIET) == []
    subject.end_turn()
    repeated: list[int | str] = [END_OF_PAD, "n", "o"]
    heard = hear(subject, [*repeated * STUCK_WORDS, PAD])
    assert [h for h in heard if isinstance(h, Restart)] == [Restart("stuck")]
    assert len(subject.words) == STUCK_WORDS


def test_a_flush_is_as_long_as_the_delay() -> None:
    assert transcript(delay_seconds=0.5).flush_frames == 8
    assert transcript(delay_seconds=2.5, prefix_seconds=1.0).flush_frames == 45


# --- policies ----------------------------------------------------------------------------------------------

WORD = Word("now", 0.0, 0.1)


def test_guards_act_at_once_and_once_a_turn_and_replies_at_its_end() -> None:
    stop = Guard(re.compile("stop"), (Hangup("as asked"), Note("stopped")))
    more = Guard(re.compile("more"), (Say("of what?"),))
    policy = Rules(greeting="hello", guards=(stop,), replies=(more,))
    assert policy.on_start() == (Say("hello"),)
    assert policy.on_partial("sto") == ()
    assert policy.on_word(WORD, "please", agent_speaks=False) == []
    assert policy.on_word(WORD, "please stop", agent_speaks=False) == list(stop.actions)
    assert policy.on_word(WORD, "please stop now", agent_speaks=False) == []
    assert policy.on_pause("please stop now") == []
    assert policy.on_word(WORD, "stop", agent_speaks=False) == list(stop.actions)
    assert policy.on_pause("more") == list(more.actions)


def test_hard_barge_in_silences_an_agent_that_speaks_until_the_turn_is_over() -> None:
    policy = Rules(hard_barge_in=True)
    assert policy.on_word(WORD, "wait", agent_speaks=False) == []
    assert policy.on_word(WORD, "wait", agent_speaks=True) == [Mute()]
    assert policy.on_pause("wait") == [Unmute()]


def test_settings_make_a_policy() -> None:
    assert isinstance(rules_of({"fallback": "Pardon?"}), NoPolicy)
    settings = Settings(greeting="Hi", replies=[ReplyRule(match="BYE", say="See you.")])
    policy = rules_of(settings)
    assert policy.on_start() == (Say("Hi"),)
    assert policy.on_pause("well, bye") == [Say("See you.")]
    with pytest.raises(ValueError, match=r"replies\[0\].match"):
        rules_of(Settings(replies=[ReplyRule(match="(", say="")]))
