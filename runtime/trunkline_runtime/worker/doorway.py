"""A connection to a worker's data server: first somebody who may ask for a call, then the link of that call."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Final, Protocol, cast

from websockets.asyncio.connection import Connection
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import Event, State
from websockets.server import ServerProtocol

from trunkline_runtime.contract import END_PING, MAX_CALL_MESSAGE_BYTES
from trunkline_runtime.process import QUIET, answer
from trunkline_runtime.upgrade import HEAD_END, Refused, Upgrade, upgrade
from trunkline_runtime.worker.slots import Seat

OPEN_SECONDS: Final = 5.0  # for an upgrade that has begun, and for the reading of a plain answer
STAND_SECONDS: Final = 300.0  # for the first word: a gateway connects before it has a call
MAX_STANDING: Final = 512  # connections on which nothing was said; each gateway has one
MAX_HEAD_BYTES: Final = 64 * 2**10  # a gateway's has 16 KiB at most; Modal adds fields of its own
CLOSE_SECONDS: Final = 2.0  # for the peer's half of the close
# A gateway answers pings itself. They find a peer that is gone without a word, which would otherwise
# hold its slot until idleSeconds; slow enough to outlast a gateway that is stopped for a while.
PING_SECONDS: Final = 30.0


class DataLink(Connection):
    """The WebSocket of one call, from its 101 on."""

    hang_up: Callable[[], None] | None = None  # tells the call that its gateway has ended it
    hung_up = False  # the gateway has, and there was no call yet: it may come in one piece with the settings
    asked: Request  # what was answered

    def __init__(self) -> None:
        super().__init__(
            ServerProtocol(state=State.OPEN, max_size=MAX_CALL_MESSAGE_BYTES, logger=QUIET),
            ping_interval=PING_SECONDS,
            ping_timeout=PING_SECONDS,
            close_timeout=CLOSE_SECONDS,
        )

    def process_event(self, event: Event) -> None:
        """Pings are answered by the library; one of them is also an order."""
        super().process_event(event)
        match event:
            case Frame(opcode=Opcode.PING, data=data) if bytes(data) == END_PING:
                self.hung_up = True
                if self.hang_up is not None:
                    self.hang_up()


class Host(Protocol):
    """Whom a doorway asks, and tells of what comes in."""

    standing: "dict[Doorway, None]"  # doorways that have been asked nothing yet, the oldest first

    def admit(self, asked: Upgrade) -> Seat | Response:
        """The seat for a call, or the plain answer."""

    def fields(self, asked: Upgrade | None) -> Iterable[tuple[str, str]]:
        """What else the 101 says, or a plain answer (None)."""

    def seated(self, seat: Seat, link: DataLink) -> None:
        """The 101 is written. Whoever is told must give the seat back."""


class Doorway(asyncio.Protocol):
    """Gives way to a `DataLink` on the same transport, or answers plainly and closes it.

    No task and no turn of the loop stands between a request and its 101, for a caller waits for that. The link is made
    while the request is on its way.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._head = b""
        self._late: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Doorway head={len(self._head)}>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._link = DataLink()
        self._link.connection_made(transport)
        if len(self._host.standing) >= MAX_STANDING:
            next(iter(self._host.standing)).abort()
        self._host.standing[self] = None
        self._end_in(STAND_SECONDS)

    def data_received(self, data: bytes) -> None:
        if self not in self._host.standing:
            return
        begins = not self._head
        self._head += data
        end = self._head.find(HEAD_END, 0, MAX_HEAD_BYTES)
        if end >= 0:
            del self._host.standing[self]
            self._answer(upgrade(self._head[: end + 4]), self._head[end + 4 :])
        elif len(self._head) > MAX_HEAD_BYTES:
            del self._host.standing[self]
            self._refuse(answer(431, f"a head may have {MAX_HEAD_BYTES} bytes\n").serialize())
        elif begins:
            self._end_in(OPEN_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._host.standing.pop(self, None)
        if self._late is not None:
            self._late.cancel()

    def abort(self) -> None:
        self._transport.abort()

    def _answer(self, asked: Upgrade | Refused, early: bytes) -> None:
        if isinstance(asked, Refused):
            self._refuse(asked.answer)
            return
        seat = self._host.admit(asked)
        if isinstance(seat, Response):
            self._refuse(seat.serialize())
            return
        if self._late is not None:
            self._late.cancel()
        self._transport.write(asked.response(*self._host.fields(asked)))
        link = self._link
        link.asked = asked.request
        self._transport.set_protocol(link)
        self._host.seated(seat, link)
        if early:
            link.data_received(early)

    def _end_in(self, seconds: float) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = asyncio.get_running_loop().call_later(seconds, self.abort)

    def _refuse(self, written: bytes) -> None:
        self._end_in(OPEN_SECONDS)  # though the peer may not read the answer
        if written:
            status, end, rest = written.partition(b"\r\n")
            said = "".join(f"{name}: {value}\r\n" for name, value in self._host.fields(None))
            self._transport.write(status + end + said.encode() + rest)
        self._transport.close()
