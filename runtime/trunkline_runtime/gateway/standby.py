"""A connection to a worker that is there before a call, so that no caller waits for TCP, and for TLS, to make one.

There is one for each worker. Of callers who come at once the others are dialled for. The next one is made as soon as
the caller before has its 101.
"""

import asyncio
from typing import Final

from trunkline_runtime.gateway.dialling import connect
from trunkline_runtime.gateway.handshake import Address, Key
from trunkline_runtime.gateway.leg import Leg

CONNECT_SECONDS: Final = 5.0
AGAIN_SECONDS: Final = 10.0  # until it is looked again whether a worker can be reached


class Standby:
    """The connection to one worker on which nothing was said yet, or none."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._leg: Leg | None = None
        self._address: Address | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._next_look = 0.0
        self._dropped = False

    def __repr__(self) -> str:
        return f"<Standby {self._leg!r} connecting={self._connecting is not None}>"

    def take(self, address: Address) -> Leg | None:
        """The connection, for a call; None where there is none to that address."""
        leg, self._leg = self._leg, None
        if leg is not None and not (
            leg.ready and (self._address is address or self._address == address)
        ):
            leg.abort()
            return None
        return leg

    def renew(self, address: Address) -> None:
        """Makes another one, after it was taken."""
        if self._leg is None and self._connecting is None and not self._dropped:
            self._connecting = self._loop.create_task(self._connect(address))

    def look(self, address: Address, now: float) -> None:
        """Makes one where there is none; called once in a while."""
        if now < self._next_look or (self._leg is not None and self._leg.ready):
            return
        self._next_look = now + AGAIN_SECONDS
        if self._leg is not None:
            self._leg.abort()
            self._leg = None
        self.renew(address)

    def yield_place(self) -> None:
        """Its file descriptor is wanted for a caller."""
        self._next_look = self._loop.time() + AGAIN_SECONDS
        if self._leg is not None:
            self._leg.abort()
            self._leg = None

    def drop(self) -> None:
        """The worker is gone."""
        self._dropped = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self._leg is not None:
            self._leg.abort()

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
                self._leg, self._address, leg.key = leg, address, Key.fresh()
            else:
                leg.abort()
