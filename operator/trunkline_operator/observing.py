"""What a look sees of one agent: its pods and Secrets, what gateways say of it, and its Modal app."""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Final

from trunkline_operator.agent.policy import allowed_burst
from trunkline_operator.agent.spec import Budget, Json, VoiceAgent
from trunkline_operator.burst.bills import Bills
from trunkline_operator.burst.breaker import LEVELS, Breaker, following, noted, probed, recovered
from trunkline_operator.burst.deployments import Deployments
from trunkline_operator.burst.limit import current
from trunkline_operator.cluster.authority import Authority, why_issue
from trunkline_operator.cluster.client import ApiError, path
from trunkline_operator.cluster.complaints import Complaints
from trunkline_operator.cluster.credentials import (
    account_of,
    caller_keys_missing,
    credentials_missing,
    hook_secret,
    hook_token_missing,
    hub_token_missing,
    proxy_token,
    registry_login,
    token_of,
    twilio_secret,
    upstream_secret,
    upstream_token_missing,
)
from trunkline_operator.cluster.custody import Custody
from trunkline_operator.cluster.mirror import Edition, Mirror, edition_of
from trunkline_operator.decisions.manifests import (
    TICKET_KEY,
    WORKER_KEY,
    Installation,
    burst_hash,
    secret_name,
    secret_strings,
)
from trunkline_operator.decisions.routes import Keys
from trunkline_operator.decisions.spending import compared, recalled, terms, unpriced
from trunkline_operator.decisions.world import (
    Billed,
    BurstFacts,
    PodFacts,
    Traffic,
    WorkerFacts,
    World,
)
from trunkline_operator.gateways.fleet import Fleet
from trunkline_operator.scaling.spend import Account
from trunkline_operator.treasury import Count, Treasury
from trunkline_runtime.contract import FINALIZER

# Secrets are not watched, so that nobody needs the right to read them all.
SECRETS_SECONDS: Final = 30.0
# The agent's own Secret, which nobody else writes: a thousand agents at rest would read 33 of them a second. If
# somebody deletes it, it is a new pod that misses it, and where one does not come up it is read as the others are.
OWN_SECONDS: Final = 300.0
TOUCHED_SECONDS: Final = 5.0  # whoever changes a label alone wants the agent looked at
# A look that comes a little sooner reads them as well, so that it need not be followed by another.
FRESH_SHARE: Final = 5 / 6

BURST: Final = "burst/"  # of the names of rungs, before the region


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """An agent, and all that was observed of it at one moment."""

    obj: Json
    agent: VoiceAgent
    world: World
    keys: Keys
    now: float

    @property
    def path(self) -> str:
        return path("VoiceAgent", self.agent.namespace, self.agent.name)


@dataclass(slots=True, kw_only=True)
class _Read:
    """A Secret as it was last read."""

    at: float = 0.0
    lasts: float = SECRETS_SECONDS
    entries: dict[str, str] | None = None  # None: there is none
    certificate: str | None = ""  # why the workers need another; None = not looked at yet
    edition: Edition | None = None  # of the agent when it was read


def own_lasts(pods: Sequence[PodFacts], *, touched: bool, leaving: bool = False) -> float:
    """Seconds for which the agent's own Secret counts as read.

    A pod may not come up because somebody has deleted it. An agent that leaves gets no new pod, nor a Secret in place of
    one that is gone.
    """
    if leaving:
        return math.inf
    if touched:
        return TOUCHED_SECONDS
    waits = any(pod.node and not pod.ready for pod in pods)
    return SECRETS_SECONDS if waits else OWN_SECONDS


class Observer:
    """Observes agents. `authority` None: plain links."""

    def __init__(
        self,
        mirror: Mirror,
        fleet: Fleet,
        deployments: Deployments,
        custody: Custody,
        treasury: Treasury,
        bills: Bills,
        installation: Installation,
        authority: Authority | None,
    ) -> None:
        self._mirror = mirror
        self._fleet = fleet
        self._deployments = deployments
        self._custody = custody
        self._treasury = treasury
        self._bills = bills
        self._installation = installation
        self._authority = authority
        self._complaints = Complaints(mirror.cluster)
        self._read: dict[str, dict[str, _Read]] = {}  # Secrets, by agent and name

    async def observe(self, obj: Json, agent: VoiceAgent, now: float) -> Seen:
        """All of it at one moment. Raises ApiError if a Secret cannot be read."""
        modal = agent.burst
        named = (
            agent.access.api_keys_secret,
            modal.credentials_secret if modal else "",
            hook_secret(agent),
            agent.engine.token_secret,
            upstream_secret(agent),
            twilio_secret(agent),
        )
        own, found = await self._secrets(obj, agent, frozenset(named) - {""}, now)
        callers, account, hook, hub, upstream, twilio = map(found.get, named)
        pods = await self._complaints.added(agent, self._mirror.pods(agent.key), now)
        no_hub = hub_token_missing(agent, hub)
        traffic = self._traffic(agent.key)
        burst = self._burst_facts(obj, agent, (account, no_hub), now)
        entries = own.entries or {}
        world = World(
            pods=pods,
            traffic=traffic,
            secret_exists=own.entries is not None,
            certificate=own.certificate or "",
            burst=self._money(obj, agent, burst, traffic.burst),
            access=caller_keys_missing(agent, callers, twilio),
            tokens="; ".join(
                filter(
                    None,
                    (
                        no_hub,
                        hook_token_missing(agent, hook),
                        upstream_token_missing(agent, upstream),
                    ),
                )
            ),
        )
        keys = Keys(
            worker=entries.get(WORKER_KEY, ""),
            ticket=entries.get(TICKET_KEY, ""),
            callers=callers or {},
            twilio=twilio or {},
            proxy_token=proxy_token(account or {}),
            registry=registry_login(account or {}),
            hook_token=token_of(hook),
            hub_token=token_of(hub),
            upstream_token=token_of(upstream),
        )
        if world.access or world.tokens or world.burst.credentials:
            self._read_again(agent)  # somebody has just been told to mend one
        return Seen(obj=obj, agent=agent, world=world, keys=keys, now=now)

    # --- Secrets --------------------------------------------------------------------------------------

    def stale_in(self, key: str) -> float:
        """Seconds until something that was read for this agent must be read again."""
        now = time.monotonic()
        ends = (read.at + read.lasts for read in self._read.get(key, {}).values())
        secrets = max(min(ends, default=now + SECRETS_SECONDS) - now, 0.0)
        events = self._complaints.look_in(key, time.time())
        return secrets if events is None else min(secrets, events)

    def wrote_secret(self, agent: VoiceAgent, made: Json) -> None:
        """Takes in what the API made of our write of the agent's own Secret."""
        self._keep(agent, secret_name(agent), secret_strings(made), OWN_SECONDS)

    def forget(self, key: str) -> None:
        self._read.pop(key, None)
        self._complaints.forget(key)

    async def _secrets(
        self, obj: Json, agent: VoiceAgent, others: frozenset[str], now: float
    ) -> tuple[_Read, dict[str, dict[str, str] | None]]:
        """The agent's own Secret, and the entries of others by name. Each that must be read is asked for at once."""
        if not others:  # as of most agents at most times; tasks cost more than the rest of this
            return await self._own(obj, agent, now), {}
        own, entries = await asyncio.gather(
            self._own(obj, agent, now),
            asyncio.gather(*(self._secret(agent, name) for name in others)),
        )
        return own, dict(zip(others, entries, strict=True))

    async def _own(self, obj: Json, agent: VoiceAgent, now: float) -> _Read:
        """The agent's own Secret, and whether its certificate is good."""
        # Without either, no operator has come as far as the Secret; or it was killed then, and the Secret is found when
        # another is made.
        if not (FINALIZER in agent.finalizers or obj.get("status")):
            return _Read()
        name, edition = secret_name(agent), edition_of(obj)
        known = self._read.get(agent.key, {}).get(name)
        before = edition if known is None or known.edition is None else known.edition
        touched = before != edition and before[0] == edition[0]
        pods, leaving = self._mirror.pods(agent.key), agent.deleted_at is not None
        lasts = partial(own_lasts, pods, leaving=leaving)
        await self._secret(agent, name, lasts(touched=touched))
        own = self._read[agent.key][name]
        if own is not known:
            own.lasts = lasts(touched=False)
        if own is not known or not touched:
            own.edition = edition
        if own.certificate is None:
            own.certificate = self._certificate(own.entries or {}, agent, now)
        return own

    async def _secret(
        self, agent: VoiceAgent, name: str, lasts: float = SECRETS_SECONDS
    ) -> dict[str, str] | None:
        """The entries of a Secret, None if it does not exist."""
        if not name:
            return None
        known = self._read.get(agent.key, {}).get(name)
        # What is missing may come at any moment, and its agent waits for it.
        if known and known.entries is not None:
            known.lasts = lasts
            if known.at + lasts * FRESH_SHARE > time.monotonic():
                return known.entries
        found = await self._mirror.cluster.find(path("Secret", agent.namespace, name))
        return self._keep(agent, name, None if found is None else secret_strings(found), lasts)

    def _read_again(self, agent: VoiceAgent) -> None:
        """All but the agent's own, which nobody else writes."""
        read = self._read.get(agent.key, {})
        for name in read.keys() - {secret_name(agent)}:
            del read[name]

    def _keep(
        self, agent: VoiceAgent, name: str, entries: dict[str, str] | None, lasts: float
    ) -> dict[str, str] | None:
        read = self._read.setdefault(agent.key, {})
        read[name] = _Read(at=time.monotonic(), lasts=lasts, entries=entries, certificate=None)
        return entries

    def _certificate(self, own: Mapping[str, str], agent: VoiceAgent, now: float) -> str:
        """Why the workers need a new certificate; "" = they do not."""
        authority = self._authority
        if authority is None:
            return ""
        return why_issue(own, authority, agent.key, datetime.fromtimestamp(now, UTC))

    # --- calls and burst ------------------------------------------------------------------------------

    def _traffic(self, key: str) -> Traffic:
        report = self._fleet.report(key)
        return Traffic(
            known=self._fleet.complete,
            silent=self._fleet.silent,
            acknowledged=self._fleet.acknowledged(key),
            workers={
                name: WorkerFacts(
                    slots=worker["slots"], busy=worker["busy"], draining=worker["draining"]
                )
                for name, worker in report.workers.items()
            },
            burst=report.burst,
            arrivals=report.arrivals,
            refused=report.refused,
            waiting=report.waiting,
            burst_error=report.burst_error,
            shut={
                rung.removeprefix(BURST): f"its breaker at the gateways is {state}"
                for rung, state in report.shut.items()
                if rung.startswith(BURST)
            },
        )

    def _burst_facts(
        self,
        obj: Json,
        agent: VoiceAgent,
        secrets: tuple[Mapping[str, str] | None, str],
        now: float,
    ) -> BurstFacts:
        """`secrets`: the account at Modal, and what is wrong with the Hub's token."""
        account, no_hub = secrets
        # Without the finalizer nobody looked after the app, and `release` may have stopped it.
        status = obj.get("status") or {} if FINALIZER in agent.finalizers else {}
        earlier = BurstFacts.of(status)
        # One that was deployed by an operator that died before it could write so.
        earlier = replace(earlier, app=earlier.app or self._custody.app(agent.uid))
        self._deployments.facts(agent.key, earlier)
        if self._fleet.complete:
            self._deployments.refused(agent.key, self._fleet.report(agent.key).burst_limited)
        facts = self._deployments.facts(agent.key, earlier)
        missing = ""
        if self._deployments.account(agent.key) is None and (
            kept := self._custody.account(agent.uid)
        ):
            self._deployments.remember(agent.key, kept)
        if agent.burst:
            missing = credentials_missing(agent.burst, account)
            if account and not missing:
                self._deployments.remember(agent.key, account_of(agent.burst, account))
            if not missing and allowed_burst(agent) is not None:
                missing = no_hub  # a container without its weights would only fail
        remembered = self._deployments.account(agent.key) is not None
        if agent.deleted_at is not None and remembered:
            # A Secret may go first, and what is remembered of it is enough to stop the app.
            missing = ""
        elif agent.burst is None and facts.app and not remembered:
            missing = f"{facts.app} runs at Modal and cannot be stopped: its credentials are gone"
        breaker = self._breaker(agent, facts, now)
        limit = current(facts.limit, now)
        return replace(facts, credentials=missing, breaker=breaker, limit=limit)

    def _money(self, obj: Json, agent: VoiceAgent, facts: BurstFacts, calls: int) -> BurstFacts:
        """The facts with what the app costs."""
        burst, prices = allowed_burst(agent), self._installation.prices
        if burst is None:
            return facts
        agreed = terms(agent, burst, prices, facts.standing)
        if agreed is None:
            limited = burst.budget != Budget()
            return replace(facts, unpriced=unpriced(burst, prices), capped=limited)
        if facts.working:  # each region's first session has a container
            calls = max(calls, agreed.slots * len(burst.regions))
        count = Count(containers=facts.running, until=facts.counted_at)
        status = obj.get("status") or {}
        self._treasury.agree(agent.key, agreed, recalled(status), count, calls)
        account = self._treasury.account(agent.key)
        return replace(
            facts,
            account=account,
            billed=self._billed(agent, account, status),
            terms=agreed,
            capped=self._treasury.shut(agent.key),
        )

    def _billed(self, agent: VoiceAgent, account: Account | None, status: Json) -> Billed | None:
        """What Modal bills, beside what was reckoned; the last that was told, while there is no other."""
        earlier = Billed.of((status.get("burst") or {}).get("billed") or {})
        place = self._deployments.account(agent.key)
        if place is None:
            return earlier
        asked = earlier.at if earlier else 0.0
        bill = self._bills.of(agent.key, agent.uid, place.credentials, asked)
        return compared(bill, account, earlier)

    def _breaker(self, agent: VoiceAgent, facts: BurstFacts, now: float) -> Breaker | None:
        """The one that is kept, or what the deployed app tells of an earlier operator's."""
        burst = allowed_burst(agent)
        if burst is None:
            return None
        asked = burst.snapshot
        known = facts.breaker
        if known is None:
            levels = {burst_hash(agent, self._installation, at): at for at in LEVELS}
            known = recovered(asked, levels.get(facts.hash, asked), now)
        known = probed(following(known, asked), now)
        slow = self._fleet.report(agent.key).burst_slow
        if late := self._deployments.slower(agent.key, slow):
            known = noted(known, 0, late, now)
        self._deployments.keep(agent.key, known)
        return known

    async def own_keys(self, seen: Seen) -> Keys:
        """The agent's keys, also where this look has made its Secret."""
        if seen.keys.worker and seen.keys.ticket:
            return seen.keys
        name = secret_name(seen.agent)
        own = await self._secret(seen.agent, name, OWN_SECONDS) or {}
        if not (own.get(WORKER_KEY) and own.get(TICKET_KEY)):
            raise ApiError(
                422,
                "Invalid",
                f"Secret {name} lacks {WORKER_KEY} or {TICKET_KEY}: delete it, then it is made anew",
            )
        return replace(seen.keys, worker=own[WORKER_KEY], ticket=own[TICKET_KEY])
