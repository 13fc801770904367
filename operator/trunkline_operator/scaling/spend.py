"""What an agent's burst has cost this hour and today, and how much more gateways may commit. Pure.

Paid is what containers cost from their start to their end, whatever they do: calls pay for their slots, and the
rest is idle (empty slots, standing by, starting). Before a gateway lets a call in it reserves the call's worst case
below its ceiling. Ceilings are dealt so that, in every hour and every day of UTC,

    paid + what runs may cost yet + k × credit ≤ budget

What runs may cost yet: each container until the longest call on it and its scaledown window are over. Credit is
what gateways may commit and have not; k is how much more than its own share a call costs that gets a container to
itself. Whoever cannot be heard keeps its credit for SILENT_SECONDS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, floor, inf
from typing import Final

HOUR: Final = 3600.0
DAY: Final = 86_400.0
# In which containers that nobody needs are taken away, and sessions end whose gateway died.
LAG_SECONDS: Final = 30.0
# A gateway that is not heard may live and use its credit; after the longest call it is taken for dead.
SILENT_SECONDS: Final = 3700.0
# Two versions of an app run side by side while Modal rolls one out.
ROLLING: Final = 2
MOST_GATEWAYS: Final = 64  # in one account; the ones silent for longest go first
UNLIMITED: Final = 1e6  # dollars of credit, where the budget cannot be reached
DIGITS: Final = 6  # of a ceiling: a millionth of a dollar


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """In dollars; None is no limit."""

    per_hour: float | None = None
    per_day: float | None = None

    @property
    def limits(self) -> bool:
        return self.per_hour is not None or self.per_day is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What an agent's burst costs, and may cost."""

    container_second: float  # dollars, in the dearest of its regions
    slots: int  # of a container
    call_seconds: float  # the longest that a session may last
    linger_seconds: float  # that a container stays without a call
    least: int = 0  # minContainers
    buffer: int = 0  # bufferContainers
    most: int = 1  # maxContainers
    budget: Budget = Budget()
    rates: Mapping[str, float] = field(default_factory=dict)  # of a container's second, by region

    def share(self, containers: Mapping[str, int]) -> float:
        """What so many containers in these regions cost of as many in the dearest."""
        dearest = self.container_second * sum(containers.values())
        if not dearest:
            return 1.0
        each = self.rates
        return (
            sum(n * each.get(at, self.container_second) for at, n in containers.items()) / dearest
        )

    @property
    def call_second(self) -> float:
        """A call's share of its container."""
        return self.container_second / self.slots

    @property
    def call_worst(self) -> float:
        """What a gateway reserves for one call."""
        return self.call_second * self.call_seconds

    @property
    def after(self) -> float:
        """Seconds that a container may be paid for beyond its last call."""
        return self.linger_seconds + LAG_SECONDS

    @property
    def container_worst(self) -> float:
        """What a container costs that is started for one call, at most."""
        return self.container_second * (self.call_seconds + self.after)


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a gateway says of its burst, in dollars since its start."""

    spent: float = 0.0
    reserved: float = 0.0
    ceiling: float | None = None  # the one it acts on
    starts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """One gateway, as far as it was heard."""

    spent: float = 0.0
    reserved: float = 0.0
    starts: int = 0
    granted: float = 0.0  # the highest ceiling that it may act on
    sent: float | None = None  # the last that it was told
    heard: float = 0.0

    @property
    def credit(self) -> float:
        return max(0.0, self.granted - self.spent - self.reserved)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One agent's burst. `Account(at=now)` is that of a new agent."""

    at: float  # up to when containers were charged
    hour: float = 0.0  # paid in the hour of `at`
    day: float = 0.0
    before: float | None = None  # paid in the day before that; None = nobody knows
    paid: float = 0.0  # since the operator's start
    calls: float = 0.0  # of it by calls
    containers: int = 0  # at the last count
    share: float = 1.0  # what they cost of as many in the dearest region
    starts: int = 0  # sessions since that count
    gateways: Mapping[str, Gateway] = field(default_factory=dict)  # by boot

    @property
    def idle(self) -> float:
        return max(0.0, self.paid - self.calls)

    @property
    def reserved(self) -> float:
        return sum(gateway.reserved for gateway in self.gateways.values())

    @property
    def credit(self) -> float:
        return sum(gateway.credit for gateway in self.gateways.values())


# --- what is heard and counted -----------------------------------------------------------------------------


def heard(account: Account, said: Mapping[str, Said], now: float) -> Account:
    """The account after what gateways say now; those that say nothing are kept for a while."""
    gateways = {
        boot: gateway
        for boot, gateway in account.gateways.items()
        if boot in said or now - gateway.heard < SILENT_SECONDS
    }
    spent, starts = 0.0, 0
    for boot, word in said.items():
        known = gateways.pop(boot, Gateway())
        spent += max(0.0, word.spent - known.spent)
        starts += max(0, word.starts - known.starts)
        ceiling = word.ceiling or 0.0
        gateways[boot] = Gateway(
            spent=max(word.spent, known.spent),
            reserved=word.reserved,
            starts=max(word.starts, known.starts),
            # Messages keep their order: once it acts on the last it will not act on one before.
            granted=ceiling if word.ceiling == known.sent else max(known.granted, ceiling),
            sent=known.sent,
            heard=now,
        )
    silent = sorted(gateways, key=lambda boot: gateways[boot].heard)
    for boot in silent[:-MOST_GATEWAYS]:
        del gateways[boot]
    return replace(
        account, calls=account.calls + spent, starts=account.starts + starts, gateways=gateways
    )


def buried(account: Account, boot: str) -> Account:
    """The account without a gateway that is certainly dead, and with it its calls."""
    kept = {name: gateway for name, gateway in account.gateways.items() if name != boot}
    return replace(account, gateways=kept)


def counted(
    account: Account, terms: Terms, containers: int, until: float, share: float = 1.0
) -> Account:
    """Charges for so many containers since the last charge; sessions started since then have theirs among them.

    `share` is what they cost of as many in the dearest region.
    """
    charged = _charged(account, terms, containers * share, until)
    return replace(charged, containers=containers, share=share, starts=0)


def estimated(account: Account, terms: Terms, until: float) -> Account:
    """Charges where nothing was counted, for the most that may have run: a new operator's first charge."""
    passed = max(0.0, until - account.at)
    if not passed:
        return account
    whole = min(passed, terms.call_seconds + terms.after)
    seconds = max(terms.least * passed, _up(account, terms) * whole)
    return _charged(account, terms, seconds / passed, until)


def presumed(account: Account, terms: Terms, calls: int) -> int:
    """Containers now: those that were counted, or that calls and the floor need at least."""
    return max(account.containers, terms.least, ceil(calls / terms.slots))


def perhaps(account: Account, terms: Terms) -> int:
    """Containers that were counted, and one for each session since: a new operator must not know of fewer."""
    return min(account.containers + account.starts, _most(terms))


def _charged(account: Account, terms: Terms, containers: float, until: float) -> Account:
    passed = until - account.at
    if passed <= 0:
        return account
    dollars = containers * terms.container_second * passed
    return replace(
        account,
        at=until,
        hour=_window(account.hour, account.at, until, HOUR, dollars),
        day=_window(account.day, account.at, until, DAY, dollars),
        before=_day_before(account, until, dollars),
        paid=account.paid + dollars,
    )


def _window(before: float, since: float, until: float, length: float, dollars: float) -> float:
    """What is paid in the window of `until`; of a charge that began in another, the part in this one."""
    start = until - until % length
    if since >= start:
        return before + dollars
    return dollars * (until - start) / (until - since)


def _day_before(account: Account, until: float, dollars: float) -> float | None:
    """What was paid in the day before that of `until`; a charge that spans several days is spread over them."""
    start = until - until % DAY
    if account.at >= start:
        return account.before
    since = max(account.at, start - DAY)
    spread = dollars * (start - since) / (until - account.at)
    return spread + (account.day if account.at >= start - DAY else 0.0)


def upto(account: Account, terms: Terms, calls: int, now: float) -> Account:
    """The account as it would be if containers were charged now, for people."""
    return _charged(account, terms, presumed(account, terms, calls) * account.share, now)


def rate(account: Account, terms: Terms, calls: int) -> float:
    """Dollars a second, now."""
    return presumed(account, terms, calls) * account.share * terms.container_second


# --- what is dealt -----------------------------------------------------------------------------------------


def bound(account: Account, terms: Terms, within: float = inf) -> float:
    """What runs may cost yet, of that what falls into so many seconds."""
    each = _up(account, terms) * terms.container_second
    calls = min(account.reserved * terms.slots, each * terms.call_seconds)
    return min(calls + each * terms.after, each * within)


def room(account: Account, terms: Terms, now: float) -> float:
    """How much credit gateways may have together; `inf` where the budget cannot be reached."""
    until_now = _charged(account, terms, _up(account, terms), now)
    return min(
        _room(terms.budget.per_hour, until_now.hour, HOUR, account, terms, now),
        _room(terms.budget.per_day, until_now.day, DAY, account, terms, now),
    )


def _room(
    limit: float | None, paid: float, length: float, account: Account, terms: Terms, now: float
) -> float:
    if limit is None or ROLLING * terms.most * terms.container_second * length <= limit:
        return inf
    left = length - now % length
    last = terms.call_seconds + terms.after
    this = (limit - paid - bound(account, terms, left)) / _factor(terms, min(left, last))
    # What is let in near the end of a window is paid in the next, which has a limit as well.
    following = (limit - bound(account, terms)) / _factor(terms, last)
    return max(0.0, min(this, following))


def _factor(terms: Terms, seconds: float) -> float:
    """Dollars of a container for each that is reserved of a call, if it runs for the call alone."""
    return max(terms.slots * seconds / terms.call_seconds, 1e-9)


def dealt(
    account: Account, terms: Terms, here: Mapping[str, float], now: float
) -> tuple[Account, dict[str, float]]:
    """Ceilings for the gateways that are here, each with a weight; and the account with them.

    Shares are whole calls. What one has too much is taken back first, and given to others once it has said so.
    """
    whole = room(account, terms, now)
    gateways = dict(account.gateways)
    held = sum(gateway.credit for boot, gateway in gateways.items() if boot not in here)
    shares = _shares(whole - held, terms.call_worst, here)
    free = whole - account.credit
    ceilings: dict[str, float] = {}
    for boot, share in shares.items():
        gateway = gateways.get(boot, Gateway(heard=now))
        spare = terms.call_worst if free >= 0 else 0.0
        if gateway.credit > share + spare:
            credit = share
        else:
            credit = gateway.credit + max(0.0, min(share - gateway.credit, free))
            free -= credit - gateway.credit
        ceilings[boot] = ceiling = round(gateway.spent + gateway.reserved + credit, DIGITS)
        gateways[boot] = replace(gateway, sent=ceiling, granted=max(gateway.granted, ceiling))
    return replace(account, gateways=gateways), ceilings


def _shares(whole: float, unit: float, weights: Mapping[str, float]) -> dict[str, float]:
    """Splits a sum in whole units by weight; what is left over goes to the heaviest."""
    if whole == inf:
        return dict.fromkeys(weights, UNLIMITED)
    units, total = floor(max(0.0, whole) / unit), sum(weights.values())
    parts = {boot: floor(units * weight / total) for boot, weight in weights.items()}
    heaviest = sorted(weights, key=lambda boot: (-weights[boot], boot))
    for boot in heaviest[: units - sum(parts.values())]:
        parts[boot] += 1
    return {boot: part * unit for boot, part in parts.items()}


def shut(account: Account, terms: Terms, now: float, before: bool) -> bool:
    """Whether the budget is used up: no call's worst case fits.

    It opens again once a container full of calls fits, or half of what a new hour would let in, if that is less.
    """
    if not terms.budget.limits:
        return False
    if before:
        fresh = room(Account(at=now), terms, now)
        enough = min(terms.call_worst * terms.slots, fresh / 2)
        return room(account, terms, now) < max(terms.call_worst, enough)
    return max(room(account, terms, now), account.credit) < terms.call_worst


def too_small(terms: Terms) -> str:
    """The arithmetic, where the budget lets no call in at any time; "" = it does."""
    for name, limit, length in (
        ("perHour", terms.budget.per_hour, HOUR),
        ("perDay", terms.budget.per_day, DAY),
    ):
        if limit is None:
            continue
        standing = terms.least * terms.container_second * length
        if terms.container_worst > limit:
            return (
                f"one call may cost a container for {terms.call_seconds + terms.after:.0f} s at "
                f"${terms.container_second * HOUR:.2f} an hour = ${terms.container_worst:.2f}, and budget."
                f"{name} is ${limit:.2f}"
            )
        if standing > limit:
            return (
                f"{terms.least} minContainers cost ${standing:.2f} "
                f"{'an hour' if length == HOUR else 'a day'}, and budget.{name} is ${limit:.2f}"
            )
    return ""


def _up(account: Account, terms: Terms) -> int:
    """Containers that may run now: each session since the count may have started one, and Modal its buffer."""
    counted = max(account.containers, terms.least)
    return min(counted + terms.buffer + account.starts, max(_most(terms), counted))


def _most(terms: Terms) -> int:
    return ROLLING * terms.most
