"""What a gateway holds open: callers that are being placed, connections, and legs to workers."""

import asyncio
import contextlib
from collections.abc import Iterator

from trunkline_runtime.gateway.call import Call
from trunkline_runtime.gateway.intake import Intake
from trunkline_runtime.gateway.leg import Leg


class Holdings:
    """Kept so that a drain knows when the last call has ended, and an end closes all there is."""

    def __init__(self) -> None:
        self.connections: set[Intake | Call] = set()
        self.legs: set[Leg] = set()  # of live calls, and those that are closing
        self._asking = 0
        self._less = asyncio.Event()  # one of the three has shrunk

    def __len__(self) -> int:
        """Of callers' connections."""
        return len(self.connections)

    @property
    def calls(self) -> list[Call]:
        """The live ones."""
        return [each for each in self.connections if isinstance(each, Call)]

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """While a caller is being placed."""
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1
            self._less.set()

    def opened(self, connection: Intake | Call) -> None:
        self.connections.add(connection)

    def gone(self, connection: Intake | Call) -> None:
        self.connections.discard(connection)
        self._less.set()

    def hold(self, leg: Leg) -> None:
        """Until it says itself that it is gone."""
        self.legs.add(leg)
        leg.when_gone(self._leg_gone)

    async def quiet(self) -> None:
        """Returns when no call is live or being placed. Callers that are turned away do not count."""
        while self._asking or self.calls:
            await self._shrunk()

    async def end(self, seconds: float) -> None:
        """Calls are told to call again; what is left after so many seconds is cut."""
        for connection in list(self.connections):
            if isinstance(connection, Call):
                connection.restart()
            else:
                connection.abort()
        await self._emptied(seconds)
        for each in (*self.connections, *self.legs):
            each.abort()
        await self._emptied(seconds)  # a turn of the loop; a little more with TLS

    def _leg_gone(self, leg: Leg) -> None:
        self.legs.discard(leg)
        self._less.set()

    async def _emptied(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.connections or self.legs:
                    await self._shrunk()

    async def _shrunk(self) -> None:
        self._less.clear()
        await self._less.wait()
