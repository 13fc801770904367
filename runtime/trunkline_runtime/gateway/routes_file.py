"""The routes file: what a gateway acts on while no operator has spoken to it."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from trunkline_runtime.gateway.routes import Routes
from trunkline_runtime.gateway.routes_reader import RouteError, parse_routes

log = logging.getLogger("trunkline.gateway")

POLL_SECONDS: Final = 1.0  # a mounted Secret changes by a symlink, which inotify on the file misses


class RoutesFile:
    """Reads the file when it is new or changed, and tells of what is wrong with it once a change."""

    def __init__(self, path: Path, take: Callable[[Routes], None]) -> None:
        self._path = path
        self._take = take
        self._seen: tuple[int, int, int] | None = None
        self._missing = False

    def look(self) -> None:
        """Takes the routes in if the file has changed since the last look."""
        try:
            status = self._path.stat()
            version = (status.st_mtime_ns, status.st_size, status.st_ino)
            if version == self._seen:
                return
            text = self._path.read_bytes()
        except OSError as error:
            if not self._missing:
                log.warning(
                    "the routes file cannot be read; it is looked for each second",
                    extra={"path": str(self._path), "why": str(error.strerror)},
                )
            self._missing = True
            return
        self._missing, self._seen = False, version
        try:
            self._take(parse_routes(text))
        except RouteError as error:
            log.error(
                "the routes file was not taken; the routes before it stay",
                extra={"path": str(self._path), "why": str(error)},
            )

    async def watch(self) -> None:
        """Looks for ever."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self.look()
