"""A whole Trunkline on one machine: API server, node, local Modal, gateways and operator, each a real process.

Everything listens on a random /22 of 127.0.0.0/8 (Linux binds any of its addresses), so that machines
run side by side and no port is ever in use; only the first gateway's callers' port may be put elsewhere.
"""

import asyncio
import contextlib
import json
import os
import random
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import httpx
import yaml

from trunkline_dev import binaries
from trunkline_dev.authority import Authority
from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, is_true
from trunkline_dev.processes import Process, base_environment, descendants
from trunkline_dev.slot_log import SlotRecord, read_slot_log
from trunkline_runtime import contract
from trunkline_runtime.process import listening

WORKER_IMAGE: Final = "trunkline/worker:dev"
NODE: Final = "dev"
AGENTS_PATH: Final = f"/apis/{contract.GROUP}/{contract.VERSION}"
CRDS_PATH: Final = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
START_SECONDS: Final = 60.0  # for each process; a hundred times the usual, for a busy machine

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineConfig:
    """What a machine is made of."""

    gateways: int = 1
    gpus: int = 8
    cold_seconds: float = 8.0  # the shortest first boot of a container in the local Modal
    restore_seconds: float = 2.0  # the shortest boot from a snapshot
    pull_seconds: float = 0.0  # what a pod's image takes to reach the node
    host: str | None = None  # where the first gateway answers callers; None: an address of its own
    port: int = contract.CALLS_PORT
    status_seconds: float = 1.0  # how often the operator writes live numbers
    controllers: tuple[str, ...] = ()
    tls: bool = False  # as in a cluster; on loopback nobody listens between the links
    proxy_token: str = field(
        default_factory=lambda: f"wk-{secrets.token_hex(8)}:ws-{secrets.token_hex(16)}"
    )


def source(name: str) -> Path:
    """A folder of the project's: in a checkout at its root, in an installation beside this module."""
    here = Path(__file__)
    for folder in (here.parents[2] / name, here.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{name}/ is neither in the checkout nor in the installed package")


class Machine:
    """Entered, it is up; left, nothing of it is left behind but `root`, if that was given."""

    def __init__(
        self,
        config: MachineConfig | None = None,
        *,
        root: Path | None = None,
        say: Say = lambda _: None,
    ) -> None:
        self.config, self.say = config or MachineConfig(), say
        self._given_root = root
        self._stack = contextlib.AsyncExitStack()
        first = random.randrange(64, 127)
        second = random.randrange(0, 64) * 4
        self._net = f"127.{first}.{second}"
        self._pods = f"127.{first}.{second + 1}.0/24"
        self._containers = f"127.{first}.{second + 2}.0/24"
        self._token = secrets.token_urlsafe(24)
        self.gateways: list[Process] = []
        self.processes: list[Process] = []

    # --- up and down

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            self._root(stack)
            await self._up(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _root(self, stack: contextlib.AsyncExitStack) -> None:
        if self._given_root is None:
            self.root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trunkline-")))
        else:
            self.root = self._given_root
        self.logs = self.root / "logs"
        shutil.rmtree(self.logs, ignore_errors=True)  # of an earlier machine with the same root
        for folder in (self.logs, self.logs / "pods", self.logs / "containers"):
            folder.mkdir(parents=True, exist_ok=True)

    async def _up(self, stack: contextlib.AsyncExitStack) -> None:
        if self.config.host is not None:
            self._require_free(self.config.host, self.config.port)
        self.say("control plane")
        self.plane = stack.enter_context(
            ControlPlane(controllers=self.config.controllers, say=self.say)
        )
        self.kubeconfig = self.plane.kubeconfig
        self.api = await stack.enter_async_context(Api(self.kubeconfig))
        stack.push_async_callback(self._stop_all)
        self.say("resource definition, node, local Modal")
        await self._apply_crd()
        self.node = self._node()
        self.modal = self._modal()
        ready = json.loads(await self.modal.first_line(START_SECONDS))
        self.modal_url, self.modal_local_url = ready["server_url"], ready["local_url"]
        self.say("gateway, operator")
        if self.config.tls:
            self.replace_ca()
        for number in range(self.config.gateways):
            self.start_gateway(number)
        self.operator = self.start_operator()
        await self._node_ready()
        for number, gateway in enumerate(self.gateways):
            await gateway.ready(self._health(self.gateway_address(number)), START_SECONDS)
        await self.operator.ready(self.operator_health, START_SECONDS)

    async def _stop_all(self) -> None:
        # The operator first, so that it does not mend what is being taken away; then all at once.
        for process in self.processes:
            if process.name == "operator":
                await process.stop()
        await asyncio.gather(*(process.stop() for process in self.processes))

    @staticmethod
    def _require_free(host: str, port: int) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with listening(host, port, "callers", "--port"):
                probe.bind((host, port))

    def _run(self, name: str, *command: str, **env: str) -> Process:
        process = Process(
            name,
            [sys.executable, "-m", *command],
            self.logs / f"{name}.log",
            base_environment() | env,
        )
        process.start()
        self.processes.append(process)
        return process

    # --- the parts

    async def _apply_crd(self) -> None:
        body = yaml.safe_load((source("crds") / "voiceagents.yaml").read_text())
        path = f"{CRDS_PATH}/{body['metadata']['name']}"
        await self.api.apply(path, body)
        await self.api.wait_for_one(path, lambda crd: is_true(crd, "Established"), START_SECONDS)

    def _node(self) -> Process:
        worker = f"{sys.executable} -m trunkline_runtime worker"
        return self._run(
            "node",
            "trunkline_dev.node",
            f"--kubeconfig={self.kubeconfig}",
            f"--name={NODE}",
            f"--capacity=cpu=32,memory=64Gi,pods=110,nvidia.com/gpu={self.config.gpus}",
            f"--addresses={self._pods}",
            f"--logs={self.logs / 'pods'}",
            f"--pull-seconds={self.config.pull_seconds}",
            f"--image={WORKER_IMAGE}={worker}",
        )

    async def _node_ready(self) -> None:
        await self.api.wait_for_one(
            f"/api/v1/nodes/{NODE}", lambda node: is_true(node, "Ready"), START_SECONDS
        )

    def _modal(self) -> Process:
        return self._run(
            "modal",
            "trunkline_dev.modal",
            f"--host={self._net}.250",
            f"--addresses={self._containers}",
            f"--cold-seconds={self.config.cold_seconds}",
            f"--restore-seconds={self.config.restore_seconds}",
            f"--proxy-token={self.config.proxy_token}",
            f"--logs={self.logs / 'containers'}",
        )

    def gateway_address(self, number: int) -> str:
        return f"{self._net}.{number + 1}"

    def gateway_url(self, number: int = 0) -> str:
        """Where callers connect: http://host:port, without a path."""
        if number == 0 and self.config.host is not None:
            return f"http://{self.config.host}:{self.config.port}"
        return f"http://{self.gateway_address(number)}:{contract.CALLS_PORT}"

    def replace_ca(self) -> None:
        """A new CA, and certificates of it for the gateways. What runs already has the old one."""
        shutil.rmtree(self.ca, ignore_errors=True)
        self.ca.mkdir()
        authority = Authority(self.ca)
        authority.keep()
        for number in range(self.config.gateways):
            folder = self.control_tls(number)
            folder.mkdir(exist_ok=True)
            authority.issue(folder.name, "CN=gateway", names=[self.gateway_address(number)])
            for kind in ("crt", "key"):
                shutil.copy(self.ca / f"{folder.name}.{kind}", folder / f"tls.{kind}")

    @property
    def ca(self) -> Path:
        """The folder that the operator has as --ca-dir."""
        return self.root / "ca"

    def control_tls(self, number: int) -> Path:
        """The folder that a gateway has as --control-tls."""
        return self.root / f"gateway-{number}-tls"

    def start_gateway(self, number: int) -> Process:
        address = self.gateway_address(number)
        callers = self.gateway_url(number).removeprefix("http://").partition(":")
        process = self._run(
            f"gateway-{number}",
            "trunkline_runtime",
            "gateway",
            f"--host={callers[0]}",
            f"--port={callers[2]}",
            f"--control-host={address}",
            f"--health-host={address}",
            f"--name=gateway-{number}",
            *([f"--control-tls={self.control_tls(number)}"] if self.config.tls else []),
            **{contract.ENV_OPERATOR_TOKEN: self._token},
        )
        self.gateways[number : number + 1] = [process]
        return process

    def start_operator(self) -> Process:
        gateways = ",".join(
            f"{self.gateway_address(number)}:{contract.CONTROL_PORT}"
            for number in range(self.config.gateways)
        )
        return self._run(
            "operator",
            "trunkline_operator",
            f"--gateways={gateways}",
            f"--worker-image={WORKER_IMAGE}",
            f"--host={self._net}.200",
            f"--status-seconds={self.config.status_seconds}",
            *([f"--ca-dir={self.ca}"] if self.config.tls else []),
            KUBECONFIG=str(self.kubeconfig),
            MODAL_SERVER_URL=self.modal_url,
            **{contract.ENV_OPERATOR_TOKEN: self._token},
        )

    @property
    def operator_health(self) -> str:
        """The URL that answers 200 when the operator is ready."""
        return self._health(f"{self._net}.200")

    @staticmethod
    def _health(address: str) -> str:
        return f"http://{address}:{contract.HEALTH_PORT}{contract.READYZ_PATH}"

    # --- what its users ask

    async def apply(self, manifest: dict[str, Any], namespace: str = "default") -> None:
        """Server-side apply of a VoiceAgent or Secret, as `kubectl apply --server-side` would."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        group, plural = {"Secret": ("/api/v1", "secrets")}.get(kind, (AGENTS_PATH, contract.PLURAL))
        path = f"{group}/namespaces/{namespace}/{plural}/{name}"
        await self.api.apply(path, manifest)

    async def modal_credentials(self, namespace: str = "default", name: str = "modal") -> None:
        """Makes the Secret that agents with burst refer to."""
        key, _, secret = self.config.proxy_token.partition(":")
        data = {"token-id": "ak-dev", "token-secret": "as-dev"}
        data |= {"proxy-token-id": key, "proxy-token-secret": secret}
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name},
            "stringData": data,
        }
        await self.apply(body, namespace)

    async def local_modal(self, what: str) -> Any:
        """`containers` or `apps`, as the local Modal lists them."""
        async with httpx.AsyncClient(trust_env=False, timeout=10.0) as client:
            answer = await client.get(f"{self.modal_local_url}/_local/{what}")
            return answer.raise_for_status().json()

    async def live_containers(self) -> list[dict[str, Any]]:
        return [c for c in await self.local_modal("containers") if c["end_t"] is None]

    async def kubectl(self, *args: str) -> str:
        """The output of kubectl, or a note that it is not installed (the machine does not need it)."""
        program = shutil.which("kubectl")
        if program is None:
            return "(kubectl is not installed)"
        child = await asyncio.create_subprocess_exec(
            program,
            *args,
            env=os.environ | {"KUBECONFIG": str(self.kubeconfig)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        return (await child.communicate())[0].decode()

    def slot_log(self) -> list[SlotRecord]:
        """What every worker wrote about its slots, pods and containers, in order of time."""
        warm = read_slot_log(self.logs / "pods", "warm")
        burst = read_slot_log(self.logs / "containers", "burst")
        return sorted(warm + burst, key=lambda record: record.t)

    def child_processes(self) -> set[int]:
        """Living processes of pods and containers, whatever their hosts believe."""
        return descendants(self.node.pid) | descendants(self.modal.pid)


def prepare(say: Say) -> None:
    """Makes sure that the control plane's programs are there; may take minutes, once."""
    binaries.prepare(say=say)
