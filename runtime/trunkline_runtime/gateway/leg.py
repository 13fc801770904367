"""The data link to a worker for one call: dialled before the caller's 101, then half of the relay."""

import asyncio
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, cast

from websockets.client import ClientProtocol
from websockets.frames import Close
from websockets.http11 import Response
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from trunkline_runtime.contract import (
    ACCOUNT_HEADER,
    ACCOUNT_PING,
    END_PING,
    MAX_CALL_MESSAGE_BYTES,
    START_HEADER,
)
from trunkline_runtime.gateway.frames import Stop, Tracker, close_frame, ping_frame, pong_frame
from trunkline_runtime.process import QUIET

if TYPE_CHECKING:
    from trunkline_runtime.gateway.call import Call

MAX_HEAD_BYTES: Final = 16 * 2**10  # of a request or a response
# After our Close: a peer that speaks to a socket which is gone is reset, and may never read the Close. A second was
# not enough for a worker on a machine short of processors; what lingers costs a socket, and only until the peer goes.
LINGER_SECONDS: Final = 5.0
VANISHED_SECONDS: Final = (
    30  # as `Patience.stall`: a line that is down so long is not a call any more
)
ACCOUNT_SECONDS: Final = 0.5  # for a worker's account of its call; its Close goes then, in any case
HEAD_END: Final = b"\r\n\r\n"
NO_ROOM: Final = frozenset(f"refused its data link with HTTP {status}" for status in (429, 503))
STARTED: Final = re.compile(r"(cold|restored) ([0-9]+[.][0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Where and how a worker is asked to take one call."""

    host: str
    port: int
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    server_name: str = ""  # in its certificate, where that is not `host`
    target: str  # path and query
    subprotocol: str | None
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    opening: bytes = field(default=b"", repr=False)  # frames that go before anything of the caller
    ours: bool = True  # a worker, whose account of the call is believed


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt that did not end in a call, and why."""

    why: str
    full: bool = False  # there was no room, or the caller left: nobody's fault
    limited: bool = False  # Modal said that the workspace may have no more


async def dial(door: Door, by: float) -> "Leg | Failed":
    """A leg whose worker has answered 101, or why there is none. `by` is a time of the loop's clock.

    Nothing is left behind when it fails or is cancelled.
    """
    loop = asyncio.get_running_loop()
    leg = Leg(door, loop)
    why: str | None
    try:
        async with asyncio.timeout_at(by):
            await loop.create_connection(
                lambda: leg,
                door.host,
                door.port,
                ssl=door.tls,
                server_hostname=(door.server_name or door.host) if door.tls else None,
            )
            why = await leg.answered
    except TimeoutError:
        why = "did not answer its data link in time"
    except ssl.SSLCertVerificationError as error:
        why = f"could not prove who it is: {error.verify_message}"
    except OSError as error:
        why = f"cannot be reached: {error.strerror or error}"
    except BaseException:
        leg.abort()
        raise
    if why is None and leg.over:
        why = "closed its data link at once"
    if why is None:
        return leg
    leg.abort()
    return Failed(why, full=why in NO_ROOM)


class _Handshake:
    """Our half of the upgrade: `websockets` writes the request and checks the response."""

    def __init__(self, door: Door) -> None:
        path, _, query = door.target.partition("?")
        self._protocol = ClientProtocol(
            WebSocketURI(door.tls is not None, door.host, door.port, path, query),
            subprotocols=[Subprotocol(door.subprotocol)] if door.subprotocol else None,
            max_size=None,
            logger=QUIET,
        )
        request = self._protocol.connect()
        for name, value in door.headers:
            request.headers[name] = value
        self._protocol.send_request(request)
        self.opening = door.opening
        self.request = b"".join(self._protocol.data_to_send())
        self._response = b""
        self._ours = door.ours
        self.tells = False  # whether this worker gives an account of its calls
        self.started: tuple[str, float] | None = None
        """How a burst worker's container came up, and for how many seconds it has been; None = it does not say."""

    def receive(self, data: bytes) -> bytes | None:
        """What came behind the response; None until all of it is there."""
        self._response += data
        end = self._response.find(HEAD_END)
        if end < 0 and len(self._response) <= MAX_HEAD_BYTES:
            return None
        head, rest = self._response[: end + 4], self._response[end + 4 :]
        self._response = head if end >= 0 else b""
        self._protocol.receive_data(self._response)
        events = self._protocol.events_received()
        for response in (event for event in events if isinstance(event, Response)):
            self.tells = self._ours and ACCOUNT_HEADER in response.headers
            if found := STARTED.fullmatch(response.headers.get(START_HEADER, "")):
                self.started = found[1], float(found[2])
        self._protocol.parser.close()  # its frame refers to the protocol: one cycle less to collect
        return rest

    @property
    def subprotocol(self) -> str | None:
        return self._protocol.subprotocol

    @property
    def refusal(self) -> str | None:
        """Why the worker did not switch protocols."""
        if self._protocol.state is State.OPEN:
            return None
        status = self._response.partition(b"\r\n")[0].split(b" ")[1:2]
        if status and status[0].isdigit() and status[0] != b"101":
            return f"refused its data link with HTTP {status[0].decode()}"
        return "gave an answer to its data link that is no WebSocket handshake"


class Leg(asyncio.Protocol):
    """One connection to a worker. `passed` counts bytes that went on to the caller."""

    __slots__ = (
        "_awaited",
        "_call",
        "_early",
        "_emit",
        "_feed",
        "_gone",
        "_handshake",
        "_jammed",
        "_linger",
        "_loop",
        "_ping_due",
        "_stop",
        "_tells",
        "_transport",
        "account",
        "answered",
        "over",
        "passed",
        "start",
        "started",
        "subprotocol",
    )

    def __init__(self, door: Door, loop: asyncio.AbstractEventLoop) -> None:
        self.answered: asyncio.Future[str | None] = loop.create_future()  # why not, or None
        self.subprotocol: str | None = None  # that the worker selected
        self.started: tuple[str, float] | None = None  # what its worker says of its container
        self.start = ""  # what that means for the call: warm, cold or restored
        self.over = False  # the connection is gone
        self.passed = 0
        self.account: bytes | None = None  # what the worker tells of its call at the end
        self._tells = False  # whether it will
        self._awaited: list[Callable[[], None]] = []  # those who wait for that
        self._loop = loop
        self._handshake: _Handshake | None = _Handshake(door)
        self._transport: asyncio.Transport | None = None
        self._call: Call | None = None
        self._early: list[bytes] = []  # came in one chunk with the worker's 101
        self._stop: Stop | None = None  # likewise
        self._emit: Callable[[bytes], object] = self._early.append
        tracker = Tracker(masked=False, limit=MAX_CALL_MESSAGE_BYTES, pinged=self._pinged)
        self._feed: Callable[[bytes], bytes] = tracker.feed
        self._jammed = False  # the worker does not read as fast as the caller speaks
        self._ping_due: bytes | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._gone: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<Leg over={self.over} attached={self._call is not None} passed={self.passed}>"

    # --- what the transport tells ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        notice_dead_peer(transport)
        assert self._handshake is not None
        self._transport.write(self._handshake.request)

    def data_received(self, data: bytes) -> None:
        if self._handshake is not None:
            self._answer(data)
            return
        try:
            out = self._feed(data)
        except Stop as stop:
            self._stopped(stop)
            return
        if out:
            self.passed += len(out)
            self._emit(out)

    def pause_writing(self) -> None:
        self._jammed = True
        if self._call is not None:
            self._call.pause()

    def resume_writing(self) -> None:
        self._jammed = False
        if self._call is not None:
            self._call.resume()
        if self._ping_due is not None:
            payload, self._ping_due = self._ping_due, None
            self._pinged(payload)

    def connection_lost(self, exc: Exception | None) -> None:
        self.over = True
        if self._linger is not None:
            self._linger.cancel()
        if not self.answered.done():
            self.answered.set_result("closed its data link at once")
        self._emit = self._feed = drop  # and with them the tracker, whose callback refers to us
        call, self._call = self._call, None
        if call is not None:
            call.worker_lost()
        self._account_settled()
        for callback in self._gone:
            callback()
        self._gone.clear()

    # --- what the call asks for ---

    @property
    def write(self) -> Callable[[bytes], object]:
        """Takes what the caller says."""
        assert self._transport is not None
        return self._transport.write

    def attach(self, call: "Call", emit: Callable[[bytes], object]) -> None:
        """Hands the leg to a call; `emit` takes what the worker says."""
        self._call, self._emit = call, emit
        if self._jammed:
            call.pause()
        for chunk in self._early:
            emit(chunk)
        self._early.clear()
        resume(self._transport)
        if self._stop is not None:
            self._stopped(self._stop)

    def speak(self, emit: Callable[[bytes], object]) -> None:
        """Hands what the worker says to another place from now on."""
        self._emit = emit

    def pause(self) -> None:
        """The caller does not read as fast as the worker speaks."""
        pause(self._transport)

    def resume(self) -> None:
        resume(self._transport)

    def retire(self, close: Close) -> None:
        """The call has left this leg: nothing of it reaches the caller from here on."""
        self._call, self._emit = None, drop
        transport = self._transport
        if transport is None or transport.is_closing():
            self._feed = drop
            return
        if self._linger is not None:  # it has been told
            return
        resume(transport)  # to read the worker's own Close, and to see it go
        if self._tells and self.account is None:
            self._awaited.append(partial(self._part, close))
            transport.write(ping_frame(END_PING, masked=True))
            self._linger = self._loop.call_later(ACCOUNT_SECONDS, self._account_settled)
        else:
            self._part(close)

    def when_told(self, callback: Callable[[], None]) -> None:
        """Calls back once when there is an account, or will be none: soon after the call has left the leg."""
        if self.over or self.account is not None or not self._tells:
            callback()
        else:
            self._awaited.append(callback)

    def when_gone(self, callback: Callable[[], None]) -> None:
        """Calls back once when the connection is gone."""
        if self.over:
            callback()
        else:
            self._gone.append(callback)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- inside ---

    def _part(self, close: Close) -> None:
        """Our Close, after which nothing of the worker counts."""
        self._feed = drop
        transport = self._transport
        if self._linger is not None:
            self._linger.cancel()
        if transport is not None and not transport.is_closing():
            transport.write(close_frame(close, masked=True))
            self._linger = self._loop.call_later(LINGER_SECONDS, transport.abort)

    def _account_settled(self) -> None:
        awaited, self._awaited = self._awaited, []
        for callback in awaited:
            callback()

    def _answer(self, data: bytes) -> None:
        assert self._handshake is not None
        assert self._transport is not None
        rest = self._handshake.receive(data)
        if rest is None:
            return
        handshake, self._handshake = self._handshake, None
        self.subprotocol = handshake.subprotocol
        self._tells = handshake.tells
        self.started = handshake.started
        if handshake.refusal is None:
            self._transport.write(handshake.opening)
            self._transport.pause_reading()  # until the call takes it: what is early stays small
        if not self.answered.done():
            self.answered.set_result(handshake.refusal)
        if rest and handshake.refusal is None:
            self.data_received(rest)

    def _stopped(self, stop: Stop) -> None:
        """The worker said Close, or something that is no WebSocket."""
        self._feed = drop
        self._tells = self._tells and self.account is not None  # it says nothing more
        if self._call is None:
            self._stop = stop
            self._account_settled()
            return
        if stop.data:
            self.passed += len(stop.data)
            self._emit(stop.data)
        if stop.fault:
            call = self._call
            self.retire(stop.close)
            call.worker_lost()
        else:
            self._call.worker_closed(stop.close)

    def _pinged(self, payload: bytes) -> None:
        if self._tells and payload.startswith(ACCOUNT_PING):
            self.account = payload
        if self._jammed:  # the latest is answered when the worker reads again
            self._ping_due = payload
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.write(pong_frame(payload, masked=True))
        if self.account is not None:
            self._account_settled()


def drop(data: bytes) -> bytes:
    """Takes the place of a write or a tracker whose other side is gone."""
    return b""


def pause(transport: asyncio.Transport | None) -> None:
    if transport is not None and not transport.is_closing():
        transport.pause_reading()


def resume(transport: asyncio.Transport | None) -> None:
    """uvloop raises where asyncio does nothing, so a closing transport is left alone."""
    if transport is not None and not transport.is_closing():
        transport.resume_reading()


def finish(transport: asyncio.Transport) -> None:
    """Says that nothing more will be written, once what is there is out.

    TCP can close one direction alone and TLS cannot: there it is the whole, after both have said so.
    """
    if transport.can_write_eof():
        transport.write_eof()
    else:
        transport.close()


def notice_dead_peer(transport: asyncio.BaseTransport, seconds: int = VANISHED_SECONDS) -> None:
    """Ends a connection whose peer has vanished without a word, after about so many seconds.

    Keepalive notices it while nothing is sent, the user timeout while something is.
    """
    seen = transport.get_extra_info("socket")
    each = max(1, seconds // 6)
    # uvloop makes such an object for each option that is set; one for all takes half as long.
    peer = socket.socket(seen.family, seen.type, seen.proto, fileno=seen.fileno())
    for option, value in (
        (socket.TCP_KEEPIDLE, max(1, seconds - 3 * each)),
        (socket.TCP_KEEPINTVL, each),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, seconds * 1000),
        (socket.TCP_NODELAY, 1),
    ):
        peer.setsockopt(socket.IPPROTO_TCP, option, value)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.detach()  # it is the transport's
