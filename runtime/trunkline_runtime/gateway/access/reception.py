"""Where callers come in: the doorstep, the door and the tenants' accounts of one gateway, on one clock."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from websockets.http11 import Request

from trunkline_runtime.contract import CALL_HEADER
from trunkline_runtime.gateway.access.answers import Admitted, Denied
from trunkline_runtime.gateway.access.door import Counted, Door
from trunkline_runtime.gateway.access.doorstep import Arrival, Bounds, Doorstep
from trunkline_runtime.gateway.access.issuers import Pulse
from trunkline_runtime.gateway.access.limits import Hold, Over, Tenants
from trunkline_runtime.gateway.access.minted import Minted
from trunkline_runtime.gateway.access.order import Order, OrderReader
from trunkline_runtime.gateway.access.proxies import Proxies, hops
from trunkline_runtime.gateway.routes import NOBODY, Route, Routes


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """An admitted caller, and its call's place in its tenant's account; whoever has it must end it."""

    admitted: Admitted
    hold: Hold = field(repr=False)


class Reception:
    """One gateway's. `counted` is told of each credential that opened nothing."""

    def __init__(
        self,
        *,
        bounds: Bounds,
        proxies: Proxies,
        pulse: Pulse,
        default_namespace: str,
        counted: Counted,
    ) -> None:
        self._proxies = proxies
        self._default_namespace = default_namespace
        self._clock = steady_clock()
        self._routes = NOBODY
        self._doorstep = Doorstep(bounds)
        self._door = Door(pulse, counted)
        self._tenants = Tenants()

    def __repr__(self) -> str:
        return f"<Reception {self._doorstep!r} {self._door!r} {self._tenants!r}>"

    def take(self, routes: Routes) -> None:
        """Acts on these routes from now on."""
        self._routes = routes
        self._door.take(routes.by_agent.values())

    # --- connections ---

    @property
    def waiting(self) -> int:
        """How many connections have no answer yet."""
        return self._doorstep.waiting

    def arrives(self, peer: str) -> Arrival:
        """What becomes of a connection from this address; `leaves` must follow."""
        return self._doorstep.arrives(self._counted_as(peer), self._clock())

    def leaves(self, peer: str) -> None:
        """It has its answer, or is gone."""
        self._doorstep.leaves(self._counted_as(peer))

    def forwarded(self, peer: str, head: bytes) -> str | None:
        """Whom a trusted proxy's request comes from; None where the peer is none, and so is the caller."""
        if not self._proxies.trusts(peer):
            return None
        return self._proxies.caller(peer, hops(head))

    def trusts(self, peer: str) -> bool:
        """Whether connections from this address speak for others."""
        return self._proxies.trusts(peer)

    def order_reader(self, max_head: int, holder: str) -> OrderReader:
        return OrderReader(max_head, self._default_namespace, holder)

    def _counted_as(self, peer: str) -> str:
        """A proxy's connections are many callers': they are counted by those, once they are known."""
        return "" if self._proxies.trusts(peer) else peer

    # --- callers ---

    async def admit(self, call: str, request: Request, holder: str) -> Guest | Denied:
        """Decides about a valid upgrade: who that is, and whether its tenant may have one more call.

        `holder` is who has proved itself by a certificate, "" for nobody.
        """
        routes, namespace = self._routes.by_agent, self._default_namespace
        admitted = await self._door.admit(request, holder, routes, namespace, self._clock())
        if isinstance(admitted, Denied):
            return admitted
        agent, tenant = admitted.route.agent, admitted.caller.tenant
        limits = admitted.route.access.tenancy.of(tenant)
        hold = self._tenants.start(agent, tenant, limits, self._routes.share, self._clock())
        if isinstance(hold, Over):
            return _over(call, agent, hold)
        return Guest(admitted=admitted, hold=hold)

    async def mint(self, order: Order) -> Minted | Denied:
        """A client secret or a ticket."""
        return await self._door.mint(order, self._routes.by_agent, self._clock())

    def take_slot(self, guest: Guest, free: Callable[[], int]) -> bool:
        """Whether a guest may have one of so many free warm slots, or they are kept for others."""
        tenancy = guest.admitted.route.access.tenancy
        return self._tenants.take(guest.hold, tenancy, self._routes.share, free, self._clock())

    def waits(self, guest: Guest) -> None:
        """It stands in line for a slot."""
        self._tenants.waits(guest.hold)

    def answered(self, guest: Guest, *, warm: bool) -> None:
        """Its call has begun."""
        self._tenants.answered(guest.hold, self._clock(), warm=warm)

    def moved(self, guest: Guest, *, warm: bool) -> None:
        """Another worker has its call."""
        self._tenants.moved(guest.hold, warm=warm)

    def end(self, guest: Guest) -> None:
        """Its call is over, or was never placed."""
        self._tenants.end(guest.hold, self._clock())

    # --- issuers ---

    def key_ages(self) -> Mapping[str, float]:
        """For each agent whose issuer's keys were fetched, how old they are in seconds."""
        ages = {route.agent: self._age(route) for route in self._routes.by_agent.values()}
        return {agent: age for agent, age in ages.items() if age is not None}

    def _age(self, route: Route) -> float | None:
        jwt = route.access.jwt
        if jwt is None or not isinstance(jwt.source, str):
            return None
        return self._door.issuers.age(jwt.source)

    async def close(self) -> None:
        await self._door.close()


def steady_clock() -> Callable[[], float]:
    """Unix time that never steps back: the machine's clock at this moment, and the loop's from then on.

    Whoever sets the machine's clock must not give a tenant its minutes anew.
    """
    loop = asyncio.get_running_loop()
    offset = time.time() - loop.time()
    return lambda: loop.time() + offset


def _over(call: str, agent: str, over: Over) -> Denied:
    return Denied(
        status=429,
        text=f"{over.why}: call again after a while\n",
        outcome="limited",
        agent=agent,
        headers=(("Retry-After", str(over.retry_seconds)), (CALL_HEADER, call)),
    )
