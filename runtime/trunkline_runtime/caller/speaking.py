"""What a caller sends. Pure: the clock is an argument.

`audible_span` needs no NumPy, for a caller may run where only the core is installed.
"""

import sys
from array import array
from base64 import b64encode
from typing import Final, Protocol

from trunkline_runtime.caller.records import Plan
from trunkline_runtime.engine import FRAME_BYTES, SAMPLE_RATE

BYTES_PER_SECOND: Final = SAMPLE_RATE * 2
AUDIBLE: Final = 653  # of 32,768; one more is -34 dBFS, heard in an ordinary room


def append_message(pcm: bytes) -> str:
    """The client event that carries audio."""
    return f'{{"type":"input_audio_buffer.append","audio":"{b64encode(pcm).decode("ascii")}"}}'


def audible_span(pcm: bytes) -> tuple[float, float] | None:
    """Where the first audible sample begins and the last one ends, in seconds; None for silence."""
    samples = array("h", pcm)
    if sys.byteorder == "big":
        samples.byteswap()
    step = SAMPLE_RATE // 100  # whole blocks are passed over by min and max, which are fast
    starts = range(0, len(samples), step)
    first = next((at for at in starts if _loud(samples[at : at + step])), None)
    if first is None:
        return None
    last = next(at for at in reversed(starts) if _loud(samples[at : at + step]))
    begin = next(at for at in range(first, len(samples)) if abs(samples[at]) > AUDIBLE)
    stop = min(last + step, len(samples))
    end = next(at for at in range(stop, 0, -1) if abs(samples[at - 1]) > AUDIBLE)
    return begin / SAMPLE_RATE, end / SAMPLE_RATE


def _loud(block: "array[int]") -> bool:
    return max(block) > AUDIBLE or min(block) < -AUDIBLE


class Mouth(Protocol):
    """What a caller sends, message by message."""

    def next(self, now: float) -> str:
        """The message that is due; `now` is when the audio in it ends."""


class Question:
    """Says some audio once, then is silent, as a microphone is: who listens for its end needs silence."""

    def __init__(self, audio: bytes, plan: Plan) -> None:
        if len(audio) % 2:
            raise ValueError("audio must hold whole samples of 16 bits")
        self.begins: float | None = None if plan.after_greeting else 0.0  # None: not yet known
        self.spoke_until: float | None = None
        self._audio = audio
        self._size = BYTES_PER_SECOND * plan.chunk_ms // 1000
        self._sent = 0
        span = audible_span(audio)
        self._speech_end = span[1] if span else len(audio) / BYTES_PER_SECOND
        self._silence = append_message(bytes(self._size))

    def __repr__(self) -> str:
        return f"<Question {self._sent}/{len(self._audio)} spoke_until={self.spoke_until}>"

    def next(self, now: float) -> str:
        if self.begins is None or now < self.begins:
            return self._silence
        chunk = self._audio[self._sent : self._sent + self._size]
        self._sent += self._size
        after_speech = self._sent / BYTES_PER_SECOND - self._speech_end
        if self.spoke_until is None and after_speech >= 0:
            self.spoke_until = now - after_speech
        return append_message(chunk.ljust(self._size, b"\0")) if chunk else self._silence


class Hum:
    """Says the same frame for ever; its message is made once, so that many callers cost little."""

    def __init__(self, frame: bytes = bytes(FRAME_BYTES)) -> None:
        self._message = append_message(frame)

    def next(self, _: float) -> str:
        return self._message
