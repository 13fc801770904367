"""Scripted replies: rules, readings, sentences, and patterns that are refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline_runtime.contract import Settings
from trunkline_runtime.engine.speech.replies import (
    DEFAULT_FALLBACK,
    MAX_REPLY,
    MAX_SENTENCE,
    ReplyError,
    Script,
    readings,
    repeats_a_repeat,
    sentences,
    with_digits,
)
from trunkline_runtime.engine.speech.synthesis import speakable

DIGITS = r"(\d)\D*(\d)\D*(\d)\D*(\d)"


def script(*rules: tuple[str, str], **settings: str) -> Script:
    replies = [{"match": match, "say": say} for match, say in rules]
    return Script.of(Settings(replies=replies, **settings))  # type: ignore[typeddict-item] # plain dicts


def test_the_first_rule_that_matches_is_spoken() -> None:
    two = script(("hours|open", "We open at nine."), ("open", "Never."))
    assert two.answer("When do you OPEN?") == "We open at nine."


def test_nothing_matches() -> None:
    assert script(("open", "At nine.")).answer("Hello.") == DEFAULT_FALLBACK
    assert script(fallback="Pardon?").answer("Hello.") == "Pardon?"


def test_a_reply_repeats_groups_and_what_was_heard() -> None:
    named = script((r"i am (?P<who>\w+)( from (\w+))?", "Hello {who} of {3}, {1}. {heard} {0}"))
    assert named.answer("I am Ada") == "Hello Ada of , Ada. I am Ada I am Ada"


def test_other_braces_are_said_as_they_stand() -> None:
    assert script(("x", "{} { 1 } {-}")).answer("x") == "{} { 1 } {-}"


@pytest.mark.parametrize(
    "heard",
    [
        "My number is four, seven, oh nine.",
        "My number is 4709.",
        "my number is 4-7-0-9",
        "My number is for 7 0 9.",
        "My number is 4 seven zero 9, thank you.",
        "Four seven O nine",
    ],
)
def test_digits_are_found_however_they_are_spelled(heard: str) -> None:
    answer = script((DIGITS, "I heard {1} {2} {3} {4}.")).answer(heard)
    assert answer == "I heard 4 7 0 9."


def test_words_that_only_sound_like_digits_stay_words() -> None:
    assert with_digits("Oh, I want to go for one.") == "Oh, I want to go for 1."
    table = script((r"table for (\d+|\w+)", "For {1}."))
    assert table.answer("A table for two, please") == "For 2."
    assert script((r"for two", "Fine.")).answer("A table for two.") == "Fine."
    assert readings("Hello.") == ["Hello."]


def test_codes_are_said_digit_by_digit() -> None:
    code = script((r"code (\d+)", "Your code {1}, since 1998."))
    assert code.answer("code 47190") == "Your code 4 7 1 9 0, since 1998."
    assert (
        speakable("I heard 4 7 1 9. Is that right?")
        == "I heard four, seven, one, nine. Is that right?"
    )
    assert speakable("From 9 to 5, 24 hours, 10:30 or 3.5") == "From 9 to 5, 24 hours, 10:30 or 3.5"


def test_a_reply_has_a_longest_length() -> None:
    assert len(script((".*", "{heard}" * 9)).answer("word " * 300)) == MAX_REPLY


@pytest.mark.parametrize(
    ("match", "say", "sentence"),
    [
        ("(", "x", r"replies\[1\].match is not a regular expression: missing \)"),
        ("a{99999999999}", "x", r"replies\[1\].match is not a regular expression"),
        (r"(\w+\s?)*x", "x", r"replies\[1\].match repeats a group .* instead of"),
        ("a", "Say {1}.", r"replies\[1\].say names \{1\}, .* may name \{heard\}, \{0\}$"),
        ("(?P<who>a)", "Say {whom}.", r"names \{whom\}, .* \{who\}$"),
    ],
)
def test_a_bad_rule_is_refused_with_a_sentence(match: str, say: str, sentence: str) -> None:
    with pytest.raises(ReplyError, match=sentence):
        script(("fine", "Fine."), (match, say))


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", r"(?:\w+\s?)*$", "((ab*)c)+", "(?P<n>x{2,})*", "([a-z]+)?+", "(a+){2}+", "(()a*)+"],
)
def test_endless_repeats_within_another_are_found(pattern: str) -> None:
    assert repeats_a_repeat(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        DIGITS,
        r"(\d(?:[ ,.-]*\d){3})",
        "(a|b)+",
        r"\(a+\)+",
        "[(a+)]+",
        "(a+)b+",
        r"(?:yes|no)*",
        "(a+)?",
        "[]+)]*",
    ],
)
def test_other_patterns_are_let_through(pattern: str) -> None:
    assert not repeats_a_repeat(pattern)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Python's advice on [[, which is fine here
@given(st.text("()[]*+?{}2,a|\\:P<>^-", max_size=16))
def test_any_pattern_is_used_or_refused(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error:
        with pytest.raises(ReplyError):
            script((pattern, "x"))
        return
    if repeats_a_repeat(pattern):
        with pytest.raises(ReplyError):
            script((pattern, "x"))
    else:
        assert script((pattern, "x")).answer("aaa(a)")


def test_sentences() -> None:
    text = "Hello, Dr. Who. Is that J. Doe? It costs 3.5 e.g. today!  Right: 4 7 1 9. Bye."
    assert sentences(text) == [
        "Hello, Dr. Who.",
        "Is that J. Doe?",
        "It costs 3.5 e.g. today!",
        "Right: 4 7 1 9.",
        "Bye.",
    ]
    assert sentences("  ") == []


@given(st.text("ab,;.!? \n", max_size=600))
def test_sentences_hold_all_words_and_are_short(text: str) -> None:
    cut = sentences(text)
    assert " ".join(cut).split() == text.split()
    longest = max((len(word) for word in text.split()), default=0)
    assert all(len(sentence) <= MAX_SENTENCE + longest for sentence in cut)
