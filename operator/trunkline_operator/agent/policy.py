"""What an agent's policy allows: the ladder, and the arithmetic of what it can hold."""

from dataclasses import dataclass, replace

from trunkline_operator.agent.feasibility import Feasibility, shortfall
from trunkline_operator.agent.rules import IN_CLUSTER
from trunkline_operator.agent.spec import Burst, DataClass, Snapshot, Upstream, VoiceAgent


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The rungs that a call of this agent may be placed on."""

    warm: bool
    burst: Burst | None
    upstream: Upstream | None
    waiting: int  # callers who may wait at each gateway; 0 = nobody
    words: str  # the arithmetic: "at most 4 × 4 warm + 10 × 4 burst = 56 calls"
    warnings: tuple[str, ...] = ()  # what is allowed and may surprise
    short: Feasibility | None = None  # of what `slo.callsAtOnce` expects


def here(agent: VoiceAgent, region: str) -> VoiceAgent:
    """The agent as an operator of that region serves it: with the region's own pods, or with none."""
    agent = replace(agent, region=region)
    bounds = (agent.warm.min_pods, agent.warm.max_pods)
    if agent.warm.regions:
        named = {each.name: (each.min_pods, each.max_pods) for each in agent.warm.regions}
        bounds = named.get(region, (0, 0))
    if elsewhere(agent):
        bounds = (0, 0)
    return replace(agent, warm=replace(agent.warm, min_pods=bounds[0], max_pods=bounds[1]))


def elsewhere(agent: VoiceAgent) -> str:
    """Why an agent has no pods at this operator, whatever its load; "" = it may have some."""
    region, named = agent.region, [each.name for each in agent.warm.regions]
    if region and not resident(region, agent.policy.residency):
        return f"policy.residency leaves out {region}, where this operator is, so there are no pods here"
    if not named or region in named:
        return ""
    where = f"is in {region}" if region else "was told no region (--region, the chart's region)"
    return f"warm.regions is for {', '.join(named)} and this operator {where}, so there are no pods here"


def ladder(agent: VoiceAgent) -> Ladder:
    """The rungs that policy allows. An agent that is being deleted has none."""
    leaving = agent.deleted_at is not None
    warm = agent.warm.max_pods > 0 and not leaving and not elsewhere(agent)
    burst = None if leaving else allowed_burst(agent)
    return Ladder(
        warm=warm,
        burst=burst,
        upstream=None if leaving else allowed_upstream(agent),
        waiting=agent.session.waiting_callers if warm else 0,
        words=_arithmetic(agent, warm, burst),
        warnings=() if leaving else _warnings(agent, warm, burst),
        short=None if leaving else shortfall(agent, warm, burst),
    )


def allowed_burst(agent: VoiceAgent) -> Burst | None:
    """The burst that the agent asks for, with what its policy forbids taken away; None = nothing is left.

    Modal's business associate agreement leaves out memory snapshots, so phi goes into none.
    """
    burst, policy = agent.burst, agent.policy
    if burst is None or 0 in (burst.budget.per_hour, burst.budget.per_day):
        return None
    regions = tuple(region for region in burst.regions if resident(region, policy.residency))
    if not regions:
        return None
    if policy.data_class is DataClass.PHI:
        if not policy.baa_acknowledged:
            return None
        burst = replace(burst, snapshot=Snapshot.NONE)
    return replace(burst, regions=regions)


def allowed_upstream(agent: VoiceAgent) -> Upstream | None:
    """The upstream that the agent names, where its policy lets its calls go there; None = it does not.

    Whoever answers there is a stranger to this cluster, so the data class must be named, and with residency
    the region, too.
    """
    upstream, policy = agent.upstream, agent.policy
    if upstream is None or policy.data_class not in upstream.data_classes:
        return None
    if policy.residency and not (upstream.region and resident(upstream.region, policy.residency)):
        return None
    return upstream


def pins(agent: VoiceAgent, burst: Burst) -> dict[str, str]:
    """`pinned` for each region of its burst that is bound."""
    bound = {each.value: pinned(each, agent.policy.residency) for each in burst.regions}
    return {region: place for region, place in bound.items() if place}


def front(agent: VoiceAgent, burst: Burst | None) -> str:
    """Where containers of the region must run in which calls are tried first; "" = anywhere."""
    return pinned(burst.regions[0].value, agent.policy.residency) if burst else ""


def pinned(region: str, residency: tuple[str, ...]) -> str:
    """Where containers for a region of burst must run, as Modal names places; "" = anywhere.

    The region of a server is where calls enter; its containers are elsewhere unless they are bound. Modal knows
    both a part of the world and a region in it, and the wider one costs less.
    """
    return next((each for each in residency if resident(region, (each,))), "")


def resident(region: str, residency: tuple[str, ...]) -> bool:
    """Whether calls may be handled in a region: it, or how its name begins, is listed; all are by none."""
    return not residency or any(f"{region}-".startswith(f"{each}-") for each in residency)


def _arithmetic(agent: VoiceAgent, warm: bool, burst: Burst | None) -> str:
    rungs: list[tuple[int, int, str]] = []
    if warm:
        rungs.append((agent.warm.max_pods, agent.warm.slots_per_pod, "warm"))
    if burst:
        rungs.append((burst.max_containers, burst.slots_per_container, "burst"))
    if not rungs:
        return "no rung: no call is taken"
    terms = " + ".join(f"{hosts} × {slots} {kind}" for hosts, slots, kind in rungs)
    return f"at most {terms} = {sum(hosts * slots for hosts, slots, _ in rungs)} calls"


def _warnings(agent: VoiceAgent, warm: bool, burst: Burst | None) -> tuple[str, ...]:
    room = agent.warm.max_pods * agent.warm.slots_per_pod
    spare = agent.warm.buffer_slots
    kept = spare if isinstance(spare, int) else 0  # a percentage of no calls is none
    said = {
        elsewhere(agent): bool(elsewhere(agent)),
        "policy.residency rules burst alone, because this operator was told no region (--region, the chart's "
        "region)": bool(agent.policy.residency and not agent.region and warm),
        **_forbidden(agent),
        "warm.bufferSlots keeps a pod although warm.minPods is 0: set it to 0 to let all pods go": (
            warm and agent.warm.min_pods == 0 and kept > 0
        ),
        "engine.policy.hook is a Service of the cluster, which calls at Modal cannot reach": (
            burst is not None
            and agent.engine.policy is not None
            and agent.engine.policy.hook is not None
            and IN_CLUSTER.match(agent.engine.policy.hook.url) is not None
        ),
        "access.tenants guarantees more slots than warm.maxPods of this region has": (
            warm and bool(agent.warm.regions) and agent.access.tenants.guaranteed > room
        ),
        "without pods and without burst the first call is refused while a pod starts": (
            warm and agent.warm.min_pods == 0 == kept and burst is None
        ),
        f"warm.bufferSlots {kept} is more than all {room} warm slots, so there are "
        "always warm.maxPods pods": warm and kept > room,
    }
    return tuple(sentence for sentence, true in said.items() if true)


def _forbidden(agent: VoiceAgent) -> dict[str, bool]:
    """What the agent asks for and its policy takes away."""
    return {**_forbidden_burst(agent), **_forbidden_upstream(agent)}


def _forbidden_upstream(agent: VoiceAgent) -> dict[str, bool]:
    upstream, policy = agent.upstream, agent.policy
    if upstream is None:
        return {}
    unnamed = policy.data_class not in upstream.data_classes
    return {
        f"upstream.dataClasses does not name {policy.data_class}, so upstream is not used": unnamed,
        "policy.residency leaves out upstream.region, so upstream is not used": (
            not unnamed and allowed_upstream(agent) is None
        ),
    }


def _forbidden_burst(agent: VoiceAgent) -> dict[str, bool]:
    burst, policy = agent.burst, agent.policy
    if burst is None:
        return {}
    phi = policy.data_class is DataClass.PHI
    outside = [each.value for each in burst.regions if not resident(each, policy.residency)]
    return {
        "policy.dataClass phi keeps calls in the cluster, so burst.modal is not used": (
            phi and not policy.baa_acknowledged
        ),
        "policy.dataClass phi goes into no snapshot, so containers at Modal start without": (
            phi and policy.baa_acknowledged and burst.snapshot is not Snapshot.NONE
        ),
        f"policy.residency leaves out {', '.join(outside)} of burst.modal.regions": bool(outside),
        "burst.modal.budget is 0, so burst.modal is not used": (
            0 in (burst.budget.per_hour, burst.budget.per_day)
        ),
    }
