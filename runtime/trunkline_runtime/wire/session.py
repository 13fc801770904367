"""What every caller protocol is to a call: messages in, commands for the engine out, and back.

A message is a frame of the caller's WebSocket: text or bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trunkline_runtime.engine import Event, TurnDetection

Message = str | bytes


@dataclass(frozen=True, slots=True)
class Configure:
    turn: TurnDetection


@dataclass(frozen=True, slots=True)
class Hear:
    pcm: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    pass


@dataclass(frozen=True, slots=True)
class Clear:
    pass


@dataclass(frozen=True, slots=True)
class Respond:
    instructions: str | None


@dataclass(frozen=True, slots=True)
class Cancel:
    pass


Command = Configure | Hear | Commit | Clear | Respond | Cancel
"""Each is one call of a method of `Conversation`."""


@dataclass(frozen=True, slots=True)
class Received:
    """What a client's message asks of the engine, and what the client is told at once."""

    commands: Sequence[Command] = ()
    messages: Sequence[Message] = ()
    refused: str = ""  # why the call cannot go on: it is closed with `Close.POLICY`


class Session(Protocol):
    """One call's side of a protocol, without I/O and without a clock."""

    @property
    def bytes_per_second(self) -> int:
        """What a second of the agent's voice takes on the wire, about."""

    @property
    def quiet_seconds(self) -> float | None:
        """After so long without a message a client takes the line for dead; None: it waits for ever."""

    def opening(self) -> Sequence[Message]:
        """What the client is told first."""

    def receive(self, message: Message) -> Received:
        """Takes one frame of the client. Never raises."""

    def send(self, event: Event) -> Sequence[Message]:
        """The messages that tell the client of an engine's event."""

    def still_there(self) -> Sequence[Message]:
        """Sent when `quiet_seconds` are nearly over."""
