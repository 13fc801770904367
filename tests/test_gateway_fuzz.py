"""Whatever bytes come, to a gateway as a request or to a call as frames: no exception, no leak, bounded memory."""

import asyncio
import gc
import itertools
import random
import resource
from pathlib import Path

import pytest
from gateway_rig import (
    AGENT,
    SECONDS,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    events,
    http,
    on_uvloop,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gateway_calls import HEAD
from websockets.frames import Frame, Opcode

from trunkline_runtime.contract import CLIENT_SECRETS_PATH, MAX_CALL_MESSAGE_BYTES
from trunkline_runtime.gateway.frames import MAX_FRAGMENTS, Stop, Tracker
from trunkline_runtime.gateway.process import Running

LIMIT = 4096
HEADER_BYTES = 14  # the longest header of a frame

# --- the tracker alone -----------------------------------------------------------------------------------

headers = st.tuples(
    st.sampled_from([0x00, 0x01, 0x02, 0x80, 0x81, 0x82, 0x88, 0x89, 0x8A]),
    st.integers(0, 130),
    st.binary(min_size=4, max_size=4),
)


def frame(first: int, size: int, key: bytes, *, mask: bool) -> bytes:
    if size < 126:
        length = bytes([size | 0x80 * mask])
    else:
        length = bytes([126 | 0x80 * mask]) + size.to_bytes(2, "big")
    return bytes([first]) + length + (key if mask else b"") + bytes(size)


@given(
    frames=st.lists(headers, max_size=20),
    noise=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=3),
    cuts=st.lists(st.integers(0, 10**5), max_size=10),
    mask=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_frames_end_in_bytes_or_a_stop_and_hold_no_more_than_the_limit(
    frames: list[tuple[int, int, bytes]],
    noise: list[tuple[int, int]],
    cuts: list[int],
    mask: bool,
) -> None:
    """Frames that are nearly right, some of their bytes replaced by others."""
    stream = bytearray(b"".join(frame(*each, mask=mask) for each in frames))
    for at, byte in noise:
        if stream:
            stream[at % len(stream)] = byte
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    pings: list[bytes] = []
    tracker = Tracker(masked=mask, limit=LIMIT, pinged=pings.append)
    out = 0
    try:
        for start, stop in itertools.pairwise(edges):
            out += len(tracker.feed(bytes(stream[start:stop])))
            held = tracker._held
            most = LIMIT + MAX_FRAGMENTS * HEADER_BYTES + HEADER_BYTES + 125
            assert held is None or len(held) <= most
    except Stop as stopped:
        out += len(stopped.data)
    assert out <= len(stream)
    assert all(len(ping) <= 125 for ping in pings)


# --- a gateway, on real sockets ----------------------------------------------------------------------------


def mutated(seed: bytes, draw: random.Random) -> bytes:
    """Bytes changed, left out, repeated, cut off or put in, as a byte fuzzer does."""
    data = bytearray(seed)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data) + 1) if data else 0
        match draw.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at : at + draw.randint(1, 40)]
            case 2:
                data[at:at] = data[max(0, at - 30) : at] * draw.randint(1, 4)
            case 3:
                data[at:at] = draw.randbytes(draw.randint(1, 30))
            case 4:
                data[at:at] = draw.choice(
                    [b"\r\n", b"\r\n\r\n", b"\0", b":", b" ", b"\xff", b"%00"]
                )
            case _:
                del data[at:]
    return bytes(data)


async def throw(gateway: Running, data: bytes, draw: random.Random, *, live: bool) -> None:
    """Sends it in pieces on a connection of its own, in a call that is `live` or instead of one, and hears what comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        if live:
            writer.write(HEAD)
            async with asyncio.timeout(SECONDS):
                assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        while data:
            size = draw.choice([1, 7, 100, 1448, len(data)])
            writer.write(data[:size])
            data = data[size:]
            await asyncio.sleep(0)
        if draw.random() < 0.5:
            writer.write_eof()
            async with asyncio.timeout(SECONDS):
                while await reader.read(65536):
                    pass
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()


async def emptied(gateway: Running) -> None:
    """Waits until nothing of any call is left."""
    try:
        await until(
            lambda: not gateway.gateway.holdings.connections and not gateway.gateway.holdings.legs
        )
    except TimeoutError:
        left = [*gateway.gateway.holdings.connections, *gateway.gateway.holdings.legs]
        raise AssertionError(f"still there: {left}") from None


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident_kb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


ORDER = (
    f"POST {CLIENT_SECRETS_PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\nContent-Length: 40\r\n\r\n"
    '{"session": {"model": "default/echo"}}  '
).encode()
MESSAGES = b"".join(
    [
        Frame(Opcode.TEXT, b"hello").serialize(mask=True),
        Frame(Opcode.PING, b"are you there").serialize(mask=True),
        Frame(Opcode.BINARY, bytes(300), fin=False).serialize(mask=True),
        Frame(Opcode.PONG, b"").serialize(mask=True),
        Frame(Opcode.CONT, bytes(70_000)).serialize(mask=True),
        Frame(Opcode.TEXT, b"x" * 200).serialize(mask=True),
        Frame(Opcode.CLOSE, b"\x03\xe8bye").serialize(mask=True),
    ]
)


@pytest.mark.parametrize("kind", ["request", "order", "frames"])
def test_whatever_callers_send_leaves_nothing_behind(kind: str) -> None:
    """`on_uvloop` fails the test for an exception in any callback; the log is looked at for those that were caught."""

    @on_uvloop
    async def run() -> None:
        draw = random.Random(f"trunkline {kind}")
        async with (
            a_gateway(a_route()) as gateway,
            FakeWorker(slots=64).serving(gateway) as worker,
        ):
            after: list[tuple[int, int]] = []
            for batch in range(6):
                cases = [
                    {
                        "request": lambda: mutated(HEAD, draw),
                        "order": lambda: mutated(ORDER, draw),
                        "frames": lambda: mutated(MESSAGES, draw),
                    }[kind]()
                    for _ in range(100)
                ]
                for start in range(0, len(cases), 20):
                    await asyncio.gather(
                        *(
                            throw(gateway, case, draw, live=kind == "frames")
                            for case in cases[start : start + 20]
                        )
                    )
                await emptied(gateway)
                await until(lambda: worker.free == 64)
                gc.collect()
                after.append((open_files(), resident_kb()))
                assert gateway.gateway.load()["agents"][AGENT]["calls"] == 0, batch
            # The first batches fill caches and arenas; what leaks goes on.
            assert after[-1][0] <= after[1][0] + 2, after
            assert after[-1][1] <= after[1][1] * 1.1 + 4096, after
            async with call(gateway) as caller:
                await caller.send("still here")
                assert await caller.recv() == "still here"

    with events("trunkline.gateway") as lines:
        run()
    assert not [line for line in lines if line["levelname"] in ("ERROR", "CRITICAL")], lines


@on_uvloop
async def test_a_worker_that_sends_noise_leaves_nothing_behind() -> None:
    draw = random.Random("trunkline worker")
    seed = b"".join(
        [
            Frame(Opcode.TEXT, b"hello").serialize(mask=False),
            Frame(Opcode.PING, b"ping").serialize(mask=False),
            Frame(Opcode.BINARY, bytes(3000), fin=False).serialize(mask=False),
            Frame(Opcode.CONT, bytes(70_000)).serialize(mask=False),
            Frame(Opcode.CLOSE, b"\x03\xf3eng").serialize(mask=False),
        ]
    )
    async with a_gateway(a_route()) as gateway, FakeWorker(slots=64).serving(gateway) as worker:
        for _ in range(60):
            caller = await call(gateway)
            await caller.send(f"raw {mutated(seed, draw).hex()}")
            await caller.close()
        await emptied(gateway)
        await until(lambda: worker.free == 64)


@on_uvloop
async def test_what_one_caller_makes_a_gateway_hold_is_bounded() -> None:
    """The longest message but for its end, fragments without number, and a storm of pings, at once."""
    start = b"\x02\xff" + (MAX_CALL_MESSAGE_BYTES - 1).to_bytes(8, "big") + bytes(4)
    fragments = b"\x02\x80\0\0\0\0" + b"\x00\x80\0\0\0\0" * (MAX_FRAGMENTS - 2)
    pings = Frame(Opcode.PING, bytes(125)).serialize(mask=True)
    async with a_gateway(a_route()) as gateway, FakeWorker(slots=64).serving(gateway):
        writers = []
        before = resident_kb()
        for body in [start + bytes(MAX_CALL_MESSAGE_BYTES - 2), fragments + pings * 20_000] * 8:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(HEAD)
            async with asyncio.timeout(SECONDS):
                assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
                writer.write(body)
                await writer.drain()
            writers.append(writer)
        await until(lambda: gateway.gateway.load()["agents"][AGENT]["calls"] == 16)
        status, _ = await http(gateway.health_port, "/healthz")
        assert status == 200
        grown = resident_kb() - before
        # 16 callers, each of whom may hold a message, what is written of it here, and socket buffers.
        assert grown < 16 * 4 * MAX_CALL_MESSAGE_BYTES / 1024, grown
        for writer in writers:
            writer.transport.abort()
        await until(lambda: not gateway.gateway.holdings.connections)
