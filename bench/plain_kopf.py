"""What many would write first: an operator of `kopf.on.create`, `on.update` and `on.delete`. The peer of reconcile.py.

    python bench/plain_kopf.py NAMESPACE

It makes the same objects as Trunkline for an agent without calls (a Secret, a pod, a status), asynchronously, with
the generated client of Kubernetes, and with the settings that kopf's documentation recommends for production.
"""

import asyncio
import secrets
import sys
from typing import Any

import kopf
from kubernetes.aio import client, config

GROUP, VERSION, PLURAL = "trunkline.dev", "v1alpha1", "voiceagents"
AGENT_LABEL = f"{GROUP}/agent"
STARTING = {"ready": 0, "starting": 1, "draining": 0}


class Api:
    """The generated client, one for all handlers."""

    core: Any = None


@kopf.on.startup()
async def begin(settings: kopf.OperatorSettings, **_: Any) -> None:
    await config.load_kube_config()
    Api.core = client.CoreV1Api()
    # Annotations only, as the kind has no room for kopf in its status; no Events for handlers that succeed.
    prefix = f"plain.{GROUP}"
    settings.persistence.finalizer = f"{prefix}/finalizer"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=prefix)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=prefix)
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10


@kopf.on.cleanup()
async def end(**_: Any) -> None:
    await Api.core.api_client.close()


@kopf.on.login()
def login(**known: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_with_kubeconfig(**known)


@kopf.on.create(GROUP, VERSION, PLURAL)
async def created(
    body: kopf.Body, name: str, namespace: str | None, patch: kopf.Patch, **_: Any
) -> None:
    keys = {key: secrets.token_urlsafe(32) for key in ("worker-key", "ticket-key")}
    secret = {"metadata": {"name": f"{name}-trunkline"}, "stringData": keys}
    kopf.adopt(secret, owner=body)
    await Api.core.create_namespaced_secret(namespace, secret)
    await Api.core.create_namespaced_pod(namespace, pod(body))
    tell(body, patch)


@kopf.on.update(GROUP, VERSION, PLURAL)
async def updated(
    body: kopf.Body,
    name: str,
    namespace: str | None,
    old: Any,
    new: Any,
    patch: kopf.Patch,
    **_: Any,
) -> None:
    if old["spec"]["warm"]["image"] != new["spec"]["warm"]["image"]:
        await Api.core.delete_namespaced_pod(f"{name}-0", namespace)
        await Api.core.create_namespaced_pod(namespace, pod(body))
    tell(body, patch)


@kopf.on.delete(GROUP, VERSION, PLURAL)
async def deleted(name: str, namespace: str | None, **_: Any) -> None:
    await Api.core.delete_namespaced_pod(f"{name}-0", namespace)


def tell(body: kopf.Body, patch: kopf.Patch) -> None:
    patch.status["observedGeneration"] = body["metadata"]["generation"]
    patch.status["pods"] = STARTING
    patch.status["replicas"] = 1


def pod(body: kopf.Body) -> dict[str, Any]:
    """Of about the size of Trunkline's."""
    name = body["metadata"]["name"]
    made: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{name}-0", "labels": {AGENT_LABEL: name}},
        "spec": {
            "containers": [container(body)],
            "terminationGracePeriodSeconds": 1860,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
        },
    }
    kopf.adopt(made, owner=body)
    return made


def container(body: kopf.Body) -> dict[str, Any]:
    name = body["metadata"]["name"]
    key = {"secretKeyRef": {"name": f"{name}-trunkline", "key": "worker-key"}}
    ready, healthy = ({"httpGet": {"path": at, "port": 8081}} for at in ("/readyz", "/healthz"))
    return {
        "name": "worker",
        "image": body["spec"]["warm"]["image"] or "trunkline/worker:test",
        "env": [
            {"name": "AGENT", "value": f"{body['metadata']['namespace']}/{name}"},
            {"name": "SLOTS", "value": str(body["spec"]["warm"]["slotsPerPod"])},
            {"name": "WORKER_KEY", "valueFrom": key},
        ],
        "ports": [
            {"name": "data", "containerPort": 8080},
            {"name": "health", "containerPort": 8081},
        ],
        "startupProbe": {**ready, "periodSeconds": 1, "failureThreshold": 900},
        "readinessProbe": {**ready, "periodSeconds": 1},
        "livenessProbe": {**healthy, "periodSeconds": 10, "failureThreshold": 6},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }


if __name__ == "__main__":
    asyncio.run(kopf.operator(namespaces=[sys.argv[1]], standalone=True))
