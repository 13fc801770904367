"""Walks a call down its ladder until a worker answers it."""

import asyncio
import json
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Final
from urllib.parse import urlsplit

from trunkline_runtime.contract import (
    BURST_SETTINGS_TYPE,
    CALL_HEADER,
    KEPT,
    TICKET_HEADER,
    worker_server_name,
)
from trunkline_runtime.gateway.burst import BurstSessions, Session, ticket
from trunkline_runtime.gateway.frames import text_frame
from trunkline_runtime.gateway.ladder import (
    Ladder,
    Patience,
    Placement,
    Rejected,
    TryBurst,
    TryWarm,
)
from trunkline_runtime.gateway.ledger import Ledger
from trunkline_runtime.gateway.leg import Door, Failed, Leg, dial
from trunkline_runtime.gateway.routes import Route
from trunkline_runtime.gateway.table import Census, Row, Table
from trunkline_runtime.gateway.workers import Granted, WorkerLinks

HOLD_MARGIN_SECONDS: Final = 1.0  # a grant outlives our own deadline for its dialling by this much


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What an admitted caller wants."""

    call: str
    route: Route
    target: str  # path and query
    subprotocol: str | None
    begun: float  # when its request was read, by the loop's clock
    take: Callable[[Callable[[], int]], bool]  # whether it may have one of so many free warm slots


class Placer:
    """Reserves, starts sessions and dials. Whatever an attempt held that did not end in a call is given back.

    `changed` is called with an agent when its burst changes.
    """

    def __init__(
        self,
        *,
        table: Table,
        links: WorkerLinks,
        burst: BurstSessions,
        ledger: Ledger,
        patience: Patience,
        changed: Callable[[str], None],
    ) -> None:
        self._table = table
        self._links = links
        self._burst = burst
        self._ledger = ledger
        self._patience = patience
        self._changed = changed

    async def place(self, asked: Asked) -> tuple[Leg | None, Placement]:
        """The leg of a worker that has answered, or None where every rung was passed over."""
        clock = asyncio.get_running_loop().time
        ladder = Ladder(asked.route, asked.begun, self._patience)
        pick = partial(self._pick, asked)
        warm: Census | None = None
        while True:
            attempt = ladder.next(clock(), pick)
            if warm is None and not isinstance(attempt, TryWarm):
                warm = self._table.census(asked.route.agent)  # the turn that found no slot
            match attempt:
                case TryWarm():
                    found = await self._try_warm(attempt, asked)
                case TryBurst():
                    found = await self._try_burst(attempt, asked)
                case Rejected():
                    return None, replace(ladder.rejected(attempt, clock()), warm=warm)
            if isinstance(found, Leg):
                placement = ladder.answered(clock())
                return found, placement if warm is None else replace(placement, warm=warm)
            ladder.failed(clock(), found.why)

    def _pick(self, asked: Asked, tried: Collection[Row]) -> Row | str | None:
        """A worker, unless what is free is for others."""
        agent = asked.route.agent
        row = self._table.pick(agent, tried, random.randrange)
        if row is not None and not asked.take(partial(self._table.view, agent)):
            return KEPT
        return row

    async def _try_warm(self, attempt: TryWarm, asked: Asked) -> Leg | Failed:
        link = self._links.of(attempt.row)
        if link is None:
            return Failed("lost its control link")
        hold = attempt.answer_by - asyncio.get_running_loop().time() + HOLD_MARGIN_SECONDS
        grant = await link.reserve(
            asked.call, asked.route.settings, by=attempt.reserve_by, hold=hold
        )
        if not isinstance(grant, Granted):
            return grant
        door = Door(
            host=link.host,
            port=link.port,
            tls=asked.route.worker_tls,
            server_name=worker_server_name(asked.route.agent),
            target=asked.target,
            subprotocol=asked.subprotocol,
            headers=((TICKET_HEADER, grant.ticket), (CALL_HEADER, asked.call)),
        )
        leg: Leg | Failed = Failed("")
        try:
            leg = await dial(door, attempt.answer_by)
        finally:
            if not isinstance(leg, Leg):
                link.release(grant.ticket)
        if isinstance(leg, Leg):
            self._links.hold(attempt.row, leg)
        return leg

    async def _try_burst(self, attempt: TryBurst, asked: Asked) -> Leg | Failed:
        agent = asked.route.agent
        tally = self._ledger.tally(agent)
        tally.burst += 1
        self._changed(agent)
        found: Leg | Failed = Failed("")
        try:
            found = await self._session(attempt, asked)
        finally:
            if not isinstance(found, Leg):
                tally.burst -= 1
                self._changed(agent)
        if isinstance(found, Failed):
            self._ledger.burst_failed(agent, f"Modal in {attempt.rung.name} {found.why}")
        else:
            tally.burst_error = ""
        return found

    async def _session(self, attempt: TryBurst, asked: Asked) -> Leg | Failed:
        session = await self._burst.start(attempt.rung, asked.call, attempt.answer_by)
        if isinstance(session, Failed):
            return session
        leg: Leg | Failed = Failed("")
        try:
            leg = await dial(self._burst_door(session, asked), attempt.answer_by)
        finally:
            if not isinstance(leg, Leg):
                self._burst.end(session)
        if isinstance(leg, Leg):
            leg.when_gone(partial(self._burst.end, session))
        return leg

    def _burst_door(self, session: Session, asked: Asked) -> Door:
        rung = session.rung
        url = urlsplit(rung.url)
        secure = url.scheme == "https"
        settings = {"type": BURST_SETTINGS_TYPE, "settings": asked.route.settings}
        return Door(
            host=url.hostname or "",
            port=url.port or (443 if secure else 80),
            tls=self._burst.tls if secure else None,
            target=url.path + asked.target,
            subprotocol=asked.subprotocol,
            headers=(
                ("Modal-Authorization", f"Bearer {session.token}"),
                (TICKET_HEADER, ticket(rung, asked.route.agent, asked.call)),
                (CALL_HEADER, asked.call),
            ),
            opening=text_frame(json.dumps(settings).encode(), masked=True),
        )
