"""A gateway's surroundings on loopback: workers and Modal as a gateway meets them, callers, an operator."""

import asyncio
import contextlib
import functools
import hashlib
import json
import secrets
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import jwt
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from tls_rig import Links
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response

from trunkline_runtime.contract import (
    AGENT_HEADER,
    CALL_HEADER,
    CHANGES_HEADER,
    HEARTBEAT_SECONDS,
    OPERATOR_PATH,
    REALTIME_PATH,
    SEQ_HEADER,
    TICKET_HEADER,
    WORKER_PROTOCOL_VERSION,
    WORKERS_PATH,
    BurstRung,
    Load,
    LoadChanges,
    Route,
    WarmRung,
    ticket,
)
from trunkline_runtime.gateway.call import Call
from trunkline_runtime.gateway.ladder import Patience
from trunkline_runtime.gateway.process import GatewayConfig, Running, serving
from trunkline_runtime.worker.switchboard import SOON_SECONDS

AGENT = "default/echo"
KEY = "caller-key"
WORKER_KEY = "worker-key-of-the-tests"
OPERATOR_TOKEN = "operator-token-of-the-tests"
TICKET_KEY = "ticket-key-of-the-tests-0123456789abcdef"
PROXY_TOKEN = "wk-id.ws-secret"
SECONDS = 20.0  # generous: the machine may be busy
UNHURRIED = Patience(answer=10)  # for tests in which nothing is meant to be slow


NO_HEADERS: Mapping[str, str] = {}


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test on the loop that the process uses; an exception in any callback fails it."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        unhandled: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: unhandled.append(context))
            runner.run(test(**fixtures))
        assert not unhandled

    return run


def a_route(agent: str = AGENT, **changes: Any) -> Route:
    """A route with one warm rung; keyword arguments replace its keys."""
    route: dict[str, Any] = {
        "agent": agent,
        "hash": "",
        "workerKey": WORKER_KEY,
        "access": {
            "public": False,
            "apiKeys": {"test": hashlib.sha256(KEY.encode()).hexdigest()},
            "origins": [],
        },
        "answerSeconds": 20.0,
        "maxSeconds": 600.0,
        "admissionMs": 0.0,
        "settings": {"greeting": "Hello."},
        "rungs": [WarmRung(kind="warm")],
        "draining": [],
    }
    if Links.pki:
        route["workerTls"] = Links.pki.ca
    return cast(Route, route | changes)


def routes_text(*routes: Route, epoch: int = 1) -> str:
    return json.dumps({"type": "routes", "version": 1, "epoch": epoch, "routes": routes})


@contextlib.asynccontextmanager
async def a_gateway(*routes: Route, **changes: Any) -> AsyncIterator[Running]:
    """A gateway on free ports; with `routes`, it has them and does not wait for workers."""
    config = GatewayConfig(
        host="127.0.0.1",
        port=0,
        control_host="127.0.0.1",
        control_port=0,
        health_host="127.0.0.1",
        health_port=0,
        name="gateway-0",
        operator_token=OPERATOR_TOKEN,
        control_tls=Links.pki.gateway if Links.pki else None,
        settle_seconds=0.01,
        patience=UNHURRIED,
        audio_times_real=0,  # tests hurry
    )
    async with serving(replace(config, **changes)) as running:
        if routes:
            give(running, *routes)
        yield running


def give(running: Running, *routes: Route, epoch: int = 1) -> None:
    """Routes, as if from the operator's link."""
    from trunkline_runtime.gateway.routes_reader import parse_routes

    running.gateway.take(parse_routes(routes_text(*routes, epoch=epoch)), "operator")


def call(
    running: Running, agent: str = AGENT, key: str | None = KEY, query: str = "", **options: Any
) -> connect:
    """A caller on a stock client; with `ssl` by TLS."""
    scheme = "wss" if "ssl" in options else "ws"
    uri = f"{scheme}://127.0.0.1:{running.port}{REALTIME_PATH}?model={agent}{query}"
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    headers.update(options.pop("headers", {}))
    options.setdefault("compression", None)
    return connect(
        uri, additional_headers=headers, proxy=None, open_timeout=SECONDS, max_size=None, **options
    )


async def refused(caller: connect) -> Response:
    """The plain answer that a caller gets instead of a call."""
    try:
        connection = await caller
    except InvalidStatus as error:
        return error.response
    await connection.close()
    raise AssertionError("the call was answered")


async def closed(connection: ClientConnection) -> tuple[int | None, str]:
    """Waits for the end of a call and returns its Close."""
    async with asyncio.timeout(SECONDS):
        with contextlib.suppress(ConnectionClosed):
            while True:
                await connection.recv()
    return connection.close_code, connection.close_reason or ""


async def until(what: Callable[[], bool]) -> None:
    """Waits until `what()` is true."""
    async with asyncio.timeout(SECONDS):
        while not what():
            await asyncio.sleep(0.005)


def live_call(running: Running) -> Call:
    """The one call of a gateway."""
    (found,) = (each for each in running.gateway.holdings.connections if isinstance(each, Call))
    return found


async def http(port: int, path: str) -> tuple[int, str]:
    """A GET on a health port."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    async with asyncio.timeout(SECONDS):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return int(head.split(b" ")[1]), body.decode()


async def metric(running: Running, name: str, **labels: str) -> float:
    """One sample of a gateway's metrics, 0 when it is not there."""
    _, text = await http(running.health_port, "/metrics")
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return 0.0


class SlotLog:
    """Who had which slot when, from the workers themselves."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, str, str]] = []  # worker, slot, what, call
        self._holders: dict[tuple[str, int], str] = {}

    def taken(self, worker: str, slot: int, what: str, call: str) -> None:
        holder = self._holders.setdefault((worker, slot), call)
        assert holder == call, f"slot {slot} of {worker} is booked twice: {holder}, {call}"
        self.lines.append((worker, slot, what, call))

    def freed(self, worker: str, slot: int, what: str) -> None:
        call = self._holders.pop((worker, slot))
        self.lines.append((worker, slot, what, call))

    def counts(self, what: str) -> int:
        return sum(line[2] == what for line in self.lines)


class FakeWorker:
    """A small worker that speaks the contract and does as a caller or a test says.

    A caller's text is echoed, except `close CODE REASON`, `die`, `flood BYTES`, `raw HEX`, `ping`, `deaf [SECONDS]`
    (which reads no more, or not for so long, but goes on to speak) and `request` (which answers the request that the
    gateway made).
    """

    def __init__(self, name: str = "echo-0", slots: int = 4, log: SlotLog | None = None) -> None:
        self.name = name
        self.slots = slots
        self.boot = secrets.token_hex(4)
        self.log = log or SlotLog()
        self.silent = False  # answers no call
        self.refusing = False  # refuses every ticket
        self.late = 0.0  # seconds before a call is answered
        self.says_seq = True
        self.mute = False  # neither beats nor tells
        self.last_words = ""  # what it takes any message of a caller for
        self.reported: int | None = None  # a wrong count of free slots
        self.orders: list[dict[str, Any]] = []
        self.requests: list[Request] = []  # for calls
        self.settings: list[dict[str, Any]] = []  # that came first on data links
        self.closes: list[tuple[int | None, str]] = []
        self.links: list[ClientConnection] = []
        self.draining = False
        self.live: dict[int, str] = {}
        self.seq = 0
        self._keys: dict[int, str] = {}  # of the tickets of each link
        self._used: set[str] = set()
        self.port = 0  # of the data server
        self._server: Server | None = None
        self._work: set[asyncio.Task[None]] = set()

    @property
    def free(self) -> int:
        return self.slots - len(self.live)

    @contextlib.asynccontextmanager
    async def serving(self, *gateways: Running) -> AsyncIterator["FakeWorker"]:
        """Listens, dials the gateways and returns when each has it in its table."""
        self._server = await serve(
            self._talk,
            "127.0.0.1",
            0,
            process_request=self._claim,
            process_response=self._answer,
            subprotocols=["realtime"],  # type: ignore[list-item]  # a NewType of str
            select_subprotocol=lambda _, offers: offers[0] if "realtime" in offers else None,
            compression=None,
            max_size=None,
            ping_interval=None,
            close_timeout=1,
            ssl=worker_tls(),
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]
        async with self._server, contextlib.AsyncExitStack() as stack:
            for gateway in gateways:
                await stack.enter_async_context(self.linked(gateway))
            yield self

    @contextlib.asynccontextmanager
    async def linked(self, gateway: Running, agent: str = AGENT) -> AsyncIterator[ClientConnection]:
        """A control link to one gateway."""
        async with dial_control(gateway, agent) as link:
            hello = {"type": "hello", "version": WORKER_PROTOCOL_VERSION, "agent": agent}
            hello |= {"worker": self.name, "boot": self.boot, "slots": self.slots}
            number = len(self._keys) + 1
            self._keys[number] = secrets.token_hex(8)
            hello |= {"port": self.port, "link": number, "ticketKey": self._keys[number]}
            await link.send(json.dumps(hello | {"protocols": ["realtime"], "build": "test"}))
            self.links.append(link)
            tasks = [asyncio.create_task(self._obey(link)), asyncio.create_task(self._beat(link))]
            await self._tell()
            await until(lambda: self.row(gateway, agent).get("boot") == self.boot)
            try:
                yield link
            finally:
                self.links.remove(link)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def row(self, gateway: Running, agent: str = AGENT) -> dict[str, Any]:
        """What the gateway says of this worker."""
        agents = gateway.gateway.load()["agents"]
        workers = agents[agent]["workers"] if agent in agents else {}
        return dict(workers.get(self.name, {}))

    async def _beat(self, link: ClientConnection) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            if not self.mute:
                await self._tell()

    def _free(self) -> str:
        free = 0 if self.draining else self.free
        free = free if self.reported is None else self.reported
        busy = self.slots - self.free
        message = {"type": "free", "n": free, "busy": busy, "draining": self.draining}
        return json.dumps(message | {"seq": self.seq})

    async def _tell(self) -> None:
        for link in list(self.links):
            with contextlib.suppress(ConnectionClosed):
                await link.send(self._free())

    async def _tell_soon(self) -> None:
        """As a worker does: a report that overtakes an answer counts its slot twice until that comes."""
        await asyncio.sleep(SOON_SECONDS)
        await self._tell()

    async def changed(self) -> None:
        """What it offers is not what it was."""
        self.seq += 1
        await self._tell()

    async def _obey(self, link: ClientConnection) -> None:
        async for text in link:
            order = json.loads(text)
            self.orders.append(order)
            match order["type"]:
                case "drain" | "undrain" as kind:
                    self.draining = kind == "drain"
                    await self.changed()

    async def _claim(self, connection: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        if self.silent:
            await connection.wait_closed()
        if self.late:
            await asyncio.sleep(self.late)
        token, name = request.headers.get(TICKET_HEADER, ""), request.headers[CALL_HEADER]
        link, number, _ = token.split(".", 2)
        good = ticket(int(link), self._keys[int(link)], int(number), name) == token
        if self.refusing or not good or token in self._used:
            return connection.respond(403, "no such ticket\n")
        leaves = self._server is None or not self._server.is_serving()  # it would be refused below
        if self.free <= 0 or self.draining or leaves or connection.transport.is_closing():
            return connection.respond(503, "no slot is free\n")
        self._used.add(token)
        slot = next(number for number in range(self.slots) if number not in self.live)
        self.live[slot] = name
        self.seq += 1
        self.log.taken(self.name, slot, "live", name)
        connection.slot = slot  # type: ignore[attr-defined]  # ours, for the handler below
        return None

    def _answer(self, connection: ServerConnection, _: Request, response: Response) -> None:
        if self.says_seq:
            response.headers[SEQ_HEADER] = str(self.seq)

    async def _talk(self, connection: ServerConnection) -> None:
        slot: int = connection.slot  # type: ignore[attr-defined]  # see above
        self._do(self._tell_soon())
        try:
            self.settings.append(json.loads(await connection.recv()))
            async for message in connection:
                await self._say(connection, message)
        except ConnectionClosed:
            pass
        finally:
            self.closes.append((connection.close_code, connection.close_reason or ""))
            del self.live[slot]
            self.log.freed(self.name, slot, "freed")
            await self.changed()

    async def _say(self, connection: ServerConnection, message: str | bytes) -> None:
        message = self.last_words or message
        words = message.split(" ", 2) if isinstance(message, str) else []
        match words:
            case ["close", code, reason]:
                await connection.close(int(code), reason)
            case ["die"]:
                connection.transport.abort()
            case ["raw", text]:
                connection.transport.write(bytes.fromhex(text))
            case ["flood", count]:
                for _ in range(int(count)):
                    await connection.send(bytes(65536))
            case ["ping"]:
                async with asyncio.timeout(SECONDS):
                    await (await connection.ping())
                await connection.send("ponged")
            case ["deaf"]:
                connection.transport.pause_reading()
            case ["deaf", seconds]:
                self._do(self._hear_nothing(connection, float(seconds)))
            case ["request"]:
                assert connection.request is not None
                headers = [list(pair) for pair in connection.request.headers.raw_items()]
                await connection.send(json.dumps([connection.request.path, headers]))
            case _:
                await connection.send(message)

    async def _hear_nothing(self, connection: ServerConnection, seconds: float) -> None:
        connection.transport.pause_reading()
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            connection.transport.write(Frame(Opcode.TEXT, b"talk").serialize(mask=False))
            await asyncio.sleep(0.1)
        connection.transport.resume_reading()

    def _do(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)


def worker_tls(agent: str = AGENT) -> ssl.SSLContext | None:
    """What an agent's worker answers its data port with."""
    return Links.pki.worker(agent).calls if Links.pki else None


def dial_control(
    gateway: Running,
    agent: str = AGENT,
    key: str = WORKER_KEY,
    path: str = WORKERS_PATH,
    headers: Mapping[str, str] = NO_HEADERS,
) -> connect:
    tls = Links.pki.worker(agent).gateways if Links.pki else None
    return connect(
        f"{'wss' if tls else 'ws'}://127.0.0.1:{gateway.control_port}{path}",
        ssl=tls,
        additional_headers={"Authorization": f"Bearer {key}", AGENT_HEADER: agent, **headers},
        proxy=None,
        compression=None,
        ping_interval=None,
        close_timeout=1,
    )


class FakeOperator:
    """The operator's side of its link: routes out, loads in. `changes`: it reads them."""

    def __init__(self, *, changes: bool = False) -> None:
        self.loads: list[Load] = []
        self.changes: list[LoadChanges] = []
        self._headers = {CHANGES_HEADER: "1"} if changes else NO_HEADERS
        self._link: ClientConnection | None = None

    @contextlib.asynccontextmanager
    async def linked(self, gateway: Running) -> AsyncIterator["FakeOperator"]:
        async with dial_control(
            gateway, key=OPERATOR_TOKEN, path=OPERATOR_PATH, headers=self._headers
        ) as self._link:
            tasks = [asyncio.create_task(self._hear()), asyncio.create_task(self._beat())]
            try:
                yield self
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def push(self, text: str) -> None:
        assert self._link is not None
        await self._link.send(text)

    async def _hear(self) -> None:
        assert self._link is not None
        async for text in self._link:
            message = json.loads(text)
            if message["type"] == "load":
                self.loads.append(message)
            elif message["type"] == "loadChanges":
                self.changes.append(message)

    async def _beat(self) -> None:
        while True:
            await self.push('{"type":"beat"}')
            await asyncio.sleep(HEARTBEAT_SECONDS)


class FakeModal:
    """One sessioned Modal server: sessions by HTTP, and behind them a container that echoes."""

    def __init__(self) -> None:
        self.start_seconds = 0.0
        self.gates: list[asyncio.Event] = []  # one for each of the next starts, which waits for it
        self.status = 200  # of a start
        self.refusing = False  # the container refuses every data link
        self.deaths = 0  # data links that are still to die at their first message
        self.sessions: dict[str, str] = {}  # token: session
        self.starts: list[Headers] = []
        self.ended: list[str] = []
        self.requests: list[Request] = []
        self.first: list[dict[str, Any]] = []  # the first message of each data link
        self.tickets: list[dict[str, Any]] = []
        self._scheme = "http"
        self._server: Server | None = None

    @contextlib.asynccontextmanager
    async def serving(self, tls: ssl.SSLContext | None = None) -> AsyncIterator["FakeModal"]:
        self._scheme = "https" if tls else "http"
        async with serve(
            self._talk,
            "127.0.0.1",
            0,
            process_request=self._respond,
            compression=None,
            ping_interval=None,
            close_timeout=1,
            ssl=tls,
        ) as self._server:
            yield self

    def rung(self, **changes: Any) -> BurstRung:
        assert self._server is not None
        port = next(iter(self._server.sockets)).getsockname()[1]
        rung: dict[str, Any] = {
            "kind": "burst",
            "name": "us-east",
            "url": f"{self._scheme}://127.0.0.1:{port}",
        }
        rung |= {"proxyToken": PROXY_TOKEN, "ticketKey": TICKET_KEY, "deadlineSeconds": 10.0}
        return cast(BurstRung, rung | changes)

    async def _respond(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.method == "POST":
            if request.headers.get("Authorization") != f"Bearer {PROXY_TOKEN}":
                return connection.respond(401, "proxy token\n")
            if request.path == "/_modal/sessions/start":
                return await self._start(connection, request)
            assert request.path == "/_modal/sessions/terminate"
            token = request.headers["x-modal-server-session-token"]
            self.ended.append(token)
            return connection.respond(200 if self.sessions.pop(token, None) else 404, "")
        self.requests.append(request)
        token = request.headers.get("Modal-Authorization", "").removeprefix("Bearer ")
        if token not in self.sessions:
            return connection.respond(401, "no such session\n")
        if self.refusing:
            return connection.respond(403, "no such ticket\n")
        claims = jwt.decode(request.headers[TICKET_HEADER], TICKET_KEY, ["HS256"], audience=AGENT)
        assert claims["call"] == request.headers[CALL_HEADER]
        self.tickets.append(claims)
        return None

    async def _start(self, connection: ServerConnection, request: Request) -> Response:
        self.starts.append(request.headers)
        if self.gates:
            await self.gates.pop(0).wait()
        await asyncio.sleep(self.start_seconds)
        if self.status != 200:
            return connection.respond(self.status, "no\n")
        token = secrets.token_urlsafe(8)
        self.sessions[token] = f"sd-{len(self.starts)}"
        body = {"session_id": self.sessions[token], "token": token}
        return connection.respond(200, json.dumps(body))

    async def _talk(self, connection: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            first = await connection.recv()
            self.first.append(json.loads(first))
            async for message in connection:
                if message == "die" or self.deaths:
                    self.deaths -= message != "die"
                    connection.transport.abort()
                else:
                    await connection.send(message)


@contextlib.contextmanager
def events(logger: str) -> Iterator[list[dict[str, Any]]]:
    """What one logger says, as the extras and messages of its records."""
    import logging

    lines: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append({**record.__dict__, "message": record.getMessage()})

    target, handler = logging.getLogger(logger), Keep()
    level = target.level
    target.setLevel(logging.DEBUG)
    target.addHandler(handler)
    try:
        yield lines
    finally:
        target.removeHandler(handler)
        target.setLevel(level)
