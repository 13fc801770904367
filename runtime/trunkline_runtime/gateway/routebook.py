"""The routes that a gateway acts on, and which of two it believes."""

import logging
from collections.abc import Mapping
from typing import Final, Literal

from trunkline_runtime.gateway.ladder import UPSTREAM
from trunkline_runtime.gateway.routes import (
    NOBODY,
    BurstRung,
    Route,
    RouteChanges,
    Routes,
    UpstreamRung,
)
from trunkline_runtime.gateway.routes_reader import RouteError

log = logging.getLogger("trunkline.gateway")

Source = Literal["operator", "file"]
MOST_NAMED: Final = 8  # agents, in a line of the log


class RouteBook:
    """Empty until the operator or the routes file has brought routes."""

    def __init__(self) -> None:
        self.now = NOBODY
        self._source: Source = "file"

    @property
    def empty(self) -> bool:
        return self.now is NOBODY

    @property
    def epoch(self) -> int:
        """0 = no routes yet."""
        return self.now.epoch

    @property
    def share(self) -> float:
        """Of the gateways' limits that is this one's."""
        return self.now.share

    def by_agent(self) -> Mapping[str, Route]:
        return self.now.by_agent

    def take(self, routes: Routes, source: Source) -> bool:
        """Whether they are acted on from now on, which older ones are not.

        The operator's link outranks the file, which lags behind it: within one epoch the file never
        replaces what the operator has pushed.
        """
        current = self.now
        if not self.empty and (
            routes.epoch < current.epoch
            or (routes.epoch == current.epoch and source == "file" and self._source == "operator")
        ):
            level = logging.WARNING if source == "operator" else logging.DEBUG
            extra = {"epoch": routes.epoch, "current": current.epoch, "source": source}
            log.log(level, "routes of an old epoch were refused", extra=extra)
            return False
        self.now, self._source = routes, source
        extra = {"epoch": routes.epoch, "agents": len(routes.by_agent), "source": source}
        log.info("routes were taken", extra=extra)
        return True

    def change(self, changes: RouteChanges) -> bool:
        """Whether what differs is acted on from now on. What is of an old epoch is not, and what is known need not be.

        Raises `RouteError` for what differs from other routes than are here.
        """
        current = self.now
        if (changes.epoch, changes.revision) <= (current.epoch, current.revision):
            return False
        here = self._source == "operator" and changes.epoch == current.epoch
        if not here or changes.since > current.revision:
            raise RouteError(
                f"these changes begin at revision {changes.since} of epoch {changes.epoch}, and the routes here are of "
                f"revision {current.revision} of epoch {current.epoch}"
            )
        by_agent = {**current.by_agent, **changes.by_agent}
        for agent in changes.gone:
            by_agent.pop(agent, None)
        self.now = Routes(
            epoch=changes.epoch,
            revision=changes.revision,
            by_agent=by_agent,
            share=changes.share,
        )
        agents = sorted({*changes.by_agent, *changes.gone})
        log.info(
            "changed routes were taken",
            extra={"epoch": changes.epoch, "changed": agents[:MOST_NAMED]},
        )
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
