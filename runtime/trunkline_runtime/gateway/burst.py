"""Sessions at Modal servers, by plain HTTP with our own deadline.

Modal's own client may wait for a session for many minutes; a caller gives up after ten seconds. So a start that
is not answered in time counts as "no capacity", and whatever it brings later is ended at once.
"""

import asyncio
import logging
import ssl
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

import httpx
import jwt

from trunkline_runtime.contract import START_HEADER
from trunkline_runtime.gateway.descriptors import NO_DESCRIPTOR, is_short
from trunkline_runtime.gateway.dialling import Failed
from trunkline_runtime.gateway.routes import BurstRung

log = logging.getLogger("trunkline.gateway")
T = TypeVar("T")
Late = Callable[[], object]
"""Told that a container took longer to be restored than its rung allows, and that nobody waited for it."""

START_PATH: Final = "/_modal/sessions/start"
TERMINATE_PATH: Final = "/_modal/sessions/terminate"
TICKET_SECONDS: Final = 30  # from the ticket's making to the worker's check of it
IDLE_SECONDS: Final = 30  # a session that nobody ends, Modal ends itself; its own default is 600
ABANDONED_SECONDS: Final = 5.0  # how long an answer that nobody waits for may still come in
# A start that is kept although nobody waits makes Modal keep a container for it: two tell enough.
FOLLOWED: Final = 2
TERMINATE_TRIES: Final = 3
CLOSE_SECONDS: Final = 10.0
MAX_CONNECTIONS: Final = 1000  # sessions being started at once
WARM, COLD, RESTORED = "warm", "cold", "restored"
"""How a container was there for a call: before it, or started for it without a snapshot or from one."""
REFUSALS: Final[Mapping[int, str]] = {
    401: "does not know the proxy token",
    403: "does not let the proxy token into the app's environment",
    404: "has no such server: its app is stopped",
    429: "has reached a limit of the workspace",
    503: "has no container free for a session",
}
LIMITED: Final = 429
NO_ROOM: Final = frozenset({LIMITED, 503})  # an answer like any other: the next call may find room


@dataclass(frozen=True, slots=True)
class Session:
    """A place in one container, held until it is ended."""

    rung: BurstRung
    session: str
    token: str = field(repr=False)


class BurstSessions:
    """Starts and ends sessions; every request it has begun is bounded and awaited by `close`."""

    def __init__(self) -> None:
        self.tls = ssl.create_default_context()
        # No proxy from the environment: the data link that follows could not use one.
        self._client = httpx.AsyncClient(
            verify=self.tls, trust_env=False, limits=httpx.Limits(max_connections=MAX_CONNECTIONS)
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self._followed = 0  # starts that nobody waits for, kept to learn how long they take

    def __repr__(self) -> str:
        return f"<BurstSessions requests={len(self._tasks)}>"

    async def start(self, rung: BurstRung, call: str, by: float, late: Late) -> Session | Failed:
        """A session, or why there is none by `by`, a time of the loop's clock."""
        began = asyncio.get_running_loop().time()
        request = self._spawn(self._start(rung, call))
        try:
            async with asyncio.timeout_at(by):
                return await asyncio.shield(request)
        except TimeoutError:
            self._abandon(request, rung, began, late)
            return Failed("did not start a session in time")
        except asyncio.CancelledError:
            self._abandon(request, rung, began, late)
            raise

    def end(self, session: Session) -> None:
        """Ends a session in the background."""
        self._spawn(self._terminate(session))

    async def close(self) -> None:
        """Waits for what is under way, at most `CLOSE_SECONDS`."""
        deadline = asyncio.get_running_loop().time() + CLOSE_SECONDS
        while self._tasks and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(self._tasks, timeout=left)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    async def _start(self, rung: BurstRung, call: str) -> Session | Failed:
        headers = {
            **_authorization(rung),
            "x-idempotency-key": f"{call}-{rung.name}",
            "x-modal-server-session-idle-timeout": str(IDLE_SECONDS),
        }
        try:
            response = await self._post_twice(rung.url + START_PATH, headers)
        except httpx.HTTPError as error:
            if is_short(error):
                return Failed(NO_DESCRIPTOR, ours=True)
            return Failed(f"cannot be reached: {error or type(error).__name__}")
        if response.status_code != 200:
            status = response.status_code
            return Failed(refusal(status), full=status in NO_ROOM, limited=status == LIMITED)
        try:
            body = response.json()
            return Session(rung, str(body["session_id"]), str(body["token"]))
        except (ValueError, KeyError, TypeError):
            return Failed("answered a session's start with something else")

    async def _post_twice(self, url: str, headers: dict[str, str]) -> httpx.Response:
        """A kept connection may be closed by the other side as we write: the key makes a second try safe."""
        try:
            return await self._client.post(url, headers=headers, timeout=None)
        except httpx.TransportError:
            return await self._client.post(url, headers=headers, timeout=None)

    async def _terminate(self, session: Session) -> None:
        headers = {
            **_authorization(session.rung),
            "x-modal-server-session-token": session.token,
        }
        why = ""
        for attempt in range(TERMINATE_TRIES):
            if attempt:
                await asyncio.sleep(attempt)
            try:
                response = await self._client.post(
                    session.rung.url + TERMINATE_PATH, headers=headers, timeout=2.0
                )
            except httpx.HTTPError as error:
                why = f"{error or type(error).__name__}"
                continue
            if response.is_success or response.status_code == 404:  # 404: it is over already
                return
            why = f"HTTP {response.status_code}"
        log.warning(
            "a burst session could not be ended; it ends by itself when idle",
            extra={"session": session.session, "rung": session.rung.name, "why": why},
        )

    def _abandon(
        self, request: "asyncio.Task[Session | Failed]", rung: BurstRung, began: float, late: Late
    ) -> None:
        """Nobody waits any longer. A few are followed, to learn whether restores have become slow."""
        loop = asyncio.get_running_loop()
        patience = ABANDONED_SECONDS
        if rung.slow and self._followed < FOLLOWED:
            patience = max(patience, began + rung.slow + ABANDONED_SECONDS - loop.time())
            self._followed += 1
            request.add_done_callback(self._unfollow)
        request.add_done_callback(partial(self._unwanted, began, late))
        timer = loop.call_later(patience, request.cancel)
        request.add_done_callback(lambda _: timer.cancel())

    def _unfollow(self, _: object) -> None:
        self._followed -= 1

    def _unwanted(
        self, began: float, late: Late, request: "asyncio.Task[Session | Failed]"
    ) -> None:
        if request.cancelled() or not isinstance(session := request.result(), Session):
            return
        seconds = asyncio.get_running_loop().time() - began
        if 0 < session.rung.slow < seconds:
            self._spawn(self._learn(session, seconds, late))
        else:
            self.end(session)

    async def _learn(self, session: Session, seconds: float, late: Late) -> None:
        """Whether the container was restored all that time: a start also waits where all containers are full."""
        headers = {"Modal-Authorization": f"Bearer {session.token}"}
        try:
            answer = await self._client.get(session.rung.url, headers=headers, timeout=2.0)
            how, _, ready = answer.headers.get(START_HEADER, "").partition(" ")
            if how == RESTORED and float(ready) < seconds:
                late()
        except (httpx.HTTPError, ValueError):
            pass  # the next one may tell
        finally:
            self.end(session)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def start_of(started: tuple[str, float] | None, seconds: float) -> str:
    """What a container's own word means for a call that asked for it so long ago; "" = it says nothing.

    Only durations are compared, for the clocks of two machines differ.
    """
    if started is None:
        return ""
    how, ready = started
    return WARM if ready > seconds else how


def refusal(status: int) -> str:
    """Why Modal gave no session, in words that say who must act; the status is Modal's answer."""
    return f"{REFUSALS.get(status, 'refused a session')} (HTTP {status})"


def burst_ticket(rung: BurstRung, agent: str, call: str) -> str:
    """What the session's container checks before it takes the data link. It is used once, and at once."""
    now = int(time.time())
    claims = {
        "aud": agent,
        "call": call,
        "jti": uuid.uuid4().hex,
        "iat": now,
        "exp": now + TICKET_SECONDS,
    }
    return jwt.encode(claims, rung.ticket_key, algorithm="HS256")


def _authorization(rung: BurstRung) -> dict[str, str]:
    return {"Authorization": f"Bearer {rung.proxy_token}"} if rung.proxy_token else {}
