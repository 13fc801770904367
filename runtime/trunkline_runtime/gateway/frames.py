"""Message boundaries in a stream of WebSocket frames. Payloads are never decoded, and no I/O happens here.

A relay that passes on whole messages only may change what stands behind a call at any byte: the other
side's parser never sees half a message. So:

- `feed` returns bytes that may be passed on, always ending where a message ends;
- control frames are taken out: a ping that travelled with a lost worker would end the call (1011);
- of several pings in one chunk only the last is reported, which RFC 6455 section 5.5.3 allows, so that
  a storm of pings costs one answer;
- a peer's Close, or a frame that breaks the protocol, is raised as `Stop` with the whole messages
  that came before it. A tracker that has raised is not fed again.

Nearly every chunk of a live call is exactly one short message, and `feed` returns it untouched: 142 ns.
"""

from collections.abc import Callable
from typing import Final

from websockets.exceptions import ProtocolError
from websockets.frames import Close, CloseCode, Frame, Opcode

# Frames by their first byte: FIN bit and opcode. What is not in the table breaks the protocol
# (reserved bits, reserved opcodes, fragmented control frames).
_BROKEN, _SINGLE, _FIRST, _MIDDLE, _LAST, _CONTROL = range(6)
_KINDS: Final = {
    0x81: _SINGLE,
    0x82: _SINGLE,
    0x01: _FIRST,
    0x02: _FIRST,
    0x00: _MIDDLE,
    0x80: _LAST,
    0x88: _CONTROL,
    0x89: _CONTROL,
    0x8A: _CONTROL,
}
_KIND: Final = bytes(_KINDS.get(byte, _BROKEN) for byte in range(256))
_SHORT: Final = b"\x81\x82"

MAX_FRAGMENTS: Final = 4096  # of one message: bounds the headers that are held beside its payload
MAX_CONTROL_PAYLOAD: Final = 125  # RFC 6455 section 5.5


class Stop(Exception):
    """The stream ends here.

    `data` holds the whole messages before the end. `close` is the peer's Close, or, when `fault` is
    true, the Close with which the peer is to be told what it did wrong.
    """

    def __init__(self, data: bytes, close: Close, *, fault: bool) -> None:
        super().__init__(str(close))
        self.data = data
        self.close = close
        self.fault = fault


class _Fault(Exception):
    def __init__(self, code: CloseCode, reason: str) -> None:
        super().__init__(reason)
        self.close = Close(code, reason)


def close_frame(close: Close, *, masked: bool) -> bytes:
    """A Close on the wire; 1005 (no status) becomes an empty one."""
    payload = b"" if close.code == CloseCode.NO_STATUS_RCVD else close.serialize()
    return Frame(Opcode.CLOSE, payload).serialize(mask=masked)


def pong_frame(payload: bytes, *, masked: bool) -> bytes:
    return Frame(Opcode.PONG, payload).serialize(mask=masked)


def ping_frame(payload: bytes, *, masked: bool) -> bytes:
    return Frame(Opcode.PING, payload).serialize(mask=masked)


def text_frame(payload: bytes, *, masked: bool) -> bytes:
    return Frame(Opcode.TEXT, payload).serialize(mask=masked)


class Tracker:
    """Follows one direction of one connection.

    `masked` is true for what a client sends. `limit` bounds a message's payload in bytes (1009 above
    it). `pinged` is called with the payload of a ping, at most once per `feed`.
    """

    __slots__ = (
        "_at",
        "_fragments",
        "_held",
        "_least",
        "_limit",
        "_mask",
        "_most",
        "_need",
        "_offset",
        "_payload",
        "_pinged",
    )

    def __init__(self, *, masked: bool, limit: int, pinged: Callable[[bytes], None]) -> None:
        self._mask = 0x80 if masked else 0
        # A short message of n payload bytes has n + 2 (masked n + 6) bytes and its second byte is n
        # (masked n + 128), so one addition recognises it.
        self._offset, self._least, self._most = (-122, 6, 132) if masked else (2, 2, 128)
        self._limit = limit
        self._pinged = pinged
        self._held: bytearray | None = None  # begins where the last whole message ended
        self._at = 0  # in it: where the next frame begins
        self._need = 0  # its length from which on looking again makes sense
        self._fragments = 0  # of the open message; 0 between messages
        self._payload = 0  # of the open message, in bytes

    def __repr__(self) -> str:
        held = 0 if self._held is None else len(self._held)
        return f"<Tracker held={held} fragments={self._fragments}>"

    @property
    def idle(self) -> bool:
        """Nothing is held back."""
        return self._held is None

    def feed(self, data: bytes) -> bytes:
        """What may be passed on now. Raises `Stop`."""
        held = self._held
        if held is None:
            size = len(data)
            if (
                self._least <= size < self._most
                and data[1] + self._offset == size
                and data[0] in _SHORT
            ):
                return data
            return self._scan(data)
        held += data
        return self._scan(held) if len(held) >= self._need else b""

    def _scan(self, stream: bytes | bytearray) -> bytes:
        at, end = self._at, 0  # the next frame; the end of the last whole message
        cuts: list[tuple[int, int]] = []  # control frames
        ping = None
        try:
            while (frame := self._frame(stream, at)) is not None:
                kind, body, stop = frame
                if kind == _CONTROL:
                    cuts.append((at, stop))
                    opcode = stream[at] & 0x0F
                    if opcode == Opcode.CLOSE:
                        close = _peers_close(self._unmasked(stream, body, stop))
                        raise Stop(_without(stream, 0, end, cuts), close, fault=False)
                    if opcode == Opcode.PING:
                        ping = (body, stop)
                else:
                    self._count(kind, stop - body)
                at = stop
                if not self._fragments:
                    end = at
        except _Fault as fault:
            raise Stop(_without(stream, 0, end, cuts), fault.close, fault=True) from None
        if ping is not None:
            self._pinged(self._unmasked(stream, *ping))
        return self._keep(stream, at, end, cuts)

    def _frame(self, stream: bytes | bytearray, at: int) -> tuple[int, int, int] | None:
        """Kind, start of the payload and end of the frame at `at`; None until all of it is there."""
        there = len(stream) - at
        if there < 2:
            self._need = at + 2
            return None
        kind, size = _KIND[stream[at]], stream[at + 1] - self._mask
        if kind == _BROKEN or not 0 <= size < 0x80:
            raise _Fault(CloseCode.PROTOCOL_ERROR, "invalid frame header")
        if kind == _CONTROL and size > MAX_CONTROL_PAYLOAD:
            raise _Fault(CloseCode.PROTOCOL_ERROR, "control frame too long")
        body = at + 2
        if size > 125:
            body += 2 if size == 126 else 8
            if len(stream) < body:
                self._need = body
                return None
            size = int.from_bytes(stream[at + 2 : body], "big")
        if kind != _CONTROL and self._payload + size > self._limit:
            # Known from the header, so the bytes themselves are never held.
            raise _Fault(CloseCode.MESSAGE_TOO_BIG, f"a message may have {self._limit} bytes")
        if self._mask:
            body += 4
        stop = body + size
        if stop > len(stream):
            self._need = stop
            return None
        return kind, body, stop

    def _count(self, kind: int, size: int) -> None:
        """Notes a data frame."""
        if bool(self._fragments) != (kind in (_MIDDLE, _LAST)):
            raise _Fault(CloseCode.PROTOCOL_ERROR, "fragments out of order")
        if kind in (_SINGLE, _LAST):
            self._fragments = self._payload = 0
            return
        self._fragments += 1
        self._payload += size
        if self._fragments > MAX_FRAGMENTS:
            raise _Fault(CloseCode.MESSAGE_TOO_BIG, f"a message may have {MAX_FRAGMENTS} fragments")

    def _keep(
        self, stream: bytes | bytearray, at: int, end: int, cuts: list[tuple[int, int]]
    ) -> bytes:
        """Releases up to `end` and holds the rest, both without the control frames."""
        size = len(stream)
        if end == size:
            self._held, self._at = None, 0
            return (
                stream if not cuts and isinstance(stream, bytes) else _without(stream, 0, end, cuts)
            )
        removed = sum(stop - start for start, stop in cuts if start >= end)
        self._at = at - end - removed
        self._need -= end + removed
        if end == 0 and not cuts and isinstance(stream, bytearray):
            self._held = stream
            return b""
        self._held = bytearray(_without(stream, end, size, cuts))
        return _without(stream, 0, end, cuts)

    def _unmasked(self, stream: bytes | bytearray, body: int, stop: int) -> bytes:
        payload = bytes(stream[body:stop])
        if not self._mask:
            return payload
        key = stream[body - 4 : body]
        return bytes(byte ^ key[index & 3] for index, byte in enumerate(payload))


def _without(
    stream: bytes | bytearray, start: int, stop: int, cuts: list[tuple[int, int]]
) -> bytes:
    """The stream from `start` to `stop` without the control frames in between, copied once."""
    pieces = []
    for cut_start, cut_stop in cuts:
        if start <= cut_start < stop:
            pieces.append(stream[start:cut_start])
            start = cut_stop
    pieces.append(stream[start:stop])
    return b"".join(pieces)


def _peers_close(payload: bytes) -> Close:
    try:
        return Close.parse(payload)
    except (ProtocolError, UnicodeDecodeError):
        raise _Fault(CloseCode.PROTOCOL_ERROR, "invalid Close") from None
