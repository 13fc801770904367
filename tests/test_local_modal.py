"""The local Modal, driven by the unmodified SDK: real containers, real sockets."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import httpx
import modal
import modal.exception
import pytest
from modal_rig import (
    PATIENCE,
    START,
    TOKEN,
    about,
    alive,
    deploy,
    dial,
    end,
    ended,
    local_modal,
    post,
    shown,
    standalone,
    start,
    stop,
    until,
)

from trunkline_dev.modal.state import Kind, some_network


async def test_a_call_goes_through_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_modal(monkeypatch) as (local, client):
        secret = modal.Secret.from_dict({"ECHO_SECRET": "from the app"})
        url = await deploy(client, secrets=[secret])
        assert local.boots == []  # nothing runs before somebody calls

        token = await start(url)
        async with dial(url, token) as call:
            told = await about(call)
            assert told["container"] == local.boots[0].container
            assert told["secret"] == "from the app"
            assert "modal-authorization" not in told["headers"]
            for message in "text", b"x" * 3_000_000, b"":
                await call.send(message)
                assert await call.recv() == message
            assert await end(url, token) == 200
            await call.send("goes on")  # a call in flight may finish
            assert await call.recv() == "goes on"

        assert await end(url, token) == 404
        refused = await post(url + "/call", {"Modal-Authorization": f"Bearer {token}"})
        assert refused.status_code == 401


async def test_only_a_known_token_starts_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_modal(monkeypatch) as (_, client):
        url = await deploy(client)
        wrong: list[dict[str, str]] = [
            {},
            {"Authorization": "Bearer wk-test.ws-wrong"},
            {"Authorization": "Bearer wk-other.ws-test"},
            {"Modal-Key": "wk-test", "Modal-Secret": "nope"},
            {"Modal-Authorization": "Bearer a.b.c"},
        ]
        for headers in wrong:
            assert (await post(url + START, headers)).status_code == 401, headers

        made = await modal.Workspace.from_context(client=client).proxy_tokens.create.aio("mine")
        pair = {"Modal-Key": made.token_id, "Modal-Secret": made.token_secret}
        assert (await post(url + START, pair)).status_code == 200
        server = modal.Server.from_name("echo", "EchoServer", client=client)
        session = await server.sessions.start.aio(idle_timeout=5)
        await server.sessions.terminate.aio(session.token)
        await server.sessions.terminate.aio(session.token)  # gone already: fine


async def test_sessions_share_containers_and_queue_at_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch) as (local, client):
        url = await deploy(client)
        tokens = await asyncio.gather(*[start(url) for _ in range(4)])
        containers = []
        for token in tokens:
            async with dial(url, token) as call:
                containers.append((await about(call))["container"])
        assert sorted(containers.count(name) for name in set(containers)) == [2, 2]

        fifth = asyncio.create_task(start(url))
        abandoned = asyncio.create_task(start(url))
        pool = next(iter(local._edges.values())).pool
        assert pool
        await until(lambda: len(pool.waiting) == 2)
        abandoned.cancel()  # a gateway whose deadline passed
        await until(lambda: sum(not waiter.done() for waiter in pool.waiting) == 1)
        assert not fifth.done()
        await end(url, tokens[0])
        assert await fifth
        await end(url, tokens[1])
        assert await start(url)  # the one who went away holds no place
        assert len(local.boots) == 2


async def test_no_capacity_in_time_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_modal(monkeypatch, capacity=0, queue_seconds=0.2) as (local, client):
        url = await deploy(client)
        assert (await post(url + START, TOKEN)).status_code == 503
        assert local.boots == []


async def test_cold_once_then_restored_and_to_zero_between(monkeypatch: pytest.MonkeyPatch) -> None:
    delays = {"cold_seconds": 1.5, "restore_seconds": 0.5}
    async with local_modal(monkeypatch, **delays) as (local, client):
        url = await deploy(client)
        await end(url, await start(url))
        await until(lambda: ended(local.boots[0]))
        assert (await shown(local, "containers"))[0]["kind"] == "cold"
        await until(lambda: len(local.pids) == 1)  # what is kept is no container of the user
        assert len(local.boots) == 1

        # The first is restored from what is kept; for the second there is none left.
        tokens = await asyncio.gather(*[start(url) for _ in range(3)])
        kinds = [boot.kind for boot in local.boots]
        assert kinds == [Kind.COLD, Kind.RESTORED, Kind.RESTORED]
        for boot in local.boots:
            assert boot.ready_t
            least = 1.5 if boot.kind is Kind.COLD else 0.5
            assert boot.ready_t - boot.t >= least
        names = set()
        for token in tokens:
            async with dial(url, token) as call:
                names.add((await about(call))["container"])
            await end(url, token)
        assert names == {boot.container for boot in local.boots[1:]}
        await until(lambda: all(ended(boot) for boot in local.boots))
        assert [boot.exit for boot in local.boots] == [0, 0, 0]

        await until(lambda: len(local.pids) == 1)
        [kept] = local.pids
        await stop(client)
        await until(lambda: not local.pids)
        assert not alive(kept)


async def test_the_same_again_is_no_deployment_and_a_change_rolls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch) as (local, client):
        url = await deploy(client)
        old = await start(url)
        assert await deploy(client) == url
        [app] = await shown(local, "apps")
        assert (app["version"], app["servers"][0]["sessions"]) == (1, 1)

        async with dial(url, old) as call:
            first = (await about(call))["container"]
            assert await deploy(client, max_containers=1) == url
            [app] = await shown(local, "apps")
            assert app["version"] == 2
            new = await start(url)
            async with dial(url, new) as other:
                assert (await about(other))["container"] != first
            await call.send("the old call goes on")
            assert await call.recv() == "the old call goes on"
            assert not ended(local.boots[0])
        await end(url, old)
        await until(lambda: ended(local.boots[0]))
        assert not ended(local.boots[1])


async def test_a_stopped_app_lets_calls_end_and_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with local_modal(monkeypatch, logs=tmp_path) as (local, client):
        url = await deploy(client, max_containers=3)
        tokens = [await start(url), await start(url), await start(url)]
        async with dial(url, tokens[0]) as call:
            container = (await about(call))["container"]
            pids = local.pids
            assert len(pids) >= 2
            await stop(client)
            for token in tokens:
                await end(url, token)
            assert (await post(url + START, TOKEN)).status_code == 404
            await call.send("still here")
            assert await call.recv() == "still here"
        await until(lambda: not local.pids)
        assert not any(alive(pid) for pid in pids)
        assert "exit hook" in (tmp_path / f"{container}.log").read_text()
        assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(
            boot.container for boot in local.boots
        )
        with pytest.raises(modal.exception.NotFoundError):
            await stop(client)


async def test_leaving_it_ends_calls_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_modal(monkeypatch) as (local, client):
        url = await deploy(client)
        call = await dial(url, await start(url))
        pids = local.pids
        assert pids
    await call.wait_closed()
    assert not any(alive(pid) for pid in pids)


async def test_a_session_that_nobody_uses_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_modal(monkeypatch) as (local, client):
        url = await deploy(client)
        hasty = {**TOKEN, "x-modal-server-session-idle-timeout": "1"}
        token = (await post(url + START, hasty)).json()["token"]
        [edge] = local._edges.values()
        assert edge.pool
        pool = edge.pool
        async with dial(url, token) as call:
            await about(call)
            # One that nobody uses ends meanwhile, and so the idle time is over; of this one it does not run.
            assert (await post(url + START, hasty)).status_code == 200
            assert pool.sessions == 2
            await until(lambda: pool.sessions == 1)
            await call.send("used")
            assert await call.recv() == "used"
        await until(lambda: not pool.sessions)
        assert await end(url, token) == 404


async def test_a_container_that_cannot_start_is_tried_again_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with local_modal(monkeypatch, queue_seconds=0.2) as (local, client):
        secret = modal.Secret.from_dict({"ECHO_FAILS": "1"})
        url = await deploy(client, secrets=[secret], min_containers=1)
        await until(lambda: len(local.boots) == 3)
        first, second, third = local.boots
        assert "the weights are missing" in first.error
        assert first.ready_t is None
        assert first.end_t
        assert second.end_t
        assert second.t - first.end_t >= 0.5
        assert third.t - second.end_t >= 1.0
        assert (await post(url + START, TOKEN)).status_code == 503


async def test_a_container_that_dies_ends_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_modal(monkeypatch) as (local, client):
        url = await deploy(client)
        token = await start(url)
        async with dial(url, token) as call:
            os.kill((await about(call))["pid"], signal.SIGKILL)
            async with asyncio.timeout(PATIENCE):
                await call.wait_closed()
        assert call.close_code == 1006
        await until(lambda: ended(local.boots[0]))
        assert local.boots[0].exit == -signal.SIGKILL
        assert await end(url, token) == 404
        assert await start(url)  # another container takes its place


async def test_overrides_of_the_autoscaler(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_modal(monkeypatch) as (local, client):
        await deploy(client, buffer_containers=1)
        server = modal.Server.from_name("echo", "EchoServer", client=client)
        settings = await server.autoscaler.settings.aio()
        assert (settings.target_concurrency, settings.max_containers) == (2, 2)
        assert settings.buffer_containers == 1
        await server.autoscaler.update.aio(min_containers=1)
        await until(lambda: any(boot.ready_t for boot in local.boots))
        [container] = await server._experimental_list_containers.aio()
        assert container.container_id == local.boots[0].container


async def test_what_is_not_there_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with local_modal(monkeypatch, api_tokens={"ak-test": "as-test"}) as (_, client):
        app = modal.App("function", include_source=False)
        app.function(serialized=True)(lambda: None)
        with pytest.raises(modal.exception.InvalidError, match="runs servers with sessions alone"):
            await app.deploy.aio(client=client)
        with pytest.raises(modal.exception.InvalidError, match="Unknown GPU type Z9"):
            await deploy(client, gpu="Z9")
        with pytest.raises(modal.exception.InvalidError, match="scaleup_window"):
            await deploy(client, scaleup_window=5)
        with pytest.raises(modal.exception.UnimplementedError, match="QueueGetOrCreate"):
            await modal.Queue.from_name("q").hydrate.aio(client=client)
        assert "not implemented: QueueGetOrCreate" in caplog.text
        stranger = await modal.Client.from_credentials.aio("ak-test", "as-wrong")
        with pytest.raises(modal.exception.AuthError, match="Token validation failed"):
            await stranger.hello.aio()
        await stranger.close.aio()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_nothing_outlives_the_process(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    arguments = (
        "--host",
        "127.77.1.250",
        "--addresses",
        str(some_network()),
        "--proxy-token",
        "wk-test:ws-test",
    )
    async with standalone(*arguments) as (process, ready):
        monkeypatch.setenv("MODAL_SERVER_URL", ready["server_url"])
        client = await modal.Client.from_credentials.aio("ak-test", "as-test")
        url = await deploy(client)
        async with dial(url, await start(url)) as call:
            container = await about(call)
            async with httpx.AsyncClient() as http:
                pids = (await http.get(ready["local_url"] + "/_local/processes")).json()
            assert container["pid"] in pids
            process.send_signal(number)
            await process.wait()
            await until(lambda: not any(alive(pid) for pid in pids))
        assert process.returncode == (0 if number is signal.SIGTERM else -number)
        await client.close.aio()


async def test_a_port_in_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_modal(monkeypatch) as (local, _):
        port = local.server_url.rpartition(":")[2]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "trunkline_dev.modal", "--port", port),
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await process.communicate()
        assert process.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port} for the API" in said.decode()


async def test_a_head_that_is_no_http_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_modal(monkeypatch) as (_, client):
        url = await deploy(client)
        host, port = url.removeprefix("http://").split(":")
        for nonsense in b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"x" * 70_000:
            reader, writer = await asyncio.open_connection(host, int(port))
            began = time.monotonic()
            writer.write(nonsense)
            assert (await reader.readline()) == b"HTTP/1.1 400 Bad Request\r\n"
            assert time.monotonic() - began < PATIENCE
            writer.close()
