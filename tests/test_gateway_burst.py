"""Calls past warm capacity: sessions at a Modal server, within the deadline, and nothing left behind."""

import asyncio
import datetime
import ipaddress
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from gateway_rig import (
    AGENT,
    PROXY_TOKEN,
    TICKET_KEY,
    FakeModal,
    FakeOperator,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    closed,
    events,
    give,
    metric,
    on_uvloop,
    refused,
    until,
)

from trunkline_runtime.contract import REALTIME_PATH, Route, WarmRung
from trunkline_runtime.gateway.process import Running

WARM = WarmRung(kind="warm")


def with_burst(*modals: FakeModal, **changes: Any) -> Route:
    names = ["us-east", "eu-west"]
    rungs = [modal.rung(name=name) for modal, name in zip(modals, names, strict=False)]
    return a_route(rungs=[WARM, *rungs], **changes)


def agent_load(gateway: Running) -> dict[str, Any]:
    return {**gateway.gateway.load()["agents"][AGENT]}


@on_uvloop
async def test_the_call_past_warm_capacity_goes_to_a_session_that_ends_with_it() -> None:
    async with FakeModal().serving() as modal, a_gateway(with_burst(modal)) as gateway:
        async with FakeWorker(slots=1).serving(gateway) as worker, call(gateway) as first:
            with events("trunkline.calls") as lines:
                async with call(gateway, query="&x=1") as second:
                    for caller in (first, second):
                        await caller.send("hi")
                        assert await caller.recv() == "hi"
                    assert len(worker.live) == 1
                    assert len(modal.sessions) == 1
                    assert agent_load(gateway)["burst"] == 1
                    assert agent_load(gateway)["calls"] == 2
            await until(lambda: not modal.sessions and not agent_load(gateway)["burst"])
            assert len(modal.ended) == 1
            (placed,) = (line for line in lines if line["message"] == "placed")
            assert placed["rung"] == "burst/us-east"
            assert placed["passed_over"][0]["rung"] == "warm"
            assert await metric(gateway, "trunkline_burst_spills_total", agent=AGENT) == 1
        (start,) = modal.starts
        assert start["Authorization"] == f"Bearer {PROXY_TOKEN}"
        assert start["x-idempotency-key"]
        (request,) = modal.requests
        assert request.path == f"{REALTIME_PATH}?model={AGENT}&x=1"
        assert modal.first == [{"type": "trunkline.settings", "settings": {"greeting": "Hello."}}]
        (ticket,) = modal.tickets
        assert set(ticket) == {"aud", "call", "jti", "iat", "exp"}
        assert 0 < ticket["exp"] - ticket["iat"] <= 30
        assert abs(ticket["iat"] - time.time()) < 60


@on_uvloop
async def test_a_slow_modal_is_left_at_its_deadline_and_what_it_starts_later_is_ended() -> None:
    async with FakeModal().serving() as modal:
        modal.start_seconds = 1.0
        route = a_route(rungs=[modal.rung(deadlineSeconds=0.3)])
        async with a_gateway(route) as gateway:
            answer = await refused(call(gateway))
            assert answer.status_code == 503
            load = agent_load(gateway)
            assert (load["burstFailures"], load["burst"]) == (1, 0)
            assert load["burstError"] == "Modal in us-east did not start a session in time"
            await until(lambda: len(modal.ended) == 1)
            assert not modal.sessions


@on_uvloop
async def test_the_answer_has_one_deadline_over_all_rungs() -> None:
    async with FakeModal().serving() as slow, FakeModal().serving() as never:
        slow.start_seconds = never.start_seconds = 3
        route = with_burst(slow, never, answerSeconds=0.4)
        async with a_gateway(route) as gateway:
            answer = await refused(call(gateway))
            assert answer.body.startswith(b"no slot of default/echo was free in time")
            assert not never.starts, "nothing was left for the second"
        assert len(slow.ended) == 1, "the gateway's end waits for what it has begun"


@pytest.mark.parametrize("fault", ["status", "refusing", "gone"])
def test_a_modal_that_fails_is_passed_over_and_told_of(fault: str) -> None:
    whys = {
        "status": "Modal in us-east has no container free for a session (HTTP 503)",
        "refusing": "Modal in us-east refused its data link with HTTP 403",
        "gone": "Modal in us-east cannot be reached: All connection attempts failed",
    }

    @on_uvloop
    async def run() -> None:
        async with FakeModal().serving() as bad, FakeModal().serving() as good:
            bad.status = 503 if fault == "status" else 200
            bad.refusing = fault == "refusing"
            route = with_burst(bad, good)
            if fault == "gone":
                assert bad._server is not None
                bad._server.close()
                await bad._server.wait_closed()
            async with a_gateway(route) as gateway:
                with events("trunkline.calls") as lines:
                    async with call(gateway) as caller:
                        await caller.send("hi")
                        assert await caller.recv() == "hi"
                        assert len(good.sessions) == 1
                placed = next(line for line in lines if line["message"] == "placed")
                assert placed["rung"] == "burst/eu-west"
                assert [step["rung"] for step in placed["passed_over"]] == ["warm", "burst/us-east"]
                await until(lambda: not good.sessions and not bad.sessions)
                assert agent_load(gateway)["burstFailures"] == 1
                assert agent_load(gateway)["burstError"] == "", "a success came after it"
                bad_only = a_route(rungs=[route["rungs"][1]], maxSeconds=60.0)
                give(gateway, bad_only)
                await refused(call(gateway))
                assert agent_load(gateway)["burstError"] == whys[fault]
                assert await metric(gateway, "trunkline_burst_failures_total", agent=AGENT) == 2

    run()


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (401, "does not know the proxy token (HTTP 401)"),
        (403, "does not let the proxy token into the app's environment (HTTP 403)"),
        (404, "has no such server: its app is stopped (HTTP 404)"),
        (429, "has reached a limit of the workspace (HTTP 429)"),
        (503, "has no container free for a session (HTTP 503)"),
        (500, "refused a session (HTTP 500)"),
    ],
)
def test_each_refusal_of_modal_has_its_reason(status: int, why: str) -> None:
    @on_uvloop
    async def run() -> None:
        async with FakeModal().serving() as bad, FakeModal().serving() as good:
            bad.status = status
            async with a_gateway(with_burst(bad, good)) as gateway:
                with events("trunkline.calls") as lines:
                    async with call(gateway):
                        pass
                (placed,) = (line for line in lines if line["message"] == "placed")
                assert placed["rung"] == "burst/eu-west"
                assert [step["why"] for step in placed["passed_over"]] == ["no free slot", why]
                give(gateway, a_route(rungs=[bad.rung()]), epoch=2)
                await refused(call(gateway))
                assert agent_load(gateway)["burstError"] == f"Modal in us-east {why}"
                assert agent_load(gateway)["burstLimited"] == (2 if status == 429 else 0)

    run()


@on_uvloop
async def test_a_caller_who_leaves_while_a_session_starts_leaves_none() -> None:
    async with FakeModal().serving() as modal, a_gateway(with_burst(modal)) as gateway:
        modal.start_seconds = 0.5
        waiting = asyncio.ensure_future(call(gateway).__aenter__())
        await until(lambda: bool(modal.starts))
        assert agent_load(gateway)["burst"] == 1
        waiting.cancel()
        await until(lambda: len(modal.ended) == 1)
        assert not modal.sessions
        await until(lambda: not agent_load(gateway)["burst"])
        assert agent_load(gateway)["burstFailures"] == 0
        await until(lambda: not gateway.gateway.holdings.connections)


@on_uvloop
async def test_a_container_that_dies_in_a_call_is_a_lost_call_and_its_session_is_ended() -> None:
    async with FakeModal().serving() as modal, a_gateway(with_burst(modal)) as gateway:
        caller = await call(gateway)
        await caller.send("a word")
        assert await caller.recv() == "a word"
        await caller.send("die")
        assert await closed(caller) == (1011, "worker lost: call again")
        await until(lambda: len(modal.ended) == 1)
        load = agent_load(gateway)
        assert (load["lost"], load["burst"], load["calls"]) == (1, 0, 0)


@on_uvloop
async def test_sessions_are_ended_before_the_gateway_is_gone() -> None:
    async with FakeModal().serving() as modal:
        async with a_gateway(with_burst(modal)) as gateway:
            callers = [await call(gateway) for _ in range(5)]
            assert len(modal.sessions) == 5
        assert not modal.sessions
        assert [await closed(caller) for caller in callers] == [
            (1012, "the gateway restarts: call again")
        ] * 5


@on_uvloop
async def test_a_burst_is_told_at_once() -> None:
    async with FakeModal().serving() as modal, a_gateway(with_burst(modal)) as gateway:
        modal.start_seconds = 0.7  # shorter than a second, in which a load would come anyway
        async with FakeOperator().linked(gateway) as operator:
            await until(lambda: bool(operator.loads))
            heard = False
            for _ in range(3):  # noise may spoil two
                waiting = asyncio.ensure_future(call(gateway).__aenter__())
                await until(lambda: bool(operator.loads[-1]["agents"][AGENT]["burst"]))
                heard = heard or not waiting.done()
                await (await waiting).close()
                await until(lambda: not operator.loads[-1]["agents"][AGENT]["burst"])
            assert heard


@on_uvloop
async def test_no_token_or_key_stands_in_a_log() -> None:
    async with FakeModal().serving() as modal, a_gateway(with_burst(modal)) as gateway:
        with events("trunkline") as lines, events("httpx") as requests:
            await (await call(gateway)).close()
            modal.status = 500
            await refused(call(gateway))
            await until(lambda: not modal.sessions)
        text = repr(lines) + repr([line["message"] for line in requests])
        assert lines
        for secret in (PROXY_TOKEN, TICKET_KEY, *modal.ended):
            assert secret not in text


def a_certificate(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that signs itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "modal of the tests")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "modal.pem"
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + certificate.public_bytes(Encoding.PEM)
    )
    return path


@on_uvloop
async def test_a_real_modal_speaks_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(path)
    async with FakeModal().serving(tls) as modal:
        async with a_gateway(with_burst(modal)) as gateway:
            await refused(call(gateway))
            assert "CERTIFICATE_VERIFY_FAILED" in agent_load(gateway)["burstError"]
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        async with a_gateway(with_burst(modal)) as gateway:
            caller = await call(gateway)
            for message in ("hi", b"\x01" * 300_000):
                await caller.send(message)
                assert await caller.recv() == message
            await caller.close()
            await until(lambda: len(modal.ended) == 1)
            assert modal.first[-1]["type"] == "trunkline.settings"
            caller = await call(gateway)
            await caller.send("a word")
            assert await caller.recv() == "a word"
            await caller.send("die")
            assert await closed(caller) == (1011, "worker lost: call again")
            await until(lambda: len(modal.ended) == 2)
