"""From an accepted socket to an intake, where something comes before the first word: a PROXY header, or TLS.

Sockets are accepted by hand, for three reasons: a connection counts on the doorstep from its first moment, a
handshake that is not finished included; a PROXY header stands before TLS and must be read to its last byte and no
further; and each handshake takes the certificate that is the newest then.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from trunkline_runtime.gateway.access.answers import Away
from trunkline_runtime.gateway.access.doorstep import Arrival
from trunkline_runtime.gateway.access.proxy_header import More, ProxyHeaderError, Source, read
from trunkline_runtime.gateway.descriptors import At, is_short
from trunkline_runtime.gateway.intake import HEAD_SECONDS, TOO_MANY, Desk, Intake
from trunkline_runtime.gateway.sockets import LINGER_SECONDS, notice_dead_peer

log = logging.getLogger("trunkline.gateway")

ACCEPTS_A_TURN: Final = 64  # of the loop; live calls come in between
FULL_SECONDS: Final = 1.0  # without a free file descriptor, until the next try


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """What comes before the first word of a caller."""

    tls: Callable[[], ssl.SSLContext] | None = None  # for the next handshake
    proxy_header: bool = False  # from peers that the desk trusts, and from no others

    def __bool__(self) -> bool:
        return self.tls is not None or self.proxy_header


class Entrance:
    """One listening socket; whoever makes it must close it."""

    def __init__(self, listener: socket.socket, desk: Desk, before: Before) -> None:
        self._listener = listener
        self._desk = desk
        self._before = before
        self._loop = asyncio.get_running_loop()
        self._entering: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._open()

    def __repr__(self) -> str:
        return f"<Entrance entering={len(self._entering)}>"

    async def close(self) -> None:
        """Takes no new connection, and cuts off those that have not said a word."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for task in self._entering:
            task.cancel()
        await asyncio.gather(*self._entering, return_exceptions=True)

    def _open(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                caller, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if is_short(error):  # others must end first, and the backlog waits for that
                    self._desk.short_of_descriptors(At.ACCEPT)
                else:
                    log.error("callers cannot be accepted now", extra={"why": str(error.strerror)})
                self._loop.remove_reader(self._listener)
                self._pause = self._loop.call_later(FULL_SECONDS, self._open)
                return
            caller.setblocking(False)
            self._arrived(caller, str(address[0]))

    def _arrived(self, caller: socket.socket, peer: str) -> None:
        if not self._is_welcome(peer):
            self._desk.leaves(peer)
            caller.close()
            return
        task = self._loop.create_task(self._enter(caller, peer))
        self._entering.add(task)
        task.add_done_callback(self._entering.discard)

    def _is_welcome(self, peer: str) -> bool:
        """Counts an arrival, welcome or not.

        Who is not gets no answer: over TLS that would cost a handshake, which is what a flood is after.
        """
        arrival = self._desk.arrives(peer)
        if arrival is Arrival.TOO_MANY:
            self._desk.denied(TOO_MANY)
        return arrival is Arrival.WELCOME

    async def _enter(self, caller: socket.socket, peer: str) -> None:
        """Hands the socket to an intake, or closes it. Who trickles has as long as for a head."""
        intake: Intake | None = None
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                if self._before.proxy_header and self._desk.trusts(peer):
                    source = await _source(self._loop, caller)
                    self._desk.leaves(peer)
                    peer = source or peer
                    if not self._is_welcome(peer):
                        return
                intake = Intake(self._desk, peer)
                await self._hand_over(caller, intake)
        except (OSError, TimeoutError, ProxyHeaderError) as error:
            self._desk.turned_away(_why(error))
        finally:
            if intake is None or not intake.begun:
                self._desk.leaves(peer)
                caller.close()

    async def _hand_over(self, caller: socket.socket, intake: Intake) -> None:
        if self._before.tls is None:
            await self._loop.connect_accepted_socket(lambda: intake, caller)
            return
        await self._loop.connect_accepted_socket(
            lambda: intake,
            caller,
            ssl=self._before.tls(),
            ssl_handshake_timeout=HEAD_SECONDS,
            ssl_shutdown_timeout=LINGER_SECONDS,
        )


async def _source(loop: asyncio.AbstractEventLoop, caller: socket.socket) -> str:
    """Reads a PROXY header and nothing behind it. Raises `ProxyHeaderError`, and OSError."""
    header = b""
    while True:
        match read(header):
            case Source(address):
                return address
            case More(count):
                data = await loop.sock_recv(caller, count)
                if not data:
                    raise ConnectionResetError
                header += data


def _why(error: Exception) -> Away:
    match error:
        case ProxyHeaderError():
            return Away.PROXY_HEADER
        case TimeoutError():
            return Away.LATE
        case (
            ssl.SSLCertVerificationError()
            | ssl.SSLError(reason="PEER_DID_NOT_RETURN_A_CERTIFICATE")
        ):
            return Away.CERTIFICATE
        case ssl.SSLError():
            return Away.TLS
    return Away.GONE


def listener(host: str, port: int, backlog: int) -> socket.socket:
    """A socket that listens. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.create_server((host, port), family=family, backlog=backlog)
    notice_dead_peer(bound)
    return bound
