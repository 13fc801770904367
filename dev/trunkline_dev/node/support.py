"""What a pod asks for that processes cannot give it. Pure.

Ignored, because a process on one trusted machine does not miss it: security contexts and runtime
classes, pull policies and secrets, DNS, priorities and the spread over nodes, limits of resources
(requests are counted when a pod is placed), the service account and its token's mount, and an emptyDir at
/tmp, for the machine's own is there.
Everything else that is not understood is refused: the lists below name what is, so that a field
which comes with a newer Kubernetes is never passed over in silence.
"""

from collections.abc import Iterator
from typing import Any, Final

Json = dict[str, Any]

PROBES: Final = "startupProbe", "readinessProbe", "livenessProbe"

_POD_FIELDS: Final = frozenset({
    "containers", "nodeName", "nodeSelector", "restartPolicy", "terminationGracePeriodSeconds",
    "tolerations",
    # Looked at below.
    "affinity", "volumes",
    # Ignored.
    "automountServiceAccountToken", "dnsPolicy", "enableServiceLinks", "imagePullSecrets",
    "preemptionPolicy", "priority", "priorityClassName", "runtimeClassName", "schedulerName",
    "securityContext", "serviceAccount", "serviceAccountName",
    "topologySpreadConstraints",
})  # fmt: skip
_CONTAINER_FIELDS: Final = frozenset({
    "args", "command", "env", "envFrom", "image", "name", "ports", "workingDir", *PROBES,
    # Looked at below.
    "resources", "volumeMounts",
    # Ignored.
    "imagePullPolicy", "securityContext", "terminationMessagePath", "terminationMessagePolicy",
})  # fmt: skip
_PROBE_FIELDS: Final = frozenset({
    "failureThreshold", "httpGet", "initialDelaySeconds", "periodSeconds", "successThreshold",
    "terminationGracePeriodSeconds", "timeoutSeconds",
})  # fmt: skip
_TOKEN_VOLUME: Final = "kube-api-access-"
"""What the volume is called that the API server adds for the service account's token."""


def refusal(spec: Json) -> str | None:
    """One sentence about all that a pod's spec asks for in vain, or None."""
    if fields := [*_of_pod(spec)]:
        return f"the development node runs containers as processes and has no {', '.join(fields)}"
    return None


def _of_pod(spec: Json) -> Iterator[str]:
    yield from _strange(spec, _POD_FIELDS, "spec")
    for kind, rules in (spec.get("affinity") or {}).items():
        for rule in rules or {}:
            # One node satisfies every preference, but not every requirement.
            if rule.startswith("required"):
                yield f"spec.affinity.{kind}.{rule}"
    known = {
        volume["name"]
        for volume in spec.get("volumes") or []
        if volume["name"].startswith(_TOKEN_VOLUME) or _is_tmp(volume, spec)
    }
    for volume in spec.get("volumes") or []:
        if volume["name"] not in known:
            yield f"spec.volumes[{volume['name']}]"
    for container in spec["containers"]:
        yield from _of_container(container, known, f"container {container['name']}'s ")


def _is_tmp(volume: Json, spec: Json) -> bool:
    """Whether it is an empty folder that is mounted as /tmp, and nowhere else."""
    mounts = (
        mount for container in spec["containers"] for mount in container.get("volumeMounts") or []
    )
    places = {mount["mountPath"] for mount in mounts if mount["name"] == volume["name"]}
    return "emptyDir" in volume and places == {"/tmp"}


def _of_container(container: Json, volumes: set[str], whose: str) -> Iterator[str]:
    yield from (whose + field for field in _strange(container, _CONTAINER_FIELDS))
    for mount in container.get("volumeMounts") or []:
        if mount["name"] not in volumes:
            yield f"{whose}volumeMounts[{mount['name']}]"
    if container.get("resources", {}).get("claims"):
        yield f"{whose}resources.claims"
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield f"{whose}hostPort {port['hostPort']}"
    for kind in PROBES:
        if probe := container.get(kind):
            yield from (whose + field for field in _strange(probe, _PROBE_FIELDS, kind))


def _strange(thing: Json, known: frozenset[str], where: str = "") -> Iterator[str]:
    for field, value in thing.items():
        if field not in known and value not in (None, False, "", {}, []):
            yield f"{where}.{field}" if where else field
