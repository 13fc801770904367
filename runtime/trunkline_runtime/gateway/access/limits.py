"""What a tenant may have of an agent, and which free slots are kept for others. Pure: the time is an argument.

Gateways share no state, so each applies its share of a limit; the operator deals the shares. The sum over G gateways
is at most G − 1 calls above `concurrent_calls`, since each lets at least one call in and rounds up; starts and
minutes add up to the limit itself. Where a balancer sends one tenant's callers to one gateway only, the tenant gets
that gateway's share: that is the price of having no shared state.

A guarantee is not dealt: each gateway keeps the whole of what a tenant does not use here, for it cannot know what
the tenant uses elsewhere. That errs towards the guarantee, by at most the guaranteed slots themselves. Of what is
free beyond that, a gateway gives tenants that have had their guarantee no more than its share within the time that
it takes to hear of others' calls; so even when one tenant floods all gateways in the same moment, they do not give
away together what each has seen free. The last G − 1 such slots stay free.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Final

DAY_SECONDS: Final = 86_400  # of UTC
RETRY_SECONDS: Final = 5  # for a slot of one's own: when a call will end, nobody knows
RECENT_SECONDS: Final = (
    600.0  # a tenant that nobody named is known for so long after its last start
)
HEARD_SECONDS: Final = (
    0.25  # in which a worker's word of a call reaches all gateways; 1 ms at most times
)
MAX_TENANTS: Final = 4096  # an agent that are remembered; 1 MB
ROUNDING: Final = 1e-6  # a third of 3 is one call


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one tenant at one agent, at all gateways together. 0 is no limit, and no guarantee.

    `burst_share` is handed on to whoever keeps the budget: an account here knows no prices.
    """

    concurrent_calls: int = 0
    starts_per_minute: int = 0
    minutes_per_day: int = 0  # of calls, from their 101 on; the day is UTC's
    guaranteed_slots: int = 0
    burst_share: int = 100  # percent of the agent's burst budget; 0 keeps the tenant off burst


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenancy:
    """The limits of all tenants of an agent."""

    limits: Limits = Limits()
    overrides: Mapping[str, Limits] = field(default_factory=dict)
    named: frozenset[str] = (
        frozenset()
    )  # tenants that exist although they have not called: API keys

    def of(self, tenant: str) -> Limits:
        return self.overrides.get(tenant, self.limits)


@dataclass(frozen=True, slots=True)
class Over:
    """A limit is reached. `why` is for the caller."""

    why: str
    retry_seconds: int


@dataclass(slots=True, eq=False)
class Hold:
    """One call's place in its tenant's account, from before it is placed to its end."""

    agent: str
    tenant: str
    warm: bool = True  # it may take a warm slot yet, or has one
    answered: bool = False


@dataclass(slots=True)
class _Account:
    """One tenant of one agent at this gateway."""

    seen: float
    tokens: float  # starts that may be made at once
    day: int
    calls: int = 0
    warm: int = 0
    live: int = 0  # answered
    since: float = 0.0  # the sum of the moments from which live calls count
    seconds: float = 0.0  # of calls that ended today

    def turn(self, now: float) -> None:
        """Begins a new day: what live calls have had of the old one is no longer counted."""
        today = int(now // DAY_SECONDS)
        if today > self.day:
            self.day, self.seconds = today, 0.0
            self.since = self.live * float(today * DAY_SECONDS)

    def used(self, now: float) -> float:
        return self.seconds + self.live * now - self.since


class Tenants:
    """All accounts of one gateway. `now` is Unix time that never steps back."""

    def __init__(self) -> None:
        self._accounts: dict[str, dict[str, _Account]] = {}
        self._given: dict[str, deque[float]] = defaultdict(deque)  # when, beyond guarantees

    def __repr__(self) -> str:
        held = {
            agent: {tenant: account.calls for tenant, account in accounts.items() if account.calls}
            for agent, accounts in self._accounts.items()
        }
        return f"<Tenants {held}>"

    def start(
        self, agent: str, tenant: str, limits: Limits, share: float, now: float
    ) -> Hold | Over:
        """Lets a call try for a slot, or says which limit is in its way. A `Hold` must be ended."""
        account = self._account(agent, tenant, limits, share, now)
        if over := _over(account, limits, share, now):
            return over
        if limits.starts_per_minute:
            account.tokens -= 1
        account.calls += 1
        account.warm += 1
        return Hold(agent, tenant)

    def answered(self, hold: Hold, now: float, *, warm: bool) -> None:
        """The call has its 101."""
        account = self._accounts[hold.agent][hold.tenant]
        account.turn(now)
        hold.answered = True
        account.live += 1
        account.since += now
        if not warm and hold.warm:
            hold.warm = False
            account.warm -= 1

    def moved(self, hold: Hold, *, warm: bool) -> None:
        """The call has another place."""
        self._accounts[hold.agent][hold.tenant].warm += warm - hold.warm
        hold.warm = warm

    def end(self, hold: Hold, now: float) -> None:
        """The call is over, or was never placed."""
        account = self._accounts[hold.agent][hold.tenant]
        account.turn(now)
        account.calls -= 1
        account.warm -= hold.warm
        if hold.answered:
            mean = account.since / account.live  # whose call it was makes no difference to the sum
            account.seconds += now - mean
            account.since -= mean
            account.live -= 1

    def take(
        self, hold: Hold, tenancy: Tenancy, share: float, free: Callable[[], int], now: float
    ) -> bool:
        """Whether a call may take one of the warm slots that are free; it counts as taken."""
        kept = self.kept_for_others(hold.agent, hold.tenant, tenancy, now)
        if not kept:
            return _enters(self._accounts[hold.agent][hold.tenant], hold)
        account = self._accounts[hold.agent][hold.tenant]
        # This call counts as one of its tenant's warm ones, also where it has only waited so far.
        if account.warm + (not hold.warm) <= tenancy.of(hold.tenant).guaranteed_slots:
            return free() > kept and _enters(account, hold)
        given = self._given[hold.agent]
        while given and given[0] <= now - HEARD_SECONDS:
            given.popleft()
        if len(given) + 1 > share * (free() + len(given) - kept) + ROUNDING:
            return False
        given.append(now)
        return _enters(account, hold)

    def waits(self, hold: Hold) -> None:
        """The call stands in line: until `take` lets it have a slot, its tenant has one less than counted."""
        if hold.warm:
            hold.warm = False
            self._accounts[hold.agent][hold.tenant].warm -= 1

    def kept_for_others(self, agent: str, tenant: str, tenancy: Tenancy, now: float) -> int:
        """How many free warm slots of an agent this tenant must leave."""
        accounts = self._accounts.get(agent, {})
        kept = 0
        for other in self._guaranteed(accounts, tenancy, now):
            if other != tenant:
                has = accounts[other].warm if other in accounts else 0
                kept += max(0, tenancy.of(other).guaranteed_slots - has)
        return kept

    def _guaranteed(
        self, accounts: Mapping[str, _Account], tenancy: Tenancy, now: float
    ) -> Iterable[str]:
        """The tenants that a guarantee may be kept for."""
        known = {name for name, limits in tenancy.overrides.items() if limits.guaranteed_slots}
        if tenancy.limits.guaranteed_slots:
            known |= tenancy.named
            known.update(
                tenant
                for tenant, account in accounts.items()
                if account.calls or now - account.seen < RECENT_SECONDS
            )
        return known

    def _account(
        self, agent: str, tenant: str, limits: Limits, share: float, now: float
    ) -> _Account:
        """The account, brought up to now; the one used last is the last in the table."""
        accounts = self._accounts.setdefault(agent, {})
        account = accounts.pop(tenant, None)
        most = _most_starts(limits, share)
        if account is None:
            account = _Account(seen=now, tokens=most, day=int(now // DAY_SECONDS))
            _make_room(accounts)
        accounts[tenant] = account
        gained = (now - account.seen) * limits.starts_per_minute * share / 60
        account.tokens = min(most, account.tokens + gained)
        account.seen = now
        account.turn(now)
        return account


def _enters(account: _Account, hold: Hold) -> bool:
    """The call has a warm slot, or will in a moment."""
    account.warm += not hold.warm
    hold.warm = True
    return True


def _over(account: _Account, limits: Limits, share: float, now: float) -> Over | None:
    most = max(1, ceil(limits.concurrent_calls * share - ROUNDING))
    if limits.concurrent_calls and account.calls >= most:
        return Over("as many calls as you may have at once are going on", RETRY_SECONDS)
    if limits.minutes_per_day and account.used(now) >= limits.minutes_per_day * 60 * share:
        midnight = (account.day + 1) * DAY_SECONDS
        return Over("your minutes of today are used up", ceil(midnight - now))
    if limits.starts_per_minute and account.tokens < 1:
        wait = (1 - account.tokens) * 60 / (limits.starts_per_minute * share)
        return Over("you start calls faster than you may", max(1, ceil(wait)))
    return None


def _most_starts(limits: Limits, share: float) -> float:
    return max(1.0, limits.starts_per_minute * share)


def _make_room(accounts: dict[str, _Account]) -> None:
    """Forgets the tenant that has been quiet for longest; one with calls is never forgotten."""
    if len(accounts) >= MAX_TENANTS:
        idle = next((name for name, account in accounts.items() if not account.calls), None)
        if idle is not None:
            del accounts[idle]
