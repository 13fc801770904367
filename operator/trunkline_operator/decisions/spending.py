"""What burst costs, as the status tells it, and what a new operator reads back from there. Pure."""

from typing import Final

from trunkline_operator.agent.policy import allowed_burst, pinned
from trunkline_operator.agent.spec import Budget, Burst, Json, VoiceAgent, epoch
from trunkline_operator.burst.bills import Bill
from trunkline_operator.burst.standby import Standing
from trunkline_operator.decisions.plan import rfc3339
from trunkline_operator.decisions.world import Billed, BurstFacts, World
from trunkline_operator.scaling import spend
from trunkline_operator.scaling.prices import Prices, Rate, container_rate, pod_rate
from trunkline_operator.scaling.spend import DAY, HOUR, Account, Gateway, Terms

DIGITS: Final = 4  # a hundredth of a cent
# A bill and what was reckoned are apart by more than this before anybody is told. Containers are counted each 10 s
# and charged for whole intervals, and what they use of cores and memory is a guess.
APART_SHARE: Final = 0.25
APART_DOLLARS: Final = 1.0
# After a day's end, for figures of Modal that come in late.
SETTLE_SECONDS: Final = 7200.0
OLDEST_BILL: Final = 3 * DAY  # from the beginning of its day on
KEPT_GATEWAYS: Final = 32  # in a status; more replicas than any installation has


def terms(agent: VoiceAgent, burst: Burst, prices: Prices, standing: Standing) -> Terms | None:
    """What the agent's burst costs and may cost; None where a price is not known."""
    rates = {
        region.value: container_rate(burst, prices, pinned(region.value, agent.policy.residency))
        for region in burst.regions
    }
    known = {region: rate.second for region, rate in rates.items() if rate is not None}
    if len(known) < len(rates):
        return None
    told = (standing.scalings or {}).values()
    return Terms(
        container_second=max(known.values()),
        rates=known,
        slots=burst.slots_per_container,
        call_seconds=worst_seconds(agent),
        linger_seconds=burst.scaledown_window_seconds,
        least=sum(each.minimum for each in told),
        buffer=sum(each.buffer for each in told),
        most=burst.max_containers * len(burst.regions),
        budget=spend.Budget(per_hour=burst.budget.per_hour, per_day=burst.budget.per_day),
    )


def worst_seconds(agent: VoiceAgent) -> float:
    """The longest that a session may last: it begins before the caller's 101."""
    return float(agent.session.max_seconds + agent.session.answer_seconds)


def unpriced(burst: Burst, prices: Prices) -> str:
    """Which price is missing."""
    names = [name.partition(":")[0].rstrip("!+") for name in burst.gpu]
    missing = ", ".join(name for name in names if name not in prices.gpus)
    return f"no price of {missing} is known: add it to the operator's prices"


# --- the status ----------------------------------------------------------------------------------------------


def recalled(status: Json) -> Account | None:
    """The account that an earlier operator wrote; None if there is none."""
    kept = (status.get("burst") or {}).get("spend")
    at = epoch(kept.get("at")) if kept else None
    if not kept or at is None:
        return None
    gateways = {
        one["boot"]: Gateway(
            spent=one.get("spent", 0.0),
            granted=one.get("ceiling", 0.0),
            starts=one.get("starts", 0),
            heard=at,
        )
        for one in kept.get("gateways") or ()
    }
    return Account(
        at=at,
        hour=kept.get("hour", 0.0),
        day=kept.get("day", 0.0),
        before=kept.get("before"),
        containers=kept.get("containers", 0),
        gateways=gateways,
    )


def told(facts: BurstFacts, calls: int, previous: Json, now: float) -> Json:
    """`status.burst.spend`; the previous one while nothing is spent."""
    account, agreed = facts.account, facts.terms
    if account is None or agreed is None:
        return previous
    rate = spend.rate(account, agreed, calls)
    hour, day = (
        round(_current(paid, account.at, now, length), DIGITS)
        for paid, length in ((account.hour, HOUR), (account.day, DAY))
    )
    fresh: Json = {
        "hour": hour,
        "day": day,
        "containers": max(spend.presumed(account, agreed, calls), spend.perhaps(account, agreed)),
        "perHour": round(rate * HOUR, DIGITS),
        "projectedHour": round(hour + rate * (HOUR - now % HOUR), 2),
        "projectedDay": round(day + rate * (DAY - now % DAY), 2),
        "gateways": _gateways(account),
    }
    if account.before is not None and account.at // DAY == now // DAY:
        fresh["before"] = round(account.before, DIGITS)
    before = {name: value for name, value in previous.items() if name != "at"}
    return previous if fresh == before else {"at": rfc3339(account.at), **fresh}


def _gateways(account: Account) -> list[Json]:
    """Those that have spent or may: what a new operator must know of them."""
    heard = sorted(account.gateways.items(), key=lambda pair: (-pair[1].heard, pair[0]))
    kept = [
        {
            "boot": boot,
            "spent": round(gateway.spent, DIGITS),
            "ceiling": round(gateway.granted, DIGITS),
            "starts": gateway.starts,
        }
        for boot, gateway in heard[:KEPT_GATEWAYS]
        if gateway.granted or gateway.starts
    ]
    return sorted(kept, key=lambda one: str(one["boot"]))


def _current(dollars: float, at: float, now: float, length: float) -> float:
    return dollars if at // length == now // length else 0.0


def costs(agent: VoiceAgent, world: World, pods: int, prices: Prices) -> Json:
    """`status.cost`: dollars an hour as things are now; {} where no price is known."""
    burst = allowed_burst(agent)
    warm: Rate | None = pod_rate(agent.warm, agent.burst, prices)
    found: Json = {}
    if warm is not None:
        found["warmPerHour"] = round(warm.hour * pods, DIGITS)
    if burst is not None and (account := world.burst.account) and (agreed := world.burst.terms):
        second = spend.rate(account, agreed, world.traffic.burst)
        found["burstPerHour"] = round(second * HOUR, DIGITS)
    return found


# --- what Modal bills ----------------------------------------------------------------------------------------


def compared(bill: Bill | None, account: Account | None, earlier: Billed | None) -> Billed | None:
    """The bill beside what was reckoned for its day; the earlier one while either is not known."""
    if bill is None or account is None or account.before is None:
        return earlier
    if bill.day != account.at - account.at % DAY - DAY:
        return earlier
    return Billed(day=bill.day, dollars=bill.dollars, reckoned=account.before, at=bill.at)


def billed(found: Billed | None, now: float) -> Json:
    """`status.burst.billed`; {} where there is no bill, or where it is too old to say anything."""
    if found is None or now - found.day > OLDEST_BILL:
        return {}
    return {
        "day": rfc3339(found.day)[:10],
        "usd": round(found.dollars, DIGITS),
        "reckonedUsd": round(found.reckoned, DIGITS),
        "at": rfc3339(found.at),
    }


def differs(found: Billed | None, now: float) -> str:
    """How far the bill is from what was reckoned, where that is too far; "" = it is not."""
    if found is None or not DAY + SETTLE_SECONDS <= now - found.day <= OLDEST_BILL:
        return ""
    apart = abs(found.dollars - found.reckoned)
    if apart <= max(APART_SHARE * found.dollars, APART_DOLLARS):
        return ""
    return (
        f"Modal bills ${found.dollars:.2f} for {rfc3339(found.day)[:10]}, and ${found.reckoned:.2f} were "
        f"reckoned: give the operator the prices that you pay, for budgets are held by them"
    )


# --- the condition -------------------------------------------------------------------------------------------


def arithmetic(agreed: Terms, budget: Budget) -> str:
    """What the budget is, and what it lets in at once."""
    hour = agreed.container_second * HOUR
    most = f"at most {agreed.most} containers × ${hour:.2f} = ${agreed.most * hour:.2f} an hour"
    if budget == Budget():
        return f"no budget is set: burst costs {most}"
    limits = [
        f"${limit:.2f} {per}"
        for limit, per in ((budget.per_hour, "an hour"), (budget.per_day, "a day"))
        if limit is not None
    ]
    return (
        f"the budget is {' and '.join(limits)}; burst costs {most}, and a call reserves "
        f"{agreed.call_seconds:.0f} s × ${hour:.2f} an hour / {agreed.slots} slots = "
        f"${agreed.call_worst:.2f}"
    )


def spent_words(account: Account, agreed: Terms, now: float) -> str:
    """Why no call is let in, until when, and what a person can do."""
    running, parts, ends = spend.bound(account, agreed), [], []
    for limit, paid, length, name in (
        (agreed.budget.per_hour, account.hour, HOUR, "hour"),
        (agreed.budget.per_day, account.day, DAY, "day"),
    ):
        if limit is None:
            continue
        spent = _current(paid, account.at, now, length)
        parts.append(f"${spent:.2f} of ${limit:.2f} {'this hour' if name == 'hour' else 'today'}")
        if limit - spent - running < agreed.container_worst:
            ends.append(f"the {name} does at {rfc3339(now - now % length + length)[11:16]} UTC")
    until = f" or {' and '.join(ends)}" if ends else ""
    return (
        f"{' and '.join(parts)} are spent, and what runs may cost ${running:.2f} yet. Until calls end{until}, "
        "no container stands by, and calls past the warm slots go to the next rung or are refused; raise "
        "burst.modal.budget to take more"
    )
