"""Samples, levels, silence and WAV files."""

import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trunkline_runtime.audio.pcm import (
    RATE,
    SILENT_DBFS,
    Samples,
    end_of_speech,
    level,
    resampled,
    start_of_speech,
    to_pcm,
    to_samples,
    trimmed,
)
from trunkline_runtime.audio.wav import WavError, read_wav, write_wav


def tone(seconds: float, hertz: float = 440, rate: int = RATE, height: float = 0.5) -> Samples:
    phase = 2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate
    return (height * np.cos(phase)).astype(np.float32)


def silence(seconds: float) -> Samples:
    return np.zeros(int(seconds * RATE), np.float32)


@given(st.binary(max_size=400).map(lambda raw: raw[: len(raw) // 2 * 2]))
def test_pcm_survives_the_way_to_samples_and_back(pcm: bytes) -> None:
    assert to_pcm(to_samples(pcm)) == pcm


def test_samples_beyond_full_scale_are_clipped() -> None:
    assert to_samples(to_pcm(np.array([-3, 3], np.float32))).tolist() == [-1, 32767 / 32768]


def test_levels() -> None:
    assert level(tone(1, height=1)) == pytest.approx(-3.01, abs=0.01)
    assert level(silence(1)) == level(silence(0)) == SILENT_DBFS


def test_silence_around_speech_is_cut_off() -> None:
    speech = np.concatenate([silence(0.3), tone(1), silence(0.5)])
    kept = trimmed(speech)
    assert len(kept) / RATE == pytest.approx(1.02, abs=0.001)
    cut = len(silence(0.3)) - RATE // 100
    np.testing.assert_array_equal(kept[1000:20_000], speech[cut + 1000 : cut + 20_000])


def test_a_click_at_the_edge_of_a_cut_fades() -> None:
    kept = trimmed(np.full(RATE, 0.5, np.float32))
    assert len(kept) == RATE
    assert kept[0] == 0
    assert kept[-1] == 0
    assert kept[RATE // 2] == 0.5


@given(
    arrays.arrays(np.float32, st.integers(0, 3000), elements=st.floats(-1, 1, width=32)),
    st.floats(-80, 0),
)
def test_trimming_keeps_all_that_is_loud(samples: Samples, edge: float) -> None:
    kept = trimmed(samples, edge_dbfs=edge)
    loud = np.abs(samples) > 10 ** (edge / 20)
    assert len(kept) <= len(samples)
    assert (len(kept) == 0) == (not loud.any())
    if loud.any():
        assert len(kept) > np.flatnonzero(loud)[-1] - np.flatnonzero(loud)[0]


def test_where_speech_begins_and_ends() -> None:
    pcm = to_pcm(np.concatenate([silence(0.25), tone(1), tone(0.5, height=0.01), silence(0.5)]))
    assert start_of_speech(pcm) == pytest.approx(0.25, abs=0.001)
    assert end_of_speech(pcm) == pytest.approx(1.25, abs=0.001)
    assert end_of_speech(pcm, level_dbfs=-50) == pytest.approx(1.75, abs=0.001)
    quiet = to_pcm(silence(0.5))
    assert (start_of_speech(quiet), end_of_speech(quiet)) == (0.5, 0)


def test_resampling_keeps_pitch_and_length() -> None:
    lower = resampled(tone(1), RATE, 16_000)
    assert len(lower) == 16_000
    np.testing.assert_allclose(lower[4000:12000], tone(1, rate=16_000)[4000:12000], atol=0.01)


def test_wav_round_trip(tmp_path: Path) -> None:
    pcm = to_pcm(tone(0.3))
    write_wav(tmp_path / "a.wav", pcm)
    assert read_wav(tmp_path / "a.wav") == pcm
    assert read_wav(str(tmp_path / "a.wav")) == pcm


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (24_000, 2), (44_100, 2), (48_000, 1)])
def test_any_wav_becomes_24_khz_mono(tmp_path: Path, width: int, rate: int, channels: int) -> None:
    samples = tone(0.5, rate=rate)
    integers = np.rint(samples * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        integers += 128
    mono = integers.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width]
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.repeat(mono[:, None], channels, axis=1).tobytes())
    read = to_samples(read_wav(tmp_path / "a.wav"))
    assert len(read) == pytest.approx(RATE / 2, abs=2)
    middle = slice(RATE // 8, RATE // 8 * 3)
    np.testing.assert_allclose(read[middle], tone(0.5)[middle], atol=0.02)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "ends too early"),
        (b"OggS" + bytes(60), "convert it"),
        (b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\3\0\1\0\xc0\x5d\0\0\0\x77\1\0\4\0\x20\0", "convert it"),
    ],
)
def test_what_is_no_wav_is_refused_with_a_sentence(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = tmp_path / "no.wav"
    path.write_bytes(content)
    with pytest.raises(WavError, match=sentence):
        read_wav(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(WavError, match=r"no file .*missing\.wav"):
        read_wav(tmp_path / "missing.wav")
    with pytest.raises(WavError, match="is a folder"):
        read_wav(tmp_path)


def test_a_truncated_wav_gives_what_is_there(tmp_path: Path) -> None:
    pcm = to_pcm(tone(0.3))
    write_wav(tmp_path / "a.wav", pcm)
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(whole[:-1001])
    assert read_wav(tmp_path / "a.wav") == pcm[:-1002]
