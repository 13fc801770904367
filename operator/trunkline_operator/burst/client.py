"""The one Modal client: deploys an agent's app, makes its snapshot, stops it.

Only the public SDK is used, with an explicit client per credentials, and every call has a deadline: left to
itself the SDK takes a minute to find Modal unreachable, 25 minutes to give up on a session, and retries
for ever when it is throttled. `MODAL_SERVER_URL` is read by the SDK.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Collection, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import aiohttp
import modal
import modal.exception
import modal.experimental
from grpclib import GRPCError

from trunkline_operator.burst.standby import Scalings
from trunkline_operator.burst.terms import (
    BurstError,
    BurstReason,
    Credentials,
    Deployed,
    Found,
    Place,
    Starts,
)
from trunkline_runtime.contract import TAG_UID
from trunkline_runtime.modal_app import BurstApp, build_app, server_name

__all__ = [
    "Burst",
    "BurstApp",
    "BurstError",
    "BurstReason",
    "Credentials",
    "Deployed",
    "Found",
    "Place",
    "Starts",
]

CALL_SECONDS: Final = 20.0  # for anything but a deployment and a warm-up
DEPLOY_SECONDS: Final = 900.0  # an image with a model in it takes minutes to build
THROTTLE_SECONDS: Final = 30
SESSION_IDLE_SECONDS: Final = 60  # after which Modal ends a warm-up session that was left behind
MAX_MESSAGE: Final = 512  # characters, for a condition


# The first that fits; what fits none has the reason of the work that failed.
REASONS: Final[tuple[tuple[type[Exception], BurstReason], ...]] = (
    (modal.exception.AuthError, BurstReason.CREDENTIALS_REFUSED),
    (modal.exception.PermissionDeniedError, BurstReason.CREDENTIALS_REFUSED),
    (modal.exception.ConnectionError, BurstReason.MODAL_UNREACHABLE),
    (modal.exception.ResourceExhaustedError, BurstReason.LIMIT_REACHED),
    (modal.exception.ImageBuildError, BurstReason.IMAGE_BUILD_FAILED),
    (modal.exception.InvalidError, BurstReason.REFUSED),
)
# What Modal answers for a thing that a plan, or a token, does not have.
NO_REPORT: Final = (
    modal.exception.PermissionDeniedError,
    modal.exception.ConflictError,  # a precondition that is not met
    modal.exception.UnimplementedError,
)
# What the SDK raises when something is wrong outside this process.
FAILURES: Final = (modal.exception.Error, GRPCError, aiohttp.ClientError, OSError)


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
                place = Place(app=app.name, environment=app.environment, credentials=credentials)
                found = [await _server(place, r, client).get_url.aio() for r in app.regions]
        if not built.app_id or not all(found):
            raise BurstError(BurstReason.DEPLOY_FAILED, f"Modal gave {app.name} no id or no URL")
        return Deployed(app_id=built.app_id, urls=dict(zip(app.regions, found, strict=True)))

    async def warm_up(self, place: Place, region: str, deadline: float) -> float:
        """Starts and ends a session, so that the snapshot exists before a caller waits for it.

        Returns the seconds until the session had a container; `deadline` seconds at most.
        """
        began = time.monotonic()
        async with self._failing(BurstReason.WARM_UP_FAILED, place.credentials):
            client = await self._client(place.credentials)
            server = _server(place, region, client)
            async with asyncio.timeout(deadline):
                session = await server.sessions.start.aio(idle_timeout=SESSION_IDLE_SECONDS)
            seconds = time.monotonic() - began
            async with asyncio.timeout(self._call_seconds):
                await server.sessions.terminate.aio(session.token)
        return seconds

    async def scale(self, place: Place, scalings: Scalings) -> None:
        """Changes live servers' autoscalers; nothing is deployed and no call is touched."""
        async with self._failing(BurstReason.SCALING_FAILED, place.credentials):
            client = await self._client(place.credentials)
            async with asyncio.timeout(self._call_seconds):
                for region, scaling in scalings.items():
                    await _server(place, region.value, client).autoscaler.update.aio(
                        min_containers=scaling.minimum,
                        buffer_containers=scaling.buffer,
                        max_containers=scaling.maximum,
                        scaledown_window=scaling.window,
                    )

    async def starts(
        self, place: Place, regions: Iterable[str], since: float, until: float
    ) -> Starts:
        """How the containers of an app started between two moments, in seconds since the epoch."""
        good = bad = 0
        there: dict[str, int] = {}
        async with self._failing(BurstReason.STATS_FAILED, place.credentials):
            client = await self._client(place.credentials)
            async with asyncio.timeout(self._call_seconds):
                for region in regions:
                    stats = await _server(place, region, client).stats.aio(
                        since=datetime.fromtimestamp(since, UTC),
                        until=datetime.fromtimestamp(until, UTC),
                    )
                    bad += stats.container_error_count
                    there[region] = stats.container_total_count
                    # Modal boots anew what it could not restore, and that start says nothing of restores.
                    good += max(stats.container_started_count - stats.container_error_count, 0)
        return Starts(good=good, bad=bad, there=there)

    async def find(
        self, environment: str, credentials: Credentials, prefix: str, known: Collection[str]
    ) -> list[Found]:
        """The deployed apps of an environment whose names begin so, with their tags; not those that are known."""
        async with self._failing(BurstReason.SEARCH_FAILED, credentials):
            client = await self._client(credentials)
            async with asyncio.timeout(self._call_seconds):
                listed = await modal.experimental.list_deployed_apps.aio(
                    environment_name=environment, client=client
                )
            found = []
            names = {one.name for one in listed if one.name.startswith(prefix)}
            for name in sorted(names - set(known)):
                # One that goes meanwhile is no longer to be found.
                with contextlib.suppress(modal.exception.NotFoundError):
                    async with asyncio.timeout(self._call_seconds):
                        app = await modal.App.lookup.aio(
                            name, environment_name=environment or None, client=client
                        )
                        tags = await app.get_tags.aio(client=client)
                    found.append(Found(name=name, tags=tags))
        return found

    async def billed(self, credentials: Credentials, day: float) -> dict[str, float] | None:
        """What Modal bills for a whole day of UTC that begins then: dollars by the uid in an app's tags.

        None where the workspace has no such report: plans differ.
        """
        start = datetime.fromtimestamp(day, UTC)
        found: dict[str, float] = {}
        async with self._failing(BurstReason.BILL_FAILED, credentials):
            client = await self._client(credentials)
            try:
                async with asyncio.timeout(self._call_seconds):
                    items = await modal.Workspace.from_context(client=client).billing.report.aio(
                        start=start,
                        end=start + timedelta(days=1),
                        resolution="d",
                        tag_names=[TAG_UID],
                    )
            except NO_REPORT:
                return None
        for item in items:
            if item.interval_start == start and (uid := item.tags.get(TAG_UID)):
                found[uid] = found.get(uid, 0.0) + float(item.cost)
        return found

    async def stop(self, place: Place) -> bool:
        """Stops the app, and says whether there was one; one that is not there is stopped already."""
        async with self._failing(BurstReason.STOP_FAILED, place.credentials):
            client = await self._client(place.credentials)
            with contextlib.suppress(modal.exception.NotFoundError):
                async with asyncio.timeout(self._call_seconds):
                    app = await modal.App.lookup.aio(
                        place.app, environment_name=place.environment or None, client=client
                    )
                    await app.stop.aio(client=client)
                return True
        return False

    async def close(self) -> None:
        for credentials in list(self._clients):
            await self._forget(credentials)

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
            _unless_cancelled()
            raise
        except TimeoutError as error:
            _unless_cancelled()
            raise BurstError(otherwise, "it took too long") from error
        except FAILURES as error:
            _unless_cancelled()
            reason = next(
                (reason for kind, reason in REASONS if isinstance(error, kind)), otherwise
            )
            raise BurstError(reason, _message(error, credentials)) from error
        else:
            _unless_cancelled()


def _unless_cancelled() -> None:
    """Raises CancelledError in a task that was cancelled.

    In the middle of a call, the SDK may end with an answer or an error of Modal's instead, and whoever has cancelled
    the task would wait for its end for ever.
    """
    if (task := asyncio.current_task()) and task.cancelling():
        raise asyncio.CancelledError


def _server(place: Place, region: str, client: Any) -> Any:
    return modal.Server.from_name(
        place.app,
        server_name(region),
        environment_name=place.environment or None,
        client=client,
    )


def _message(error: Exception, credentials: Credentials) -> str:
    """The error's own words, without what must not be read."""
    message = " ".join((str(error) or type(error).__name__).split())
    for secret in credentials.token_secret, credentials.token_id:
        if secret:
            message = message.replace(secret, "…")
    return message[:MAX_MESSAGE]
