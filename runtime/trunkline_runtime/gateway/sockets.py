"""What both sockets of a call need of TCP, and of a transport whatever loop it is of."""

import asyncio
import socket
from typing import Final

# After our Close: a peer that speaks to a socket which is gone is reset, and may never read the Close. A second was
# not enough for a worker on a machine short of processors; what lingers costs a socket, and only until the peer goes.
LINGER_SECONDS: Final = 5.0
VANISHED_SECONDS: Final = (
    30  # as `Patience.stall`: a line that is down so long is not a call any more
)


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


def notice_dead_peer(seen: socket.socket, seconds: int = VANISHED_SECONDS) -> None:
    """Ends a connection whose peer has vanished without a word, after about so many seconds.

    Keepalive notices it while nothing is sent, the user timeout while something is. Of a socket that listens, Linux
    gives all of this to each connection that it accepts: seven system calls that no caller waits for.
    """
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
    peer.detach()  # it is its owner's
