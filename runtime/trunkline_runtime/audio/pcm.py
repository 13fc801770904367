"""PCM16, little-endian, mono, as it crosses the engine's seam, and as float32 samples in -1…1.

Levels are in dBFS: 0 dB is a sample of full scale.
"""

from typing import Final

import numpy as np
import soxr
from numpy.typing import NDArray

Samples = NDArray[np.float32]

RATE: Final = 24_000  # Hz
BYTES_PER_SECOND: Final = RATE * 2
SILENT_DBFS: Final = -120.0  # what a level of digital silence reads as
AUDIBLE_DBFS: Final = -34.0  # speech above it is heard in an ordinary room
# A sentence of the synthesiser stands between 0.2 and 0.5 s of noise at -80 dBFS and below; its faintest
# consonants reach -50 dBFS.
EDGE_DBFS: Final = -55.0
FADE_SECONDS: Final = 0.005


def to_samples(pcm: bytes) -> Samples:
    return np.frombuffer(pcm, "<i2").astype(np.float32) / np.float32(32768)


def to_pcm(samples: Samples) -> bytes:
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype("<i2").tobytes()


def resampled(samples: Samples, source_rate: int, target_rate: int) -> Samples:
    if source_rate == target_rate:
        return samples
    result: Samples = soxr.resample(samples, source_rate, target_rate).astype(np.float32)
    return result


def level(samples: Samples) -> float:
    """The root mean square of some samples, in dBFS."""
    power = float(np.mean(np.square(samples))) if len(samples) else 0.0
    return max(10 * float(np.log10(power)), SILENT_DBFS) if power > 0 else SILENT_DBFS


def trimmed(samples: Samples, rate: int = RATE, edge_dbfs: float = EDGE_DBFS) -> Samples:
    """What is left when the silence before and after is cut off.

    A cut runs 10 ms outside the first and last sample above the level, so that soft onsets live, and fades
    in and out, so that it does not click. Silence alone leaves nothing.
    """
    loud = np.flatnonzero(np.abs(samples) > 10 ** (edge_dbfs / 20))
    if not len(loud):
        return samples[:0]
    margin = rate // 100
    kept = samples[max(int(loud[0]) - margin, 0) : int(loud[-1]) + 1 + margin].copy()
    fade = min(int(rate * FADE_SECONDS), len(kept) // 2)
    ramp = np.linspace(0, 1, fade, endpoint=False, dtype=np.float32)
    kept[:fade] *= ramp
    kept[len(kept) - fade :] *= ramp[::-1]
    return kept


def start_of_speech(pcm: bytes, level_dbfs: float = AUDIBLE_DBFS) -> float:
    """Seconds until the first audible sample; the whole length where none is."""
    return _audible(pcm, level_dbfs)[0] / RATE


def end_of_speech(pcm: bytes, level_dbfs: float = AUDIBLE_DBFS) -> float:
    """Seconds until the end of the last audible sample; 0 where none is."""
    return _audible(pcm, level_dbfs)[1] / RATE


def _audible(pcm: bytes, level_dbfs: float) -> tuple[int, int]:
    samples = to_samples(pcm)
    loud = np.flatnonzero(np.abs(samples) > 10 ** (level_dbfs / 20))
    return (int(loud[0]), int(loud[-1]) + 1) if len(loud) else (len(samples), 0)
