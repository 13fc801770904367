"""A request to mint a client secret or a ticket, as it comes over plain HTTP.

The shape of body and answer is OpenAI's `POST /v1/realtime/client_secrets`; of the session only `model` counts, for
what else a call needs stands in the agent or is said in the call itself.
"""

import json
from dataclasses import dataclass, replace
from typing import Any, Final

import h11
from websockets.datastructures import Headers
from websockets.exceptions import InvalidHeader

from trunkline_runtime.contract import CLIENT_SECRETS_PATH, TICKETS_PATH
from trunkline_runtime.gateway.access.answers import Denied
from trunkline_runtime.gateway.access.caller import Via
from trunkline_runtime.gateway.access.minted import (
    SECRET_DEFAULT_SECONDS,
    SECRET_SECONDS,
    TICKET_SECONDS,
    Minted,
)
from trunkline_runtime.gateway.access.wish import Shown, bearers, full_name, invalid

KINDS: Final = {CLIENT_SECRETS_PATH: Via.SECRET, TICKETS_PATH: Via.TICKET}
MAX_BODY_BYTES: Final = 64 * 2**10  # a session of OpenAI's with its tools


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be minted, and for whom."""

    kind: Via
    agent: str  # namespace/name
    seconds: int
    shown: Shown


def is_order(head: bytes) -> bool:
    """Whether what a request begins with asks for something to be minted."""
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    return method == b"POST" and path.decode("latin-1") in KINDS


class OrderReader:
    """Reads one request with its body, whichever way that is framed."""

    def __init__(self, max_head: int, default_namespace: str, holder: str = "") -> None:
        self._holder = holder  # of the certificate that was shown
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=max_head)
        self._default_namespace = default_namespace
        self._request: h11.Request | None = None
        self._body = b""

    def __repr__(self) -> str:
        return f"<OrderReader body={len(self._body)}>"

    def feed(self, data: bytes) -> Order | Denied | None:
        """What was asked for, once all of it is there."""
        try:
            self._connection.receive_data(data)
            while True:
                event = self._connection.next_event()
                match event:
                    case h11.Request():
                        self._request = event
                    case h11.Data():
                        self._body += event.data
                        if len(self._body) > MAX_BODY_BYTES:
                            return invalid(f"the body may have {MAX_BODY_BYTES} bytes\n", 413)
                    case h11.EndOfMessage():
                        assert self._request is not None
                        return self._read(self._request)
                    case _:
                        return None
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            return invalid("this is no HTTP request that could be answered\n", status)

    def _read(self, request: h11.Request) -> Order | Denied:
        order = _order(request, self._body, self._default_namespace)
        if isinstance(order, Denied):
            return order
        return replace(order, shown=replace(order.shown, holder=self._holder))


def as_answer(minted: Minted, agent: str) -> str:
    """The body of the answer."""
    session = {"type": "realtime", "object": "realtime.session", "model": agent}
    return json.dumps({"value": minted.value, "expires_at": minted.expires, "session": session})


def _order(request: h11.Request, body: bytes, default_namespace: str) -> Order | Denied:
    kind = KINDS.get(request.target.partition(b"?")[0].decode("latin-1"))
    if kind is None:
        return invalid(f"what can be posted to is {' and '.join(KINDS)}\n", 404)
    wanted = _wanted(body, kind)
    if isinstance(wanted, Denied):
        return wanted
    model, seconds = wanted
    headers = Headers()
    try:
        for name, value in request.headers:
            headers[name.decode("latin-1")] = value.decode("latin-1")
    except InvalidHeader:  # h11 lets control characters pass, `websockets` does not
        return invalid("a header has a character that none may have\n")
    shown = Shown(tokens=tuple(bearers(headers)[:1]), origins=tuple(headers.get_all("Origin")))
    agent = full_name(model, default_namespace)
    return Order(kind=kind, agent=agent, seconds=seconds, shown=shown)


def _wanted(body: bytes, kind: Via) -> tuple[str, int] | Denied:
    """The model and the seconds."""
    try:
        document = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return invalid("the body must be JSON\n")
    model = _at(document, "session", "model")
    if not isinstance(model, str) or not model:
        return invalid('say which agent it is for: {"session": {"model": "[namespace/]agent"}}\n')
    allowed = TICKET_SECONDS if kind is Via.TICKET else SECRET_SECONDS
    default = TICKET_SECONDS[-1] if kind is Via.TICKET else SECRET_DEFAULT_SECONDS
    seconds = _at(document, "expires_after", "seconds")
    seconds = default if seconds is None else seconds
    if type(seconds) is not int or seconds not in allowed:
        return invalid(
            f"expires_after.seconds must be a whole number from {allowed[0]} to {allowed[-1]}\n"
        )
    return model, seconds


def _at(document: Any, *path: str) -> Any:
    """What stands at a path, None if nothing does."""
    for name in path:
        document = document.get(name) if isinstance(document, dict) else None
    return document
