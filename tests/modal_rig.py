"""What tests of the local Modal share: one of it, an app that echoes, callers, and faults."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import httpx
import modal
import modal_echo
import pytest
from websockets.asyncio.client import ClientConnection, connect

from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import Boot, Config

TOKEN: Final = {"Authorization": "Bearer wk-test.ws-test"}
PATIENCE: Final = 30.0  # seconds for anything that must happen; containers boot in about one
START: Final = "/_modal/sessions/start"
END: Final = "/_modal/sessions/terminate"


@contextlib.asynccontextmanager
async def local_modal(
    monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> AsyncIterator[tuple[LocalModal, modal.Client]]:
    """A local Modal and a client that speaks to it."""
    settings = {"clones": 1, "proxy_tokens": {"wk-test": "ws-test"}, **settings}
    async with LocalModal(Config(**settings)) as local:
        monkeypatch.setenv("MODAL_SERVER_URL", local.server_url)
        client = await modal.Client.from_credentials.aio("ak-test", "as-test")
        try:
            yield local, client
        finally:
            await client.close.aio()


async def deploy(client: modal.Client, name: str = "echo", **options: Any) -> str:
    """Deploys the echo server; returns its URL."""
    image = modal.Image.debian_slim().add_local_python_source("modal_echo")
    app = modal.App(name, image=image, include_source=False)
    settings = {
        "max_concurrency": 2,
        "target_concurrency": 2,
        "max_containers": 2,
        "scaledown_window": 2,
        "startup_timeout": 30,
        "exit_grace_period": 30,
        "enable_memory_snapshot": True,
        **options,
    }
    app.server(**settings)(modal.sessioned()(modal_echo.EchoServer))
    await app.deploy.aio(client=client)
    server = modal.Server.from_name(name, "EchoServer", client=client)
    url = await server.get_url.aio()
    assert url
    return str(url)


async def stop(client: modal.Client, name: str = "echo") -> None:
    app = await modal.App.lookup.aio(name, client=client)
    await app.stop.aio(client=client)


async def post(url: str, headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(timeout=PATIENCE) as http:
        return await http.post(url, headers=headers)


async def start(url: str) -> str:
    """The token of a new session."""
    answer = await post(url + START, TOKEN)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["token"])


async def end(url: str, token: str) -> int:
    return (await post(url + END, {"x-modal-server-session-token": token})).status_code


def dial(url: str, token: str) -> connect:
    headers = {"Modal-Authorization": f"Bearer {token}"}
    return connect(
        url.replace("http", "ws", 1) + "/call",
        additional_headers=headers,
        max_size=None,
        open_timeout=PATIENCE,
        proxy=None,
    )


async def about(connection: ClientConnection) -> dict[str, Any]:
    """What the container says of itself when a call begins."""
    told: dict[str, Any] = json.loads(await connection.recv())
    return told


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.02)


def ended(boot: Boot) -> bool:
    return boot.end_t is not None


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def shown(local: LocalModal, name: str) -> Any:
    async with httpx.AsyncClient() as http:
        return (await http.get(f"{local.local_url}/_local/{name}")).json()


@contextlib.asynccontextmanager
async def standalone(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, Any]]:
    """`python -m trunkline_dev.modal`, and what its first line says."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "trunkline_dev.modal",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout
    try:
        async with asyncio.timeout(PATIENCE):
            yield process, json.loads(await process.stdout.readline() or "null")
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
