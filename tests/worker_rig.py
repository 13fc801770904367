"""A worker's surroundings: gateways as a worker meets them, and a real worker on loopback."""

import asyncio
import base64
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import pytest
from tls_rig import Links
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Request, Response

from trunkline_runtime.contract import (
    AGENT_HEADER,
    CALL_HEADER,
    HEARTBEAT_SECONDS,
    REALTIME_PATH,
    SETTINGS_TYPE,
    TICKET_HEADER,
    WORKERS_PATH,
    ticket,
    worker_server_name,
)
from trunkline_runtime.engine import FRAME_BYTES, Engine
from trunkline_runtime.engine.loopback import LoopbackEngine
from trunkline_runtime.worker.config import WorkerConfig
from trunkline_runtime.worker.control import Endpoint
from trunkline_runtime.worker.host import WorkerHost

AGENT = "default/echo"
WORKER_KEY = "worker-key-of-the-tests"
TICKET_KEY = "ticket-key-of-the-tests-0123456789abcdef"
PATIENCE = 20.0  # generous: the machine may be busy
FRAME = bytes(range(256)) * (FRAME_BYTES // 256)


class FakeGateway:
    """The control side of a gateway: one worker links to it, it asks and listens."""

    def __init__(self, key: str = WORKER_KEY) -> None:
        self.key = key
        self.refuse_with: int | None = None  # an HTTP status for every dial
        self.silent = False  # no beats, as a gateway that hangs
        self.port = 0
        self.dials = 0
        self.hellos: list[dict[str, Any]] = []
        self.peers: list[str] = []
        self.messages: list[dict[str, Any]] = []  # all that workers said after their hello
        self._numbers = itertools.count(1)
        self._changed = asyncio.Condition()
        self._links: set[ServerConnection] = set()
        self._server: Server | None = None

    @property
    def links(self) -> int:
        return len(self._links)

    @property
    def free(self) -> dict[str, Any]:
        """The last count of free slots that was heard."""
        return next((m for m in reversed(self.messages) if m["type"] == "free"), {})

    def heard(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == kind]

    async def until(self, what: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Waits until `what()` is true; asked again whenever a worker says or does something."""
        async with asyncio.timeout(patience), self._changed:
            await self._changed.wait_for(what)

    async def say(self, **message: Any) -> None:
        await self.say_raw(json.dumps(message))

    async def say_raw(self, text: str) -> None:
        for link in list(self._links):
            await link.send(text)

    def ticket(self, call: str) -> str:
        """What lets this gateway's call in at the worker that dialled last."""
        hello, number = self.hellos[-1], next(self._numbers)
        return ticket(hello["link"], hello["ticketKey"], number, call)

    def call(self, call: str, **settings: Any) -> "DataLink":
        """A plain data link to that worker."""
        url = f"ws://127.0.0.1:{self.hellos[-1]['port']}{REALTIME_PATH}"
        headers = {TICKET_HEADER: self.ticket(call)}
        return DataLink(connect(url, additional_headers=headers, proxy=None), settings)

    def cut(self) -> None:
        """Breaks all links without a word, as a gateway that is killed."""
        for link in list(self._links):
            link.transport.abort()

    @contextlib.asynccontextmanager
    async def serving(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator["FakeGateway"]:
        async with serve(
            self._serve,
            host,
            port,
            process_request=self._admit,
            ping_interval=None,
            ssl=Links.pki.gateway.context if Links.pki else None,
        ) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            yield self

    async def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        self.dials += 1
        await self._notify()
        if self.refuse_with is not None:
            return connection.respond(self.refuse_with, "no\n")
        assert request.path == WORKERS_PATH
        assert request.headers[AGENT_HEADER] == AGENT
        if request.headers["Authorization"] != f"Bearer {self.key}":
            return connection.respond(401, "no\n")
        return None

    async def _serve(self, connection: ServerConnection) -> None:
        self._links.add(connection)
        beats = asyncio.create_task(self._beat(connection))
        try:
            self.hellos.append(json.loads(await connection.recv()))
            self.peers.append(connection.remote_address[0])
            async for message in connection:
                self.messages.append(json.loads(message))
                await self._notify()
        except ConnectionClosed:
            pass
        finally:
            beats.cancel()
            self._links.discard(connection)
            await self._notify()

    async def _beat(self, connection: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                if not self.silent:
                    await connection.send(json.dumps({"type": "beat"}))
                await asyncio.sleep(HEARTBEAT_SECONDS / 2)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class RunningWorker:
    """A worker in the test's own loop, and what a gateway does with its data server."""

    def __init__(self, config: WorkerConfig, engine: Engine) -> None:
        self.host = WorkerHost(config, engine)
        self._tls = config.tls is not None
        self.engine = engine
        self.stop = asyncio.Event()
        self.listening = asyncio.Event()
        self.run = asyncio.create_task(self.host.run(self.stop, self.listening.set))

    @property
    def _secure(self) -> dict[str, Any]:
        if not (self._tls and Links.pki):
            return {}
        tls = Links.pki.worker(AGENT).gateways
        return {"ssl": tls, "server_hostname": worker_server_name(AGENT)}

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the data server on which nothing was said yet."""
        return await asyncio.open_connection("127.0.0.1", self.host.port, **self._secure)

    def dial(
        self,
        ticket: str,
        path: str = REALTIME_PATH,
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> "DataLink":
        """A data link on which the settings are told."""
        return DataLink(self.knock(ticket, path, **options), {} if settings is None else settings)

    def knock(self, ticket: str, path: str = REALTIME_PATH, **options: Any) -> connect:
        """One on which nothing is said."""
        return connect(
            f"{'wss' if self._secure else 'ws'}://127.0.0.1:{self.host.port}{path}",
            **self._secure,
            additional_headers={TICKET_HEADER: ticket, CALL_HEADER: "call"},
            compression=None,
            proxy=None,
            **options,
        )

    async def health(self, path: str) -> tuple[int, str]:
        return await health(self.host, path)


class DataLink:
    """A link that is dialled when it is awaited or entered, as those of `websockets`."""

    def __init__(self, dialling: connect, settings: dict[str, Any]) -> None:
        self._dialling = dialling
        self._settings = settings

    def __await__(self) -> Generator[Any, None, ClientConnection]:
        return self._open().__await__()

    async def __aenter__(self) -> ClientConnection:
        self._connection = await self._open()
        return self._connection

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()

    async def _open(self) -> ClientConnection:
        connection = await self._dialling
        await connection.send(told(**self._settings))
        return connection


async def refusal(dialling: connect | DataLink) -> tuple[int, str]:
    """Status and sentence of a dial that must be refused."""
    with pytest.raises(InvalidStatus) as refused:
        await dialling
    body = refused.value.response.body
    assert body is not None
    return refused.value.response.status_code, bytes(body).decode()


def told(**settings: Any) -> str:
    """What a gateway says first on a data link."""
    return json.dumps({"type": SETTINGS_TYPE, "settings": settings})


async def health(host: WorkerHost, path: str) -> tuple[int, str]:
    """Status and body of a GET on the health port."""
    return await got(host.health_port, path)


async def got(port: int, path: str) -> tuple[int, str]:
    """Status and body of a GET on loopback."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: w\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), body


def worker_config(*gateways: FakeGateway, **changes: Any) -> WorkerConfig:
    settings: dict[str, Any] = {
        "agent": AGENT,
        "worker": "echo-0",
        "engine": "loopback",
        "slots": 2,
        "host": "127.0.0.1",
        "port": 0,
        "health_port": 0,
        "gateways": tuple(Endpoint("127.0.0.1", gateway.port) for gateway in gateways),
        "worker_key": WORKER_KEY if gateways else "",
        "ticket_key": "" if gateways else TICKET_KEY,
        "max_seconds": 60,
        # A Modal container's links are plain here: Modal brings TLS to its door.
        "tls": Links.pki.worker(AGENT) if Links.pki and gateways else None,
    }
    return WorkerConfig(**{**settings, **changes})


@contextlib.asynccontextmanager
async def worker(
    *gateways: FakeGateway,
    engine: Engine | None = None,
    linked: bool = True,
    **changes: Any,
) -> AsyncIterator[RunningWorker]:
    """A worker that is ready, and linked to the gateways; without any it takes burst tickets."""
    config = worker_config(*gateways, **changes)
    engine = engine or LoopbackEngine(slots=config.slots)
    engine.load()
    engine.resume()
    running = RunningWorker(config, engine)
    try:
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait(
                {running.run, asyncio.ensure_future(running.listening.wait())},
                return_when=asyncio.FIRST_COMPLETED,
            )
            for gateway in gateways if linked else ():
                await gateway.until(lambda gateway=gateway: bool(gateway.free))  # type: ignore[misc]
        yield running
        running.stop.set()
        async with asyncio.timeout(PATIENCE):
            await running.run
    finally:
        running.run.cancel()
        await asyncio.wait({running.run})
        engine.close()


# --- what a caller says and hears ----------------------------------------------------------------------


def append(pcm: bytes = FRAME) -> str:
    return json.dumps(
        {"type": "input_audio_buffer.append", "audio": base64.b64encode(pcm).decode()}
    )


async def next_message(connection: ClientConnection, kind: str) -> dict[str, Any]:
    """The next message of this type; others before it are passed over."""
    async with asyncio.timeout(PATIENCE):
        while True:
            message: dict[str, Any] = json.loads(await connection.recv())
            if message["type"] == kind:
                return message


async def closed(connection: ClientConnection) -> tuple[int | None, str | None]:
    """Reads to the end: the close code and reason that the worker gave."""
    async with asyncio.timeout(PATIENCE):
        with contextlib.suppress(ConnectionClosed):
            while True:
                await connection.recv()
    return connection.close_code, connection.close_reason
