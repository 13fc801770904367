"""What tests of burst share: an app, a local Modal with a client for it, and calls to a session."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import httpx
import jwt
import pytest
from operator_rig import World
from websockets.asyncio.client import ClientConnection, connect

from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import Config
from trunkline_operator.burst.client import (
    Burst,
    BurstApp,
    BurstError,
    Credentials,
    Place,
)
from trunkline_runtime.contract import (
    ENV_ENGINE,
    REALTIME_PATH,
    TICKET_HEADER,
)

KEY: Final = "a key of thirty-two characters!!"
GOOD: Final = Credentials(token_id="ak-good", token_secret="as-good-and-secret")
BAD: Final = Credentials(token_id="ak-bad", token_secret="as-bad-and-secret")
PROXY: Final = {"Authorization": "Bearer wk-1.ws-1"}
PATIENCE: Final = 30.0
EAST: Final = "us-east"
APP: Final = BurstApp(
    name="va-default-echo",
    agent="default/echo",
    engine={ENV_ENGINE: "loopback"},
    ticket_key=KEY,
    slots=2,
    max_containers=2,
    scaledown_window=2,
)


def place(app: BurstApp = APP, credentials: Credentials = GOOD) -> Place:
    return Place(app=app.name, environment=app.environment, credentials=credentials)


@contextlib.asynccontextmanager
async def world(
    monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> AsyncIterator[tuple[LocalModal, Burst]]:
    tokens = {"ak-good": "as-good-and-secret"}
    config = Config(clones=1, proxy_tokens={"wk-1": "ws-1"}, api_tokens=tokens, **settings)
    async with LocalModal(config) as local:
        monkeypatch.setenv("MODAL_SERVER_URL", local.server_url)
        burst = Burst(call_seconds=5, deploy_seconds=PATIENCE)
        try:
            yield local, burst
        finally:
            await burst.close()


async def joined(world: World, modal: LocalModal) -> None:
    """The operator's agents can use this Modal: its address, and the Secret `modal` with a token of each kind."""
    world.env["MODAL_SERVER_URL"] = modal.server_url
    proxy = {"proxy-token-id": "wk-1", "proxy-token-secret": "ws-1"}
    tokens = {"token-id": GOOD.token_id, "token-secret": GOOD.token_secret}
    await world.secret("modal", **tokens, **proxy)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.02)


async def session(url: str) -> str:
    async with httpx.AsyncClient(timeout=PATIENCE) as http:
        answer = await http.post(f"{url}/_modal/sessions/start", headers=PROXY)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["token"])


def call(
    url: str, token: str, key: str = KEY, call: str = "call-1", agent: str = APP.agent
) -> connect:
    """A data link as a gateway opens it."""
    claims = {"exp": time.time() + 60, "aud": agent, "call": call, "jti": token}
    headers = {
        "Modal-Authorization": f"Bearer {token}",
        TICKET_HEADER: jwt.encode(claims, key, algorithm="HS256"),
    }
    address = url.replace("http", "ws", 1) + REALTIME_PATH
    return connect(address, additional_headers=headers, open_timeout=PATIENCE, proxy=None)


async def answered(link: ClientConnection) -> None:
    """The gateway sends the call's settings first; then the worker speaks Realtime."""
    await link.send(json.dumps({"type": "trunkline.settings", "settings": {}}))
    assert json.loads(await link.recv())["type"] == "session.created"


async def fails(work: Any) -> BurstError:
    with pytest.raises(BurstError) as raised:
        async with asyncio.timeout(PATIENCE):
            await work
    assert "secret" not in str(raised.value)
    return raised.value
