"""The first seconds of a gateway, in which workers find it."""

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import Final

GATHER_SECONDS: Final = 1.0  # for workers to dial in once there are routes


class Settling:
    """An empty table that only means a restart must not turn a gateway's first callers away.

    It is over for load balancers, and for the first callers, when workers have had a second and one has come, or at
    `until`. Then the workers of one agent may still be on their way, when those of another have come: until `until`
    callers stand in line for them.
    """

    def __init__(self) -> None:
        # By the loop's clock. All workers that there are have dialled in by then.
        self.until = math.inf
        self._routed = asyncio.Event()
        self._linked = asyncio.Event()
        self._over = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Settling over={self.over} until={self.until:.1f}>"

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def routed(self) -> None:
        """There are routes."""
        self._routed.set()

    def linked(self) -> None:
        """A worker has dialled in."""
        self._linked.set()

    async def settle(self, most: float, warm: Callable[[], bool]) -> None:
        """Ends it, `most` seconds after there are routes at the latest. `warm`: whether there are to be workers."""
        await self._routed.wait()
        self.until = asyncio.get_running_loop().time() + most
        await asyncio.sleep(min(GATHER_SECONDS, most))
        if warm():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self.until):
                    await self._linked.wait()
        self._over.set()

    async def wait(self, by: float) -> None:
        """Until it is over, or that time has come."""
        if not self.over:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(by):
                    await self._over.wait()
