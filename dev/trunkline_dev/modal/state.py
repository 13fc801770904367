"""What the local Modal knows: its settings, the apps deployed to it, and every container it ever started."""

import hashlib
import ipaddress
import secrets
import string
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

from modal_proto import api_pb2

from trunkline_dev.modal.faults import Plan, Schedule
from trunkline_dev.modal.rpc import Message, Tally

ALPHABET: Final = string.ascii_letters + string.digits
MAX_BOOTS: Final = 10_000  # remembered starts; a demo makes tens
MAX_HISTORY: Final = 100  # remembered versions of an app


def some_network() -> ipaddress.IPv4Network:
    """A loopback network that another local Modal on this machine hardly uses: one of 16,384."""
    return ipaddress.IPv4Network(
        (f"127.{64 + secrets.randbelow(64)}.{secrets.randbelow(256)}.0", 24)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the local Modal behaves. Ports of 0 are chosen by the system."""

    host: str = "127.0.0.1"
    port: int = 0  # of the API that the SDK speaks
    local_port: int = 0  # of the pages under /_local
    addresses: ipaddress.IPv4Network = field(default_factory=some_network)
    """Where containers listen, an address each, all on the server's own port."""
    cold_seconds: float = 0.0  # a first boot takes at least so long
    restore_seconds: float = 0.0  # a boot from a snapshot takes at least so long
    clones: int = 3  # processes kept at the snapshot point, about 50 MB each
    queue_seconds: float = 60.0  # that the start of a session waits for capacity, then 503
    logs: Path | None = None  # a file per container; None: with the temporary files
    proxy_tokens: Mapping[str, str] = field(default_factory=dict)  # wk-… → ws-…
    api_tokens: Mapping[str, str] | None = None  # ak-… → as-…; None takes any
    environments: frozenset[str] | None = None  # that there are, beside main; None: any
    capacity: int | None = None  # containers of all servers together, like a plan's limit
    gpus: Mapping[str, int] | None = None  # of each type, all servers together; None: no limit
    faults: Plan = field(default_factory=Plan)  # what goes wrong from the start
    python: str = sys.executable


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What one container takes of a budget. A container without a GPU has type ""."""

    type: str = ""
    count: int = 0

    @classmethod
    def of(cls, definition: Message) -> Self:
        config = definition.resources.gpu_config
        return cls(type=config.gpu_type, count=(config.count or 1) if config.gpu_type else 0)


class Kind(StrEnum):
    """How a container came up."""

    COLD = "cold"
    RESTORED = "restored"


@dataclass(slots=True, kw_only=True)
class Boot:
    """One container, from its start to its end. Times are seconds since the epoch."""

    app: str
    app_id: str
    function_id: str
    server: str
    container: str
    kind: Kind
    t: float
    gpu: str = ""
    ready_t: float | None = None
    end_t: float | None = None
    exit: int | None = None
    error: str = ""

    @property
    def failed(self) -> bool:
        """It ended otherwise than it was told to."""
        return self.end_t is not None and (bool(self.error) or self.exit not in (0, None))


@dataclass(slots=True, kw_only=True)
class ServerRecord:
    """One server of an app, as the SDK described it."""

    function_id: str
    app_id: str
    name: str
    url: str = ""
    gpus: tuple[Gpu, ...] = (Gpu(),)  # the first that is there is taken
    definition: Message = None
    definition_id: str = ""
    overrides: Message = field(default_factory=api_pb2.AutoscalerSettings)

    def settings(self) -> Message:
        """The autoscaler's settings: the deployed ones, overridden by those set since."""
        settings = api_pb2.AutoscalerSettings(scaledown_window=60)
        settings.MergeFrom(self.definition.autoscaler_settings)
        settings.MergeFrom(self.overrides)
        return settings

    def metadata(self) -> Message:
        metadata = api_pb2.FunctionHandleMetadata(
            function_name=self.name, app_id=self.app_id, definition_id=self.definition_id
        )
        if self.url:
            metadata._experimental_flash_urls.append(self.url)
        if self.definition is not None:
            metadata.function_type = self.definition.function_type
        return metadata

    def data(self) -> Message:
        definition = self.definition
        data = api_pb2.FunctionData(
            function_name=self.name,
            is_server=definition.is_server,
            is_sessioned=definition.is_sessioned,
            autoscaler_settings=self.settings(),
            http_config=definition.http_config,
        )
        data.ranked_functions.add(rank=0).function.CopyFrom(definition)
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One version of an app. The time is seconds since the epoch."""

    version: int
    t: float
    tag: str
    client_version: str


@dataclass(slots=True, kw_only=True)
class AppRecord:
    app_id: str
    name: str
    environment: str
    state: api_pb2.AppState.ValueType = api_pb2.APP_STATE_INITIALIZING
    tags: dict[str, str] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)  # name → id
    version: int = 0
    fingerprint: str = ""
    created_at: float = field(default_factory=lambda: now())
    deployed_at: float = 0.0
    stopped_at: float = 0.0
    history: deque[Deployment] = field(default_factory=lambda: deque(maxlen=MAX_HISTORY))

    def lifecycle(self) -> Message:
        return api_pb2.AppLifecycle(
            app_state=self.state,
            created_at=self.created_at,
            deployed_at=self.deployed_at,
            stopped_at=self.stopped_at,
            version=self.version,
        )

    @property
    def deployed(self) -> bool:
        return self.state == api_pb2.APP_STATE_DEPLOYED


class State:
    """All of it in memory. Only `Control` changes the apps; pools add boots, the pages set faults."""

    def __init__(
        self, proxy_tokens: Mapping[str, str], environments: frozenset[str] | None = None
    ) -> None:
        self.environments = environments and environments | {"main"}
        self.apps: dict[str, AppRecord] = {}
        self.servers: dict[str, ServerRecord] = {}
        self.files: dict[str, bytes] = {}  # by SHA-256
        self.mounts: dict[str, list[Message]] = {}
        self.secrets: dict[str, dict[str, str]] = {}
        self.names: dict[tuple[str, ...], str] = {}  # of content-addressed and named objects
        self.proxy_tokens = dict(proxy_tokens)
        self.boots: deque[Boot] = deque(maxlen=MAX_BOOTS)
        self.faults = Schedule()
        self.sdk_calls, self.container_calls = Tally(), Tally()

    def named(self, prefix: str, *key: str) -> str:
        """The id of the object with this key, made on first use: the same content has the same id."""
        return self.names.setdefault((prefix, *key), new_id(prefix))

    def app_named(self, environment: str, name: str) -> AppRecord | None:
        """The deployed app of that name."""
        for app in self.apps.values():
            if app.deployed and (app.environment, app.name) == (environment, name):
                return app
        return None

    def stopped_app(self, environment: str, name: str) -> AppRecord | None:
        """The app of that name which was stopped last."""
        stopped = [
            app
            for app in self.apps.values()
            if app.stopped_at and (app.environment, app.name) == (environment, name)
        ]
        return max(stopped, key=lambda app: app.stopped_at, default=None)

    def layout(self, app: AppRecord) -> Message:
        """What the app consists of; a container finds there what its module names: images, secrets."""
        objects = {}
        for function_id in app.functions.values():
            server = self.servers[function_id]
            for needed in server.definition.object_dependencies if server.definition else ():
                objects[needed.object_id] = api_pb2.Object(object_id=needed.object_id)
            objects[function_id] = api_pb2.Object(
                object_id=function_id, function_handle_metadata=server.metadata()
            )
        return api_pb2.AppLayout(objects=objects.values(), function_ids=app.functions)


def new_id(prefix: str) -> str:
    """An id as Modal forms them: a prefix and 22 letters or digits."""
    return prefix + "-" + "".join(secrets.choice(ALPHABET) for _ in range(22))


def digest(*messages: Any) -> str:
    """The same for equal messages."""
    sha256 = hashlib.sha256()
    for message in messages:
        sha256.update(message.SerializeToString(deterministic=True))
    return sha256.hexdigest()


def now() -> float:
    """The clock of every record."""
    return time.time()
