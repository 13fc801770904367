"""What Trunkline asks of Modal, in the order in which it does. It runs against the local Modal, and as it is at Modal itself:

    make test-modal-live

That needs MODAL_TOKEN_ID and MODAL_TOKEN_SECRET, takes about ten minutes (an image is built) and costs less than
$0.10: two CPU containers for some minutes each. All apps and the proxy token that it makes are gone at its end.
"""

import asyncio
import contextlib
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import httpx
import jwt
import modal
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import Config
from trunkline_operator.agent.spec import Region
from trunkline_operator.burst.bills import last_whole_day
from trunkline_operator.burst.client import (
    Burst,
    BurstApp,
    BurstError,
    BurstReason,
    Credentials,
    Place,
)
from trunkline_operator.burst.standby import Scaling
from trunkline_runtime.contract import (
    ENV_ENGINE,
    REALTIME_PATH,
    START_HEADER,
    TAG_INSTALLATION,
    TAG_UID,
    TICKET_HEADER,
)

LIVE: Final = bool(os.environ.get("TRUNKLINE_MODAL_LIVE"))
BUILD_SECONDS: Final = 900.0 if LIVE else 60.0
BOOT_SECONDS: Final = 300.0 if LIVE else 60.0
KEY: Final = "a key of thirty-two characters!!"
PREFIX: Final = "trunkline-contract-"
RUN: Final = uuid.uuid4().hex[:8]
REST: Final = Scaling(minimum=0, buffer=0, maximum=2, window=10)
APP: Final = BurstApp(
    name=f"{PREFIX}{RUN}",
    agent="default/contract",
    engine={ENV_ENGINE: "loopback"},
    ticket_key=KEY,
    environment=os.environ.get("MODAL_ENVIRONMENT", "") if LIVE else "",
    tags={TAG_INSTALLATION: RUN, TAG_UID: "uid-1"},
    regions=("us-east", "eu-west"),
    slots=2,
    max_containers=2,
    scaledown_window=10,
    max_seconds=60,
)

pytestmark = pytest.mark.timeout(3600 if LIVE else 300)


@dataclass(frozen=True, slots=True, kw_only=True)
class Modal:
    """An account, and the proxy token that starts sessions there."""

    burst: Burst
    credentials: Credentials
    proxy: dict[str, str]

    def place(self, app: BurstApp = APP) -> Place:
        return Place(app=app.name, environment=app.environment, credentials=self.credentials)


@pytest.fixture
async def account(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Modal]:
    """Modal itself where that is asked for, else the local one. Nothing is left at the end."""
    async with contextlib.AsyncExitStack() as stack:
        if LIVE:
            credentials = Credentials(
                token_id=os.environ["MODAL_TOKEN_ID"], token_secret=os.environ["MODAL_TOKEN_SECRET"]
            )
        else:
            credentials = Credentials(token_id="ak-1", token_secret="as-1")
            local = LocalModal(Config(clones=1, api_tokens={"ak-1": "as-1"}))
            await stack.enter_async_context(local)
            stack.callback(_all_implemented, local)
            monkeypatch.setenv("MODAL_SERVER_URL", local.server_url)
        client = await modal.Client.from_credentials.aio(
            credentials.token_id, credentials.token_secret
        )
        stack.push_async_callback(client.close.aio)
        tokens = modal.Workspace.from_context(client=client).proxy_tokens
        token = await tokens.create.aio(f"{PREFIX}{RUN}")
        stack.push_async_callback(tokens.delete.aio, token.token_id)
        burst = Burst(call_seconds=60, deploy_seconds=BUILD_SECONDS)
        stack.push_async_callback(burst.close)
        found = Modal(
            burst=burst,
            credentials=credentials,
            proxy={"Authorization": f"Bearer {token.token_id}.{token.token_secret}"},
        )
        stack.push_async_callback(_nothing_left, found)
        yield found


def _all_implemented(local: LocalModal) -> None:
    """Lists the calls of the SDK and of its containers that the local Modal lacks."""
    lacking = local.state.sdk_calls.unimplemented + local.state.container_calls.unimplemented
    assert dict(lacking) == {}


async def _nothing_left(account: Modal) -> None:
    for app in await account.burst.find(APP.environment, account.credentials, PREFIX + RUN, ()):
        await account.burst.stop(account.place(replace(APP, name=app.name)))


async def session(account: Modal, url: str) -> tuple[str, float]:
    """The token of a session, started as a gateway does, and the seconds that it took."""
    headers = {**account.proxy, "x-idempotency-key": uuid.uuid4().hex}
    headers["x-modal-server-session-idle-timeout"] = "30"
    began = time.monotonic()
    async with httpx.AsyncClient(timeout=BOOT_SECONDS) as http:
        answer = await http.post(f"{url}/_modal/sessions/start", headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["session_id"].startswith("sd-")
    return str(answer.json()["token"]), time.monotonic() - began


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Returns once it holds: asked at once, then each second at Modal itself and 50 times a second at the local one."""
    async with asyncio.timeout(60):
        while not await holds():
            await asyncio.sleep(1.0 if LIVE else 0.02)


async def terminated(account: Modal, url: str, token: str) -> int:
    headers = {**account.proxy, "x-modal-server-session-token": token}
    async with httpx.AsyncClient(timeout=60) as http:
        answer = await http.post(f"{url}/_modal/sessions/terminate", headers=headers)
    return answer.status_code


def call(url: str, token: str, key: str = KEY) -> connect:
    """A data link as a gateway opens it."""
    now = int(time.time())
    claims = {"aud": APP.agent, "call": token[:8], "jti": uuid.uuid4().hex, "exp": now + 30}
    headers = {
        "Modal-Authorization": f"Bearer {token}",
        TICKET_HEADER: jwt.encode(claims, key, algorithm="HS256"),
    }
    address = url.replace("http", "ws", 1) + REALTIME_PATH
    return connect(address, additional_headers=headers, open_timeout=60, proxy=None)


async def answered(link: Any) -> str:
    """The first word of the worker; returns how its container came up."""
    await link.send(json.dumps({"type": "trunkline.settings", "settings": {}}))
    async with asyncio.timeout(30):
        assert json.loads(await link.recv())["type"] == "session.created"
    return str(link.response.headers[START_HEADER].split()[0])


async def test_an_app_from_its_deployment_to_its_end(account: Modal) -> None:
    burst = account.burst
    deployed = await burst.deploy(APP, account.credentials)
    assert list(deployed.urls) == ["us-east", "eu-west"]
    assert await burst.deploy(APP, account.credentials) == deployed  # the same is no deployment
    warm = await asyncio.gather(
        *(burst.warm_up(account.place(), region, BOOT_SECONDS) for region in APP.regions)
    )
    assert all(0 < seconds < BOOT_SECONDS for seconds in warm)

    # A session in each region, and a call in it. Text, and audio larger than a frame of Opus, pass as they are.
    for url in deployed.urls.values():
        token, _ = await session(account, url)
        async with call(url, token) as link:
            assert await answered(link) in ("cold", "restored")
            await (await link.ping())
        # A ticket that another signed opens nothing, and an unknown token no container.
        with pytest.raises(InvalidStatus) as refused:
            async with call(url, token, key="another key of 32 characters!!!!!"):
                pass
        assert refused.value.response.status_code in (401, 403)
        assert await terminated(account, url, token) == 200
        with pytest.raises(InvalidStatus) as refused:
            async with call(url, "no-such-session"):
                pass
        assert 400 <= refused.value.response.status_code < 500
        assert await terminated(account, url, token) in (200, 404)  # it is over already

    # Without a proxy token nobody starts a session.
    async with httpx.AsyncClient(timeout=60) as http:
        answer = await http.post(f"{deployed.urls['us-east']}/_modal/sessions/start")
    assert answer.status_code == 401

    # What stands by is a setting of the live app; how containers started can be asked.
    began = time.time() - 3600
    await burst.scale(account.place(), {Region.US_EAST: replace(REST, minimum=1)})
    await burst.scale(account.place(), {Region.US_EAST: REST, Region.EU_WEST: REST})
    starts = await burst.starts(account.place(), APP.regions, began, time.time())
    assert starts.bad == 0

    # It is found by its tags, and then by nothing any more.
    (found,) = await burst.find(APP.environment, account.credentials, APP.name, ())
    assert (found.tags[TAG_INSTALLATION], found.tags[TAG_UID]) == (RUN, "uid-1")
    assert await burst.find(APP.environment, account.credentials, APP.name, {APP.name}) == []
    assert await burst.stop(account.place())
    assert not await burst.stop(account.place())
    assert await burst.find(APP.environment, account.credentials, APP.name, ()) == []
    # A stopped app gives no session; what stands before it at Modal may hear of that a moment later.
    async with httpx.AsyncClient(timeout=60) as http:

        async def gone() -> bool:
            url = f"{deployed.urls['us-east']}/_modal/sessions/start"
            return (await http.post(url, headers=account.proxy)).status_code != 200

        await until(gone)


async def test_what_a_day_cost_is_told_or_the_plan_has_no_such_report(account: Modal) -> None:
    day = last_whole_day(time.time())
    found = await account.burst.billed(account.credentials, day)
    if not LIVE:
        assert found == {}
    # Of a workspace that others use as well: agents' uids, and dollars.
    assert found is None or all(uid and dollars >= 0 for uid, dollars in found.items())


async def test_what_makes_no_sense_is_refused_with_a_sentence(account: Modal) -> None:
    burst, wrong = account.burst, account.credentials
    wrong = Credentials(token_id=wrong.token_id, token_secret="as-wrong")
    one = replace(APP, name=f"{APP.name}-wrong", regions=("us-east",))
    cases = {
        "GPU": (replace(one, gpu=("Z9",)), account.credentials, BurstReason.REFUSED),
        "name": (replace(one, name="x" * 65), account.credentials, BurstReason.REFUSED),
        "minimum": (replace(one, min_containers=3), account.credentials, BurstReason.REFUSED),
        "token": (one, wrong, BurstReason.CREDENTIALS_REFUSED),
    }
    for what, (app, credentials, reason) in cases.items():
        with pytest.raises(BurstError) as refused:
            await burst.deploy(app, credentials)
        assert refused.value.reason is reason, what
        assert len(refused.value.message) > 10, what
        assert account.credentials.token_secret not in str(refused.value)
    with pytest.raises(BurstError) as missing:
        await burst.warm_up(account.place(one), "us-east", 60)
    assert missing.value.reason is BurstReason.WARM_UP_FAILED
