"""How much audio some bytes of an Ogg Opus stream hold, without decoding it.

A packet of two bytes may stand for 120 ms of silence, and a page holds 255 of them: what decodes a caller's
bytes must know beforehand what they swell to. Sources: RFC 3533 (pages), RFC 7845 (Opus in Ogg), RFC 6716
section 3.1 (durations).
"""

from typing import Final

CAPTURE: Final = b"OggS"
_HEADER_BYTES: Final = 27  # of a page, before its table of segments
_CONTINUED: Final = 1  # flag: the page begins in the midst of a packet
_HEADERS: Final = (b"OpusHead", b"OpusTags")
# Milliseconds of one frame by the upper five bits of a packet's first byte.
_SILK: Final = (10.0, 20.0, 40.0, 60.0)
_HYBRID: Final = (10.0, 20.0)
_CELT: Final = (2.5, 5.0, 10.0, 20.0)
FRAME_MS: Final = (*_SILK * 3, *_HYBRID * 2, *_CELT * 4)


class NotOgg(ValueError):
    """The bytes are no pages where pages must be."""


class OggMeter:
    """Follows one stream, fed in pieces of any length."""

    def __init__(self) -> None:
        self._buffer = bytearray()  # less than a page, so at most 65,307 bytes

    def __repr__(self) -> str:
        return f"<OggMeter {len(self._buffer)} bytes of a page>"

    def feed(self, data: bytes) -> float:
        """Seconds of audio in the pages that these bytes complete. Raises `NotOgg`."""
        buffer = self._buffer
        buffer += data
        at, milliseconds = 0, 0.0
        while (end := _page_end(buffer, at)) is not None:
            milliseconds += _page_ms(buffer, at, end)
            at = end
        del buffer[:at]
        return milliseconds / 1000


def _page_end(buffer: bytearray, at: int) -> int | None:
    """Where the page that begins at `at` ends; None while it is not whole."""
    capture = buffer[at : at + len(CAPTURE)]
    if capture != CAPTURE[: len(capture)]:
        raise NotOgg("no Ogg page begins where one must")
    table = at + _HEADER_BYTES
    if len(buffer) < table:
        return None
    body = table + buffer[table - 1]
    if len(buffer) < body:
        return None
    end = body + sum(buffer[table:body])
    return end if len(buffer) >= end else None


def _page_ms(buffer: bytearray, at: int, end: int) -> float:
    """Milliseconds of the packets that begin in a whole page."""
    table = at + _HEADER_BYTES
    packet = table + buffer[table - 1]
    begins = not buffer[at + 5] & _CONTINUED
    milliseconds = 0.0
    for length in buffer[table:packet]:
        if begins and length:
            milliseconds += packet_ms(bytes(buffer[packet : min(packet + 8, end)]))
        packet += length
        begins = length < 255  # a packet goes on while its segments are full
    return milliseconds


def packet_ms(start: bytes) -> float:
    """Milliseconds of a packet, by its first eight bytes; 0 for the headers of a stream."""
    if start in _HEADERS:
        return 0.0
    first = start[0]
    frame_ms = FRAME_MS[first >> 3]
    match first & 3:
        case 0:
            return frame_ms
        case 3:
            return frame_ms * (start[1] & 63 if len(start) > 1 else 0)
        case _:
            return frame_ms * 2
