"""Agents and what is seen of them, for tests of the operator's decisions."""

import copy
from typing import Any

from trunkline_operator.agent.parsing import parsed
from trunkline_operator.agent.spec import Region, VoiceAgent
from trunkline_operator.burst.standby import Scaling, Standing
from trunkline_operator.decisions.manifests import Installation, template_hash
from trunkline_operator.decisions.world import (
    BurstFacts,
    Phase,
    PodFacts,
    Traffic,
    WorkerFacts,
    World,
)
from trunkline_runtime.contract import FINALIZER

Json = dict[str, Any]

# Pods stay protected, unless a test is about that.
INSTALLATION = Installation(
    worker_image="worker:1", gateways="gateway:8081", build="1.0", idle_seconds=0
)
NOW = 1_800_000_000.0
DEADLINE = 1800 + 60
"""Seconds after which no call that was there can be: the usual maxSeconds, and a minute."""
BURST: Json = {"burst__modal__credentialsSecretRef__name": "modal"}
REST = Scaling(minimum=0, buffer=0, maximum=10, window=60)
DEPLOYED = BurstFacts(
    app="app",
    app_id="ap-1",
    urls={Region.US_EAST: "https://burst"},
    hash="old",
    standing=Standing(scalings={Region.US_EAST: REST}),
)


def an_object(**changes: Any) -> Json:
    """An agent as the API holds it; `warm__minPods=2` sets spec.warm.minPods, `metadata=…` adds."""
    metadata = {"name": "desk", "namespace": "ns", "uid": "uid-0001-0002", "generation": 1}
    metadata |= {"finalizers": [FINALIZER], **changes.pop("metadata", {})}
    spec: Json = {"engine": {"type": "loopback"}, "access": {"public": True}}
    for path, value in copy.deepcopy(changes).items():
        *parents, last = path.split("__")
        place = spec
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return {"metadata": metadata, "spec": spec}


def an_agent(**changes: Any) -> VoiceAgent:
    return parsed(an_object(**changes))


def a_pod(agent: VoiceAgent, ordinal: int, **changes: Any) -> PodFacts:
    """A pod of the agent's current template that runs and is ready."""
    facts: Json = {
        "name": f"{agent.name}-{ordinal}",
        "uid": f"pod-{ordinal}",
        "owner": agent.uid,
        "phase": Phase.RUNNING,
        "ready": True,
        "started": True,
        "protected": True,
        "template": template_hash(agent, INSTALLATION),
    }
    return PodFacts(**facts | changes)


def pending(agent: VoiceAgent, ordinal: int, **changes: Any) -> PodFacts:
    state = {"phase": Phase.PENDING, "ready": False, "started": False}
    return a_pod(agent, ordinal, **state | changes)


def a_world(
    pods: "list[PodFacts] | tuple[PodFacts, ...]" = (),
    busy: "dict[str, int] | None" = None,
    *,
    burst: BurstFacts = BurstFacts(stopped=True),  # noqa: B008 - frozen
    access: str = "",
    tokens: str = "",
    secret_exists: bool = True,
    slots: int = 4,
    **traffic: Any,
) -> World:
    """Pods, and the calls on them by name; a worker drains if its pod does, unless it is not in `busy`; each has `slots`."""
    busy = {pod.name: 0 for pod in pods if pod.ready} if busy is None else busy
    draining = {pod.name for pod in pods if pod.draining}
    workers = {
        name: WorkerFacts(slots=slots, busy=calls, draining=name in draining)
        for name, calls in busy.items()
    }
    facts: Json = {"known": True, "acknowledged": True, "workers": workers} | traffic
    return World(
        pods=tuple(pods),
        traffic=Traffic(**facts),
        secret_exists=secret_exists,
        burst=burst,
        access=access,
        tokens=tokens,
    )
