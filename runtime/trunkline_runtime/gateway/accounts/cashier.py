"""Where calls pay: each burst call's worst case is held before its session starts, and its cost is known at its end."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter

from trunkline_runtime.contract import SpendLoad
from trunkline_runtime.gateway.accounts.bill import Bill
from trunkline_runtime.gateway.accounts.budget import UNPRICED, Hold, Price, Purses, Wish
from trunkline_runtime.gateway.ladder import Burst, Placement, Warm
from trunkline_runtime.gateway.routes import BurstRung, Route


class Cashier:
    """One gateway's. `clock` is Unix time that never steps back; `share` is the gateway's of tenants' limits."""

    def __init__(
        self, registry: CollectorRegistry, clock: Callable[[], float], share: Callable[[], float]
    ) -> None:
        self._purses = Purses()
        self._clock = clock
        self._share = share
        self._held: dict[str, tuple[Hold, Bill]] = {}  # by the session's key
        self._refused = Counter(
            "trunkline_burst_over_budget",
            "Calls that went past burst, for a budget or a tenant's share of it was used up",
            ["agent"],
            registry=registry,
        )
        self._paid = Counter(
            "trunkline_burst_cost_dollars",
            "What burst calls that are over have cost for their slots",
            ["agent"],
            registry=registry,
        )

    def __repr__(self) -> str:
        return f"<Cashier held={len(self._held)} {self._purses!r}>"

    def hold(self, key: str, bill: Bill, tenant: str, route: Route, rung: BurstRung) -> str | None:
        """Holds the worst case of a session, which is put on its call's bill; else why it may not be had."""
        held: Hold | str
        if rung.price is None:
            held = UNPRICED if route.budget.limits else ""
            if not held:
                return None
        else:
            held = self._purses.reserve(
                Wish(
                    agent=route.agent,
                    tenant=tenant,
                    rate=rung.price.call_second,
                    worst_seconds=route.max_seconds + route.answer_seconds,
                    budget=route.budget,
                    tenant_share=route.access.tenancy.of(tenant).burst_share / 100,
                    share=self._share(),
                ),
                self._clock(),
            )
        if isinstance(held, Hold):
            self._held[key] = held, bill
            bill.open += (key,)
            return None
        self._refused.labels(route.agent).inc()
        return held

    def began(self, key: str) -> None:
        """The session has a container: it costs from now on."""
        if key in self._held:
            self._purses.began(self._held[key][0], self._clock())

    def end(self, key: str) -> None:
        """The session is over, or never was. Nothing where it has ended before, or nothing was held for it."""
        if key not in self._held:
            return
        held, bill = self._held.pop(key)
        cost = self._purses.end(held, self._clock())
        bill.open = tuple(each for each in bill.open if each != key)
        bill.dollars += cost
        self._paid.labels(held.agent).inc(cost)

    def total(self, bill: Bill) -> float | None:
        """What a call that is over has cost, in all its sessions; None where no price was known."""
        for key in bill.open:  # of a worker that was lost, too: its link may linger
            self.end(key)
        return bill.total

    def allow(self, ceilings: Mapping[str, float]) -> None:
        """The operator's word on what each agent's burst may cost here."""
        for agent, ceiling in ceilings.items():
            self._purses.allow(agent, ceiling)

    def leave(self) -> None:
        """No more calls are let in: what is not in use is given back."""
        self._purses.give_back(self._clock())

    def load(self, agent: str) -> SpendLoad | None:
        """What the operator is told; None where nothing was spent or dealt."""
        if agent not in self._purses:
            return None
        said = self._purses.spending(agent, self._clock())
        return SpendLoad(
            spent=round(said.spent, 9),
            reserved=round(said.reserved, 9),
            ceiling=said.ceiling,
            starts=said.starts,
        )


def price_of(route: Route, placement: Placement) -> Price | None:
    """What a second of a placed call costs."""
    match placement.result:
        case Warm():
            return route.warm_price
        case Burst(region):
            rungs = (rung for rung in route.rungs if isinstance(rung, BurstRung))
            return next((rung.price for rung in rungs if rung.name == region), None)
    return None
