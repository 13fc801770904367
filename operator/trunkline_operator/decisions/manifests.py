"""Agent → bodies of what it owns in the cluster, and the hashes that say when they must be replaced.

Only what a running worker cannot change enters a hash: image, engine, slots and hardware. What changes per
call (greeting, replies, keys, limits of a call) travels with the call, so editing it restarts nothing.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from trunkline_operator.agent.policy import allowed_burst, pins
from trunkline_operator.agent.spec import (
    Engine,
    EngineType,
    Json,
    Quantization,
    Snapshot,
    VoiceAgent,
)
from trunkline_operator.config import EVICT_IDLE_SECONDS
from trunkline_operator.decisions.template import container_fields, pod_fields
from trunkline_operator.decisions.world import CONTAINER, DO_NOT_DISRUPT, SAFE_TO_EVICT
from trunkline_operator.scaling.prices import Prices
from trunkline_runtime.contract import (
    ANNOTATION_CA,
    ANNOTATION_TEMPLATE,
    AUTO_SLOTS,
    CA_CERT_FILE,
    ENV_AGENT,
    ENV_CONTEXT_END,
    ENV_CONTEXT_SECONDS,
    ENV_ENGINE,
    ENV_GATEWAYS,
    ENV_HEALTH_PORT,
    ENV_HOST,
    ENV_HUB_TOKEN,
    ENV_INT8,
    ENV_MAX_SECONDS,
    ENV_MODEL,
    ENV_PORT,
    ENV_SLOTS,
    ENV_STT_MODEL,
    ENV_TLS_CA,
    ENV_TLS_CERT,
    ENV_TLS_KEY,
    ENV_WORKER,
    ENV_WORKER_KEY,
    GROUP,
    HEALTH_PORT,
    HEALTHZ_PATH,
    KIND,
    LABEL_AGENT,
    LABEL_MANAGED_BY,
    MANAGED_BY,
    READYZ_PATH,
    TLS_CERT_FILE,
    TLS_KEY_FILE,
    VERSION,
    WORKER_PORT,
)

WORKER_KEY: Final = "worker-key"
TICKET_KEY: Final = "ticket-key"
"""Entries of the agent's own Secret."""

# A worker that is told to go ends its calls within maxSeconds; the rest is for saying goodbye.
GRACE_BEYOND_LAST_CALL: Final = 60
# Weights of the largest engine load in minutes from a cold disk. A worker that is not ready by then is stuck.
START_SECONDS: Final = 600
# Distroless' "nonroot"; any number but 0 will do, and the image need not know it.
USER: Final = 65532
# The only place where a worker may write. Moshi and an STT model are 18 GB in the Hub's cache, which is there
# (HOME is /tmp); a pod that has more than the limit is evicted, so the limit is for what goes astray.
TMP: Final = "/tmp"
TMP_VOLUME: Final = "trunkline-tmp"
TMP_LIMITS: Final[Mapping[EngineType, str]] = {EngineType.MOSHI: "64Gi"}
TMP_LIMIT: Final = "1Gi"  # of all others
# By it the cluster autoscaler passes over an emptyDir, which else keeps a pod where it is.
LOCAL_VOLUMES: Final = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"
# Modal's own limit for an app's name is 64 characters.
LONGEST_APP_NAME: Final = 63


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """What all agents of one operator share."""

    worker_image: str  # for agents that name none
    moshi_image: str = ""  # likewise, for the Moshi engine; "" = the same
    gateways: str  # host:port,… ; handed to workers as it is
    build: str  # version of this distribution; a new one redeploys burst
    region: str = ""  # its own, of `warm.regions`; "" = it was told none
    ca: str = ""  # identity of the CA of all links; "" = plain links
    idle_seconds: float = EVICT_IDLE_SECONDS  # until a pod without calls may be evicted; 0 = never
    prices: Prices = field(
        default_factory=Prices
    )  # of pods and of burst; none = the autoscaler does without


def secret_name(agent: VoiceAgent) -> str:
    """The agent's own Secret."""
    return f"{agent.name}-trunkline"


def secret(agent: VoiceAgent, worker_key: str, ticket_key: str) -> Json:
    """The agent's own Secret with these two keys."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _metadata(agent, secret_name(agent)),
        "type": "Opaque",
        "data": encoded({WORKER_KEY: worker_key, TICKET_KEY: ticket_key}),
    }


def encoded(entries: Mapping[str, str]) -> dict[str, str]:
    """Texts as the `data` of a Secret."""
    return {entry: base64.b64encode(text.encode()).decode() for entry, text in entries.items()}


def secret_strings(secret: Json) -> dict[str, str]:
    """The entries of a Secret as text, without a last newline; one that is not UTF-8 is left out."""
    texts = {}
    for entry, data in (secret.get("data") or {}).items():
        try:
            # A key that was written with `echo` into a file ends in a newline that nobody means.
            texts[entry] = base64.b64decode(data).decode().removesuffix("\n")
        except UnicodeDecodeError:
            continue
    return texts


def worker_pod(agent: VoiceAgent, ordinal: int, installation: Installation) -> Json:
    """One warm pod. Its termination grace lets every call on it end by itself."""
    metadata = _metadata(agent, f"{agent.name}-{ordinal}")
    metadata["annotations"] = {
        ANNOTATION_TEMPLATE: template_hash(agent, installation),
        **protection(agent),
    }
    if installation.ca:
        metadata["annotations"][ANNOTATION_CA] = installation.ca
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            **pod_fields(agent),
            "containers": [_container(agent, installation)],
            "volumes": [*agent.warm.template.volumes, *_tmp(agent)],
            "terminationGracePeriodSeconds": agent.session.max_seconds + GRACE_BEYOND_LAST_CALL,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
        },
    }


def protection(agent: VoiceAgent) -> dict[str, str]:
    """Annotations by which no autoscaler of nodes evicts the pod (`eviction` takes them away), nor, once it may, is
    kept from it by folders that are gone with every pod.
    """
    volumes = [*agent.warm.template.volumes, *_tmp(agent)]
    folders = ",".join(volume["name"] for volume in volumes if "emptyDir" in volume)
    local = {LOCAL_VOLUMES: folders} if folders else {}
    return {SAFE_TO_EVICT: "false", DO_NOT_DISRUPT: "true", **local}


def _tmp(agent: VoiceAgent) -> list[Json]:
    """The volume in which a worker may write; none where the agent's template mounts one of its own there."""
    if any(mount["mountPath"].rstrip("/") == TMP for mount in agent.warm.template.volume_mounts):
        return []
    limit = TMP_LIMITS.get(agent.engine.type, TMP_LIMIT)
    return [{"name": TMP_VOLUME, "emptyDir": {"sizeLimit": limit}}]


def owned_by(agent: VoiceAgent) -> Json:
    """The reference by which an object goes when the agent goes."""
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "name": agent.name,
        "uid": agent.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def _metadata(agent: VoiceAgent, name: str) -> Json:
    """Of an object that the agent owns."""
    return {
        "name": name,
        "namespace": agent.namespace,
        "labels": {LABEL_AGENT: agent.name, LABEL_MANAGED_BY: MANAGED_BY},
        "ownerReferences": [owned_by(agent)],
    }


def _container(agent: VoiceAgent, installation: Installation) -> Json:
    more = container_fields(agent)
    return {
        **more,
        "name": CONTAINER,
        "image": image_of(agent, installation),
        "env": [*_environment(agent, installation), *more.get("env", ())],
        "ports": [
            {"name": "data", "containerPort": WORKER_PORT},
            {"name": "health", "containerPort": HEALTH_PORT},
        ],
        # Started = has been ready once: before that, a pod holds no call and may go at once.
        "startupProbe": _probe(READYZ_PATH, period=1, failures=START_SECONDS),
        "readinessProbe": _probe(READYZ_PATH, period=1, failures=3),
        # A restart ends every call on the pod, so only a worker that is silent for a minute is restarted.
        "livenessProbe": _probe(HEALTHZ_PATH, period=10, failures=6),
        "resources": _resources(agent),
        "volumeMounts": [
            *agent.warm.template.volume_mounts,
            *({"name": volume["name"], "mountPath": TMP} for volume in _tmp(agent)),
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def image_of(agent: VoiceAgent, installation: Installation) -> str:
    """What its pods run."""
    if agent.engine.type is EngineType.MOSHI and installation.moshi_image:
        return agent.warm.image or installation.moshi_image
    return agent.warm.image or installation.worker_image


def _environment(agent: VoiceAgent, installation: Installation) -> list[Json]:
    plain = {
        ENV_AGENT: agent.key,
        **engine_environment(agent.engine),
        ENV_SLOTS: _slots(agent),
        ENV_PORT: str(WORKER_PORT),
        ENV_HEALTH_PORT: str(HEALTH_PORT),
        ENV_GATEWAYS: installation.gateways,
        ENV_MAX_SECONDS: str(agent.session.max_seconds),
    }
    own = {ENV_WORKER: "metadata.name", ENV_HOST: "status.podIP"}
    secret = secret_name(agent)
    kept = {ENV_WORKER_KEY: (secret, WORKER_KEY)}
    if installation.ca:
        files = {ENV_TLS_CA: CA_CERT_FILE, ENV_TLS_CERT: TLS_CERT_FILE, ENV_TLS_KEY: TLS_KEY_FILE}
        kept |= {name: (secret, file) for name, file in files.items()}
    if agent.engine.token_secret:
        kept |= {ENV_HUB_TOKEN: (agent.engine.token_secret, "token")}
    return [
        *({"name": name, "value": value} for name, value in plain.items()),
        *(
            {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
            for name, path in own.items()
        ),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": entry}}}
            for name, (secret, entry) in kept.items()
        ),
    ]


def _slots(agent: VoiceAgent) -> str:
    """As a worker is told; what it has measured does not replace it."""
    return AUTO_SLOTS if agent.warm.slots_auto else str(agent.warm.slots_per_pod)


def engine_environment(engine: Engine) -> dict[str, str]:
    """What a worker must know of its engine to load it, in a pod and at Modal alike."""
    known = {ENV_ENGINE: engine.type.value}
    if engine.type is EngineType.MOSHI:
        known |= {
            ENV_MODEL: engine.model,
            ENV_STT_MODEL: engine.stt,
            ENV_INT8: "1" if engine.quantization is Quantization.INT8 else "0",
            ENV_CONTEXT_SECONDS: str(engine.context_seconds),
            ENV_CONTEXT_END: engine.context_end.value,
        }
    return known


def _probe(path: str, *, period: int, failures: int) -> Json:
    return {
        "httpGet": {"path": path, "port": "health"},
        "periodSeconds": period,
        "timeoutSeconds": 3,
        "failureThreshold": failures,
    }


def _resources(agent: VoiceAgent) -> Json:
    """A GPU stands in the limits; Kubernetes then requests as many."""
    gpu = agent.warm.gpu
    gpus = {gpu.resource: str(gpu.count)} if gpu.count else {}
    groups = {
        "requests": dict(agent.warm.resources.requests),
        "limits": {**agent.warm.resources.limits, **gpus},
    }
    return {name: amounts for name, amounts in groups.items() if amounts}


def template_hash(agent: VoiceAgent, installation: Installation) -> str:
    """Of what a pod cannot change while it runs. A pod with another one is rolled."""
    return digest(
        {
            "image": image_of(agent, installation),
            "engine": engine_environment(agent.engine),
            "slots": _slots(agent),
            "resources": _resources(agent),
            **pod_fields(agent),
            "container": container_fields(agent),
        }
    )


def burst_app(agent: VoiceAgent) -> str:
    """The name of its app at Modal."""
    return app_name(agent.namespace, agent.name, agent.uid)


def app_name(namespace: str, name: str, uid: str) -> str:
    """The name of an agent's app at Modal. The uid keeps two clusters in one workspace apart."""
    tail = f"-{uid[:8]}"
    head = f"{MANAGED_BY}-{namespace}-{name}"
    return head[: LONGEST_APP_NAME - len(tail)] + tail


def burst_hash(agent: VoiceAgent, installation: Installation, level: Snapshot | None = None) -> str:
    """Of all that a deployment at Modal depends on; "" where none is asked for or allowed.

    How many containers there may be is a setting of the live app (`burst.standby`), so it is not among it.
    `level` is the snapshot that the breaker leaves of what is asked for; None = all of it.
    """
    burst = allowed_burst(agent)
    if burst is None:
        return ""
    fallen = {} if level in (None, burst.snapshot) else {"level": level}
    return digest(
        fallen
        | {
            "app": burst_app(agent),
            "build": installation.build,
            "engine": engine_environment(agent.engine),
            **({"hubToken": agent.engine.token_secret} if agent.engine.token_secret else {}),
            "maxSeconds": agent.session.max_seconds,
            "gpu": burst.gpu,
            "regions": burst.regions,
            "pinned": pins(agent, burst),
            "slots": burst.slots_per_container,
            "snapshot": burst.snapshot,
            "environment": burst.environment,
            "image": burst.image,
        }
    )


def digest(content: Mapping[str, Any]) -> str:
    """Short and stable: equal content has an equal digest, in every process."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
