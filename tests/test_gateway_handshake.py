"""A leg's handshake, held against that of `websockets`: what it asks is understood, and it believes no more."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import mutants
from websockets.client import ClientProtocol
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from trunkline_runtime.contract import ACCOUNT_HEADER, SEQ_HEADER, START_HEADER
from trunkline_runtime.gateway.handshake import (
    MAX_HEAD_BYTES,
    OF_A_POD,
    Address,
    Door,
    Handshake,
)
from trunkline_runtime.upgrade import Upgrade, upgrade

PLACE = Address(host="10.0.0.7", port=8080)
REALTIME = Subprotocol("realtime")


def door(subprotocol: str | None = "realtime") -> Door:
    headers = (("Trunkline-Ticket", "t-1"), ("Trunkline-Call", "c-1"))
    return Door(target="/v1/realtime?model=a", subprotocol=subprotocol, headers=headers)


def asked(door: Door, address: Address = PLACE) -> tuple[Handshake, bytes]:
    """A handshake and its request."""
    ours = Handshake(address, door)
    return ours, ours.request


def answered(written: bytes, subprotocol: bool = True) -> bytes:
    """What a server of `websockets` says to it."""
    server = ServerProtocol(subprotocols=[REALTIME] if subprotocol else None)
    server.receive_data(written)
    (request,) = server.events_received()
    assert isinstance(request, Request)
    response = server.accept(request)
    response.headers[ACCOUNT_HEADER] = "1"
    response.headers[START_HEADER] = "cold 1.250"
    return response.serialize()


def of_a_pod(written: bytes) -> bytes:
    """What a pod's worker says to it."""
    found = upgrade(written)
    assert isinstance(found, Upgrade)
    fields = [(ACCOUNT_HEADER, "1")]
    fields += [("Sec-WebSocket-Protocol", name) for name in found.subprotocols]
    return found.response(*fields, (SEQ_HEADER, "7"))


@pytest.mark.parametrize("subprotocol", [None, "realtime"])
@pytest.mark.parametrize(
    ("address", "host"),
    [
        (PLACE, "10.0.0.7:8080"),
        (Address(host="fd00::7", port=8080), "[fd00::7]:8080"),
        (Address(host="modal.example", port=80), "modal.example"),
    ],
)
def test_a_server_of_websockets_understands_it(
    address: Address, host: str, subprotocol: str | None
) -> None:
    ours, written = asked(door(subprotocol), address)
    server = ServerProtocol(subprotocols=[REALTIME] if subprotocol else None)
    server.receive_data(written)
    (request,) = server.events_received()
    assert isinstance(request, Request)
    assert request.path == "/v1/realtime?model=a"
    assert request.headers["Host"] == host
    assert request.headers["Trunkline-Ticket"] == "t-1"
    assert request.headers.get("Sec-WebSocket-Protocol") == subprotocol
    response = server.accept(request)
    assert response.status_code == 101
    whole = response.serialize() + b"early"
    for cut in range(len(whole)):
        ours, _ = asked(door(subprotocol), address)
        ours._accept = response.headers["Sec-WebSocket-Accept"]
        rest = ours.receive(whole[:cut])
        rest = ours.receive(whole[cut:]) if rest is None else rest + whole[cut:]
        assert rest == b"early"
        assert ours.refusal is None
        assert ours.subprotocol == subprotocol


def test_what_a_worker_says_of_itself_is_read() -> None:
    ours, written = asked(door())
    assert ours.receive(answered(written)) == b""
    assert ours.refusal is None
    assert (ours.tells, ours.started) == (True, ("cold", 1.25))
    theirs, written = asked(Door(target="/", subprotocol=None, headers=(), ours=False))
    assert theirs.receive(answered(written, subprotocol=False)) == b""
    assert not theirs.tells, "an upstream is not believed"


@pytest.mark.parametrize("subprotocol", [None, "realtime"])
def test_the_answer_of_a_pod_is_read_as_any_other(subprotocol: str | None) -> None:
    """Though all at once, and in whatever pieces it comes."""
    first, written = asked(door(subprotocol))
    whole = of_a_pod(written)
    assert OF_A_POD.fullmatch(whole)
    for said in (whole, whole.replace(b"\r\n\r\n", b"\r\nX: y\r\n\r\n")):
        for cut in range(len(said)):
            ours, _ = asked(door(subprotocol))
            ours._accept = first._accept
            rest = ours.receive(said[:cut])
            assert rest is None
            assert ours.receive(said[cut:] + b"early") == b"early"
            assert (ours.refusal, ours.subprotocol) == (None, subprotocol)
            assert (ours.tells, ours.seq, ours.started) == (True, 7, None)


@pytest.mark.parametrize(
    ("wrong", "instead"),
    [
        (b"Sec-WebSocket-Accept: ", b"Sec-WebSocket-Accept: x"),
        (b"Protocol: realtime", b"Protocol: other"),
        (b"websocket", b"h2c"),
        (b" 101 ", b" 200 "),
    ],
)
def test_the_answer_of_a_pod_to_somebody_else_is_not_believed(wrong: bytes, instead: bytes) -> None:
    ours, written = asked(door())
    assert wrong in of_a_pod(written)
    ours.receive(of_a_pod(written).replace(wrong, instead))
    assert ours.refusal is not None


def test_a_ticket_cannot_add_a_line() -> None:
    for ticket in ("a\r\nX: y", "a\nX: y", "a\x00", "ä"):
        with pytest.raises(ValueError, match="printable"):
            asked(Door(target="/", subprotocol=None, headers=(("T", ticket),)))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "refused its data link with HTTP 403"),
        (b"HTTP/1.1 503 no\r\nRetry-After: 1\r\n\r\n", "refused its data link with HTTP 503"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "that is no WebSocket handshake"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "that is no WebSocket handshake"),
        (b"\r\n\r\n", "that is no WebSocket handshake"),
        (bytes(MAX_HEAD_BYTES + 1), "that is no WebSocket handshake"),
    ],
)
def test_an_answer_that_is_no_101_is_told(said: bytes, why: str) -> None:
    ours, _ = asked(door())
    assert ours.receive(said) is not None
    assert ours.refusal is not None
    assert ours.refusal.endswith(why)


EXTRA = [
    b"Sec-WebSocket-Extensions: permessage-deflate",
    b"Sec-WebSocket-Protocol: other",
    b"Connection: keep-alive",
    b"Upgrade: h2c",
    b"Transfer-Encoding: chunked",
    b"Content-Length: 3",
    b" folded: line",
    b"no field",
    b": nameless",
    b"X: \x00",
]


def test_only_spaces_and_tabs_may_stand_around_a_token() -> None:
    for space, believed in ((b" \t", True), (b"\xa0", False)):
        ours, written = asked(door())
        ours.receive(answered(written).replace(b"Connection: ", b"Connection:" + space))
        assert (ours.refusal is None) is believed


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_it_believes_nothing_that_websockets_would_not(seed: int) -> None:
    draw = random.Random(seed)
    ours, written = asked(door())
    for said in mutants(draw, draw.choice((answered, of_a_pod))(written), EXTRA):
        again, _ = asked(door())
        again._accept = ours._accept
        rest = again.receive(said)
        if rest is None or again.refusal is not None:
            continue
        theirs = ClientProtocol(parse_uri("ws://10.0.0.7:8080/"), subprotocols=[REALTIME])
        request = theirs.connect()
        theirs.send_request(request)
        theirs.key = key_of(written)
        theirs.receive_data(said)
        (response,) = theirs.events_received()
        assert isinstance(response, Response)
        assert theirs.state is State.OPEN, said
        assert theirs.subprotocol == again.subprotocol
        assert rest == b""


def key_of(written: bytes) -> str:
    (line,) = (line for line in written.split(b"\r\n") if line.startswith(b"Sec-WebSocket-Key"))
    return line.partition(b": ")[2].decode()
