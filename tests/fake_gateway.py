"""A gateway as the operator meets it: a server on OPERATOR_PATH that keeps routes and sends loads."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, cast

from tls_rig import Links
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from trunkline_runtime.contract import (
    CHANGES_HEADER,
    HEARTBEAT_SECONDS,
    OPERATOR_PATH,
    AgentLoad,
    Load,
    LoadChanges,
    Route,
    Routes,
    WorkerLoad,
)

TOKEN = "operator-token-of-the-tests"


def worker_load(
    slots: int = 4, busy: int = 0, *, boot: str = "b0", draining: bool = False
) -> WorkerLoad:
    free = 0 if draining else slots - busy
    return WorkerLoad(boot=boot, slots=slots, busy=busy, free=free, draining=draining)


def agent_load(who: dict[str, WorkerLoad] | None = None, **numbers: Any) -> AgentLoad:
    load = AgentLoad(
        workers=who or {},
        calls=sum(worker["busy"] for worker in (who or {}).values()),
        burst=0,
        arrivals=0,
        refused=0,
        lost=0,
        burstFailures=0,
        burstSlow=0,
        burstLimited=0,
        burstError="",
    )
    load.update(numbers)  # type: ignore[typeddict-item]  # a test names only keys of AgentLoad
    return load


def changed(routes: Routes, changes: dict[str, Any]) -> Routes:
    """The routes of a later revision."""
    assert (changes["epoch"], changes["since"]) == (routes["epoch"], routes["revision"])
    by_agent = {route["agent"]: route for route in (*routes["routes"], *changes["routes"])}
    kept = [by_agent[agent] for agent in sorted(by_agent.keys() - set(changes["gone"]))]
    made: Any = {**routes, "revision": changes["revision"], "routes": kept}
    made.pop("share", None)
    if "share" in changes:
        made["share"] = changes["share"]
    return cast(Routes, made)


class FakeGateway:
    """Speaks for one gateway; `agents` is what it says, `routes` what it was told last.

    It puts changes into what it was told before, so `told` and `runways` hold everything each time. `changes` False: it
    is of the time before there were any.
    """

    def __init__(
        self,
        name: str = "gateway-0",
        boot: str = "g0",
        token: str = TOKEN,
        *,
        changes: bool = True,
    ) -> None:
        self.name = name
        self.boot = boot
        self.token = token
        self.agents: dict[str, AgentLoad] = {}
        self.changes = changes
        self.told: list[Routes] = []
        self.messages: list[dict[str, Any]] = []  # what came, but for beats
        self.links = 0
        self.beats = 0
        self.refusals = 0
        self.runways: list[dict[str, Any]] = []  # what is said of slots to come
        self.silent = False
        self.port = 0
        self._changed = asyncio.Condition()
        self._sockets: set[ServerConnection] = set()
        self._server: Server | None = None

    @property
    def routes(self) -> dict[str, Route]:
        return {route["agent"]: route for route in self.told[-1]["routes"]} if self.told else {}

    async def say(self, agent: str, load: AgentLoad) -> None:
        self.agents[agent] = load
        for socket in list(self._sockets):
            await self._speak(socket)

    async def mention(self, agent: str, load: AgentLoad) -> None:
        """Says this one's load alone."""
        self.agents[agent] = load
        epoch = self.told[-1]["epoch"] if self.told else 0
        said = LoadChanges(
            type="loadChanges", gateway=self.name, boot=self.boot, epoch=epoch, agents={agent: load}
        )
        for socket in list(self._sockets):
            await socket.send(json.dumps(said))

    async def until(self, what: Any, seconds: float = 20) -> None:
        """Waits until `what(gateway)` is true; asked again after every message and link."""
        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(lambda: what(self))

    async def cut(self) -> None:
        """Breaks all links without a word."""
        for socket in list(self._sockets):
            socket.transport.abort()

    @contextlib.asynccontextmanager
    async def serving(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator["FakeGateway"]:
        async with serve(
            self._link,
            host,
            port,
            process_request=self._admit,
            process_response=self._answer,
            compression=None,
            ssl=Links.pki.gateway.context if Links.pki else None,
        ) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            yield self
            self._sockets.clear()

    async def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == OPERATOR_PATH and (
            request.headers.get("Authorization") == f"Bearer {self.token}"
        ):
            return None
        self.refusals += 1
        await self._tell()
        return connection.respond(401, "no\n")

    def _answer(self, connection: ServerConnection, request: Request, response: Response) -> None:
        if self.changes:
            response.headers[CHANGES_HEADER] = "1"

    async def _link(self, socket: ServerConnection) -> None:
        self.links += 1
        self._sockets.add(socket)
        await self._tell()
        beat = asyncio.create_task(self._beat(socket))
        try:
            async for text in socket:
                message = json.loads(text)
                self._hear(message)
                await self._tell()
        except ConnectionClosed:
            pass
        finally:
            beat.cancel()
            self._sockets.discard(socket)

    def _hear(self, message: dict[str, Any]) -> None:
        if message["type"] == "beat":
            self.beats += 1
            return
        self.messages.append(message)
        match message["type"]:
            case "routes":
                self.told.append(cast(Routes, message))
            case "routeChanges":
                self.told.append(changed(self.told[-1], message))
            case "runway":
                self.runways.append(message["agents"])
            case "runwayChanges":
                known = {**(self.runways[-1] if self.runways else {}), **message["agents"]}
                self.runways.append({agent: slots for agent, slots in known.items() if slots})

    async def _beat(self, socket: ServerConnection) -> None:
        while True:
            await self._speak(socket)
            await asyncio.sleep(HEARTBEAT_SECONDS / 2)

    async def _speak(self, socket: ServerConnection) -> None:
        if self.silent:
            return
        epoch = self.told[-1]["epoch"] if self.told else 0
        load = Load(type="load", gateway=self.name, boot=self.boot, epoch=epoch, agents=self.agents)
        with contextlib.suppress(ConnectionClosed):
            await socket.send(json.dumps(load))

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
