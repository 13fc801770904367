"""Modal's SDK, loaded when something is first asked of Modal: it takes 19 MB and half a second."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trunkline_operator.burst.client import Burst


class Sdk:
    """The one client of Modal, made by `make`, which loads what it needs."""

    def __init__(self, make: "Callable[[], Burst]") -> None:
        self._make = make
        self._made: Burst | None = None
        self._making = asyncio.Lock()

    async def burst(self) -> "Burst":
        """The client. It is made in a thread, so that others go on."""
        async with self._making:
            if self._made is None:
                self._made = await asyncio.to_thread(self._make)
        return self._made

    async def close(self) -> None:
        if self._made is not None:
            await self._made.close()
