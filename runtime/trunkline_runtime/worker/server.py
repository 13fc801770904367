"""The data server of a worker: one WebSocket per call, opened by a ticket that is checked before the 101.

A caller is answered only after the worker's 101, so a seat is taken in the same step, and its call is there to give
it back from then on.
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
from typing import Final
from urllib.parse import parse_qs, urlsplit

from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State

from trunkline_runtime.contract import (
    ACCOUNT_HEADER,
    ENV_PORT,
    MOSHI_PATH,
    REALTIME_PATH,
    SEQ_HEADER,
    START_HEADER,
    TICKET_HEADER,
    Close,
    Settings,
)
from trunkline_runtime.engine import Engine
from trunkline_runtime.process import answer, listening
from trunkline_runtime.upgrade import Upgrade
from trunkline_runtime.wire.realtime import RealtimeSession
from trunkline_runtime.wire.session import Session
from trunkline_runtime.worker.call import Call, CallLimits, Ending
from trunkline_runtime.worker.doorway import DataLink, Doorway
from trunkline_runtime.worker.metrics import WorkerMetrics
from trunkline_runtime.worker.orders import Malformed, opening_from
from trunkline_runtime.worker.slots import Seat
from trunkline_runtime.worker.switchboard import Switchboard
from trunkline_runtime.worker.tickets import TicketRefused, Tickets

log = logging.getLogger("trunkline.calls")

REALTIME: Final = "realtime"
PROTOCOLS: Final = {REALTIME_PATH: "realtime", MOSHI_PATH: "moshi"}
SETTINGS_SECONDS: Final = 5.0  # for the first message of a link


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What a data server needs to seat a call and run it."""

    agent: str
    engine: Engine
    switchboard: Switchboard
    tickets: Tickets
    limits: CallLimits
    metrics: WorkerMetrics
    protocols: Sequence[str]  # of PROTOCOLS, those that callers may speak
    why_closed: Callable[[], str | None]  # a sentence while no call can be taken at all
    started: Callable[[], str] | None = None  # the value of START_HEADER, of a worker at Modal


class CallServer:
    """Seats callers and runs their calls. It is the `Host` of its doorways."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.standing: dict[Doorway, None] = {}
        self._calls: dict[asyncio.Task[None], DataLink] = {}
        self._closing = False

    @contextlib.asynccontextmanager
    async def serving(
        self, host: str, port: int, tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[int]:
        """Listens; yields the port. With `tls` the links are TLS, in which the ticket still counts. At the end, calls that are still there are closed with RESTART."""
        loop = asyncio.get_running_loop()
        with listening(host, port, "calls", ENV_PORT):
            server = await loop.create_server(lambda: Doorway(self), host, port, ssl=tls)
        try:
            yield next(iter(server.sockets)).getsockname()[1]
        finally:
            server.close()
            await self._close()

    async def _close(self) -> None:
        self._closing = True
        # Without calls, links that are about to close keep the code and reason that they have.
        if self._desk.switchboard.busy > 0:
            why = (Close.RESTART, "the worker stops: call again")
            await asyncio.gather(*(link.close(*why) for link in self._calls.values()))
        if self._calls:
            await asyncio.wait(self._calls)
        for doorway in list(self.standing):
            doorway.abort()

    # --- before the 101 ------------------------------------------------------------------------------

    def admit(self, asked: Upgrade) -> Seat | Response:
        """Takes a seat, or says why there is none."""
        protocol = PROTOCOLS.get(urlsplit(asked.request.path).path)
        if protocol is None:
            return self._refuse(404, f"there is {' and '.join(PROTOCOLS)}")
        if protocol not in self._desk.protocols:
            return self._refuse(501, f"this worker has no Opus codec for {protocol}'s protocol")
        why = "the worker stops" if self._closing else self._desk.why_closed()
        if why is not None:
            return self._refuse(503, why)
        ticket = ",".join(asked.request.headers.get_all(TICKET_HEADER))  # two are none
        try:
            seat = self._seat(ticket)
        except TicketRefused as error:
            return self._refuse(403, f"the ticket is refused: {error}")
        return self._refuse(503, "no slot is free") if seat is None else seat

    def fields(self, asked: Upgrade | None) -> list[tuple[str, str]]:
        """A gateway is told that there will be an account, and whether a container was started for its call.

        A plain answer says so, too: a gateway that gave a call up asks how its container came up. The subprotocol is the same for every worker of an agent, so that a call may change workers.
        """
        fields = [(ACCOUNT_HEADER, "1")]
        if asked is not None and REALTIME in asked.subprotocols:
            fields.append(("Sec-WebSocket-Protocol", REALTIME))
        if self._desk.started is not None:
            fields.append((START_HEADER, self._desk.started()))
        else:
            fields.append((SEQ_HEADER, str(self._desk.switchboard.free()["seq"])))
        return fields

    def seated(self, seat: Seat, link: DataLink) -> None:
        """Runs the call in a task of its own."""
        task = asyncio.get_running_loop().create_task(self._serve(link, seat))
        self._calls[task] = link
        task.add_done_callback(self._calls.pop)

    def _seat(self, token: str) -> Seat | None:
        """A seat for a signed ticket, which is used only where there is one; raises `TicketRefused`."""
        ticket = self._desk.tickets.check(token, time.time())
        seat = self._desk.switchboard.take(ticket.call)
        if seat is not None:
            ticket.use()
        return seat

    def _refuse(self, status: int, sentence: str) -> Response:
        self._desk.metrics.refused.labels(str(status)).inc()
        log.info("data link refused", extra={"status": status, "why": sentence})
        return answer(status, f"{sentence}\n")

    # --- after the 101 -------------------------------------------------------------------------------

    async def _serve(self, link: DataLink, seat: Seat) -> None:
        try:
            async with link:
                with contextlib.ExitStack() as held:
                    held.callback(self._desk.switchboard.end, seat)
                    if link.state is State.OPEN:  # else nobody would end the pings
                        link.start_keepalive()
                    await self._call(link, seat, held.close)
        except Exception:  # the boundary of a call: nobody above would see it
            log.exception("a data link failed", extra={"call": seat.call})

    async def _call(self, link: DataLink, seat: Seat, give_back: Callable[[], None]) -> None:
        began = time.monotonic()
        ending = await self._run(link, seat, give_back)
        # A caller's own codes are without number, so they share one label.
        self._desk.metrics.calls.labels(str(ending.code or "caller")).inc()
        log.info(
            "call ended",
            extra={
                "call": seat.call,
                "slot": seat.slot,
                "seconds": round(time.monotonic() - began, 3),
                "code": link.close_code,
                "why": ending.reason,
            },
        )

    async def _run(self, link: DataLink, seat: Seat, give_back: Callable[[], None]) -> Ending:
        desk = self._desk
        settled = await _settled(link, seat)
        if isinstance(settled, Ending):
            await link.close(settled.code or Close.NORMAL, settled.reason)
            return settled
        session, wishes = self._session(link.asked)
        seat = replace(settled, settings=Settings(**{**settled.settings, **wishes}))
        call = Call(seat, link, session, desk.limits, desk.metrics)
        link.hang_up = call.hang_up
        if link.hung_up:  # told when its parts have begun
            asyncio.get_running_loop().call_soon(call.hang_up)
        try:
            return await call.run(desk.engine, give_back)
        finally:
            link.hang_up = None

    def _session(self, request: Request) -> tuple[Session, Settings]:
        """The protocol that the caller speaks, and what they wish of the engine in its URL."""
        url = urlsplit(request.path)
        if url.path == MOSHI_PATH:
            # Only the images that have its codec can import it.
            from trunkline_runtime.wire.moshi import MoshiSession, wished

            return MoshiSession(), wished(url.query)
        # The agent by the name that the caller used.
        model = parse_qs(url.query).get("model", [self._desk.agent])[0]
        return RealtimeSession(model, _new_id), Settings()


async def _settled(link: DataLink, seat: Seat) -> Seat | Ending:
    """The seat with the settings that a gateway sends first."""
    try:
        async with asyncio.timeout(SETTINGS_SECONDS):
            return replace(seat, settings=opening_from(await link.recv()))
    except TimeoutError:
        return Ending(Close.POLICY, f"no settings within {SETTINGS_SECONDS:g} s")
    except Malformed as error:
        return Ending(Close.POLICY, str(error)[:100])
    except ConnectionClosed:
        return Ending(None, "the link broke before the settings")


def spoken_protocols() -> list[str]:
    """The caller protocols that what is installed here allows."""
    return ["realtime", "moshi"] if find_spec("sphn") else ["realtime"]


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"
