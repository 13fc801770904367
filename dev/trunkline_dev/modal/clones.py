"""The processes of a server that stand at its snapshot point, each to become a restored container."""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from trunkline_dev.modal.process import ContainerProcess, reached

log = logging.getLogger("trunkline.modal")

FAILURES: Final = 3  # in a row, after which no more clones are made


class Clones:
    """Makes them one at a time, and gives them out."""

    def __init__(
        self, most: int, make: Callable[[], ContainerProcess], lose: Callable[[str], None]
    ) -> None:
        """`make` is a new process, not yet started; `lose` takes back the address of one that is gone."""
        self._most, self._make, self._lose = most, make, lose
        self._waiting: list[ContainerProcess] = []
        self._making: asyncio.Task[None] | None = None
        self._failures = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def processes(self) -> list[ContainerProcess]:
        return list(self._waiting)

    def take(self) -> ContainerProcess | None:
        """One at the snapshot point, or else one on its way there. It is the caller's from now on."""
        alive = [clone for clone in self._waiting if clone.pid]
        clone = min(alive, key=lambda clone: not clone.at_snapshot.is_set(), default=None)
        if clone:
            self._waiting.remove(clone)
        return clone

    def replenish(self) -> None:
        """Begins to make the next one, unless there are enough, one is on its way, or they only fail."""
        busy = self._making is not None and not self._making.done()
        if not busy and len(self) < self._most and self._failures < FAILURES:
            self._making = asyncio.create_task(self._add())

    async def _add(self) -> None:
        clone = self._make()
        try:
            await clone.start()
        except BaseException:
            await clone.discard()
            self._lose(clone.address)
            raise
        self._waiting.append(clone)
        if await reached(clone, clone.at_snapshot):
            self._failures = 0
            if clone in self._waiting:
                clone.freeze()
        elif clone in self._waiting:
            self._failures += 1
            log.warning("a clone failed to reach the snapshot point", extra={"error": clone.error})
            self._waiting.remove(clone)
            self._lose(clone.address)

    async def close(self) -> None:
        """Kills them all."""
        if self._making:
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)
        for clone in self._waiting:
            await clone.discard()
            self._lose(clone.address)
        self._waiting.clear()
