"""TLS on the links inside the cluster: who is believed, what is said of who is not, and renewal."""

import asyncio
import contextlib
import logging
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_rig import (
    AGENT,
    OPERATOR_TOKEN,
    SECONDS,
    WORKER_KEY,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    dial_control,
    events,
    on_uvloop,
    refused,
    until,
    worker_tls,
)
from test_worker_config import MODAL, POD
from tls_rig import Links, Pki
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import serve
from websockets.exceptions import WebSocketException
from worker_rig import worker_config

from trunkline_runtime.contract import (
    ENV_OPERATOR_TOKEN,
    ENV_TLS_CA,
    ENV_TLS_CERT,
    ENV_TLS_KEY,
    WORKERS_PATH,
    worker_server_name,
)
from trunkline_runtime.engine.loopback import LoopbackEngine
from trunkline_runtime.gateway.process import Running
from trunkline_runtime.gateway.routes_reader import RouteError, routes_from
from trunkline_runtime.tls import MountedIdentity, TlsError, WorkerTls, proving, trusting
from trunkline_runtime.worker.config import ConfigError, WorkerConfig
from trunkline_runtime.worker.control import Endpoint
from trunkline_runtime.worker.host import WorkerHost

OTHER = "other/agent"


@pytest.fixture
def secure(pki: Pki) -> Iterator[Pki]:
    """The rig's links are TLS."""
    Links.pki = pki
    yield pki
    Links.pki = None


@pytest.fixture
def stranger(tmp_path: Path) -> Pki:
    """Another installation's."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    return Pki(folder)


# --- what is given -------------------------------------------------------------------------------------


def test_an_authority_is_read_once(pki: Pki) -> None:
    assert trusting(pki.ca) is trusting(pki.ca)
    assert trusting(pki.ca).minimum_version is ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize("text", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_what_is_no_authority_is_refused(text: str) -> None:
    with pytest.raises(TlsError, match="no certificate in PEM"):
        trusting(text)


def test_a_key_that_does_not_fit_is_refused(pki: Pki) -> None:
    (certificate, key), (_, other) = pki.pem("one"), pki.pem("two")
    proving(certificate, key)
    with pytest.raises(TlsError, match="the key does not belong to the certificate"):
        proving(certificate, other)
    with pytest.raises(TlsError, match="not a certificate and a key in PEM"):
        proving(certificate, b"")
    with pytest.raises(TlsError, match="not a certificate and a key in PEM"):
        proving(b"", key)


def test_no_key_stays_behind_on_a_disk(pki: Pki) -> None:
    open_files = len(os.listdir("/proc/self/fd"))
    proving(*pki.pem("brief"))
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_two_agents_never_share_a_name() -> None:
    names = {worker_server_name(agent) for agent in ("a/b.c", "c/b.a", "a/b", "b/a")}
    assert len(names) == 4
    assert worker_server_name("ns/desk") == "desk.ns.worker.trunkline.internal"


def test_a_worker_takes_all_three_texts_or_none(pki: Pki) -> None:
    given = pki.environment("default/echo")
    config = WorkerConfig.from_environment(POD | given)
    assert config.tls is not None
    assert config.tls.gateways is trusting(pki.ca)
    assert given[ENV_TLS_KEY] not in repr(config)
    assert WorkerConfig.from_environment(POD).tls is None
    for name in given:
        with pytest.raises(ConfigError, match=f"set {name} too"):
            WorkerConfig.from_environment(POD | given | {name: ""})
    for name, text in ((ENV_TLS_CA, ENV_TLS_CA), (ENV_TLS_KEY, ENV_TLS_CERT)):
        with pytest.raises(ConfigError, match=f"set {text}"):
            WorkerConfig.from_environment(POD | given | {name: "junk"})
    with pytest.raises(ConfigError, match="is for pods"):
        WorkerConfig.from_environment(MODAL | given)


def test_a_route_with_a_broken_authority_is_refused(pki: Pki) -> None:
    routes = {"type": "routes", "version": 1, "epoch": 1, "routes": [a_route(workerTls=pki.ca)]}
    assert routes_from(routes).by_agent[AGENT].worker_tls is trusting(pki.ca)
    routes["routes"] = [a_route(workerTls="junk")]
    with pytest.raises(RouteError, match=r"routes\[0\]\.workerTls must be the CA"):
        routes_from(routes)


@pytest.mark.parametrize("state", ["nothing", "no key", "junk"])
def test_a_gateway_without_its_certificate_does_not_start(
    pki: Pki, tmp_path: Path, state: str
) -> None:
    if state != "nothing":
        shutil.copy(pki.folder / "tls.crt", tmp_path)
    if state == "junk":
        (tmp_path / "tls.key").write_text("junk")
    command = [sys.executable, "-m", "trunkline_runtime", "gateway", f"--control-tls={tmp_path}"]
    environment = os.environ | {ENV_OPERATOR_TOKEN: OPERATOR_TOKEN, "NO_COLOR": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "--control-tls: " in ended.stderr
    assert str(tmp_path) in ended.stderr
    assert "Traceback" not in ended.stderr


# --- renewal -------------------------------------------------------------------------------------------


class Mount:
    """A directory as the kubelet mounts a Secret: the files are links through `..data`, which is swapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def swap(self, certificate: bytes, key: bytes) -> None:
        self._count += 1
        new = self.folder / f"..{self._count}"
        new.mkdir()
        (new / "tls.crt").write_bytes(certificate)
        (new / "tls.key").write_bytes(key)
        (self.folder / "..new").symlink_to(new.name)
        (self.folder / "..new").rename(self.folder / "..data")
        for name in ("tls.crt", "tls.key"):
            with contextlib.suppress(FileExistsError):
                (self.folder / name).symlink_to(f"..data/{name}")


@pytest.fixture
def mount(tmp_path: Path) -> Mount:
    folder = tmp_path / "mount"
    folder.mkdir()
    return Mount(folder)


def test_a_pair_that_cannot_be_used_leaves_the_one_before(pki: Pki, mount: Mount) -> None:
    first, second = pki.pem("first"), pki.pem("second")
    mount.swap(*first)
    identity = MountedIdentity(mount.folder)
    assert not identity.refresh()
    mount.swap(second[0], first[1])
    with pytest.raises(TlsError, match="the key does not belong"):
        identity.refresh()
    mount.swap(*second)
    assert identity.refresh()
    (mount.folder / "..data").unlink()
    with pytest.raises(TlsError, match=r"must hold tls\.crt and tls\.key"):
        identity.refresh()


def certificate_of(link: ClientConnection) -> bytes:
    """The server's, in DER."""
    tls: ssl.SSLObject = link.transport.get_extra_info("ssl_object")
    return tls.getpeercert(binary_form=True) or b""


@on_uvloop
async def test_a_renewed_certificate_is_served_without_a_restart(secure: Pki, mount: Mount) -> None:
    """And one that is broken is not; links that are there do not notice."""
    before = secure.pem("before")
    mount.swap(*before)
    identity = MountedIdentity(mount.folder)
    async with (
        a_gateway(a_route(), control_tls=identity) as gateway,
        FakeWorker().serving(gateway) as worker,
    ):
        old = certificate_of(worker.links[0])
        with events("trunkline.gateway") as lines:
            mount.swap(secure.pem("half")[0], before[1])
            await until(lambda: any("stays in use" in line["message"] for line in lines))
            async with dial_control(gateway) as link:
                assert certificate_of(link) == old
            mount.swap(*secure.pem("after"))
            await until(lambda: any("renewed" in line["message"] for line in lines))
        async with dial_control(gateway) as link:
            assert certificate_of(link) != old
        assert worker.row(gateway)["boot"] == worker.boot
        async with call(gateway) as caller:
            await caller.send("hi")
            assert await caller.recv() == "hi"


# --- who is believed -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def a_worker(
    gateway: Running, tls: WorkerTls | None, name: str = "127.0.0.1"
) -> AsyncIterator[list[dict[str, Any]]]:
    """A real worker that dials; what it says of its links."""
    endpoint = Endpoint(name, gateway.control_port)
    config = worker_config(gateways=(endpoint,), worker_key=WORKER_KEY, ticket_key="", tls=tls)
    engine, stop = LoopbackEngine(slots=2), asyncio.Event()
    engine.load()
    engine.resume()
    with events("trunkline.control") as lines:
        running = asyncio.create_task(WorkerHost(config, engine).run(stop))
        try:
            yield lines
        finally:
            stop.set()
            await running
            engine.close()


async def first(lines: list[dict[str, Any]]) -> str:
    await until(lambda: bool(lines))
    return str(lines[0]["message"])


@on_uvloop
async def test_a_gateway_of_another_authority_is_told_from_ours(secure: Pki, stranger: Pki) -> None:
    async with (
        a_gateway(a_route(), control_tls=stranger.gateway) as gateway,
        a_worker(gateway, secure.worker(AGENT)) as lines,
    ):
        said = await first(lines)
        assert "its certificate is not from the CA in TRUNKLINE_TLS_CA" in said
        assert "mend the gateway's --control-tls" in said
        assert not gateway.gateway.load()["agents"][AGENT]["workers"]


@on_uvloop
async def test_a_gateway_under_another_name_is_told_which_name_is_missing(secure: Pki) -> None:
    async with (
        a_gateway(a_route(), control_host="127.0.0.7") as gateway,
        a_worker(gateway, secure.worker(AGENT), "127.0.0.7") as lines,
    ):
        assert "its certificate is not for 127.0.0.7: put one for that name" in await first(lines)


@pytest.mark.parametrize("gateway_has_it", [True, False])
def test_tls_on_one_side_only_is_said(pki: Pki, gateway_has_it: bool) -> None:
    @on_uvloop
    async def run() -> None:
        identity = pki.gateway if gateway_has_it else None
        async with a_gateway(a_route(), control_tls=identity) as gateway:
            tls = None if gateway_has_it else pki.worker(AGENT)
            async with a_worker(gateway, tls) as lines:
                ca, certificate = "this side TRUNKLINE_TLS_CA", "it the gateway's --control-tls"
                assert f"give {ca if gateway_has_it else certificate}" in await first(lines)

    run()


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\xff\xff", b""]
)
def test_what_is_no_handshake_is_closed_in_silence(
    pki: Pki, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    @on_uvloop
    async def run() -> None:
        async with a_gateway(a_route(), control_tls=pki.gateway) as gateway:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.control_port)
            writer.write(said)
            if not said:
                writer.write_eof()
            async with asyncio.timeout(SECONDS):
                with contextlib.suppress(ConnectionError):
                    assert b"HTTP" not in await reader.read()
            writer.close()
            # And the next one is served.
            with contextlib.suppress(WebSocketException):
                tls = trusting(pki.ca)
                url = f"wss://127.0.0.1:{gateway.control_port}{WORKERS_PATH}"
                async with connect(url, ssl=tls, proxy=None):
                    pass

    caplog.set_level(logging.WARNING)
    run()
    assert [record for record in caplog.records if record.exc_info] == []


@contextlib.asynccontextmanager
async def answering_as(agent: str, worker: FakeWorker) -> AsyncIterator[int]:
    """A worker's data port once more, with the certificate of some agent's workers."""
    tls = worker_tls(agent)
    async with serve(
        worker._talk, "127.0.0.1", 0, process_request=worker._claim, ssl=tls
    ) as server:
        yield next(iter(server.sockets)).getsockname()[1]


@on_uvloop
async def test_the_worker_of_another_agent_gets_no_call(secure: Pki) -> None:
    """It has a certificate of the same CA, and even this agent's key."""
    async with a_gateway(a_route()) as gateway, FakeWorker("impostor").serving(gateway) as impostor:
        async with answering_as(OTHER, impostor) as impostor.port, impostor.linked(gateway):
            with events("trunkline.calls") as lines:
                answer = await refused(call(gateway))
        assert answer.status_code == 503
        line = next(line for line in lines if line["message"] == "refused")
        (step,) = line["passed_over"]
        assert "could not prove who it is" in step["why"]
        assert worker_server_name(AGENT) in step["why"]
        assert impostor.requests == []
        await until(lambda: impostor.free == 4)


@on_uvloop
async def test_a_worker_that_answers_in_plain_gets_no_call(secure: Pki) -> None:
    async with a_gateway(a_route()) as gateway:
        plain = FakeWorker("plain")
        listener = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
        async with listener:
            plain.port = listener.sockets[0].getsockname()[1]
            async with plain.linked(gateway):
                answer = await refused(call(gateway))
        assert answer.status_code == 503
        await until(lambda: plain.free == 4)
