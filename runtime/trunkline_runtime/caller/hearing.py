"""What a caller hears. Pure: the clock is an argument."""

import json
from base64 import b64decode
from collections.abc import Callable
from typing import Any, Final, Protocol

from trunkline_runtime.caller.records import Plan
from trunkline_runtime.caller.speaking import BYTES_PER_SECOND, Question, audible_span

MAX_ANSWER_BYTES: Final = (
    120 * BYTES_PER_SECOND
)  # kept of the answer; what comes after is only counted
MAX_TEXTS: Final = 256  # transcripts kept of either side, the newest
# How Trunkline's own audio begins; a server that writes its keys in another order is not counted.
AUDIO_PREFIX: Final = '{"type":"response.output_audio.delta"'

Listen = Callable[[dict[str, Any]], None]
"""Is told each message but audio, for whoever shows a call while it goes on."""


class Playout:
    """A player that plays what has come as soon as it can: at max(arrival, end of what came before)."""

    def __init__(self) -> None:
        self.until = 0.0
        self.underruns = 0
        self._in_reply = False

    def __repr__(self) -> str:
        return f"<Playout until={self.until:.3f} underruns={self.underruns}>"

    def add(self, pcm: bytes, arrived: float) -> float:
        """Takes audio of a reply; returns when its first sample is played."""
        if self._in_reply and arrived > self.until:
            self.underruns += 1
        self._in_reply = True
        begins = max(arrived, self.until)
        self.until = begins + len(pcm) / BYTES_PER_SECOND
        return begins

    def end(self, now: float, cut: bool) -> None:
        """The reply is complete, or it was cut off: then what is not yet played is thrown away."""
        self._in_reply = False
        if cut:
            self.until = min(self.until, now)


class Arrivals:
    """When audio frames arrive."""

    def __init__(self) -> None:
        self.frames = 0
        self.first: float | None = None
        self.max_gap = 0.0
        self._last: float | None = None

    def add(self, now: float) -> None:
        self.frames += 1
        if self.first is None:
            self.first = now
        if self._last is not None:
            self.max_gap = max(self.max_gap, now - self._last)
        self._last = now

    def pause(self) -> None:
        """A gap to the next frame is meant, as between replies."""
        self._last = None


class Ear(Protocol):
    """What a caller does with what it hears."""

    @property
    def arrivals(self) -> Arrivals: ...

    def hear(self, text: str, now: float) -> bool:
        """Takes a message; returns whether the call has reached its purpose.

        Raises ValueError for what is not Realtime.
        """


class Count:
    """Counts the audio frames of a call that is only held; reads nothing else of them."""

    def __init__(self) -> None:
        self.arrivals = Arrivals()

    def hear(self, text: str, now: float) -> bool:
        if text.startswith(AUDIO_PREFIX):
            self.arrivals.add(now)
        return False


class Answer:
    """Hears replies; those that begin after the question was said are its answer."""

    def __init__(self, question: Question, plan: Plan, listen: Listen | None = None) -> None:
        self.arrivals = Arrivals()
        self.playout = Playout()
        self.answer_heard: float | None = None
        self.heard: list[str] = []
        self.said: list[str] = []
        self.pcm = bytearray()
        self._question = question
        self._wanted = plan.replies
        self._listen = listen
        self._answering = False  # the reply in progress is to the question
        self._answers = 0

    def __repr__(self) -> str:
        return f"<Answer {self._answers}/{self._wanted} {len(self.pcm)} bytes {self.playout!r}>"

    def hear(self, text: str, now: float) -> bool:
        message = json.loads(text)
        match message:
            case {"type": "response.output_audio.delta", "delta": str(delta)}:
                self._audio(b64decode(delta, validate=True), now)
                return False
            case {"type": "response.created"}:
                asked = self._question.spoke_until
                self._answering = asked is not None and now >= asked
                self.arrivals.pause()
            case {"type": "response.output_audio_transcript.done", "transcript": str(said)}:
                self.said = [*self.said, said][-MAX_TEXTS:]
            case {
                "type": "conversation.item.input_audio_transcription.completed",
                "transcript": str(heard),
            }:
                self.heard = [*self.heard, heard][-MAX_TEXTS:]
            case {"type": "response.done", "response": {"status": status}}:
                self._done(status == "cancelled", now)
            case {"type": str()}:
                pass
            case _:
                raise ValueError("not a Realtime message")
        if self._listen is not None:
            self._listen(message)
        return 0 < self._wanted <= self._answers

    def _done(self, cancelled: bool, now: float) -> None:
        self.playout.end(now, cut=cancelled)
        if self._answering and not cancelled:
            self._answers += 1
        if self._question.begins is None:
            self._question.begins = self.playout.until

    def _audio(self, pcm: bytes, now: float) -> None:
        self.arrivals.add(now)
        begins = self.playout.add(pcm, now)
        if not self._answering:
            return
        self.pcm += pcm[: MAX_ANSWER_BYTES - len(self.pcm)]
        if self.answer_heard is None and (span := audible_span(pcm)) is not None:
            self.answer_heard = begins + span[0]
