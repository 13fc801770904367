"""The operator as a process, in a namespace of its own: the test is its gateway and its node's kubelet."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from fake_gateway import TOKEN, FakeGateway, agent_load, worker_load
from helm_python import Chart
from ports import free_port

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, ApiError, condition, is_true
from trunkline_dev.processes import Process, base_environment
from trunkline_runtime.contract import (
    ENV_OPERATOR_TOKEN,
    FINALIZER,
    GROUP,
    LABEL_AGENT,
    PLURAL,
    VERSION,
)

Json = dict[str, Any]

ROOT = Path(__file__).parents[1]
CRD = yaml.safe_load((ROOT / "crds/voiceagents.yaml").read_text())
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
NAME = "front-desk"
SPEC: Json = {
    "engine": {"type": "loopback"},
    "warm": {"maxPods": 2, "gpu": {"count": 0}, "scaleDown": {"delaySeconds": 0}},
    "access": {"public": True},
}
NO_ACCOUNT: Json = {"modal": {"credentialsSecretRef": {"name": "nobody"}, "gpu": []}}
"""A burst for which nothing is deployed. Its agent has the finalizer: somebody may yet make that Secret."""


class World:
    """One namespace with an operator; the test is its gateway, and its node's kubelet."""

    def __init__(self, api: Api, plane: ControlPlane, namespace: str, logs: Path) -> None:
        self.api, self.namespace, self.logs = api, namespace, logs
        self.gateway = FakeGateway()
        self.spec = SPEC  # of its agent, if no other is given
        self.kept = (
            False  # whether its agent is applied with the finalizer, as one that has had burst
        )
        self.health = f"http://127.0.0.1:{free_port()}"
        self.env = base_environment() | {
            "KUBECONFIG": str(plane.kubeconfig),
            ENV_OPERATOR_TOKEN: TOKEN,
        }
        self.processes: list[Process] = []
        self.flags: tuple[str, ...] = ()  # of every operator here
        self.key = f"{namespace}/{NAME}"
        self.agents = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}"
        self.agent_path = f"{self.agents}/{NAME}"
        self.pods = f"/api/v1/namespaces/{namespace}/pods"
        self.secrets = f"/api/v1/namespaces/{namespace}/secrets"

    # --- the operator

    async def start(
        self,
        *flags: str,
        everywhere: bool = False,
        env: Mapping[str, str] | None = None,
        name: str = "operator",
        health: str = "",
    ) -> Process:
        """Starts an operator and waits until it is ready; a second one needs a name and a `health` URL."""
        health = health or self.health
        process = Process(
            name,
            [
                *(sys.executable, "-m", "trunkline_operator"),
                *self.arguments(*flags, everywhere=everywhere, health=health),
            ],
            self.logs / f"{name}.log",
            self.env | dict(env or {}),
        )
        process.start()
        self.processes.append(process)
        await process.ready(f"{health}/readyz", 60)
        return process

    def arguments(self, *flags: str, everywhere: bool = False, health: str = "") -> list[str]:
        """Of an operator of this namespace, or of all."""
        return [
            *([] if everywhere else [f"--namespace={self.namespace}"]),
            f"--gateways=127.0.0.1:{self.gateway.port}",
            "--worker-image=trunkline/worker:test",
            "--host=127.0.0.1",
            f"--health-port={(health or self.health).rpartition(':')[2]}",
            "--status-seconds=0",
            *self.flags,
            *flags,
        ]

    async def stop(self) -> None:
        for process in self.processes:
            await process.stop()

    @property
    def log(self) -> list[Json]:
        lines = (self.logs / "operator.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def steps(self) -> list[str]:
        """What the operator did, in order."""
        head = f"{self.key}: "
        told = [line["message"] for line in self.log if line["logger"] == "trunkline.reconcile"]
        return [message.removeprefix(head) for message in told if message.startswith(head)]

    async def kubeconfig_of(self, account: str, folder: Path) -> Path:
        """A kubeconfig with no other rights than that ServiceAccount's."""
        where = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{account}/token"
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        answer = await self.api.create(where, asked)
        config = yaml.safe_load(Path(self.env["KUBECONFIG"]).read_text())
        config["users"][0]["user"] = {"token": answer["status"]["token"]}
        file = folder / f"kubeconfig-of-{account}"
        file.write_text(yaml.safe_dump(config))
        return file

    @contextlib.asynccontextmanager
    async def charted(self, values: Json, *templates: str) -> AsyncIterator[None]:
        """What these templates of the chart make is there, but for what would run."""
        files = Chart.load(str(ROOT / "charts/trunkline")).render(
            values, name="trunkline", namespace=self.namespace
        )
        made = [
            body
            for name, text in files.items()
            if name.endswith(templates)
            for body in yaml.safe_load_all(text)
            if body and body["kind"] not in ("Deployment", "Job")
        ]
        for body in made:
            await self.api.apply(rights_path(body, self.namespace), body)
        try:
            yield
        finally:
            for body in made:
                await self.api.delete(rights_path(body, self.namespace))

    # --- its users

    async def apply(self, spec: Json | None = None) -> None:
        body = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "VoiceAgent",
            "metadata": {"name": NAME} | ({"finalizers": [FINALIZER]} if self.kept else {}),
            "spec": spec or self.spec,
        }
        await self.api.apply(self.agent_path, body)

    async def secret(self, name: str, **entries: str) -> None:
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name},
            "stringData": entries,
        }
        await self.api.apply(f"{self.secrets}/{name}", body)

    async def agent(self, holds: Callable[[Json], bool], timeout: float = 30) -> Json:
        return await self.api.wait_for_one(self.agent_path, holds, timeout)

    async def condition(self, kind: str, reason: str, timeout: float = 30) -> Json:
        found = await self.agent(lambda it: condition(it, kind).get("reason") == reason, timeout)
        return condition(found, kind)

    # --- its node

    async def pod_count(self, count: int) -> list[Json]:
        return await self.api.wait_for(
            self.pods, lambda pods: len(pods) == count, labelSelector=f"{LABEL_AGENT}={NAME}"
        )

    async def make_ready(self, name: str) -> None:
        state = {"name": "worker", "image": "i", "imageID": "", "restartCount": 0, "ready": True}
        status = {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [
                {**state, "started": True, "state": {"running": {}}},
            ],
        }
        await self.api.patch(f"{self.pods}/{name}/status", {"status": status})

    async def serve_calls(self, *busy: int, draining: tuple[int, ...] = (), **more: Any) -> None:
        """So many calls on pods 0, 1, …: what a gateway would say."""
        workers = {
            f"{NAME}-{n}": worker_load(busy=calls, draining=n in draining)
            for n, calls in enumerate(busy)
        }
        await self.gateway.say(self.key, agent_load(workers, **more))

    async def one_ready_pod(self) -> None:
        await self.apply()
        await self.pod_count(1)
        await self.make_ready(f"{NAME}-0")
        await self.serve_calls(0)
        await self.agent(lambda it: is_true(it, "Ready"))


def stranger_of(agent: str, **metadata: Any) -> Json:
    """A pod with the agent's label that is not the agent's."""
    return {
        "metadata": {"name": f"{agent}-stranger", "labels": {LABEL_AGENT: agent}, **metadata},
        "spec": {"containers": [{"name": "c", "image": "i"}]},
    }


def rights_path(body: Json, namespace: str) -> str:
    """Of a ServiceAccount, or an object of RBAC."""
    kind, name = body["kind"], body["metadata"]["name"]
    where = body["metadata"].get("namespace", namespace)
    if kind == "ServiceAccount":
        return f"/api/v1/namespaces/{where}/serviceaccounts/{name}"
    group = "/apis/rbac.authorization.k8s.io/v1"
    home = "" if kind.startswith("Cluster") else f"/namespaces/{where}"
    return f"{group}{home}/{kind.lower()}s/{name}"


async def agents_served(api: Api, namespace: str) -> None:
    """The API server knows VoiceAgents."""
    where = f"{CRDS}/{CRD['metadata']['name']}"
    await api.apply(where, CRD)
    await api.wait_for_one(where, lambda crd: is_true(crd, "Established"))
    async with asyncio.timeout(30):
        while True:  # a kind is served a moment after it is established, and nothing tells when
            with contextlib.suppress(ApiError):
                await api.list(f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}")
                break
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def operated(
    api: Api, plane: ControlPlane, namespace: str, logs: Path
) -> AsyncIterator[World]:
    """A namespace whose gateway listens; at its end the operators and agents are gone."""
    world = World(api, plane, namespace, logs)
    await agents_served(api, namespace)
    async with world.gateway.serving():
        try:
            yield world
        finally:
            await world.stop()
            for agent in await api.list(world.agents):
                where = f"{world.agents}/{agent['metadata']['name']}"
                await api.patch(where, {"metadata": {"finalizers": None}})
                await api.delete(where)
