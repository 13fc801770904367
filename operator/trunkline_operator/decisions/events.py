"""What an on-call person is told as Kubernetes Events: news between two looks at an agent, each once. Pure.

Most news is a condition that has another reason than before. The status before is read from the cluster, so an
operator that has restarted tells nothing twice. The rest comes from steps, which are taken once, and from pods that
went though nobody asked for it.

What comes and goes is told once in REPEAT_SECONDS, and an agent has at most BURST Events and then one a minute: the
API server keeps each for an hour, and nobody reads a flood.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from trunkline_operator.agent.spec import Json, VoiceAgent
from trunkline_operator.decisions.conditions import LONGEST_MESSAGE, Condition, Reason
from trunkline_operator.decisions.manifests import Installation
from trunkline_operator.decisions.plan import Plan, rfc3339
from trunkline_operator.decisions.steps import (
    DeletePod,
    Drain,
    IssueCertificate,
    RemoveFinalizer,
    Step,
    Undrain,
)
from trunkline_operator.decisions.view import View
from trunkline_operator.decisions.world import PodFacts, World
from trunkline_runtime.contract import GROUP, KIND, VERSION

REPEAT_SECONDS: Final = 600.0
# As many as the Kubernetes clients' own filter of spam lets pass for one object at once.
BURST: Final = 25
REFILL_SECONDS: Final = 60.0
COMPONENT: Final = "trunkline-operator"


class Kind(StrEnum):
    NORMAL = "Normal"
    WARNING = "Warning"


class News(StrEnum):
    """Reasons of Events that are no reasons of a condition."""

    POD_LOST = "PodLost"  # it ended, or was taken away, and the operator did not ask for it
    DRAIN_BEGAN = "DrainBegan"
    DRAIN_CANCELLED = "DrainCancelled"
    DRAIN_ENDED = "DrainEnded"
    CERTIFICATE_ISSUED = "CertificateIssued"
    BURST_DEPLOYED = "BurstDeployed"
    BURST_STOPPED = "BurstStopped"
    BURST_LEFT_BEHIND = "BurstLeftBehind"  # nobody could stop it


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One sentence about an agent. `about` is the pod that it speaks of, "" = the agent itself."""

    kind: Kind
    reason: str  # one word, by which people search
    message: str
    about: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What one look leaves for the next. `Memory()` is that of a new operator, which takes what it finds for old."""

    pods: frozenset[tuple[str, str]] | None = None  # name and uid of pods that should stay
    drains: frozenset[str] = frozenset()  # uids of pods that drain
    told: tuple[
        tuple[str, str, float], ...
    ] = ()  # reason, about and when, not older than REPEAT_SECONDS
    room: float = BURST  # Events that may be told at once
    at: float | None = None  # when that was


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look, once its steps were taken."""

    agent: VoiceAgent
    world: World
    plan: Plan
    taken: tuple[Step, ...]  # the steps that the API did not refuse
    installation: Installation
    now: float


WARNINGS: Final = frozenset(
    {
        Reason.SPEC_INVALID,
        Reason.INFEASIBLE,
        Reason.SHORTFALL,
        Reason.KEYS_MISSING,
        Reason.TOKEN_MISSING,
        Reason.POD_UNSCHEDULABLE,
        Reason.VOLUME_MISSING,
        Reason.POD_FAILING,
        Reason.NODE_NOT_READY,
        Reason.POD_UNREADY,
        Reason.POD_UNLINKED,
        Reason.PODS_REFUSED,
        Reason.TEMPLATE_REJECTED,
        Reason.ROLLOUT_BLOCKED,
        Reason.BURST_FAILING,
        Reason.SNAPSHOT_FALLBACK,
        Reason.REGION_DOWN,
        Reason.LIMIT_REACHED,
        Reason.CREDENTIALS_MISSING,
        Reason.BUDGET_SPENT,
        Reason.BUDGET_TOO_SMALL,
        Reason.PRICE_UNKNOWN,
        Reason.BILL_DIFFERS,
    }
)
"""Reasons of conditions that somebody must know of."""


# --- what is news ------------------------------------------------------------------------------------------


def of_status(before: Json, after: Json) -> Iterator[Event]:
    """Conditions whose reason is another. Ready is left out: it repeats what the others say."""
    old = {one["type"]: one["reason"] for one in before.get("conditions") or ()}
    for one in after.get("conditions") or ():
        reason, was = one["reason"], old.get(one["type"])
        if one["type"] == Condition.READY or reason == was:
            continue
        if reason in WARNINGS:
            yield Event(kind=Kind.WARNING, reason=reason, message=one["message"])
        elif was in WARNINGS:
            yield Event(kind=Kind.NORMAL, reason=reason, message=one["message"])
    yield from _of_app(before.get("burst") or {}, after.get("burst") or {})


def _of_app(before: Json, after: Json) -> Iterator[Event]:
    """What became of the app at Modal."""
    if after.get("hash") and after["hash"] != before.get("hash"):
        snapshot = after.get("snapshot") or "none"
        message = (
            f"app {after.get('app')} is deployed at Modal, and starts with snapshot {snapshot}"
        )
        yield Event(kind=Kind.NORMAL, reason=News.BURST_DEPLOYED, message=message)
    if before.get("app") and not after.get("app"):
        message = f"app {before['app']} is stopped at Modal"
        yield Event(kind=Kind.NORMAL, reason=News.BURST_STOPPED, message=message)


def of_look(look: Look, memory: Memory) -> Iterator[Event]:
    """What steps did, and what happened to pods without them."""
    view = View(agent=look.agent, world=look.world, now=look.now, installation=look.installation)
    pods = {pod.uid: pod for pod in view.pods}
    for step in look.taken:
        yield from _of_step(step, look, view, pods)
    if look.agent.deleted_at is None:  # else it may be the namespace that goes
        yield from _losses(pods, memory)
        yield from _foreign_drains(pods, memory)


def _of_step(step: Step, look: Look, view: View, pods: dict[str, PodFacts]) -> Iterator[Event]:
    match step:
        case Drain(name=name, uid=uid):
            message = (
                f"{name} takes no new call and goes after its last: {_cause(look, view, pods[uid])}"
            )
            yield Event(kind=Kind.NORMAL, reason=News.DRAIN_BEGAN, message=message, about=name)
        case Undrain(name=name):
            message = f"{name} takes calls again: it is wanted after all"
            yield Event(kind=Kind.NORMAL, reason=News.DRAIN_CANCELLED, message=message, about=name)
        case DeletePod(name=name, uid=uid) if pods[uid].finished:
            message = f"{name} has ended and is replaced: {pods[uid].trouble or pods[uid].phase}"
            yield Event(kind=Kind.WARNING, reason=News.POD_LOST, message=message, about=name)
        case DeletePod(name=name, uid=uid) if pods[uid].draining:
            message = f"{name} is drained and removed"
            yield Event(kind=Kind.NORMAL, reason=News.DRAIN_ENDED, message=message, about=name)
        case IssueCertificate(name=name, why=why):
            message = f"a new certificate for the workers is in Secret {name}: {why}"
            yield Event(kind=Kind.NORMAL, reason=News.CERTIFICATE_ISSUED, message=message)
        case RemoveFinalizer(left_behind=app) if app:
            message = f"app {app} may still run at Modal: stop it there with `modal app stop {app}`"
            yield Event(kind=Kind.WARNING, reason=News.BURST_LEFT_BEHIND, message=message)


def _cause(look: Look, view: View, pod: PodFacts) -> str:
    """Who wants the drain, and why."""
    if look.plan.scaling is None:
        return "the agent is being deleted"
    if view.stranded(pod):
        return "its certificate is of another CA than that of the gateways"
    if pod.node_leaving:
        return f"its node {pod.node} is to go: {pod.node_leaving}"
    if not view.current(pod):
        return "its template is older than the agent's"
    return f"{look.plan.scaling.pods} pods are wanted: {look.plan.scaling.reason}"


def _losses(pods: dict[str, PodFacts], memory: Memory) -> Iterator[Event]:
    """Pods that should have stayed and are going, or gone."""
    for name, uid in sorted(memory.pods or ()):
        pod = pods.get(uid)
        if pod is None or (pod.terminating and not pod.draining):
            gone = "is gone, and with it its calls"
            going = "is being deleted, and its calls must end within its grace period"
            how = gone if pod is None else going
            message = f"{name} {how}; the operator did not ask for it, and replaces it"
            yield Event(kind=Kind.WARNING, reason=News.POD_LOST, message=message, about=name)


def _foreign_drains(pods: dict[str, PodFacts], memory: Memory) -> Iterator[Event]:
    """Drains that began without a step of the operator."""
    for name, uid in sorted(memory.pods or ()):
        pod = pods.get(uid)
        if pod is not None and pod.draining and uid not in memory.drains:
            message = f"{name} takes no new call and goes after its last: somebody annotated it so"
            yield Event(kind=Kind.NORMAL, reason=News.DRAIN_BEGAN, message=message, about=name)


# --- what is told ------------------------------------------------------------------------------------------


def chosen(events: Iterable[Event], memory: Memory, now: float) -> tuple[tuple[Event, ...], Memory]:
    """Those that are neither repetitions nor too many, and the memory of them."""
    passed = 0.0 if memory.at is None else max(now - memory.at, 0.0)
    room = min(memory.room + passed / REFILL_SECONDS, float(BURST))
    told = {(one, about): at for one, about, at in memory.told if now - at < REPEAT_SECONDS}
    out: list[Event] = []
    for event in events:
        key = event.reason, event.about
        if key in told or room < 1:
            continue
        told[key], room = now, room - 1
        out.append(event)
    kept = tuple((reason, about, at) for (reason, about), at in told.items())
    return tuple(out), replace(memory, told=kept, room=room, at=now)


def remembered(look: Look, memory: Memory) -> Memory:
    """The memory with the pods of this look, as they are after its steps."""
    gone = {step.uid for step in look.taken if isinstance(step, DeletePod)}
    drained = {step.uid for step in look.taken if isinstance(step, Drain)}
    back = {step.uid for step in look.taken if isinstance(step, Undrain)}
    own = [pod for pod in look.world.pods if pod.owner == look.agent.uid and pod.uid not in gone]
    drains = {pod.uid for pod in own if pod.draining} - back | drained
    stay = {(pod.name, pod.uid) for pod in own if not (pod.terminating or pod.finished)}
    pods = frozenset((name, uid) for name, uid in stay if uid not in drains)
    return replace(memory, pods=pods, drains=frozenset(drains))


def manifest(event: Event, obj: Json, name: str, now: float) -> Json:
    """The Event as the API takes it; `obj` is the agent that it is about."""
    metadata, stamp = obj["metadata"], rfc3339(now)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": KIND,
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
        "type": event.kind.value,
        "reason": event.reason,
        "message": event.message[:LONGEST_MESSAGE],
        "source": {"component": COMPONENT},
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }
