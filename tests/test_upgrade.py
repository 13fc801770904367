"""A server's half of a WebSocket's opening, held against that of `websockets`: the same is let in and the same is said."""

import base64
import email.utils
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import mutants
from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from trunkline_runtime import upgrade as subject
from trunkline_runtime.upgrade import Refused, Upgrade, upgrade

KEY = base64.b64encode(bytes(range(16))).decode()
HEAD = (
    "GET /v1/realtime?model=a HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    f"Sec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\nOrigin: https://x\r\n"
    "Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.k\r\nAuthorization: Bearer \xe4\r\n\r\n"
).encode("latin-1")


def theirs(head: bytes) -> tuple[Request | None, int, bytes]:
    """What `websockets` reads, its status and all that it says; 0 where it says nothing."""
    server = ServerProtocol()
    server.receive_data(head)
    request = next(iter(server.events_received()), None)
    if not isinstance(request, Request):
        written = b"".join(server.data_to_send())
        return None, int(written[9:12] or b"0"), written
    response = server.accept(request)
    return request, response.status_code, response.serialize()


def undated(said: bytes) -> list[bytes]:
    """The lines of a response without its date."""
    return [line for line in said.split(b"\r\n") if not line.startswith(b"Date: ")]


def agree(head: bytes) -> None:
    """Asserts that we let in what they let in, read it as they do, and say what they say."""
    request, status, said = theirs(head)
    match upgrade(head):
        case Upgrade() as ours:
            assert status == 101, head
            assert request is not None
            assert (ours.request.path, ours.request.headers) == (request.path, request.headers)
            assert list(ours.request.headers.raw_items()) == list(request.headers.raw_items())
            assert undated(ours.response()) == undated(said)
        case Refused() as ours:
            assert status != 101, head
            assert undated(ours.answer) == undated(said)


def is_read_by_hand(head: bytes) -> bool:
    return subject._ordinary(head) is not None


def test_what_clients_send_is_read_by_hand() -> None:
    for subprotocols in (None, [Subprotocol("realtime"), Subprotocol("other")]):
        client = ClientProtocol(parse_uri("ws://x/v1/realtime?model=a"), subprotocols=subprotocols)
        request = client.connect()
        assert is_read_by_hand(request.serialize())
        agree(request.serialize())
    assert is_read_by_hand(HEAD)
    browser = HEAD.replace(b"Connection: Upgrade", b"Connection: keep-alive, Upgrade")
    assert is_read_by_hand(browser)
    agree(browser)


def test_a_client_of_websockets_believes_the_101() -> None:
    client = ClientProtocol(parse_uri("ws://x/"), subprotocols=[Subprotocol("realtime")])
    client.send_request(client.connect())
    asked = upgrade(b"".join(client.data_to_send()))
    assert isinstance(asked, Upgrade)
    client.receive_data(asked.response(("Sec-WebSocket-Protocol", "realtime"), ("X-Call", "c-1")))
    (response,) = client.events_received()
    assert isinstance(response, Response)
    assert client.state is State.OPEN
    assert client.subprotocol == "realtime"
    assert response.headers["X-Call"] == "c-1"
    assert email.utils.parsedate_to_datetime(response.headers["Date"]).tzinfo is not None


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ((b"GET", b"POST"), 405),
        ((b"HTTP/1.1", b"HTTP/1.0"), 505),
        ((b"HTTP/1.1", b"HTTP/2.0"), 0),
        ((b"Upgrade: websocket", b"Upgrade: h2c"), 426),
        ((b"Upgrade: websocket", b"Upgrade: websocket, h2c"), 426),
        ((b"Connection: Upgrade", b"Connection: close"), 426),
        ((b"Connection: Upgrade", b"Connection:"), 400),
        ((b"Connection: Upgrade", b"Connection: close\r\nConnection: upgrade"), 101),
        ((b"Version: 13", b"Version: 8"), 400),
        ((b"Host: x", b"Sec-WebSocket-Version: 13"), 400),
        ((b"Host: x", b"Sec-WebSocket-Key: " + KEY.encode()), 400),
        ((KEY.encode(), KEY.encode()[:-4]), 400),
        ((KEY.encode(), b"*" + KEY.encode()[1:]), 400),
        ((b"Host: x", b"Origin: https://y"), 400),
        ((b"realtime, ", b"real time, "), 400),
        ((b"realtime, ", b",, realtime ,\t"), 101),
        ((b"Host: x", b"Content-Length: 0"), 101),
        ((b"Host: x", b"Content-Length: 3"), 0),
        ((b"Host: x", b"Transfer-Encoding: chunked"), 0),
        ((b"Host: x", b"Host : x"), 0),
        ((b"Host: x", b" folded"), 0),
        ((b"Host: x", b"Host: x\nY: z"), 0),
        ((b"Host: x", b"Host: \x00"), 0),
        ((b"model=a", b"model=\xff"), 0),
        ((b"model=a", b"model=a b"), 0),
        ((b"model=a", b"model=" + b"a" * 9_000), 414),
        ((b"Host: x", b"Host: " + b"x" * 9_000), 431),
        ((b"Host: x", b"\r\n".join([b"X: y"] * 200)), 431),
        ((b"Host: x", b'Sec-WebSocket-Extensions: permessage-deflate; x="'), 101),
    ],
)
def test_what_is_out_of_the_ordinary_is_judged_by_websockets(
    change: tuple[bytes, bytes], status: int
) -> None:
    head = HEAD.replace(*change, 1)
    assert head != HEAD
    assert theirs(head)[1] == status
    agree(head)


@pytest.mark.parametrize("size", range(8_180, 8_200))
def test_lines_may_be_as_long_as_with_websockets(size: int) -> None:
    for line in (b"Host: x", b"model=a"):
        agree(HEAD.replace(line, line + b"y" * (size - len(line)), 1))


@pytest.mark.parametrize("count", range(118, 124))
def test_there_may_be_as_many_fields_as_with_websockets(count: int) -> None:
    agree(HEAD.replace(b"Host: x", b"\r\n".join([b"X: y"] * count), 1))


EXTRA = [line.swapcase() for line in HEAD.removesuffix(b"\r\n\r\n").split(b"\r\n")]


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_it_lets_in_and_says_what_websockets_does(seed: int) -> None:
    for head in mutants(random.Random(seed), HEAD, EXTRA):
        agree(head)


def test_what_a_client_offers_is_read_from_all_lines() -> None:
    headers = Headers([("Sec-WebSocket-Protocol", "a, b"), ("sec-websocket-protocol", "c")])
    assert subject.offered(headers) == ["a", "b", "c"]
