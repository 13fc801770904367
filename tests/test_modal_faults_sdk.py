"""Each fault of the local Modal, as the unmodified SDK and callers meet it."""

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import modal
import modal.exception
import pytest
from modal_rig import (
    PATIENCE,
    START,
    TOKEN,
    about,
    deploy,
    dial,
    end,
    ended,
    local_modal,
    post,
    shown,
    standalone,
    start,
    until,
)

from trunkline_dev.modal.__main__ import configuration
from trunkline_dev.modal.faults import Fault, Plan, Rule
from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import Kind


async def accepts(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return False
    writer.close()
    return True


def counts(local: LocalModal) -> list[tuple[int, int]]:
    return [(count.seen, count.struck) for count in local.state.faults.counts]


async def test_the_nth_call_fails_and_the_sdk_tries_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch) as (local, client):
        await local.inject(Rule(fault=Fault.RPC_FAILS, name="AppPublish", nth=(1,)))
        assert await deploy(client)
        assert counts(local) == [(2, 1)]
        assert local.state.sdk_calls.served["AppPublish"] == 1


async def test_a_call_that_always_fails_is_an_error_of_the_sdk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch) as (local, client):
        await local.inject(
            Rule(fault=Fault.RPC_FAILS, name="AppCreate", status="INTERNAL", message="on fire")
        )
        with pytest.raises(modal.exception.InternalError, match="on fire"):
            await deploy(client)
        await local.inject(
            Rule(fault=Fault.RPC_FAILS, name="AppCreate", status="PERMISSION_DENIED")
        )
        with pytest.raises(modal.exception.PermissionDeniedError):
            await deploy(client)
        await local.inject()
        assert await deploy(client)


async def test_an_answer_that_is_lost_leaves_its_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_modal(monkeypatch) as (local, client):
        await local.inject(
            Rule(fault=Fault.RPC_FAILS, name="AppPublish", status="DATA_LOSS", done=True)
        )
        with pytest.raises(modal.exception.DataLossError):
            await deploy(client)
        [app] = local.state.apps.values()
        assert app.deployed


async def test_a_call_that_hangs_hangs_until_the_caller_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch) as (local, client):
        await local.inject(Rule(fault=Fault.RPC_HANGS, name="AppCreate", nth=(1,)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await deploy(client)
        assert counts(local) == [(1, 1)]
        assert await deploy(client)

        await local.inject(Rule(fault=Fault.RPC_HANGS, name="ClientHello", seconds=0.3))
        began = time.monotonic()
        await client.hello.aio()
        assert time.monotonic() - began >= 0.3


async def test_a_throttled_call_waits_as_long_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MODAL_MAX_THROTTLE_WAIT", "30")
    throttled = Rule(
        fault=Fault.RPC_FAILS,
        name="ClientHello",
        status="RESOURCE_EXHAUSTED",
        retry_after=0.4,
        nth=(1, 2),
    )
    async with local_modal(monkeypatch) as (local, client):
        await local.inject(throttled)
        began = time.monotonic()
        await client.hello.aio()
        assert time.monotonic() - began >= 0.8
        assert counts(local) == [(3, 2)]


async def test_a_revoked_token_is_refused_until_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_modal(monkeypatch) as (local, client):
        url = await deploy(client)
        await local.inject(Rule(fault=Fault.TOKEN_REVOKED, name="ak-test"))
        with pytest.raises(modal.exception.AuthError, match="Token validation failed"):
            await client.hello.aio()
        token = await start(url)  # the gateways' token is another
        async with dial(url, token) as call:
            await about(call)
            await local.inject(Rule(fault=Fault.TOKEN_REVOKED, name="wk-*"))
            assert (await post(url + START, TOKEN)).status_code == 401
            await client.hello.aio()
            await call.send("unaffected")
            assert await call.recv() == "unaffected"
        await local.inject()
        assert await start(url)


async def test_a_control_plane_that_is_down_refuses_and_calls_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch) as (local, client):
        url = await deploy(client)
        async with dial(url, await start(url)) as call:
            await about(call)
            await local.inject(Rule(fault=Fault.CONTROL_PLANE_DOWN))
            host, port = local.server_url.removeprefix("http://").split(":")
            assert not await accepts(host, int(port))
            with pytest.raises(modal.exception.ConnectionError):
                await client.hello.aio()  # when its retries are over
            await call.send("unaffected")
            assert await call.recv() == "unaffected"
            assert await start(url)  # sessions do not need it
            await local.inject(Rule(fault=Fault.CONTROL_PLANE_DOWN, lasts=0.2))
            async with asyncio.timeout(PATIENCE):
                while not await accepts(host, int(port)):  # until it is back by itself
                    await asyncio.sleep(0.02)
        await client.hello.aio()
        assert local.server_url.endswith(f":{port}")


async def test_no_capacity_starts_nothing_until_there_is_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch, queue_seconds=0.3) as (local, client):
        url = await deploy(client, gpu=["L4", "A10"])
        await local.inject(Rule(fault=Fault.NO_CAPACITY, name="echo/L4"))
        first = (await post(url + START, TOKEN)).status_code  # whether it was there in 0.3 s or not
        assert first in (200, 503)
        await until(lambda: local.boots and local.boots[0].ready_t)
        assert [boot.gpu for boot in local.boots] == ["A10"]  # the next choice

        await local.inject(Rule(fault=Fault.NO_CAPACITY, name="echo/*"))
        for _ in range(1 if first == 200 else 2):  # that container has room for two
            assert await start(url)
        refused = await post(url + START, TOKEN)
        assert refused.status_code == 503
        assert "no capacity" in refused.text
        assert len(local.boots) == 1


async def test_a_start_of_a_session_is_refused_as_the_seed_wants_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules = (
        Rule(fault=Fault.SESSION_REFUSED, name="echo/*", status="429", share=0.5),
        Rule(fault=Fault.SESSION_REFUSED, name="other/*"),
    )

    async with local_modal(monkeypatch) as (local, client):
        url = await deploy(client)
        codes = []
        for _ in range(2):
            await local.inject(*rules, seed=11)
            answers = [await post(url + START, TOKEN) for _ in range(4)]
            codes.append([answer.status_code for answer in answers])
            for answer in answers:
                if answer.is_success:
                    await end(url, answer.json()["token"])
        assert codes[0] == codes[1]
        assert set(codes[0]) == {200, 429}

        await local.inject(Rule(fault=Fault.SESSION_REFUSED, nth=(1, 2)))  # 503
        server = modal.Server.from_name("echo", "EchoServer", client=client)
        session = await server.sessions.start.aio(idle_timeout=5)  # the SDK tries five times
        await server.sessions.terminate.aio(session.token)
        assert counts(local) == [(3, 2)]
        await local.inject(Rule(fault=Fault.SESSION_REFUSED, status="403"))
        with pytest.raises(modal.exception.ExecutionError, match="status 403"):
            await server.sessions.start.aio(idle_timeout=5)


async def test_a_start_of_a_session_that_hangs_holds_no_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch) as (local, client):
        url = await deploy(client)
        await local.inject(Rule(fault=Fault.SESSION_HANGS, nth=(1,)))
        async with httpx.AsyncClient(timeout=0.3) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.post(url + START, headers=TOKEN)
        assert local.boots == []
        assert await start(url)


async def test_a_region_that_is_down_refuses_and_can_cut_its_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch) as (local, client):
        near = await deploy(client, "near", routing_region="us-east")
        far = await deploy(client, "far", routing_region="eu-west")
        async with dial(near, await start(near)) as call:
            await about(call)
            await local.inject(Rule(fault=Fault.REGION_DOWN, name="us-east"))
            with pytest.raises(httpx.ConnectError):
                await start(near)
            assert await start(far)
            await call.send("still here")
            assert await call.recv() == "still here"
            await local.inject()
            assert await start(near)  # at the same address
            await local.inject(Rule(fault=Fault.REGION_DOWN, name="us-east", cut=True))
            async with asyncio.timeout(PATIENCE):
                await call.wait_closed()
            assert call.close_code == 1006


async def test_an_image_that_cannot_be_built_is_an_error_of_the_sdk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch) as (local, client):
        await local.inject(Rule(fault=Fault.IMAGE_BUILD_FAILS, message="no such package", nth=(1,)))
        with pytest.raises(modal.exception.ImageBuildError, match="no such package"):
            await deploy(client)
        assert await deploy(client)


async def test_a_restore_that_crashes_is_booted_again_without_the_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch, clones=0) as (local, client):
        url = await deploy(client, min_containers=0, scaledown_window=2)
        await end(url, await start(url))
        await until(lambda: ended(local.boots[0]))

        await local.inject(Rule(fault=Fault.RESTORE_CRASHES, seconds=0.1, nth=(1,)))
        token = await start(url)
        assert [boot.kind for boot in local.boots] == [Kind.COLD, Kind.RESTORED, Kind.COLD]
        _, crashed, plain = local.boots
        assert (crashed.exit, crashed.ready_t) == (222, None)
        assert "restore-crashes" in crashed.error
        [edge] = local._edges.values()
        assert edge.pool
        assert edge.pool.not_before == 0  # at once, unlike a start that the app itself fails
        async with dial(url, token) as call:
            assert (await about(call))["container"] == plain.container
        await end(url, token)
        await until(lambda: ended(plain))
        assert await start(url)
        assert local.boots[-1].kind is Kind.RESTORED  # the snapshot is still there


async def test_a_slow_start_and_a_crash_while_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_modal(monkeypatch) as (local, client):
        url = await deploy(client)
        await local.inject(
            Rule(fault=Fault.BOOT_CRASHES, name="echo/cold", nth=(1,)),
            Rule(fault=Fault.BOOT_SLOW, name="echo/cold", seconds=1.0, nth=(2,)),
        )
        assert await start(url)
        crashed, slow = local.boots
        assert (crashed.ready_t, crashed.exit) == (None, -signal.SIGKILL)
        assert crashed.end_t
        assert slow.ready_t
        assert slow.t - crashed.end_t >= 0.5  # the back-off
        assert slow.ready_t - slow.t >= 1.0


async def test_a_start_slower_than_the_server_allows_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_modal(monkeypatch, queue_seconds=0.2) as (local, client):
        await local.inject(Rule(fault=Fault.BOOT_SLOW, seconds=60))
        url = await deploy(client, startup_timeout=1)
        assert (await post(url + START, TOKEN)).status_code == 503
        await until(lambda: ended(local.boots[0]))
        assert "within 1 s" in local.boots[0].error


async def test_a_container_is_killed_some_time_after_it_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch) as (local, client):
        await local.inject(Rule(fault=Fault.CONTAINER_KILLED, seconds=0.5, nth=(1,)))
        url = await deploy(client)
        async with dial(url, await start(url)) as call:
            await about(call)
            async with asyncio.timeout(PATIENCE):
                await call.wait_closed()
        await until(lambda: ended(local.boots[0]))
        boot = local.boots[0]
        assert boot.exit == -signal.SIGKILL
        assert boot.ready_t
        assert boot.end_t
        assert boot.end_t - boot.ready_t >= 0.5
        assert await start(url)
        assert not ended(local.boots[1])


# --- how faults are set ---------------------------------------------------------------------------------


async def put(url: str, content: Any) -> httpx.Response:
    async with httpx.AsyncClient() as http:
        return await http.put(f"{url}/_local/faults", json=content)


async def test_faults_are_set_shown_and_removed_while_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch) as (local, client):
        set_ = {"seed": 3, "rules": [{"fault": "rpc-fails", "name": "ClientHello", "nth": 1}]}
        assert (await put(local.local_url, set_)).status_code == 200
        await client.hello.aio()
        told = await shown(local, "faults")
        assert (told["seed"], told["counts"]) == (3, [{"seen": 2, "struck": 1}])
        wrong = await put(local.local_url, [{"fault": "rpc-fails", "nth": 0}])
        assert (wrong.status_code, wrong.text) == (
            400,
            "rules[0].nth: a whole number from 1, or a list of them\n",
        )
        assert (await shown(local, "faults"))["seed"] == 3  # what is wrong changes nothing
        async with httpx.AsyncClient() as http:
            address = f"{local.local_url}/_local/faults"
            assert (await http.put(address, content=b"{")).status_code == 400
            assert (await http.put(address, content=b"x" * 70_000)).status_code == 400
            assert (await http.delete(address)).json() == {"seed": 0, "rules": [], "counts": []}
        assert local.state.faults.plan == Plan()


async def test_faults_in_a_file_hold_from_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "faults.json"
    file.write_text(json.dumps([{"fault": "control-plane-down", "lasts": 1}]))
    async with standalone("--faults", str(file)) as (_, ready):
        host, port = ready["server_url"].removeprefix("http://").split(":")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(host, int(port))
        monkeypatch.setenv("MODAL_SERVER_URL", ready["server_url"])
        client = await modal.Client.from_credentials.aio("ak-test", "as-test")
        async with asyncio.timeout(PATIENCE):
            await client.hello.aio()  # a new client tries for a minute
        await client.close.aio()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--faults", "/nowhere.json"], "No such file"),
        (["--gpus", "L4"], "as in L4=2"),
    ],
)
def test_a_bad_flag_is_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        configuration(arguments)
    assert sentence in capsys.readouterr().err


def test_a_bad_file_of_faults_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "faults.json"
    file.write_text('[{"fault": "fire"}]')
    with pytest.raises(SystemExit):
        configuration(["--faults", str(file)])
    assert "rules[0]: there is no fault 'fire'" in capsys.readouterr().err
