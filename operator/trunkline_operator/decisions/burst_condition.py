"""Whether calls may go to Modal, and whether that may cost more."""

from collections.abc import Mapping
from typing import Final

from trunkline_operator.agent.policy import ladder
from trunkline_operator.agent.spec import Budget, Json, VoiceAgent
from trunkline_operator.decisions import spending
from trunkline_operator.decisions.conditions import Condition, Reason, Verdict
from trunkline_operator.decisions.plan import CREDENTIALS_LOOK, retry_wait, rfc3339
from trunkline_operator.decisions.world import BurstFacts, World
from trunkline_operator.scaling import spend

# `burst.BurstReason.CREDENTIALS_REFUSED`, which would bring the SDK with it.
REFUSED_CREDENTIALS: Final = "CredentialsRefused"


def burst_ready(agent: VoiceAgent, world: World) -> Verdict:
    facts, burst = world.burst, ladder(agent).burst
    if burst is None:
        words = "calls stay in the cluster" if agent.burst else "burst.modal is not set"
        return Condition.BURST_READY, False, Reason.BURST_OFF, words
    meanwhile = (
        "the last deployment goes on"
        if facts.url
        else "until then calls past the warm slots are refused"
    )
    if facts.failures:
        again = f"tried again after {retry_wait(facts.failures):.0f} s, at once if burst.modal is changed"
        if facts.message.startswith(REFUSED_CREDENTIALS):
            again = f"check Secret {burst.credentials_secret}; {again}"
        words = f"{facts.message.rstrip('.')}; {again}; {meanwhile}"
        return Condition.BURST_READY, False, Reason.BURST_FAILING, words
    shut = world.traffic.shut
    if failure := world.traffic.burst_error or _all_shut(facts, shut):
        words = f"{failure}; each call that finds no warm slot tries again{_limited(facts)}"
        return Condition.BURST_READY, False, Reason.BURST_FAILING, words
    if facts.credentials:
        words = f"{facts.credentials}; looked for every {CREDENTIALS_LOOK:.0f} s; {meanwhile}"
        return Condition.BURST_READY, False, Reason.CREDENTIALS_MISSING, words
    if not facts.url:
        words = "the first container starts" if facts.app else "the app is being deployed"
        return Condition.BURST_READY, False, Reason.BURST_DEPLOYING, words
    taking = [region for region in burst.regions if region in facts.urls and region not in shut]
    words = f"app {facts.app} takes calls in {' and '.join(taking)}"
    if facts.capped:
        words += ", but no new one now: see WithinBudget"
    words += _limited(facts)
    if (breaker := facts.breaker) and breaker.fallen:
        words += (
            f"; its containers start with snapshot {breaker.level} because restores from "
            f"{breaker.asked} failed, tried again after {breaker.wait / 60:g} minutes"
        )
        return Condition.BURST_READY, True, Reason.SNAPSHOT_FALLBACK, words
    if down := [region for region in burst.regions if region in facts.urls and region in shut]:
        words += f"; {down[0]} is passed over for a while: {shut[down[0]]}"
        return Condition.BURST_READY, True, Reason.REGION_DOWN, words
    if facts.limit:
        return Condition.BURST_READY, True, Reason.LIMIT_REACHED, words
    return Condition.BURST_READY, True, Reason.BURST_READY, words


def _limited(facts: BurstFacts) -> str:
    """What the workspace does not let the agent have, and what follows; "" = nothing is known."""
    limit = facts.limit
    if limit is None:
        return ""
    count = f"{limit.containers} containers" if limit.containers > 1 else "one container"
    return (
        f"; Modal has refused more than {count} since {rfc3339(limit.since)}: no more stand by until "
        f"{rfc3339(limit.until)}, then more are asked for; raise the workspace's limit, or warm.maxPods"
    )


def _all_shut(facts: BurstFacts, shut: Mapping[str, str]) -> str:
    """Why gateways pass over every region that there is, "" = they do not."""
    there = [region for region in facts.urls if region in shut]
    return shut[there[0]] if there and len(there) == len(facts.urls) else ""


def within_budget(agent: VoiceAgent, world: World, previous: Json, now: float) -> Verdict:
    """The words of a spent budget stay as they were when it was: they would be others at every look."""
    kind, facts, burst = Condition.WITHIN_BUDGET, world.burst, ladder(agent).burst
    if burst is None:
        words = "no call goes to burst, so it costs nothing"
        return kind, True, Reason.NO_BUDGET, words
    limited = burst.budget != Budget()
    if facts.unpriced:
        if not limited:
            return kind, True, Reason.NO_BUDGET, f"no budget is set, and {facts.unpriced}"
        words = f"{facts.unpriced}; until then no call goes to burst"
        return kind, False, Reason.PRICE_UNKNOWN, words
    account, agreed = facts.account, facts.terms
    if account is None or agreed is None:
        return kind, True, Reason.NO_BUDGET, "nothing is spent yet"
    if small := spend.too_small(agreed):
        return kind, False, Reason.BUDGET_TOO_SMALL, f"{small}: raise it"
    if facts.capped:
        old = {one["type"]: one for one in previous.get("conditions") or ()}.get(kind, {})
        if old.get("reason") == Reason.BUDGET_SPENT:
            return kind, False, Reason.BUDGET_SPENT, old["message"]
        words = spending.spent_words(account, agreed, now)
        return kind, False, Reason.BUDGET_SPENT, words
    words = spending.arithmetic(agreed, burst.budget)
    if apart := spending.differs(facts.billed, now):
        return kind, True, Reason.BILL_DIFFERS, f"{apart}; {words}"
    reason = Reason.WITHIN_BUDGET if limited else Reason.NO_BUDGET
    return kind, True, reason, words
