"""What a client's message asks of an engine: each command is one call of a method of `Conversation`."""

from collections.abc import Sequence
from dataclasses import dataclass

from trunkline_runtime.engine import TurnDetection


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


@dataclass(frozen=True, slots=True)
class Received:
    """What a client's message asks of the engine, and what the client is told at once."""

    commands: Sequence[Command] = ()
    messages: Sequence[str] = ()
