"""What each tenant of an agent has had, as counters that cannot grow without bound.

A tenant may be the subject of a token, and there are as many of those as people. The first `MOST_TENANTS` of an
agent have a name of their own in the metrics for as long as the gateway runs; all others are counted together.
The ledger knows everybody.
"""

from typing import Final

from prometheus_client import CollectorRegistry, Counter

from trunkline_runtime.contract import CallRecord

MOST_TENANTS: Final = (
    50  # of an agent; 1,000 agents with so many are 300,000 series at the very worst
)
OTHERS: Final = "(others)"


class TenantCounters:
    """One gateway's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["agent", "tenant", "place"]
        self._seconds = Counter(
            "trunkline_tenant_call_seconds",
            "From the 101 to the end, of calls that are over; place is warm, burst or upstream",
            labels,
            registry=registry,
        )
        self._calls = Counter(
            "trunkline_tenant_calls", "Calls that are over", labels, registry=registry
        )
        self._dollars = Counter(
            "trunkline_tenant_cost_dollars",
            "What calls that are over have cost, of those whose cost is known",
            labels,
            registry=registry,
        )
        self._named: dict[str, set[str]] = {}

    def __repr__(self) -> str:
        return f"<TenantCounters { {agent: len(named) for agent, named in self._named.items()} }>"

    def ended(self, record: CallRecord) -> None:
        """A call that was answered is over."""
        agent, place = record["agent"], record["rung"].partition("/")[0]
        labels = (agent, self._name(agent, record["tenant"]), place)
        self._calls.labels(*labels).inc()
        self._seconds.labels(*labels).inc(record.get("seconds", 0.0))
        if cost := record.get("cost"):
            self._dollars.labels(*labels).inc(cost)

    def _name(self, agent: str, tenant: str) -> str:
        named = self._named.setdefault(agent, set())
        if tenant not in named and len(named) >= MOST_TENANTS:
            return OTHERS
        named.add(tenant)
        return tenant
