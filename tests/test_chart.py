"""The chart as the real Helm renders it: lint, each switch, and what must hold of every object."""

import datetime
import hashlib
from base64 import b64decode
from typing import Any

import pytest
import typer.main
from chart_rig import CHART, PEER, SWITCHES, Objects, pod_of, rendered
from cryptography import x509
from helm_python import Chart, HelmRenderError, lint

import trunkline_operator.__main__
import trunkline_operator.release
from trunkline_runtime import contract
from trunkline_runtime.cli import app

HOST = "trunkline-gateway-control.calls.svc"


def container(objects: Objects, name: str) -> dict[str, Any]:
    pod = pod_of(objects["Deployment", f"trunkline-{name}"])
    assert pod is not None
    (only,) = pod["containers"]
    assert isinstance(only, dict)
    return only


@pytest.mark.parametrize("switch", SWITCHES)
def test_lint(switch: str) -> None:
    result = lint(str(CHART), SWITCHES[switch], strict=True)
    assert result["messages"] == []
    assert result["errors"] == []


# --- what holds of every object --------------------------------------------------------------------------


@pytest.mark.parametrize("switch", SWITCHES)
def test_pods_run_with_nothing_they_do_not_need(switch: str) -> None:
    objects = rendered(SWITCHES[switch])
    pods = {name: pod for name, body in objects.items() if (pod := pod_of(body)) is not None}
    lacks_one = switch in ("apps stay", "certificates for everybody")
    assert len(pods) == (3 if lacks_one else 4)
    for name, pod in pods.items():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["enableServiceLinks"] is False
        # Only who talks to the Kubernetes API holds a token for it.
        talks = name in {("Deployment", "trunkline-operator"), ("Job", "trunkline-release")}
        assert pod["automountServiceAccountToken"] is talks
        for each in pod["containers"]:
            assert each["resources"]["limits"]["memory"]
            assert each["securityContext"]["readOnlyRootFilesystem"] is True
            assert each["securityContext"]["allowPrivilegeEscalation"] is False
            assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for (kind, _), body in objects.items():
        if kind == "ServiceAccount":
            assert body["automountServiceAccountToken"] is False


@pytest.mark.parametrize("switch", SWITCHES)
def test_programs_know_the_arguments_that_they_get(switch: str) -> None:
    """Parsed by the programs themselves, which end with 2 where they do not know one."""
    objects = rendered(SWITCHES[switch])
    for body in objects.values():
        for each in (pod_of(body) or {}).get("containers", ()):
            command, *arguments = each["args"]
            if command.startswith("--"):
                trunkline_operator.__main__.parser().parse_args(each["args"])
            elif command == "release":
                trunkline_operator.release.parser().parse_args(arguments)
            else:
                known = typer.main.get_group(app).commands[command]
                known.make_context(command, arguments)


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_object_says_whose_it_is(switch: str) -> None:
    for (kind, _), body in rendered(SWITCHES[switch]).items():
        if kind != "CustomResourceDefinition":
            assert body["metadata"]["labels"]["app.kubernetes.io/instance"] == "trunkline"
            if switch == "labelled":
                assert body["metadata"]["labels"]["cost-centre"] == "7"


@pytest.mark.parametrize("switch", SWITCHES)
def test_selectors_find_their_pods(switch: str) -> None:
    objects = rendered(SWITCHES[switch])
    for component in ("gateway", "operator"):
        spec = objects["Deployment", f"trunkline-{component}"]["spec"]
        labels = spec["template"]["metadata"]["labels"]
        wanted = spec["selector"]["matchLabels"]
        assert labels.items() >= wanted.items()
        budget = objects["PodDisruptionBudget", f"trunkline-{component}"]["spec"]
        assert budget["selector"]["matchLabels"] == wanted
        assert budget["maxUnavailable"] == 1
        for constraint in spec["template"]["spec"]["topologySpreadConstraints"]:
            assert constraint["labelSelector"]["matchLabels"] == wanted
    gateways = objects["Deployment", "trunkline-gateway"]["spec"]["selector"]["matchLabels"]
    for service in ("trunkline-gateway", "trunkline-gateway-control"):
        assert objects["Service", service]["spec"]["selector"] == gateways


@pytest.mark.parametrize("name", ["a-rather-long-name-for-a-release-of-trunkline-xyz12", "calls"])
def test_names_fit(name: str) -> None:
    """A Service's name may have 63 characters; Helm allows a release's name 53."""
    for (_, key), body in rendered({}, name).items():
        assert len(body["metadata"]["name"]) <= 63, key


# --- each switch -----------------------------------------------------------------------------------------


def test_every_switch_changes_something() -> None:
    """A value that nothing reads would be a promise that nobody keeps."""
    plain = without_random(rendered({}))
    for switch, values in SWITCHES.items():
        if switch != "defaults":
            assert without_random(rendered(values)) != plain, switch


def without_random(objects: Objects) -> str:
    """Secrets and the CA's digest are new at each rendering without a cluster."""
    kept = {key: body for key, body in objects.items() if key[0] != "Secret"}
    names = sorted(key for key in objects if key[0] == "Secret")
    for key, body in kept.items():
        if key[0] == "Deployment":
            body["spec"]["template"]["metadata"].get("annotations", {}).pop("trunkline.dev/ca", 0)
    return repr((names, kept))


def test_definition() -> None:
    key = "CustomResourceDefinition", "voiceagents.trunkline.dev"
    annotations = rendered({})[key]["metadata"]["annotations"]
    assert annotations["helm.sh/resource-policy"] == "keep"
    assert key not in rendered(SWITCHES["no definition"])


def test_images() -> None:
    objects = rendered({})
    assert container(objects, "gateway")["image"] == "ghcr.io/trunkline/gateway:0.1.0"
    assert (
        "--worker-image=ghcr.io/trunkline/worker-cpu:0.1.0"
        in container(objects, "operator")["args"]
    )
    objects = rendered(SWITCHES["own images"])
    assert container(objects, "operator")["image"] == "ghcr.io/trunkline/operator:x"
    for body in objects.values():
        if (pod := pod_of(body)) is not None:
            assert pod["imagePullSecrets"] == [{"name": "regcred"}]
            assert pod["containers"][0]["imagePullPolicy"] == "Always"
    objects = rendered(SWITCHES["other registry"])
    assert container(objects, "gateway")["image"] == "mirror.example/trunkline/edge:0.1.0"
    assert container(objects, "operator")["image"] == "registry.example/operator@sha256:0123"
    image = "--worker-image=registry.example/worker:1"
    assert image in container(objects, "operator")["args"]


def test_calls_outlive_a_rollout() -> None:
    values = {"gateway": {"graceSeconds": 100, "leaveSeconds": 7}}
    objects = rendered(values)
    spec = objects["Deployment", "trunkline-gateway"]["spec"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > 107
    # The process is told to go only then; until then it takes what a load balancer still sends.
    assert container(objects, "gateway")["lifecycle"] == {"preStop": {"sleep": {"seconds": 7}}}
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_placement() -> None:
    objects = rendered(SWITCHES["placed"])
    for role in ("operator", "gateway"):
        template = objects["Deployment", f"trunkline-{role}"]["spec"]["template"]
        assert template["metadata"]["annotations"]["note"] == role
        assert template["metadata"]["labels"]["team"] == "voice"
        assert template["spec"]["priorityClassName"] == "system-cluster-critical"
        assert template["spec"]["nodeSelector"] == {"a": "b"}
        assert template["spec"]["tolerations"] == [{"operator": "Exists"}]
        proxy = {"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"}
        assert proxy in container(objects, role)["env"]
        level = {"name": "TRUNKLINE_LOG_LEVEL", "value": "DEBUG"}
        assert level in container(objects, role)["env"]


def test_any_user() -> None:
    pod = pod_of(rendered(SWITCHES["any user"])["Deployment", "trunkline-gateway"])
    assert pod is not None
    assert not {"runAsUser", "runAsGroup", "fsGroup"} & pod["securityContext"].keys()


def test_modal_elsewhere() -> None:
    objects = rendered(SWITCHES["modal elsewhere"])
    entry = {"name": "MODAL_SERVER_URL", "value": "http://modal.example:99"}
    job = pod_of(objects["Job", "trunkline-release"])
    assert job is not None
    assert entry in container(objects, "operator")["env"]
    assert entry in job["containers"][0]["env"]


def test_service() -> None:
    spec = rendered(SWITCHES["load balancer"])["Service", "trunkline-gateway"]["spec"]
    assert (spec["type"], spec["ports"][0]["port"]) == ("LoadBalancer", 80)
    assert spec["externalTrafficPolicy"] == "Local"
    assert spec["loadBalancerClass"] == "example/lb"
    assert spec["loadBalancerSourceRanges"] == ["192.0.2.0/24"]
    spec = rendered(SWITCHES["node port"])["Service", "trunkline-gateway"]["spec"]
    assert spec["ports"][0]["nodePort"] == 30080
    # What only a load balancer knows is refused by the API server elsewhere.
    inside = {"type": "ClusterIP", "nodePort": 30080, "externalTrafficPolicy": "Local"}
    spec = rendered({"gateway": {"service": inside}})["Service", "trunkline-gateway"]["spec"]
    assert "nodePort" not in spec["ports"][0]
    assert "externalTrafficPolicy" not in spec


def test_autoscaling() -> None:
    objects = rendered(SWITCHES["autoscaling"])
    spec = objects["HorizontalPodAutoscaler", "trunkline-gateway"]["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (3, 30)
    assert spec["metrics"][0]["pods"]["target"]["averageValue"] == "100"
    # An upgrade must not undo what the autoscaler did.
    assert "replicas" not in objects["Deployment", "trunkline-gateway"]["spec"]


def test_the_ledger_has_a_collector_and_a_place_to_wait() -> None:
    def gateway(switch: str) -> tuple[dict[str, Any], dict[str, Any]]:
        objects = rendered(SWITCHES[switch])
        pod = objects["Deployment", "trunkline-gateway"]["spec"]["template"]["spec"]
        (one,) = pod["containers"]
        environment = {each["name"]: each for each in one["env"]}
        volumes = {each["name"]: each for each in pod["volumes"]}
        mounts = {each["name"]: each["mountPath"] for each in one["volumeMounts"]}
        return environment, {name: (volume, mounts[name]) for name, volume in volumes.items()}

    environment, volumes = gateway("ledger")
    assert environment["TRUNKLINE_LEDGER_URL"]["value"] == "https://ledger.example/calls"
    assert environment["TRUNKLINE_LEDGER_SPOOL_MIB"]["value"] == "128"
    secret = environment["TRUNKLINE_LEDGER_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": "ledger", "key": "token"}
    volume, where = volumes["spool"]
    assert volume["emptyDir"] == {"sizeLimit": "256Mi"}
    assert environment["TRUNKLINE_LEDGER_SPOOL"]["value"].startswith(where)
    environment, volumes = gateway("ledger in memory")
    assert "TRUNKLINE_LEDGER_SPOOL" not in environment
    assert "spool" not in volumes
    environment, volumes = gateway("defaults")
    assert not [name for name in environment if "LEDGER" in name]
    assert "spool" not in volumes


def test_ways_in() -> None:
    spec = rendered(SWITCHES["ingress"])["Ingress", "trunkline-gateway"]["spec"]
    assert spec["ingressClassName"] == "nginx"
    assert [rule["host"] for rule in spec["rules"]] == ["calls.example"]
    backend = spec["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": "trunkline-gateway", "port": {"name": "calls"}}
    (rule,) = rendered(SWITCHES["ingress for any host"])["Ingress", "trunkline-gateway"]["spec"][
        "rules"
    ]
    assert "host" not in rule
    spec = rendered(SWITCHES["gateway API"])["HTTPRoute", "trunkline-gateway"]["spec"]
    assert spec["parentRefs"] == [{"name": "public", "namespace": "infra"}]
    (rule,) = spec["rules"]
    assert rule["backendRefs"] == [{"name": "trunkline-gateway", "port": 8080}]
    assert rule["timeouts"] == {"request": "3600s"}


def test_one_of_the_operators_acts() -> None:
    objects = rendered({})
    assert objects["Deployment", "trunkline-operator"]["spec"]["replicas"] == 2
    assert "--lease=calls/trunkline-operator" in container(objects, "operator")["args"]
    rules = objects["Role", "trunkline-operator-home"]["rules"]
    (named,) = (it for it in rules if it["resources"] == ["leases"] and "resourceNames" in it)
    assert named["resourceNames"] == ["trunkline-operator"]
    assert {"get", "update"} <= set(named["verbs"])


def test_notes() -> None:
    told = notes({})
    assert "kubectl -n calls port-forward svc/trunkline-gateway 8080:8080" in told
    assert "networkPolicy.agentNamespaces adds one" in told
    assert "in the clear" not in told
    told = notes({"tls": {"enabled": False}, "uninstall": {"stopModalApps": False}})
    assert "in the clear" in told
    assert "will leave Modal apps running" in told


def notes(values: dict[str, Any]) -> str:
    files = Chart.load(str(CHART)).render(values, name="trunkline", namespace="calls")
    return str(files["trunkline/templates/NOTES.txt"])


def test_helm_test() -> None:
    pod = pod_of(rendered({})["Pod", "trunkline-test"])
    assert pod is not None
    assert pod["containers"][0]["args"] == [
        "probe",
        "--gateway=http://trunkline-gateway.calls.svc:8080",
        "--agent=calls/no-such-agent",
        "--expect-refusal",
    ]
    pod = pod_of(rendered(SWITCHES["tested by a call"])["Pod", "trunkline-test"])
    assert pod is not None
    assert "--agent=sales/front-desk" in pod["containers"][0]["args"]
    assert "--expect-refusal" not in pod["containers"][0]["args"]
    (key,) = pod["containers"][0]["env"]
    assert key["valueFrom"] == {"secretKeyRef": {"name": "callers", "key": "demo"}}


def test_callers_come_by_tls_where_a_certificate_is_given() -> None:
    """Everything that leads callers there knows of it, and their port is still the one that policies open."""
    objects = rendered(SWITCHES["own TLS"])
    pod = pod_of(objects["Deployment", "trunkline-gateway"])
    assert pod is not None
    (container,) = pod["containers"]
    args = container["args"]
    assert {
        "--tls=/etc/trunkline/calls-tls",
        "--client-ca=/etc/trunkline/client-ca/ca.crt",
        "--client-certificates=optional",
        "--trusted-proxies=10.0.0.0/8,fd00::/8",
        "--proxy-protocol",
    } <= set(args)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["calls-tls"] == "/etc/trunkline/calls-tls"
    volumes = {volume["name"]: volume["secret"] for volume in pod["volumes"]}
    assert volumes["calls-tls"]["secretName"] == "calls-tls"
    assert volumes["client-ca"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
    (port,) = objects["Service", "trunkline-gateway"]["spec"]["ports"]
    assert (port["port"], port["targetPort"], port["appProtocol"]) == (443, "calls", "https")
    annotations = objects["Ingress", "trunkline-gateway"]["metadata"]["annotations"]
    assert annotations == {"nginx.ingress.kubernetes.io/backend-protocol": "HTTPS"}
    policy = objects["BackendTLSPolicy", "trunkline-gateway"]["spec"]
    assert policy["targetRefs"][0]["name"] == "trunkline-gateway"
    assert policy["validation"]["hostname"] == "calls.example"
    certificate = objects["Certificate", "trunkline-calls"]["spec"]
    assert (certificate["secretName"], certificate["dnsNames"]) == ("calls-tls", ["calls.example"])
    rules = objects["NetworkPolicy", "trunkline-gateway"]["spec"]["ingress"]
    assert {"port": 8080, "protocol": "TCP"} in rules[0]["ports"]
    test = pod_of(objects["Pod", "trunkline-test"])
    assert test is not None
    assert "--gateway=https://trunkline-gateway.calls.svc:443" in test["containers"][0]["args"]
    assert test["volumes"][0]["secret"]["items"] == [{"key": "tls.crt", "path": "tls.crt"}]


def test_plain_calls_are_nobodys_tls() -> None:
    objects = rendered(SWITCHES["ingress for any host"])
    assert "annotations" not in objects["Ingress", "trunkline-gateway"]["metadata"]
    assert "appProtocol" not in objects["Service", "trunkline-gateway"]["spec"]["ports"][0]
    assert ("Pod", "trunkline-test") in objects
    assert ("Pod", "trunkline-test") not in rendered(SWITCHES["certificates for everybody"])


# --- rights ----------------------------------------------------------------------------------------------


def granted(role: dict[str, Any]) -> set[str]:
    return {
        f"{group}/{resource}:{verb}"
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.mark.parametrize("switch", ["defaults", "namespaced"])
def test_nobody_may_do_more_than_they_do(switch: str) -> None:
    objects = rendered(SWITCHES[switch])
    for (kind, name), body in objects.items():
        if kind in ("Role", "ClusterRole"):
            rights = granted(body)
            assert not any("*" in each for each in rights), name
            assert not {"/secrets:list", "/secrets:delete", "/secrets:watch"} & rights, name
            assert (kind == "ClusterRole") <= (switch == "defaults"), name


def test_the_operator_is_told_when_an_idle_pod_may_be_evicted() -> None:
    for values, seconds in ({}, 600), ({"evictIdleSeconds": 0}, 0):
        assert f"--evict-idle-seconds={seconds}" in container(rendered(values), "operator")["args"]


def test_the_operator_is_told_its_region() -> None:
    args = container(rendered({"region": "eu-central-1"}), "operator")["args"]
    assert "--region=eu-central-1" in args
    assert not any("--region" in each for each in container(rendered({}), "operator")["args"])


def test_namespaces() -> None:
    objects = rendered(SWITCHES["namespaced"])
    for namespace in ("sales", "support"):
        assert f"--namespace={namespace}" in container(objects, "operator")["args"]
        for kind in ("Role", "RoleBinding"):
            assert (kind, f"{namespace}/trunkline-operator") in objects
            assert (kind, f"{namespace}/trunkline-release") in objects
    job = pod_of(objects["Job", "trunkline-release"])
    assert job is not None
    assert "--namespace=sales" in job["containers"][0]["args"]


def test_the_uninstall_hook_brings_its_rights_and_takes_them_away() -> None:
    objects = rendered(SWITCHES["patient"])
    hooks = {
        key: body
        for key, body in objects.items()
        if body["metadata"].get("annotations", {}).get("helm.sh/hook") == "pre-delete"
    }
    assert {kind for kind, _ in hooks} == {"ServiceAccount", "Role", "RoleBinding", "Job"}
    for body in hooks.values():
        annotations = body["metadata"]["annotations"]
        assert annotations["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
        weight = int(annotations["helm.sh/hook-weight"])
        assert weight == (0 if body["kind"] == "Job" else -1)
    job = hooks["Job", "trunkline-release"]
    assert job["spec"]["activeDeadlineSeconds"] > 900
    pod = pod_of(job)
    assert pod is not None
    assert pod["containers"][0]["args"] == [
        "release",
        "--deadline=900",
        "--scale-down=calls/trunkline-operator",
        "--burst-secret=calls/trunkline-burst",
        "--namespace=sales",
    ]
    stay = rendered(SWITCHES["apps stay"])
    assert not any("trunkline-release" in name for _, name in stay)


# --- TLS -------------------------------------------------------------------------------------------------


def test_certificates() -> None:
    objects = rendered({})
    ca, tls = (objects["Secret", f"trunkline-{name}"]["data"] for name in ("ca", "gateway-tls"))
    assert ca.keys() == {"ca.crt", "ca.key"}
    assert tls.keys() == {"tls.crt", "tls.key", "ca.crt"}
    assert ca["ca.crt"] == tls["ca.crt"]
    authority = x509.load_pem_x509_certificate(b64decode(ca["ca.crt"]))
    gateway = x509.load_pem_x509_certificate(b64decode(tls["tls.crt"]))
    gateway.verify_directly_issued_by(authority)
    names = gateway.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [HOST, f"*.{HOST}"]
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    lasts = authority.not_valid_after_utc - authority.not_valid_before_utc
    assert lasts >= datetime.timedelta(days=3649)
    assert f"--gateways={HOST}:8081" in container(objects, "operator")["args"]
    # One CA in all templates of a rendering; processes are replaced when it changes.
    for name in ("gateway", "operator"):
        template = objects["Deployment", f"trunkline-{name}"]["spec"]["template"]
        assert template["metadata"]["annotations"]["trunkline.dev/ca"] == digest(ca["ca.crt"])


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_cert_manager_makes_the_same_secrets() -> None:
    objects = rendered(SWITCHES["cert-manager"])
    secrets = {
        body["spec"]["secretName"] for key, body in objects.items() if key[0] == "Certificate"
    }
    assert secrets == {"trunkline-ca", "trunkline-gateway-tls"}
    assert not any(("Secret", name) in objects for name in secrets)
    assert objects["Certificate", "trunkline-gateway"]["spec"]["dnsNames"] == [HOST, f"*.{HOST}"]
    pod = pod_of(objects["Deployment", "trunkline-operator"])
    assert pod is not None
    (volume,) = (it["secret"] for it in pod["volumes"] if it["name"] == "ca")
    paths = {item["key"]: item["path"] for item in volume["items"]}
    assert paths == {"tls.crt": "ca.crt", "tls.key": "ca.key"}


@pytest.mark.parametrize("switch", SWITCHES)
def test_who_is_told_of_certificates_has_them(switch: str) -> None:
    objects = rendered(SWITCHES[switch])
    for name, flag in (("gateway", "--control-tls="), ("operator", "--ca-dir=")):
        flags = [it.removeprefix(flag) for it in container(objects, name)["args"] if flag in it]
        mounts = [it["mountPath"] for it in container(objects, name)["volumeMounts"]]
        assert len(flags) == (0 if switch == "plain" else 1)
        assert set(flags) <= set(mounts)


# --- network policies ------------------------------------------------------------------------------------


def ports(rules: list[dict[str, Any]]) -> list[list[int]]:
    return [[port["port"] for port in rule.get("ports", [])] for rule in rules]


def test_nothing_in_and_nothing_out_but_the_arrows() -> None:
    objects = rendered({})
    everything = objects["NetworkPolicy", "trunkline"]["spec"]
    assert everything["policyTypes"] == ["Ingress", "Egress"]
    assert everything.keys() == {"policyTypes", "podSelector"}
    for body in objects.values():
        if pod_of(body) is not None:
            labels = body["metadata"]["labels"]
            if body["kind"] != "Pod":
                labels = body["spec"]["template"]["metadata"]["labels"]
            assert labels.items() >= everything["podSelector"]["matchLabels"].items()
            component = labels["app.kubernetes.io/component"]
            own = objects["NetworkPolicy", f"trunkline-{component}"]["spec"]
            assert labels.items() >= own["podSelector"]["matchLabels"].items()
    gateway = objects["NetworkPolicy", "trunkline-gateway"]["spec"]
    operator = objects["NetworkPolicy", "trunkline-operator"]["spec"]
    assert ports(gateway["ingress"]) == [[contract.CALLS_PORT], [contract.CONTROL_PORT]]
    assert ports(gateway["egress"]) == [[contract.WORKER_PORT], [53, 53], [443]]
    assert ports(operator["egress"]) == [[contract.CONTROL_PORT], [53, 53], [443, 6443], [443]]
    assert "ingress" not in operator
    test = objects["NetworkPolicy", "trunkline-test"]["spec"]
    assert ports(test["egress"]) == [[contract.CALLS_PORT], [53, 53]]


def test_who_may_link_to_a_gateway() -> None:
    (_, control) = rendered({})["NetworkPolicy", "trunkline-gateway"]["spec"]["ingress"]
    operators, workers = control["from"]
    assert "namespaceSelector" not in operators
    expected = [{"key": contract.LABEL_AGENT, "operator": "Exists"}]
    assert workers == {
        "namespaceSelector": {},
        "podSelector": {"matchExpressions": expected},
    }
    policy = rendered(SWITCHES["namespaced"])["NetworkPolicy", "trunkline-gateway"]["spec"]
    (namespaces,) = policy["ingress"][1]["from"][1]["namespaceSelector"]["matchExpressions"]
    assert namespaces["values"] == ["sales", "support"]


def test_a_closed_network() -> None:
    objects = rendered(SWITCHES["closed network"])
    gateway = objects["NetworkPolicy", "trunkline-gateway"]["spec"]
    calls, _, metrics = gateway["ingress"]
    # The test pod is no caller of anybody's list, and must get through.
    assert calls["from"][0] == PEER
    assert calls["from"][1]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"
    assert metrics["from"] == [PEER]
    assert ports(gateway["egress"]) == [[contract.WORKER_PORT], [5353, 5353], [], [8080]]
    workers = objects["NetworkPolicy", "sales/trunkline-workers"]["spec"]
    assert ports(workers["ingress"]) == [[contract.WORKER_PORT], [contract.HEALTH_PORT]]
    assert ports(workers["egress"]) == [[contract.CONTROL_PORT], [5353, 5353], [443]]
    assert not any(kind == "NetworkPolicy" for kind, _ in rendered(SWITCHES["open network"]))


def test_prometheus_gets_through_where_it_is_asked_to() -> None:
    objects = rendered(SWITCHES["monitored"])
    for component in ("gateway", "operator"):
        rules = objects["NetworkPolicy", f"trunkline-{component}"]["spec"]["ingress"]
        assert rules[-1]["from"] == [{"namespaceSelector": {}}]
        assert ports(rules)[-1] == [contract.HEALTH_PORT]


@pytest.mark.parametrize("switch", SWITCHES)
def test_no_rule_opens_everything(switch: str) -> None:
    for (kind, name), body in rendered(SWITCHES[switch]).items():
        if kind == "NetworkPolicy":
            for rule in [*body["spec"].get("ingress", []), *body["spec"].get("egress", [])]:
                assert rule, name


# --- what makes no sense ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"gateway": {"httpRoute": {"enabled": True}}}, "name the Gateway that callers come"),
        (
            {"gateway": {"autoscaling": {"enabled": True, "minReplicas": 9, "maxReplicas": 2}}},
            "maxReplicas is less than minReplicas",
        ),
        ({"test": {"keySecret": {"name": "callers", "key": "demo"}}}, "name the agent"),
        (
            {
                "gateway": {
                    "tls": {"secretName": "calls-tls"},
                    "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]},
                }
            },
            "serverName is empty",
        ),
        ({"gateway": {"tls": {"clientCASecret": "x"}}}, "needs gateway.tls.secretName"),
        ({"gateway": {"tls": {"clientCertificates": "required"}}}, "whose certificates are good"),
        (
            {"gateway": {"tls": {"certManager": {"issuerRef": {"name": "x"}}}}},
            "where the certificate goes",
        ),
        ({"gateway": {"proxyProtocol": True}}, "whose PROXY headers are believed"),
    ],
)
def test_values_that_make_no_sense(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(HelmRenderError, match=sentence):
        rendered(values)
