"""One caller's connection up to its answer: the head, then a 101 and a call, or a plain HTTP response."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, cast

from websockets.http11 import Request

from trunkline_runtime.contract import CALL_HEADER
from trunkline_runtime.gateway.access.answers import Away, Denied
from trunkline_runtime.gateway.access.caller_tls import name_in
from trunkline_runtime.gateway.access.doorstep import Arrival
from trunkline_runtime.gateway.access.order import Order, OrderReader, is_order
from trunkline_runtime.gateway.call import Again, Call, Ended, Facts
from trunkline_runtime.gateway.descriptors import NO_DESCRIPTOR, At
from trunkline_runtime.gateway.handshake import MAX_HEAD_BYTES
from trunkline_runtime.gateway.leg import Leg
from trunkline_runtime.gateway.sockets import finish
from trunkline_runtime.process import answer
from trunkline_runtime.upgrade import HEAD_END, Refused, Upgrade, upgrade

log = logging.getLogger("trunkline.gateway")

HEAD_SECONDS: Final = 5.0  # for the whole head, whatever trickles in
MAX_EARLY_BYTES: Final = 64 * 2**10  # from a caller that does not wait for its 101
MAX_TLS_BUFFER_BYTES: Final = (
    64 * 2**10
)  # each way, as plain sockets have; uvloop's own are 512 and 256 KiB
PARTING_SECONDS: Final = 1.0  # for a plain answer to be read: who gets one has nothing more to say
TURN_AWAY_SECONDS: Final = 1.0  # from a caller that is turned away and says nothing
NO_ROOM: Final = Denied(
    status=503,
    text=f"{NO_DESCRIPTOR}: call again after a while\n",
    outcome="unready",
    headers=(("Retry-After", "5"),),
)
TOO_MANY: Final = Denied(
    status=429,
    text="too many connections from your address: come back in a second\n",
    outcome="limited",
    headers=(("Retry-After", "1"),),
)


@dataclass(frozen=True, slots=True)
class Begun:
    """What a call begins with."""

    facts: Facts
    ended: Ended
    again: Again


@dataclass(frozen=True, slots=True)
class Answered:
    """A worker is on the line for this caller. `begin` is asked once, as soon as the caller has been told."""

    leg: Leg
    begin: Callable[[], Begun]


class Desk(Protocol):
    """What the intake asks for an answer, and tells of what lives."""

    async def answer(self, call: str, request: Request, holder: str) -> Answered | Denied: ...

    async def mint(self, order: Order) -> str | Denied: ...

    def order_reader(self, holder: str) -> OrderReader: ...

    def denied(self, denied: Denied) -> None: ...

    def arrives(self, peer: str) -> Arrival: ...

    def leaves(self, peer: str) -> None: ...

    def forwarded(self, peer: str, head: bytes) -> str | None: ...

    def trusts(self, peer: str) -> bool: ...

    def has_descriptors(self, number: int) -> bool: ...

    def short_of_descriptors(self, at: At) -> None: ...

    def turned_away(self, away: Away) -> None: ...

    def opened(self, connection: "Intake | Call") -> None: ...

    def gone(self, connection: "Intake | Call") -> None: ...


class Intake(asyncio.Protocol):
    """Gives way to a `Call` on the same transport, or answers plainly and closes it.

    `peer` is where the connection comes from, if that was seen, and counted as an arrival, before it came here.
    """

    def __init__(self, desk: Desk, peer: str | None = None) -> None:
        self._desk = desk
        self.begun = False  # from here on it is this object that tells of the end
        self._loop = asyncio.get_running_loop()
        self._peer = peer
        self._holder = ""  # of the certificate that the caller has shown
        self._buffer = b""
        self._order: OrderReader | None = None  # instead of a call
        self._turned_away: Denied | None = None  # with this, once it has said a word
        self._answered = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Intake placing={self._task is not None} answered={self._answered}>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._desk.opened(self)
        self.begun = True
        arrival = Arrival.WELCOME
        if self._peer is not None:
            self._secure()
        else:
            self._peer = _address(transport)
            arrival = self._desk.arrives(self._peer)
        if arrival is Arrival.CROWDED:
            self._answered = True
            self._transport.abort()
        elif arrival is Arrival.TOO_MANY:
            self._turn_away(TOO_MANY)
        elif not self._desk.has_descriptors(transport.get_extra_info("socket").fileno()):
            self._desk.short_of_descriptors(At.ARRIVAL)
            self._turn_away(NO_ROOM)
        else:
            self._timer = self._loop.call_later(HEAD_SECONDS, self._late)

    def data_received(self, data: bytes) -> None:
        if self._answered:
            return
        if self._turned_away is not None:
            self._deny(self._turned_away)
            return
        if self._order is not None and self._task is None:
            self._read_order(self._order, data)
            return
        self._buffer += data
        if self._task is None:
            self._seek_head()
        if self._task is not None and len(self._buffer) > MAX_EARLY_BYTES:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        if self._task is not None:
            self._task.cancel()  # what was booked for a caller that left is given back
        self._gone()

    def abort(self) -> None:
        self._transport.abort()

    def _turn_away(self, denied: Denied) -> None:
        """Clients cannot read an answer to what they have not asked yet."""
        self._turned_away = denied
        self._timer = self._loop.call_later(TURN_AWAY_SECONDS, self._deny, denied)

    def _secure(self) -> None:
        """Bounds what TLS holds, and looks who the caller has proved to be by it."""
        if self._transport.get_extra_info("ssl_object") is not None:
            self._transport.set_write_buffer_limits(MAX_TLS_BUFFER_BYTES)
            cast(Any, self._transport).set_read_buffer_limits(MAX_TLS_BUFFER_BYTES)
            self._holder = name_in(self._transport.get_extra_info("peercert"))

    def _seek_head(self) -> None:
        end = self._buffer.find(HEAD_END, 0, MAX_HEAD_BYTES)
        if end >= 0 and not self._is_welcome(self._buffer[:end]):
            self._deny(TOO_MANY)
        elif end >= 0 and is_order(self._buffer):
            data, self._buffer = self._buffer, b""
            self._order = self._desk.order_reader(self._holder)
            self._read_order(self._order, data)
        elif end >= 0:
            self._cancel_timer()
            head, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
            self._task = self._loop.create_task(self._answer(partial(self._decide, head)))
        elif len(self._buffer) > MAX_HEAD_BYTES:
            self._refuse(431, f"the head of a request may have {MAX_HEAD_BYTES} bytes\n")

    def _is_welcome(self, head: bytes) -> bool:
        """Whether the caller behind a proxy may come; one without a proxy has been asked at its arrival."""
        assert self._peer is not None
        caller = self._desk.forwarded(self._peer, head)
        if caller is None:
            return True
        self._desk.leaves(self._peer)
        self._peer = caller
        return self._desk.arrives(caller) is Arrival.WELCOME

    def _read_order(self, reader: OrderReader, data: bytes) -> None:
        """The timer of the head goes on until the body is there too."""
        match reader.feed(data):
            case Denied() as denied:
                self._deny(denied)
            case Order() as order:
                self._cancel_timer()
                self._task = self._loop.create_task(self._answer(partial(self._mint, order)))

    async def _answer(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """`work` is begun in here: a caller that leaves in the same turn leaves no coroutine behind."""
        try:
            await work()
        except Exception:  # the boundary of a caller's request: nobody above would see it
            log.exception("a caller could not be answered")
            if self._answered:
                self._transport.abort()
            self._refuse(500, "the gateway failed; its log says why\n")
        finally:
            self._task = None

    async def _decide(self, head: bytes) -> None:
        asked = upgrade(head)
        if isinstance(asked, Refused):
            self._malformed(asked)
            return
        call = secrets.token_hex(16)
        match await self._desk.answer(call, asked.request, self._holder):
            case Denied() as denied:
                self._refuse(denied.status, denied.text, denied.headers)
            case Answered() as answered:
                self._begin(asked, call, answered)

    async def _mint(self, order: Order) -> None:
        match await self._desk.mint(order):
            case Denied() as denied:
                self._refuse(denied.status, denied.text, denied.headers)
            case str() as text if not self._transport.is_closing():
                response = answer(200, text, "application/json")
                response.headers["Cache-Control"] = "no-store"
                self._finish(response.serialize())

    def _begin(self, asked: Upgrade, number: str, answered: Answered) -> None:
        """Answers 101 and hands the transport over, in one step."""
        leg = answered.leg
        fields = [(CALL_HEADER, number)]
        if leg.subprotocol is not None:
            fields.append(("Sec-WebSocket-Protocol", leg.subprotocol))
        self._answered = True
        self._transport.write(asked.response(*fields))
        begun = answered.begin()
        call = Call(begun.facts, self._transport, begun.ended, self._desk.gone, begun.again)
        self._desk.opened(call)
        self._gone()
        self._transport.set_protocol(call)
        call.attach(leg)
        if self._buffer:
            call.data_received(self._buffer)

    def _malformed(self, refused: Refused) -> None:
        self._desk.denied(Denied(status=400, text="", outcome="invalid"))
        if refused.answer:
            self._finish(refused.answer)
        else:
            self._refuse(400, "this is no HTTP/1.1 request that a WebSocket could begin with\n")

    def _late(self) -> None:
        self._refuse(408, f"a request may take {HEAD_SECONDS:g} s to be sent\n")

    def _deny(self, denied: Denied) -> None:
        self._desk.denied(denied)
        self._refuse(denied.status, denied.text, denied.headers)

    def _gone(self) -> None:
        assert self._peer is not None
        self._desk.leaves(self._peer)
        self._desk.gone(self)

    def _refuse(self, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        if self._answered or self._transport.is_closing():
            return
        response = answer(status, text)
        for name, value in headers:
            response.headers[name] = value
        self._finish(response.serialize())

    def _finish(self, written: bytes) -> None:
        """Writes the last bytes; the socket stays a moment so that they are not lost in a reset."""
        self._answered = True
        self._buffer = b""
        self._cancel_timer()
        self._transport.write(written)
        finish(self._transport)
        self._timer = self._loop.call_later(PARTING_SECONDS, self._transport.abort)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _address(transport: asyncio.BaseTransport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else ""
