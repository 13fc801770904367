"""A gateway: the routes it acts on, the workers it knows, the calls it holds."""

import asyncio
import logging
import random
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from prometheus_client import CollectorRegistry
from websockets.http11 import Request

from trunkline_runtime.contract import (
    CALL_HEADER,
    HEARTBEAT_SECONDS,
    HOPS_HEADER,
    AgentLoad,
    Load,
    LoadChanges,
    State,
)
from trunkline_runtime.gateway.access.answers import Away, Denied
from trunkline_runtime.gateway.access.doorstep import Arrival
from trunkline_runtime.gateway.access.minted import Minted
from trunkline_runtime.gateway.access.order import Order, OrderReader, as_answer
from trunkline_runtime.gateway.access.reception import Guest, Reception, steady_clock
from trunkline_runtime.gateway.accounts.bill import Bill
from trunkline_runtime.gateway.accounts.cashier import Cashier, price_of
from trunkline_runtime.gateway.accounts.record import Party, Told, caller_hash, told
from trunkline_runtime.gateway.breaker import Breakers
from trunkline_runtime.gateway.burst import BurstSessions
from trunkline_runtime.gateway.call import Call, Ending, Facts
from trunkline_runtime.gateway.closes import MOVED
from trunkline_runtime.gateway.descriptors import At, Descriptors
from trunkline_runtime.gateway.doors import Wanted
from trunkline_runtime.gateway.handshake import MAX_HEAD_BYTES
from trunkline_runtime.gateway.holdings import Holdings
from trunkline_runtime.gateway.intake import Answered, Begun, Intake
from trunkline_runtime.gateway.ladder import LEFT, Placement, Rejected
from trunkline_runtime.gateway.ledger import Ledger
from trunkline_runtime.gateway.leg import Leg
from trunkline_runtime.gateway.operator_link import OperatorLink
from trunkline_runtime.gateway.placing import MOST_HOPS, Asked, Placer
from trunkline_runtime.gateway.reports import agent_load
from trunkline_runtime.gateway.routebook import RouteBook, Source
from trunkline_runtime.gateway.routes import Route, RouteChanges, Routes, WarmRung
from trunkline_runtime.gateway.runway import Outlook, Runway
from trunkline_runtime.gateway.settling import Settling
from trunkline_runtime.gateway.table import Table
from trunkline_runtime.gateway.terms import Identity, Terms
from trunkline_runtime.gateway.workers import WorkerLinks

log = logging.getLogger("trunkline.gateway")

RETRY_SECONDS: Final = (
    2,
    5,
)  # Retry-After of a gateway that is not ready, spread so that callers do not come as one
CLOSING_SECONDS: Final = 2.0  # for all to read their Close, when the process has been told to go
STALL_SECONDS: Final = 0.5  # a loop that was this late cannot say who was silent

NO_ROUTES: Final = "no routes yet: neither the operator nor the routes file has brought any"
SETTLING: Final = "routes have just come: workers are dialling in"
DRAINING: Final = "this gateway is leaving: it keeps its calls and takes no new ones"


class Gateway:
    """Everything of one gateway but its listeners. It is the `Desk` of its intakes."""

    def __init__(self, identity: Identity, registry: CollectorRegistry, terms: Terms) -> None:
        self._identity = identity
        self._patience = terms.patience
        self._audio_times_real = terms.audio_times_real
        self._boot = uuid.uuid4().hex
        self._routes = RouteBook()
        self._settling = Settling()
        self._draining = False
        self.holdings = Holdings()
        self._table = Table()
        self._breakers = Breakers(terms.breaker)
        self._outlook = Outlook()
        self._ledger = Ledger(registry, identity.name, terms.keep)
        self._reception = Reception(
            bounds=terms.bounds,
            proxies=terms.proxies,
            pulse=terms.pulse,
            default_namespace=identity.default_namespace,
            counted=self._ledger.unopened,
        )
        self._burst = BurstSessions()
        self.descriptors = Descriptors(registry, terms.descriptors)
        self._cashier = Cashier(registry, steady_clock(), lambda: self._routes.share)
        self.workers = WorkerLinks(
            self._table, self._routes.by_agent, self._changed, terms.patience
        )
        self.operator = OperatorLink(identity.operator_token, self)
        self._placer = Placer(
            table=self._table,
            links=self.workers,
            burst=self._burst,
            ledger=self._ledger,
            breakers=self._breakers,
            cashier=self._cashier,
            patience=terms.patience,
            descriptors=self.descriptors,
            changed=self._changed,
            settled_at=lambda: self._settling.until,
        )

    def __repr__(self) -> str:
        held = f"epoch={self._routes.epoch} open={len(self.holdings)}"
        return f"<Gateway {self._identity.name} {held} {self._table!r}>"

    # --- routes in, load out ---

    def take(self, routes: Routes, source: Source) -> None:
        """Acts on routes from now on, unless newer ones are there."""
        if self._routes.take(routes, source):
            self._rerouted()
            self.operator.urge_all()

    def change(self, changes: RouteChanges) -> None:
        """Acts on what differs. Raises `RouteError` where that is of other routes than it has."""
        if self._routes.change(changes):
            self._rerouted()
            # So its next word is of these, too: the operator takes any later one for said in the light of the routes.
            self.operator.urge({*changes.by_agent, *changes.gone})

    def expect(self, runway: Runway, *, whole: bool) -> None:
        """What the operator knows of slots to come, of all agents or of some."""
        known, now = self._routes.by_agent(), asyncio.get_running_loop().time()
        foretold = {agent: starting for agent, starting in runway.items() if agent in known}
        (self._outlook.replace if whole else self._outlook.update)(foretold, now)

    def allow(self, epoch: int, ceilings: Mapping[str, float]) -> None:
        """What burst may cost here yet, by agent, as an operator of this epoch says."""
        if self._routes.believes(epoch):
            self._cashier.allow(ceilings)
            self.operator.urge(ceilings)

    def meet(self, gateways: Sequence[str]) -> None:
        """The addresses of all gateways behind the name of this one."""
        self.workers.tell_gateways(gateways)

    def load(self) -> Load:
        """What the operator is told."""
        known = {*self._routes.by_agent(), *self._table.agents(), *self._ledger.tallies}
        return Load(
            type="load",
            gateway=self._identity.name,
            boot=self._boot,
            epoch=self._routes.epoch,
            agents={agent: self._agent_load(agent) for agent in sorted(known)},
        )

    def load_changes(self, agents: Iterable[str]) -> LoadChanges:
        """The same, of some agents."""
        return LoadChanges(
            type="loadChanges",
            gateway=self._identity.name,
            boot=self._boot,
            epoch=self._routes.epoch,
            agents={agent: self._agent_load(agent) for agent in agents},
        )

    def state(self) -> State:
        """What people are shown; nothing in it is secret."""
        load = self.load()
        return State(
            gateway=load["gateway"],
            boot=load["boot"],
            epoch=load["epoch"],
            unready=self.unready(),
            agents=load["agents"],
        )

    def unready(self) -> str | None:
        """Why load balancers should send no caller here; None when they should."""
        if self._draining:
            return DRAINING
        if self._routes.empty:
            return NO_ROUTES
        return None if self._settling.over else SETTLING

    # --- the desk ---

    async def answer(self, call: str, request: Request, holder: str) -> Answered | Denied:
        """A worker on the line for this caller, or the plain answer instead.

        `holder` is who the caller has proved to be by a certificate, "" for nobody.
        """
        begun = asyncio.get_running_loop().time()
        with self.holdings.asking():
            guest = await self._admit(call, request, holder)
            if isinstance(guest, Denied):
                self.denied(guest)
                return guest
            return await self._place(self._asked(call, guest, begun, _hops(request)), guest)

    async def mint(self, order: Order) -> str | Denied:
        """The body of the answer to a request for a client secret or a ticket."""
        minted: Minted | Denied
        if self._routes.empty:
            minted = _unavailable("", f"{self.unready()}\n", "unready", "")
        else:
            minted = await self._reception.mint(order)
        if isinstance(minted, Denied):
            self.denied(minted)
            return minted
        self._ledger.minted(order.agent, order.kind)
        return as_answer(minted, order.agent)

    def order_reader(self, holder: str) -> OrderReader:
        return self._reception.order_reader(MAX_HEAD_BYTES, holder)

    def arrives(self, peer: str) -> Arrival:
        arrival = self._reception.arrives(peer)
        if arrival is Arrival.CROWDED:
            self._ledger.denied(Denied(status=429, text="", outcome="limited"))
        return arrival

    def leaves(self, peer: str) -> None:
        self._reception.leaves(peer)

    def forwarded(self, peer: str, head: bytes) -> str | None:
        return self._reception.forwarded(peer, head)

    def trusts(self, peer: str) -> bool:
        return self._reception.trusts(peer)

    def has_descriptors(self, number: int) -> bool:
        return self.descriptors.are_for(number, self._reception.waiting)

    def short_of_descriptors(self, at: At) -> None:
        self.descriptors.short(at)
        self.workers.yield_places()

    def turned_away(self, away: Away) -> None:
        self._ledger.turned_away(away)

    def denied(self, denied: Denied) -> None:
        self._ledger.denied(denied)

    def opened(self, connection: Intake | Call) -> None:
        self.holdings.opened(connection)

    def gone(self, connection: Intake | Call) -> None:
        self.holdings.gone(connection)

    # --- its life ---

    async def tick(self) -> None:
        """Beats and looks for the dead, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + HEARTBEAT_SECONDS
            await asyncio.sleep(HEARTBEAT_SECONDS)
            self.workers.beat()
            self.operator.beat()
            now = loop.time()
            if now - due < STALL_SECONDS:  # else what was said meanwhile may not be read yet
                self.workers.sweep(now)
                self.operator.sweep(now)
            for call in self.holdings.calls:
                call.look(now)
            self._ledger.keys_read(self._reception.key_ages())
            self._ledger.operator_is(self.operator.silence(now), self._routes.epoch)
            self._placer.refresh()
            lines = self._placer.lines
            waiting = {agent: lines.waiting(agent) for agent in lines.agents()}
            self._ledger.lines_are(waiting, self.workers.aside())

    async def settle(self, most: float) -> None:
        """Lets workers dial in before anyone is told that there are none, for `most` seconds at the longest."""
        await self._settling.settle(
            most,
            lambda: any(WarmRung() in route.rungs for route in self._routes.by_agent().values()),
        )

    async def drain(self, grace: float, hurry: asyncio.Event) -> None:
        """Takes no new call and returns when the last one has ended, the grace is over, or at `hurry`."""
        self._draining = True
        self._cashier.leave()
        self.operator.urge_all()
        log.info("draining", extra={"open": len(self.holdings), "grace_seconds": grace})
        waits = [asyncio.ensure_future(work) for work in (self.holdings.quiet(), hurry.wait())]
        await asyncio.wait(waits, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def close(self) -> None:
        """Ends what is left: callers are told to call again, sessions are ended."""
        self._draining = True
        await self.holdings.end(CLOSING_SECONDS)
        await self.workers.close()
        await self._burst.close()
        await self._reception.close()

    # --- inside ---

    def _rerouted(self) -> None:
        """Everybody here acts on the routes as they are now; what is known of agents and rungs that are no more goes."""
        routes = self._routes.by_agent()
        self._reception.take(self._routes.now)
        rungs = self._routes.rungs()
        self._breakers.keep(rungs)
        self._ledger.keep_rungs(rungs)
        self._outlook.keep(routes.keys())
        self._settling.routed()
        self.workers.routes_changed()

    def _changed(self, agent: str) -> None:
        if self._table.rows(agent):
            self._settling.linked()
        self.operator.urge([agent])

    async def _admit(self, call: str, request: Request, holder: str) -> Guest | Denied:
        if self._draining or self._routes.empty:
            return _unavailable(call, f"{self.unready()}\n", "unready", "")
        return await self._reception.admit(call, request, holder)

    async def _place(self, asked: Asked, guest: Guest) -> Answered | Denied:
        """A worker's answer; the tenant's place is given back where there is none."""
        call, begun, route = asked.wanted.call, asked.begun, asked.route
        self._ledger.arrived(route.agent)
        leg: Leg | None = None
        gone: list[Placement] = []  # what was tried for a caller that left
        try:
            await self._settling.wait(begun + route.answer_seconds)
            leg, placement = await self._placer.place(asked, gone.append)
        except asyncio.CancelledError:
            ms = (asyncio.get_running_loop().time() - begun) * 1000
            unplaced = Placement(result=Rejected(LEFT), steps=(), ms=ms)
            self._ledger.left(_party(call, guest), gone[0] if gone else unplaced)
            raise
        finally:
            if leg is None:
                self._reception.end(guest)
        if leg is None:
            return self._refuse(_party(call, guest), placement)
        self.holdings.hold(leg)
        return Answered(leg, partial(self._begins, asked, guest, leg, placement))

    def _begins(self, asked: Asked, guest: Guest, leg: Leg, placement: Placement) -> Begun:
        """Books a call whose caller has its 101."""
        call, route, party = asked.wanted.call, asked.route, _party(asked.wanted.call, guest)
        self._reception.answered(guest, warm=placement.rung == "warm")
        loop = asyncio.get_running_loop()
        # Metrics and a line of the log take as long as a tenth of an admission: what is in the sockets goes first.
        loop.call_soon(self._placed, call, route, placement)
        price = price_of(route, placement)
        asked.bill.placed(price, loop.time(), warm=placement.rung == "warm")
        facts = Facts(
            call=call,
            agent=route.agent,
            tenant=party.tenant,
            caller=party.caller,
            placement=placement,
            price=price,
            max_seconds=route.max_seconds,
            stall_seconds=self._patience.stall,
            audio_times_real=self._audio_times_real,
            first_audio_ms=route.first_audio_ms,
        )
        again = partial(self._again, guest, asked, leg.subprotocol)
        return Begun(facts, partial(self._ended, guest, asked.bill), again)

    def _placed(self, call: str, route: Route, placement: Placement) -> None:
        self._ledger.placed(route, placement)
        self._ledger.tell_placed(call, route.agent, placement)

    async def _again(
        self, guest: Guest, asked: Asked, subprotocol: str | None, facts: Facts, why: str
    ) -> tuple[Leg, Facts] | None:
        """Another worker for a call whose worker was lost before its first word, within `answerSeconds` from now."""
        before, clock = facts.placement, asyncio.get_running_loop().time
        asked.bill.left(clock())
        asked = replace(
            asked,
            begun=clock(),
            turn=len(before.steps) + 1,
            avoid=frozenset({before.worker, *(step.worker for step in before.steps)}),
        )
        # A caller that leaves meanwhile ends its call, and the record of that says all.
        leg, placement = await self._placer.place(asked, left=lambda _: None)
        if leg is None:
            return None
        if leg.subprotocol != subprotocol:  # the caller has been told the other one
            leg.retire(MOVED)
            return None
        self.holdings.hold(leg)
        placement = before.again(why, placement)
        self._reception.moved(guest, warm=placement.rung == "warm")
        self._ledger.moved(facts, placement)
        price = price_of(asked.route, placement)
        asked.bill.placed(price, clock(), warm=placement.rung == "warm")
        return leg, replace(facts, placement=placement, price=price)

    def _asked(self, call: str, guest: Guest, begun: float, hops: int) -> Asked:
        admitted = guest.admitted
        return Asked(
            wanted=Wanted(
                call=call,
                route=admitted.route,
                target=admitted.target,
                subprotocol=admitted.subprotocol,
            ),
            begun=begun,
            tenant=admitted.caller.tenant,
            take=partial(self._reception.take_slot, guest),
            waits=partial(self._reception.waits, guest),
            bill=Bill(),
            hops=hops,
        )

    def _refuse(self, party: Party, placement: Placement) -> Denied:
        self._ledger.refused(party, placement)
        self.operator.urge([party.agent])
        assert isinstance(placement.result, Rejected)
        text = f"{placement.result.why}: call again after a while\n"
        waiting = self._placer.lines.waiting(party.agent)
        now = asyncio.get_running_loop().time()
        seconds = self._outlook.of(party.agent).refused(waiting, now, random.random())
        return _unavailable(party.call, text, "refused", party.agent, seconds)

    def _ended(self, guest: Guest, bill: Bill, call: Call, ending: Ending) -> None:
        self._reception.end(guest)
        now = asyncio.get_running_loop().time()
        if call.facts.placement.rung == "warm":
            self._outlook.of(call.facts.agent).ended(now)
        # A burst session began before its call; a warm slot is paid for from the 101 on.
        bill.left(now)
        ending = replace(ending, cost=self._cashier.total(bill))
        at, leg = self._ledger.ended(call.facts, ending), ending.leg
        if leg is None:
            self._ledger.told(call.facts, ending, at, Told())
        else:
            leg.when_told(partial(self._told, call.facts, ending, at, leg))
        if ending.lost or call.facts.placement.rung != "warm":
            self.operator.urge([call.facts.agent])

    def _told(self, facts: Facts, ending: Ending, at: float, leg: Leg) -> None:
        self._ledger.told(facts, ending, at, told(leg.account))

    def _agent_load(self, agent: str) -> AgentLoad:
        return agent_load(agent, self._table, self._ledger, self._placer.lines, self._cashier)


def _party(call: str, guest: Guest) -> Party:
    route, caller = guest.admitted.route, guest.admitted.caller
    name = caller_hash(route.access.mint_key, route.agent, caller.tenant, caller.identity)
    return Party(call=call, agent=route.agent, tenant=caller.tenant, caller=name)


def _hops(request: Request) -> int:
    """How many gateways have sent the call on; what is no number counts as many."""
    said = request.headers.get_all(HOPS_HEADER)
    if not said:
        return 0
    return int(said[0]) if said[0].isdecimal() and len(said[0]) == 1 else MOST_HOPS


def _unavailable(call: str, text: str, outcome: str, agent: str, seconds: int = 0) -> Denied:
    """A 503; without `seconds` the caller is told to come back in a few."""
    retry = str(seconds or random.randint(*RETRY_SECONDS))
    return Denied(
        status=503,
        text=text,
        outcome=outcome,
        agent=agent,
        headers=(("Retry-After", retry), (CALL_HEADER, call)),
    )
