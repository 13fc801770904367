"""The one Modal client: deploys an agent's app, makes its snapshot, stops it.

Only the public SDK is used, with an explicit client per credentials, and every call has a deadline: left to
itself the SDK takes a minute to find Modal unreachable, 25 minutes to give up on a session, and retries
for ever when it is throttled. `MODAL_SERVER_URL` is read by the SDK.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

import aiohttp
import modal
import modal.exception
from grpclib import GRPCError

from trunkline_runtime.modal_app import SERVER, BurstApp, build_app

__all__ = ["Burst", "BurstApp", "BurstError", "BurstReason", "Credentials", "Deployed", "Starts"]

CALL_SECONDS: Final = 20.0  # for anything but a deployment and a warm-up
DEPLOY_SECONDS: Final = 900.0  # an image with a model in it takes minutes to build
THROTTLE_SECONDS: Final = 30
SESSION_IDLE_SECONDS: Final = 60  # after which Modal ends a warm-up session that was left behind
MAX_MESSAGE: Final = 512  # characters, for a condition


class BurstReason(StrEnum):
    """Why something at Modal failed; the reasons of the BurstReady condition."""

    CREDENTIALS_REFUSED = "CredentialsRefused"
    MODAL_UNREACHABLE = "ModalUnreachable"
    LIMIT_REACHED = "LimitReached"
    REFUSED = "RefusedByModal"
    IMAGE_BUILD_FAILED = "ImageBuildFailed"
    DEPLOY_FAILED = "DeployFailed"
    WARM_UP_FAILED = "WarmUpFailed"
    STOP_FAILED = "StopFailed"
    STATS_FAILED = "StatsFailed"


# The first that fits; what fits none has the reason of the work that failed.
REASONS: Final[tuple[tuple[type[Exception], BurstReason], ...]] = (
    (modal.exception.AuthError, BurstReason.CREDENTIALS_REFUSED),
    (modal.exception.PermissionDeniedError, BurstReason.CREDENTIALS_REFUSED),
    (modal.exception.ConnectionError, BurstReason.MODAL_UNREACHABLE),
    (modal.exception.ResourceExhaustedError, BurstReason.LIMIT_REACHED),
    (modal.exception.ImageBuildError, BurstReason.IMAGE_BUILD_FAILED),
    (modal.exception.InvalidError, BurstReason.REFUSED),
)
# What the SDK raises when something is wrong outside this process.
FAILURES: Final = (modal.exception.Error, GRPCError, aiohttp.ClientError, OSError)


class BurstError(Exception):
    """Something at Modal failed. The message is a sentence for people, and holds no token."""

    def __init__(self, reason: BurstReason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason, self.message = reason, message


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """An API token of a Modal workspace."""

    token_id: str
    token_secret: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    app_id: str
    url: str  # where sessions are started


@dataclass(frozen=True, slots=True, kw_only=True)
class Starts:
    """Containers that came up, and those that ended in an error, while starting or later."""

    good: int
    bad: int


class Burst:
    """Deploys, warms up and stops apps; safe for use by many coroutines of one loop."""

    def __init__(
        self, call_seconds: float = CALL_SECONDS, deploy_seconds: float = DEPLOY_SECONDS
    ) -> None:
        self._call_seconds, self._deploy_seconds = call_seconds, deploy_seconds
        self._clients: dict[Credentials, Any] = {}
        os.environ.setdefault("MODAL_MAX_THROTTLE_WAIT", str(THROTTLE_SECONDS))

    async def deploy(self, app: BurstApp, credentials: Credentials) -> Deployed:
        """Makes the app at Modal be as described; the same again changes nothing.

        Containers start when sessions do, so a worker that cannot start is not noticed here.
        """
        async with self._failing(BurstReason.DEPLOY_FAILED, credentials):
            client = await self._client(credentials)
            environment = app.environment or None
            async with asyncio.timeout(self._deploy_seconds):
                built = build_app(app)
                await built.deploy.aio(client=client, environment_name=environment)
                url = await self._server(app.name, app.environment, client).get_url.aio()
        if not built.app_id or not url:
            raise BurstError(BurstReason.DEPLOY_FAILED, f"Modal gave {app.name} no id or no URL")
        return Deployed(app_id=built.app_id, url=url)

    async def warm_up(
        self, app_name: str, environment: str, credentials: Credentials, deadline: float
    ) -> float:
        """Starts and ends a session, so that the snapshot exists before a caller waits for it.

        Returns the seconds until the session had a container; `deadline` seconds at most.
        """
        began = time.monotonic()
        async with self._failing(BurstReason.WARM_UP_FAILED, credentials):
            client = await self._client(credentials)
            server = self._server(app_name, environment, client)
            async with asyncio.timeout(deadline):
                session = await server.sessions.start.aio(idle_timeout=SESSION_IDLE_SECONDS)
            seconds = time.monotonic() - began
            async with asyncio.timeout(self._call_seconds):
                await server.sessions.terminate.aio(session.token)
        return seconds

    async def starts(
        self, app_name: str, environment: str, credentials: Credentials, since: float, until: float
    ) -> Starts:
        """How the containers of an app started between two moments, in seconds since the epoch."""
        async with self._failing(BurstReason.STATS_FAILED, credentials):
            client = await self._client(credentials)
            async with asyncio.timeout(self._call_seconds):
                stats = await self._server(app_name, environment, client).stats.aio(
                    since=datetime.fromtimestamp(since, UTC),
                    until=datetime.fromtimestamp(until, UTC),
                )
        bad = stats.container_error_count
        # Modal boots anew what it could not restore, and that start says nothing of restores.
        return Starts(good=max(stats.container_started_count - bad, 0), bad=bad)

    async def stop(self, app_name: str, environment: str, credentials: Credentials) -> None:
        """Stops the app; one that is not there is stopped already."""
        async with self._failing(BurstReason.STOP_FAILED, credentials):
            client = await self._client(credentials)
            with contextlib.suppress(modal.exception.NotFoundError):
                async with asyncio.timeout(self._call_seconds):
                    app = await modal.App.lookup.aio(
                        app_name, environment_name=environment or None, client=client
                    )
                    await app.stop.aio(client=client)

    async def close(self) -> None:
        for credentials in list(self._clients):
            await self._forget(credentials)

    def _server(self, app_name: str, environment: str, client: Any) -> Any:
        return modal.Server.from_name(
            app_name, SERVER, environment_name=environment or None, client=client
        )

    async def _client(self, credentials: Credentials) -> Any:
        """A client that Modal has just answered with these credentials."""
        try:
            async with asyncio.timeout(self._call_seconds):
                client = self._clients.get(credentials)
                if client is None:
                    opened = await modal.Client.from_credentials.aio(
                        credentials.token_id, credentials.token_secret
                    )
                    client = self._clients.setdefault(credentials, opened)
                    if client is not opened:  # another coroutine was faster
                        await opened.close.aio()
                await client.hello.aio()
        except TimeoutError as error:
            message = f"Modal did not answer within {self._call_seconds:g} s"
            raise BurstError(BurstReason.MODAL_UNREACHABLE, message) from error
        except modal.exception.AuthError:
            await self._forget(credentials)
            raise
        return client

    async def _forget(self, credentials: Credentials) -> None:
        if client := self._clients.pop(credentials, None):
            await client.close.aio()

    @contextlib.asynccontextmanager
    async def _failing(
        self, otherwise: BurstReason, credentials: Credentials
    ) -> AsyncIterator[None]:
        """Turns what goes wrong outside into `BurstError`; bugs of ours pass."""
        try:
            yield
        except BurstError:
            raise
        except TimeoutError as error:
            raise BurstError(otherwise, "it took too long") from error
        except FAILURES as error:
            reason = next(
                (reason for kind, reason in REASONS if isinstance(error, kind)), otherwise
            )
            raise BurstError(reason, _message(error, credentials)) from error


def _message(error: Exception, credentials: Credentials) -> str:
    """The error's own words, without what must not be read."""
    message = " ".join((str(error) or type(error).__name__).split())
    for secret in credentials.token_secret, credentials.token_id:
        if secret:
            message = message.replace(secret, "…")
    return message[:MAX_MESSAGE]
