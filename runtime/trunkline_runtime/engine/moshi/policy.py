"""What may be done about a call while it goes on, and who decides it.

Stock Moshi takes no text: nothing that is said here reaches the model as an instruction. What is possible:
keep the agent silent, keep words from being said, put words in its mouth (experimental: weights that were
not trained on it may mumble), end the call, and let the transcript begin anew.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from trunkline_runtime.contract import Settings
from trunkline_runtime.engine.moshi.transcript import Word

MAX_SEARCHED: Final = 512  # characters of a turn; patterns are users' own


@dataclass(frozen=True, slots=True)
class Say:
    """Forces the agent's inner monologue to these words, one piece a frame. Experimental."""

    text: str


@dataclass(frozen=True, slots=True)
class Ban:
    """The agent cannot say this word for the rest of the call; another spelling of it, it can."""

    word: str


@dataclass(frozen=True, slots=True)
class Mute:
    """The agent says nothing, and knows it, until `Unmute`."""


@dataclass(frozen=True, slots=True)
class Unmute:
    """The agent may speak again."""


@dataclass(frozen=True, slots=True)
class Hangup:
    """The call ends."""

    reason: str


@dataclass(frozen=True, slots=True)
class ResetTranscript:
    """The transcribing model begins anew."""


@dataclass(frozen=True, slots=True)
class Note:
    """Counted under this name; no content."""

    name: str


Action = Say | Ban | Mute | Unmute | Hangup | ResetTranscript | Note


class Policy(Protocol):
    """One call's policy. It is asked on the engine's thread between two frames, and so must not wait."""

    def on_start(self) -> Sequence[Action]:
        """The call begins."""

    def on_partial(self, text: str) -> Sequence[Action]:
        """A word that may go on."""

    def on_word(self, word: Word, turn: str, *, agent_speaks: bool) -> Sequence[Action]:
        """A whole word; `turn` is all of the caller's turn so far."""

    def on_pause(self, turn: str) -> Sequence[Action]:
        """The caller's turn is over."""


class NoPolicy:
    """Lets everything be."""

    def on_start(self) -> Sequence[Action]:
        return ()

    def on_partial(self, text: str) -> Sequence[Action]:
        return ()

    def on_word(self, word: Word, turn: str, *, agent_speaks: bool) -> Sequence[Action]:
        return ()

    def on_pause(self, turn: str) -> Sequence[Action]:
        return ()


@dataclass(frozen=True, slots=True)
class Guard:
    """When the caller's turn contains this, that is done; once a turn."""

    pattern: re.Pattern[str]
    actions: tuple[Action, ...]


@dataclass(slots=True, kw_only=True)
class Rules(NoPolicy):
    """A policy of fixed rules."""

    greeting: str = ""
    replies: tuple[Guard, ...] = ()  # asked when the turn is over; the first that is found
    guards: tuple[Guard, ...] = ()  # asked at every word
    banned: tuple[str, ...] = ()  # words that the agent cannot say
    # Moshi yields to a caller by itself, usually. Hard barge-in makes it certain.
    hard_barge_in: bool = False
    _met: set[int] = field(default_factory=set)  # guards of this turn

    def on_start(self) -> Sequence[Action]:
        greeting = (Say(self.greeting),) if self.greeting else ()
        return (*map(Ban, self.banned), *greeting)

    def on_word(self, word: Word, turn: str, *, agent_speaks: bool) -> Sequence[Action]:
        actions: list[Action] = []
        if self.hard_barge_in and agent_speaks:
            actions.append(Mute())
        for number, guard in enumerate(self.guards):
            if number not in self._met and guard.pattern.search(turn[-MAX_SEARCHED:]):
                self._met.add(number)
                actions += guard.actions
        return actions

    def on_pause(self, turn: str) -> Sequence[Action]:
        self._met.clear()
        actions: list[Action] = [Unmute()] if self.hard_barge_in else []
        for reply in self.replies:
            if reply.pattern.search(turn[-MAX_SEARCHED:]):
                return [*actions, *reply.actions]
        return actions


def rules_of(settings: Settings) -> Policy:
    """The policy that an agent's settings ask for: what is scripted there is said, the rest is Moshi's.

    Raises ValueError for a pattern that cannot be used. `fallback` is not for an engine that always has
    an answer of its own.
    """
    greeting, replies = settings.get("greeting", ""), settings.get("replies", [])
    if not greeting and not replies:
        return NoPolicy()
    guards = []
    for number, rule in enumerate(replies):
        try:
            pattern = re.compile(rule["match"], re.IGNORECASE)
        except re.error as error:
            raise ValueError(f"replies[{number}].match cannot be used: {error}") from None
        guards.append(Guard(pattern, (Say(rule["say"]),)))
    return Rules(greeting=greeting, replies=tuple(guards))
