"""What gateways are told of all agents: their routes, and which slots are on their way. Pure; the time is an argument.

Whole for a gateway that knows nothing, and else what differs from what it was told before. So a change costs as much as
there is that changed, however many agents there are: a thousand routes are 700 KB, and a gateway that reads them all
keeps its calls waiting for longer than a frame.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Final

from trunkline_runtime.contract import (
    PROTOCOL_VERSION,
    Route,
    RouteChanges,
    Routes,
    Runway,
    RunwayChanges,
    Starting,
)

# A pod that is expected so much sooner or later is news: the answer to a caller is in whole seconds, and spread.
FORETOLD_SECONDS: Final = 2.0


class RouteBulletin:
    """The routes. What is set is told from the next `publish` on."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.revision = 0
        """Of what was published last; 0 = nothing was."""
        self._routes: dict[str, Route] = {}
        self._texts: dict[str, str] = {}  # the same as JSON
        self._news: set[str] = set()  # agents that differ from what was published
        self._changed_in: dict[str, int] = {}  # the revision, the newest last
        self._gone: set[str] = set()  # of these, agents without a route
        self._share = 1.0
        self._since: tuple[int, int, str] = (0, 0, "")  # the last changes that were written

    def __repr__(self) -> str:
        return (
            f"RouteBulletin({len(self._routes)} routes, revision {self.revision} of {self.epoch})"
        )

    @property
    def agents(self) -> tuple[str, ...]:
        """Those that have a route."""
        return tuple(self._routes)

    @property
    def document(self) -> Routes:
        """The routes as they are now."""
        routes = [self._routes[agent] for agent in sorted(self._routes)]
        return self._headed(routes)

    def put(self, agent: str, route: Route | None) -> bool:
        """Routes an agent so, or no longer; whether that is new."""
        if self._routes.get(agent) == route:
            return False
        if route is None:
            del self._routes[agent], self._texts[agent]
            self._gone.add(agent)
        else:
            self._gone.discard(agent)
            self._routes[agent] = route
            self._texts[agent] = json.dumps(route, separators=(",", ":"))
        self._news.add(agent)
        return True

    def publish(self, sharing: int) -> bool:
        """Has everything told as it is now, for so many gateways that share tenants' limits; whether that is new."""
        share = 1 / sharing
        if self.revision and not self._news and share == self._share:
            return False
        self.revision += 1
        self._share = share
        _note(self._changed_in, self._news, self.revision)
        return True

    def changed_in(self, agent: str) -> int:
        """The revision in which its route, or its having none, is told."""
        return self.revision + 1 if agent in self._news else self._changed_in.get(agent, 0)

    def told_to_all(self, revision: int) -> None:
        """Every gateway that is linked was told this: an agent that has gone until then need not be named again."""
        for agent in self._gone - self._news:
            if self._changed_in[agent] <= revision:
                self._gone.discard(agent)
                del self._changed_in[agent]

    def whole(self) -> str:
        """A contract.Routes message, as published or newer."""
        return _text(self._headed([]), (self._texts[agent] for agent in sorted(self._texts)))

    def since(self, revision: int) -> str:
        """A contract.RouteChanges message for a gateway that was told that."""
        if self._since[:2] != (revision, self.revision):
            changed = _after(self._changed_in, revision)
            head = RouteChanges(
                type="routeChanges",
                epoch=self.epoch,
                since=revision,
                revision=self.revision,
                gone=[agent for agent in changed if agent not in self._texts],
                routes=[],
            )
            if self._share != 1:
                head["share"] = self._share
            texts = (self._texts[agent] for agent in changed if agent in self._texts)
            self._since = revision, self.revision, _text(head, texts)
        return self._since[2]

    def new_since(self, revision: int) -> set[str]:
        """The agents with a route that `since` names."""
        return {agent for agent in _after(self._changed_in, revision) if agent in self._routes}

    def _headed(self, routes: list[Route]) -> Routes:
        made = Routes(
            type="routes",
            version=PROTOCOL_VERSION,
            epoch=self.epoch,
            revision=self.revision,
            routes=routes,
        )
        if self._share != 1:
            made["share"] = self._share
        return made


class RunwayBulletin:
    """The slots of pods that are on their way, by agent."""

    def __init__(self) -> None:
        self.revision = 0
        self._moments: dict[str, tuple[tuple[int, float], ...]] = {}  # slots, and when on our clock
        self._news: set[str] = set()
        self._changed_in: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"RunwayBulletin({len(self._moments)} agents, revision {self.revision})"

    def put(self, agent: str, starting: Sequence[tuple[int, float]], now: float) -> bool:
        """Which slots are on their way, and in how many seconds they can be had; whether that is new."""
        known = self._moments.get(agent, ())
        moments = tuple((slots, now + seconds) for slots, seconds in starting)
        same = len(known) == len(moments) and all(
            slots == was and abs(at - then) < FORETOLD_SECONDS
            for (slots, at), (was, then) in zip(moments, known, strict=True)
        )
        if same:
            return False
        if moments:
            self._moments[agent] = moments
        else:
            self._moments.pop(agent, None)
        self._news.add(agent)
        return True

    def forget(self, agent: str) -> None:
        """An agent is no more. Gateways drop what they know of it together with its route."""
        self._moments.pop(agent, None)
        self._changed_in.pop(agent, None)
        self._news.discard(agent)

    def publish(self) -> None:
        """Has all told as it is now."""
        if self._news:
            self.revision += 1
            _note(self._changed_in, self._news, self.revision)

    def whole(self, now: float) -> str:
        """A contract.Runway message, in seconds from now: clocks of two machines are never compared."""
        return json.dumps(Runway(type="runway", agents=self._starting(self._moments, now)))

    def since(self, revision: int, also: Iterable[str], now: float) -> str:
        """A contract.RunwayChanges message for a gateway that was told that; "" = nothing is new.

        `also`: agents that it has only now been told the route of. What it knows may be of one before of that name.
        """
        agents = {*_after(self._changed_in, revision), *also}
        if not agents:
            return ""
        return json.dumps(RunwayChanges(type="runwayChanges", agents=self._starting(agents, now)))

    def _starting(self, agents: Iterable[str], now: float) -> dict[str, list[Starting]]:
        return {
            agent: [
                Starting(slots=slots, seconds=max(0.0, round(at - now, 1)))
                for slots, at in self._moments.get(agent, ())
            ]
            for agent in agents
        }


def _note(changed_in: dict[str, int], news: set[str], revision: int) -> None:
    """News is of this revision from now on."""
    for agent in sorted(news):
        changed_in.pop(agent, None)
        changed_in[agent] = revision
    news.clear()


def _after(changed_in: dict[str, int], revision: int) -> list[str]:
    """The agents that changed after a revision."""
    return list(takewhile(lambda agent: changed_in[agent] > revision, reversed(changed_in)))


def _text(head: Routes | RouteChanges, routes: Iterable[str]) -> str:
    """A message as JSON, with routes that are JSON already: only those that changed are written anew."""
    before, bracket, after = json.dumps(head, separators=(",", ":")).partition('"routes":[')
    return f"{before}{bracket}{','.join(routes)}{after}"
