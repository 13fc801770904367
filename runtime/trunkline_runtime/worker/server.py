"""The data server of a worker: one WebSocket per call, opened by a ticket that is checked before the 101.

A caller is answered only after the worker's 101, so a seat is taken here before it, and given back if the
handshake fails in any way after that.
"""

import asyncio
import contextlib
import logging
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import Event, State
from websockets.typing import Subprotocol

from trunkline_runtime.contract import (
    ACCOUNT_HEADER,
    END_PING,
    ENV_PORT,
    MAX_CALL_MESSAGE_BYTES,
    MOSHI_PATH,
    REALTIME_PATH,
    START_HEADER,
    TICKET_HEADER,
    Close,
    Settings,
)
from trunkline_runtime.engine import Engine
from trunkline_runtime.process import QUIET, answer, listening
from trunkline_runtime.wire.realtime import RealtimeSession
from trunkline_runtime.wire.session import Session
from trunkline_runtime.worker.call import Call, CallLimits, Ending
from trunkline_runtime.worker.metrics import WorkerMetrics
from trunkline_runtime.worker.orders import Malformed, burst_settings_from
from trunkline_runtime.worker.slots import Seat
from trunkline_runtime.worker.switchboard import Switchboard
from trunkline_runtime.worker.tickets import BurstTickets, TicketRefused

log = logging.getLogger("trunkline.calls")

REALTIME: Final = Subprotocol("realtime")
PROTOCOLS: Final = {REALTIME_PATH: "realtime", MOSHI_PATH: "moshi"}
OPEN_SECONDS: Final = 5.0  # for the upgrade; a gateway sends it at once
SETTINGS_SECONDS: Final = 5.0  # for the first message of a burst link
CLOSE_SECONDS: Final = 2.0  # for the peer's half of the close
# A gateway answers pings itself. They find a peer that is gone without a word, which would otherwise
# hold its slot until idleSeconds; slow enough to outlast a gateway that is stopped for a while.
PING_SECONDS: Final = 30.0


class DataLink(ServerConnection):
    """A connection that may hold a seat from before its 101."""

    seat: Seat | None = None
    give_back: Callable[[Seat], None]
    hang_up: Callable[[], None] | None = None  # tells the call that its gateway has ended it

    async def handshake(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super().handshake(*args, **kwargs)
        finally:
            # A bad upgrade, a caller that left in this very turn, a server that closes: no handler
            # will be called, so nobody else would free the slot.
            if self.seat is not None and self.state is not State.OPEN:
                self.give_back(self.seat)

    def process_event(self, event: Event) -> None:
        """Pings are answered by the library; one of them is also an order."""
        super().process_event(event)
        match event:
            case Frame(opcode=Opcode.PING, data=data) if bytes(data) == END_PING and self.hang_up:
                self.hang_up()


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What a data server needs to seat a call and run it."""

    agent: str
    engine: Engine
    switchboard: Switchboard
    tickets: BurstTickets | None  # None: warm, and tickets are handles of the switchboard
    limits: CallLimits
    metrics: WorkerMetrics
    protocols: Sequence[str]  # of PROTOCOLS, those that callers may speak
    why_closed: Callable[[], str | None]  # a sentence while no call can be taken at all
    started: Callable[[], str] | None = None  # the value of START_HEADER, of a worker at Modal


class CallServer:
    """Seats callers and runs their calls."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    @contextlib.asynccontextmanager
    async def serving(
        self, host: str, port: int, tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[int]:
        """Listens; yields the port. With `tls` the links are TLS, in which the ticket still counts. At the end, calls that are still there are closed with RESTART."""
        with listening(host, port, "calls", ENV_PORT):
            server = await serve(
                self._serve,
                host,
                port,
                process_request=self._admit,
                process_response=self._sign,
                select_subprotocol=_subprotocol,
                create_connection=DataLink,
                ssl=tls,
                compression=None,
                max_size=MAX_CALL_MESSAGE_BYTES,
                open_timeout=OPEN_SECONDS,
                close_timeout=CLOSE_SECONDS,
                ping_interval=PING_SECONDS,
                ping_timeout=PING_SECONDS,
                logger=QUIET,
            )
        try:
            yield next(iter(server.sockets)).getsockname()[1]
        finally:
            # Without calls, links that are about to close keep the code and reason that they have.
            cut_off = self._desk.switchboard.busy > 0
            server.close(cut_off, Close.RESTART, "the worker stops: call again")
            await server.wait_closed()

    # --- before the 101 ------------------------------------------------------------------------------

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Takes a seat, or says why there is none."""
        assert isinstance(connection, DataLink)
        protocol = PROTOCOLS.get(urlsplit(request.path).path)
        if protocol is None:
            return self._refuse(404, f"there is {' and '.join(PROTOCOLS)}")
        if protocol not in self._desk.protocols:
            return self._refuse(501, f"this worker has no Opus codec for {protocol}'s protocol")
        if (why := self._desk.why_closed()) is not None:
            return self._refuse(503, why)
        ticket = request.headers.get(TICKET_HEADER, "")
        if self._desk.tickets is None:
            seat = self._desk.switchboard.claim(ticket)
            if seat is None:
                return self._refuse(403, "the ticket is wrong, lapsed or used: reserve again")
        else:
            try:
                seat = self._burst_seat(self._desk.tickets, ticket)
            except TicketRefused as error:
                return self._refuse(403, f"the ticket is refused: {error}")
            if seat is None:
                return self._refuse(503, "no slot is free")
        connection.give_back = self._desk.switchboard.end
        connection.seat = seat
        return None

    def _sign(self, _: ServerConnection, __: Request, response: Response) -> None:
        """A gateway is told that there will be an account, and whether a container was started for its call."""
        response.headers[ACCOUNT_HEADER] = "1"
        if self._desk.started is not None:
            response.headers[START_HEADER] = self._desk.started()

    def _burst_seat(self, tickets: BurstTickets, token: str) -> Seat | None:
        """A seat for a signed ticket, which is used only where there is one; raises `TicketRefused`."""
        ticket = tickets.check(token, time.time())
        seat = self._desk.switchboard.take(ticket.call)
        if seat is not None:
            tickets.use(ticket)
        return seat

    def _refuse(self, status: int, sentence: str) -> Response:
        self._desk.metrics.refused.labels(str(status)).inc()
        log.info("data link refused", extra={"status": status, "why": sentence})
        return answer(status, f"{sentence}\n")

    # --- after the 101 -------------------------------------------------------------------------------

    async def _serve(self, connection: ServerConnection) -> None:
        assert isinstance(connection, DataLink)
        seat = connection.seat
        assert seat is not None
        began = time.monotonic()
        with contextlib.ExitStack() as held:
            held.callback(self._desk.switchboard.end, seat)
            ending = await self._run(connection, seat, held.close)
        # A caller's own codes are without number, so they share one label.
        self._desk.metrics.calls.labels(str(ending.code or "caller")).inc()
        log.info(
            "call ended",
            extra={
                "call": seat.call,
                "slot": seat.slot,
                "seconds": round(time.monotonic() - began, 3),
                "code": connection.close_code,
                "why": ending.reason,
            },
        )

    async def _run(self, connection: DataLink, seat: Seat, give_back: Callable[[], None]) -> Ending:
        desk = self._desk
        if desk.tickets is not None:
            settled = await _settled(connection, seat)
            if isinstance(settled, Ending):
                await connection.close(settled.code or Close.NORMAL, settled.reason)
                return settled
            seat = settled
        session, wishes = self._session(connection)
        seat = replace(seat, settings=Settings(**{**seat.settings, **wishes}))
        call = Call(seat, connection, session, desk.limits, desk.metrics)
        connection.hang_up = call.hang_up
        return await call.run(desk.engine, give_back)

    def _session(self, connection: ServerConnection) -> tuple[Session, Settings]:
        """The protocol that the caller speaks, and what they wish of the engine in its URL."""
        assert connection.request is not None
        url = urlsplit(connection.request.path)
        if url.path == MOSHI_PATH:
            # Only the images that have its codec can import it.
            from trunkline_runtime.wire.moshi import MoshiSession, wished

            return MoshiSession(), wished(url.query)
        # The agent by the name that the caller used.
        model = parse_qs(url.query).get("model", [self._desk.agent])[0]
        return RealtimeSession(model, _new_id), Settings()


async def _settled(connection: ServerConnection, seat: Seat) -> Seat | Ending:
    """The seat with the settings that a gateway sends first on a burst link."""
    try:
        async with asyncio.timeout(SETTINGS_SECONDS):
            return replace(seat, settings=burst_settings_from(await connection.recv()))
    except TimeoutError:
        return Ending(Close.POLICY, f"no settings within {SETTINGS_SECONDS:g} s")
    except Malformed as error:
        return Ending(Close.POLICY, str(error)[:100])
    except ConnectionClosed:
        return Ending(None, "the link broke before the settings")


def _subprotocol(_: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """The same for every worker of an agent, so that a call may change workers."""
    return REALTIME if REALTIME in offered else None


def spoken_protocols() -> list[str]:
    """The caller protocols that what is installed here allows."""
    return ["realtime", "moshi"] if find_spec("sphn") else ["realtime"]


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"
