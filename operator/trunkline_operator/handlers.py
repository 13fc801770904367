"""kopf watches agents for the mirror; what is news makes its agent looked at. Pods and nodes are watched by `cluster.watch`.

Only `on.event`: kopf's other handlers are told what changed instead of what is, bring kopf's finalizer and
annotations, and lose events while a handler runs.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import kopf

from trunkline_operator.agenda import Agenda
from trunkline_operator.cluster.client import Cluster
from trunkline_operator.cluster.mirror import Mirror
from trunkline_runtime.contract import GROUP, PLURAL, VERSION

# A watch that a network device has cut in silence is noticed after this at the latest.
WATCH_SECONDS: Final = 300
# An operator that starts with 1,000 agents took 191 MB where all was listed in one piece.
LISTED_AT_ONCE: Final = 100


def registered(
    agenda: Agenda, mirror: Mirror, close: Callable[[], Awaitable[None]]
) -> kopf.OperatorRegistry:
    """What kopf is to call. `close` ends all that runs in its event loop, before kopf waits for it."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(retry: int, **_: Any) -> kopf.ConnectionInfo:
        if retry:
            await mirror.cluster.log_in_again()
        return await connection(mirror.cluster)

    @kopf.on.cleanup(registry=registry)
    async def cleanup(**_: Any) -> None:
        await close()

    # Every other event is of what a look has just written, and a handler costs more than to see that.
    def news(event: kopf.RawEvent, **_: Any) -> bool:
        return not mirror.knows(event["type"], event["object"])

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry, when=news)
    async def agent_changed(event: kopf.RawEvent, **_: Any) -> None:
        if agent := mirror.hear_agent(event["type"], event["object"]):
            agenda.add(agent)

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
    # What is there when a watch begins is listed, and kopf makes objects of all that it reads: 20 KB of an agent.
    settings.watching.chunk_size = LISTED_AT_ONCE
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.persistence.diffbase_storage = NoMemory()
    settings.persistence.progress_storage = NothingToProgress()
    # An agent's worker holds its last event, 20 KB, for so long.
    settings.queueing.idle_timeout = 0.2
    # Handlers only make notes, so nothing is worth waiting for at the end.
    settings.queueing.exit_timeout = 0.2
    settings.process.ultimate_exiting_timeout = 25  # below a pod's usual grace of 30
    return settings


class NoMemory(kopf.DiffBaseStorage):
    """kopf compares objects with what it remembers of them, for handlers of changes. Here are none, and the
    copy that it makes of each object for that was a sixth of an event's cost.
    """

    def build(self, **_: Any) -> kopf.BodyEssence:
        return cast(kopf.BodyEssence, {})

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        raise AssertionError("only handlers of changes store anything")


class NothingToProgress(kopf.ProgressStorage):
    """As `NoMemory`: handlers of events have no progress that outlives them."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        raise AssertionError("only handlers of changes store anything")

    def purge(self, **_: Any) -> None:
        return None

    def touch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


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
