"""What may be done about a call while it goes on, and who decides it.

Stock Moshi takes no text: nothing that is said here reaches the model as an instruction. What is possible:
keep the agent silent, keep words from being said, put words in its mouth (experimental: weights that were
not trained on it may mumble), end the call, and let the transcript begin anew.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from trunkline_runtime.engine.moshi.transcript import Word

MAX_SEARCHED: Final = 512  # characters of a turn; patterns are users' own
MAX_SAID: Final = 2_048  # characters of a reply with its places filled
_PLACE: Final = re.compile(r"\{(\w+)\}")


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

    def answers(self) -> Sequence[Action]:
        """What was decided meanwhile by a policy that asks elsewhere; taken at every frame."""

    def close(self) -> None:
        """The call is over; nothing is asked after this. Called from any thread."""


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

    def answers(self) -> Sequence[Action]:
        return ()

    def close(self) -> None:
        return None


class Several:
    """Asks several policies in turn. The agent is muted while any of them wants it so."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._policies = tuple(policies)
        self._muting: set[int] = set()  # numbers of policies

    def __repr__(self) -> str:
        return f"<Several {self._policies!r} muting={sorted(self._muting)}>"

    def on_start(self) -> Sequence[Action]:
        return self._merged(policy.on_start() for policy in self._policies)

    def on_partial(self, text: str) -> Sequence[Action]:
        return self._merged(policy.on_partial(text) for policy in self._policies)

    def on_word(self, word: Word, turn: str, *, agent_speaks: bool) -> Sequence[Action]:
        asked = (policy.on_word(word, turn, agent_speaks=agent_speaks) for policy in self._policies)
        return self._merged(asked)

    def on_pause(self, turn: str) -> Sequence[Action]:
        return self._merged(policy.on_pause(turn) for policy in self._policies)

    def answers(self) -> Sequence[Action]:
        return self._merged(policy.answers() for policy in self._policies)

    def close(self) -> None:
        for policy in self._policies:
            policy.close()

    def _merged(self, asked: Iterable[Sequence[Action]]) -> list[Action]:
        return [
            action
            for number, actions in enumerate(asked)
            for action in actions
            if self._counts(number, action)
        ]

    def _counts(self, number: int, action: Action) -> bool:
        """Whether the action is to be done: who unmutes cannot do so for others."""
        if isinstance(action, Mute):
            self._muting.add(number)
        elif isinstance(action, Unmute):
            self._muting.discard(number)
            return not self._muting
        return True


@dataclass(frozen=True, slots=True)
class Guard:
    """When the caller's turn contains this, that is done; once a turn.

    In what is said, {1} and {name} stand for what the pattern's groups matched, {heard} for the whole turn.
    """

    pattern: re.Pattern[str]
    actions: tuple[Action, ...]

    def found(self, turn: str) -> list[Action] | None:
        """What to do about the turn so far; None: the pattern is not in it."""
        match = self.pattern.search(turn[-MAX_SEARCHED:])
        if match is None:
            return None
        groups = {str(n): text or "" for n, text in enumerate((match[0], *match.groups()))}
        groups = {"heard": turn, **groups}
        groups |= {name: text or "" for name, text in match.groupdict().items()}
        return [
            Say(_filled(action.text, groups)) if isinstance(action, Say) else action
            for action in self.actions
        ]

    @property
    def mutes(self) -> bool:
        return any(isinstance(action, Mute) for action in self.actions)


def _filled(text: str, groups: dict[str, str]) -> str:
    return _PLACE.sub(lambda place: groups.get(place[1], place[0]), text)[:MAX_SAID]


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
    _silenced: bool = False  # by a guard

    def on_start(self) -> Sequence[Action]:
        greeting = (Say(self.greeting),) if self.greeting else ()
        return (*map(Ban, self.banned), *greeting)

    def on_word(self, word: Word, turn: str, *, agent_speaks: bool) -> Sequence[Action]:
        actions: list[Action] = []
        if self.hard_barge_in and agent_speaks:
            actions.append(Mute())
        for number, guard in enumerate(self.guards):
            if number not in self._met and (found := guard.found(turn)) is not None:
                self._met.add(number)
                self._silenced |= guard.mutes
                actions += found
        return actions

    def on_pause(self, turn: str) -> Sequence[Action]:
        actions = list(self._unmuted())
        self._met.clear()
        for reply in self.replies:
            if (found := reply.found(turn)) is not None:
                return [*actions, *found]
        return actions

    def _unmuted(self) -> Iterator[Action]:
        """A guard's silence lasts until a turn ends without it: most are met in the last words of one."""
        if any(self.guards[number].mutes for number in self._met):
            return
        if self.hard_barge_in or self._silenced:
            self._silenced = False
            yield Unmute()
