"""What is kept of every call: metrics, the totals that the operator is told, a log line for its placement,
and a record of its end. Never content, never a key.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from trunkline_runtime.gateway.access.answers import Denied
from trunkline_runtime.gateway.access.caller import Why
from trunkline_runtime.gateway.accounts import record
from trunkline_runtime.gateway.accounts.books import Keep
from trunkline_runtime.gateway.accounts.files import to_log
from trunkline_runtime.gateway.accounts.record import Party
from trunkline_runtime.gateway.call import Ending, Facts
from trunkline_runtime.gateway.ladder import Burst, Placement
from trunkline_runtime.gateway.routes import Route

log = logging.getLogger("trunkline.calls")

# From a warm slot on loopback (1 ms) to the longest answerSeconds that a caller waits for.
ADMISSION_BUCKETS: Final = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2,
    3,
    5,
    8,
    13,
)


@dataclass(slots=True)
class Tally:
    """One agent's counts since the gateway's start. The totals never fall."""

    calls: int = 0  # live
    burst: int = 0  # of them on burst, and sessions being started
    arrivals: int = 0
    refused: int = 0
    lost: int = 0
    burst_failures: int = 0
    burst_error: str = ""


class _Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.calls = Counter(
            "trunkline_calls",
            "Calls by how they were answered: answered, refused, left, unauthorized, forbidden, limited, "
            "invalid, unready",
            ["agent", "outcome"],
            registry=registry,
        )
        self.admission = Histogram(
            "trunkline_admission_seconds",
            "From the caller's request to its 101",
            ["agent", "rung"],
            buckets=ADMISSION_BUCKETS,
            registry=registry,
        )
        self.live = Gauge("trunkline_live_calls", "Calls now", ["agent"], registry=registry)
        self.lost = Counter(
            "trunkline_lost_calls",
            "Calls ended by their worker's death",
            ["agent"],
            registry=registry,
        )
        self.spills = Counter(
            "trunkline_burst_spills", "Calls placed on burst", ["agent"], registry=registry
        )
        self.burst_failures = Counter(
            "trunkline_burst_failures",
            "Burst sessions that could not be started or dialled",
            ["agent"],
            registry=registry,
        )
        self.unopened = Counter(
            "trunkline_refused_credentials",
            "Keys, tokens, secrets and tickets that opened nothing, by why",
            ["agent", "why"],
            registry=registry,
        )
        self.minted = Counter(
            "trunkline_minted",
            "Client secrets and tickets made",
            ["agent", "kind"],
            registry=registry,
        )
        self.keys_age = Gauge(
            "trunkline_issuer_keys_age_seconds",
            "Since the keys of an agent's issuer were read; absent until they are",
            ["agent"],
            registry=registry,
        )
        self.slow = Counter(
            "trunkline_slow_admissions",
            "Admissions slower than slo.admissionMs",
            ["agent"],
            registry=registry,
        )


class Ledger:
    """One gateway's books. `keep` takes each record, `now` is the time of day in Unix seconds."""

    def __init__(
        self,
        registry: CollectorRegistry,
        gateway: str = "",
        keep: Keep = to_log,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._metrics = _Metrics(registry)
        self._gateway = gateway
        self._keep = keep
        self._now = now
        self.tallies: dict[str, Tally] = {}

    def __repr__(self) -> str:
        return f"<Ledger {self.tallies}>"

    def tally(self, agent: str) -> Tally:
        return self.tallies.setdefault(agent, Tally())

    def denied(self, denied: Denied) -> None:
        """A caller got a plain answer before it asked for a slot."""
        self._metrics.calls.labels(denied.agent, denied.outcome).inc()

    def unopened(self, agent: str, why: Why) -> None:
        """What a caller showed opened nothing."""
        self._metrics.unopened.labels(agent, why.value).inc()

    def minted(self, agent: str, kind: str) -> None:
        """A client secret or a ticket was made."""
        self._metrics.minted.labels(agent, kind).inc()

    def keys_read(self, ages: Mapping[str, float]) -> None:
        """For each agent with an issuer, how old its keys are."""
        self._metrics.keys_age.clear()
        for agent, age in ages.items():
            self._metrics.keys_age.labels(agent).set(age)

    def arrived(self, agent: str) -> None:
        """An authenticated caller asks for a slot."""
        self.tally(agent).arrivals += 1

    def left(self, party: Party, ms: float) -> None:
        """The caller did not wait for its answer longer than so many milliseconds."""
        self._metrics.calls.labels(party.agent, "left").inc()
        self._keep(record.left(party, ms, self._gateway, self._now()))

    def refused(self, party: Party, placement: Placement) -> None:
        """No rung had a slot in time."""
        self.tally(party.agent).refused += 1
        self._metrics.calls.labels(party.agent, "refused").inc()
        self._keep(record.refused(party, placement, self._gateway, self._now()))

    def placed(self, call: str, route: Route, placement: Placement) -> None:
        """A worker has answered; the call begins."""
        agent, metrics = route.agent, self._metrics
        self.tally(agent).calls += 1
        metrics.live.labels(agent).inc()
        metrics.calls.labels(agent, "answered").inc()
        metrics.admission.labels(agent, placement.rung).observe(placement.ms / 1000)
        if isinstance(placement.result, Burst):
            metrics.spills.labels(agent).inc()
        if 0 < route.admission_ms < placement.ms:
            metrics.slow.labels(agent).inc()
        extra = {
            "call": call,
            "agent": agent,
            "rung": placement.rung,
            "worker": placement.worker,
            "admission_ms": round(placement.ms, 1),
            "answered_ms": round(placement.answered_ms, 1),
            "passed_over": record.passed_over(placement),
        }
        log.info("placed", extra=extra)

    def ended(self, facts: Facts, ending: Ending) -> None:
        """A call that was answered is over."""
        agent, tally = facts.agent, self.tally(facts.agent)
        tally.calls -= 1
        self._metrics.live.labels(agent).dec()
        if isinstance(facts.placement.result, Burst):
            tally.burst -= 1
        if ending.lost:
            tally.lost += 1
            self._metrics.lost.labels(agent).inc()
        self._keep(record.ended(facts, ending, self._gateway, self._now()))

    def burst_failed(self, agent: str, why: str) -> None:
        tally = self.tally(agent)
        tally.burst_failures += 1
        tally.burst_error = why
        self._metrics.burst_failures.labels(agent).inc()
