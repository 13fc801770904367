"""Modal apps whose agents are gone: found by the operator's own entries and by the apps' tags, and stopped.

An agent leaves its app behind when its finalizer was taken off by hand, when Modal was away until the deadline of
its deletion, or when an operator died at the wrong moment. Only apps of this installation are looked at, by the
tag that names it, and only those of namespaces that this operator watches.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final

from trunkline_operator import parts
from trunkline_operator.burst.deployments import Account
from trunkline_operator.burst.sdk import Sdk
from trunkline_operator.burst.terms import BurstError, Found
from trunkline_operator.cluster.client import ApiError
from trunkline_operator.cluster.custody import Custody, Entry
from trunkline_operator.metrics import ORPHANS
from trunkline_runtime.contract import MANAGED_BY, TAG_INSTALLATION, TAG_NAMESPACE, TAG_UID

# A list of apps is a request a workspace; the tags of those that no agent has are two each.
SWEEP_SECONDS: Final = 600.0
# After a sweep that found something, or could not stop it.
RETRY_SECONDS: Final = 60.0

log = logging.getLogger("trunkline.orphans")

Living = Callable[[], Awaitable[Mapping[str, str]]]
"""The agents that are there: uid → namespace/name. Raises ApiError."""


def entries_left(entries: Mapping[str, Entry], living: Mapping[str, str]) -> dict[str, Entry]:
    """Entries whose agent is gone."""
    return {uid: entry for uid, entry in entries.items() if uid not in living}


def strays(found: list[Found], installation: str, living: Mapping[str, str]) -> list[Found]:
    """Apps of this installation whose agent is gone. Without a name of its own it has none."""
    return [
        app
        for app in found
        if installation
        and app.tags.get(TAG_INSTALLATION) == installation
        and app.tags.get(TAG_UID, "") not in ("", *living)
    ]


class Sweeper:
    """Looks for orphans at the operator's start and now and then. `watched` says which namespaces it knows."""

    def __init__(
        self, sdk: Sdk, custody: Custody, living: Living, watched: Callable[[str], bool]
    ) -> None:
        self._sdk, self._custody, self._living = sdk, custody, living
        self._watched = watched

    @contextlib.asynccontextmanager
    async def sweeping(self) -> AsyncIterator[None]:
        """Runs beside everything else."""
        async with parts.running(self._run(), name="the search for orphans"):
            yield

    async def _run(self) -> None:
        while True:
            self._custody.left.clear()
            try:
                left = await self.sweep()
            except ApiError as error:
                log.warning("no search for apps without an agent: %s", error)
                left = 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS if left else SWEEP_SECONDS):
                    await self._custody.left.wait()

    async def sweep(self) -> int:
        """Stops what no agent has; how much is to be looked at again soon."""
        # First what there is, then who lives: so an app that is found has its agent among the living.
        entries = self._custody.entries
        if not entries:  # where nothing was deployed nobody need be asked
            return 0
        found = [one for account in _accounts(entries) for one in await self._found(account)]
        living = await self._living()
        left = 0
        for uid, entry in entries_left(entries, living).items():
            if self._watched(entry.namespace):
                # One that was there is looked for once more: a deployment of it may still have been on its way.
                if await self._nothing_left(entry.account, entry.app, entry.agent):
                    await self._custody.drop(uid)
                else:
                    left += 1
        for account, app in found:
            if self._watched(app.tags.get(TAG_NAMESPACE, "")) and strays(
                [app], self._custody.installation, living
            ):
                left += not await self._nothing_left(account, app.name, app.tags[TAG_UID])
        ORPHANS.set(left)
        return left

    async def _found(self, account: Account) -> list[tuple[Account, Found]]:
        if not self._custody.installation:
            return []
        known = {entry.app for entry in self._custody.entries.values()}
        try:
            apps = await (await self._sdk.burst()).find(
                account.environment, account.credentials, f"{MANAGED_BY}-", known
            )
        except BurstError as error:
            log.warning("apps without an agent cannot be looked for: %s", error)
            return []
        return [(account, app) for app in apps]

    async def _nothing_left(self, account: Account, app: str, agent: str) -> bool:
        """Stops the app; whether there was none."""
        try:
            there = await (await self._sdk.burst()).stop(account.place(app))
        except BurstError as error:
            log.error("%s is gone, and its app %s is not stopped: %s", agent, app, error)
            return False
        if there:
            log.warning("stopped %s at Modal: its agent %s is gone", app, agent)
        return not there


def _accounts(entries: Mapping[str, Entry]) -> list[Account]:
    """Each once."""
    return list({entry.account: None for entry in entries.values()})
