"""Moshi's protocol without I/O: the client's side is played by `sphn`, as in `moshi.client`."""

import struct
from typing import Any

import numpy as np
import pytest
import sphn
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trunkline_runtime.engine import (
    FRAME_BYTES,
    SAMPLE_RATE,
    Ended,
    Failed,
    Heard,
    ReplyAudio,
    ReplyEnded,
    ReplyStarted,
    ReplyText,
    SpeechStarted,
)
from trunkline_runtime.wire.moshi import AUDIO, TEXT, MoshiSession, wished
from trunkline_runtime.wire.ogg import NotOgg, OggMeter, packet_ms
from trunkline_runtime.wire.session import Hear, Received


def tone(seconds: float, hertz: float = 440.0) -> NDArray[np.float32]:
    phases = np.arange(int(seconds * SAMPLE_RATE)) * 2 * np.pi * hertz / SAMPLE_RATE
    return (0.3 * np.sin(phases)).astype(np.float32)


def pcm(samples: NDArray[np.float32]) -> bytes:
    return (samples * 32767).astype("<i2").tobytes()


def frames(samples: NDArray[np.float32]) -> list[bytes]:
    whole = pcm(samples)
    return [whole[at : at + FRAME_BYTES] for at in range(0, len(whole), FRAME_BYTES)]


def loudness(samples: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(samples))))


def ogg(samples: NDArray[np.float32]) -> list[bytes]:
    """What a client's writer gives for each frame of 80 ms."""
    writer = sphn.OpusStreamWriter(SAMPLE_RATE)
    return [writer.append_pcm(samples[at : at + 1920]) for at in range(0, len(samples), 1920)]


def page(packets: list[bytes], flags: int = 0) -> bytes:
    lacing = b""
    for packet in packets:
        lacing += b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255])
    head = b"OggS" + bytes([0, flags]) + struct.pack("<qIIIB", 0, 1, 0, 0, len(lacing))
    return head + lacing + b"".join(packets)


# --- the caller speaks ---------------------------------------------------------------------------------


def test_the_server_speaks_first_with_the_handshake() -> None:
    assert MoshiSession().opening() == [b"\x00"]


def test_what_the_caller_says_is_heard() -> None:
    session, said = MoshiSession(), tone(1.0)
    heard = b"".join(
        command.pcm
        for piece in ogg(said)
        for command in session.receive(AUDIO + piece).commands
        if isinstance(command, Hear)
    )
    samples = np.frombuffer(heard, "<i2").astype(np.float32) / 32768
    assert len(samples) == len(said)
    assert loudness(samples[4800:]) == pytest.approx(loudness(said), rel=0.1)


def test_pages_may_be_cut_anywhere() -> None:
    session, heard = MoshiSession(), 0
    stream = b"".join(ogg(tone(0.8)))
    for at in range(0, len(stream), 37):
        for command in session.receive(AUDIO + stream[at : at + 37]).commands:
            assert isinstance(command, Hear)
            heard += len(command.pcm)
    assert heard == 0.8 * SAMPLE_RATE * 2


@pytest.mark.parametrize(
    "message", ["text", b"", b"\x00", b"\x03\x01", b"\x04{}", b"\x06", b"\xff?"]
)
def test_other_kinds_are_ignored(message: str | bytes) -> None:
    assert MoshiSession().receive(message) == Received()


@pytest.mark.parametrize("audio", [b"RIFF....WAVE", bytes(1000), page([b"OpusHead"]) + b"?"])
def test_audio_that_is_no_ogg_ends_the_call(audio: bytes) -> None:
    assert "must be one stream of Ogg Opus" in MoshiSession().receive(AUDIO + audio).refused


def test_a_message_that_would_swell_to_minutes_is_not_decoded() -> None:
    """255 packets of two bytes, each 48 frames of 2.5 ms: 30 s in a kilobyte."""
    session = MoshiSession()
    session.receive(AUDIO + ogg(tone(0.08))[0])
    bomb = page([bytes([16 << 3 | 3, 48])] * 255)
    assert "31 s in one message" in session.receive(AUDIO + bomb).refused


@given(st.lists(st.binary(max_size=200), max_size=4))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_it_raise(pieces: list[bytes]) -> None:
    session = MoshiSession()
    for piece in [ogg(tone(0.08))[0], *pieces]:
        if session.receive(AUDIO + piece).refused:
            break


# --- the agent speaks ----------------------------------------------------------------------------------


def spoken(session: MoshiSession, *events: object) -> tuple[NDArray[np.float32], str]:
    """What a client hears and reads of some events."""
    reader, audio, text = sphn.OpusStreamReader(SAMPLE_RATE), [np.zeros(0, np.float32)], ""
    for event in events:
        for message in session.send(event):  # type: ignore[arg-type]
            assert isinstance(message, bytes)
            if message[:1] == AUDIO:
                audio.append(reader.append_bytes(message[1:]))
            elif message[:1] == TEXT:
                text += message[1:].decode()
    return np.concatenate(audio), text


def test_what_the_agent_says_is_heard() -> None:
    said = tone(1.0)
    audio, _ = spoken(MoshiSession(), *(ReplyAudio(frame) for frame in frames(said)))
    assert len(audio) == len(said)
    assert loudness(audio[4800:]) == pytest.approx(loudness(said), rel=0.1)


def test_the_last_samples_of_a_reply_do_not_wait_for_the_next() -> None:
    session = MoshiSession()
    odd = pcm(tone(0.05))  # a packet and a quarter
    first, _ = spoken(session, ReplyStarted(), ReplyAudio(odd), ReplyEnded(Ended.COMPLETED))
    assert len(first) == 1920
    assert spoken(session, ReplyEnded(Ended.COMPLETED))[0].size == 0


def test_words_are_written_behind_each_other_and_replies_apart() -> None:
    session = MoshiSession()
    _, text = spoken(
        session,
        ReplyStarted(),
        ReplyText("Wel"),
        ReplyText("come."),
        ReplyEnded(Ended.COMPLETED),
        ReplyStarted(),
        ReplyText("Ünd nun?"),
        ReplyEnded(Ended.COMPLETED),
        ReplyStarted(),
        ReplyText(" so"),
    )
    assert text == "Welcome. Ünd nun? so"


def test_what_the_caller_said_is_no_ones_news() -> None:
    session = MoshiSession()
    assert session.send(Heard("hello", 1.0)) == session.send(SpeechStarted(0)) == []


def test_a_failure_is_told_and_silence_is_bridged() -> None:
    session = MoshiSession()
    assert session.send(Failed("cuda")) == [b"\x05the engine failed: call again"]
    assert session.still_there() == [b"\x02"]


# --- how long a stream is ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 7, 64, 5000])
def test_the_meter_says_what_the_decoder_gives(step: int) -> None:
    meter, stream = OggMeter(), b"".join(ogg(tone(0.8)))
    seconds = sum(meter.feed(stream[at : at + step]) for at in range(0, len(stream), step))
    assert seconds == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("packet", "milliseconds"),
    [
        (b"OpusHead", 0),
        (bytes([0 << 3]), 10),
        (bytes([3 << 3 | 1]), 120),
        (bytes([13 << 3 | 2]), 40),
        (bytes([31 << 3]), 20),
        (bytes([16 << 3 | 3, 5]), 12.5),
        (bytes([16 << 3 | 3]), 0),
    ],
)
def test_durations_are_those_of_rfc_6716(packet: bytes, milliseconds: float) -> None:
    assert packet_ms(packet) == milliseconds


def test_a_packet_that_spans_pages_counts_once() -> None:
    long = bytes([31 << 3]) + bytes(299)
    first = page([long[:255]])
    first = first[:26] + b"\x01\xff" + first[29:]  # one full segment: it goes on
    meter = OggMeter()
    assert meter.feed(first + page([long[255:], bytes([31 << 3])], flags=1)) == pytest.approx(0.04)


def test_a_packet_of_several_segments_counts_once() -> None:
    assert OggMeter().feed(page([bytes([31 << 3]) + bytes(299)])) == pytest.approx(0.02)


def test_the_meter_holds_no_more_than_a_page() -> None:
    with pytest.raises(NotOgg):
        OggMeter().feed(b"OggX")
    meter = OggMeter()
    assert meter.feed(b"OggS" + bytes(22) + b"\xff" + b"\xff" * 255 + bytes(65_024)) == 0
    assert repr(meter) == "<OggMeter 65306 bytes of a page>"


# --- the URL ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "settings"),
    [
        ("", {}),
        ("text_temperature=0.5&audio_seed=3", {"textTemperature": 0.5}),
        ("text_temperature=0", {"textTemperature": 0.1}),
        ("text_temperature=1e9", {"textTemperature": 2.0}),
        ("text_temperature=nan", {}),
        ("text_temperature=inf", {}),
        ("text_temperature=warm", {}),
        ("text_temperature=", {}),
        ("audio_temperature=0.1", {}),
    ],
)
def test_what_a_caller_may_choose_in_the_url(query: str, settings: dict[str, float]) -> None:
    assert wished(query) == settings
