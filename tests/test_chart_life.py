"""A release from install to uninstall, by the real Helm on a real API server of its own.

No kubelet runs here, so the uninstall's Job is switched off, but where a test ends it by hand.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from chart_rig import CHART, SWITCHES
from helm_python import Chart, Config, HelmError

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api, ApiError
from trunkline_operator.cluster.routes_secret import routes_secret
from trunkline_runtime.contract import Routes

Values = dict[str, Any]
NO_JOB: Final[Values] = {"uninstall": {"stopModalApps": False}}
# Their kinds are not Kubernetes' own, and this API server knows none of them.
FOREIGN: Final = {"cert-manager", "gateway API", "monitored", "own TLS"}
CRDS: Final = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
CRD: Final = f"{CRDS}/voiceagents.trunkline.dev"


@pytest.fixture(scope="module")
def control_plane() -> Iterator[ControlPlane]:
    """Not the one that other tests share: definition and ClusterRoles belong to a whole cluster."""
    with ControlPlane() as plane:
        yield plane


class Helm:
    """Releases in one namespace."""

    def __init__(self, plane: ControlPlane, api: Api, namespace: str) -> None:
        self.api = api
        self.namespace = namespace
        self.config = Config(namespace=namespace, kubeconfig_path=str(plane.kubeconfig))
        self.chart = Chart.load(str(CHART))
        self.installed: list[str] = []

    def install(self, values: Values, name: str = "trunkline") -> None:
        self.config.install(self.chart, name, NO_JOB | values)
        self.installed.append(name)

    def upgrade(self, values: Values) -> None:
        self.config.upgrade(self.chart, "trunkline", NO_JOB | values)

    def uninstall(self) -> None:
        while self.installed:
            self.config.uninstall(self.installed.pop())

    async def get(self, group: str, plural: str, name: str) -> dict[str, Any]:
        return await self.api.get(f"{group}/namespaces/{self.namespace}/{plural}/trunkline-{name}")

    async def kept(self) -> list[Any]:
        """What processes have read at their start, and so must not change under them."""
        secrets = [await self.get("/api/v1", "secrets", it) for it in ("link", "ca", "gateway-tls")]
        gateway = await self.get("/apis/apps/v1", "deployments", "gateway")
        return [*(it["data"] for it in secrets), gateway["spec"]["template"]["metadata"]]

    async def end_job(self, how: str, other_than: str = "") -> None:
        """As a Job's controller does when its pod has ended."""
        job = f"/apis/batch/v1/namespaces/{self.namespace}/jobs/trunkline-release"
        await self.api.wait_for_one(job, lambda it: it["metadata"]["uid"] != other_than)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        ends: dict[str, tuple[str, Values]] = {
            "Complete": ("SuccessCriteriaMet", {"succeeded": 1, "completionTime": now}),
            "Failed": ("FailureTarget", {"failed": 1}),
        }
        before, counted = ends[how]
        conditions = [{"type": it, "status": "True"} for it in (before, how)]
        status = counted | {"startTime": now, "conditions": conditions}
        await self.api.patch(f"{job}/status", {"status": status})

    async def left(self) -> list[str]:
        """What stands in the namespace."""
        namespaced = f"namespaces/{self.namespace}"
        paths = [
            f"/api/v1/{namespaced}/secrets",
            f"/api/v1/{namespaced}/services",
            f"/api/v1/{namespaced}/serviceaccounts",
            f"/apis/apps/v1/{namespaced}/deployments",
            f"/apis/rbac.authorization.k8s.io/v1/{namespaced}/roles",
            f"/apis/rbac.authorization.k8s.io/v1/{namespaced}/rolebindings",
            f"/apis/networking.k8s.io/v1/{namespaced}/networkpolicies",
            f"/apis/policy/v1/{namespaced}/poddisruptionbudgets",
        ]
        return [
            it["metadata"]["name"] for path in paths for it in (await self.api.get(path))["items"]
        ]


@pytest.fixture
async def helm(control_plane: ControlPlane, api: Api, namespace: str) -> AsyncIterator[Helm]:
    """Ends with nothing left in the cluster, the definition included."""
    helm = Helm(control_plane, api, namespace)
    yield helm
    helm.uninstall()
    try:
        await api.delete(CRD)
        await api.wait_gone(CRD)
    except ApiError as error:
        assert error.status == 404  # noqa: PT017  # most tests install none


async def test_install_upgrade_rollback_uninstall(helm: Helm) -> None:
    helm.install({})
    kept = await helm.kept()
    # As the operator does.
    routes = f"/api/v1/namespaces/{helm.namespace}/secrets/trunkline-routes"
    document = Routes(type="routes", version=1, epoch=1, routes=[])
    filled = routes_secret("trunkline-routes", document)
    await helm.api.apply(routes, filled, "trunkline-operator")

    helm.upgrade({"gateway": {"replicas": 3}})
    gateway = await helm.get("/apis/apps/v1", "deployments", "gateway")
    assert gateway["spec"]["replicas"] == 3
    assert await helm.kept() == kept
    assert (await helm.api.get(routes))["data"] == filled["data"]

    helm.config.rollback("trunkline")
    gateway = await helm.get("/apis/apps/v1", "deployments", "gateway")
    assert gateway["spec"]["replicas"] == 2
    assert await helm.kept() == kept
    assert (await helm.api.get(routes))["data"] == filled["data"]

    helm.uninstall()
    assert await helm.left() == []
    crd = await helm.api.get(CRD)
    assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    # The definition is this release's own, so it may come back.
    helm.install({})


async def test_agents_survive_the_release(helm: Helm) -> None:
    helm.install({})
    await helm.api.wait_for_one(CRD, established)
    agents = f"/apis/trunkline.dev/v1alpha1/namespaces/{helm.namespace}/voiceagents"
    spec = {"engine": {"type": "loopback"}, "access": {"public": True}}
    body = {"apiVersion": "trunkline.dev/v1alpha1", "kind": "VoiceAgent", "spec": spec}
    await helm.api.create(agents, body | {"metadata": {"name": "echo"}})
    helm.uninstall()
    assert (await helm.api.get(f"{agents}/echo"))["spec"]["engine"]["type"] == "loopback"


def established(crd: dict[str, Any]) -> bool:
    conditions = crd.get("status", {}).get("conditions", [])
    return any(it["type"] == "Established" and it["status"] == "True" for it in conditions)


@pytest.mark.parametrize("gone", ["ca", "gateway-tls"])
async def test_certificates_are_made_anew_when_their_secrets_are_gone(
    helm: Helm, gone: str
) -> None:
    helm.install({})
    link, ca, tls, _ = await helm.kept()
    await helm.api.delete(f"/api/v1/namespaces/{helm.namespace}/secrets/trunkline-{gone}")
    helm.upgrade({})
    new_link, new_ca, new_tls, _ = await helm.kept()
    assert new_link == link
    assert (new_ca == ca) is (gone == "gateway-tls")
    assert new_tls["tls.crt"] != tls["tls.crt"]
    assert new_tls["ca.crt"] == new_ca["ca.crt"]


@pytest.mark.parametrize("switch", sorted(SWITCHES.keys() - FOREIGN - {"defaults"}))
async def test_the_api_server_takes_every_object(helm: Helm, switch: str) -> None:
    await add_namespaces(helm.api)
    helm.install({"crds": {"create": False}} | SWITCHES[switch] | NO_JOB)
    assert "trunkline-gateway" in await helm.left()


@pytest.mark.parametrize("watched", [[], ["sales"]])
async def test_the_release_goes_once_the_modal_apps_are_stopped(
    helm: Helm, watched: list[str]
) -> None:
    await add_namespaces(helm.api)
    helm.install({"uninstall": {"deadlineSeconds": 60}, "watchNamespaces": watched})
    uninstall = asyncio.create_task(asyncio.to_thread(helm.uninstall))
    await helm.end_job("Complete")
    await uninstall
    assert await helm.left() == []
    for kind in ("clusterroles", "clusterrolebindings"):
        found = await helm.api.get(f"/apis/rbac.authorization.k8s.io/v1/{kind}")
        assert not [it for it in found["items"] if "trunkline" in it["metadata"]["name"]]


async def test_the_release_stays_while_modal_apps_run(helm: Helm) -> None:
    helm.install({"uninstall": {"deadlineSeconds": 60}})
    uninstall = asyncio.create_task(asyncio.to_thread(helm.config.uninstall, "trunkline"))
    await helm.end_job("Failed")
    with pytest.raises(HelmError, match="trunkline-release"):
        await uninstall
    assert {"trunkline-operator", "trunkline-gateway"} <= set(await helm.left())
    # Its log can still be read, and the next attempt makes a new one.
    jobs = f"/apis/batch/v1/namespaces/{helm.namespace}/jobs"
    (job,) = (await helm.api.get(jobs))["items"]
    uninstall = asyncio.create_task(asyncio.to_thread(helm.uninstall))
    await helm.end_job("Complete", other_than=job["metadata"]["uid"])
    await uninstall
    assert await helm.left() == []


# --- what Helm says when it cannot be ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [
        ({}, {}, "all namespaces"),
        ({}, {"watchNamespaces": ["sales"]}, "all namespaces"),
        ({"watchNamespaces": ["sales"]}, {"watchNamespaces": ["sales"]}, "sales"),
        ({"watchNamespaces": ["sales"]}, {}, "sales"),
    ],
)
async def test_a_second_release_for_the_same_agents(
    helm: Helm, first: Values, second: Values, taken: str
) -> None:
    await add_namespaces(helm.api)
    helm.install(first)
    told = f"{helm.namespace}/trunkline looks after the VoiceAgents of {taken} already"
    with pytest.raises(HelmError, match=told):
        helm.install({"crds": {"create": False}} | second, "another")
    helm.upgrade(first)


async def test_a_second_release_for_other_agents(helm: Helm) -> None:
    await add_namespaces(helm.api)
    helm.install({"watchNamespaces": ["sales"]})
    helm.install({"watchNamespaces": ["support"], "crds": {"create": False}}, "another")


async def add_namespaces(api: Api) -> None:
    for name in ("sales", "support"):
        try:
            await api.create("/api/v1/namespaces", {"metadata": {"name": name}})
        except ApiError as error:
            assert error.status == 409  # noqa: PT017  # an earlier test made it


async def test_a_definition_that_is_not_the_releases(helm: Helm) -> None:
    await helm.api.create(CRDS, yaml.safe_load((CHART / "files/crds/voiceagents.yaml").read_text()))
    with pytest.raises(HelmError) as refused:
        helm.install({})
    told = str(refused.value)
    assert "in the cluster already, and no release of Helm made it" in told
    assert "--set crds.create=false" in told
    # The remedy in the message, done by hand.
    owner = {"release-name": "trunkline", "release-namespace": helm.namespace}
    annotations = {f"meta.helm.sh/{key}": value for key, value in owner.items()}
    for key, value in annotations.items():
        assert f"{key}={value}" in told
    labels = {"app.kubernetes.io/managed-by": "Helm"}
    await helm.api.patch(CRD, {"metadata": {"annotations": annotations, "labels": labels}})
    helm.install({})


def test_a_cluster_that_is_too_old(tmp_path: Path) -> None:
    with old_cluster() as server:
        file = tmp_path / "kubeconfig"
        host, port = server.server_address[:2]
        where = {"cluster": {"server": f"http://{host!s}:{port}"}, "name": "old"}
        context = {"context": {"cluster": "old", "user": ""}, "name": "old"}
        config = {"clusters": [where], "contexts": [context], "current-context": "old"}
        file.write_text(json.dumps({"apiVersion": "v1", "kind": "Config"} | config))
        with pytest.raises(HelmError, match=r"kubeVersion: >=1.32.0-0 .*Kubernetes v1.31.9"):
            Config(kubeconfig_path=str(file)).install(Chart.load(str(CHART)), "trunkline")


class OldVersion(BaseHTTPRequestHandler):
    """All that Helm asks before it looks at the chart's kubeVersion."""

    def do_GET(self) -> None:
        version = {"major": "1", "minor": "31", "gitVersion": "v1.31.9"}
        answers: dict[str, Values] = {
            "/version": version,
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
        }
        found = answers.get(self.path.partition("?")[0])
        body = json.dumps(found or {"kind": "Status", "code": 404}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class old_cluster(ThreadingHTTPServer):  # used as a context manager
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), OldVersion)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
