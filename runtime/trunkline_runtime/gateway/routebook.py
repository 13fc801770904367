"""The routes that a gateway acts on, and which of two it believes."""

import logging
from collections.abc import Mapping
from typing import Literal

from trunkline_runtime.gateway.ladder import UPSTREAM
from trunkline_runtime.gateway.routes import BurstRung, Route, Routes, UpstreamRung

log = logging.getLogger("trunkline.gateway")

Source = Literal["operator", "file"]


class RouteBook:
    """Empty until the operator or the routes file has brought routes."""

    def __init__(self) -> None:
        self._routes: Routes | None = None
        self._source: Source = "file"

    @property
    def empty(self) -> bool:
        return self._routes is None

    @property
    def epoch(self) -> int:
        """0 = no routes yet."""
        return self._routes.epoch if self._routes else 0

    @property
    def share(self) -> float:
        """Of the gateways' limits that is this one's."""
        return self._routes.share if self._routes else 1.0

    def by_agent(self) -> Mapping[str, Route]:
        return self._routes.by_agent if self._routes else {}

    def take(self, routes: Routes, source: Source) -> bool:
        """Whether they are acted on from now on, which older ones are not.

        The operator's link outranks the file, which lags behind it: within one epoch the file never
        replaces what the operator has pushed.
        """
        current = self._routes
        if current is not None and (
            routes.epoch < current.epoch
            or (routes.epoch == current.epoch and source == "file" and self._source == "operator")
        ):
            level = logging.WARNING if source == "operator" else logging.DEBUG
            extra = {"epoch": routes.epoch, "current": current.epoch, "source": source}
            log.log(level, "routes of an old epoch were refused", extra=extra)
            return False
        self._routes, self._source = routes, source
        extra = {"epoch": routes.epoch, "agents": len(routes.by_agent), "source": source}
        log.info("routes were taken", extra=extra)
        return True

    def believes(self, epoch: int) -> bool:
        """Whether an operator of this epoch may still be the one: a later one replaces it."""
        return epoch >= self.epoch

    def rungs(self) -> set[tuple[str, str]]:
        """Agents and their rungs past warm, by the names that breakers have for them."""
        return {
            (agent, f"burst/{rung.name}" if isinstance(rung, BurstRung) else UPSTREAM)
            for agent, route in self.by_agent().items()
            for rung in route.rungs
            if isinstance(rung, BurstRung | UpstreamRung)
        }
