"""The chart, by the real Helm: linted, rendered for every switch, and installed on the real API server."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart, Config, HelmValuesError, disable_logging, lint

from trunkline_dev.controlplane import ControlPlane
from trunkline_dev.kube import Api

CHART = Path(__file__).parents[1] / "charts/trunkline"
SWITCHES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "namespaced": {"watchNamespaces": ["sales", "support"]},
    "no definition": {"crds": {"create": False}},
    "own images": {"image": {"tag": "x", "pullSecrets": [{"name": "regcred"}]}},
    "other registry": {"worker": {"image": "registry.example/worker-moshi:1"}},
    "placed": {
        "operator": {"nodeSelector": {"a": "b"}, "tolerations": [{"operator": "Exists"}]},
        "gateway": {"affinity": {"nodeAffinity": {}}, "tolerations": [{"operator": "Exists"}]},
    },
    "load balancer": {"gateway": {"service": {"type": "LoadBalancer", "annotations": {"a": "b"}}}},
    "modal elsewhere": {"operator": {"modalServerUrl": "http://modal.example:9900"}},
}
Objects = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def quiet_helm() -> None:
    disable_logging()


def rendered(values: dict[str, Any]) -> Objects:
    """(kind, name) → object, of everything the chart makes; twice the same pair is a mistake."""
    found: Objects = {}
    files = Chart.load(str(CHART)).render(values, name="trunkline", namespace="calls")
    for path, text in files.items():
        if not path.endswith("NOTES.txt"):
            for body in yaml.safe_load_all(text):
                if body is not None:
                    namespace = body["metadata"].get("namespace", "")
                    key = body["kind"], f"{namespace}/{body['metadata']['name']}".lstrip("/")
                    assert key not in found
                    found[key] = body
    return found


def test_lint() -> None:
    result = lint(str(CHART), {}, strict=True)
    assert result["messages"] == []
    assert result["errors"] == []


@pytest.mark.parametrize("switch", SWITCHES)
def test_renders(switch: str) -> None:
    objects = rendered(SWITCHES[switch])
    gateway = objects["Deployment", "trunkline-gateway"]["spec"]["template"]["spec"]
    operator = objects["Deployment", "trunkline-operator"]["spec"]["template"]["spec"]
    match switch:
        case "namespaced":
            assert ("ClusterRole", "trunkline-operator") not in objects
            assert ("Role", "sales/trunkline-operator") in objects
            assert "--namespace=support" in operator["containers"][0]["args"]
        case "no definition":
            assert not any(kind == "CustomResourceDefinition" for kind, _ in objects)
        case "own images":
            assert gateway["containers"][0]["image"] == "ghcr.io/trunkline/gateway:x"
            assert gateway["imagePullSecrets"] == [{"name": "regcred"}]
        case "other registry":
            image = "--worker-image=registry.example/worker-moshi:1"
            assert image in operator["containers"][0]["args"]
        case "placed":
            assert operator["nodeSelector"] == {"a": "b"}
            assert gateway["tolerations"] == [{"operator": "Exists"}]
        case "load balancer":
            assert objects["Service", "trunkline-gateway"]["spec"]["type"] == "LoadBalancer"
        case "modal elsewhere":
            environment = {entry["name"]: entry for entry in operator["containers"][0]["env"]}
            assert environment["MODAL_SERVER_URL"]["value"] == "http://modal.example:9900"
        case "defaults":
            assert ("CustomResourceDefinition", "voiceagents.trunkline.dev") in objects


def test_calls_outlive_a_rollout() -> None:
    spec = rendered({"gateway": {"graceSeconds": 100}})["Deployment", "trunkline-gateway"]["spec"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > 100
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_processes_run_with_nothing_they_do_not_need() -> None:
    objects = rendered({})
    for name in ("trunkline-gateway", "trunkline-operator"):
        pod = objects["Deployment", name]["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
    assert objects["ServiceAccount", "trunkline-gateway"]["automountServiceAccountToken"] is False


def test_the_operator_may_do_no_more_than_it_does() -> None:
    rules = rendered({})["ClusterRole", "trunkline-operator"]["rules"]
    granted = {
        f"{group}/{resource}:{verb}"
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert not any("*" in each for each in granted)
    assert "/secrets:list" not in granted
    assert "/secrets:delete" not in granted


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"gateway": {"replicas": 0}}, "minimum: got 0, want 1"),
        ({"gateway": {"replcas": 2}}, "additional properties 'replcas' not allowed"),
        ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
        ({"watchNamespaces": "sales"}, "/watchNamespaces"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(HelmValuesError, match=sentence):
        rendered(values)


async def test_the_api_server_takes_every_object(
    control_plane: ControlPlane, api: Api, namespace: str
) -> None:
    """A real `helm install`, and an upgrade that keeps the token between operator and gateways."""
    config = Config(namespace=namespace, kubeconfig_path=str(control_plane.kubeconfig))
    # Without the definition: it belongs to the whole cluster, which other tests share.
    values: dict[str, Any] = {"crds": {"create": False}}
    chart = Chart.load(str(CHART))
    config.install(chart, "trunkline", values)
    home = f"/api/v1/namespaces/{namespace}"
    try:
        token = (await api.get(f"{home}/secrets/trunkline-link"))["data"]["token"]
        assert len(token) >= 40
        config.upgrade(chart, "trunkline", values | {"gateway": {"replicas": 3}})
        assert (await api.get(f"{home}/secrets/trunkline-link"))["data"]["token"] == token
        deployments = f"/apis/apps/v1/namespaces/{namespace}/deployments"
        gateway = await api.get(f"{deployments}/trunkline-gateway")
        assert gateway["spec"]["replicas"] == 3
    finally:
        config.uninstall("trunkline")
    assert (await api.get(f"/apis/apps/v1/namespaces/{namespace}/deployments"))["items"] == []
