"""The chart as its tests see it: rendered by the real Helm, once for every switch."""

import json
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml
from helm_python import Chart, disable_logging

CHART: Final = Path(__file__).parents[1] / "charts/trunkline"
Objects = dict[tuple[str, str], dict[str, Any]]
"""(kind, name or namespace/name) → object."""

PEER: Final = {"namespaceSelector": {"matchLabels": {"name": "edge"}}}
# Every value that is not at its default somewhere here is a value that no test has rendered.
SWITCHES: Final[dict[str, dict[str, Any]]] = {
    "defaults": {},
    "namespaced": {"watchNamespaces": ["sales", "support"], "checkOtherReleases": False},
    "no definition": {"crds": {"create": False}},
    "own images": {
        "image": {"tag": "x", "pullPolicy": "Always", "pullSecrets": [{"name": "regcred"}]}
    },
    "other registry": {
        "image": {"registry": "mirror.example/trunkline"},
        "operator": {"image": "registry.example/operator@sha256:0123"},
        "gateway": {"image": "edge"},
        "worker": {"image": "registry.example/worker:1", "moshiImage": "registry.example/moshi:1"},
    },
    "own token": {"operatorToken": {"existingSecret": "mine"}},
    "plain": {"tls": {"enabled": False}},
    "cert-manager": {"tls": {"certManager": {"enabled": True}}},
    "placed": {
        role: {
            "nodeSelector": {"a": "b"},
            "tolerations": [{"operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "priorityClassName": "system-cluster-critical",
            "podAnnotations": {"note": role},
            "podLabels": {"team": "voice"},
            "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"}],
            "logLevel": "DEBUG",
            "resources": {"limits": {"cpu": "1", "memory": "1Gi"}},
        }
        for role in ("operator", "gateway")
    },
    "labelled": {"commonLabels": {"cost-centre": "7"}, "region": "eu-central-1"},
    "any user": {
        "podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None},
        "securityContext": {"privileged": False},
    },
    "load balancer": {
        "gateway": {
            "replicas": 3,
            "graceSeconds": 7200,
            "leaveSeconds": 0,
            "defaultNamespace": "sales",
            "service": {
                "type": "LoadBalancer",
                "port": 80,
                "annotations": {"a": "b"},
                "externalTrafficPolicy": "Local",
                "loadBalancerClass": "example/lb",
                "loadBalancerSourceRanges": ["192.0.2.0/24"],
            },
        }
    },
    "ledger": {
        "gateway": {
            "ledger": {
                "url": "https://ledger.example/calls",
                "tokenSecret": "ledger",
                "spool": {"enabled": True, "mebibytes": 128},
            }
        }
    },
    "ledger in memory": {
        "gateway": {"ledger": {"url": "https://ledger.example/calls", "spool": {"enabled": False}}}
    },
    "node port": {"gateway": {"service": {"type": "NodePort", "nodePort": 30080}}},
    "autoscaling": {
        "gateway": {
            "autoscaling": {
                "enabled": True,
                "minReplicas": 3,
                "maxReplicas": 30,
                "callsPerGateway": 100,
            }
        }
    },
    "ingress": {
        "gateway": {
            "ingress": {
                "enabled": True,
                "className": "nginx",
                "annotations": {"nginx.ingress.kubernetes.io/proxy-read-timeout": "3600"},
                "hosts": ["calls.example"],
                "tls": [{"hosts": ["calls.example"], "secretName": "calls-tls"}],
            }
        }
    },
    "ingress for any host": {"gateway": {"ingress": {"enabled": True}}},
    "gateway API": {
        "gateway": {
            "httpRoute": {
                "enabled": True,
                "annotations": {"a": "b"},
                "parentRefs": [{"name": "public", "namespace": "infra"}],
                "hostnames": ["calls.example"],
                "timeouts": {"request": "3600s"},
            }
        }
    },
    "own TLS": {
        "gateway": {
            "tls": {
                "secretName": "calls-tls",
                "serverName": "calls.example",
                "certManager": {
                    "issuerRef": {"name": "letsencrypt", "kind": "ClusterIssuer"},
                    "dnsNames": ["calls.example"],
                },
                "clientCASecret": "clients",
            },
            "trustedProxies": ["10.0.0.0/8", "fd00::/8"],
            "proxyProtocol": True,
            "ingress": {"enabled": True},
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]},
            "service": {"port": 443},
        }
    },
    "certificates for everybody": {
        "gateway": {
            "tls": {
                "secretName": "calls-tls",
                "clientCASecret": "clients",
                "clientCertificates": "required",
            }
        }
    },
    "open network": {"networkPolicy": {"enabled": False}},
    "nodes are seen": {"watchNodes": True},
    "no pod is ever evicted": {"evictIdleSeconds": 0},
    "closed network": {
        "networkPolicy": {
            "callers": [PEER],
            "scrapers": [PEER],
            "agentNamespaces": ["sales"],
            "gatewayEgress": [{"ports": [{"port": 8080}]}],
            "workerEgress": [{"ports": [{"port": 443}]}],
            "dns": {"peers": [PEER], "ports": [5353]},
            "apiServer": {"peers": [{"ipBlock": {"cidr": "192.0.2.1/32"}}], "ports": [6443]},
            "modal": {"peers": [{"ipBlock": {"cidr": "192.0.2.2/32"}}], "ports": []},
        }
    },
    "monitored": {
        "monitoring": {
            "podMonitors": {"enabled": True, "labels": {"prometheus": "main"}, "interval": "15s"},
            "alerts": {"enabled": True, "labels": {"prometheus": "main"}},
        }
    },
    "modal elsewhere": {"operator": {"replicas": 1, "modalServerUrl": "http://modal.example:99"}},
    "apps stay": {"uninstall": {"stopModalApps": False}},
    "patient": {"uninstall": {"deadlineSeconds": 900}, "watchNamespaces": ["sales"]},
    "tested by a call": {
        "test": {"agent": "sales/front-desk", "keySecret": {"name": "callers", "key": "demo"}}
    },
}

disable_logging()


def rendered(values: dict[str, Any], name: str = "trunkline") -> Objects:
    """Everything the chart makes; the same object twice is a mistake."""
    found: Objects = {}
    for body in manifests(values, name):
        namespace = body["metadata"].get("namespace", "")
        key = body["kind"], f"{namespace}/{body['metadata']['name']}".lstrip("/")
        assert key not in found, key
        found[key] = body
    return found


def manifests(values: dict[str, Any], name: str = "trunkline") -> list[dict[str, Any]]:
    bodies: list[dict[str, Any]] = json.loads(_rendered(json.dumps(values), name))
    return bodies


@cache
def _rendered(values: str, name: str) -> str:
    """As text, so that no test can change what another gets."""
    files = Chart.load(str(CHART)).render(json.loads(values), name=name, namespace="calls")
    bodies = [
        body
        for path, text in files.items()
        if not path.endswith("NOTES.txt")
        for body in yaml.load_all(text, Loader=yaml.CSafeLoader)
        if body is not None
    ]
    return json.dumps(bodies)


def pod_of(body: dict[str, Any]) -> dict[str, Any] | None:
    """The pod's spec in a Pod, or in what makes pods."""
    if body["kind"] == "Pod":
        spec: dict[str, Any] = body["spec"]
        return spec
    if body["kind"] in ("Deployment", "Job"):
        spec = body["spec"]["template"]["spec"]
        return spec
    return None
