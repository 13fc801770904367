"""A connection to a worker that is there before a call, so that no caller waits for TCP, and for TLS, to make one.

There is one for each worker. Of callers who come at once the others are dialled for; the next one is made when the
caller before has its 101.
"""

import asyncio
from typing import Final

from trunkline_runtime.gateway.dialling import connect
from trunkline_runtime.gateway.handshake import Address
from trunkline_runtime.gateway.leg import Leg

CONNECT_SECONDS: Final = 5.0
RENEW_SECONDS: Final = 0.002  # after it was taken: the caller has its 101 by then
AGAIN_SECONDS: Final = 10.0  # until it is looked again whether a worker can be reached


class Standby:
    """The connection to one worker on which nothing was said yet, or none."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._leg: Leg | None = None
        self._address: Address | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._soon: asyncio.TimerHandle | None = None
        self._next_look = 0.0
        self._dropped = False

    def __repr__(self) -> str:
        return f"<Standby {self._leg!r} connecting={self._connecting is not None}>"

    def take(self, address: Address) -> Leg | None:
        """The connection, for a call; None where there is none to that address. Another one is made soon."""
        leg, self._leg = self._leg, None
        if self._soon is None and not self._dropped:
            self._soon = self._loop.call_later(RENEW_SECONDS, self._renew, address)
        if leg is not None and not (leg.ready and self._address == address):
            leg.abort()
            return None
        return leg

    def look(self, address: Address, now: float) -> None:
        """Makes one where there is none; called once in a while."""
        if now >= self._next_look and not (self._leg is not None and self._leg.ready):
            self._next_look = now + AGAIN_SECONDS
            self._renew(address)

    def drop(self) -> None:
        """The worker is gone."""
        self._dropped = True
        if self._soon is not None:
            self._soon.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
        if self._leg is not None:
            self._leg.abort()

    def _renew(self, address: Address) -> None:
        self._soon = None
        if self._connecting is None and not self._dropped:
            self._connecting = self._loop.create_task(self._connect(address))

    async def _connect(self, address: Address) -> None:
        leg = Leg(self._loop)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await connect(address, leg)
        except TimeoutError:
            pass  # `look` tries again
        finally:
            self._connecting = None
            if leg.ready and not self._dropped:
                self._leg, self._address = leg, address
            else:
                leg.abort()
