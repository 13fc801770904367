"""Models and calls for the tests of the speech engine. Models are loaded once for all of them."""

import functools
import queue
from types import TracebackType
from typing import Self, TypeVar

from trunkline_runtime.contract import ReplyRule, Settings
from trunkline_runtime.engine import Event, ReplyAudio, ReplyText
from trunkline_runtime.engine.speech import Recogniser, SpeechEngine, Synthesiser

PATIENCE_SECONDS = 60.0  # for what the models make; far beyond what they need
SECOND = bytes(48_000)  # of silence
SHORT = bytes(24_000)  # half a second: longer than what ends a turn
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = ReplyRule(match=r"(\d)\D*(\d)\D*(\d)\D*(\d)", say="{1} {2} {3} {4}.")

synthesiser = functools.cache(Synthesiser)
recogniser = functools.cache(Recogniser)
Wanted = TypeVar("Wanted")


@functools.cache
def spoken(text: str) -> bytes:
    return synthesiser()(text)


def number(digits: str) -> str:
    """The sentence that says four digits."""
    return f"My number is {', '.join(NAMES[int(digit)] for digit in digits)}."


class Line:
    """A call to the engine and all that it told."""

    def __init__(self, engine: SpeechEngine, settings: Settings) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.told: list[Event] = []
        self.conversation = engine.open(settings, self._events.put)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.conversation.close()

    def until(self, kind: type[Wanted]) -> Wanted:
        """Waits for the next event of a kind."""
        while True:
            event = self._events.get(timeout=PATIENCE_SECONDS)
            self.told.append(event)
            if isinstance(event, kind):
                return event

    def kinds(self) -> list[str]:
        """What was told, in order, the frames of a sentence as one."""
        names = [type(event).__name__ for event in self.told]
        return [
            name
            for name, before in zip(names, ["", *names], strict=False)
            if (name, before) != ("ReplyAudio", "ReplyAudio")
        ]

    def take(self) -> list[Event]:
        """What was told since the last take."""
        told, self.told = self.told, []
        return told


def audio_of(events: list[Event]) -> bytes:
    return b"".join(event.pcm for event in events if isinstance(event, ReplyAudio))


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, ReplyText))
