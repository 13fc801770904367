"""CoreDNS, as every cluster has it: a Deployment and the Service `kube-dns`. Pure.

As in many clusters, by CoreDNS's own cache or a node-local one, an answer may be half a minute old.

Names outside the cluster do not exist, since nothing in it can reach the outside.
"""

from typing import Final

from trunkline_dev.cluster.images import COREDNS
from trunkline_dev.cluster.network import DNS_ADDRESS, DOMAIN
from trunkline_dev.kube import Json

NAMESPACE: Final = "kube-system"
NAME: Final = "coredns"
DEPLOYMENT_PATH: Final = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{NAME}"

_RBAC: Final = "/apis/rbac.authorization.k8s.io/v1"
_LABELS: Final = {"k8s-app": "kube-dns"}  # Network policies know DNS by this label.

COREFILE: Final = f"""\
.:53 {{
    errors
    health {{
        lameduck 1s
    }}
    ready
    cache 30
    kubernetes {DOMAIN} in-addr.arpa {{
        ttl 30
    }}
    template ANY ANY . {{
        rcode NXDOMAIN
    }}
}}
"""


def manifests() -> dict[str, Json]:
    """What to apply, by path."""
    core = f"/api/v1/namespaces/{NAMESPACE}"
    return {
        f"{core}/serviceaccounts/{NAME}": _named("v1", "ServiceAccount"),
        f"{_RBAC}/clusterroles/system:{NAME}": {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": f"system:{NAME}"},
            "rules": [
                _watch("", "endpoints", "services", "pods", "namespaces"),
                _watch("discovery.k8s.io", "endpointslices"),
            ],
        },
        f"{_RBAC}/clusterrolebindings/system:{NAME}": {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": f"system:{NAME}"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": f"system:{NAME}",
            },
            "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}],
        },
        f"{core}/configmaps/{NAME}": _named("v1", "ConfigMap") | {"data": {"Corefile": COREFILE}},
        f"{core}/services/kube-dns": _service(),
        DEPLOYMENT_PATH: _deployment(),
    }


def _named(version: str, kind: str, name: str = NAME) -> Json:
    metadata = {"name": name, "namespace": NAMESPACE, "labels": _LABELS}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _watch(group: str, *resources: str) -> Json:
    return {"apiGroups": [group], "resources": list(resources), "verbs": ["list", "watch"]}


def _service() -> Json:
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
    ]
    spec = {"clusterIP": DNS_ADDRESS, "selector": _LABELS, "ports": ports}
    return _named("v1", "Service", "kube-dns") | {"spec": spec}


def _deployment() -> Json:
    container = {
        "name": NAME,
        "image": COREDNS,
        "args": ["-conf", "/etc/coredns/Corefile"],
        "ports": [
            {"name": "dns", "containerPort": 53, "protocol": "UDP"},
            {"name": "dns-tcp", "containerPort": 53, "protocol": "TCP"},
        ],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns", "readOnly": True}],
    }
    pod = {
        "serviceAccountName": NAME,
        "dnsPolicy": "Default",
        "priorityClassName": "system-cluster-critical",
        "tolerations": [{"operator": "Exists"}],
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": NAME}}],
    }
    spec = {
        "selector": {"matchLabels": _LABELS},
        "template": {"metadata": {"labels": _LABELS}, "spec": pod},
    }
    return _named("apps/v1", "Deployment") | {"spec": spec}
