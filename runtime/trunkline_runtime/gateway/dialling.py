"""Dialling a worker for one call, before the caller's 101."""

import asyncio
import ssl
from dataclasses import dataclass
from typing import Final

from trunkline_runtime.gateway.descriptors import NO_DESCRIPTOR, is_short
from trunkline_runtime.gateway.handshake import Address, Door, Handshake
from trunkline_runtime.gateway.leg import HUNG_UP, Leg

LATE: Final = "did not answer its data link in time"
NO_ROOM: Final = frozenset(f"refused its data link with HTTP {status}" for status in (429, 503))


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt that did not end in a call, and why."""

    why: str
    full: bool = False  # there was no room, or the caller left: nobody's fault
    ours: bool = False  # it is this gateway that lacks something: nobody else is worth asking
    limited: bool = False  # Modal said that the workspace may have no more
    late: bool = False  # there was no answer in time
    seq: int | None = None  # of the state of a pod's slots right after its answer


async def dial(address: Address, door: Door, by: float, ready: Leg | None = None) -> Leg | Failed:
    """A leg whose worker has answered 101, or why there is none. `by` is a time of the loop's clock.

    `ready` is a connection to there on which nothing was said. Nothing is left behind when it fails or is cancelled.
    """
    if ready is not None:
        found = await _asked(ready, Handshake(address, door, ready.key), by)
        if not (isinstance(found, Failed) and found.why == HUNG_UP):
            return found
        # Perhaps before it was asked. A ticket opens one link, so it may be asked again.
    loop = asyncio.get_running_loop()
    leg = Leg(loop)
    connecting = loop.create_task(connect(address, leg))
    found = Failed("was not waited for")
    try:
        found = await _asked(leg, Handshake(address, door), by)
    finally:
        if isinstance(found, Failed):
            connecting.cancel()
    return found


async def connect(address: Address, leg: Leg) -> None:
    """Connects a leg, or tells it why not."""
    try:
        await asyncio.get_running_loop().create_connection(
            lambda: leg,
            address.host,
            address.port,
            ssl=address.tls,
            server_hostname=(address.server_name or address.host) if address.tls else None,
        )
    except ssl.SSLCertVerificationError as error:
        leg.fail(f"could not prove who it is: {error.verify_message}")
    except OSError as error:
        if is_short(error):
            leg.fail(NO_DESCRIPTOR)
            return
        leg.fail(f"cannot be reached: {error.strerror or error}")


async def _asked(leg: Leg, handshake: Handshake, by: float) -> Leg | Failed:
    """Asks on a connection that is there or being made."""
    answered = leg.answered
    if answered is None:  # it is gone already
        return Failed(HUNG_UP)
    leg.ask(handshake)
    late = asyncio.get_running_loop().call_at(by, leg.fail, LATE)
    why: str | None = "was not waited for"
    try:
        why = await answered
        if why is None and leg.over:
            why = HUNG_UP
    finally:
        late.cancel()
        if why is not None:
            leg.abort()
    if why is None:
        return leg
    return Failed(
        why, full=why in NO_ROOM, ours=why == NO_DESCRIPTOR, late=why == LATE, seq=leg.seq
    )
