"""A relay in front of the API server, plain HTTP inside: it sees, counts, holds up and breaks an operator's requests."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml
from aiohttp import ClientError, web
from yarl import URL

from trunkline_dev.kube import Api

HOST: Final = "127.0.0.1"
PASSED_ON: Final = ("Accept", "Content-Type", "User-Agent")


@dataclass(frozen=True, slots=True)
class Request:
    """One request, by its number among all that are no watch; a watch has number 0."""

    number: int
    method: str
    path: str
    selector: str = ""  # of labels, of a list or a watch
    limit: int = 0  # of a list's page; 0 = none

    def __str__(self) -> str:
        return f"{self.number}: {self.method} {self.path}"

    @property
    def writes(self) -> bool:
        return self.method != "GET"


Before = Callable[[Request], Awaitable[web.Response | None]]
"""Called with a request that has arrived; a response is the answer in the API server's place."""
After = Callable[[Request, int], Awaitable[bool]]
"""Called with a request that the API server has answered, and the status; True breaks the connection instead."""


async def let_pass(_: Request) -> None:
    return None


async def let_be(_: Request, __: int) -> bool:
    return False


class ApiRelay:
    """Relays to one API server. `before`, `before_watch` and `after` may be set at any time."""

    def __init__(self, api: Api) -> None:
        self.before: Before = let_pass
        self.before_watch: Before = let_pass
        self.after: After = let_be
        self.seen: list[Request] = []  # without watches
        self.answered: list[tuple[Request, int]] = []
        self.watches: dict[str, int] = {}  # open ones, by path
        self.watched: list[Request] = []  # whenever one began
        self.told: dict[str, int] = {}  # events that went through watches, by path
        self.read: dict[str, int] = {}  # bytes of answers that are no watch, by path
        self.port = 0
        self.passing: set[asyncio.Task[web.Response]] = set()  # requests at the API server
        self.muted = False  # watches say nothing any more, and nobody is told so
        self._away = False
        self._open: dict[web.StreamResponse, web.Request] = {}  # watches
        self._api = api
        self._changed = asyncio.Condition()

    def __repr__(self) -> str:
        return f"ApiRelay({len(self.seen)} requests, {self.watches})"

    def forget(self) -> None:
        """Numbers begin at 1 again."""
        self.seen, self.answered, self.watched, self.read = [], [], [], {}

    def away(self) -> None:
        """The API server ends all watches, and answers nobody, as while it restarts."""
        self._away = True
        for arrived in self._open.values():
            if arrived.transport:
                arrived.transport.abort()

    def back(self) -> None:
        self._away = False

    async def say(self, event: dict[str, Any]) -> None:
        """Tells all watches of this, and ends them."""
        for watch in list(self._open):
            await watch.write(json.dumps(event).encode() + b"\n")

    def written(self, method: str, part: str) -> list[str]:
        """The paths with this part that such requests have changed."""
        return [
            request.path
            for request, status in self.answered
            if request.method == method and part in request.path and status < 300
        ]

    async def until(self, holds: Callable[["ApiRelay"], bool], seconds: float = 30) -> None:
        """Waits until `holds(relay)`; asked again whenever a request or a watch begins or ends, or tells something."""
        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(lambda: holds(self))

    def kubeconfig(self, folder: Path) -> Path:
        """One with which a client comes here. The relay has the administrator's rights."""
        file = folder / "kubeconfig-of-relay"
        named = {"name": "relay"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{**named, "cluster": {"server": f"http://{HOST}:{self.port}"}}],
            "users": [{**named, "user": {}}],
            "contexts": [{**named, "context": {"cluster": "relay", "user": "relay"}}],
            "current-context": "relay",
        }
        file.write_text(yaml.safe_dump(config))
        return file

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["ApiRelay"]:
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._relay)
        # A client that is gone ends its watches, and a request that was not passed on yet.
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, HOST, 0).start()
            self.port = runner.addresses[0][1]
            yield self
        finally:
            await runner.cleanup()
            await asyncio.gather(*self.passing, return_exceptions=True)

    async def _relay(self, arrived: web.Request) -> web.StreamResponse:
        selector = arrived.query.get("labelSelector", "")
        limit = int(arrived.query.get("limit", 0))
        request = Request(len(self.seen) + 1, arrived.method, arrived.path, selector, limit)
        if self._away:
            self.seen.append(request)
            await self._tell()
            assert arrived.transport
            arrived.transport.abort()
            return web.Response()
        if "watch" in arrived.query:
            self.watched.append(replace(request, number=0))
            await self._tell()
            return await self.before_watch(request) or await self._watch(arrived)
        self.seen.append(request)
        body = await arrived.read()
        await self._tell()
        if instead := await self.before(request):
            return instead
        # To its end, also where the client dies meanwhile: what the API server did is known here.
        passing = asyncio.create_task(self._pass_on(request, arrived, body))
        self.passing.add(passing)
        answer = await asyncio.shield(passing)
        if await self.after(request, answer.status) and arrived.transport:
            arrived.transport.abort()
        await self._tell()
        return answer

    async def _pass_on(self, request: Request, arrived: web.Request, body: bytes) -> web.Response:
        try:
            async with self._api.session.request(
                arrived.method, _target(arrived), data=body or None, headers=_headers(arrived)
            ) as told:
                answer = web.Response(
                    status=told.status, body=await told.read(), content_type=told.content_type
                )
            self.answered.append((request, answer.status))
            size = len(answer.body) if isinstance(answer.body, bytes) else 0
            self.read[request.path] = self.read.get(request.path, 0) + size
            return answer
        finally:
            task = asyncio.current_task()
            assert task is not None
            self.passing.discard(task)
            await self._tell()

    async def _watch(self, arrived: web.Request) -> web.StreamResponse:
        path = arrived.path
        answer = web.StreamResponse()
        async with self._api.session.get(
            _target(arrived), headers=_headers(arrived), timeout=None
        ) as told:
            answer.set_status(told.status)
            answer.content_type = told.content_type
            await answer.prepare(arrived)
            self.watches[path] = self.watches.get(path, 0) + 1
            self._open[answer] = arrived
            await self._tell()
            try:
                with contextlib.suppress(ClientError, ConnectionError):
                    rest = b""
                    async for part in told.content.iter_any():
                        # Whole lines, so that nothing which is said comes in the middle of an event.
                        whole, newline, rest = (rest + part).rpartition(b"\n")
                        chunk = whole + newline
                        if self.muted or not chunk:
                            continue
                        await answer.write(chunk)
                        self.told[path] = self.told.get(path, 0) + chunk.count(b"\n")
                        await self._tell()
            finally:
                self.watches[path] -= 1
                self._open.pop(answer, None)
                await self._tell()
                # Else TLS says goodbye to a server that goes on to send.
                if told.connection and told.connection.transport:
                    told.connection.transport.abort()
        return answer

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _target(arrived: web.Request) -> URL:
    return URL(arrived.raw_path, encoded=True)


def _headers(arrived: web.Request) -> dict[str, str]:
    return {name: arrived.headers[name] for name in PASSED_ON if name in arrived.headers}
