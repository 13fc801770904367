"""WAV files to and from PCM16, 24 kHz, mono.

A file that is already so is read and written by the standard library alone; any other rate, width or
number of channels needs the `speech` extra (NumPy and soxr).
"""

import wave
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from trunkline_runtime.audio.pcm import Samples

RATE: Final = 24_000  # Hz
# Ten minutes at 48 kHz, stereo, 24 bit: nobody speaks longer in one file, and memory is bounded by it.
MAX_BYTES: Final = 10 * 60 * 48_000 * 2 * 3


class WavError(ValueError):
    """A file that cannot be read as WAV; the message says why, for its owner."""


def read_wav(path: str | Path) -> bytes:
    """The audio of a WAV file of integer samples, as PCM16, 24 kHz, mono; channels are averaged."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            if file.getnframes() * channels * width > MAX_BYTES:
                raise WavError(
                    f"{path} is too long: at most {MAX_BYTES // 2**20} MiB of audio are read"
                )
            raw = file.readframes(file.getnframes())
    except FileNotFoundError as error:
        raise WavError(f"there is no file {path}") from error
    except IsADirectoryError as error:
        raise WavError(f"{path} is a folder, not a WAV file") from error
    except EOFError as error:
        raise WavError(f"{path} is not a WAV file: it ends too early") from error
    except wave.Error as error:
        raise WavError(
            f"{path} is not a WAV file of integer samples ({error}); "
            "convert it, for example with: ffmpeg -i IN -ar 24000 -ac 1 -c:a pcm_s16le OUT.wav"
        ) from error
    if width not in (1, 2, 3, 4) or rate < 1000:
        raise WavError(f"{path} has samples of {width} bytes at {rate} Hz, which is no speech")
    raw = raw[: len(raw) - len(raw) % (channels * width)]
    if (channels, width, rate) == (1, 2, RATE):
        return raw
    return _converted(raw, channels, width, rate)


def write_wav(path: str | Path, pcm: bytes) -> None:
    """Writes PCM16, 24 kHz, mono, as a WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(pcm)


def _converted(raw: bytes, channels: int, width: int, rate: int) -> bytes:
    from trunkline_runtime.audio.pcm import resampled, to_pcm

    mono = _samples(raw, width).reshape(-1, channels).mean(axis=1, dtype="float32")
    return to_pcm(resampled(mono, rate, RATE))


def _samples(raw: bytes, width: int) -> "Samples":
    """Integer samples of one to four bytes as float32; WAV's single bytes are unsigned."""
    import numpy as np

    if width == 1:
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - np.float32(128)) / np.float32(128)
    # The sample fills the upper bytes of 32 bits; the lower ones stay 0.
    widened = np.zeros((len(raw) // width, 4), np.uint8)
    widened[:, 4 - width :] = np.frombuffer(raw, np.uint8).reshape(-1, width)
    return widened.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)
