"""The local Modal as a whole: the API for the SDK, an edge per server, and pages that show what is going on."""

import asyncio
import contextlib
import importlib.metadata
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trunkline_dev.modal.billing import Billing
from trunkline_dev.modal.containers import Addresses, Machine
from trunkline_dev.modal.control import Control, Tokens
from trunkline_dev.modal.edge import Edge
from trunkline_dev.modal.faults import Fault, Plan, Rule
from trunkline_dev.modal.gate import Gate, refuse_version
from trunkline_dev.modal.http import Listener
from trunkline_dev.modal.inspection import Inspection
from trunkline_dev.modal.pages import MAX_BODY, Pages
from trunkline_dev.modal.process import Launch
from trunkline_dev.modal.rpc import Witness, nobody, service
from trunkline_dev.modal.state import AppRecord, Boot, Config, ServerRecord, State, now
from trunkline_runtime.process import listening


class LocalModal:
    """`async with LocalModal(Config()) as modal`: set MODAL_SERVER_URL to `modal.server_url`.

    When it is left, every process that it started is dead and every file that it wrote, but for logs that
    were asked for, is gone.
    """

    def __init__(self, config: Config) -> None:
        """Raises WrongModal where another version of the SDK is installed."""
        refuse_version(importlib.metadata.version("modal"))
        self.config = config
        self.state = State(config.proxy_tokens, config.environments)
        self.machine = Machine(
            config=config,
            state=self.state,
            addresses=Addresses(config.addresses),
        )
        self.server_url = self.local_url = ""
        self.before: Witness = nobody
        """Awaited before a call of the SDK has an effect; a test may set it at any time."""
        self.after: Witness = nobody
        """Awaited once it has had its effect, before the answer."""
        self._tokens = Tokens()
        self._edges: dict[tuple[str, str, str], Edge] = {}  # by environment, app and server
        self._by_function: dict[str, Edge] = {}
        self._local = Listener(Pages(self.state, self, self.set_faults).answer, MAX_BODY)
        control = Control(self.state, self, self._tokens, lambda: self.local_url)
        self._api = service(
            [control, Inspection(self.state, self._stop_container), Billing(self.state)],
            "sdk",
            self.state.sdk_calls,
            Gate(config.api_tokens, self.state.faults).admit,
            (lambda name: self.before(name), lambda name: self.after(name)),
        )
        self._faults_changed, self._applying = asyncio.Event(), asyncio.Lock()
        self._follower: asyncio.Task[None] | None = None
        self._folder = Path()

    async def __aenter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="modal-"))
        try:
            await self._listen()
        except BaseException:
            await self._local.close()
            shutil.rmtree(self._folder)
            raise
        return self

    async def _listen(self) -> None:
        config = self.config
        with listening(config.host, config.local_port, "pages", "--local-port"):
            self.local_url = await self._local.start(config.host, config.local_port)
        with listening(config.host, config.port, "the API", "--port"):
            port = await self._api.start(config.host, config.port)
        self.server_url = f"http://{config.host}:{port}"
        await self.set_faults(config.faults)
        self._follower = asyncio.create_task(self._follow_faults())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._follower:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        await self._api.close()
        await self._local.close()
        for edge in self._edges.values():
            await edge.close()
        shutil.rmtree(self._folder)

    # --- faults -------------------------------------------------------------------------------------

    async def inject(self, *rules: Rule, seed: int = 0) -> None:
        """From now on these faults and no others; without rules, none."""
        await self.set_faults(Plan(seed=seed, rules=rules))

    async def set_faults(self, plan: Plan) -> None:
        """From now on this plan, with its counts and windows begun anew; returns when it has effect."""
        self.state.faults.replace(plan, now())
        await self._apply_faults()
        self._faults_changed.set()

    async def _follow_faults(self) -> None:
        """Does what the states among the faults ask for, whenever one begins or ends."""
        while True:
            self._faults_changed.clear()
            await self._apply_faults()
            change = self.state.faults.next_change(now())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if change is None else change - now()):
                    await self._faults_changed.wait()

    async def _apply_faults(self) -> None:
        async with self._applying:
            if self.state.faults.holds(Fault.CONTROL_PLANE_DOWN, "", now()):
                await self._api.refuse()
            else:
                await self._api.accept()
            for edge in list(self._edges.values()):
                await edge.follow_faults()

    # --- what Control asks for ----------------------------------------------------------------------

    async def url(self, app: AppRecord, record: ServerRecord) -> str:
        key = app.environment, app.name, record.name
        if key not in self._edges:
            self._edges[key] = Edge(self.machine, self._tokens)
            await self._edges[key].start(self.config.host)
        self._edges[key].region = next(iter(record.definition.http_config.proxy_regions), "")
        self._faults_changed.set()
        return self._edges[key].url

    def deploy(self, app: AppRecord, record: ServerRecord) -> None:
        edge = self._edges[app.environment, app.name, record.name]
        self._by_function[record.function_id] = edge
        edge.deploy(record, app.name, self._launch(app, record))

    def stop(self, function_id: str) -> None:
        if edge := self._by_function.get(function_id):
            edge.stop()

    def settings_changed(self, function_id: str) -> None:
        edge = self._by_function.get(function_id)
        if edge and edge.pool:
            edge.pool.wake()

    def ready_containers(self, function_id: str) -> list[tuple[str, str, int]]:
        edge = self._by_function.get(function_id)
        if edge is None or edge.pool is None:
            return []
        return [
            (container.boot.container, container.process.address, container.port)
            for container in edge.pool.containers.values()
            if container.ready
        ]

    def _stop_container(self, name: str) -> None:
        for edge in self._edges.values():
            for pool in edge.pools:
                if name in pool.containers:
                    pool.stop(name)

    def _launch(self, app: AppRecord, record: ServerRecord) -> Launch:
        root = self._folder / record.definition_id
        (root / "root").mkdir(parents=True, exist_ok=True)
        for mount_id in record.definition.mount_ids:
            for file in self.state.mounts[mount_id]:
                path = root / file.filename.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.state.files[file.sha256_hex])
        secrets: dict[str, str] = {}
        for secret_id in record.definition.secret_ids:
            secrets |= self.state.secrets[secret_id]
        logs = self.config.logs or self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return Launch(
            python=self.config.python,
            function_id=record.function_id,
            app_id=app.app_id,
            environment=app.environment,
            definition=record.definition,
            layout=self.state.layout(app),
            secrets=secrets,
            tally=self.state.container_calls,
            root=root,
            scratch=self._folder,
            logs=logs.absolute(),
        )

    # --- what people and tests ask for --------------------------------------------------------------

    @property
    def boots(self) -> list[Boot]:
        """Every container ever started, oldest first."""
        return list(self.state.boots)

    @property
    def pids(self) -> list[int]:
        """Every process that lives, those kept for restores included."""
        pools = [pool for edge in self._edges.values() for pool in edge.pools]
        pids = [process.pid for pool in pools for process in pool.processes]
        return [pid for pid in pids if pid is not None]

    def describe_server(self, function_id: str) -> dict[str, Any]:
        record, edge = self.state.servers[function_id], self._by_function[function_id]
        return {
            "name": record.name,
            "url": record.url,
            "definition_id": record.definition_id,
            "containers": sum(len(pool.containers) for pool in edge.pools),
            "sessions": sum(pool.sessions for pool in edge.pools),
            "waiting": len(edge.pool.waiting) if edge.pool else 0,
        }
