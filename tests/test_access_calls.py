"""Who gets a call, over real sockets: a gateway, an issuer's HTTP server, and stock clients."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import time
from typing import Any, cast

import httpx
import jwt
import pytest
from access_rig import (
    PRIVATE,
    STRANGER,
    Issuer,
    claims,
    jwk,
    jwks,
    jwt_access,
    tenants,
    token,
)
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from gateway_rig import (
    AGENT,
    KEY,
    SECONDS,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    closed,
    events,
    give,
    http,
    metric,
    on_uvloop,
    refused,
    routes_text,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.utils import base64url_encode
from openai import AsyncOpenAI
from websockets.exceptions import InvalidStatus

from trunkline_runtime.contract import CALL_HEADER, CLIENT_SECRETS_PATH, TICKETS_PATH, Route
from trunkline_runtime.gateway.access.doorstep import Bounds
from trunkline_runtime.gateway.access.issuers import Pulse
from trunkline_runtime.gateway.access.order import MAX_BODY_BYTES
from trunkline_runtime.gateway.access.proxies import Proxies
from trunkline_runtime.gateway.process import Running
from trunkline_runtime.gateway.routes_reader import routes_from

QUICK = Pulse(refresh=30, retry=(0.02, 0.1), refetch=0.3, fetch=5)
KEYS = a_route()["access"]["apiKeys"]
SECRET_WORDS = ("eyJ", "ek_", "tk_", KEY)


def with_jwt(issuer: Issuer | None = None, /, **access: Any) -> Route:
    """A route that takes the tokens of an issuer, or of one whose keys stand in it."""
    return a_route(access=jwt_access(issuer.uri if issuer else "", **access))


async def talks(gateway: Running, key: str | None, **options: Any) -> None:
    """A caller is answered, and heard."""
    async with call(gateway, key=key, **options) as caller:
        await caller.send("hello")
        assert await caller.recv() == "hello"


async def status(gateway: Running, key: str | None, **options: Any) -> int:
    return (await refused(call(gateway, key=key, **options))).status_code


async def keys_of(gateway: Running, issuer: Issuer) -> None:
    """Waits until the issuer's keys were read."""
    await until(lambda: gateway.gateway._reception._door.issuers.keys(issuer.uri) is not None)


async def post(
    gateway: Running, path: str, key: str | None = KEY, body: Any = None, **headers: str
) -> httpx.Response:
    """Asks for a secret or a ticket."""
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    body = {"session": {"type": "realtime", "model": "echo"}} if body is None else body
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with httpx.AsyncClient(trust_env=False, timeout=SECONDS) as client:
        url = f"http://127.0.0.1:{gateway.port}{path}"
        return await client.post(url, content=content, headers=headers)


async def minted(gateway: Running, path: str = CLIENT_SECRETS_PATH, **options: Any) -> str:
    answer = await post(gateway, path, **options)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["value"])


def keyed(**access: Any) -> Route:
    """A route with the rig's API key, from which secrets can be minted."""
    return a_route(access={**a_route()["access"], "mintKey": "m" * 64, **access})


# --- tokens ----------------------------------------------------------------------------------------------


@on_uvloop
async def test_a_token_opens_a_call_in_a_header_and_as_a_browsers_subprotocol() -> None:
    async with (
        Issuer().serving() as issuer,
        a_gateway(with_jwt(issuer), pulse=QUICK) as gateway,
        FakeWorker().serving(gateway) as worker,
    ):
        for algorithm in PRIVATE:
            await talks(gateway, token(algorithm))
        offers = ["realtime", f"openai-insecure-api-key.{token()}"]
        async with call(gateway, key=None, subprotocols=offers) as caller:
            assert caller.subprotocol == "realtime"
        assert not any("eyJ" in str(request.headers) for request in worker.requests)
        assert issuer.asked == 1


@on_uvloop
async def test_keys_may_stand_in_the_route_itself() -> None:
    async with a_gateway(with_jwt()) as gateway, FakeWorker().serving(gateway):
        await talks(gateway, token())
        assert await status(gateway, token(key=STRANGER)) == 401


@on_uvloop
async def test_keys_of_the_route_that_are_none_let_nobody_in_and_harm_no_other_agent() -> None:
    broken = jwt_access()
    broken["jwt"] = {**broken["jwt"], "jwks": "{}"}
    routes = a_route("default/other", access=broken), a_route()
    async with a_gateway(*routes) as gateway, FakeWorker().serving(gateway):
        await talks(gateway, KEY)
        assert await status(gateway, token(), agent="other") == 401


def public_key_as_secret() -> str:
    pem = PRIVATE["RS256"].public_key()
    secret = pem.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    head = base64url_encode(b'{"alg":"HS256","kid":"RS256"}') + b"."
    text = head + base64url_encode(json.dumps(claims()).encode())
    return f"{text.decode()}.{base64url_encode(hmac.digest(secret, text, 'sha256')).decode()}"


NOW = int(time.time())
ATTACKS: dict[str, tuple[dict[str, Any], int, str]] = {
    "nothing shown": ({"key": None}, 401, "nothing_shown"),
    "none": ({"key": jwt.encode(claims(), "", "none", {"kid": "RS256"})}, 401, "algorithm"),
    "HMAC with the public key": ({"key": public_key_as_secret()}, 401, "algorithm"),
    "expired": ({"key": token(exp=NOW - 100)}, 401, "expired"),
    "not yet valid": ({"key": token(nbf=NOW + 86_400)}, 401, "not_yet_valid"),
    "no expiry": ({"key": token(exp=None)}, 401, "claims"),
    "wrong audience": ({"key": token(aud="other")}, 401, "audience"),
    "wrong issuer": ({"key": token(iss="https://evil.example")}, 401, "issuer"),
    "a stranger's signature": ({"key": token(key=STRANGER)}, 401, "signature"),
    "its own key": (
        {"key": token(key=STRANGER, headers={"jwk": jwk(key=STRANGER)})},
        401,
        "signature",
    ),
    "unknown key": ({"key": token(kid="unknown")}, 401, "unknown_signing_key"),
    "no tenant": ({"key": token(org=None)}, 401, "claims"),
    "in the URL": ({"key": None, "query": f"&ticket={token()}"}, 401, "malformed"),
    "key in the URL": ({"key": None, "query": f"&ticket={KEY}"}, 401, "malformed"),
    "secret made up": ({"key": "ek_" + token()}, 401, "signature"),
    "longer than a header line": ({"key": token(pad="x" * 9000)}, 431, ""),
    "as long as a header line": ({"key": "eyJ" + "x" * 8000 + ".x.x"}, 401, "malformed"),
    "for another agent": ({"key": token(), "agent": "nobody"}, 401, "nothing_shown"),
    "wrong origin": ({"key": token(), "origin": "https://evil.example"}, 403, ""),
    "two origins": (
        {"key": token(), "headers": [("Origin", "https://a.example"), ("Origin", "null")]},
        400,
        "",
    ),
    "two keys": (
        {
            "key": None,
            "headers": [("Authorization", "Bearer x"), ("Authorization", f"Bearer {token()}")],
        },
        401,
        "unknown_key",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_each_with_its_status(
    attack: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    options, expected, why = ATTACKS[attack]

    @on_uvloop
    async def run() -> None:
        origins = {"origins": ["https://a.example"]}
        async with (
            Issuer().serving() as issuer,
            a_gateway(with_jwt(issuer, **origins), pulse=QUICK) as gateway,
            FakeWorker().serving(gateway) as worker,
        ):
            await keys_of(gateway, issuer)
            answer = await refused_raw(gateway, **options)
            assert answer.split(b" ", 2)[1] == str(expected).encode(), answer
            assert b"Connection: close" in answer
            assert not worker.requests
            if why:
                found = await metric(gateway, "trunkline_refused_credentials_total", why=why)
                assert found == 1, why
            assert not gateway.gateway._reception._door._verifiers or all(
                not verifier._good
                for verifier in gateway.gateway._reception._door._verifiers.values()
                if expected == 401
            )

    caplog.set_level(logging.DEBUG)
    run()
    logged = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    logged += "".join(capfd.readouterr())
    assert not [word for word in SECRET_WORDS if word in logged]


async def refused_raw(
    gateway: Running,
    key: str | None = None,
    agent: str = AGENT,
    query: str = "",
    origin: str = "",
    headers: Any = (),
) -> bytes:
    """The answer to an upgrade that no client library would write so."""
    lines = [
        f"GET /v1/realtime?model={agent}{query} HTTP/1.1",
        "Host: x",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}",
        "Sec-WebSocket-Version: 13",
        *([f"Authorization: Bearer {key}"] if key is not None else []),
        *([f"Origin: {origin}"] if origin else []),
        *(f"{name}: {value}" for name, value in headers),
    ]
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write("\r\n".join([*lines, "", ""]).encode())
    async with asyncio.timeout(SECONDS):
        answer = await reader.read()
    writer.close()
    return answer


# --- the issuer's keys -------------------------------------------------------------------------------------


@on_uvloop
async def test_a_new_key_of_the_issuer_is_taken_with_the_first_token_that_names_it() -> None:
    async with (
        Issuer().serving() as issuer,
        a_gateway(with_jwt(issuer), pulse=QUICK) as gateway,
        FakeWorker().serving(gateway),
    ):
        await keys_of(gateway, issuer)
        issuer.text = jwks(jwk(kid="new"))
        await talks(gateway, token(kid="new"))
        assert issuer.asked == 2
        assert await status(gateway, token("ES256")) == 401, "the old keys are gone"


@on_uvloop
async def test_a_flood_of_unknown_keys_asks_the_issuer_once_an_interval() -> None:
    pulse = Pulse(refresh=30, retry=(0.02, 0.1), refetch=60, fetch=5)
    async with (
        Issuer().serving() as issuer,
        a_gateway(with_jwt(issuer), pulse=pulse) as gateway,
        FakeWorker().serving(gateway),
    ):
        await keys_of(gateway, issuer)
        flood = [status(gateway, token(kid=f"unknown-{number}")) for number in range(40)]
        assert await asyncio.gather(*flood) == [401] * 40
        assert await status(gateway, token(kid="one-more")) == 401
        assert issuer.asked == 2
        await talks(gateway, token())


@on_uvloop
async def test_while_the_issuer_is_down_the_last_keys_are_used_and_new_tokens_are_good() -> None:
    pulse = Pulse(refresh=0.05, retry=(0.02, 0.05), refetch=0.01, fetch=0.2)
    async with (
        Issuer().serving() as issuer,
        a_gateway(with_jwt(issuer), pulse=pulse) as gateway,
        FakeWorker().serving(gateway),
    ):
        await keys_of(gateway, issuer)
        for spoil in ({"status": "500 No"}, {"text": "{}"}, {"text": "x" * 300_000}):
            asked = issuer.asked
            for name, value in spoil.items():
                setattr(issuer, name, value)
            await until(lambda asked=asked: issuer.asked > asked + 2)  # type: ignore[misc]
            await talks(gateway, token("ES256"))
        async with asyncio.timeout(SECONDS):
            while not await metric(gateway, "trunkline_issuer_keys_age_seconds", agent=AGENT):
                await asyncio.sleep(0.1)
        issuer.silent = True
        await talks(gateway, token("EdDSA"))
        assert await status(gateway, token(kid="unknown")) == 401


@on_uvloop
async def test_without_any_keys_yet_a_caller_is_told_to_come_back() -> None:
    async with (
        Issuer().serving() as issuer,
        a_gateway(pulse=QUICK) as gateway,
        FakeWorker().serving(),
    ):
        issuer.status = "503 No"
        give(gateway, with_jwt(issuer))
        answer = await refused(call(gateway, key=token()))
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert b"issuer" in (answer.body or b"")
        issuer.status = "200 OK"
        await keys_of(gateway, issuer)
        assert await status(gateway, token(aud="other")) == 401


@on_uvloop
async def test_callers_bring_the_first_keys_as_soon_as_the_issuer_is_there() -> None:
    pulse = Pulse(retry=(60, 60), refetch=60, first=0.05, fetch=5)
    async with Issuer().serving() as issuer, a_gateway(pulse=pulse) as gateway:
        issuer.status = "503 No"
        give(gateway, with_jwt(issuer))
        assert [await status(gateway, token()) for _ in range(2)] == [503, 503]
        issuer.status = "200 OK"
        async with asyncio.timeout(SECONDS):
            while (answer := await status(gateway, token(aud="other"))) == 503:
                pass
        assert answer == 401


@on_uvloop
async def test_keys_that_could_not_be_renewed_for_long_are_no_longer_trusted() -> None:
    pulse = Pulse(refresh=30, retry=(0.02, 0.1), refetch=60, trust=0.2, fetch=5)
    async with Issuer().serving() as issuer, a_gateway(with_jwt(issuer), pulse=pulse) as gateway:
        await keys_of(gateway, issuer)
        issuer.status = "503 No"
        await until(lambda: gateway.gateway._reception._door.issuers.keys(issuer.uri) is None)
        assert await status(gateway, token()) == 503


@on_uvloop
async def test_a_document_without_end_is_read_no_further_than_its_bound() -> None:
    async with Issuer().serving() as issuer:
        issuer.endless = True
        pulse = Pulse(retry=(60, 60))
        async with a_gateway(with_jwt(issuer), pulse=pulse) as gateway:
            found = gateway.gateway._reception._door.issuers._issuers[issuer.uri]
            await until(lambda: found.delay > 0)
            assert issuer.sent < 2**25, "the rest is in the sockets' buffers at most"


@on_uvloop
async def test_a_redirect_to_other_keys_is_not_followed() -> None:
    async with Issuer().serving() as evil, Issuer().serving() as issuer:
        evil.text = jwks(jwk(key=STRANGER))
        issuer.status, issuer.headers = "302 Found", f"Location: {evil.uri}\r\n"
        async with a_gateway(with_jwt(issuer), pulse=QUICK) as gateway:
            await until(lambda: issuer.asked > 1)
            assert await status(gateway, token(key=STRANGER)) == 503
        assert evil.asked == 0


@on_uvloop
async def test_what_an_agent_asks_of_tokens_may_change() -> None:
    async with a_gateway(with_jwt()) as gateway, FakeWorker().serving(gateway):
        good = token()
        await talks(gateway, good)
        access = jwt_access()
        access["jwt"] = {**access["jwt"], "audience": "other"}
        give(gateway, a_route(access=access), epoch=2)
        assert await status(gateway, good) == 401
        await talks(gateway, token(aud="other"))
        give(gateway, with_jwt(tenants=tenants(claim="missing")), epoch=3)
        assert await status(gateway, good) == 401
        give(gateway, a_route(), epoch=4)
        assert await status(gateway, good) == 401
        assert gateway.gateway._reception._door._verifiers == {}


@on_uvloop
async def test_an_issuer_that_no_route_names_any_more_is_not_asked() -> None:
    pulse = Pulse(refresh=0.02, retry=(0.02, 0.02))
    async with Issuer().serving() as issuer, a_gateway(with_jwt(issuer), pulse=pulse) as gateway:
        await keys_of(gateway, issuer)
        give(gateway, a_route(), epoch=2)
        assert gateway.gateway._reception._door.issuers.keys(issuer.uri) is None
        assert gateway.gateway._reception._door.issuers._issuers == {}


# --- secrets and tickets -----------------------------------------------------------------------------------


@on_uvloop
async def test_a_secret_from_one_gateway_opens_calls_at_every_other() -> None:
    async with (
        a_gateway(keyed()) as one,
        a_gateway(keyed()) as other,
        FakeWorker().serving(one, other),
    ):
        answer = await post(one, CLIENT_SECRETS_PATH)
        assert answer.headers["Cache-Control"] == "no-store"
        body = answer.json()
        assert body["session"]["model"] == AGENT
        assert 590 < body["expires_at"] - time.time() <= 600
        for gateway in (one, other, one):
            await talks(gateway, body["value"])
            offers = ["realtime", f"openai-insecure-api-key.{body['value']}"]
            async with call(gateway, key=None, subprotocols=offers) as caller:
                assert caller.subprotocol == "realtime"
        assert await metric(one, "trunkline_minted_total", kind="secret") == 1


@on_uvloop
async def test_the_stock_client_mints_and_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    async with a_gateway(keyed()) as gateway, FakeWorker().serving(gateway):
        base = f"http://127.0.0.1:{gateway.port}/v1"
        async with AsyncOpenAI(api_key=KEY, base_url=base) as client:
            secret = await client.realtime.client_secrets.create(
                session={"type": "realtime", "model": cast(Any, "echo")},
                expires_after={"anchor": "created_at", "seconds": 30},
            )
        assert secret.value.startswith("ek_")
        assert 0 < secret.expires_at - time.time() <= 30
        async with (
            AsyncOpenAI(api_key=secret.value, base_url=base) as client,
            client.realtime.connect(model="echo") as connection,
        ):
            await connection.send({"type": "response.create"})
            assert b"response.create" in await connection.recv_bytes()


@on_uvloop
async def test_a_ticket_opens_one_call_and_the_worker_does_not_see_it() -> None:
    async with a_gateway(keyed()) as gateway, FakeWorker().serving(gateway) as worker:
        ticket = await minted(gateway, TICKETS_PATH)
        await talks(gateway, None, query=f"&ticket={ticket}&intent=x")
        again = await refused(call(gateway, key=None, query=f"&ticket={ticket}"))
        assert again.status_code == 401
        found = await metric(gateway, "trunkline_refused_credentials_total", why="used_before")
        assert found == 1
        assert worker.requests[0].path == f"/v1/realtime?model={AGENT}&intent=x"
        hidden = await minted(gateway, TICKETS_PATH)
        await talks(gateway, None, query=f"&%74icket={hidden}")
        assert "icket=" not in worker.requests[-1].path
        assert await status(gateway, await minted(gateway, TICKETS_PATH)) == 401, "only in a URL"


@on_uvloop
async def test_two_callers_with_one_ticket_at_once_are_one_call() -> None:
    async with a_gateway(keyed()) as gateway, FakeWorker().serving(gateway):
        ticket = await minted(gateway, TICKETS_PATH)
        callers = await asyncio.gather(
            *(call(gateway, key=None, query=f"&ticket={ticket}") for _ in range(8)),
            return_exceptions=True,
        )
        opened = [caller for caller in callers if not isinstance(caller, BaseException)]
        assert len(opened) == 1
        await opened[0].close()


@on_uvloop
async def test_a_secret_falls_with_the_key_that_it_came_from() -> None:
    async with a_gateway(keyed()) as gateway, FakeWorker().serving(gateway):
        secret = await minted(gateway)
        await talks(gateway, secret)
        give(gateway, keyed(apiKeys={"test": "0" * 64}), epoch=2)
        assert await status(gateway, secret) == 401


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"key": "wrong"}, 401),
        ({"key": None}, 401),
        ({"body": {"session": {"model": "nobody"}}}, 401),
        ({"Origin": "https://evil.example"}, 403),
        ({"body": b"["}, 400),
        ({"body": b" " * (MAX_BODY_BYTES + 1)}, 413),
    ],
)
def test_who_may_not_call_mints_nothing(options: dict[str, Any], expected: int) -> None:
    @on_uvloop
    async def run() -> None:
        async with a_gateway(keyed(origins=["https://a.example"])) as gateway:
            for path in (CLIENT_SECRETS_PATH, TICKETS_PATH):
                answer = await post(gateway, path, **options)
                assert answer.status_code == expected
            secret = await minted(gateway)
            assert (await post(gateway, CLIENT_SECRETS_PATH, key=secret)).status_code == 403

    run()


@on_uvloop
async def test_a_gateway_without_routes_mints_nothing_and_says_when_to_come_back() -> None:
    async with a_gateway() as gateway:
        answer = await post(gateway, CLIENT_SECRETS_PATH)
        assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)


@on_uvloop
async def test_a_body_that_trickles_in_is_waited_for_and_one_that_never_ends_is_not() -> None:
    async with a_gateway(keyed()) as gateway:
        body = b'{"session": {"model": "echo"}}'
        head = f"POST {CLIENT_SECRETS_PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        for end, expected in ((len(body), b" 200 "), (len(body) - 1, b" 408 ")):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(head.encode())
            for place in range(end):
                await writer.drain()
                writer.write(body[place : place + 1])
            async with asyncio.timeout(SECONDS):
                assert expected in await reader.read()
            writer.close()
        await until(lambda: not gateway.gateway.holdings.connections)


def test_no_log_line_no_metric_and_no_repr_holds_what_callers_show(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    seen: list[str] = []
    address, signature = "203.0.113.77", "RSOYDt4T1cUTdK1PDd93/VVr8B8="
    seen_from = {"X-Forwarded-For": address}
    digest = hashlib.sha256(signature.encode()).hexdigest()

    @on_uvloop
    async def run() -> None:
        async with (
            Issuer().serving() as issuer,
            a_gateway(
                keyed(**jwt_access(issuer.uri, apiKeys=KEYS, twilio={"main": [digest]})),
                pulse=QUICK,
                proxies=Proxies.parse("127.0.0.1/32"),
            ) as gateway,
            FakeWorker().serving(gateway) as worker,
        ):
            await talks(gateway, None, headers={"X-Twilio-Signature": signature, **seen_from})
            good = token()
            secret, ticket = await minted(gateway), await minted(gateway, TICKETS_PATH, key=good)
            for key in (KEY, good, secret, secret + "x", good + "x", "wrong-" + KEY):
                async with contextlib.AsyncExitStack() as stack:
                    with contextlib.suppress(InvalidStatus):
                        await stack.enter_async_context(call(gateway, key=key, headers=seen_from))
                    seen.append(repr(gateway.gateway.holdings.connections))
            for _ in range(2):
                with contextlib.suppress(InvalidStatus):
                    await (await call(gateway, key=None, query=f"&ticket={ticket}")).close()
            shown.extend([KEY, good, secret, ticket, "m" * 64, signature, digest, address])
            # Nothing of a request, and nothing of what an agent says.
            shown.extend(["/v1/realtime", "model=", "Authorization", "Hello."])
            seen.extend([repr(gateway.gateway), repr(gateway.gateway._routes)])
            seen.append(repr(gateway.gateway._reception))
            seen.append((await http(gateway.health_port, "/metrics"))[1])
            seen.append((await http(gateway.health_port, "/state"))[1])
            to_workers = str([(request.path, request.headers) for request in worker.requests])
            assert not [word for word in shown[:8] if word in to_workers]

    caplog.set_level(logging.DEBUG)
    run()
    ours = [record for record in caplog.records if record.name.startswith("trunkline")]
    seen.extend(str(record.__dict__) + record.getMessage() for record in ours)
    seen.extend(capfd.readouterr())
    assert len(ours) > 10
    assert not [word for word in shown if any(word in text for text in seen)]


# --- tenants -----------------------------------------------------------------------------------------------


@on_uvloop
async def test_a_tenant_over_its_calls_is_told_429_and_others_are_not() -> None:
    access = {"tenants": tenants(concurrentCalls=1, overrides={"big": {"concurrentCalls": 2}})}
    async with a_gateway(with_jwt(**access)) as gateway, FakeWorker().serving(gateway) as worker:
        async with call(gateway, key=token()):
            answer = await refused(call(gateway, key=token(sub="another of acme")))
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) > 0
            assert answer.headers[CALL_HEADER]
            assert b"at once" in (answer.body or b"")
            with events("trunkline.calls") as lines:
                await talks(gateway, token(org="other"))
                await until(lambda: lines[-1]["message"] == "ended")
            assert lines[-1]["tenant"] == "other"
            async with call(gateway, key=token(org="big")):
                await talks(gateway, token(org="big"))
        await until(lambda: not worker.live)
        await talks(gateway, token())
        assert await metric(gateway, "trunkline_calls_total", outcome="limited") == 1
        load = gateway.gateway.load()["agents"][AGENT]
        assert (load["arrivals"], load["refused"]) == (5, 0), "a limit is no want of capacity"


@on_uvloop
async def test_a_call_that_found_no_slot_or_left_gives_its_place_back() -> None:
    access = {"tenants": tenants(concurrentCalls=1)}
    async with a_gateway(with_jwt(**access)) as gateway, FakeWorker().serving(gateway) as worker:
        worker.reported = 0
        await worker._tell()
        await until(lambda: worker.row(gateway)["free"] == 0)
        for _ in range(3):
            assert await status(gateway, token()) == 503
        worker.reported, worker.silent = None, True
        await worker._tell()
        await until(lambda: worker.row(gateway)["free"] == 4)
        leaving = asyncio.create_task(call(gateway, key=token()).__aenter__())
        await until(lambda: bool(worker.requests))
        leaving.cancel()
        await until(lambda: not gateway.gateway.holdings.connections)
        worker.silent = False
        await talks(gateway, token())


@on_uvloop
async def test_a_gateway_gives_its_share_of_the_limits() -> None:
    routes = json.loads(routes_text(with_jwt(tenants=tenants(concurrentCalls=4))))
    async with a_gateway() as gateway, FakeWorker(slots=8).serving() as worker:
        gateway.gateway.take(routes_from(routes | {"share": 0.5}), "operator")
        async with worker.linked(gateway):
            callers = [await call(gateway, key=token()) for _ in range(2)]
            assert await status(gateway, token()) == 429
            gateway.gateway.take(routes_from(routes | {"epoch": 2}), "operator")
            callers += [await call(gateway, key=token()) for _ in range(2)]
            assert await status(gateway, token()) == 429
            for caller in callers:
                await caller.close()


@on_uvloop
async def test_a_key_is_its_own_tenant_and_starts_are_counted_by_it() -> None:
    access = {"tenants": tenants(startsPerMinute=2)}
    async with a_gateway(keyed(**access)) as gateway, FakeWorker().serving(gateway):
        secret = await minted(gateway)
        await talks(gateway, KEY)
        await talks(gateway, secret)
        answer = await refused(call(gateway))
        assert answer.status_code == 429
        assert 0 < int(answer.headers["Retry-After"]) <= 30
        assert await status(gateway, secret) == 429, "a secret spends what its maker may have"


@on_uvloop
async def test_a_noisy_tenant_at_fifty_times_its_share_leaves_the_quiet_one_its_slots() -> None:
    own = {"quiet": {"guaranteedSlots": 4}}
    route = with_jwt(tenants=tenants(overrides=own))
    routes = routes_from(json.loads(routes_text(route)) | {"share": 0.5})
    async with a_gateway() as one, a_gateway() as other:
        for gateway in (one, other):
            gateway.gateway.take(routes, "operator")
        async with FakeWorker(slots=8).serving(one, other) as worker:
            noisy, quiet = token(org="noisy"), token(org="quiet")
            floods = [call(gateway, key=noisy) for _ in range(100) for gateway in (one, other)]
            found = await asyncio.gather(*floods, return_exceptions=True)
            inside = [each for each in found if not isinstance(each, BaseException)]
            assert 1 <= len(inside) <= 4
            mine = [await call(gateway, key=quiet) for gateway in (one, other, one, one)]
            assert len(worker.live) == len(inside) + 4
            for connection in [*mine, *inside]:
                await connection.close()


@on_uvloop
async def test_what_is_kept_for_others_is_said_in_the_placement() -> None:
    route = with_jwt(tenants=tenants(overrides={"quiet": {"guaranteedSlots": 4}}))
    async with a_gateway(route) as gateway, FakeWorker(slots=4).serving(gateway):
        with events("trunkline.calls") as lines:
            answer = await refused(call(gateway, key=token(org="noisy")))
        assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
        (line,) = (line for line in lines if line["message"] == "refused")
        assert line["passed_over"][0]["why"] == "its free slots are kept for other tenants"
        await talks(gateway, token(org="quiet"))


@on_uvloop
async def test_a_caller_that_sends_much_faster_than_speech_is_ended_with_1008() -> None:
    async with (
        a_gateway(a_route(), audio_times_real=1.5) as gateway,
        FakeWorker().serving(gateway) as worker,
    ):
        caller = await call(gateway)

        async def flood() -> None:
            for _ in range(2000):
                await caller.send(bytes(32_768))

        flooding = asyncio.create_task(flood())
        code, reason = await closed(caller)
        assert (code, "1.5 times real time" in reason) == (1008, True)
        await asyncio.gather(flooding, return_exceptions=True)
        await until(lambda: not worker.live)


# --- strangers ---------------------------------------------------------------------------------------------


async def dribble(gateway: Running) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has sent half a head."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(b"GET /v1/realtime HTTP/1.1\r\nHost:")
    await writer.drain()
    return reader, writer


@on_uvloop
async def test_an_address_with_many_slow_heads_is_told_429_until_they_are_gone() -> None:
    bounds = Bounds(waiting_per_address=5)
    async with a_gateway(keyed(), bounds=bounds) as gateway, FakeWorker().serving(gateway):
        slow = [await dribble(gateway) for _ in range(5)]
        await until(lambda: gateway.gateway._reception._doorstep.waiting == 5)
        answer = await refused(call(gateway))
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
        began = time.monotonic()
        async with asyncio.timeout(SECONDS):
            heads = await asyncio.gather(*(reader.read() for reader, _ in slow))
        assert all(b" 408 " in head for head in heads)
        assert time.monotonic() - began < SECONDS / 2
        await until(lambda: gateway.gateway._reception._doorstep.waiting == 0)
        await talks(gateway, KEY)
        for _, writer in slow:
            writer.close()


@on_uvloop
async def test_calls_that_were_answered_wait_no_longer() -> None:
    async with a_gateway(keyed(), bounds=Bounds(waiting_per_address=1)) as gateway:
        async with FakeWorker().serving(gateway):
            callers = []
            for _ in range(3):
                callers.append(await call(gateway))
                await until(lambda: gateway.gateway._reception._doorstep.waiting == 0)
            for caller in callers:
                await caller.close()
        await until(lambda: not gateway.gateway.holdings.connections)
        assert gateway.gateway._reception._doorstep.waiting == 0


@on_uvloop
async def test_a_crowd_is_cut_off_without_an_answer() -> None:
    async with a_gateway(keyed(), bounds=Bounds(waiting=3)) as gateway:
        slow = [await dribble(gateway) for _ in range(3)]
        await until(lambda: gateway.gateway._reception._doorstep.waiting == 3)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        async with asyncio.timeout(SECONDS):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        for each in (writer, *(writer for _, writer in slow)):
            each.close()
        await until(lambda: gateway.gateway._reception._doorstep.waiting == 0)


@on_uvloop
async def test_an_address_that_comes_too_often_is_told_429() -> None:
    async with a_gateway(keyed(), bounds=Bounds(per_second=2)) as gateway:
        async with FakeWorker().serving(gateway):
            answers = [await refused_raw(gateway) for _ in range(12)]
        codes = [answer.split(b" ", 2)[1] for answer in answers]
        assert codes[:4] == [b"401"] * 4
        assert codes.count(b"429") >= 4


GOOD_HEAD = (
    b"GET /v1/realtime?model=echo HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    b"Authorization: Bearer wrong\r\n\r\n"
)
GOOD_POST = (
    f"POST {CLIENT_SECRETS_PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode()
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([GOOD_HEAD, GOOD_POST, b""]),
            st.integers(0, 250),
            st.binary(max_size=120),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_any_bytes_get_a_plain_answer_or_none_and_leave_nothing_behind(
    visits: list[tuple[bytes, int, bytes, bool]],
) -> None:
    """`on_uvloop` fails on an exception in any callback; the log is scanned for one in a task."""
    failures: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                failures.append(record)

    @on_uvloop
    async def run() -> None:
        async with a_gateway(keyed()) as gateway:
            for base, place, noise, keeps_rest in visits:
                rest = base[place:] if keeps_rest else b""
                reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
                writer.write(base[:place] + noise + rest)
                writer.write_eof()
                async with asyncio.timeout(SECONDS):
                    try:
                        answer = await reader.read()
                    except ConnectionError:
                        answer = b""
                writer.close()
                assert answer[:9] in (b"", b"HTTP/1.1 ")
                assert b" 500 " not in answer[:20]
            await until(lambda: not gateway.gateway.holdings.connections)
            assert gateway.gateway._reception._doorstep.waiting == 0

    handler = Keep()
    logging.getLogger("trunkline").addHandler(handler)
    try:
        run()
    finally:
        logging.getLogger("trunkline").removeHandler(handler)
    assert not failures
