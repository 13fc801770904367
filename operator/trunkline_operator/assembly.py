"""All parts of the operator, put together and run until a signal."""

import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import socket
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import kopf

from trunkline_operator import metrics, parts
from trunkline_operator.agenda import RESYNC_SECONDS, Agenda
from trunkline_operator.burst.bills import Bills
from trunkline_operator.burst.deployments import Deployments
from trunkline_operator.burst.orphans import Sweeper
from trunkline_operator.burst.sdk import Sdk
from trunkline_operator.cluster.authority import Authority
from trunkline_operator.cluster.client import ApiError, Cluster
from trunkline_operator.cluster.custody import Custody
from trunkline_operator.cluster.endpoints import Endpoints, service_of
from trunkline_operator.cluster.herald import Herald
from trunkline_operator.cluster.leader import identity, leading
from trunkline_operator.cluster.lease import Candidate, epoch_after
from trunkline_operator.cluster.mirror import Mirror
from trunkline_operator.cluster.routes_secret import RoutesSecret
from trunkline_operator.cluster.tidings import Tidings
from trunkline_operator.config import ConfigError, OperatorConfig, parse_gateways
from trunkline_operator.decisions.manifests import Installation
from trunkline_operator.gateways.fleet import Fleet
from trunkline_operator.handlers import registered, watching
from trunkline_operator.reconcile import Reconciler, Settings
from trunkline_operator.scaling import prices
from trunkline_operator.scaling.prices import Prices
from trunkline_operator.treasury import Treasury
from trunkline_runtime.contract import GROUP, PLURAL, VERSION
from trunkline_runtime.tls import trusting

if TYPE_CHECKING:
    from trunkline_operator.burst.client import Burst

# Gateways keep their routes for so long while a new operator looks at all agents. One that cannot be
# looked at by then loses its route, unless the routes Secret has it.
FIRST_LOOKS_SECONDS: Final = 15.0


log = logging.getLogger("trunkline.operator")


async def operate(config: OperatorConfig) -> None:
    """Runs until a signal."""
    task = asyncio.current_task()
    assert task is not None
    # kopf takes the signal over when it begins to watch.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    # kopf names itself after the user, and a container's user often has no name.
    os.environ.setdefault("POD_ID", socket.gethostname())
    # All that acts is in `stack` and ends before the Lease, in `last`, is given back.
    async with contextlib.AsyncExitStack() as last, contextlib.AsyncExitStack() as stack:
        authority = Authority.read(config.ca_dir, datetime.now(UTC)) if config.ca_dir else None
        cluster = await stack.enter_async_context(await Cluster.connect())
        await require_agents(cluster)
        health = metrics.Health()
        await stack.enter_async_context(
            metrics.serving_health(config.host, config.health_port, health)
        )
        epoch = await leadership(config, cluster, last, health)
        health.ready, health.words = False, "agents are being looked at"
        # What was imported stays: a collection of garbage that also looked at it took 0.1 s, in which nothing moved.
        gc.collect()
        gc.freeze()
        agenda, mirror = await assembled(config, cluster, stack, epoch, authority)
        health.ready, health.words = True, "ready"
        await kopf.operator(
            registry=registered(agenda, mirror, stack.aclose),
            settings=watching(config.namespaces),
            namespaces=config.namespaces,
            clusterwide=not config.namespaces,
            standalone=True,
        )


async def nodes_seen(cluster: Cluster) -> bool:
    """Whether nodes may be watched; where nobody can tell, they are not."""
    try:
        allowed = await cluster.may("watch", "nodes")
    except ApiError as error:
        log.warning("it cannot be asked whether nodes may be watched: %s", error)
        return False
    if not allowed:
        log.info("nodes may not be watched: a cordon drains nothing (the chart's watchNodes)")
    return allowed


async def services_seen(
    names: Sequence[tuple[str, int]], cluster: Cluster
) -> dict[tuple[str, int], tuple[str, str]]:
    """By gateways' name, the Service that it is of, where its EndpointSlices may be watched."""
    services = {name: service for name in names if (service := service_of(name[0]))}
    for name, (namespace, _) in list(services.items()):
        try:
            allowed = await cluster.may(
                "watch", "endpointslices", group="discovery.k8s.io", namespace=namespace
            )
        except ApiError as error:
            log.warning("it cannot be asked whether EndpointSlices may be watched: %s", error)
            allowed = False
        if not allowed:
            log.warning(
                "EndpointSlices in %s may not be watched: gateways are found by DNS, late where it is cached",
                namespace,
            )
            del services[name]
    return services


async def leadership(
    config: OperatorConfig,
    cluster: Cluster,
    stack: contextlib.AsyncExitStack,
    health: metrics.Health,
) -> int:
    """Waits until this operator may act, and returns the epoch that comes with it."""
    if config.lease is None:
        metrics.LEADER.set(1)
        return epoch_after(0, time.time())

    def standby(holder: str) -> None:
        health.ready, health.words = True, f"standby: {holder} acts"

    candidate = Candidate(identity(os.environ), config.lease[1], random.random)
    lease_cluster = await stack.enter_async_context(await Cluster.connect())
    tenure = await stack.enter_async_context(
        leading(lease_cluster, config.lease, candidate, standby)
    )
    cluster.may_write = tenure.holds
    return tenure.epoch


async def assembled(
    config: OperatorConfig,
    cluster: Cluster,
    stack: contextlib.AsyncExitStack,
    epoch: int,
    authority: Authority | None,
) -> tuple[Agenda, Mirror]:
    """All parts, running, with every agent looked at once and the routes on their way."""

    def changed(agent: str) -> None:
        agenda.wake(agent)

    # Asked first: from the first link to a gateway until there is an agenda nothing may be waited for.
    nodes = await nodes_seen(cluster)
    names = parse_gateways(config.gateways)
    services = await services_seen(names, cluster)
    sdk, custody = Sdk(modal), Custody(cluster, config.burst_secret)
    await custody.open()
    deployments = Deployments(sdk, changed)
    stack.push_async_callback(deployments.close)
    kept = RoutesSecret(cluster, *config.routes_secret) if config.routes_secret else None
    earlier = await kept.earlier() if kept else None
    # Gateways refuse a lower epoch than they have, also from a machine whose clock is behind.
    epoch = max(epoch, earlier["epoch"] + 1 if earlier else 0)
    fleet = Fleet(
        names,
        config.operator_token,
        epoch=epoch,
        changed=changed,
        tls=trusting(authority.pem) if authority else None,
        told=services,
    )
    await stack.enter_async_context(fleet)
    herald = await stack.enter_async_context(Herald(cluster))
    treasury = await stack.enter_async_context(Treasury(fleet, changed))
    bills = await stack.enter_async_context(Bills(sdk, changed))
    mirror = Mirror(cluster, lambda agent: agenda.add(agent))
    tidings = Tidings(mirror, config.namespaces, nodes=nodes)
    reconciler = Reconciler(
        mirror,
        fleet,
        deployments,
        custody,
        treasury,
        bills,
        herald,
        settings(config, authority),
    )
    agenda = Agenda(reconciler.look)
    watches = (
        Endpoints(cluster, *service, partial(fleet.stands_for, name)).follow()
        for name, service in services.items()
    )
    await stack.enter_async_context(parts.running(*watches, name="the watch of gateways"))
    metrics.EPOCH.set(epoch)
    metrics.LINKS.set_function(lambda: fleet.connected)
    metrics.AGENTS.set_function(lambda: len(agenda))
    stack.push_async_callback(agenda.close)
    # A look replaces the route that it finds.
    known = {route["agent"]: route for route in earlier["routes"]} if earlier else {}
    for agent, route in known.items():
        fleet.set_route(agent, route)
    if kept:
        await stack.enter_async_context(kept.kept(fleet))
    await stack.enter_async_context(tidings.kept())
    agents = mirror.agents
    for agent in known.keys() - set(agents):
        fleet.forget(agent)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FIRST_LOOKS_SECONDS):
            await agenda.looked_at(agents)
    fleet.open()
    namespaces = config.namespaces

    async def living() -> dict[str, str]:
        await tidings.list()  # as it is now, for an app is stopped by this
        return mirror.uids

    sweeper = Sweeper(
        sdk, custody, living, lambda namespace: not namespaces or namespace in namespaces
    )
    await stack.enter_async_context(sweeper.sweeping())
    return agenda, mirror


def modal() -> "Burst":
    """The client of Modal, with its SDK, for an operator that has an agent with burst."""
    from trunkline_operator.burst.client import Burst

    return Burst()


def settings(config: OperatorConfig, authority: Authority | None) -> Settings:
    """What all looks share."""
    return Settings(
        installation=Installation(
            worker_image=config.worker_image,
            moshi_image=config.moshi_image,
            gateways=config.gateways,
            region=config.region,
            build=version("trunkline"),
            ca=authority.identity if authority else "",
            idle_seconds=config.evict_idle_seconds,
            prices=known_prices(config.prices),
        ),
        authority=authority,
        default_namespace=config.default_namespace,
        status_seconds=config.status_seconds,
        resync_seconds=RESYNC_SECONDS,
    )


def known_prices(own: str) -> Prices:
    """The prices that the operator decides by, or a ConfigError."""
    try:
        return prices.read(own)
    except prices.PricesError as error:
        raise ConfigError(f"--prices or TRUNKLINE_PRICES: {error}") from error


async def require_agents(cluster: Cluster) -> None:
    """Raises ConfigError if this cluster cannot be reached or knows no VoiceAgents."""
    try:
        found = await cluster.get(f"/apis/{GROUP}/{VERSION}")
    except ApiError as error:
        if error.status == 0:
            raise ConfigError(
                f"{error.message}. Start one with `trunkline dev`, or set KUBECONFIG"
            ) from error
        if error.status in (401, 403):
            raise ConfigError(
                f"the Kubernetes API at {cluster.server} refuses the operator: {error.message}"
            ) from error
        if error.status != 404:
            raise
        found = {"resources": []}
    if PLURAL not in {resource["name"] for resource in found["resources"]}:
        raise ConfigError(
            f"the cluster at {cluster.server} knows no VoiceAgents: install them with "
            "`kubectl apply -f crds/voiceagents.yaml`"
        )
