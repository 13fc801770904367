"""Engines hold conversations; this is the seam between an engine and the protocol a caller speaks.

A wire protocol turns a caller's messages into calls on a `Conversation` and its events back into
messages, so every protocol works with every engine. Audio crosses the seam as PCM16, little-endian,
mono, 24 kHz. Methods of `Conversation` never block: they are called on the event loop, while the engine
works in threads of its own. `emit` may be called from any thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, runtime_checkable

from trunkline_runtime.contract import Settings

SAMPLE_RATE: Final = 24_000  # Hz
FRAME_MS: Final = 80  # Mimi's frame, and the clock of the loopback engine
FRAME_SAMPLES: Final = SAMPLE_RATE * FRAME_MS // 1000
FRAME_BYTES: Final = FRAME_SAMPLES * 2


class EngineError(RuntimeError):
    """An engine that cannot serve, or no longer; the text says what is wrong and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnDetection:
    """How the end of the caller's turn is found; the names are those of OpenAI's `server_vad`."""

    enabled: bool = True  # False: the caller commits
    threshold: float = 0.5  # voice probability, 0…1
    prefix_padding_ms: int = 300
    silence_ms: int = 300
    create_response: bool = True
    interrupt_response: bool = True


class Ended(StrEnum):
    """How a reply ended."""

    COMPLETED = "completed"
    INTERRUPTED = "interrupted"  # the caller spoke into it
    CANCELLED = "cancelled"  # the caller's client asked for it
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    at_ms: int  # since the call's first audio, where the voice begins


@dataclass(frozen=True, slots=True)
class SpeechStopped:
    at_ms: int  # since the call's first audio, where the turn was found to be over


@dataclass(frozen=True, slots=True)
class HeardPart:
    """More of the caller's turn while it goes on, to be appended; the parts of a turn are its `Heard`.

    Not every engine hears before a turn is over.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Heard:
    """The caller's turn, recognised. Follows the `SpeechStopped` (or commit) that ended it."""

    text: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ReplyStarted:
    pass


@dataclass(frozen=True, slots=True)
class ReplyText:
    text: str  # to be appended to what came before


@dataclass(frozen=True, slots=True)
class ReplyAudio:
    pcm: bytes


@dataclass(frozen=True, slots=True)
class ReplyEnded:
    how: Ended
    detail: str = ""


@dataclass(frozen=True, slots=True)
class HungUp:
    """The agent ends the call; it is closed with `Close.NORMAL`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The conversation cannot go on; the call is closed with `Close.LOST`."""

    detail: str


Event = (
    SpeechStarted
    | SpeechStopped
    | HeardPart
    | Heard
    | ReplyStarted
    | ReplyText
    | ReplyAudio
    | ReplyEnded
    | HungUp
    | Failed
)
Emit = Callable[[Event], None]


class Conversation(Protocol):
    """One call's state in an engine; all of it hangs off this object."""

    def configure(self, turn: TurnDetection) -> None: ...

    def hear(self, pcm: bytes) -> None:
        """Takes audio from the caller, any whole number of samples."""

    def commit(self) -> None:
        """Ends the caller's turn now."""

    def clear(self) -> None:
        """Forgets the audio of the turn that is not yet committed."""

    def respond(self, instructions: str | None = None) -> None:
        """Makes the agent speak without being spoken to; instructions are this reply's own."""

    def cancel(self) -> None:
        """Ends the reply in progress, if any, with `Ended.CANCELLED`."""

    def close(self) -> None:
        """Gives the slot back. No event follows."""


class Engine(Protocol):
    """What a worker owns. `load` and `resume` run once each, in this order, before the first `open`.

    A Modal memory snapshot is taken between the two: `load` brings in all that may be cloned into many
    containers (weights), `resume` makes what must not be (threads, random state).
    """

    @property
    def slots(self) -> int: ...

    def load(self) -> None: ...

    def resume(self) -> None: ...

    def open(self, settings: Settings, emit: Emit) -> Conversation:
        """Starts a conversation. The caller of this holds a slot for it."""

    def close(self) -> None:
        """Ends the engine's threads."""


@runtime_checkable
class Watched(Protocol):
    """An engine that may break or slow down while it runs, and says so; not every engine can."""

    def loading(self) -> str:
        """How far `load` has come, as in "loading 43 %"."""

    def watch(self, broken: Callable[[str], None], room: Callable[[int], None]) -> None:
        """Called once after `resume`; both are then called from any thread.

        `broken`: no call can go on in this process; those in progress have been told `Failed`.
        `room`: this many calls at once, those in progress included, may be taken from now on.
        """
