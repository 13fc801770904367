"""One HTTP request per connection: answered here, or spliced byte for byte to another address.

A spliced connection is not decoded. Whatever follows the request's head, WebSocket frames included, goes
through as it comes, so that sixty calls cost a small part of a core.
"""

import asyncio
import http
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

log = logging.getLogger("trunkline.modal")

MAX_HEAD: Final = 64 * 2**10  # bytes; browsers' and proxies' heads are below 16 KiB
HEAD_SECONDS: Final = 10.0  # for the head to arrive
CONNECT_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request's head. Header names are as they were sent; look-up ignores case."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""  # only where the listener reads one

    def header(self, name: str) -> str:
        """The first of that name, or ""."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), "")

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def head(self, without: frozenset[str]) -> bytes:
        """The head again, without some headers; one that is no upgrade closes when it is answered."""
        upgrade = bool(self.header("upgrade"))
        lines = [f"{self.method} {self.target} HTTP/1.1"]
        for name, value in self.headers:
            if name.lower() not in without and (upgrade or name.lower() != "connection"):
                lines.append(f"{name}: {value}")
        if not upgrade:
            lines.append("Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    status: int
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"

    def encode(self) -> bytes:
        head = (
            f"HTTP/1.1 {self.status} {http.HTTPStatus(self.status).phrase}\r\n"
            f"Content-Type: {self.content_type}\r\nContent-Length: {len(self.body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode("latin-1") + self.body


@dataclass(frozen=True, slots=True, kw_only=True)
class Splice:
    """Send the request there, and then all bytes both ways until one side closes."""

    host: str
    port: int
    without: frozenset[str] = field(default_factory=frozenset)  # headers, in lower case
    closed: Callable[[], None] = lambda: None  # called once, however it ends


Handler = Callable[[Request], Awaitable[Response | Splice]]


def text(status: int, sentence: str) -> Response:
    return Response(status=status, body=f"{sentence}\n".encode())


def page(content: Any) -> Response:
    body = json.dumps(content).encode()
    return Response(status=200, body=body, content_type="application/json")


def parse(head: bytes) -> Request:
    """Raises ValueError for what is no HTTP/1.1 request."""
    first, *rest = head.decode("latin-1").split("\r\n")
    method, target, version = first.split(" ")
    if version != "HTTP/1.1" or not target.startswith("/"):
        raise ValueError(first)
    headers = []
    for line in rest:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise ValueError(line)
        headers.append((name, value.strip()))
    return Request(method=method, target=target, headers=tuple(headers))


def body_length(request: Request, most: int) -> int:
    """Bytes of the body that belong to the request; raises ValueError for more than `most`.

    With 0, what follows the head is left for whoever the connection is spliced to.
    """
    length = int(request.header("content-length") or 0) if most else 0
    if not 0 <= length <= most:
        raise ValueError(length)
    return length


def reserved(host: str, port: int) -> socket.socket:
    """A socket that keeps a port from being given away, and refuses whoever connects to it."""
    keeper = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind((host, port))
    except OSError:
        keeper.close()
        raise
    return keeper


class _Side(asyncio.Protocol):
    """One end of a splice: what arrives here is written to the other."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None
        self.ended = False  # no more will arrive

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        assert self.other
        assert self.other.transport
        self.other.transport.write(data)

    def eof_received(self) -> bool:
        """Passes a half-closed connection on; the second half closes both."""
        self.ended = True
        if self.other is None or self.other.ended:
            return False
        if self.other.transport and not self.other.transport.is_closing():
            self.other.transport.write_eof()
        return True

    def pause_writing(self) -> None:
        if self.other and self.other.transport:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other and self.other.transport and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, _: Exception | None) -> None:
        if self.other and self.other.transport:
            self.other.transport.close()


class Connection(_Side):
    """A client's connection."""

    def __init__(self, handler: Handler, connections: set["Connection"], max_body: int = 0) -> None:
        super().__init__()
        self._handler, self._connections, self._max_body = handler, connections, max_body
        self._received = bytearray()  # while it is not known where to
        self._task: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._closed: Callable[[], None] | None = None
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connections.add(self)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        if self.other:
            super().data_received(data)
            return
        self._received += data
        if self._task is None:
            self._read_head()
        elif len(self._received) > MAX_HEAD and self.transport:
            self.transport.pause_reading()

    def _read_head(self) -> None:
        end = self._received.find(b"\r\n\r\n")
        if end < 0 and len(self._received) <= MAX_HEAD:
            return
        try:
            request = parse(bytes(self._received[: max(end, 0)]))
            length = body_length(request, self._max_body)
        except ValueError:
            self._answer(text(400, "this is no HTTP/1.1 request, or it is too long"))
            return
        if len(self._received) < (start := end + 4) + length:
            return  # the rest of the body must come before the deadline, too
        if self._deadline:
            self._deadline.cancel()
        request = replace(request, body=bytes(self._received[start : start + length]))
        del self._received[: start + length]
        self._task = asyncio.create_task(self._serve(request))

    async def _serve(self, request: Request) -> None:
        try:
            answer = await self._handler(request)
        except Exception:  # the boundary of a connection: the others go on
            log.exception("a request failed")
            answer = text(500, "internal error")
        if isinstance(answer, Response):
            self._answer(answer)
        else:
            await self._splice(request, answer)

    def _answer(self, response: Response) -> None:
        if self.transport:
            self.transport.write(response.encode())
            self.transport.close()

    async def _splice(self, request: Request, splice: Splice) -> None:
        self._closed = splice.closed
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                upstream, side = await loop.create_connection(_Side, splice.host, splice.port)
        except OSError as error:  # TimeoutError too
            log.warning("the container cannot be reached", extra={"error": str(error)})
            self._answer(text(502, "the container cannot be reached"))
            return
        assert self.transport
        side.other = self
        upstream.write(request.head(splice.without) + self._received)
        self._received.clear()
        self.other = side
        self.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self._deadline:
            self._deadline.cancel()
        if self._task:
            self._task.cancel()
        if self._closed:
            self._closed()
        self._connections.discard(self)
        self.lost.set()

    async def close(self) -> None:
        if self.transport:
            self.transport.abort()
        await self.lost.wait()


class Listener:
    """Accepts connections at one address."""

    def __init__(self, handler: Handler, max_body: int = 0) -> None:
        self._handler, self._max_body = handler, max_body
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._address: tuple[str, int] = ("", 0)
        self._keeper: socket.socket | None = None  # holds the port while nothing listens

    async def start(self, host: str, port: int = 0) -> str:
        """The URL under which it listens."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self._handler, self._connections, self._max_body), host, port
        )
        host, port = self._address = self._server.sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"

    async def refuse(self, *, cut: bool) -> None:
        """Takes no more connections; with `cut`, those that are there end."""
        if self._server:
            self._server.close()
            self._server = None
            self._keeper = reserved(*self._address)
        if cut:
            await self._cut()

    async def accept(self) -> None:
        """Takes connections again, at the same address."""
        if self._keeper:
            self._keeper.close()
            self._keeper = None
            await self.start(*self._address)

    async def _cut(self) -> None:
        for connection in list(self._connections):
            await connection.close()

    async def close(self) -> None:
        if self._keeper:
            self._keeper.close()
            self._keeper = None
        server, self._server = self._server, None
        if server:
            server.close()
        await self._cut()
        if server:
            await server.wait_closed()
