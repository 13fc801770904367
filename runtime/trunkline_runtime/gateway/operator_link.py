"""The operator's link: routes in, load out. The operator may be away; calls go on without it."""

import asyncio
import contextlib
import hmac
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from websockets.asyncio.server import ServerConnection, broadcast
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from trunkline_runtime.contract import (
    CHANGES_HEADER,
    DEAD_AFTER_SECONDS,
    HEARTBEAT_SECONDS,
    MAX_CONTROL_BYTES,
    Close,
    Load,
    LoadChanges,
)
from trunkline_runtime.gateway.access.wish import bearers
from trunkline_runtime.gateway.routebook import Source
from trunkline_runtime.gateway.routes import RouteChanges, Routes
from trunkline_runtime.gateway.routes_reader import (
    RouteError,
    allowances_from,
    gateways_from,
    route_changes_from,
    routes_from,
    runway_from,
)
from trunkline_runtime.gateway.runway import Runway
from trunkline_runtime.process import answer

log = logging.getLogger("trunkline.gateway")

GATHER_SECONDS: Final = 0.02  # a spike is told in one load, well within the promised 50 ms


class Steered(Protocol):
    """What an operator steers: it takes the operator's words, and says how it is."""

    def take(self, routes: Routes, source: Source) -> None:
        """Routes, whole."""

    def change(self, changes: RouteChanges) -> None:
        """What differs from those before. Raises `RouteError` where those are not here."""

    def expect(self, runway: Runway, *, whole: bool) -> None:
        """Slots to come, of all agents or of some."""

    def allow(self, epoch: int, ceilings: Mapping[str, float]) -> None:
        """What burst may cost, by agent."""

    def meet(self, gateways: Sequence[str]) -> None:
        """The addresses of all gateways behind the name of this one."""

    def load(self) -> Load: ...

    def load_changes(self, agents: Iterable[str]) -> LoadChanges: ...


class OperatorLink:
    """Serves every operator that dials in with the token."""

    def __init__(self, token: str, steered: Steered) -> None:
        self._token = token
        self._steered = steered
        self._seen: dict[ServerConnection, float] = {}
        self._urgent = asyncio.Event()
        self._news: set[str] = set()  # agents
        self._all_is_news = False
        self._last = asyncio.get_running_loop().time()  # when an operator was heard, or we began

    def __repr__(self) -> str:
        return f"<OperatorLink connected={len(self._seen)}>"

    def refusal(self, request: Request) -> Response | None:
        """The plain answer instead of a link; None when the operator may dial in."""
        if not self._token:
            return answer(401, "this gateway was started without an operator token\n")
        keys = bearers(request.headers)
        if len(keys) == 1 and hmac.compare_digest(keys[0].encode("latin-1"), self._token.encode()):
            return None
        return answer(401, "this is not the operator's token\n")

    async def serve(self, connection: ServerConnection) -> None:
        """One link until its end."""
        loop = asyncio.get_running_loop()
        self._seen[connection] = loop.time()
        log.info("an operator dialled in")
        self.urge_all()
        try:
            async for text in connection:
                self._last = self._seen[connection] = loop.time()
                self._heard(text)
        except RouteError as error:
            log.error("routes were not taken", extra={"why": str(error)})
            await connection.close(Close.POLICY, str(error)[:120])
        except ConnectionClosed:
            pass
        finally:
            del self._seen[connection]
            log.info("an operator's link ended")

    def silence(self, now: float) -> float:
        """For how long no operator has spoken; routes may be as stale as that."""
        return max(0.0, now - self._last)

    def urge(self, agents: Iterable[str]) -> None:
        """Something happened to these agents that the operator should hear of now."""
        self._news.update(agents)
        self._urgent.set()

    def urge_all(self) -> None:
        """Something happened that is not of some agents alone."""
        self._all_is_news = True
        self._urgent.set()

    async def report(self) -> None:
        """Sends the load for ever: whole each second, and soon after `urge` what is new."""
        clock = asyncio.get_running_loop().time
        due = clock() + HEARTBEAT_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._urgent.wait()
                await asyncio.sleep(GATHER_SECONDS)
            self._urgent.clear()
            news, self._news = self._news, set()
            whole, self._all_is_news = self._all_is_news or clock() >= due, False
            if whole:
                due = clock() + HEARTBEAT_SECONDS
            self._tell(news, whole=whole)

    def _tell(self, news: set[str], *, whole: bool) -> None:
        """Tells operators that read changes of `news`, and the others of everything."""
        readers = set() if whole else {it for it in self._seen if _reads_changes(it)}
        if readers and news:
            broadcast(readers, json.dumps(self._steered.load_changes(sorted(news))))
        if others := self._seen.keys() - readers:
            broadcast(others, json.dumps(self._steered.load()))

    def beat(self) -> None:
        broadcast(self._seen, '{"type":"beat"}')

    def sweep(self, now: float) -> None:
        """An operator that was silent for three seconds, or does not read, dials again if it lives."""
        for connection, seen in self._seen.items():
            unread = connection.transport.get_write_buffer_size()
            if now - seen > DEAD_AFTER_SECONDS or unread > MAX_CONTROL_BYTES:
                connection.transport.abort()

    def _heard(self, text: str | bytes) -> None:
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RouteError(f"a message must be JSON: {error}") from None
        match message.get("type") if isinstance(message, dict) else None:
            case "routes":
                self._steered.take(routes_from(message), "operator")
            case "routeChanges":
                self._steered.change(route_changes_from(message))
            case "runway":
                self._steered.expect(runway_from(message), whole=True)
            case "runwayChanges":
                self._steered.expect(runway_from(message), whole=False)
            case "allowances":
                self._steered.allow(*allowances_from(message))
            case "gateways":
                self._steered.meet(gateways_from(message))


def _reads_changes(connection: ServerConnection) -> bool:
    return connection.request is not None and CHANGES_HEADER in connection.request.headers
