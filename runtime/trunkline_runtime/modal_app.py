"""The Modal app of an agent: a second host of the same worker, for the calls past warm capacity.

The operator builds and deploys it; inside the container this module is imported again and one of its two
classes is run. So it imports nothing but `modal` at the top: the operator's image has no engine, and the
container's has no operator.
"""

import asyncio
import hashlib
import importlib.metadata
import logging
import os
import re
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import modal

from trunkline_runtime.contract import (
    ENV_AGENT,
    ENV_ENGINE,
    ENV_HUB_TOKEN,
    ENV_MAX_SECONDS,
    ENV_SLOTS,
    ENV_TICKET_KEY,
    ENV_WORKER,
    WORKER_PORT,
)

if TYPE_CHECKING:
    from trunkline_runtime.engine import Engine
    from trunkline_runtime.worker.host import WorkerConfig

log = logging.getLogger("trunkline.burst")

SERVER: Final = "worker"  # the servers' names in the app begin so
DISTRIBUTION: Final = "trunkline"
MAX_GRACE_SECONDS: Final = 3600  # Modal's limit for exit_grace_period
MAX_TAG: Final = 63  # characters of a tag's key or value
EXIT_SECONDS: Final = (
    25.0  # of the 30 that Modal gives exit hooks; calls have had their grace before
)
BROKEN_STATUS: Final = 1  # of a container's process whose worker has ended by itself
# The extra that brings an engine's packages; the loopback engine needs none.
EXTRAS: Final[Mapping[str, str]] = {"loopback": "", "speech": "speech", "moshi": "moshi"}


class HostedWorker:
    """A worker in a Modal container: the engine in this process, its event loop in a thread of its own."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._loaded_by = ""  # the container; after a restore it is another
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread: threading.Thread | None = None

    def load(self) -> None:
        """What a snapshot may hold: the weights."""
        from trunkline_runtime.process import configure_logging
        from trunkline_runtime.worker.host import make_engine

        configure_logging("worker")
        self._engine = make_engine(_configuration())
        self._engine.load()
        self._loaded_by = os.environ["MODAL_TASK_ID"]

    def resume(self) -> None:
        """What each container makes for itself; returns when calls can come in. Raises what stops that."""
        import gc
        import random

        assert self._engine, "load comes first"
        random.seed()  # a snapshot holds the state of the container that made it
        self._engine.resume()
        # A full collection over what the engine loaded would stop every call for 10 ms or more.
        gc.collect()
        gc.freeze()
        listening: Future[None] = Future()
        work = _configuration(), self._engine, listening
        self._thread = threading.Thread(target=self._serve, args=work, name="worker", daemon=True)
        self._thread.start()
        listening.result()

    def _serve(self, config: "WorkerConfig", engine: "Engine", listening: "Future[None]") -> None:
        import uvloop

        from trunkline_runtime.worker.host import WorkerHost

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            start = "cold" if config.worker == self._loaded_by else "restored"
            host = WorkerHost(config, engine, start=start)
            await host.run(self._stop, lambda: listening.set_result(None))

        try:
            uvloop.run(serve())
        except BaseException as error:
            if not listening.done():
                listening.set_exception(error)
                return
            log.critical("the worker has ended, and its container with it", exc_info=error)
            logging.shutdown()
            # Its calls have been told. Modal replaces a container whose process is gone; one that lives on
            # without a worker would be given calls until its health check fails, or for ever.
            os._exit(BROKEN_STATUS)

    def drain(self) -> None:
        """Takes no new call and waits for those there, as long as Modal lets it."""
        if self._loop and self._thread and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(EXIT_SECONDS)
        if self._engine:
            self._engine.close()


def _configuration() -> "WorkerConfig":
    """The worker of this container; after a restore its name is another than at the snapshot."""
    from trunkline_runtime.worker.host import WorkerConfig

    return WorkerConfig.from_environment({ENV_WORKER: os.environ["MODAL_TASK_ID"], **os.environ})


# mypy sees `modal` as untyped, hence its decorators as well: reading its types takes half a minute.
class BurstWorker:
    """The server where a memory snapshot is wanted: taken between `load` and `resume`."""

    @modal.enter(snap=True)  # type: ignore[untyped-decorator]  # see above
    def load(self) -> None:
        self._worker = HostedWorker()
        self._worker.load()

    @modal.enter(snap=False)  # type: ignore[untyped-decorator]  # see above
    def resume(self) -> None:
        self._worker.resume()

    @modal.exit()  # type: ignore[untyped-decorator]  # see above
    def drain(self) -> None:
        self._worker.drain()


class PlainBurstWorker:
    """The server without a snapshot. Modal refuses `snap=True` there, so it is a class of its own."""

    @modal.enter()  # type: ignore[untyped-decorator]  # see above
    def start(self) -> None:
        self._worker = HostedWorker()
        self._worker.load()
        self._worker.resume()

    @modal.exit()  # type: ignore[untyped-decorator]  # see above
    def drain(self) -> None:
        self._worker.drain()


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstApp:
    """All that a deployment depends on: equal values make equal apps."""

    name: str  # of the app, at most 64 of A-Z a-z 0-9 - . _
    agent: str  # namespace/name
    engine: Mapping[str, str]  # environment: ENV_ENGINE, and what that engine must know
    ticket_key: str = field(
        repr=False
    )  # checks gateways' tickets; reaches the container as a Secret
    hub_token: str = field(default="", repr=False)  # for the weights; likewise. "" = none
    environment: str = ""  # Modal's; "" is the workspace's default
    tags: Mapping[str, str] = field(default_factory=dict)  # any text: cut to what Modal takes
    image: str = ""  # registry reference; "" builds one from this installation
    registry: tuple[str, str] = field(default=("", ""), repr=False)  # name and password; "" = none
    gpu: tuple[str, ...] = ()  # the first that is there
    # Where requests are routed through, a server each. Containers that stand by are the first one's.
    regions: tuple[str, ...] = ("us-east",)
    # Where containers of a region's server must run, as Modal names places; a region that is missing is free.
    pinned: Mapping[str, str] = field(default_factory=dict)
    slots: int = 4  # sessions per container
    min_containers: int = 0
    buffer_containers: int = 0
    max_containers: int = 10  # of each server
    scaledown_window: int = 60  # seconds, 2…3600
    startup_timeout: int = 600  # seconds; Modal's default of 30 is short for a model
    max_seconds: int = 1800  # the longest call, and so the grace of a container that is to go
    snapshot: Literal["none", "cpu", "gpu"] = "cpu"


def build_app(options: BurstApp) -> modal.App:
    """The app, not yet deployed. Raises `modal.exception.InvalidError` for options that Modal refuses.

    Modal keeps every App for the life of the process: build one only when there is something to deploy.
    """
    snapshot = options.snapshot != "none"
    app = modal.App(
        options.name,
        image=_image(options),
        tags={_tag(key): _tag(value) for key, value in options.tags.items()},
        include_source=False,
    )
    for region in options.regions:
        _server(app, options, region)(
            modal.sessioned()(BurstWorker if snapshot else PlainBurstWorker)
        )
    return app


def server_name(region: str) -> str:
    """What the server of a region is called in its app."""
    return f"{SERVER}-{region}"


def _server(app: modal.App, options: BurstApp, region: str) -> Any:
    """The decorator that makes a class the server of a region."""
    first = region == options.regions[0]
    return app.server(
        name=server_name(region),
        env={
            ENV_AGENT: options.agent,
            **options.engine,
            ENV_SLOTS: str(options.slots),
            ENV_MAX_SECONDS: str(options.max_seconds),
        },
        secrets=[modal.Secret.from_dict(_secrets(options))],
        gpu=list(options.gpu) or None,
        port=WORKER_PORT,
        max_concurrency=options.slots,
        target_concurrency=options.slots,  # without it nothing scales
        min_containers=options.min_containers if first else 0,
        buffer_containers=options.buffer_containers if first else 0,
        max_containers=options.max_containers,
        scaledown_window=options.scaledown_window,
        startup_timeout=options.startup_timeout,
        exit_grace_period=min(options.max_seconds, MAX_GRACE_SECONDS),
        routing_region=region,
        compute_region=options.pinned.get(region),
        enable_memory_snapshot=options.snapshot != "none",
        experimental_options={"enable_gpu_snapshot": True} if options.snapshot == "gpu" else None,
    )


def _secrets(options: BurstApp) -> dict[str, str]:
    known = {ENV_TICKET_KEY: options.ticket_key}
    return known | ({ENV_HUB_TOKEN: options.hub_token} if options.hub_token else {})


def _image(options: BurstApp) -> Any:
    if options.image:
        name, password = options.registry
        login = {"REGISTRY_USERNAME": name, "REGISTRY_PASSWORD": password}
        secret = modal.Secret.from_dict(login) if name and password else None
        return modal.Image.from_registry(options.image, secret=secret)
    return (
        modal.Image.debian_slim(python_version=f"{sys.version_info.major}.{sys.version_info.minor}")
        .pip_install(*requirements(EXTRAS[options.engine[ENV_ENGINE]]))
        .add_local_python_source("trunkline_runtime")
    )


def requirements(extra: str) -> list[str]:
    """What this distribution needs, with one of its extras, in the versions installed here.

    A package that is not installed here keeps the range that the distribution names.
    """
    wanted = []
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement, _, marker = line.partition(";")
        of_extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", marker)
        if of_extra and of_extra[1] != extra:
            continue
        name = re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]
        try:
            wanted.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            wanted.append(requirement.strip())
    return sorted(wanted)


def _tag(text: str) -> str:
    """The text as Modal takes it in a tag; what had to change ends in a hash, and so stays distinct."""
    tag = re.sub(r"[^A-Za-z0-9._-]", "-", text)
    if tag == text and len(tag) <= MAX_TAG:
        return tag
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{tag[: MAX_TAG - len(mark) - 1]}-{mark}"
