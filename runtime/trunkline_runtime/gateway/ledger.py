"""What is kept of every call: metrics, the totals that the operator is told, a log line for its placement,
and a record of its end. Never content, never a key.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from trunkline_runtime.gateway.access.answers import Away, Denied
from trunkline_runtime.gateway.access.caller import Why
from trunkline_runtime.gateway.accounts import record
from trunkline_runtime.gateway.accounts.books import Keep
from trunkline_runtime.gateway.accounts.files import to_log
from trunkline_runtime.gateway.accounts.record import Party, Told
from trunkline_runtime.gateway.accounts.tenants import TenantCounters
from trunkline_runtime.gateway.breaker import State
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
# Around 0.8 s, which feels quick on a telephone, and up to where callers hang up.
FIRST_AUDIO_BUCKETS: Final = (0.1, 0.2, 0.3, 0.5, 0.8, 1.1, 1.4, 2, 3, 5, 8, 13)


# From a container that is there to one that is booted with a model.
START_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 13, 20, 30, 60)


@dataclass(slots=True)
class Tally:
    """One agent's counts since the gateway's start. The totals never fall."""

    calls: int = 0  # live
    burst: int = 0  # of them on burst, and sessions being started
    arrivals: int = 0
    refused: int = 0
    lost: int = 0
    burst_failures: int = 0
    burst_slow: int = 0
    burst_limited: int = 0
    burst_error: str = ""
    shut: dict[str, State] = field(default_factory=dict)  # rungs that are not tried, or only probed


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
        self.first_audio = Histogram(
            "trunkline_first_audio_seconds",
            "From the worker's 101 to the first audio for the caller, of calls that are over, as the worker told",
            ["agent"],
            buckets=FIRST_AUDIO_BUCKETS,
            registry=registry,
        )
        self.gaps = Counter(
            "trunkline_audio_gaps",
            "Silences in the middle of replies for want of audio, as workers told",
            ["agent"],
            registry=registry,
        )
        self.waits = Histogram(
            "trunkline_wait_seconds",
            "In line for a slot, of calls that were answered after it",
            ["agent"],
            buckets=ADMISSION_BUCKETS[4:],
            registry=registry,
        )
        self.waiting = Gauge(
            "trunkline_waiting_callers",
            "Callers in line for a slot now",
            ["agent"],
            registry=registry,
        )
        self.operator_silence = Gauge(
            "trunkline_operator_silence_seconds",
            "Since an operator last spoke: calls go by routes that may be as old as that",
            registry=registry,
        )
        self.epoch = Gauge(
            "trunkline_routes_epoch",
            "Of the routes that calls go by; 0: there are none",
            registry=registry,
        )
        self.breakers = Counter(
            "trunkline_breaker_changes",
            "A rung that failed too often was left out (open), or works again (closed)",
            ["agent", "rung", "state"],
            registry=registry,
        )
        self.aside = Gauge(
            "trunkline_workers_aside",
            "Workers that get no call for a while, for they failed those before",
            ["agent"],
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
        self.burst_starts = Histogram(
            "trunkline_burst_start_seconds",
            "From asking Modal for a session to the 101 of its container, by how that was there: warm, "
            "restored, cold",
            ["agent", "start"],
            buckets=START_BUCKETS,
            registry=registry,
        )
        self.burst_slow = Counter(
            "trunkline_burst_slow_restores",
            "Containers that took longer to be restored than to be booted, waited for or not",
            ["agent"],
            registry=registry,
        )
        self.burst_failures = Counter(
            "trunkline_burst_failures",
            "Burst sessions that could not be started or dialled",
            ["agent"],
            registry=registry,
        )
        self.moved = Counter(
            "trunkline_moved_calls",
            "Calls whose worker was lost before its first word, and which another one took over",
            ["agent"],
            registry=registry,
        )
        self.unopened = Counter(
            "trunkline_refused_credentials",
            "Keys, tokens, secrets and tickets that opened nothing, by why",
            ["agent", "why"],
            registry=registry,
        )
        self.away = Counter(
            "trunkline_refused_connections",
            "Callers' connections that were ended before their first word, by why",
            ["why"],
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
        self.silent = Counter(
            "trunkline_slow_first_audio",
            "Calls whose first audio came later after the answer than slo.firstAudioMs",
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
        self._tenants = TenantCounters(registry)
        self._gateway = gateway
        self._keep = keep
        self._now = now
        self.tallies: dict[str, Tally] = {}
        self._waiting: set[str] = set()  # agents that the gauges have shown
        self._aside: set[str] = set()

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

    def turned_away(self, away: Away) -> None:
        """A connection was ended before its first word."""
        self._metrics.away.labels(away.value).inc()

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

    def left(self, party: Party, placement: Placement) -> None:
        """The caller did not wait for its answer; the placement says what was tried until then."""
        self._metrics.calls.labels(party.agent, "left").inc()
        self._keep(record.left(party, placement, self._gateway, self._now()))

    def refused(self, party: Party, placement: Placement) -> None:
        """No rung had a slot in time."""
        self.tally(party.agent).refused += 1
        self._metrics.calls.labels(party.agent, "refused").inc()
        self._keep(record.refused(party, placement, self._gateway, self._now()))

    def placed(self, route: Route, placement: Placement) -> None:
        """A worker has answered; the call begins. The log is told by `tell_placed`."""
        agent, metrics = route.agent, self._metrics
        self.tally(agent).calls += 1
        metrics.live.labels(agent).inc()
        metrics.calls.labels(agent, "answered").inc()
        metrics.admission.labels(agent, placement.rung).observe(placement.ms / 1000)
        if isinstance(placement.result, Burst):
            metrics.spills.labels(agent).inc()
        if waited := sum(step.ms for step in placement.steps if step.rung == "wait"):
            metrics.waits.labels(agent).observe(waited / 1000)
        if 0 < route.admission_ms < placement.ms:
            metrics.slow.labels(agent).inc()

    def tell_placed(self, call: str, agent: str, placement: Placement) -> None:
        """Tells the log of a call that begins."""
        extra = {
            "call": call,
            "agent": agent,
            "rung": placement.rung,
            "worker": placement.worker,
            "admission_ms": round(placement.ms, 1),
            "answered_ms": round(placement.answered_ms, 1),
            "burst_start": placement.start,
            "passed_over": record.passed_over(placement),
        }
        log.info("placed", extra=extra)

    def moved(self, facts: Facts, after: Placement) -> None:
        """Another worker has a call whose worker was lost before its first word; it was placed anew."""
        agent = facts.agent
        if isinstance(facts.placement.result, Burst):
            self.tally(agent).burst -= 1  # the new one has counted itself
        self._metrics.moved.labels(agent).inc()
        extra = {
            "call": facts.call,
            "agent": agent,
            "rung": after.rung,
            "worker": after.worker,
            "passed_over": record.passed_over(after),
        }
        log.info("placed again", extra=extra)

    def ended(self, facts: Facts, ending: Ending) -> float:
        """A call that was answered is over; returns the time of day. Its record follows by `told`."""
        agent, tally = facts.agent, self.tally(facts.agent)
        tally.calls -= 1
        self._metrics.live.labels(agent).dec()
        if isinstance(facts.placement.result, Burst):
            tally.burst -= 1
        if ending.lost:
            tally.lost += 1
            self._metrics.lost.labels(agent).inc()
        return self._now()

    def told(self, facts: Facts, ending: Ending, at: float, account: Told) -> None:
        """The record of a call that was over at `at`, with its worker's account."""
        line = record.ended(facts, ending, self._gateway, at, account)
        if 0 < facts.first_audio_ms < (account.first_audio_ms or 0):
            self._metrics.silent.labels(facts.agent).inc()
        self._tenants.ended(line)
        if account.first_audio_ms is not None:
            self._metrics.first_audio.labels(facts.agent).observe(account.first_audio_ms / 1000)
        if account.gaps:
            self._metrics.gaps.labels(facts.agent).inc(account.gaps)
        self._keep(line)

    def keep_rungs(self, rungs: Collection[tuple[str, str]]) -> None:
        """Forgets which others are shut."""
        for agent, tally in self.tallies.items():
            tally.shut = {
                rung: state for rung, state in tally.shut.items() if (agent, rung) in rungs
            }

    def breaker(self, agent: str, rung: str, state: State) -> None:
        """A rung's breaker has opened or closed."""
        shut = self.tally(agent).shut
        if state is State.CLOSED:
            shut.pop(rung, None)
        else:
            shut[rung] = state
        self._metrics.breakers.labels(agent, rung, state.value).inc()
        level = logging.INFO if state is State.CLOSED else logging.WARNING
        extra = {"agent": agent, "rung": rung, "state": state.value}
        log.log(level, "a rung's breaker has changed", extra=extra)

    def operator_is(self, silent: float, epoch: int) -> None:
        """For how long it has not spoken, and of which epoch the routes are that calls go by meanwhile."""
        self._metrics.operator_silence.set(silent)
        self._metrics.epoch.set(epoch)

    def lines_are(self, waiting: Mapping[str, int], aside: Mapping[str, int]) -> None:
        """How many callers stand in line and how many workers are set aside, of agents that have any."""
        for gauge, counts, shown in (
            (self._metrics.waiting, waiting, self._waiting),
            (self._metrics.aside, aside, self._aside),
        ):
            for agent in shown - counts.keys():
                gauge.labels(agent).set(0)
            for agent, count in counts.items():
                gauge.labels(agent).set(count)
            shown |= counts.keys()

    def burst_started(self, agent: str, start: str, seconds: float) -> None:
        """A container answered; `start` is how it was there, "" where it does not say."""
        self._metrics.burst_starts.labels(agent, start or "unknown").observe(seconds)

    def burst_slow(self, agent: str) -> None:
        """A container took too long to be restored."""
        self.tally(agent).burst_slow += 1
        self._metrics.burst_slow.labels(agent).inc()

    def burst_failed(self, agent: str, why: str, *, limited: bool = False) -> None:
        """No session was had; `limited`: the workspace may have no more."""
        tally = self.tally(agent)
        tally.burst_failures += 1
        tally.burst_limited += limited
        tally.burst_error = why
        self._metrics.burst_failures.labels(agent).inc()
