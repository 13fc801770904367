"""Agent and world → the status that people read. Conditions report; nothing branches on them."""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Final

from trunkline_operator.agent.policy import elsewhere, ladder
from trunkline_operator.agent.spec import Budget, Json, SpecError, VoiceAgent
from trunkline_operator.decisions import spending
from trunkline_operator.decisions.plan import CREDENTIALS_LOOK, Plan, retry_wait, rfc3339
from trunkline_operator.decisions.template import node_selector
from trunkline_operator.decisions.world import BurstFacts, PodFacts, Refusal, World
from trunkline_operator.scaling import spend
from trunkline_runtime.contract import LABEL_AGENT


class Condition(StrEnum):
    """The types, in the order in which they are listed."""

    ACCEPTED = "Accepted"  # the spec makes sense
    WARM_READY = "WarmReady"  # the wanted pods are there and ready
    BURST_READY = "BurstReady"  # calls may go to Modal
    WITHIN_BUDGET = "WithinBudget"  # burst may cost more before it reaches its budget
    READY = "Ready"  # every rung that is declared takes calls


class Reason(StrEnum):
    """Why a condition is as it is; the message says it in words."""

    ACCEPTED = "Accepted"
    SPEC_INVALID = "SpecInvalid"
    INFEASIBLE = "Infeasible"  # it cannot hold the calls that it expects, whatever is started
    SHORTFALL = "Shortfall"  # what stands by is too little for them
    KEYS_MISSING = "KeysMissing"  # the Secret of callers' keys cannot be read
    TOKEN_MISSING = "TokenMissing"  # of the policy hook or of the Hub, likewise
    DELETING = "Deleting"
    PODS_READY = "PodsReady"
    NO_PODS_WANTED = "NoPodsWanted"
    NOT_SERVED_HERE = "NotServedHere"  # the agent's regions or its policy leave this cluster out
    PODS_STARTING = "PodsStarting"
    POD_UNSCHEDULABLE = "PodUnschedulable"
    VOLUME_MISSING = "VolumeMissing"  # a volume of the template is not there, or cannot be mounted
    POD_FAILING = "PodFailing"  # image pull, crash loop, wrong configuration
    NODE_NOT_READY = "NodeNotReady"  # a pod's node is silent, so the pod counts as none
    POD_UNREADY = "PodUnready"  # its worker runs, and is not ready any more
    PODS_REFUSED = "PodsRefused"  # the API does not let the operator make one: a quota, a right
    TEMPLATE_REJECTED = "TemplateRejected"  # the API takes no such pod as `warm` asks for
    ROLLOUT_BLOCKED = "RolloutBlocked"  # an old pod has calls and there is no room for a new one
    BURST_READY = "BurstReady"
    BURST_OFF = "BurstOff"  # none is asked for, or policy forbids it
    BURST_DEPLOYING = "BurstDeploying"
    BURST_FAILING = "BurstFailing"
    SNAPSHOT_FALLBACK = "SnapshotFallback"  # calls are taken, by containers that start slower
    REGION_DOWN = "RegionDown"  # calls are taken in the other regions
    LIMIT_REACHED = "LimitReached"  # calls are taken, by no more containers than the workspace has
    CREDENTIALS_MISSING = "CredentialsMissing"
    WITHIN_BUDGET = "WithinBudget"
    NO_BUDGET = "NoBudget"
    BUDGET_SPENT = "BudgetSpent"
    BUDGET_TOO_SMALL = "BudgetTooSmall"  # for one call, or for what stands by
    BILL_DIFFERS = "BillDiffers"  # Modal bills something else than was reckoned
    PRICE_UNKNOWN = "PriceUnknown"  # so a budget cannot be held
    ANSWERING = "Answering"
    NO_CAPACITY = "NoCapacity"


# Kubernetes allows 32 KiB in a message; a line that a person reads is shorter.
LONGEST_MESSAGE: Final = 1024

# How long free slots last is told in these steps, so that it is not another number at every look.
RUNWAYS: Final = (3600, 1800, 600, 300, 120, 60, 30, 10)

# The scheduler, of claims that are not there, not bound, or going.
CLAIM: Final = "persistentvolumeclaim"

# `burst.BurstReason.CREDENTIALS_REFUSED`, which would bring the SDK with it.
REFUSED_CREDENTIALS: Final = "CredentialsRefused"

# The scheduler, of nodes that lack a label.
SELECTOR_MISSED: Final = "didn't match Pod's node affinity/selector"

Verdict = tuple[Condition, bool, Reason, str]


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
    budget = _within_budget(agent, world, previous, now)
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
    accepted, burst = _accepted(agent, world), _burst_ready(agent, world)
    warm = _warm(agent, plan, pods, refused, overflow=burst[1])
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


def _warm(
    agent: VoiceAgent,
    plan: Plan,
    pods: list[PodFacts],
    refused: Refusal | None,
    *,
    overflow: bool,
) -> Verdict:
    """Live numbers stay out of the message: it would be written again with every call."""
    if plan.scaling is None:
        words = f"{len(pods)} pods are left, and each ends with its last call"
        return Condition.WARM_READY, False, Reason.DELETING, words
    wanted = plan.scaling.pods
    ready = sum(pod.active and pod.ready for pod in pods)
    count = f"{ready} of {wanted} pods are ready"
    if plan.short:
        count += f"; {plan.short}"
    if ready >= wanted:
        if refused and plan.outdated:
            reason, said = _refused(refused)
            words = f"{count}; {plan.outdated} of an older template stay; {said}; calls go on there"
            return Condition.WARM_READY, True, reason, words
        if plan.blocked:
            words = f"{count}; {plan.outdated} of an older template stay until their calls end"
            help_ = "raise warm.maxPods or add burst.modal to replace them sooner"
            return Condition.WARM_READY, True, Reason.ROLLOUT_BLOCKED, f"{words}: {help_}"
        if away := elsewhere(agent):
            return Condition.WARM_READY, True, Reason.NOT_SERVED_HERE, away
        reason = Reason.PODS_READY if wanted else Reason.NO_PODS_WANTED
        advice = plan.scaling.advice
        return Condition.WARM_READY, True, reason, f"{count}; {advice}" if advice else count
    meanwhile = _meanwhile(ready, overflow)
    for pod in pods:
        if pod.node_lost and not (pod.draining or pod.terminating):
            words = f"{count}; {pod.name}: its node {pod.node} is not ready, so it counts as none"
            words += f". Another is made in its place; {meanwhile}"
            return Condition.WARM_READY, False, Reason.NODE_NOT_READY, words
    for pod in pods:
        if pod.active and not pod.ready and (trouble := _pod_trouble(agent, pod)):
            reason, said, next_ = trouble
            words = f"{count}; {pod.name}: {said}. {next_}; {meanwhile}"
            return Condition.WARM_READY, False, reason, words
    if refused:
        reason, said = _refused(refused)
        return Condition.WARM_READY, False, reason, f"{count}; {said}; {meanwhile}"
    return Condition.WARM_READY, False, Reason.PODS_STARTING, count


def _refused(refused: Refusal) -> tuple[Reason, str]:
    """Why no pod can be made, in the words of the API, and what happens next."""
    words = refused.words.rstrip(".")
    if refused.template:
        said = f"the API takes no such pod: {words}. Change that in warm, and it is tried at once"
        return Reason.TEMPLATE_REJECTED, said
    return Reason.PODS_REFUSED, f"no pod can be made: {words}. It is tried again within 30 s"


def _pod_trouble(agent: VoiceAgent, pod: PodFacts) -> tuple[Reason, str, str] | None:
    """What keeps a pod from taking calls: the reason, the words of Kubernetes, and what happens next."""
    # Of a claim that is not there the scheduler tells, of all other volumes the kubelet.
    if words := pod.unmounted or (pod.unschedulable if CLAIM in pod.unschedulable.lower() else ""):
        next_ = "It starts once that is there: see warm.template.volumes"
        return Reason.VOLUME_MISSING, words.rstrip("."), next_
    if pod.unschedulable:
        next_ = "It starts once a node has room: add one, or free what the message names"
        # The scheduler's words for a label that no node has name neither the label nor its value.
        if SELECTOR_MISSED in pod.unschedulable and (wanted := node_selector(agent)):
            labels = ", ".join(f"{name}={value}" for name, value in sorted(wanted.items()))
            next_ = f"It starts once a node has room that is labelled {labels}"
        return Reason.POD_UNSCHEDULABLE, pod.unschedulable.rstrip("."), next_
    if pod.unready:
        # Gateways go by their links, not by this probe.
        next_ = f"Calls on it go on while gateways reach it: see kubectl logs {pod.name}"
        return Reason.POD_UNREADY, pod.unready, next_
    if not pod.trouble:
        return None
    if (
        "Image" in pod.trouble.partition(":")[0]
    ):  # ErrImagePull, ImagePullBackOff, InvalidImageName, …
        next_ = "The pull is tried again: check warm.image, and that nodes may pull it"
    elif pod.trouble.startswith("CreateContainerConfigError"):
        next_ = "It starts once what is named is there"
    else:
        next_ = f"It is restarted, later each time: see kubectl logs --previous {pod.name}"
    return Reason.POD_FAILING, pod.trouble.rstrip("."), next_


def _meanwhile(ready: int, overflow: bool) -> str:
    """Where calls go that the missing pods would have taken."""
    there = "calls go to the ready pods" if ready else "no pod takes calls"
    if overflow:
        return f"{there} and to burst" if ready else "calls go to burst"
    return f"{there}, and are refused when those are full" if ready else "calls are refused"


def _burst_ready(agent: VoiceAgent, world: World) -> Verdict:
    facts, burst = world.burst, ladder(agent).burst
    if burst is None:
        words = "calls stay in the cluster" if agent.burst else "burst.modal is not set"
        return Condition.BURST_READY, False, Reason.BURST_OFF, words
    meanwhile = (
        "the last deployment goes on"
        if facts.url
        else "until then calls past the warm slots are refused"
    )
    if facts.failures:
        again = f"tried again after {retry_wait(facts.failures):.0f} s, at once if burst.modal is changed"
        if facts.message.startswith(REFUSED_CREDENTIALS):
            again = f"check Secret {burst.credentials_secret}; {again}"
        words = f"{facts.message.rstrip('.')}; {again}; {meanwhile}"
        return Condition.BURST_READY, False, Reason.BURST_FAILING, words
    shut = world.traffic.shut
    if failure := world.traffic.burst_error or _all_shut(facts, shut):
        words = f"{failure}; each call that finds no warm slot tries again{_limited(facts)}"
        return Condition.BURST_READY, False, Reason.BURST_FAILING, words
    if facts.credentials:
        words = f"{facts.credentials}; looked for every {CREDENTIALS_LOOK:.0f} s; {meanwhile}"
        return Condition.BURST_READY, False, Reason.CREDENTIALS_MISSING, words
    if not facts.url:
        words = "the first container starts" if facts.app else "the app is being deployed"
        return Condition.BURST_READY, False, Reason.BURST_DEPLOYING, words
    taking = [region for region in burst.regions if region in facts.urls and region not in shut]
    words = f"app {facts.app} takes calls in {' and '.join(taking)}"
    if facts.capped:
        words += ", but no new one now: see WithinBudget"
    words += _limited(facts)
    if (breaker := facts.breaker) and breaker.fallen:
        words += (
            f"; its containers start with snapshot {breaker.level} because restores from "
            f"{breaker.asked} failed, tried again after {breaker.wait / 60:g} minutes"
        )
        return Condition.BURST_READY, True, Reason.SNAPSHOT_FALLBACK, words
    if down := [region for region in burst.regions if region in facts.urls and region in shut]:
        words += f"; {down[0]} is passed over for a while: {shut[down[0]]}"
        return Condition.BURST_READY, True, Reason.REGION_DOWN, words
    if facts.limit:
        return Condition.BURST_READY, True, Reason.LIMIT_REACHED, words
    return Condition.BURST_READY, True, Reason.BURST_READY, words


def _limited(facts: BurstFacts) -> str:
    """What the workspace does not let the agent have, and what follows; "" = nothing is known."""
    limit = facts.limit
    if limit is None:
        return ""
    count = f"{limit.containers} containers" if limit.containers > 1 else "one container"
    return (
        f"; Modal has refused more than {count} since {rfc3339(limit.since)}: no more stand by until "
        f"{rfc3339(limit.until)}, then more are asked for; raise the workspace's limit, or warm.maxPods"
    )


def _all_shut(facts: BurstFacts, shut: Mapping[str, str]) -> str:
    """Why gateways pass over every region that there is, "" = they do not."""
    there = [region for region in facts.urls if region in shut]
    return shut[there[0]] if there and len(there) == len(facts.urls) else ""


def _within_budget(agent: VoiceAgent, world: World, previous: Json, now: float) -> Verdict:
    """The words of a spent budget stay as they were when it was: they would be others at every look."""
    kind, facts, burst = Condition.WITHIN_BUDGET, world.burst, ladder(agent).burst
    if burst is None:
        words = "no call goes to burst, so it costs nothing"
        return kind, True, Reason.NO_BUDGET, words
    limited = burst.budget != Budget()
    if facts.unpriced:
        if not limited:
            return kind, True, Reason.NO_BUDGET, f"no budget is set, and {facts.unpriced}"
        words = f"{facts.unpriced}; until then no call goes to burst"
        return kind, False, Reason.PRICE_UNKNOWN, words
    account, agreed = facts.account, facts.terms
    if account is None or agreed is None:
        return kind, True, Reason.NO_BUDGET, "nothing is spent yet"
    if small := spend.too_small(agreed):
        return kind, False, Reason.BUDGET_TOO_SMALL, f"{small}: raise it"
    if facts.capped:
        old = {one["type"]: one for one in previous.get("conditions") or ()}.get(kind, {})
        if old.get("reason") == Reason.BUDGET_SPENT:
            return kind, False, Reason.BUDGET_SPENT, old["message"]
        words = spending.spent_words(account, agreed, now)
        return kind, False, Reason.BUDGET_SPENT, words
    words = spending.arithmetic(agreed, burst.budget)
    if apart := spending.differs(facts.billed, now):
        return kind, True, Reason.BILL_DIFFERS, f"{apart}; {words}"
    reason = Reason.WITHIN_BUDGET if limited else Reason.NO_BUDGET
    return kind, True, reason, words


def _solvent(ready: Verdict, budget: Verdict) -> Verdict:
    """An agent whose budget is spent lacks a rung."""
    if budget[1] or not ready[1]:
        return ready
    return Condition.READY, False, budget[2], budget[3]


def _ready(
    agent: VoiceAgent, accepted: Verdict, warm: Verdict, burst: Verdict, pods: list[PodFacts]
) -> Verdict:
    """Every rung that is declared takes calls. Pods above `minPods` may still be starting."""
    ready = sum(pod.active and pod.ready for pod in pods)
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
