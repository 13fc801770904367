"""Moshi's own protocol, as `moshi.client` and the browser client speak it, without I/O.

Binary WebSocket messages of which the first byte says what follows: 0 handshake, 1 audio (a piece of one Ogg
Opus stream in each direction, mono, 24 kHz), 2 text in UTF-8, 5 an error in UTF-8. The server speaks first, with
the handshake; before it a client sends nothing. Kinds that one does not know are to be ignored. There is no
message for turns: the agent's voice and words come whenever it speaks. Source: `rust/protocol.md` and
`moshi/server.py` of https://github.com/kyutai-labs/moshi, version 0.2.13.
"""

import math
from typing import Final
from urllib.parse import parse_qs

import numpy as np
import sphn
from numpy.typing import NDArray

from trunkline_runtime.contract import Settings
from trunkline_runtime.engine import (
    SAMPLE_RATE,
    Event,
    Failed,
    ReplyAudio,
    ReplyEnded,
    ReplyStarted,
    ReplyText,
)
from trunkline_runtime.wire.ogg import NotOgg, OggMeter
from trunkline_runtime.wire.session import Hear, Message, Received

HANDSHAKE: Final = b"\x00"
AUDIO: Final = b"\x01"
TEXT: Final = b"\x02"
ERROR: Final = b"\x05"

PACKET_SAMPLES: Final = 960  # 40 ms: the writer of `sphn` gives nothing for less
MAX_SECONDS: Final = (
    8.0  # of audio in one message, as much as one of the Realtime protocol may hold
)
BYTES_PER_SECOND: Final = 4_500  # 33 kbit/s and the pages around them
# The browser client hangs up after 10 s without a message.
QUIET_SECONDS: Final = 5.0
_FULL_SCALE: Final = np.float32(32_768)


# Below, one word is as good as certain; above, words are noise.
MIN_TEMPERATURE: Final = 0.1
MAX_TEMPERATURE: Final = 2.0


def wished(query: str) -> Settings:
    """What a caller may choose in the URL, of what Kyutai's own servers take there; all else is ignored.

    `text_temperature` is that of the agent's words. A number beyond the bounds counts as the bound, and what is
    no number as nothing.
    """
    try:
        asked = float(parse_qs(query).get("text_temperature", [""])[-1])
    except ValueError:
        return Settings()
    if not math.isfinite(asked):
        return Settings()
    return Settings(textTemperature=min(max(asked, MIN_TEMPERATURE), MAX_TEMPERATURE))


class MoshiSession:
    """One call's side of the protocol; `opening` is sent first."""

    bytes_per_second = BYTES_PER_SECOND
    quiet_seconds: float | None = QUIET_SECONDS

    def __init__(self) -> None:
        self._writer = sphn.OpusStreamWriter(SAMPLE_RATE)
        self._reader = sphn.OpusStreamReader(SAMPLE_RATE)
        self._meter = OggMeter()
        self._rest = 0  # samples that wait in the writer for a whole packet
        self._words_end = ""  # the last letter that was sent
        self._new_reply = False

    def __repr__(self) -> str:
        return f"<MoshiSession {self._meter!r} {self._rest} samples wait>"

    def opening(self) -> list[Message]:
        """The handshake: the client may speak."""
        return [HANDSHAKE]

    def receive(self, message: Message) -> Received:
        """Takes one frame of the client. Never raises."""
        if isinstance(message, str) or message[:1] != AUDIO:
            return Received()  # other kinds are for other servers
        try:
            pcm = self._decoded(message[1:])
        except ValueError as error:  # `NotOgg`, and what the decoder says
            return Received(refused=f"audio must be one stream of Ogg Opus: {error}"[:100])
        return Received(commands=[Hear(pcm)] if pcm else ())

    def send(self, event: Event) -> list[Message]:
        """The messages that tell the client of an engine's event."""
        match event:
            case ReplyStarted():
                self._new_reply = True
            case ReplyAudio(pcm):
                return self._audio(_samples(pcm))
            case ReplyText(text):
                return self._text(text)
            case ReplyEnded():
                # The rest of the reply must not wait for the next one.
                missing = -self._rest % PACKET_SAMPLES
                return self._audio(np.zeros(missing, np.float32))
            case Failed():
                return [ERROR + b"the engine failed: call again"]
        return []

    def still_there(self) -> list[Message]:
        """A text without letters: of the protocol's own ping, `moshi.client` complains."""
        return [TEXT]

    def _decoded(self, data: bytes) -> bytes:
        seconds = self._meter.feed(data)
        if seconds > MAX_SECONDS:
            raise NotOgg(f"{seconds:.0f} s in one message, and {MAX_SECONDS:g} s are the most")
        samples = self._reader.append_bytes(data)
        scaled = np.rint(np.asarray(samples) * _FULL_SCALE)
        return np.clip(scaled, -32_768, 32_767).astype("<i2").tobytes()

    def _audio(self, samples: NDArray[np.float32]) -> list[Message]:
        self._rest = (self._rest + len(samples)) % PACKET_SAMPLES
        pages = self._writer.append_pcm(samples) if len(samples) else b""
        return [AUDIO + pages] if pages else []

    def _text(self, text: str) -> list[Message]:
        """A client writes one piece behind the other, so replies need a blank between them."""
        apart = self._new_reply and self._words_end.strip() and not text[:1].isspace()
        self._new_reply = False
        self._words_end = text[-1:] or self._words_end
        return [TEXT + (" " if apart else "").encode() + text.encode()]


def _samples(pcm: bytes) -> NDArray[np.float32]:
    return np.frombuffer(pcm, "<i2").astype(np.float32) / _FULL_SCALE
