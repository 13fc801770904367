"""The unmodified `modal` command line, and the whole SDK that Trunkline uses, against the local Modal."""

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Final

import modal
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
    start,
    until,
)

from trunkline_dev.modal.faults import parse
from trunkline_dev.modal.server import LocalModal

TESTS: Final = Path(__file__).parent
APP: Final = """
import modal
import modal_echo

image = modal.Image.debian_slim().add_local_python_source("modal_echo")
app = modal.App("voice", image=image, include_source=False)
settings = dict(
    max_concurrency=2, target_concurrency=2, min_containers=1, max_containers={most},
    startup_timeout=30, exit_grace_period=30, enable_memory_snapshot=True, scaledown_window=2,
)
app.server(**settings)(modal.sessioned()(modal_echo.EchoServer))
"""


async def cli(local: LocalModal, *arguments: str) -> str:
    """What `modal …` prints; it must succeed."""
    environment = {
        **os.environ,
        "MODAL_SERVER_URL": local.server_url,
        "MODAL_TOKEN_ID": "ak-test",
        "MODAL_TOKEN_SECRET": "as-test",
        "MODAL_CONFIG_PATH": "/dev/null",
        "PYTHONPATH": str(TESTS),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "modal", *arguments),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(PATIENCE):
        said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    return said.decode()


async def listed(local: LocalModal, *arguments: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(await cli(local, *arguments, "--json"))
    return rows


async def test_the_command_line_deploys_shows_and_stops(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with local_modal(monkeypatch) as (local, client):
        file = tmp_path / "voice.py"
        file.write_text(APP.format(most=2))
        assert "App deployed" in await cli(local, "deploy", str(file))
        [app] = await listed(local, "app", "list")
        assert (app["description"], app["state"], app["tasks"]) == ("voice", "deployed", "1")

        await until(lambda: local.boots[0].ready_t)
        [container] = await listed(local, "container", "list")
        assert container["container_id"] == local.boots[0].container
        assert (container["app_id"], container["app_name"]) == (app["app_id"], "voice")

        # A second version: the call goes on where it is.
        url = await modal.Server.from_name("voice", "EchoServer", client=client).get_url.aio()
        assert url
        token = await start(url)
        async with dial(url, token) as call:
            first = (await about(call))["container"]
            file.write_text(APP.format(most=3))
            await cli(local, "deploy", str(file))
            history = await listed(local, "app", "history", "voice")
            assert [row["version"] for row in history] == ["v2", "v1"]
            await call.send("goes on")
            assert await call.recv() == "goes on"
        await end(url, token)
        await until(lambda: ended(local.boots[0]))
        assert local.boots[0].container == first

        await until(lambda: local.boots[-1].ready_t)
        await cli(local, "container", "stop", local.boots[-1].container, "--yes")
        await until(lambda: len(local.boots) == 3 and ended(local.boots[1]))

        await cli(local, "app", "stop", "voice", "--yes")
        await until(lambda: not local.pids)
        [app] = await listed(local, "app", "list")
        assert (app["state"], app["tasks"]) == ("stopped", "0")
        assert await listed(local, "container", "list") == []
        assert (
            len(await listed(local, "app", "history", "voice")) == 2
        )  # by name, though it is gone
        assert local.state.sdk_calls.unimplemented == {}
        assert local.state.container_calls.unimplemented == {}


def examples(language: str) -> list[str]:
    """The blocks of that language in the documentation."""
    text = (TESTS.parent / "docs" / "local-modal.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


async def test_the_documented_app_is_deployed_and_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Written with decorators at the top of a module, unlike what Trunkline itself deploys."""
    [code] = [block for block in examples("python") if block.startswith("# voice.py")]
    file = tmp_path / "voice.py"
    file.write_text(code)
    async with local_modal(monkeypatch) as (local, client):
        await cli(local, "deploy", str(file))
        url = await modal.Server.from_name("voice", "Voice", client=client).get_url.aio()
        assert url
        async with dial(url, await start(url)) as call:
            await call.send("hello")
            assert await call.recv() == "hello"


def test_the_documented_faults_can_be_read() -> None:
    blocks = examples("json")
    assert len(blocks) == 4
    for block in blocks:
        assert parse(json.loads(block)).rules


async def test_a_container_that_dies_says_with_what(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "voice.py"
    file.write_text(
        "import os\n"
        "import modal\n"
        "app = modal.App('voice')\n"
        "@app.server(min_containers=1)\n"
        "@modal.sessioned()\n"
        "class Voice:\n"
        "    @modal.enter()\n"
        "    def begin(self): ...\n"
        "if not modal.is_local():\n"
        "    print('no such accelerator')\n"
        "    os._exit(3)\n"
    )
    async with local_modal(monkeypatch) as (local, _):
        await cli(local, "deploy", str(file))
        await until(lambda: local.boots and ended(local.boots[0]))
        assert (local.boots[0].exit, local.boots[0].error) == (3, "no such accelerator")


async def test_the_sdk_and_containers_make_no_call_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of the SDK that Trunkline uses; what a new version of it needs besides is named here."""
    async with local_modal(monkeypatch) as (local, client):
        secret = modal.Secret.from_dict({"ECHO_SECRET": "x"})
        options: dict[str, Any] = {
            "gpu": ["L4", "A10"],
            "experimental_options": {"enable_gpu_snapshot": True},
            "routing_region": "eu-west",
            "secrets": [secret],
            "env": {"A": "b"},
        }
        url = await deploy(client, **options)
        await deploy(client, **options, min_containers=1)
        server = modal.Server.from_name("echo", "EchoServer", client=client)
        await server.autoscaler.update.aio(buffer_containers=1, max_containers=3)
        await server.autoscaler.settings.aio()
        await server._experimental_list_containers.aio()
        session = await server.sessions.start.aio(idle_timeout=5)
        async with dial(url, session.token) as call:
            await about(call)
        await server.sessions.terminate.aio(session.token)
        proxies = modal.Workspace.from_context(client=client).proxy_tokens
        await proxies.create.aio("mine")
        app = await modal.App.lookup.aio("echo", client=client)
        await app.set_tags.aio({"a": "b"}, client=client)
        assert await app.get_tags.aio(client=client) == {"a": "b"}
        await modal.experimental.list_deployed_apps.aio(client=client)
        await app.stop.aio(client=client)
        await until(lambda: not local.pids)

        assert dict(local.state.sdk_calls.unimplemented) == {}
        assert dict(local.state.container_calls.unimplemented) == {}
        assert local.state.container_calls.served["ContainerServerLifecycleReady"] >= 1


async def test_a_budget_of_gpus_is_shared_by_all_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = {"L4": 3, "A10": 1}
    async with local_modal(monkeypatch, gpus=budget, queue_seconds=0.3) as (local, client):

        async def up(count: int) -> None:
            await until(lambda: len(local.boots) == count and local.boots[-1].ready_t)

        await deploy(client, "pair", gpu="L4:2", min_containers=1)
        await up(1)
        await deploy(client, "either", gpu=["L4", "A10"], min_containers=2)
        await up(3)
        other = await deploy(client, "other", gpu="L4", min_containers=1)
        assert (await post(other + START, TOKEN)).status_code == 503  # all three are in use
        assert [(boot.app, boot.gpu) for boot in local.boots] == [
            ("pair", "L4"),
            ("either", "L4"),
            ("either", "A10"),
        ]
        server = modal.Server.from_name("pair", "EchoServer", client=client)
        await server.autoscaler.update.aio(min_containers=0)
        await until(lambda: ended(local.boots[0]))
        await up(4)
        assert (local.boots[3].app, local.boots[3].gpu) == ("other", "L4")
        assert local.machine.gpus == {"L4": 2, "A10": 1}
