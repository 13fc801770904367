"""Walks a call down its ladder until a worker answers it."""

import asyncio
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from trunkline_runtime.contract import KEPT, NO_SLOT
from trunkline_runtime.gateway.accounts.bill import Bill
from trunkline_runtime.gateway.accounts.cashier import Cashier
from trunkline_runtime.gateway.breaker import Breakers, Outcome
from trunkline_runtime.gateway.burst import RESTORED, BurstSessions, Session, start_of
from trunkline_runtime.gateway.descriptors import At, Descriptors
from trunkline_runtime.gateway.dialling import Failed, dial
from trunkline_runtime.gateway.doors import (
    Wanted,
    burst_address,
    burst_door,
    upstream_address,
    upstream_door,
    warm_door,
)
from trunkline_runtime.gateway.ladder import (
    UPSTREAM,
    Ladder,
    Patience,
    Placement,
    Rejected,
    TryBurst,
    TryUpstream,
    TryWait,
    TryWarm,
)
from trunkline_runtime.gateway.ledger import Ledger
from trunkline_runtime.gateway.leg import Leg
from trunkline_runtime.gateway.line import Lines, Nothing, Waiter
from trunkline_runtime.gateway.routes import Route
from trunkline_runtime.gateway.table import Census, Row, Table
from trunkline_runtime.gateway.workers import WorkerLinks

MOST_HOPS: Final = (
    1  # gateways that may send a call on: two that name each other must not play ball
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An admitted caller."""

    wanted: Wanted
    begun: float  # when its request was read, by the loop's clock
    tenant: str
    take: Callable[[Callable[[], int]], bool] = field(repr=False)
    """Whether it may have one of so many free warm slots; then it has it."""
    waits: Callable[[], None] = field(repr=False)  # it has none, and stands in line
    bill: Bill
    hops: int = 0  # gateways that have sent it on
    turn: int = 0  # another for each time that it is placed
    avoid: frozenset[str] = frozenset()  # workers that have lost it, by name

    @property
    def route(self) -> Route:
        return self.wanted.route

    @property
    def key(self) -> str:
        """The session's name at Modal, which gives one session to one key, and at the cashier.

        The session of the turn before is lost, and paid for when its leg is gone.
        """
        return f"{self.wanted.call}-{self.turn}" if self.turn else self.wanted.call


class Placer:
    """Starts sessions, waits and dials. Whatever an attempt held that did not end in a call is given back.

    `changed` is called with an agent when its burst or its line changes. `settled_at` says from when on all workers
    that there are have dialled in.
    """

    def __init__(
        self,
        *,
        table: Table,
        links: WorkerLinks,
        burst: BurstSessions,
        ledger: Ledger,
        breakers: Breakers,
        cashier: Cashier,
        patience: Patience,
        descriptors: Descriptors,
        changed: Callable[[str], None],
        settled_at: Callable[[], float],
    ) -> None:
        self._table = table
        self._links = links
        self._burst = burst
        self._ledger = ledger
        self._breakers = breakers
        self._cashier = cashier
        self._patience = patience
        self._descriptors = descriptors
        self._changed = changed
        self._settled_at = settled_at
        self.lines = Lines()
        table.risen = self.serve

    async def place(
        self, asked: Asked, left: Callable[[Placement], None]
    ) -> tuple[Leg | None, Placement]:
        """The leg of a worker that has answered, or None where every rung was passed over.

        Where it is cancelled, because the caller is gone, `left` gets what was tried until then.
        """
        clock = asyncio.get_running_loop().time
        shut = partial(self._shut, asked.route.agent)
        ladder = Ladder(asked.route, asked.begun, self._patience, shut, self._settled_at())
        try:
            return await self._walk(ladder, asked)
        except asyncio.CancelledError:
            census = self._table.census(asked.route.agent)
            left(replace(ladder.left(clock()), warm=census))
            raise

    async def _walk(self, ladder: Ladder, asked: Asked) -> tuple[Leg | None, Placement]:
        clock = asyncio.get_running_loop().time
        place = Waiter(asked.tenant, asked.take, _nobody)
        place.avoid.update(self._lost(asked))
        pick = partial(self._pick, asked)
        warm: Census | None = None
        while True:
            attempt = ladder.next(clock(), pick)
            if warm is None and not isinstance(attempt, TryWarm):
                warm = self._table.census(asked.route.agent)  # the turn that found no slot
            if isinstance(attempt, TryWait):
                row = await self._in_line(attempt, asked, place)
                if isinstance(row, Failed):
                    ladder.failed(clock(), row.why)
                    continue
                attempt = ladder.offered(clock(), row)
            match attempt:
                case TryWarm():
                    found = await self._try_warm(attempt, asked, place.avoid)
                case TryBurst():
                    found = await self._try_burst(attempt, asked)
                case TryUpstream():
                    found = await self._try_upstream(attempt, asked)
                case Rejected():
                    return None, replace(ladder.rejected(attempt, clock()), warm=warm)
            if isinstance(found, Leg):
                return found, ladder.answered(clock(), found.start, warm)
            ladder.failed(clock(), found.why)
            if found.ours:
                self._descriptors.short(At.DIAL)
                rejected = ladder.rejected(Rejected(found.why), clock())
                return None, replace(rejected, warm=warm)

    def serve(self, agent: str) -> None:
        """Gives free slots to those who wait. The table calls it whenever there is one more."""
        if self.lines.waiting(agent):
            self.lines.serve(agent, partial(self._give, agent))

    def refresh(self) -> None:
        """Serves all lines: what a tenant may have changes with time alone, too."""
        for agent in self.lines.agents():
            self.serve(agent)

    # --- warm ---

    def _pick(self, asked: Asked, tried: Collection[Row]) -> Row | str | None:
        """A worker, unless what is free is for others.

        Those who wait have been served of all that is free: what is left, none of them may have.
        """
        agent = asked.route.agent
        row = self._table.pick(agent, {*tried, *self._lost(asked)}, random.randrange)
        if row is not None and not asked.take(partial(self._table.view, agent)):
            return KEPT
        return row

    def _lost(self, asked: Asked) -> list[Row]:
        """Workers that have had the call, and are still there."""
        if not asked.avoid:
            return []
        return [row for row in self._table.rows(asked.route.agent) if row.worker in asked.avoid]

    def _give(self, agent: str, waiter: Waiter) -> Row | Nothing:
        """A slot for one who waits: it is held for it from here on."""
        row = self._table.pick(agent, waiter.avoid, random.randrange)
        if row is None:
            return Nothing.FOR_CALLER if self._table.view(agent) else Nothing.FOR_ANYBODY
        if not waiter.take(partial(self._table.view, agent)):
            return Nothing.FOR_TENANT
        self._table.ask(row)
        return row

    async def _in_line(self, attempt: TryWait, asked: Asked, place: Waiter) -> Row | Failed:
        """A worker with a slot that is held for this caller, or why there is none."""
        agent, most = asked.route.agent, attempt.rung.most
        woken: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
        place.woken = partial(self._wake, woken)
        if not self.lines.join(agent, place, most):
            return Failed(f"as many callers as may wait do: {most}")
        asked.waits()
        self._changed(agent)
        try:
            self.serve(agent)  # it may have come free while other rungs were tried
            async with asyncio.timeout_at(attempt.until):
                row = await woken
        except TimeoutError:
            if woken.cancelled():
                return Failed("no slot came free in time")
            row = woken.result()
        except asyncio.CancelledError:
            if not woken.cancelled():  # the caller left in the very turn in which it was served
                self._table.settle(woken.result(), taken=False)
            raise
        finally:
            self.lines.leave(agent, place)
            self._changed(agent)
        return row

    def _wake(self, woken: "asyncio.Future[Row]", row: Row) -> None:
        """Hands a slot to who waits, or on to the next: it may have given up in this very turn."""
        if woken.done():
            self._table.settle(row, taken=False)
        else:
            woken.set_result(row)

    async def _try_warm(self, attempt: TryWarm, asked: Asked, avoid: set[Row]) -> Leg | Failed:
        """A leg, or why not; a worker that offers a slot and does not take the call is to be avoided by it from then on."""
        loop, wanted, row = asyncio.get_running_loop(), asked.wanted, attempt.row
        link = self._links.of(row)
        if not attempt.held:
            self._table.ask(row)
        if link is None:
            self._table.settle(row, taken=False)
            return Failed("lost its control link", full=True)
        address = link.address(wanted.route)
        began = loop.time()
        found: Leg | Failed | None = None
        try:
            door = warm_door(wanted, link.ticket(wanted.call))
            found = await dial(address, door, attempt.answer_by, link.standby.take(address))
        finally:
            answered = partial(self._links.answered, link, found, loop.time() - began)
            if isinstance(found, Leg):
                loop.call_soon(answered)  # its caller has the 101 first, and it counts as asked
            else:
                answered()
        if isinstance(found, Failed):
            if found.full:
                return replace(found, why=NO_SLOT)
            if not found.late:
                avoid.add(row)
        return found

    # --- beyond the cluster ---

    def _shut(self, agent: str, rung: str, answer_by: float) -> str | None:
        now = asyncio.get_running_loop().time()
        return self._breakers.why_not((agent, rung), now, answer_by)

    def _told(self, agent: str, rung: str, outcome: Outcome) -> None:
        now = asyncio.get_running_loop().time()
        if self._breakers.told((agent, rung), outcome, now):
            self._ledger.breaker(agent, rung, self._breakers.state((agent, rung)).state)
            self._changed(agent)

    async def _try_burst(self, attempt: TryBurst, asked: Asked) -> Leg | Failed:
        agent, rung, key = asked.route.agent, f"burst/{attempt.rung.name}", asked.key
        if why := self._cashier.hold(key, asked.bill, asked.tenant, asked.route, attempt.rung):
            return Failed(why, full=True)
        tally = self._ledger.tally(agent)
        tally.burst += 1
        self._changed(agent)
        found: Leg | Failed = Failed("the caller left", full=True)
        try:
            found = await self._session(attempt, asked)
        finally:
            self._told(agent, rung, _outcome(found))
            if not isinstance(found, Leg):
                self._cashier.end(key)
                tally.burst -= 1
                self._changed(agent)
        if isinstance(found, Leg):
            tally.burst_error = ""
        elif not found.ours:
            why = f"Modal in {attempt.rung.name} {found.why}"
            self._ledger.burst_failed(agent, why, limited=found.limited)
        return found

    async def _session(self, attempt: TryBurst, asked: Asked) -> Leg | Failed:
        clock = asyncio.get_running_loop().time
        agent, rung, began = asked.route.agent, attempt.rung, clock()
        session = await self._burst.start(
            rung, asked.key, attempt.answer_by, partial(self._ledger.burst_slow, agent)
        )
        if isinstance(session, Failed):
            return session
        self._cashier.began(asked.key)
        leg: Leg | Failed = Failed("")
        try:
            address = burst_address(rung, self._burst.tls)
            leg = await dial(address, burst_door(asked.wanted, session), attempt.answer_by)
        finally:
            if not isinstance(leg, Leg):
                self._burst.end(session)
        if isinstance(leg, Leg):
            self._ends_with(leg, session, asked.key)
            seconds = clock() - began
            leg.start = start_of(leg.started, seconds)
            self._ledger.burst_started(agent, leg.start, seconds)
            if leg.start == RESTORED and 0 < rung.slow < seconds:
                self._ledger.burst_slow(agent)
        return leg

    def _ends_with(self, leg: Leg, session: Session, key: str) -> None:
        leg.when_gone(lambda _: self._burst.end(session))
        leg.when_gone(lambda _: self._cashier.end(key))

    async def _try_upstream(self, attempt: TryUpstream, asked: Asked) -> Leg | Failed:
        agent = asked.route.agent
        found: Leg | Failed = Failed("the caller left", full=True)
        try:
            if asked.hops >= MOST_HOPS:
                found = Failed("the call has come from another gateway already", full=True)
            else:
                address = upstream_address(attempt.rung, self._burst.tls)
                door = upstream_door(asked.wanted, attempt.rung, asked.hops)
                found = await dial(address, door, attempt.answer_by)
        finally:
            self._told(agent, UPSTREAM, _outcome(found))
        return found


def _outcome(found: Leg | Failed) -> Outcome:
    if isinstance(found, Leg):
        return Outcome.GOOD
    return Outcome.NEITHER if found.full or found.ours else Outcome.FAULT


def _nobody(row: Row) -> None:
    raise AssertionError("nobody waits in this place")
