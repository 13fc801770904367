"""kopf watches agents and their pods; whatever happens to one makes its agent looked at.

Only `on.event`: kopf's other handlers are told what changed instead of what is, bring kopf's finalizer and
annotations, and lose events while a handler runs.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import kopf

from trunkline_operator.agenda import Agenda
from trunkline_operator.cluster.client import Cluster
from trunkline_runtime.contract import GROUP, LABEL_AGENT, PLURAL, VERSION

# A watch that a network device has cut in silence is noticed after this at the latest.
WATCH_SECONDS: Final = 300


def registered(
    agenda: Agenda, cluster: Cluster, close: Callable[[], Awaitable[None]]
) -> kopf.OperatorRegistry:
    """What kopf is to call. `close` ends all that runs in its event loop, before kopf waits for it."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(retry: int, **_: Any) -> kopf.ConnectionInfo:
        if retry:
            await cluster.log_in_again()
        return await connection(cluster)

    @kopf.on.cleanup(registry=registry)
    async def cleanup(**_: Any) -> None:
        await close()

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def agent_changed(
        namespace: str | None, name: str | None, body: kopf.Body, **_: Any
    ) -> None:
        if not cluster.is_echo(body):  # what a look has written needs no other look
            agenda.add(f"{namespace}/{name}")

    @kopf.on.event("v1", "pods", labels={LABEL_AGENT: kopf.PRESENT}, registry=registry)
    async def pod_changed(namespace: str | None, labels: kopf.Labels, **_: Any) -> None:
        agenda.wake(f"{namespace}/{labels[LABEL_AGENT]}")

    return registry


def watching(namespaces: tuple[str, ...]) -> kopf.OperatorSettings:
    """How kopf is to watch."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    # Needs rights on CRDs and namespaces, which an operator of a few namespaces may not have.
    settings.scanning.disabled = bool(namespaces)
    settings.watching.server_timeout = WATCH_SECONDS
    settings.watching.client_timeout = WATCH_SECONDS + 30
    settings.watching.connect_timeout = 10
    settings.watching.label_selectors["v1", "pods"] = LABEL_AGENT
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    # Handlers only make notes, so nothing is worth waiting for at the end.
    settings.queueing.exit_timeout = 0.2
    settings.process.ultimate_exiting_timeout = 25  # below a pod's usual grace of 30
    return settings


async def connection(cluster: Cluster) -> kopf.ConnectionInfo:
    """The cluster's address and credentials, as kopf takes them."""
    configuration = cluster.configuration
    scheme, _, token = (await cluster.authorization() or "").partition(" ")
    return kopf.ConnectionInfo(
        server=cluster.server,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        proxy_url=configuration.proxy,
        scheme=scheme if token else None,
        token=token or None,
    )
