"""What burst costs this gateway's calls, and how much more it may commit. Pure: the time is an argument.

A call is let in when its worst case, the longest call at the price of a call's second, fits below a ceiling; at its
end the rest comes back. The operator gives each gateway its ceiling for each agent, as a total in dollars since the
gateway's own start. So no clocks are compared, a message that comes twice gives nothing twice, a gateway that
starts anew has nothing until the operator has spoken to it, and what all gateways hold together is never more than
the operator has dealt. While the operator is away a gateway uses up what it has, and no more.

What a container costs beside its calls (empty slots, standing by, starting) is the operator's to count.
"""

from dataclasses import dataclass, field
from typing import Final

HOUR_SECONDS: Final = 3600
DAY_SECONDS: Final = 86_400
MAX_TENANTS: Final = 4096  # of an agent whose spending is remembered
TINY: Final = 1e-9  # dollars; sums of floats differ by less

UNPRICED: Final = "budget: no price is known, so none can be held"
UNDEALT: Final = "budget: the operator has dealt this gateway no share yet"
USED_UP: Final = "budget: a call's worst case no longer fits"
TENANT: Final = "budget: the tenant's share is used up"
KEPT_OFF: Final = "budget: the tenant has no share"


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a second of one call costs, in dollars, and what that is reckoned from, in words."""

    call_second: float
    basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Of one agent's burst, in dollars, at all gateways together; None is no limit."""

    per_hour: float | None = None
    per_day: float | None = None

    @property
    def limits(self) -> bool:
        return self.per_hour is not None or self.per_day is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A call that would go to burst."""

    agent: str
    tenant: str
    rate: float  # dollars a second
    worst_seconds: float  # of its session
    budget: Budget
    tenant_share: float = 1.0  # of the budget; below 1, the tenant's own limit holds too
    share: float = 1.0  # this gateway's, of every tenant's limits


@dataclass(slots=True, eq=False)
class Hold:
    """A call's worst case, from before its session starts to its end."""

    agent: str
    tenant: str
    rate: float
    worst: float  # dollars
    since: float | None = None  # when its session began

    def cost(self, now: float) -> float:
        return 0.0 if self.since is None else self.rate * max(0.0, now - self.since)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """One agent's burst at this gateway, in dollars since the gateway's start."""

    spent: float = 0.0  # by calls, those that go on included
    reserved: float = 0.0  # what calls that go on may cost yet
    ceiling: float | None = None  # of both together
    starts: int = 0  # sessions that were asked for


@dataclass(slots=True)
class _Tenant:
    """What one tenant has used of its shares; a window that has turned counts from 0."""

    hour: int = 0
    day: int = 0
    spent_hour: float = 0.0
    spent_day: float = 0.0
    held: float = 0.0  # the worst cases of its calls that go on

    def turn(self, now: float) -> None:
        hour, day = int(now // HOUR_SECONDS), int(now // DAY_SECONDS)
        if hour > self.hour:
            self.hour, self.spent_hour = hour, 0.0
        if day > self.day:
            self.day, self.spent_day = day, 0.0


@dataclass(slots=True)
class _Purse:
    """One agent's."""

    ceiling: float | None = None
    settled: float = 0.0  # by calls that are over
    starts: int = 0
    holds: set[Hold] = field(default_factory=set)
    tenants: dict[str, _Tenant] = field(default_factory=dict)

    def committed(self, now: float) -> float:
        return self.settled + sum(max(hold.worst, hold.cost(now)) for hold in self.holds)


class Purses:
    """All agents' burst at one gateway. `now` is Unix time that never steps back."""

    def __init__(self) -> None:
        self._purses: dict[str, _Purse] = {}

    def __repr__(self) -> str:
        sums = {
            agent: f"{purse.settled:.4f}+{len(purse.holds)}/{purse.ceiling}"
            for agent, purse in self._purses.items()
        }
        return f"<Purses {sums}>"

    def __contains__(self, agent: str) -> bool:
        return agent in self._purses

    def allow(self, agent: str, ceiling: float) -> None:
        """The operator's word: so much may be spent and reserved together, since this gateway's start."""
        self._purse(agent).ceiling = ceiling

    def give_back(self, now: float) -> None:
        """Gives up what is not in use: a gateway that leaves lets no call in."""
        for purse in self._purses.values():
            if purse.ceiling is not None:
                purse.ceiling = min(purse.ceiling, purse.committed(now))

    def reserve(self, wish: Wish, now: float) -> Hold | str:
        """Holds the worst case of a call, or says which budget is in its way. A `Hold` must be ended."""
        if wish.tenant_share <= 0:
            return KEPT_OFF
        purse = self._purse(wish.agent)
        worst = wish.rate * wish.worst_seconds
        if why := self._over(purse, wish, worst, now):
            return why
        hold = Hold(wish.agent, wish.tenant, wish.rate, worst)
        purse.holds.add(hold)
        purse.starts += 1
        self._tenant(purse, wish.tenant, now).held += worst
        return hold

    def began(self, hold: Hold, now: float) -> None:
        """Its session has a container: from now on it costs."""
        hold.since = now

    def end(self, hold: Hold, now: float) -> float:
        """The session is over, or never was. What it cost; a second end costs nothing."""
        purse = self._purses[hold.agent]
        if hold not in purse.holds:
            return 0.0
        purse.holds.remove(hold)
        cost = hold.cost(now)
        purse.settled += cost
        tenant = self._tenant(purse, hold.tenant, now)
        tenant.held = max(0.0, tenant.held - hold.worst)
        tenant.spent_hour += cost
        tenant.spent_day += cost
        return cost

    def spending(self, agent: str, now: float) -> Spending:
        purse = self._purses.get(agent)
        if purse is None:
            return Spending()
        spent = purse.settled + sum(hold.cost(now) for hold in purse.holds)
        return Spending(
            spent=spent,
            reserved=max(0.0, purse.committed(now) - spent),
            ceiling=purse.ceiling,
            starts=purse.starts,
        )

    def _over(self, purse: _Purse, wish: Wish, worst: float, now: float) -> str:
        if not wish.budget.limits:
            return ""
        if purse.ceiling is None:
            return UNDEALT
        if purse.committed(now) + worst > purse.ceiling + TINY:
            return USED_UP
        if wish.tenant_share < 1:
            return self._tenant_over(self._tenant(purse, wish.tenant, now), wish, worst)
        return ""

    def _tenant_over(self, tenant: _Tenant, wish: Wish, worst: float) -> str:
        part = wish.tenant_share * wish.share
        for limit, spent in (
            (wish.budget.per_hour, tenant.spent_hour),
            (wish.budget.per_day, tenant.spent_day),
        ):
            if limit is not None and spent + tenant.held + worst > limit * part + TINY:
                return TENANT
        return ""

    def _purse(self, agent: str) -> _Purse:
        return self._purses.setdefault(agent, _Purse())

    def _tenant(self, purse: _Purse, name: str, now: float) -> _Tenant:
        tenant = purse.tenants.pop(name, None) or _Tenant()
        tenant.turn(now)
        if len(purse.tenants) >= MAX_TENANTS:
            idle = next((other for other, one in purse.tenants.items() if not one.held), None)
            if idle is not None:
                del purse.tenants[idle]
        purse.tenants[name] = tenant  # the one used last is the last in the table
        return tenant
