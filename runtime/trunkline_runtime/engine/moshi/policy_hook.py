"""A policy that is asked over HTTP: what it is sent, what it may answer, what its failure means. Decisions only.

A request is a JSON object `{"call", "agentSpeaks", "events"}`. One request of a call is under way at a time;
what happens meanwhile goes with the next. Events:

    {"type": "start"}                                 the call begins
    {"type": "partial", "text"}                       a word that may go on; only the newest is sent
    {"type": "word", "text", "start", "end"}          a whole word; seconds since the call's first frame
    {"type": "pause", "text"}                         the caller's turn is over; all of it
    (none)                                            are you back? asked of a hook that has failed

An answer is empty, or `{"actions": [...]}` with `say` and `text`, `ban` and `word`, `mute`, `unmute`, `hangUp`,
`resetTranscript` as an action's `type`. What is not one of these makes the whole answer a failure, for half of
an answer could be the half that was not meant alone.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from trunkline_runtime.contract import HookSettings
from trunkline_runtime.engine.moshi.policy import (
    Action,
    Ban,
    Hangup,
    Mute,
    Note,
    ResetTranscript,
    Say,
    Unmute,
)

MAX_WAITING: Final = 32  # events of a call; ten seconds of fast speech
MAX_TURN: Final = 4_096  # characters, of the end of a turn; 400 words are its most
MAX_ANSWER: Final = 64 * 2**10  # bytes
MAX_ACTIONS: Final = 32  # of one answer
MAX_SAID: Final = 1_024  # characters, as a reply of the VoiceAgent
MAX_WORD: Final = 64  # characters, likewise
MAX_BANS: Final = 64  # of a call: each is looked at in every frame

REQUESTS: Final = "hook_requests"
LATE: Final = "hook_late"
FAILED: Final = "hook_failed"
MISSED: Final = "hook_missed_events"
HOOK_NOTES: Final = (REQUESTS, LATE, FAILED, MISSED)
"""What is counted; LATE and FAILED are requests, MISSED are events that were never sent."""

Event = Mapping[str, Any]


class HookError(ValueError):
    """An answer that cannot be used; the text says why, without content."""


class Failure(StrEnum):
    """How a request came to nothing."""

    LATE = "it did not answer in time"
    UNREACHABLE = "it cannot be reached"
    REFUSED = "it answered with an error"
    UNUSABLE = "its answer makes no sense"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """Whom to ask, and what follows when there is no answer."""

    url: str
    token: str = field(default="", repr=False)
    deadline: float = 0.5  # seconds, of each request
    closed: bool = (
        False  # without an answer the agent is mute; else the call goes on as without a hook
    )

    @classmethod
    def of(cls, settings: HookSettings) -> "Hook":
        return cls(
            url=settings["url"],
            token=settings["token"],
            deadline=settings["deadlineSeconds"],
            closed=settings["onFailure"] == "closed",
        )

    @property
    def headers(self) -> dict[str, str]:
        # Not compressed: what unpacks to more than it may is a way to fill a worker's memory.
        named = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        return named | ({"Authorization": f"Bearer {self.token}"} if self.token else {})


class Waiting:
    """The events of a call that the hook has not been told yet."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()

    def __repr__(self) -> str:
        return f"<Waiting {len(self._events)}>"

    def __len__(self) -> int:
        return len(self._events)

    def add(self, event: Event) -> bool:
        """Takes an event; False where the oldest had to go for it."""
        # What follows a partial word says all that it said.
        if self._events and self._events[-1]["type"] == "partial":
            self._events.pop()
        self._events.append(event)
        if len(self._events) <= MAX_WAITING:
            return True
        self._events.popleft()
        return False

    def take(self) -> list[Event]:
        taken = list(self._events)
        self._events.clear()
        return taken


class Standing:
    """Whether the hook answers, and what of its wishes lasts."""

    def __init__(self, *, closed: bool) -> None:
        self._closed = closed
        self._muted = False  # the hook wants it so
        self._bans = 0
        self.failing = False

    def __repr__(self) -> str:
        return f"<Standing failing={self.failing} muted={self._muted} closed={self._closed}>"

    def answered(self, wanted: Sequence[Action]) -> list[Action]:
        """What is to be done after an answer."""
        actions: list[Action] = []
        if self.failing and self._closed and not self._muted:
            actions.append(Unmute())
        self.failing = False
        for action in wanted:
            if isinstance(action, Mute | Unmute):
                self._muted = isinstance(action, Mute)
            if isinstance(action, Ban):
                self._bans += 1
                if self._bans > MAX_BANS:
                    continue
            actions.append(action)
        return actions

    def failed(self, failure: Failure) -> list[Action]:
        """What is to be done after a request that came to nothing."""
        actions: list[Action] = [Note(LATE if failure is Failure.LATE else FAILED)]
        if not self.failing:
            self.failing = True
            if self._closed:
                actions.append(Mute())
            elif self._muted:  # open is as without a hook, and it could not unmute any more
                self._muted = False
                actions.append(Unmute())
        return actions


def request_body(call: str, events: Sequence[Event], *, agent_speaks: bool) -> bytes:
    """What a hook is sent."""
    message = {"call": call, "agentSpeaks": agent_speaks, "events": list(events)}
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()


def actions_of(answer: bytes) -> list[Action]:
    """What a hook wants. Raises `HookError`."""
    if not answer.strip():
        return []
    try:
        message = json.loads(answer)
    except (ValueError, RecursionError):
        raise HookError("it is not JSON") from None
    actions = message.get("actions", []) if isinstance(message, dict) else None
    if not isinstance(actions, list):
        raise HookError('it is not {"actions": [...]}')
    if len(actions) > MAX_ACTIONS:
        raise HookError(f"it has {len(actions)} actions, and {MAX_ACTIONS} are allowed")
    return [_action(action) for action in actions]


def _action(value: object) -> Action:
    if not isinstance(value, dict):
        raise HookError("an action is not an object")
    match value.get("type"):
        case "say":
            return Say(_text(value, "text", MAX_SAID))
        case "ban":
            return Ban(_text(value, "word", MAX_WORD))
        case "mute":
            return Mute()
        case "unmute":
            return Unmute()
        case "hangUp":
            return Hangup("the agent's policy")
        case "resetTranscript":
            return ResetTranscript()
    raise HookError("an action has a type that is not known")


def _text(value: Mapping[str, Any], key: str, longest: int) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not 0 < len(text) <= longest:
        raise HookError(f"{key} of an action must have 1 to {longest} characters")
    return text
