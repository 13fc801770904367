"""Keeps each agent's burst account: hears what gateways spend, charges for containers, deals what may be spent.

It works beside the looks, once a second, so that no call's cost makes an agent be looked at. Looks bring the terms
and the counts of containers, and write what is here into the status; a new operator goes on from there.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Self

from trunkline_operator import parts
from trunkline_operator.gateways.fleet import Fleet
from trunkline_operator.scaling import spend
from trunkline_operator.scaling.spend import Account, Terms

TICK_SECONDS: Final = 1.0  # gateways tell their loads as often
# A count is asked for each 10 s while there are calls; without three of them an estimate is charged.
STALE_SECONDS: Final = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Containers that lived since the count before, by region, and up to when."""

    containers: Mapping[str, int]
    until: float


@dataclass(slots=True)
class _Book:
    account: Account
    terms: Terms
    calls: int = 0
    shut: bool = False
    new: bool = True  # nothing was charged yet since an earlier operator


class Treasury:
    """All agents' accounts; an asynchronous context manager. `changed(agent)` tells of a budget that was used up."""

    def __init__(
        self, fleet: Fleet, changed: Callable[[str], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._fleet = fleet
        self._changed = changed
        self._clock = clock
        self._books: dict[str, _Book] = {}
        self._task: asyncio.Task[None] | None = None
        fleet.replaced = self.bury

    def __repr__(self) -> str:
        return f"Treasury({ {agent: book.account for agent, book in self._books.items()} })"

    async def __aenter__(self) -> Self:
        self._task = parts.begin(self._run(), "the dealing of budgets")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task:
            await parts.end(self._task)

    def agree(
        self, agent: str, terms: Terms, earlier: Account | None, count: Count | None, calls: int
    ) -> None:
        """What a look knows: the terms, what an earlier operator wrote, and Modal's last count."""
        now = self._clock()
        book = self._books.get(agent)
        if book is None:
            book = self._books[agent] = _Book(earlier or Account(at=now), terms)
        book.terms, book.calls = terms, calls
        if count and count.until > book.account.at:
            whole, share = sum(count.containers.values()), terms.share(count.containers)
            book.account = spend.counted(book.account, terms, whole, count.until, share)
            book.new = False

    def account(self, agent: str) -> Account | None:
        """As it would be if containers were charged now; None for an agent without burst."""
        book = self._books.get(agent)
        if book is None:
            return None
        return spend.upto(book.account, book.terms, book.calls, self._clock())

    def shut(self, agent: str) -> bool:
        """The agent's budget is used up."""
        book = self._books.get(agent)
        return book is not None and book.shut

    def forget(self, agent: str) -> None:
        self._books.pop(agent, None)

    def bury(self, boot: str) -> None:
        """A gateway is dead, for another answers where it was."""
        for book in self._books.values():
            book.account = spend.buried(book.account, boot)

    def tick(self) -> None:
        """Hears, charges what nobody counted, and deals."""
        now = self._clock()
        for agent, book in self._books.items():
            said = self._fleet.loads.spending(agent)
            account = spend.heard(book.account, said, now)
            if book.new and said:
                account = spend.estimated(account, book.terms, now)
                book.new = False
            elif not (spend.presumed(account, book.terms, book.calls) or account.starts):
                account = spend.counted(account, book.terms, 0, now)  # nothing runs
            elif now - account.at > STALE_SECONDS:
                containers = spend.presumed(account, book.terms, book.calls)
                account = replace(
                    spend.counted(account, book.terms, containers, now), starts=account.starts
                )
            if book.terms.budget.limits and self._fleet.pushing:
                here = {boot: 1.0 + word.starts for boot, word in said.items()}
                account, ceilings = spend.dealt(account, book.terms, here, now)
                self._fleet.allow(agent, ceilings)
            book.account = account
            shut = spend.shut(account, book.terms, now, book.shut)
            if shut is not book.shut:
                book.shut = shut
                self._changed(agent)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.tick()
