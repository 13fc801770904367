"""How a call ends, line by line of the table in `closes`, and what happens to those who do not keep to it."""

import asyncio
import ctypes
import socket
import struct
from typing import cast

import pytest
from gateway_rig import (
    FakeWorker,
    a_gateway,
    a_route,
    call,
    closed,
    events,
    live_call,
    on_uvloop,
    until,
)
from websockets.frames import Close, Frame, Opcode

from trunkline_runtime.contract import MAX_CALL_MESSAGE_BYTES
from trunkline_runtime.gateway.closes import for_worker, of_worker
from trunkline_runtime.gateway.sockets import notice_dead_peer

links = pytest.mark.usefixtures("links")
LOST = (1011, "worker lost: call again")

# What a worker says after its first word, as bytes in hex; what the caller is told; what the worker is told;
# whether the call counts as lost.
ENDS = [
    ("an empty Close", "8800", (1005, ""), (1005, ""), False),
    ("1000", "880603e8646f6e65", (1000, "done"), (1000, "done"), False),
    ("1001", "880203e9", LOST, (1001, ""), True),
    ("1008", "880603f072756c65", (1008, "rule"), (1008, "rule"), False),
    ("1011", "880503f3656e67", (1011, "eng"), (1011, "eng"), True),
    ("1012", "880203f4", (1012, ""), (1012, ""), True),
    ("1013", "880203f5", (1013, ""), (1013, ""), False),
    ("a code of its own", "88021004", (4100, ""), (4100, ""), False),
    ("a code that nobody may send", "88021388", LOST, (1002, "invalid Close"), True),
    ("a broken frame", "c30178", LOST, (1002, "invalid frame header"), True),
    ("a masked frame", "818100000000" + "78", LOST, (1002, "invalid frame header"), True),
    (
        "a message that is too long",
        "827f" + (MAX_CALL_MESSAGE_BYTES + 1).to_bytes(8, "big").hex(),
        LOST,
        (1009, f"a message may have {MAX_CALL_MESSAGE_BYTES} bytes"),
        True,
    ),
]


@links
@pytest.mark.parametrize(("what", "said", "caller_gets", "worker_gets", "lost"), ENDS)
def test_a_workers_end_is_told_by_the_table(
    what: str,
    said: str,
    caller_gets: tuple[int, str],
    worker_gets: tuple[int, str],
    lost: bool,
) -> None:
    @on_uvloop
    async def run() -> None:
        async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
            with events("trunkline.calls") as lines:
                caller = await call(gateway)
                await caller.send("a word")
                assert await caller.recv() == "a word"
                await caller.send(f"raw {said}")
                assert await closed(caller) == caller_gets
                await until(lambda: not worker.live)
                assert worker.closes == [worker_gets], what
                await until(lambda: any(line["message"] == "ended" for line in lines))
            ended = next(line for line in lines if line["message"] == "ended")
            assert (ended["code"], ended["lost"]) == (caller_gets[0], lost)

    run()


@pytest.mark.parametrize(
    ("close", "by_gateway", "told"),
    [
        (Close(1000, "bye"), False, Close(1000, "bye")),
        (Close(1005, ""), False, Close(1005, "")),
        (Close(4000, "mine"), False, Close(4000, "mine")),
        (Close(1006, ""), False, Close(1001, "the caller is gone")),
        (Close(1002, "x"), False, Close(1002, "x")),  # what a caller accuses its worker of
        (Close(1002, "x"), True, Close(1001, "the caller broke the protocol")),
        (Close(1009, "x"), True, Close(1001, "the caller broke the protocol")),
        (Close(1008, "slow"), True, Close(1008, "slow")),
        (Close(1012, "restart"), True, Close(1012, "restart")),
    ],
)
def test_a_worker_is_told_by_the_table(close: Close, by_gateway: bool, told: Close) -> None:
    assert for_worker(close, by_gateway=by_gateway) == told


def test_only_a_worker_that_cannot_have_a_call_gives_it_to_another() -> None:
    again = {code for code in range(1000, 5000) if of_worker(code).again}
    lost = {code for code in range(1000, 5000) if of_worker(code).lost}
    assert again == {1001, 1006, 1011, 1012, 1013}
    assert lost == again - {1013}
    assert {code for code in range(1000, 5000) if of_worker(code).told} == {1001, 1006}


@links
@on_uvloop
async def test_an_empty_close_of_the_caller_is_passed_on_as_it_is() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        caller = await call(gateway)
        caller.transport.write(Frame(Opcode.CLOSE, b"").serialize(mask=True))
        await until(lambda: not worker.live)
        assert worker.closes == [(1005, "")]
        await caller.wait_closed()


@links
@on_uvloop
async def test_what_a_worker_says_after_its_close_reaches_nobody() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        caller = await call(gateway)
        await caller.send("raw 810161" + "880203e8" + "810162")
        assert await caller.recv() == "a"
        assert await closed(caller) == (1000, "")
        await until(lambda: not worker.live and not gateway.gateway.holdings.legs)


@links
@on_uvloop
async def test_a_worker_that_has_said_bye_keeps_its_calls_and_gets_no_new_one() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker("leaving").serving(gateway) as leaving:
        caller = await call(gateway)
        leaving.draining = True
        for link in leaving.links:
            await link.send('{"type": "bye"}')
        await until(lambda: bool(leaving.row(gateway)["draining"]))
        async with FakeWorker("staying").serving(gateway) as staying, call(gateway) as another:
            await another.send("hello")
            assert await another.recv() == "hello"
            assert staying.live
        await caller.send("still here")
        assert await caller.recv() == "still here"
        await caller.close()


# --- peers that are gone without a word ---------------------------------------------------------------------


def vanish(peer: socket.socket) -> None:
    """Has the kernel throw away all that comes for a socket, as if its cable were pulled: nothing is acknowledged."""
    drop_all = struct.pack("HBBI", 0x06, 0, 0, 0)  # classic BPF: return 0 bytes of each packet
    program = struct.pack("HL", 1, _address_of(drop_all))
    peer.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER


_kept_alive: list[object] = []


def _address_of(code: bytes) -> int:
    buffer = ctypes.create_string_buffer(code, len(code))
    _kept_alive.append(buffer)
    return ctypes.addressof(buffer)


@pytest.mark.parametrize("speaks", [False, True])
def test_a_peer_that_vanishes_is_noticed(speaks: bool) -> None:
    """With 3 s where a gateway has 30: the kernel's own clocks run."""

    @on_uvloop
    async def run() -> None:
        gone = asyncio.Event()

        class Side(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.transport = cast(asyncio.Transport, transport)
                self.transport.write(b"hello")
                sides.append(self)

            def connection_lost(self, exc: Exception | None) -> None:
                gone.set()

        sides: list[Side] = []
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Side, "127.0.0.1", 0)
        notice_dead_peer(
            server.sockets[0], seconds=3
        )  # as with callers: who is accepted has it too
        with socket.create_connection(server.sockets[0].getsockname()) as peer:
            await until(lambda: bool(sides))
            peer.setblocking(False)
            assert await loop.sock_recv(peer, 5) == b"hello"
            vanish(peer)
            began = loop.time()
            if speaks:
                sides[0].transport.write(b"is anybody there")
            async with asyncio.timeout(20):
                await gone.wait()
            assert loop.time() - began > 1
        server.close()
        await server.wait_closed()

    run()


@on_uvloop
async def test_both_sides_of_a_call_are_watched_so() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway):
        caller = await call(gateway)
        live = live_call(gateway)
        assert live._leg is not None
        assert live._leg._transport is not None
        for transport in (live._transport, live._leg._transport):
            peer = transport.get_extra_info("socket")
            assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle, each, count = (
                peer.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + each * count == 30
            assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
        await caller.close()
