"""Agent and world → the status that people read. Conditions report; nothing branches on them."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Final

from trunkline_operator.plan import Plan, rfc3339
from trunkline_operator.policy import ladder
from trunkline_operator.spec import Json, SpecError, VoiceAgent
from trunkline_operator.world import BurstFacts, PodFacts, World
from trunkline_runtime.contract import LABEL_AGENT


class Condition(StrEnum):
    """The types, in the order in which they are listed."""

    ACCEPTED = "Accepted"  # the spec makes sense
    WARM_READY = "WarmReady"  # the wanted pods are there and ready
    BURST_READY = "BurstReady"  # calls may go to Modal
    READY = "Ready"  # every rung that is declared takes calls


class Reason(StrEnum):
    """Why a condition is as it is; the message says it in words."""

    ACCEPTED = "Accepted"
    SPEC_INVALID = "SpecInvalid"
    KEYS_MISSING = "KeysMissing"  # the Secret of callers' keys cannot be read
    DELETING = "Deleting"
    PODS_READY = "PodsReady"
    NO_PODS_WANTED = "NoPodsWanted"
    PODS_STARTING = "PodsStarting"
    POD_UNSCHEDULABLE = "PodUnschedulable"
    POD_FAILING = "PodFailing"  # image pull, crash loop, wrong configuration
    ROLLOUT_BLOCKED = "RolloutBlocked"  # an old pod has calls and there is no room for a new one
    BURST_READY = "BurstReady"
    BURST_OFF = "BurstOff"  # none is asked for, or policy forbids it
    BURST_DEPLOYING = "BurstDeploying"
    BURST_FAILING = "BurstFailing"
    SNAPSHOT_FALLBACK = "SnapshotFallback"  # calls are taken, by containers that start slower
    CREDENTIALS_MISSING = "CredentialsMissing"
    ANSWERING = "Answering"
    NO_CAPACITY = "NoCapacity"


# Kubernetes allows 32 KiB in a message; a line that a person reads is shorter.
LONGEST_MESSAGE: Final = 1024

Verdict = tuple[Condition, bool, Reason, str]


def reported(agent: VoiceAgent, world: World, plan: Plan, previous: Json, now: float) -> Json:
    """The whole `status`. Equal to the previous one when nothing changed, so write it only if it differs."""
    pods = [pod for pod in world.pods if pod.owner == agent.uid and not pod.finished]
    verdicts = list(_verdicts(agent, world, plan, pods))
    return {
        "observedGeneration": agent.generation,
        "conditions": _conditions(verdicts, previous, agent.generation, now),
        "selector": f"{LABEL_AGENT}={agent.name}",
        **_counts(agent, world, pods),
        "burst": _burst(world.burst, world.traffic.burst),
    }


def rejected(obj: Json, error: SpecError, now: float) -> Json:
    """The whole `status` of an object that makes no sense: what was known, and Accepted = False.

    Nothing is changed for such an object, so its pods go on and their numbers stand.
    """
    previous: Json = obj.get("status") or {}
    generation = obj["metadata"].get("generation", 1)
    verdict = (
        Condition.ACCEPTED,
        False,
        Reason.SPEC_INVALID,
        f"{error}; nothing is changed until then",
    )
    fresh = _conditions([verdict], previous, generation, now)
    others = [c for c in previous.get("conditions") or () if c["type"] != Condition.ACCEPTED]
    return {**previous, "observedGeneration": generation, "conditions": [*fresh, *others]}


def only_numbers_differ(old: Json, new: Json) -> bool:
    """Only live numbers changed (busy, free, calls): that is worth a write each 15 s at most."""
    return _without_numbers(old) == _without_numbers(new)


def _without_numbers(status: Json) -> Json:
    burst = {k: v for k, v in (status.get("burst") or {}).items() if k != "calls"}
    total = (status.get("slots") or {}).get("total")
    return {**status, "burst": burst, "slots": total}


# --- numbers ---------------------------------------------------------------------------------------------


def _counts(agent: VoiceAgent, world: World, pods: list[PodFacts]) -> Json:
    """Pods and slots. Slots on draining pods are busy or gone, never free."""
    workers = world.traffic.workers
    serving = [workers[pod.name] for pod in pods if pod.active and pod.name in workers]
    ending = [workers[pod.name] for pod in pods if not pod.active and pod.name in workers]
    total = sum(worker.slots for worker in serving)
    return {
        "replicas": sum(pod.active for pod in pods),
        "readyReplicas": sum(pod.active and pod.ready for pod in pods),
        "pods": {
            "ready": sum(pod.active and pod.ready for pod in pods),
            "starting": sum(pod.active and not pod.ready for pod in pods),
            "draining": sum(not pod.active for pod in pods),
        },
        "slots": {
            "total": total,
            "busy": sum(worker.busy for worker in (*serving, *ending)),
            "free": total - sum(worker.busy for worker in serving),
        },
    }


def _burst(facts: BurstFacts, calls: int) -> Json:
    """Texts that are empty are left out, so that `kubectl get -o yaml` shows what there is."""
    texts = {
        "app": facts.app,
        "appId": facts.app_id,
        "url": facts.url,
        "hash": facts.hash,
        "snapshot": facts.snapshot,
        "message": facts.credentials or facts.message,
    }
    return {"calls": calls} | {name: text for name, text in texts.items() if text}


# --- conditions ------------------------------------------------------------------------------------------


def _verdicts(
    agent: VoiceAgent, world: World, plan: Plan, pods: list[PodFacts]
) -> Iterator[Verdict]:
    accepted, warm = _accepted(agent, world), _warm(plan, pods)
    burst = _burst_ready(agent, world)
    yield accepted
    yield warm
    yield burst
    yield _ready(agent, accepted, warm, burst, pods)


def _accepted(agent: VoiceAgent, world: World) -> Verdict:
    """That nobody may call is told here too: the spec names a Secret that is not as it should be."""
    allowed = ladder(agent)
    if agent.deleted_at is not None:
        return Condition.ACCEPTED, True, Reason.DELETING, "no new call is taken"
    if world.access:
        return Condition.ACCEPTED, False, Reason.KEYS_MISSING, f"no key is good: {world.access}"
    message = "; ".join((allowed.words, *allowed.warnings))
    return Condition.ACCEPTED, True, Reason.ACCEPTED, message


def _warm(plan: Plan, pods: list[PodFacts]) -> Verdict:
    """Live numbers stay out of the message: it would be written again with every call."""
    if plan.scaling is None:
        words = f"{len(pods)} pods are left, and each ends with its last call"
        return Condition.WARM_READY, False, Reason.DELETING, words
    wanted = plan.scaling.pods
    ready = sum(pod.active and pod.ready for pod in pods)
    count = f"{ready} of {wanted} pods are ready"
    if ready >= wanted:
        if plan.blocked:
            words = f"{count}; {plan.outdated} of an older template stay until their calls end"
            help_ = "raise warm.maxPods or add burst.modal to replace them sooner"
            return Condition.WARM_READY, True, Reason.ROLLOUT_BLOCKED, f"{words}: {help_}"
        reason = Reason.PODS_READY if wanted else Reason.NO_PODS_WANTED
        advice = plan.scaling.advice
        return Condition.WARM_READY, True, reason, f"{count}; {advice}" if advice else count
    for pod in pods:
        if pod.active and not pod.ready and (pod.unschedulable or pod.trouble):
            reason = Reason.POD_UNSCHEDULABLE if pod.unschedulable else Reason.POD_FAILING
            words = f"{count}; {pod.name}: {pod.unschedulable or pod.trouble}"
            return Condition.WARM_READY, False, reason, words
    return Condition.WARM_READY, False, Reason.PODS_STARTING, count


def _burst_ready(agent: VoiceAgent, world: World) -> Verdict:
    facts, burst = world.burst, ladder(agent).burst
    if burst is None:
        words = "calls stay in the cluster" if agent.burst else "burst.modal is not set"
        return Condition.BURST_READY, False, Reason.BURST_OFF, words
    if failure := facts.message if facts.failures else world.traffic.burst_error:
        old = "the last deployment goes on; " if facts.url and facts.failures else ""
        return Condition.BURST_READY, False, Reason.BURST_FAILING, old + failure
    if facts.credentials:
        return Condition.BURST_READY, False, Reason.CREDENTIALS_MISSING, facts.credentials
    if not facts.url:
        words = "the first container starts" if facts.app else "the app is being deployed"
        return Condition.BURST_READY, False, Reason.BURST_DEPLOYING, words
    words = f"app {facts.app} takes calls in {burst.region}"
    if (breaker := facts.breaker) and breaker.fallen:
        words += (
            f"; its containers start with snapshot {breaker.level} because restores from "
            f"{breaker.asked} failed, tried again after {breaker.wait / 60:g} minutes"
        )
        return Condition.BURST_READY, True, Reason.SNAPSHOT_FALLBACK, words
    return Condition.BURST_READY, True, Reason.BURST_READY, words


def _ready(
    agent: VoiceAgent, accepted: Verdict, warm: Verdict, burst: Verdict, pods: list[PodFacts]
) -> Verdict:
    """Every rung that is declared takes calls. Pods above `minPods` may still be starting."""
    ready = sum(pod.active and pod.ready for pod in pods)
    asked = ladder(agent)
    broken = [accepted] if not accepted[1] or agent.deleted_at is not None else []
    broken += [warm] if asked.warm and ready < agent.warm.min_pods else []
    broken += [burst] if asked.burst and not burst[1] else []
    if broken:
        _, _, reason, words = broken[0]
        return Condition.READY, False, reason, words
    if not (ready or burst[1]):
        words = "no pod is ready and there is no burst: raise warm.minPods or add burst.modal"
        return Condition.READY, False, Reason.NO_CAPACITY, words
    return Condition.READY, True, Reason.ANSWERING, "calls are answered"


def _conditions(verdicts: list[Verdict], previous: Json, generation: int, now: float) -> list[Json]:
    """In Kubernetes' shape. A time tells when the status changed, not the words."""
    before = {c["type"]: c for c in previous.get("conditions") or ()}
    stamp = rfc3339(now)

    def condition(verdict: Verdict) -> Json:
        kind, holds, reason, message = verdict
        status, old = "True" if holds else "False", before.get(kind, {})
        same = old.get("status") == status
        return {
            "type": kind.value,
            "status": status,
            "reason": reason.value,
            "message": message[:LONGEST_MESSAGE],
            "lastTransitionTime": old.get("lastTransitionTime", stamp) if same else stamp,
            "observedGeneration": generation,
        }

    return [condition(verdict) for verdict in verdicts]
