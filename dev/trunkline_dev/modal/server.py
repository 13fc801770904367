"""The local Modal as a whole: the API for the SDK, an edge per server, and pages that show what is going on."""

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trunkline_dev.modal.containers import Addresses, Machine
from trunkline_dev.modal.control import Control, Tokens, authorizer
from trunkline_dev.modal.edge import Edge
from trunkline_dev.modal.http import Listener, Request, Response, page, text
from trunkline_dev.modal.process import Launch
from trunkline_dev.modal.rpc import service
from trunkline_dev.modal.state import AppRecord, Boot, Config, ServerRecord, State
from trunkline_runtime.process import listening


class LocalModal:
    """`async with LocalModal(Config()) as modal`: set MODAL_SERVER_URL to `modal.server_url`.

    When it is left, every process that it started is dead and every file that it wrote, but for logs that
    were asked for, is gone.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.state = State(config.proxy_tokens)
        self.machine = Machine(
            config=config,
            state=self.state,
            addresses=Addresses(config.addresses),
            capacity=config.capacity,
        )
        self.server_url = self.local_url = ""
        self._tokens = Tokens()
        self._edges: dict[tuple[str, str, str], Edge] = {}  # by environment, app and server
        self._by_function: dict[str, Edge] = {}
        self._local = Listener(self._page)
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
        control = Control(self.state, self, self._tokens, self.local_url)
        self._api = service(control, "sdk", authorizer(config.api_tokens))
        with listening(config.host, config.port, "the API", "--port"):
            await self._api.start(config.host, config.port)
        # grpclib keeps its listening server to itself, and with port 0 it alone knows the port.
        port = self._api._server.sockets[0].getsockname()[1]
        self.server_url = f"http://{config.host}:{port}"

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._api.close()
        await self._api.wait_closed()
        await self._local.close()
        for edge in self._edges.values():
            await edge.close()
        shutil.rmtree(self._folder)

    # --- what Control asks for ----------------------------------------------------------------------

    async def url(self, app: AppRecord, name: str) -> str:
        key = app.environment, app.name, name
        if key not in self._edges:
            self._edges[key] = Edge(self.machine, self._tokens)
            await self._edges[key].start(self.config.host)
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

    async def _page(self, request: Request) -> Response:
        match request.method, request.path:
            case "GET", "/_local/containers":
                return page([asdict(boot) for boot in self.boots])
            case "GET", "/_local/apps":
                return page([self._describe(app) for app in self.state.apps.values()])
            case "GET", "/_local/processes":
                return page(self.pids)
        return text(404, "there are /_local/containers, /_local/apps and /_local/processes")

    def _describe(self, app: AppRecord) -> dict[str, Any]:
        return {
            "app_id": app.app_id,
            "name": app.name,
            "environment": app.environment,
            "state": "deployed" if app.deployed else "stopped",
            "version": app.version,
            "tags": app.tags,
            "servers": [
                self._describe_server(function_id) for function_id in app.functions.values()
            ],
        }

    def _describe_server(self, function_id: str) -> dict[str, Any]:
        record, edge = self.state.servers[function_id], self._by_function[function_id]
        return {
            "name": record.name,
            "url": record.url,
            "definition_id": record.definition_id,
            "containers": sum(len(pool.containers) for pool in edge.pools),
            "sessions": sum(pool.sessions for pool in edge.pools),
            "waiting": len(edge.pool.waiting) if edge.pool else 0,
        }
