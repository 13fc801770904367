"""A worker's doorway over real sockets: what it answers, what it cuts, and what a call leaves behind."""

import asyncio
import contextlib
import gc
import itertools
from collections.abc import AsyncIterator

import pytest
from websockets.frames import Frame, Opcode
from worker_rig import AGENT, PATIENCE, told

from trunkline_runtime.contract import (
    ACCOUNT_HEADER,
    ACCOUNT_PING,
    END_PING,
    TICKET_HEADER,
    ticket,
)
from trunkline_runtime.engine.loopback import LoopbackEngine
from trunkline_runtime.worker.call import CallLimits
from trunkline_runtime.worker.doorway import MAX_HEAD_BYTES, MAX_STANDING, OPEN_SECONDS
from trunkline_runtime.worker.metrics import WorkerMetrics
from trunkline_runtime.worker.server import CallServer, Desk
from trunkline_runtime.worker.switchboard import Switchboard
from trunkline_runtime.worker.tickets import LinkTickets

SETTINGS = Frame(Opcode.TEXT, told().encode()).serialize(mask=True)
OVER = Frame(Opcode.PING, END_PING).serialize(mask=True)
BYE = Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True)


class Rig:
    """A data server without the rest of a worker."""

    def __init__(self) -> None:
        self.switchboard = Switchboard(slots=4, worker="w", boot="b")
        tickets = LinkTickets()
        self._key = tickets.issue(1)
        self._numbers = itertools.count(1)
        desk = Desk(
            agent=AGENT,
            engine=LoopbackEngine(slots=4),
            switchboard=self.switchboard,
            tickets=tickets,
            limits=CallLimits(max_seconds=60),
            metrics=WorkerMetrics(),
            protocols=["realtime"],
            why_closed=lambda: None,
        )
        self.server = CallServer(desk)
        self.port = 0
        self.stop = asyncio.Event()
        self.running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self.server.serving("127.0.0.1", 0) as self.port:
            await self.stop.wait()

    def request(self, call: str) -> bytes:
        """An upgrade with a ticket for a call."""
        return asking(f"{TICKET_HEADER}: {ticket(1, self._key, next(self._numbers), call)}")

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)


def asking(*fields: str) -> bytes:
    lines = ["GET /v1/realtime HTTP/1.1", "Host: w", "Upgrade: websocket", "Connection: Upgrade"]
    lines += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    return "\r\n".join([*lines, *fields, "", ""]).encode()


@contextlib.asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    async with asyncio.timeout(PATIENCE):
        while not made.port:
            await asyncio.sleep(0)
        yield made
        made.stop.set()
        await made.running


async def test_a_request_in_pieces_is_answered_and_what_follows_it_is_heard() -> None:
    async with rig() as worker:
        reader, writer = await worker.open()
        early = Frame(Opcode.PING, b"early").serialize(mask=True)
        whole = worker.request("a") + early
        for cut in (1, 40, len(whole) - len(early) - 2, len(whole) - 3):
            writer.write(whole[:cut])
            await writer.drain()
            await asyncio.sleep(
                0.02
            )  # so that it comes in pieces; more at once would be right, too
            writer.write(whole[cut:])
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 ")
            await reader.readuntil(b"\x8a\x05early")
            writer.write(BYE)
            writer.close()
            reader, writer = await worker.open()
            whole = worker.request(f"a-{cut}") + early
        writer.close()


async def test_a_caller_who_is_gone_at_once_leaves_no_slot_taken() -> None:
    """A gateway says so in one piece with the settings, and closes when it has the account."""
    async with rig() as worker:
        reader, writer = await worker.open()
        writer.write(worker.request("a") + SETTINGS + OVER)
        await reader.readuntil(ACCOUNT_PING)
        await worker.switchboard.quiet()
        writer.write(BYE)
        writer.close()


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (asking(), b"403"),
        (asking(f"{TICKET_HEADER}: a", f"{TICKET_HEADER}: b"), b"403"),
        (asking().replace(b"/v1/realtime", b"/elsewhere"), b"404"),
        (asking().replace(b"/v1/realtime", b"/api/chat"), b"501"),
        (asking().replace(b"Version: 13", b"Version: 8"), b"400"),
        (b"GET /v1/realtime HTTP/1.1\r\nHost: w\r\n\r\n", b"426"),
        (b"GET /" + b"x" * MAX_HEAD_BYTES, b"431"),
        (b"\x16\x03\x01\r\n\r\n", b""),
    ],
)
async def test_what_is_no_call_gets_a_plain_answer_and_is_hung_up_on(
    asked: bytes, status: bytes
) -> None:
    async with rig() as worker:
        reader, writer = await worker.open()
        writer.write(asked)
        answer = await reader.read()
        assert answer[9:12] == status
        assert (f"\r\n{ACCOUNT_HEADER}: 1\r\n".encode() in answer) == bool(status)
        assert not worker.switchboard.busy
        writer.close()


async def test_two_tickets_open_nothing_and_use_none_up() -> None:
    async with rig() as worker:
        good = worker.request("a")
        reader, writer = await worker.open()
        writer.write(good.removesuffix(b"\r\n") + f"{TICKET_HEADER}: other\r\n\r\n".encode())
        assert (await reader.read())[9:12] == b"403"
        writer.close()
        reader, writer = await worker.open()
        writer.write(good)
        assert (await reader.readuntil(b"\r\n\r\n"))[9:12] == b"101"
        writer.close()


async def test_who_asks_nothing_is_cut_off() -> None:
    async with rig() as worker:
        loop = asyncio.get_running_loop()
        began = loop.time()
        reader, writer = await worker.open()
        writer.write(asking()[:-2])
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        assert loop.time() - began > OPEN_SECONDS - 0.1
        writer.close()


async def test_who_has_said_nothing_may_stand_for_long_and_of_too_many_the_oldest_goes() -> None:
    async with rig() as worker, contextlib.AsyncExitStack() as stack:
        first, writer = await worker.open()
        stack.callback(writer.close)
        later = []
        for _ in range(MAX_STANDING - 1):
            later.append(await worker.open())
            stack.callback(later[-1][1].close)
        await asyncio.sleep(OPEN_SECONDS + 0.5)
        assert len(worker.server.standing) == MAX_STANDING
        _, writer = await worker.open()
        stack.callback(writer.close)
        with contextlib.suppress(ConnectionError):
            assert await first.read() == b""
        reader, writer = later[0]
        writer.write(worker.request("a"))
        assert (await reader.readuntil(b"\r\n\r\n"))[9:12] == b"101"


async def test_a_server_that_stops_tells_its_calls_refuses_who_asks_and_cuts_who_does_not() -> None:
    async with rig() as worker:
        caller, _ = live = await worker.open()
        live[1].write(worker.request("a"))
        await caller.readuntil(b"\r\n\r\n")
        asks, stands = await worker.open(), await worker.open()
        late = worker.request("b")
        worker.stop.set()
        await caller.readuntil(b"\x03\xf4the worker stops: call again")  # 1012
        asks[1].write(late)
        assert (await asks[0].read())[9:12] == b"503"
        live[1].write(BYE)
        await worker.running
        async with asyncio.timeout(OPEN_SECONDS / 2):
            with contextlib.suppress(ConnectionError):
                assert await stands[0].read() == b""
        for _, writer in (live, asks, stands):
            writer.close()


async def test_a_call_that_is_over_leaves_nothing_for_the_collector() -> None:
    async def call(worker: Rig, name: str) -> None:
        reader, writer = await worker.open()
        writer.write(worker.request(name) + SETTINGS)
        await reader.readuntil(b"session.created")
        writer.write(BYE)
        await reader.read()
        writer.close()

    async with rig() as worker:
        await call(worker, "first")
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for number in range(5):
                await call(worker, str(number))
            gc.collect()
            kinds = {type(each) for each in gc.garbage}
        finally:
            gc.set_debug(0)
            gc.enable()
            gc.garbage.clear()
    ours = ("trunkline_runtime", "websockets")
    assert not [kind for kind in kinds if kind.__module__.startswith(ours)]
