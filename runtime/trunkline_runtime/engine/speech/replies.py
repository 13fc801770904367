"""Scripted replies: which sentence answers what the caller said. Decisions only.

Rules are tried in order, and the first whose pattern is found is spoken. A pattern is searched without
regard to case in up to three readings of what was heard, until it is found in one: with spoken digits as
digits ("four seven, oh nine" is "4 7, 0 9"), with words that sound like a digit beside one as digits too
("5 to 6" is "5 2 6"), and as it stands. So a rule may be written on digits, whichever way the recogniser
spells them, and on words alike.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from trunkline_runtime.contract import Settings

DEFAULT_FALLBACK: Final = "I did not catch that. Please say it again."
# 30 s of the fastest speech. Patterns are users' own, and what a bad one costs grows with the text.
MAX_SEARCHED: Final = 512
MAX_REPLY: Final = 2048  # characters spoken in one reply: about two minutes
MAX_SENTENCE: Final = (
    200  # a longer one is spoken clause by clause, so that its first audio comes soon
)

_WORDS: Final = {
    word: str(digit)
    for digit, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    )
}
_DIGIT_WORD: Final = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)
# "oh" is a digit only next to one: "4, oh, 9", but not in "Oh, I see".
_OH: Final = re.compile(r"(?<=\d)([ ,.-]+)oh?\b|\boh?([ ,-]+)(?=\d)", re.IGNORECASE)
_SOUNDS: Final = {"to": "2", "too": "2", "for": "4", "ate": "8", "won": "1"}
_LIKELY: Final = re.compile(
    rf"\b(?:{'|'.join(_SOUNDS)})\b(?=[ ,.-]+\d)|(?<=\d )(?:{'|'.join(_SOUNDS)})\b", re.IGNORECASE
)
_PLACE: Final = re.compile(r"\{(\w+)\}")
_CODE: Final = re.compile(r"(?<![\d.,])\d{4,}(?![\d]|[.,]\d)")


class ReplyError(ValueError):
    """A rule that cannot be used; the message names it and says what to change."""


@dataclass(frozen=True, slots=True)
class Rule:
    pattern: re.Pattern[str]
    say: str

    def answer(self, heard: str) -> str | None:
        """What to say, None where the pattern is not in what was heard."""
        for text in readings(heard[:MAX_SEARCHED]):
            if found := self.pattern.search(text):
                return _PLACE.sub(lambda place: _filled(place[1], found, heard), self.say)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What an agent says, ready for use."""

    greeting: str
    rules: tuple[Rule, ...]
    fallback: str

    @classmethod
    def of(cls, settings: Settings) -> "Script":
        """Raises `ReplyError` for a rule that cannot be used."""
        rules = tuple(
            _rule(index, rule["match"], rule["say"])
            for index, rule in enumerate(settings.get("replies", []))
        )
        return cls(
            greeting=settings.get("greeting", ""),
            rules=rules,
            fallback=settings.get("fallback", DEFAULT_FALLBACK),
        )

    def answer(self, heard: str) -> str:
        """What to say to what was heard, at most `MAX_REPLY` characters."""
        answers = (rule.answer(heard) for rule in self.rules)
        found = next((answer for answer in answers if answer is not None), self.fallback)
        return found[:MAX_REPLY]


def readings(heard: str) -> list[str]:
    """What was heard with digits where they are sure, where they are likely, and as it stands."""
    sure = with_digits(heard)
    likely = _LIKELY.sub(lambda word: _SOUNDS[word[0].lower()], sure)
    return list(dict.fromkeys((sure, likely, heard)))


def with_digits(text: str) -> str:
    """Text with the words of single digits, and "oh" or "o" beside one, as digits."""
    text = _DIGIT_WORD.sub(lambda word: _WORDS[word[0].lower()], text)
    while (replaced := _OH.sub(r"\g<1>0\g<2>", text)) != text:
        text = replaced
    return text


def sentences(text: str) -> list[str]:
    """Text cut after its sentences, long ones also after clauses or words; joined by spaces it is the text
    again, but for its white space."""
    words, cut, found = text.split(), 0, []
    length = 0
    for index, word in enumerate(words):
        length += len(word) + 1
        following = words[index + 1] if index + 1 < len(words) else ""
        clause = length > MAX_SENTENCE / 2 and word[-1] in ",;:"
        if _ends(word, following) or clause or length > MAX_SENTENCE:
            found.append(" ".join(words[cut : index + 1]))
            cut, length = index + 1, 0
    if cut < len(words):
        found.append(" ".join(words[cut:]))
    return found


_TITLES: Final = frozenset(("dr.", "mr.", "mrs.", "ms.", "no.", "prof.", "st."))


def _ends(word: str, following: str) -> bool:
    """Whether a sentence ends with this word: "Dr. Who", "J. Doe" and "e.g. this" go on."""
    bare = word.rstrip("\"')]”’")
    if not bare or bare[-1] not in ".!?…" or following[:1].islower():
        return False
    initial = len(bare) == 2 and bare[0].isupper()
    return not (bare.lower() in _TITLES or initial)


def _filled(name: str, found: re.Match[str], heard: str) -> str:
    if name == "heard" and name not in found.re.groupindex:
        return _spelled(heard)
    return _spelled(found[int(name) if name.isdigit() else name] or "")


def _spelled(text: str) -> str:
    """Four digits and more in a row are a code, which is said digit by digit: 4719 is "4 7 1 9"."""
    return _CODE.sub(lambda code: " ".join(code[0]), text)


def _rule(index: int, match: str, say: str) -> Rule:
    where = f"replies[{index}]"
    try:
        pattern = re.compile(match, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise ReplyError(f"{where}.match is not a regular expression: {error}") from error
    if repeats_a_repeat(match):
        raise ReplyError(
            f"{where}.match repeats a group that itself holds an endless repeat, which can search for ever: "
            r"write for example \d[\d ]* instead of (\d ?)+"
        )
    known = {str(group) for group in range(pattern.groups + 1)} | set(pattern.groupindex)
    for name in _unknown(say, known | {"heard"}):
        raise ReplyError(
            f"{where}.say names {{{name}}}, but its pattern has no such group; it may name {{heard}}"
            + "".join(f", {{{group}}}" for group in sorted(known))
        )
    return Rule(pattern, say)


def _unknown(say: str, known: set[str]) -> Iterable[str]:
    return (place[1] for place in _PLACE.finditer(say) if place[1] not in known)


_TOKEN: Final = re.compile(
    r"""\\.                                     # an escaped character
      | \[\^?\]?(?:\\.|[^\]\\])*\]              # a class
      | (?P<open>\()(?:\?(?:P?<\w+>|[^)(]))?    # a group, its prefix
      | (?P<close>\))
      | (?P<endless>[*+]|\{\d*,\})              # a repeat without an end
      | (?P<finite>\{\d*(?:,\d+)?\}|\?)
      | .""",
    re.VERBOSE | re.DOTALL,
)


def repeats_a_repeat(pattern: str) -> bool:
    """Whether an endless repeat stands around another one, as in (a+)+.

    Python's matcher tries such a pattern in exponentially many ways, cannot be stopped and holds up every
    other thread. Some patterns that this refuses would do no harm; each of them can be written without.
    """
    within = [False]  # for each group that is open: has it an endless repeat in it?
    closed = False  # the same for the group that has just been closed
    for token in _TOKEN.finditer(pattern):
        kind = token.lastgroup
        if kind == "endless":
            if closed:
                return True
            within[-1] = True
        was_closed, closed = closed, False
        if kind == "open":
            within.append(False)
        elif kind == "close" and len(within) > 1:
            closed = within.pop()
            within[-1] |= closed
        elif kind == "finite":
            closed = was_closed  # (a+)?+ and (a+){2}+ repeat it all the same
    return False
