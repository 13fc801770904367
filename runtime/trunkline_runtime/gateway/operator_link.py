"""The operator's link: routes in, load out. The operator may be away; calls go on without it."""

import asyncio
import hmac
import json
import logging
from collections.abc import Callable, Mapping
from typing import Final

from websockets.asyncio.server import ServerConnection, broadcast
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from trunkline_runtime.contract import (
    DEAD_AFTER_SECONDS,
    HEARTBEAT_SECONDS,
    MAX_CONTROL_BYTES,
    Close,
    Load,
)
from trunkline_runtime.gateway.access.wish import bearers
from trunkline_runtime.gateway.routes import Routes, Runway
from trunkline_runtime.gateway.routes_reader import (
    RouteError,
    allowances_from,
    routes_from,
    runway_from,
)
from trunkline_runtime.process import answer

log = logging.getLogger("trunkline.gateway")

GATHER_SECONDS: Final = 0.02  # a spike is told in one load, well within the promised 50 ms


class OperatorLink:
    """Serves every operator that dials in with the token; routes of an old epoch are not taken.

    `take` gets parsed routes, `expect` the slots to come; `load` says what is told.
    """

    def __init__(
        self,
        token: str,
        take: Callable[[Routes], None],
        expect: Callable[[Runway], None],
        allow: Callable[[int, Mapping[str, float]], None],
        load: Callable[[], Load],
    ) -> None:
        self._token = token
        self._take = take
        self._expect = expect
        self._allow = allow
        self._load = load
        self._seen: dict[ServerConnection, float] = {}
        self._urgent = asyncio.Event()
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
        self.urge()
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

    def urge(self) -> None:
        """Something happened that the operator should hear of now."""
        self._urgent.set()

    async def report(self) -> None:
        """Sends the load for ever: each second, and soon after `urge`."""
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._urgent.wait()
                await asyncio.sleep(GATHER_SECONDS)
            except TimeoutError:
                pass
            self._urgent.clear()
            if self._seen:
                broadcast(self._seen, json.dumps(self._load()))

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
                self._take(routes_from(message))
            case "runway":
                self._expect(runway_from(message))
            case "allowances":
                self._allow(*allowances_from(message))
