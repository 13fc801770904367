"""The tracker against `websockets`' own parser: whatever the chunks, the same messages come out, whole."""

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Close, CloseCode, Frame, Opcode
from websockets.protocol import OPEN
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from trunkline_runtime.gateway.frames import MAX_FRAGMENTS, Stop, Tracker, close_frame, pong_frame

LIMIT = 70_000
SIZES = st.sampled_from([0, 1, 2, 119, 120, 125, 126, 127, 4000, 65535, 65536, LIMIT])


@dataclass(frozen=True)
class Sent:
    """A message as a peer sends it: fragments, with control frames before each."""

    binary: bool
    size: int
    cuts: tuple[int, ...]
    controls: tuple[tuple[Opcode, bytes] | None, ...]

    @property
    def payload(self) -> bytes:
        return (bytes(range(251)) * (self.size // 251 + 1))[: self.size]

    def wire(self, mask: bool) -> bytes:
        edges = [0, *sorted(cut % (self.size + 1) for cut in self.cuts), self.size]
        frames = []
        for index, (start, stop) in enumerate(itertools.pairwise(edges)):
            if index < len(self.controls) and (control := self.controls[index]) is not None:
                frames.append(Frame(*control))
            first = Opcode.BINARY if self.binary else Opcode.TEXT
            opcode = Opcode.CONT if index else first
            frames.append(Frame(opcode, self.payload[start:stop], fin=index == len(edges) - 2))
        return b"".join(frame.serialize(mask=mask) for frame in frames)


control = st.tuples(st.sampled_from([Opcode.PING, Opcode.PONG]), st.binary(max_size=125))
sent = st.builds(
    Sent,
    binary=st.booleans(),
    size=SIZES,
    cuts=st.lists(st.integers(0, 10**6), max_size=3).map(tuple),
    controls=st.lists(st.none() | control, max_size=4).map(tuple),
)


def peer(mask: bool) -> ServerProtocol | ClientProtocol:
    """A parser for what was sent with or without mask."""
    if mask:
        return ServerProtocol(state=OPEN, max_size=None)
    return ClientProtocol(parse_uri("ws://h/"), state=OPEN, max_size=None)


def frames_of(stream: bytes, mask: bool) -> list[Frame]:
    parser = peer(mask)
    parser.receive_data(stream)
    assert parser.parser_exc is None
    return [event for event in parser.events_received() if isinstance(event, Frame)]


def chunks(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[start:stop] for start, stop in itertools.pairwise(edges)]


@given(
    messages=st.lists(sent, max_size=6),
    cuts=st.lists(st.integers(0, 10**7), max_size=30),
    mask=st.booleans(),
    close=st.none() | st.sampled_from([b"", b"\x03\xe8bye", b"\x03\xf3"]),
)
@settings(max_examples=100, deadline=None)
def test_whatever_the_chunks_the_same_messages_come_out(
    messages: list[Sent], cuts: list[int], mask: bool, close: bytes | None
) -> None:
    stream = b"".join(message.wire(mask) for message in messages)
    if close is not None:
        stream += Frame(Opcode.CLOSE, close).serialize(mask=mask)
    pings: list[bytes] = []
    tracker = Tracker(masked=mask, limit=LIMIT, pinged=pings.append)
    out, end = [], None
    try:
        for chunk in chunks(stream, cuts):
            piece = tracker.feed(chunk)
            data = [f for f in frames_of(piece, mask) if f.opcode not in (Opcode.PING, Opcode.PONG)]
            assert not data or data[-1].fin, "what is released ends with a message"
            out.append(piece)
    except Stop as stop:
        out.append(stop.data)
        end = stop
    released = frames_of(b"".join(out), mask)
    wanted = [f for f in frames_of(stream, mask) if f.opcode in (0, 1, 2)]
    assert [(f.opcode, f.data, f.fin) for f in released] == [
        (f.opcode, f.data, f.fin) for f in wanted
    ]
    sent_pings = [f.data for f in frames_of(stream, mask) if f.opcode is Opcode.PING]
    # One answer a chunk may stand for several pings, and the last of all is always answered.
    remaining = iter(sent_pings)
    assert all(any(ping == other for other in remaining) for ping in pings)
    if close is None:
        assert end is None
        assert tracker.idle
        assert pings[-1:] == sent_pings[-1:]
    else:
        assert end is not None
        assert not end.fault
        assert end.close == Close.parse(close)


@given(
    before=st.integers(0, 2),
    after=st.binary(max_size=40),
    cuts=st.lists(st.integers(0, 1000), max_size=8),
    mask=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_what_websockets_refuses_is_refused_and_what_came_before_is_kept(
    before: int, after: bytes, cuts: list[int], mask: bool
) -> None:
    good = Frame(Opcode.TEXT, b"good").serialize(mask=mask) * before
    judge = peer(mask)
    judge.receive_data(good + after)
    tracker = Tracker(masked=mask, limit=10**9, pinged=lambda _: None)
    out, fault = b"", False
    try:
        for chunk in chunks(good + after, cuts):
            out += tracker.feed(chunk)
    except Stop as stop:
        out += stop.data
        fault = stop.fault
    # We say no at the header, `websockets` to some frames only when their payload is there.
    assert fault or judge.parser_exc is None
    assert out.startswith(good)


def fed(stream: bytes, *, mask: bool = True, limit: int = LIMIT) -> Stop:
    tracker = Tracker(masked=mask, limit=limit, pinged=lambda _: None)
    with pytest.raises(Stop) as caught:
        tracker.feed(stream)
    assert caught.value.fault
    return caught.value


@pytest.mark.parametrize(
    ("what", "stream"),
    [
        ("not masked", b"\x82\x01x"),
        ("a reserved bit", b"\xc2\x81\0\0\0\0x"),
        ("a reserved opcode", b"\x83\x81\0\0\0\0x"),
        ("a fragmented ping", b"\x09\x80\0\0\0\0"),
        ("a long ping", b"\x89\xfe\x00\x7e\0\0\0\0" + bytes(126)),
        ("a continuation of nothing", b"\x80\x80\0\0\0\0"),
        ("a message inside a message", b"\x02\x80\0\0\0\0\x82\x80\0\0\0\0"),
        ("a Close of one byte", b"\x88\x81\0\0\0\0x"),
        ("a Close with a reserved code", b"\x88\x82\0\0\0\0\x03\xed"),
    ],
)
def test_a_broken_frame_is_a_protocol_error(what: str, stream: bytes) -> None:
    good = Frame(Opcode.TEXT, b"good").serialize(mask=True)
    stop = fed(good + stream)
    assert stop.close.code == CloseCode.PROTOCOL_ERROR, what
    assert stop.data == good


def test_a_message_of_the_limit_passes_and_one_byte_more_does_not() -> None:
    tracker = Tracker(masked=True, limit=1000, pinged=lambda _: None)
    whole = Frame(Opcode.BINARY, bytes(1000)).serialize(mask=True)
    assert tracker.feed(whole) == whole
    half = Frame(Opcode.BINARY, bytes(500), fin=False).serialize(mask=True)
    halves = half + Frame(Opcode.CONT, bytes(500)).serialize(mask=True)
    assert tracker.feed(halves) == halves
    more = Frame(Opcode.BINARY, bytes(1001)).serialize(mask=True)
    later = half + Frame(Opcode.CONT, bytes(501)).serialize(mask=True)
    assert fed(more, limit=1000).close.code == CloseCode.MESSAGE_TOO_BIG
    assert fed(later, limit=1000).close.code == CloseCode.MESSAGE_TOO_BIG


def test_too_long_a_message_is_refused_by_its_header_alone() -> None:
    header = b"\x82\xff" + (2**40).to_bytes(8, "big")
    assert fed(header).close.code == CloseCode.MESSAGE_TOO_BIG


def test_empty_fragments_without_end_are_refused() -> None:
    first, more = b"\x02\x80\0\0\0\0", b"\x00\x80\0\0\0\0"
    assert fed(first + more * MAX_FRAGMENTS).close.code == CloseCode.MESSAGE_TOO_BIG


def test_a_storm_of_pings_costs_one_answer_and_holds_nothing() -> None:
    pings: list[bytes] = []
    tracker = Tracker(masked=True, limit=1000, pinged=pings.append)
    storm = b"".join(
        Frame(Opcode.PING, str(number).encode()).serialize(mask=True) for number in range(20_000)
    )
    assert tracker.feed(storm) == b""
    assert pings == [b"19999"]
    assert tracker.idle
    # Inside a message, too: what is held is the message, not the pings.
    tracker.feed(b"\x02\x80\0\0\0\0" + storm)
    assert repr(tracker) == "<Tracker held=6 fragments=1>"


def test_our_own_frames_are_what_websockets_reads() -> None:
    stream = pong_frame(b"x", masked=True) + close_frame(Close(1011, "worker lost"), masked=True)
    pong, close = frames_of(stream, True)
    assert (pong.opcode, pong.data) == (Opcode.PONG, b"x")
    assert Close.parse(bytes(close.data)) == Close(1011, "worker lost")
    assert close_frame(Close(1005, ""), masked=False) == b"\x88\x00"
