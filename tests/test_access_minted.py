"""Client secrets and tickets: what they open, for how long, and what they depend on."""

import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trunkline_runtime.gateway.access.answers import Denied
from trunkline_runtime.gateway.access.caller import Caller, Via, Why
from trunkline_runtime.gateway.access.minted import (
    LEEWAY_SECONDS,
    MAX_USED,
    PREFIXES,
    Opened,
    Roots,
    UsedTickets,
    kind_of,
    mint,
    opened,
)
from trunkline_runtime.gateway.access.order import MAX_BODY_BYTES, Order, OrderReader, is_order

KEY = "k" * 64
AGENT = "default/echo"
ROOTS = Roots({"web": "key abc"}, ("jwt issuer audience",))
BY_KEY = Caller(tenant="web", via=Via.KEY, root="key abc")
BY_JWT = Caller(tenant="acme", via=Via.JWT, root="jwt issuer audience", expires=time.time() + 1000)
KINDS = [Via.SECRET, Via.TICKET]


def made(kind: Via = Via.SECRET, caller: Caller = BY_KEY, seconds: int = 60, **changes: Any) -> str:
    """A secret; keyword arguments replace what it is made with."""
    now = int(time.time())
    given: dict[str, Any] = {"key": KEY, "agent": AGENT, "now": now, "name": "n"}
    given |= changes
    return mint(
        kind,
        given["key"],
        given["agent"],
        caller,
        seconds,
        given["now"],
        given["name"],
    ).value


def found(token: str, kind: Via = Via.SECRET, roots: Roots = ROOTS) -> Opened | Why:
    return opened(kind, token, KEY, AGENT, roots)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("caller", [BY_KEY, BY_JWT])
def test_it_stands_for_whoever_had_it_made(kind: Via, caller: Caller) -> None:
    token = made(kind, caller)
    assert kind_of(token) is kind
    opening = found(token, kind)
    assert isinstance(opening, Opened)
    assert (opening.caller.tenant, opening.caller.via) == (caller.tenant, kind)
    assert opening.name == "n"


def test_it_does_not_outlive_the_token_that_it_was_made_for() -> None:
    now = int(time.time())
    short = Caller(tenant="t", via=Via.JWT, root="jwt issuer audience", expires=now + 20)
    assert mint(Via.SECRET, KEY, AGENT, short, 600, now, "n").expires == now + 20
    assert mint(Via.SECRET, KEY, AGENT, BY_KEY, 600, now, "n").expires == now + 600


@pytest.mark.parametrize(
    ("token", "kind", "why"),
    [
        (lambda: made(key="other"), Via.SECRET, Why.SIGNATURE),
        (lambda: made(agent="default/other"), Via.SECRET, Why.AUDIENCE),
        (lambda: made(now=int(time.time()) - 60 - LEEWAY_SECONDS - 1), Via.SECRET, Why.EXPIRED),
        (lambda: made(now=int(time.time()) + LEEWAY_SECONDS + 60), Via.SECRET, Why.SIGNATURE),
        (lambda: made(seconds=7201), Via.SECRET, Why.CLAIMS),
        (lambda: made(Via.TICKET, seconds=61), Via.TICKET, Why.CLAIMS),
        (lambda: PREFIXES[Via.TICKET] + made()[3:], Via.TICKET, Why.SIGNATURE),
        (lambda: PREFIXES[Via.SECRET] + made(Via.TICKET)[3:], Via.SECRET, Why.SIGNATURE),
        (lambda: "ek_", Via.SECRET, Why.SIGNATURE),
        (lambda: "ek_" + "x" * 9000, Via.SECRET, Why.TOO_LONG),
        (lambda: "ek_" + jwt.encode({"aud": AGENT}, "", "none"), Via.SECRET, Why.SIGNATURE),
        (
            lambda: "ek_" + jwt.encode({"aud": AGENT, "exp": 2**40}, KEY, "HS256"),
            Via.SECRET,
            Why.SIGNATURE,
        ),
    ],
)
def test_attacks_open_nothing(token: Callable[[], str], kind: Via, why: Why) -> None:
    """Each is made when it is tried: those made as the tests are collected may be too old by then."""
    assert found(token(), kind) is why


def test_it_opens_nothing_once_what_it_came_from_is_withdrawn() -> None:
    token, by_jwt = made(), made(caller=BY_JWT)
    assert isinstance(found(token), Opened)
    assert found(token, roots=Roots({"web": "key of another digest"})) is Why.WITHDRAWN
    assert found(token, roots=Roots({"mobile": "key abc"})) is Why.WITHDRAWN
    assert found(by_jwt, roots=Roots({"web": "key abc"})) is Why.WITHDRAWN


def test_it_tells_nothing_of_the_key_that_it_came_from() -> None:
    assert "abc" not in str(jwt.decode(made()[3:], options={"verify_signature": False}))


@given(st.integers(0, 200), st.characters(codec="ascii"))
def test_a_changed_one_is_refused(place: int, other: str) -> None:
    token = made()
    place = 3 + place % (len(token) - 4)  # the last character holds bits that Base64 drops
    changed = token[:place] + other + token[place + 1 :]
    assert changed == token or not isinstance(found(changed), Opened)


def test_a_ticket_is_used_once_and_forgotten_after_its_time() -> None:
    used = UsedTickets()
    assert used.use("a", 60.0, 0.0) is True
    assert used.use("a", 60.0, 1.0) is False
    assert used.use("b", 60.0, 1.0) is True


def test_used_tickets_are_bounded() -> None:
    used = UsedTickets()
    for number in range(MAX_USED):
        assert used.use(str(number), 60.0, 0.0)
    assert used.use("one more", 60.0, 60.0) is None
    assert used.use("0", 60.0, 60.0) is False
    assert used.use("one more", 120.0, 60.0 + LEEWAY_SECONDS) is True
    assert len(used._used) == 1


# --- the request for one ---------------------------------------------------------------------------------


BODY = b'{"session": {"type": "realtime", "model": "echo"}}'


def request(
    body: bytes = BODY, path: str = "/v1/realtime/client_secrets", head: str = "", **options: Any
) -> bytes:
    length = options.get("length", len(body))
    start = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{head}\r\n"
    return start.encode() + body


def read(data: bytes) -> Order | Denied | None:
    return OrderReader(16_384, "default").feed(data)


def test_an_order_is_read_in_any_pieces() -> None:
    data = request(head="Authorization: Bearer sk-1\r\nOrigin: https://a.example\r\n")
    whole = read(data)
    assert isinstance(whole, Order)
    assert (whole.kind, whole.agent, whole.seconds) == (Via.SECRET, AGENT, 600)
    assert (whole.shown.tokens, whole.shown.origins) == (("sk-1",), ("https://a.example",))
    reader = OrderReader(16_384, "default")
    for place in range(len(data) - 1):
        assert reader.feed(data[place : place + 1]) is None
    assert reader.feed(data[-1:]) == whole


def test_a_chunked_body_is_read_too() -> None:
    head = b"POST /v1/realtime/tickets HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    order = read(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))
    assert isinstance(order, Order)
    assert (order.kind, order.seconds) == (Via.TICKET, 60)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request(path="/elsewhere"), 404),
        (request(b"[]"), 400),
        (request(b"{"), 400),
        (request(b"[" * 60_000), 400),
        (request(b"\xff"), 400),
        (request(b""), 400),
        (request(b'{"session": {"model": ""}}'), 400),
        (request(b'{"session": {"model": 1}}'), 400),
        (request(BODY[:-1] + b', "expires_after": {"seconds": 9}}'), 400),
        (request(BODY[:-1] + b', "expires_after": {"seconds": 7201}}'), 400),
        (request(BODY[:-1] + b', "expires_after": {"seconds": 60.5}}'), 400),
        (request(BODY[:-1] + b', "expires_after": {"seconds": true}}'), 400),
        (
            request(BODY[:-1] + b', "expires_after": {"seconds": true}}', "/v1/realtime/tickets"),
            400,
        ),
        (request(BODY + b" " * MAX_BODY_BYTES), 413),
        (request(head="X: " + "x" * 17_000).partition(b"\r\n\r\n")[0], 431),
        (request(length="-1"), 400),
        (request(head="Content-Length: 7\r\n"), 400),
        (request(head="Transfer-Encoding: gzip\r\n"), 501),
        (request().replace(b"Host: x\r\n", b""), 400),
        (request().replace(b"HTTP/1.1", b"SMTP"), 400),
    ],
)
def test_what_is_no_order_is_refused_in_words(data: bytes, status: int) -> None:
    denied = read(data)
    assert isinstance(denied, Denied)
    assert (denied.status, denied.outcome) == (status, "invalid")
    assert denied.text


@given(st.binary(max_size=300), st.integers(0, 200))
@example(b"\x01", 48)
def test_any_bytes_are_read_without_an_exception(data: bytes, place: int) -> None:
    good = request()
    for sent in (data, good[:place] + data, good[:place] + data + good[place:]):
        outcome = OrderReader(16_384, "default").feed(sent)
        assert outcome is None or isinstance(outcome, Order | Denied)


@pytest.mark.parametrize(
    ("head", "is_one"),
    [
        (b"POST /v1/realtime/client_secrets HTTP/1.1\r\n", True),
        (b"POST /v1/realtime/tickets?x=1 HTTP/1.1\r\n", True),
        (b"GET /v1/realtime/tickets HTTP/1.1\r\n", False),
        (b"POST /v1/realtime HTTP/1.1\r\n", False),
        (b"\xff\xfe", False),
    ],
)
def test_an_order_is_known_by_its_first_line(head: bytes, is_one: bool) -> None:
    assert is_order(head) is is_one
