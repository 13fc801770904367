"""Text to speech: hibari-tts (a distilled Kokoro, its voice inside the wheel), on one thread.

A sentence of the synthesiser begins with 0.2 to 0.33 s of silence and ends with 0.32 to 0.53 s, which a
caller would wait through; both are cut off, and a short pause is put after each sentence instead.
"""

import os
import re
from typing import Final

from trunkline_runtime.audio.pcm import RATE, to_pcm, trimmed

SEED: Final = 0  # of the noise in the voice: the same text is the same audio
PAUSE_SECONDS: Final = 0.2  # after each sentence

DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Digits one by one: "4 7 1 9" is read as in a telephone number, with a pause after each.
_SPELLED: Final = re.compile(r"(?<![\w.,:$£€#-])\d(?:[ ,-]+\d)+(?![\w:%]|[.,-]\d)")


class Synthesiser:
    """One thread's voice: calls must not overlap."""

    def __init__(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # ONNX Runtime's wheels report use to Microsoft unless told not to before they load (its Privacy.md).
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        from hibari import Hibari

        self._voice = Hibari(threads=1)
        self._voice("Ready.", seed=SEED)  # the first sentence costs more than the next

    def __call__(self, text: str) -> bytes:
        """PCM16 of 24 kHz; b"" where there is nothing to say."""
        parts = [self._sentence(phonemes) for phonemes in self._voice.phonemize(speakable(text))]
        return b"".join(parts)

    def _sentence(self, phonemes: str) -> bytes:
        spoken = trimmed(self._voice.from_phonemes(phonemes, seed=SEED))
        if not len(spoken):
            return b""
        return to_pcm(spoken) + bytes(2 * int(RATE * PAUSE_SECONDS))


def speakable(text: str) -> str:
    """Text with single digits in a row as words, each with its own stress: 4 7 is "four, seven"."""
    return _SPELLED.sub(lambda row: ", ".join(DIGITS[int(d)] for d in row[0] if d.isdigit()), text)
