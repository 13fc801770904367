"""What Modal bills for each agent's app, to hold against what the operator has reckoned.

Modal tells what an app cost by whole days of UTC, and some plans do not tell it at all: that is said once, and is no
trouble. One question an hour and account answers for all of its agents. It is for people: nothing is let in or kept
off by it, because a bill comes a day late.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Self

from trunkline_operator import parts
from trunkline_operator.burst.sdk import Sdk
from trunkline_operator.burst.terms import BurstError, Credentials
from trunkline_operator.scaling.spend import DAY

ASK_SECONDS: Final = 3600.0  # between two questions about one account, whatever came of the first

log = logging.getLogger("trunkline.burst")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What Modal bills for one app."""

    day: float  # its beginning, in seconds since the epoch
    dollars: float
    at: float  # when Modal said so


@dataclass(frozen=True, slots=True, kw_only=True)
class _Account:
    """One account: its agents by name, and Modal's last answer."""

    agents: Mapping[str, str] = field(default_factory=dict)  # uid by agent
    asked: float = 0.0  # when it was last asked
    day: float | None = None
    dollars: Mapping[str, float] = field(default_factory=dict)  # by uid
    lacking: bool = False  # its plan has no report


def last_whole_day(now: float) -> float:
    """The beginning of the last day of UTC that is over."""
    return now - now % DAY - DAY


class Bills:
    """An asynchronous context manager. `changed(agent)` tells of a new bill."""

    def __init__(
        self, sdk: Sdk, changed: Callable[[str], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._sdk = sdk
        self._changed = changed
        self._clock = clock
        self._accounts: dict[Credentials, _Account] = {}
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Bills({[sorted(account.agents) for account in self._accounts.values()]})"

    async def __aenter__(self) -> Self:
        self._task = parts.begin(self._run(), "the reading of bills")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task:
            await parts.end(self._task)

    def of(self, agent: str, uid: str, credentials: Credentials, asked: float = 0.0) -> Bill | None:
        """The agent's last bill; from now on Modal is asked for more of them.

        `asked` is when an earlier operator asked.
        """
        account = self._accounts.get(credentials)
        if account is None or account.agents.get(agent) != uid:
            self.forget(agent)
            account = account or _Account(asked=asked)
            agents = {**account.agents, agent: uid}
            account = self._accounts[credentials] = replace(account, agents=agents)
            self._news.set()
        if account.day is None:
            return None
        return Bill(day=account.day, dollars=account.dollars.get(uid, 0.0), at=account.asked)

    def forget(self, agent: str) -> None:
        """An account without agents is not asked about."""
        for credentials, account in list(self._accounts.items()):
            agents = {each: uid for each, uid in account.agents.items() if each != agent}
            if agents:
                self._accounts[credentials] = replace(account, agents=agents)
            else:
                del self._accounts[credentials]

    async def _run(self) -> None:
        while True:
            self._news.clear()
            now = self._clock()
            for credentials, account in list(self._accounts.items()):
                if now >= account.asked + ASK_SECONDS:
                    await self._ask(credentials, now)
            # Of accounts that nobody has, the next is due in an hour at the latest.
            asked = [account.asked for account in self._accounts.values()]
            wait = min(asked, default=now) + ASK_SECONDS - self._clock()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(wait, 1.0)):
                    await self._news.wait()

    async def _ask(self, credentials: Credentials, now: float) -> None:
        day, dollars, failed = last_whole_day(now), None, False
        try:
            dollars = await (await self._sdk.burst()).billed(credentials, day)
        except BurstError as error:  # asked again in an hour
            log.info("what Modal bills is not known: %s", error)
            failed = True
        account = self._accounts.get(credentials)
        if account is None:  # its last agent has gone meanwhile
            return
        account = replace(account, asked=now)
        if dollars is not None:
            account = replace(account, day=day, dollars=dollars, lacking=False)
            for agent in account.agents:
                self._changed(agent)
        elif not failed and not account.lacking:
            words = (
                "Modal has no billing report for the account of %s, so nothing is held against it"
            )
            log.info(words, ", ".join(sorted(account.agents)))
            account = replace(account, lacking=True)
        self._accounts[credentials] = account
