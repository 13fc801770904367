"""Whose connection it is behind proxies: pure decisions, then over real sockets."""

import asyncio
import contextlib
from ipaddress import ip_address
from typing import Any

import pytest
from gateway_rig import (
    KEY,
    SECONDS,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    metric,
    on_uvloop,
    refused,
    until,
)
from hypothesis import given
from hypothesis import strategies as st

from trunkline_runtime.gateway.access.doorstep import Bounds
from trunkline_runtime.gateway.access.proxies import MAX_HOPS, Proxies, ProxiesError, hops
from trunkline_runtime.gateway.access.proxy_header import (
    FIRST,
    MAX_LINE,
    MAX_REST,
    SIGNATURE,
    More,
    ProxyHeaderError,
    Source,
    read,
)
from trunkline_runtime.gateway.process import Running

TRUSTED = Proxies.parse("10.0.0.0/8, fd00::/8")
LOOPBACK = Proxies.parse("127.0.0.1/32")

# --- X-Forwarded-For -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "said", "caller"),
    [
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.9", "10.0.0.2"], "203.0.113.9"),
        ("10.0.0.1", ["1.1.1.1", "203.0.113.9"], "203.0.113.9"),  # what the caller itself wrote
        ("10.0.0.1", ["10.9.9.9", "203.0.113.9"], "203.0.113.9"),
        ("203.0.113.5", ["1.1.1.1"], "203.0.113.5"),  # a caller without a proxy
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.1", "unknown"], "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.1", ""], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9:4711"], "203.0.113.9"),
        ("fd00::1", ["[2001:db8::7]:4711"], "2001:db8::7"),
        ("fd00::1", ["2001:db8::7"], "2001:db8::7"),
        ("::ffff:10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["10.0.0.3", "10.0.0.2"], "10.0.0.3"),  # all of them ours
        ("10.0.0.1", ["203.0.113.9"] + ["10.0.0.2"] * MAX_HOPS, "10.0.0.2"),
        ("", ["203.0.113.9"], ""),
    ],
)
def test_the_caller_is_the_last_address_that_no_trusted_proxy_has(
    peer: str, said: list[str], caller: str
) -> None:
    assert TRUSTED.caller(peer, said) == caller


def test_nobody_is_believed_without_a_list() -> None:
    assert Proxies.parse("") == Proxies()
    assert Proxies().caller("10.0.0.1", ["1.1.1.1"]) == "10.0.0.1"


@given(st.lists(st.one_of(st.ip_addresses().map(str), st.text(max_size=12)), max_size=24))
def test_whatever_a_caller_writes_its_own_address_stands_behind_it(said: list[str]) -> None:
    assert TRUSTED.caller("10.0.0.1", [*said, "203.0.113.9"]) == "203.0.113.9"


@pytest.mark.parametrize("text", ["10.0.0.1/8", "x", "0.0.0.0/0", "::/0", "10.0.0.0/8 fd00::/8"])
def test_a_list_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ProxiesError):
        Proxies.parse(text)


def test_a_list_is_bounded() -> None:
    with pytest.raises(ProxiesError, match="64"):
        Proxies.parse(",".join(f"10.{n}.0.0/16" for n in range(65)))


def test_several_lines_are_one_list_and_only_whole_lines_count() -> None:
    head = (
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 1.1.1.1, 2.2.2.2\r\n"
        b"Foo: bar\nX-Forwarded-For: 6.6.6.6\r\nx-FORWARDED-for:3.3.3.3\r\n"
        b"X-Forwarded-For : 7.7.7.7"
    )
    assert hops(head) == ["1.1.1.1", "2.2.2.2", "3.3.3.3"]


# --- the PROXY protocol ----------------------------------------------------------------------------------


def binary(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + bytes([command, family]) + len(body).to_bytes(2) + body


FOUR = ip_address("203.0.113.9").packed + ip_address("10.0.0.1").packed + b"\x12\x67\x00\x50"
SIX = ip_address("2001:db8::7").packed + ip_address("fd00::1").packed + b"\x12\x67\x00\x50"
HEADERS: dict[bytes, str] = {
    b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 80\r\n": "203.0.113.9",
    b"PROXY TCP6 2001:db8::7 fd00::1 4711 80\r\n": "2001:db8::7",
    b"PROXY UNKNOWN\r\n": "",
    b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n": "",
    binary(0x21, 0x11, FOUR): "203.0.113.9",
    binary(0x21, 0x21, SIX): "2001:db8::7",
    binary(0x21, 0x11, FOUR + b"\xea\x00\x04vpce"): "203.0.113.9",
    binary(0x20, 0x00, b""): "",  # LOCAL: a health check
    binary(0x21, 0x31, bytes(216)): "",
}
BAD: list[bytes] = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PROXY TCP4 203.0.113.9 10.0.0.1 4711\r\n",
    b"PROXY TCP4 2001:db8::7 fd00::1 4711 80\r\n",
    b"PROXY TCP4 x y 1 2\r\n",
    b"PROXY UDP4 1.1.1.1 2.2.2.2 1 2\r\n",
    b"PROXY TCP4 " + b"1" * 200,
    binary(0x11, 0x11, FOUR),
    binary(0x22, 0x11, FOUR),
    binary(0x21, 0x12, FOUR),
    binary(0x21, 0x11, FOUR[:11]),
    binary(0x21, 0x11, bytes(MAX_REST + 1)),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00",
]


def source_of(stream: bytes) -> tuple[str, bytes]:
    """What a header says, and what was left unread, read as a socket would be."""
    taken = 0
    while True:
        match read(stream[:taken]):
            case Source(address):
                return address, stream[taken:]
            case More(count):
                assert count > 0
                taken += count
                assert taken <= len(stream), "it wants more than there will ever be"


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_is_read_to_its_end_and_no_further(header: bytes) -> None:
    assert source_of(header + b"GET / HTTP/1.1") == (HEADERS[header], b"GET / HTTP/1.1")
    assert source_of(header) == (HEADERS[header], b"")


@pytest.mark.parametrize("stream", BAD)
def test_what_is_no_header_is_refused(stream: bytes) -> None:
    with pytest.raises(ProxyHeaderError):
        source_of(stream + bytes(4096))


@given(st.binary(max_size=300), st.sampled_from([b"", b"PROXY ", SIGNATURE]))
def test_any_bytes_are_a_header_or_refused_within_the_bounds(
    noise: bytes, beginning: bytes
) -> None:
    stream = beginning + noise + bytes(16 + MAX_REST)
    taken, count = 0, 0
    with contextlib.suppress(ProxyHeaderError):
        while isinstance(found := read(stream[:taken]), More):
            taken, count = taken + found.count, count + 1
    assert taken <= max(FIRST, MAX_LINE + 1, 16 + MAX_REST)
    assert count <= MAX_LINE


# --- over sockets ----------------------------------------------------------------------------------------


async def answer(gateway: Running, *lines: str, before: bytes = b"") -> bytes:
    """The status line of an upgrade without a key."""
    head = "\r\n".join(
        [
            "GET /v1/realtime?model=echo HTTP/1.1",
            "Host: x",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
            "Sec-WebSocket-Version: 13",
            *lines,
            "",
            "",
        ]
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        writer.write(before + head.encode())
        async with asyncio.timeout(SECONDS):
            return (await reader.read()).partition(b"\r\n")[0]
    except ConnectionError:
        return b""
    finally:
        writer.close()


def waiting(gateway: Running) -> dict[str, int]:
    """Who waits at the doorstep."""
    addresses = gateway.gateway._reception._doorstep._addresses
    return {key: each.waiting for key, each in addresses.items() if each.waiting}


@pytest.mark.parametrize("proxies", [LOOPBACK, Proxies()])
def test_callers_behind_a_trusted_proxy_have_bounds_of_their_own(proxies: Proxies) -> None:
    """And those of a proxy that nobody has named share one."""

    @on_uvloop
    async def run() -> None:
        bounds = Bounds(per_second=0.5)
        async with a_gateway(a_route(), bounds=bounds, proxies=proxies) as gateway:
            answers = [
                await answer(gateway, f"X-Forwarded-For: 203.0.113.{number}")
                for number in range(12)
            ]
            trusted = bool(proxies.networks)
            assert (b"HTTP/1.1 429 Too Many Requests" in answers) is not trusted
            flood = [await answer(gateway, "X-Forwarded-For: 198.51.100.1") for _ in range(12)]
            assert b"HTTP/1.1 429 Too Many Requests" in flood
            await until(lambda: not gateway.gateway.holdings.connections)
            assert gateway.gateway._reception._doorstep.waiting == 0
            assert not waiting(gateway)

    run()


@on_uvloop
async def test_a_caller_behind_a_proxy_is_counted_while_it_waits_and_not_longer() -> None:
    async with a_gateway(a_route(), proxies=LOOPBACK) as gateway:
        async with FakeWorker().serving(gateway) as worker:
            worker.silent = True
            seen = {"X-Forwarded-For": "9.9.9.9, 203.0.113.9"}
            caller = asyncio.create_task(call(gateway, headers=seen).__aenter__())
            await until(lambda: waiting(gateway) == {"203.0.113.9": 1})
            caller.cancel()
            await until(lambda: not waiting(gateway))
        assert gateway.gateway._reception._doorstep.waiting == 0


@pytest.mark.parametrize("header", HEADERS)
def test_a_load_balancers_header_says_whose_connection_it_is(header: bytes) -> None:
    @on_uvloop
    async def run() -> None:
        options: dict[str, Any] = {"proxies": LOOPBACK, "proxy_header": True}
        async with a_gateway(a_route(), **options) as gateway:
            line = await answer(gateway, before=header)
            assert line == b"HTTP/1.1 401 Unauthorized"
            known = gateway.gateway._reception._doorstep._addresses.keys()
            # Of IPv6 a network counts; a proxy that speaks for itself is nobody's address.
            expected = {"2001:db8::7": {"2001:db8::"}, "": set()}
            assert set(known) == expected.get(HEADERS[header], {HEADERS[header]})
            await until(lambda: gateway.gateway._reception._doorstep.waiting == 0)

    run()


@on_uvloop
async def test_a_trusted_proxy_without_a_header_is_closed_and_counted() -> None:
    options: dict[str, Any] = {"proxies": LOOPBACK, "proxy_header": True}
    async with a_gateway(a_route(), **options) as gateway:
        for stream in BAD:
            assert await answer(gateway, before=stream) == b""
        await until(lambda: gateway.gateway._reception._doorstep.waiting == 0)
        name = "trunkline_refused_connections_total"
        assert await metric(gateway, name, why="proxy_header") == len(BAD)


@on_uvloop
async def test_a_header_that_trickles_in_is_taken_and_one_that_never_ends_is_cut_off() -> None:
    options: dict[str, Any] = {"proxies": LOOPBACK, "proxy_header": True}
    async with a_gateway(a_route(), **options) as gateway:
        header = b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 80\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        for place in range(len(header)):
            writer.write(header[place : place + 1])
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(SECONDS):
            assert b" 426 " in await reader.readline()
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(header[:-1])
        async with asyncio.timeout(SECONDS):
            assert await reader.read() == b""
        writer.close()
        await until(lambda: gateway.gateway._reception._doorstep.waiting == 0)
        assert await metric(gateway, "trunkline_refused_connections_total", why="late") == 1


@on_uvloop
async def test_a_stranger_who_writes_a_proxy_header_is_not_believed() -> None:
    options: dict[str, Any] = {"proxies": Proxies.parse("10.0.0.0/8"), "proxy_header": True}
    async with a_gateway(a_route(), **options) as gateway, FakeWorker().serving(gateway):
        header = b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 80\r\n"
        assert await answer(gateway, before=header) == b"HTTP/1.1 400 Bad Request"
        assert not waiting(gateway).keys() - {"127.0.0.1"}
        async with call(gateway, key=KEY) as caller:
            await caller.send("hello")
            assert await caller.recv() == "hello"
        assert (await refused(call(gateway, key="wrong"))).status_code == 401
