"""Dialling a worker for one call, before the caller's 101."""

import asyncio
import ssl
from dataclasses import dataclass
from typing import Final

from trunkline_runtime.gateway.descriptors import NO_DESCRIPTOR, is_short
from trunkline_runtime.gateway.handshake import Address, Door
from trunkline_runtime.gateway.leg import Leg

NO_ROOM: Final = frozenset(f"refused its data link with HTTP {status}" for status in (429, 503))


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt that did not end in a call, and why."""

    why: str
    full: bool = False  # there was no room, or the caller left: nobody's fault
    ours: bool = False  # it is this gateway that lacks something: nobody else is worth asking
    limited: bool = False  # Modal said that the workspace may have no more


class Dialling:
    """A connection that is being made from here on. Whoever has it must `ask` or `drop`.

    What is said there can follow: a worker is dialled while it is asked for a slot, and with its grant the connection
    is there. Nothing is left behind when it fails, is dropped or its asking is cancelled.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._leg = Leg(address, self._loop)
        assert self._leg.answered is not None
        self._answered = self._leg.answered
        self._connecting = self._loop.create_task(self._connect())

    def __repr__(self) -> str:
        return f"<Dialling {self._address.host}:{self._address.port} {self._leg!r}>"

    @property
    def failed(self) -> bool:
        """Before it has asked: the worker cannot be reached, or has hung up."""
        return self._answered.done()

    async def ask(self, door: Door, by: float) -> Leg | Failed:
        """A leg whose worker has answered 101, or why there is none. `by` is a time of the loop's clock."""
        leg, why = self._leg, ""
        leg.ask(door)
        try:
            async with asyncio.timeout_at(by):
                why = await self._answered or ""
        except TimeoutError:
            why = "did not answer its data link in time"
        except BaseException:
            self.drop()
            raise
        if not why and leg.over:
            why = "closed its data link at once"
        if not why:
            return leg
        self.drop()
        return Failed(why, full=why in NO_ROOM, ours=why == NO_DESCRIPTOR)

    def drop(self) -> None:
        """The connection is not wanted any more."""
        self._connecting.cancel()
        self._leg.abort()

    async def _connect(self) -> None:
        address = self._address
        try:
            await self._loop.create_connection(
                lambda: self._leg,
                address.host,
                address.port,
                ssl=address.tls,
                server_hostname=(address.server_name or address.host) if address.tls else None,
            )
        except ssl.SSLCertVerificationError as error:
            self._leg.fail(f"could not prove who it is: {error.verify_message}")
        except OSError as error:
            if is_short(error):
                self._leg.fail(NO_DESCRIPTOR)
                return
            self._leg.fail(f"cannot be reached: {error.strerror or error}")


async def dial(address: Address, door: Door, by: float) -> Leg | Failed:
    """Dials and asks at once."""
    return await Dialling(address).ask(door, by)
