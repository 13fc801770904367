"""TLS on the callers' port, over real sockets: the relay, what breaks off, renewal, and who is known by a certificate."""

import asyncio
import contextlib
import socket
import ssl
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_rig import (
    AGENT,
    KEY,
    SECONDS,
    UNHURRIED,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    closed,
    events,
    live_call,
    metric,
    on_uvloop,
    refused,
    until,
)
from test_tls import Mount, certificate_of
from tls_rig import Pki
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from trunkline_runtime.contract import CLIENT_SECRETS_PATH, Route
from trunkline_runtime.gateway.access.caller_tls import CallersTls, ClientCertificates, name_in
from trunkline_runtime.gateway.access.doorstep import Bounds
from trunkline_runtime.gateway.access.proxies import Proxies
from trunkline_runtime.gateway.process import Running
from trunkline_runtime.tls import TlsError

HOLDER = "spiffe://shop.example/ns/shop/sa/desk"


def client(pki: Pki, shown: str = "") -> ssl.SSLContext:
    """A caller's, as the standard library makes it; `shown` is the file of its certificate."""
    context = ssl.create_default_context(cadata=pki.ca)
    if shown:
        context.load_cert_chain(pki.folder / f"{shown}.crt", pki.folder / f"{shown}.key")
    return context


@pytest.fixture
def mount(tmp_path: Path, pki: Pki) -> Mount:
    folder = tmp_path / "mount"
    folder.mkdir()
    found = Mount(folder)
    found.swap(*pki.pem("calls"))
    return found


@contextlib.asynccontextmanager
async def secured(mount: Mount, *routes: Route, **options: Any) -> AsyncIterator[Running]:
    """A gateway whose callers come by TLS."""
    clients = options.pop("clients", None)
    tls = CallersTls(mount.folder, clients)
    async with a_gateway(*(routes or (a_route(),)), calls_tls=tls, **options) as gateway:
        yield gateway


# --- the relay -------------------------------------------------------------------------------------------


def test_a_call_by_tls_is_like_any_other(pki: Pki, mount: Mount) -> None:
    @on_uvloop
    async def run() -> None:
        async with secured(mount) as gateway, FakeWorker().serving(gateway) as worker:
            async with call(gateway, ssl=client(pki)) as caller:
                for message in ("hello", b"\0" * 3840, "x" * 400_000, bytes(500_000)):
                    await caller.send(message)
                    assert await caller.recv() == message
                await (await caller.ping())
            assert caller.close_code == 1000
            await until(lambda: bool(worker.closes))
            assert worker.closes[-1][0] == 1000
            for said, code in (("close 4000 bye", 4000), ("die", 1011)):
                async with call(gateway, ssl=client(pki)) as caller:
                    await caller.send("hello")
                    assert (
                        await caller.recv() == "hello"
                    )  # from here on it is given no other worker
                    await caller.send(said)
                    assert (await closed(caller))[0] == code
            await until(lambda: not gateway.gateway.holdings.connections)
            assert gateway.gateway._reception._doorstep.waiting == 0

    run()


def test_a_caller_of_tls_1_2_is_served_and_an_older_one_is_not(pki: Pki, mount: Mount) -> None:
    @on_uvloop
    async def run() -> None:
        async with secured(mount) as gateway, FakeWorker().serving(gateway):
            older = client(pki)
            older.maximum_version = ssl.TLSVersion.TLSv1_2
            async with call(gateway, ssl=older) as caller:
                assert caller.transport.get_extra_info("ssl_object").version() == "TLSv1.2"
                await caller.send("hello")
                assert await caller.recv() == "hello"

    run()
    assert CallersTls(mount.folder).context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_plain_answer_by_tls_is_whole_and_ends_with_a_goodbye(pki: Pki, mount: Mount) -> None:
    """`close_notify`: without it a client cannot tell an answer from a part of one."""

    @on_uvloop
    async def run() -> None:
        async with secured(mount) as gateway:
            answer = await refused(call(gateway, key="wrong", ssl=client(pki)))
            assert (answer.status_code, b"wrong key" in (answer.body or b"")) == (401, True)

            def visit() -> bytes:
                with (
                    socket.create_connection(("127.0.0.1", gateway.port), SECONDS) as plain,
                    client(pki).wrap_socket(
                        plain, server_hostname="127.0.0.1", suppress_ragged_eofs=False
                    ) as link,
                ):
                    link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                    found = b""
                    while chunk := link.recv(4096):  # raises SSLEOFError without the goodbye
                        found += chunk
                    return found

            assert b" 426 " in await asyncio.to_thread(visit)
            await until(lambda: not gateway.gateway.holdings.connections)

    run()


def test_a_secret_is_minted_by_tls(pki: Pki, mount: Mount) -> None:
    @on_uvloop
    async def run() -> None:
        route = a_route(access={**a_route()["access"], "mintKey": "m" * 64})
        async with secured(mount, route) as gateway, FakeWorker().serving(gateway):
            async with httpx.AsyncClient(verify=client(pki), trust_env=False) as http:
                url = f"https://127.0.0.1:{gateway.port}{CLIENT_SECRETS_PATH}"
                body = {"session": {"type": "realtime", "model": "echo"}}
                bearer = {"Authorization": f"Bearer {KEY}"}
                answer = await http.post(url, json=body, headers=bearer, timeout=SECONDS)
            assert answer.status_code == 200
            async with call(gateway, key=answer.json()["value"], ssl=client(pki)) as caller:
                await caller.send("hello")
                assert await caller.recv() == "hello"

    run()


def test_a_caller_that_reads_nothing_holds_little_and_is_cut_off(pki: Pki, mount: Mount) -> None:
    @on_uvloop
    async def run() -> None:
        patience = UNHURRIED.__class__(answer=10, stall=1.0)
        async with secured(mount, patience=patience) as gateway:
            async with FakeWorker().serving(gateway) as worker:
                caller = await call(gateway, ssl=client(pki))
                caller.transport.pause_reading()
                await caller.send("flood 30000000")
                await until(lambda: live_call(gateway)._jammed)
                transport = live_call(gateway)._transport
                assert transport.get_write_buffer_size() < 2**20
                await until(lambda: not worker.live)
                caller.transport.abort()
            await until(lambda: not gateway.gateway.holdings.connections)

    run()


def test_a_slow_worker_holds_a_tls_caller_back(pki: Pki, mount: Mount) -> None:
    """All that the caller sends arrives, in its order, though nobody read for a while."""

    @on_uvloop
    async def run() -> None:
        async with (
            secured(mount) as gateway,
            FakeWorker().serving(gateway),
            call(gateway, ssl=client(pki)) as caller,
        ):
            live = live_call(gateway)
            live.pause()
            sent = [bytes([number]) * 100_000 for number in range(20)]
            sending = asyncio.create_task(_send(caller, sent))
            tls = live._transport.get_extra_info("uvloop.sslproto")
            await until(lambda: bool(tls) and not sending.done())
            live.resume()
            assert [await caller.recv() for _ in sent] == sent
            await sending

    async def _send(caller: Any, messages: list[bytes]) -> None:
        for message in messages:
            await caller.send(message)

    run()


# --- what breaks off -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", "fin", "half a record"])
def test_a_caller_that_breaks_off_without_a_goodbye_frees_its_slot(
    pki: Pki, mount: Mount, how: str
) -> None:
    @on_uvloop
    async def run() -> None:
        async with secured(mount) as gateway, FakeWorker().serving(gateway) as worker:
            caller = await call(gateway, ssl=client(pki))
            await caller.send("hello")
            assert await caller.recv() == "hello"
            plain = socket.socket(fileno=_duplicate(caller.transport))
            match how:
                case "reset":
                    caller.transport.abort()
                case "fin":
                    plain.shutdown(socket.SHUT_WR)
                case "half a record":
                    plain.send(b"\x17\x03\x03\x40\x00half")
                    plain.shutdown(socket.SHUT_WR)
            plain.close()
            await until(lambda: not worker.live)
            await until(lambda: not gateway.gateway.holdings.connections)
            caller.transport.abort()
            assert gateway.gateway.load()["agents"][AGENT]["calls"] == 0

    run()


def _duplicate(transport: asyncio.Transport) -> int:
    return socket.dup(transport.get_extra_info("socket").fileno())


def test_rubbish_within_a_call_ends_it(pki: Pki, mount: Mount) -> None:
    @on_uvloop
    async def run() -> None:
        async with secured(mount) as gateway, FakeWorker().serving(gateway) as worker:
            caller = await call(gateway, ssl=client(pki))
            plain = socket.socket(fileno=_duplicate(caller.transport))
            plain.send(b"GET / HTTP/1.1\r\n\r\n")
            plain.close()
            await until(lambda: not worker.live)
            await until(lambda: not gateway.gateway.holdings.connections)
            caller.transport.abort()

    run()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "tls"),
        (b"\x16\x03\x01\xff\xff", "tls"),
        (b"\x16\x03\x01", "gone"),
        (b"", "gone"),
        (b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n", "tls"),
    ],
)
def test_what_is_no_handshake_is_closed_and_counted(
    pki: Pki, mount: Mount, said: bytes, why: str
) -> None:
    @on_uvloop
    async def run() -> None:
        async with secured(mount) as gateway:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(said)
            writer.write_eof()
            async with asyncio.timeout(SECONDS):
                with contextlib.suppress(ConnectionError):
                    assert b"HTTP" not in await reader.read()
            writer.close()
            await until(lambda: gateway.gateway._reception._doorstep.waiting == 0)
            assert await metric(gateway, "trunkline_refused_connections_total", why=why) == 1
            assert (await refused(call(gateway, key="x", ssl=client(pki)))).status_code == 401

    run()


def test_handshakes_that_trickle_are_bounded_by_address_and_by_time(pki: Pki, mount: Mount) -> None:
    @on_uvloop
    async def run() -> None:
        bounds = Bounds(waiting_per_address=5)
        async with secured(mount, bounds=bounds) as gateway, FakeWorker().serving(gateway):
            slow = [await asyncio.open_connection("127.0.0.1", gateway.port) for _ in range(5)]
            for _, writer in slow:
                writer.write(b"\x16\x03\x01")  # the first bytes of a ClientHello
            await until(lambda: gateway.gateway._reception._doorstep.waiting == 5)
            # One more of this address costs no handshake: it is closed without a word.
            with pytest.raises((WebSocketException, OSError)):
                await call(gateway, ssl=client(pki))
            assert await metric(gateway, "trunkline_calls_total", outcome="limited") == 1
            async with asyncio.timeout(SECONDS):
                ends = await asyncio.gather(*(reader.read() for reader, _ in slow))
            assert ends == [b""] * 5
            await until(lambda: gateway.gateway._reception._doorstep.waiting == 0)
            assert await metric(gateway, "trunkline_refused_connections_total", why="late") == 5
            async with call(gateway, ssl=client(pki)) as caller:
                await caller.send("hello")
                assert await caller.recv() == "hello"
            for _, writer in slow:
                writer.close()

    run()


def test_a_gateway_that_leaves_tells_its_tls_callers_and_waits_for_no_handshake(
    pki: Pki, mount: Mount
) -> None:
    @on_uvloop
    async def run() -> None:
        async with secured(mount) as gateway, FakeWorker().serving(gateway):
            caller = await call(gateway, ssl=client(pki))
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            await until(lambda: gateway.gateway._reception._doorstep.waiting == 1)
            live_call(gateway).restart()
            assert (await closed(caller))[0] == 1012
        async with asyncio.timeout(SECONDS):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()

    run()


# --- renewal ---------------------------------------------------------------------------------------------


def test_a_renewed_certificate_is_served_to_the_next_caller(pki: Pki, mount: Mount) -> None:
    """And a broken one is not: the one before stays, the log and a metric say so."""

    @on_uvloop
    async def run() -> None:
        first = pki.pem("calls-first")
        mount.swap(*first)
        async with secured(mount) as gateway, FakeWorker().serving(gateway):
            live = await call(gateway, ssl=client(pki))
            old = certificate_of(live)
            ends = await metric(gateway, "trunkline_certificate_ends_timestamp_seconds")
            assert ends > 1_700_000_000
            with events("trunkline.gateway") as lines:
                for broken in ((pki.pem("calls-half")[0], first[1]), (first[0][:100], first[1])):
                    mount.swap(*broken)
                    await until(lambda: any("stays in use" in line["message"] for line in lines))
                    unusable = await metric(gateway, "trunkline_certificate_unusable", port="calls")
                    assert unusable == 1
                    async with call(gateway, ssl=client(pki)) as caller:
                        assert certificate_of(caller) == old
                    lines.clear()
                mount.swap(*pki.pem("calls-second"))
                await until(lambda: any("renewed" in line["message"] for line in lines))
            assert await metric(gateway, "trunkline_certificate_unusable", port="calls") == 0
            async with call(gateway, ssl=client(pki)) as caller:
                assert certificate_of(caller) != old
            await live.send("still here")
            assert await live.recv() == "still here"
            await live.close()

    run()


def test_files_that_make_no_sense_are_refused_at_the_start(
    pki: Pki, mount: Mount, tmp_path: Path
) -> None:
    empty = tmp_path / "ca.crt"
    empty.write_text("")
    with pytest.raises(TlsError, match="no certificate in PEM"):
        CallersTls(mount.folder, ClientCertificates(ca=empty))
    with pytest.raises(TlsError, match="cannot be read"):
        CallersTls(mount.folder, ClientCertificates(ca=tmp_path / "missing"))
    with pytest.raises(TlsError, match=r"tls\.crt cannot be read"):
        CallersTls(tmp_path)
    assert pki.pem("calls")[1].decode() not in repr(CallersTls(mount.folder))


# --- certificates of callers -----------------------------------------------------------------------------


@pytest.fixture
def clients(pki: Pki) -> ClientCertificates:
    pki.authority.issue("desk", "CN=desk", names=[HOLDER])
    pki.authority.issue("other", "CN=other", names=["spiffe://shop.example/other"])
    return ClientCertificates(ca=pki.folder / "ca.crt")


def holding(*holders: str, **access: Any) -> Route:
    return a_route(
        access={**a_route()["access"], "mintKey": "m" * 64, "holders": [*holders], **access}
    )


def test_the_holder_of_a_certificate_is_a_tenant(
    pki: Pki, mount: Mount, clients: ClientCertificates
) -> None:
    @on_uvloop
    async def run() -> None:
        async with (
            secured(mount, holding(HOLDER), clients=clients) as gateway,
            FakeWorker().serving(gateway),
        ):
            with events("trunkline.calls") as lines:
                async with call(gateway, key=None, ssl=client(pki, "desk")) as caller:
                    await caller.send("hello")
                    assert await caller.recv() == "hello"
                await until(lambda: lines[-1]["message"] == "ended")
            assert lines[-1]["tenant"] == HOLDER
            assert lines[-1]["caller"]
            other = await refused(call(gateway, key=None, ssl=client(pki, "other")))
            assert other.status_code == 401
            name = "trunkline_refused_credentials_total"
            assert await metric(gateway, name, why="certificate") == 1
            assert (await refused(call(gateway, key=None, ssl=client(pki)))).status_code == 401
            # Whoever shows a key is the key's tenant, whatever certificate carries it.
            with events("trunkline.calls") as lines:
                async with call(gateway, ssl=client(pki, "other")):
                    pass
                await until(lambda: lines[-1]["message"] == "ended")
            assert lines[-1]["tenant"] == "test"

    run()


def test_an_agent_that_asks_for_no_certificate_takes_none_for_a_key(
    pki: Pki, mount: Mount, clients: ClientCertificates
) -> None:
    @on_uvloop
    async def run() -> None:
        async with secured(mount, clients=clients) as gateway:
            answer = await refused(call(gateway, key=None, ssl=client(pki, "desk")))
            assert answer.status_code == 401

    run()


def test_a_secret_falls_with_the_certificate_that_it_came_from(
    pki: Pki, mount: Mount, clients: ClientCertificates
) -> None:
    @on_uvloop
    async def run() -> None:
        async with (
            secured(mount, holding(HOLDER), clients=clients) as gateway,
            FakeWorker().serving(gateway),
        ):
            async with httpx.AsyncClient(verify=client(pki, "desk"), trust_env=False) as http:
                url = f"https://127.0.0.1:{gateway.port}{CLIENT_SECRETS_PATH}"
                body = {"session": {"type": "realtime", "model": "echo"}}
                secret = (await http.post(url, json=body, timeout=SECONDS)).json()["value"]
            async with call(gateway, key=secret, ssl=client(pki)):
                pass
            from gateway_rig import give

            give(gateway, holding("spiffe://shop.example/other"), epoch=2)
            assert (await refused(call(gateway, key=secret, ssl=client(pki)))).status_code == 401

    run()


def test_a_certificate_that_is_required_and_missing_or_of_a_stranger_ends_the_handshake(
    pki: Pki, mount: Mount, clients: ClientCertificates, tmp_path: Path
) -> None:
    folder = tmp_path / "stranger"
    folder.mkdir()
    stranger = Pki(folder)
    required = ClientCertificates(ca=clients.ca, required=True)

    @on_uvloop
    async def run() -> None:
        async with secured(mount, clients=required) as gateway, FakeWorker().serving(gateway):
            forged = client(pki)
            forged.load_cert_chain(folder / "tls.crt", folder / "tls.key")
            for tls in (client(pki), forged):
                with pytest.raises((WebSocketException, OSError)) as failed:
                    await call(gateway, ssl=tls)
                assert not isinstance(failed.value, InvalidStatus | ConnectionClosed)
            name = "trunkline_refused_connections_total"
            await until(lambda: gateway.gateway._reception._doorstep.waiting == 0)
            assert await metric(gateway, name, why="certificate") == 2
            # It takes no one's place: this agent wants a key besides.
            answer = await refused(call(gateway, key=None, ssl=client(pki, "desk")))
            assert answer.status_code == 401
            async with call(gateway, ssl=client(pki, "desk")) as caller:
                await caller.send("hello")
                assert await caller.recv() == "hello"

    run()
    assert stranger.ca != pki.ca


def test_another_authority_is_taken_without_a_restart(
    pki: Pki, mount: Mount, clients: ClientCertificates, tmp_path: Path
) -> None:
    """And the one before is then good no longer."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    Pki(folder)
    ca = tmp_path / "clients.crt"
    ca.write_bytes(clients.ca.read_bytes())
    tls = CallersTls(mount.folder, ClientCertificates(ca=ca, required=True))
    before = len(tls.context.get_ca_certs())
    ca.write_bytes((folder / "ca.crt").read_bytes())
    old = tls.context
    assert tls.refresh()
    assert (tls.context is old, len(tls.context.get_ca_certs())) == (False, before)
    ca.write_text("broken")
    kept = tls.context
    with pytest.raises(TlsError):
        tls.refresh()
    assert tls.context is kept


@pytest.mark.parametrize(
    ("certificate", "name"),
    [
        (None, ""),
        ({}, ""),
        ({"subject": ((("commonName", "desk"),),)}, "desk"),
        ({"subject": ((("commonName", "desk"),),), "subjectAltName": (("DNS", "a.b"),)}, "a.b"),
        ({"subjectAltName": (("DNS", "a.b"), ("URI", "spiffe://x/y"))}, "spiffe://x/y"),
        ({"subject": ((("commonName", "x" * 129),),)}, ""),
        ({"subject": ((("commonName", "a\nb"),),)}, ""),
    ],
)
def test_who_a_certificate_names(certificate: dict[str, Any] | None, name: str) -> None:
    assert name_in(certificate) == name


# --- behind a balancer -----------------------------------------------------------------------------------


def test_a_balancers_header_stands_before_tls(pki: Pki, mount: Mount) -> None:
    @on_uvloop
    async def run() -> None:
        proxies = Proxies.parse("127.0.0.1/32")
        async with secured(mount, proxies=proxies, proxy_header=True) as gateway:

            def visit() -> bytes:
                with socket.create_connection(("127.0.0.1", gateway.port), SECONDS) as plain:
                    plain.sendall(b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 443\r\n")
                    with client(pki).wrap_socket(plain, server_hostname="127.0.0.1") as link:
                        link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                        return link.recv(4096)

            assert b" 426 " in await asyncio.to_thread(visit)
            assert "203.0.113.9" in gateway.gateway._reception._doorstep._addresses

    run()


def test_a_probe_trusts_the_very_certificate_that_is_served(pki: Pki, mount: Mount) -> None:
    """Under a name that is in it, wherever the probe has found the gateway."""
    mount.swap(*pki.pem("calls-named", "calls.example"))

    async def probe(gateway: Running, *options: str) -> tuple[int, str]:
        url = f"https://127.0.0.2:{gateway.port}"
        command = ["-m", "trunkline_runtime", "probe", "--agent", "x", "--expect-refusal"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, "--gateway", url, *options, stdout=PIPE, stderr=STDOUT
        )
        said, _ = await process.communicate()
        return process.returncode or 0, said.decode()

    @on_uvloop
    async def run() -> None:
        async with secured(mount, host="0.0.0.0") as gateway:
            ca = ("--ca", str(mount.folder / "tls.crt"))
            assert "answers: 401" in (await probe(gateway, *ca, "--server-name=calls.example"))[1]
            for options in (ca, ("--server-name=calls.example",)):
                assert (await probe(gateway, *options))[0] == 1
            assert (await probe(gateway, "--ca", str(mount.folder / "tls.key")))[0] == 2

    run()
