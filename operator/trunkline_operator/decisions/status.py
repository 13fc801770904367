"""Agent and world → the status that people read. Conditions report; nothing branches on them."""

from collections.abc import Iterator
from typing import Final

from trunkline_operator.agent.policy import ladder
from trunkline_operator.agent.spec import Json, SpecError, VoiceAgent
from trunkline_operator.decisions import spending
from trunkline_operator.decisions.burst_condition import burst_ready, within_budget
from trunkline_operator.decisions.conditions import LONGEST_MESSAGE, Condition, Reason, Verdict
from trunkline_operator.decisions.plan import Plan, rfc3339
from trunkline_operator.decisions.warm_condition import answering, warm_ready
from trunkline_operator.decisions.world import BurstFacts, PodFacts, Refusal, World
from trunkline_runtime.contract import LABEL_AGENT

# How long free slots last is told in these steps, so that it is not another number at every look.
RUNWAYS: Final = (3600, 1800, 600, 300, 120, 60, 30, 10)


def reported(
    agent: VoiceAgent,
    world: World,
    plan: Plan,
    previous: Json,
    now: float,
    refused: Refusal | None = None,
) -> Json:
    """The whole `status`. Equal to the previous one when nothing changed, so write it only if it differs.

    `refused` is what the API said when it did not let a pod be made, None = it did.
    """
    pods = [pod for pod in world.pods if pod.owner == agent.uid and not pod.finished]
    verdicts = list(_verdicts(agent, world, plan, pods, refused))
    budget = within_budget(agent, world, previous, now)
    verdicts[-1:] = [budget, _solvent(verdicts[-1], budget)]
    return {
        "observedGeneration": agent.generation,
        "conditions": _conditions(verdicts, previous, agent.generation, now),
        "selector": f"{LABEL_AGENT}={agent.name}",
        **_counts(plan, world, pods),
        **_decision(plan, previous, now),
        "burst": _burst(world.burst, world.traffic.burst) | _spend(world, previous, now),
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
    live = "calls", "spend", "billed"
    burst = {k: v for k, v in (status.get("burst") or {}).items() if k not in live}
    total = (status.get("slots") or {}).get("total")
    return {**status, "burst": burst, "slots": total, "cost": None}


# --- numbers ---------------------------------------------------------------------------------------------


def _counts(plan: Plan, world: World, pods: list[PodFacts]) -> Json:
    """Pods and slots. Slots on draining pods are busy or gone, never free."""
    workers = world.traffic.workers
    serving = [workers[pod.name] for pod in pods if pod.active and pod.name in workers]
    ending = [workers[pod.name] for pod in pods if not pod.active and pod.name in workers]
    total = sum(worker.slots for worker in serving)
    free = total - sum(worker.busy for worker in serving)
    return {
        "replicas": sum(pod.active for pod in pods),
        "readyReplicas": sum(pod.active and pod.ready for pod in pods),
        "pods": {
            "ready": sum(pod.active and pod.ready for pod in pods),
            "starting": sum(pod.active and not pod.ready for pod in pods),
            "draining": sum(pod.draining or pod.terminating for pod in pods),
        },
        "slots": {
            "total": total,
            "busy": sum(worker.busy for worker in (*serving, *ending)),
            "free": free,
            **_runway(free, plan.memory.flow.growth if total else 0.0),
        },
    }


def _runway(free: int, growth: float) -> Json:
    """How long free slots last if calls go on coming and ending so; nothing where that is long or for ever."""
    if growth <= 0 or free / growth >= RUNWAYS[0]:
        return {}
    left = free / growth
    return {"runwaySeconds": next((step for step in RUNWAYS if step <= left), 0)}


def _decision(plan: Plan, previous: Json, now: float) -> Json:
    """When the wanted number of pods last changed, and why then. The reason of the moment has other numbers
    with every call, and would be written as often.
    """
    last, scaling = previous.get("lastDecision") or {}, plan.scaling
    if scaling is None or last.get("pods") == scaling.pods:
        return {"lastDecision": last} if last else {}
    reason = scaling.reason[:LONGEST_MESSAGE]
    return {"lastDecision": {"time": rfc3339(now), "pods": scaling.pods, "reason": reason}}


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
    regions = [{"name": str(region), "url": url} for region, url in facts.urls.items()]
    made: Json = {"calls": calls} | {name: text for name, text in texts.items() if text}
    if facts.first_boot:
        made["firstBootSeconds"] = round(facts.first_boot, 1)
    if limit := facts.limit:
        made["limit"] = {
            "containers": limit.containers,
            "since": rfc3339(limit.since),
            "until": rfc3339(limit.until),
            "refusals": limit.refusals,
        }
    return made | ({"regions": regions} if regions else {})


def _spend(world: World, previous: Json, now: float) -> Json:
    before = (previous.get("burst") or {}).get("spend") or {}
    told = spending.told(world.burst, world.traffic.burst, before, now)
    bill = spending.billed(world.burst.billed, now)
    return ({"spend": told} if told else {}) | ({"billed": bill} if bill else {})


# --- conditions ------------------------------------------------------------------------------------------


def _verdicts(
    agent: VoiceAgent, world: World, plan: Plan, pods: list[PodFacts], refused: Refusal | None
) -> Iterator[Verdict]:
    accepted, burst = _accepted(agent, world), burst_ready(agent, world)
    warm = warm_ready(agent, plan, pods, refused, overflow=burst[1] is True)
    yield accepted
    yield warm
    yield burst
    ready = _ready(agent, accepted, warm, burst, answering(plan, pods))
    yield _heard(ready) if world.traffic.silent else ready


def _accepted(agent: VoiceAgent, world: World) -> Verdict:
    """That nobody may call is told here too: the spec names a Secret that is not as it should be."""
    allowed = ladder(agent)
    if agent.deleted_at is not None:
        return Condition.ACCEPTED, True, Reason.DELETING, "no new call is taken"
    if world.access:
        return (
            Condition.ACCEPTED,
            False,
            Reason.KEYS_MISSING,
            f"no key is good: {world.access}; until then callers with one are refused",
        )
    if world.tokens:
        return Condition.ACCEPTED, False, Reason.TOKEN_MISSING, world.tokens
    message = "; ".join((allowed.words, *allowed.warnings))
    if short := allowed.short:
        reason = Reason.INFEASIBLE if short.never else Reason.SHORTFALL
        return Condition.ACCEPTED, not short.never, reason, f"{short.words}; {message}"
    return Condition.ACCEPTED, True, Reason.ACCEPTED, message


def _solvent(ready: Verdict, budget: Verdict) -> Verdict:
    """An agent whose budget is spent lacks a rung."""
    if budget[1] or not ready[1]:
        return ready
    return Condition.READY, False, budget[2], budget[3]


def _ready(
    agent: VoiceAgent, accepted: Verdict, warm: Verdict, burst: Verdict, ready: int
) -> Verdict:
    """Every rung that is declared takes calls. Pods above `minPods` may still be starting."""
    asked = ladder(agent)
    # Too few slots for all who are expected are still slots for those who come.
    wrong = not accepted[1] and accepted[2] is not Reason.INFEASIBLE
    broken = [accepted] if wrong or agent.deleted_at is not None else []
    broken += [warm] if asked.warm and ready < agent.warm.min_pods else []
    broken += [burst] if asked.burst and not burst[1] else []
    if broken:
        _, _, reason, words = broken[0]
        return Condition.READY, False, reason, words
    if not (asked.warm or asked.burst or asked.upstream):
        words = "; ".join((asked.words, *asked.warnings))
        return Condition.READY, False, Reason.NOT_SERVED_HERE, words
    if not (ready or burst[1]):
        words = "no pod is ready and there is no burst: raise warm.minPods or add burst.modal"
        return Condition.READY, False, Reason.NO_CAPACITY, words
    return Condition.READY, True, Reason.ANSWERING, "calls are answered"


def _heard(ready: Verdict) -> Verdict:
    """What may be said without a word of any gateway. Each goes by the routes that it has, so calls may be answered."""
    if not ready[1]:
        return ready
    words = (
        "no gateway reports to the operator, so it is not known whether calls are answered, and no change reaches "
        "them: see whether the gateway's pods run, and what the operator's log says of its links"
    )
    return Condition.READY, None, Reason.GATEWAYS_SILENT, words


def _conditions(verdicts: list[Verdict], previous: Json, generation: int, now: float) -> list[Json]:
    """In Kubernetes' shape. A time tells when the status changed, not the words."""
    before = {c["type"]: c for c in previous.get("conditions") or ()}
    stamp = rfc3339(now)

    def condition(verdict: Verdict) -> Json:
        kind, holds, reason, message = verdict
        status = "Unknown" if holds is None else str(holds)
        old = before.get(kind, {})
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
