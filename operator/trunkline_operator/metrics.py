"""What the operator counts, and its port with /healthz, /readyz and /metrics."""

import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, Histogram
from prometheus_client import generate_latest as exposition
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from trunkline_operator.config import ConfigError
from trunkline_operator.scaling.spend import Account
from trunkline_runtime.contract import HEALTHZ_PATH, METRICS_PATH, READYZ_PATH


@dataclass(slots=True)
class Health:
    """What /readyz says when it is asked; an operator that stands by is ready, too."""

    ready: bool = False
    words: str = "starts"


LOOKS: Final = Histogram(
    "trunkline_operator_reconcile_seconds",
    "From reading an agent to having acted on it.",
    ["outcome"],  # done | gone | refused | failed
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
REQUESTS: Final = Counter(
    "trunkline_operator_api_requests",
    "Answers of the Kubernetes API.",
    ["verb", "resource", "status"],  # status 0: none came
)
DEPLOYMENTS: Final = Counter(
    "trunkline_operator_burst_deployments", "Work on Modal apps.", ["work", "outcome"]
)
ORPHANS: Final = Gauge(
    "trunkline_operator_burst_orphans",
    "Modal apps of deleted agents that could not be stopped yet.",
)
AGENTS: Final = Gauge("trunkline_operator_agents", "Agents that the operator looks after.")
LINKS: Final = Gauge("trunkline_operator_gateway_links", "Open links to gateways.")
LEADER: Final = Gauge("trunkline_operator_leader", "1 if this operator acts, 0 if it stands by.")
EPOCH: Final = Gauge("trunkline_operator_route_epoch", "The epoch of the routes.")

SPEND: Final = Gauge(
    "trunkline_operator_burst_spend_dollars",
    "What an agent's burst has cost this hour and today, in UTC.",
    ["namespace", "agent", "window"],
)
PAID: Final = Gauge(
    "trunkline_operator_burst_paid_dollars",
    "Since the operator's start: by calls for their slots, and idle for the rest of their containers.",
    ["namespace", "agent", "part"],
)
BILLED: Final = Gauge(
    "trunkline_operator_burst_billed_dollars",
    "The last whole day of UTC: what Modal bills for an agent's app, and what was reckoned for it.",
    ["namespace", "agent", "by"],  # modal | reckoned
)
POD_STATES: Final = ("ready", "starting", "draining")


class Pods(Collector):
    """Pods of each agent, by state. Each number as a child of a Gauge would take 3 KB an agent."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], tuple[int, ...]] = {}

    def count(self, namespace: str, agent: str, pods: Mapping[str, int]) -> None:
        self._counts[namespace, agent] = tuple(pods.get(state, 0) for state in POD_STATES)

    def forget(self, namespace: str, agent: str) -> None:
        self._counts.pop((namespace, agent), None)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        labels = ["namespace", "agent", "state"]
        found = GaugeMetricFamily("trunkline_operator_pods", "Pods of an agent.", labels=labels)
        for (namespace, agent), counts in sorted(self._counts.items()):
            for state, count in zip(POD_STATES, counts, strict=True):
                found.add_metric([namespace, agent, state], count)
        yield found


PODS: Final = Pods()
REGISTRY.register(PODS)


def tell_bill(namespace: str, agent: str, billed: float, reckoned: float) -> None:
    BILLED.labels(namespace, agent, "modal").set(billed)
    BILLED.labels(namespace, agent, "reckoned").set(reckoned)


def tell_spend(namespace: str, agent: str, account: Account | None) -> None:
    if account is not None:
        SPEND.labels(namespace, agent, "hour").set(account.hour)
        SPEND.labels(namespace, agent, "day").set(account.day)
        PAID.labels(namespace, agent, "calls").set(account.calls)
        PAID.labels(namespace, agent, "idle").set(account.idle)


def forget_spend(namespace: str, agent: str) -> None:
    parts = (SPEND, "hour"), (SPEND, "day"), (PAID, "calls"), (PAID, "idle")
    for gauge, part in (*parts, (BILLED, "modal"), (BILLED, "reckoned")):
        with contextlib.suppress(KeyError):
            gauge.remove(namespace, agent, part)


@contextlib.asynccontextmanager
async def serving_health(host: str, port: int, health: Health) -> AsyncIterator[int]:
    """Answers health checks and scrapes; yields the port (of use where 0 was asked for)."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(status=200 if health.ready else 503, text=f"{health.words}\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(
            body=exposition(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    app = web.Application()
    app.add_routes(
        [
            web.get(HEALTHZ_PATH, healthz),
            web.get(READYZ_PATH, readyz),
            web.get(METRICS_PATH, metrics),
        ]
    )
    # A scrape's idle connection must not keep the process from ending.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} for health checks: {error.strerror}; "
                "free the port or set --health-port"
            ) from error
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
