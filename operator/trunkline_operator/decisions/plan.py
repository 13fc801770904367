"""(agent, world, now) → the steps to take. Level-triggered: the same world gives the same steps.

Rules
- A pod that may hold calls is first marked draining, and deleted only when its worker itself has said
  "draining, 0 busy". Unknown counts as busy, until so long after that no call can be left.
- A draining pod is no capacity. When load returns, a drain is taken back before a pod is made.
- A name that is still in use, even by a pod that is going, is not used again.
- At rest there are no steps but a Requeue for the moment from which the same world would ask for something else:
  until then nobody need look.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from trunkline_operator.agent.policy import front, ladder
from trunkline_operator.agent.spec import Burst, ScaleDown, VoiceAgent
from trunkline_operator.burst.breaker import probe_at
from trunkline_operator.burst.limit import within
from trunkline_operator.burst.standby import Rush, at_cap, following, needed, spread
from trunkline_operator.decisions import eviction, offers, reach
from trunkline_operator.decisions.manifests import (
    Installation,
    burst_app,
    burst_hash,
    secret_name,
    worker_pod,
)
from trunkline_operator.decisions.runway import measured_start
from trunkline_operator.decisions.steps import (
    AddFinalizer,
    CreatePod,
    DeletePod,
    DeployBurst,
    Drain,
    EnsureSecret,
    IssueCertificate,
    RemoveFinalizer,
    Requeue,
    ScaleBurst,
    Step,
    StopBurst,
    Undrain,
    WatchBurst,
)
from trunkline_operator.decisions.view import View
from trunkline_operator.decisions.world import BurstFacts, PodFacts, World
from trunkline_operator.scaling.decision import Decision, Demand, Memory, decided, spare
from trunkline_operator.scaling.prices import stakes
from trunkline_operator.scaling.spend import HOUR
from trunkline_runtime.contract import FINALIZER

# Modal refuses for reasons that pass in seconds (its limits) or that a person must mend (a token).
FIRST_RETRY: Final = 5.0
LONGEST_RETRY: Final = 300.0
# Tries to stop an app after the deadline of a deletion, before the agent is let go without.
STOP_TRIES: Final = 5
# Nothing tells the operator of a Secret that it does not own, nor of a last call that it cannot see.
CREDENTIALS_LOOK: Final = 10.0
LAST_CALL_LOOK: Final = 2.0
# While calls go to burst. One request at Modal; a restore that crashes costs its caller 10 s or more.
WATCH_LOOK: Final = 10.0
# After the first refusal for a limit: containers that ran then may be gone in ten.
REFUSED_LOOK: Final = 1.0
STANDING_LOOK: Final = 60.0
# Modal refused to change the number of containers that stand by: its limits pass in seconds.
SCALE_RETRY: Final = 10.0
# Nothing tells when all gateways report again, nor when a silent worker is one that nobody will hear of.
UNKNOWN_LOOK: Final = 30.0
# A wait that ended by rounding must not become a busy loop.
SOONEST: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    steps: tuple[Step, ...]  # in the order in which to take them; a Requeue is last
    scaling: Decision | None  # None for an agent that is being deleted
    memory: Memory  # give it to the next look
    draining: tuple[str, ...]  # the route's drain list once the steps are taken
    outdated: int = 0  # pods of an older template that are still there
    blocked: bool = False  # they stay until a call ends or somebody makes room
    usual: int = 1  # slots that the next pod is expected to offer
    unlinked: frozenset[str] = frozenset()  # names of pods that are ready, and no gateway has them
    short: str = ""  # which pod offers fewer slots than it was told, in words; "" = none does


def planned(
    agent: VoiceAgent, world: World, now: float, memory: Memory, installation: Installation
) -> Plan:
    """The steps from the observed world to the declared one."""
    view = View(agent=agent, world=world, now=now, installation=installation)
    if agent.deleted_at is not None:
        return _plan(view, list(_farewell(view, agent.deleted_at)), None, memory)
    demand = _demand(view)
    scaling = decided(agent.warm, demand, now, memory)
    steps = [*_foundation(view), *_pods(view, scaling.pods)]
    going = {step.uid for step in steps if isinstance(step, Drain | DeletePod)}
    marks = eviction.marks(view, spare(agent.warm, demand.calls), memory.idle, going)
    steps += marks.steps
    steps += _burst(view, scaling.memory.flow.growth)
    if scaling.look_again is not None:
        steps.append(Requeue(scaling.look_again))
    if not demand.known:
        steps.append(Requeue(UNKNOWN_LOOK))
    missing = reach.missing(view, memory.unlinked)
    if (wait := reach.look_in(view, missing)) is not None:
        steps.append(Requeue(wait))
    memory = replace(scaling.memory, idle=marks.idle, unlinked=missing)
    return _plan(view, steps, scaling, memory)


def _plan(view: View, steps: list[Step], scaling: Decision | None, memory: Memory) -> Plan:
    waits = [step.after for step in steps if isinstance(step, Requeue)]
    acts = [step for step in steps if not isinstance(step, Requeue)]
    pods = [pod for pod in view.pods if not pod.finished]
    drain = {pod.name for pod in pods if pod.draining or pod.terminating}
    drain |= {step.name for step in acts if isinstance(step, Drain | DeletePod)}
    drain -= {step.name for step in acts if isinstance(step, Undrain)}
    outdated = [pod for pod in pods if not (pod.terminating or view.current(pod))]
    moving = any(pod.draining or not (view.taking(pod) or pod.unschedulable) for pod in pods)
    moving |= any(isinstance(step, CreatePod | Drain | DeletePod) for step in acts)
    return Plan(
        steps=(*acts, *(Requeue(max(wait, SOONEST)) for wait in sorted(waits)[:1])),
        scaling=scaling,
        memory=memory,
        draining=tuple(sorted(drain)),
        outdated=len(outdated),
        blocked=bool(outdated) and not moving,
        usual=offers.usual_slots(view),
        unlinked=reach.unlinked(view, memory.unlinked),
        short=offers.short(view),
    )


def _demand(view: View) -> Demand:
    traffic = view.world.traffic
    active = [pod for pod in view.pods if pod.active and not view.must_go(pod)]
    serving = [pod for pod in active if pod.ready]
    agent = view.agent
    burst = ladder(agent).burst
    return Demand(
        busy=traffic.busy,
        burst=traffic.burst,
        arrivals=traffic.arrivals,
        refused=traffic.refused,
        waiting=traffic.waiting,
        known=traffic.known and all(pod.name in traffic.workers for pod in serving),
        active=len(active),
        serving=len(serving),
        offers=offers.of(view, active),
        usual=offers.usual_slots(view),
        start_seconds=measured_start(view.pods),
        stakes=stakes(agent.warm, burst, view.installation.prices, front(agent, burst)),
    )


def _foundation(view: View) -> Iterator[Step]:
    """What must be there before a pod is made."""
    # Kubernetes ends pods and Secret with their agent, but no app at Modal.
    if view.agent.burst is not None and FINALIZER not in view.agent.finalizers:
        yield AddFinalizer()
    if not view.world.secret_exists:
        yield EnsureSecret(secret_name(view.agent))
    elif view.world.certificate:
        yield IssueCertificate(secret_name(view.agent), view.world.certificate)


# --- pods ------------------------------------------------------------------------------------------------


def _pods(view: View, wanted: int) -> Iterator[Step]:
    """Pods that ended go; then pods are added, or drained, or rolled; drained ones go."""
    here = [pod for pod in view.pods if not pod.terminating]
    yield from (DeletePod(pod.name, pod.uid) for pod in here if pod.finished)
    leaving = [pod for pod in here if pod.active and view.must_go(pod)]
    broken = [pod for pod in here if pod.active and view.broken(pod) and pod not in leaving]
    active = [pod for pod in here if pod.active and pod not in leaving + broken]
    draining = [pod for pod in here if pod.draining and not pod.finished]
    yield from (_removal(view, pod) for pod in leaving + broken)

    returning: list[PodFacts] = []
    if len(active) < wanted:
        returning = _returning(view, draining)[: wanted - len(active)]
        missing = wanted - len(active) - len(returning)
        room = view.agent.warm.max_pods - len(active) - len(draining) - len(leaving)
        yield from (Undrain(pod.name, pod.uid) for pod in returning)
        yield from _creations(view, min(missing, room))
    elif victims := _excess(view, active, wanted):
        yield from (_removal(view, pod) for pod in victims)
    else:
        yield from _roll(view, active, draining)
    yield from _ends(view, [pod for pod in draining if pod not in returning])


def _returning(view: View, draining: list[PodFacts]) -> list[PodFacts]:
    """Draining pods whose drain may be taken back, those first that serve and hold most calls."""
    current = [pod for pod in draining if view.current(pod) and not view.must_go(pod)]
    return sorted(current, key=lambda pod: (not pod.ready, -(view.busy(pod) or 0), pod.ordinal))


def _creations(view: View, count: int) -> Iterator[Step]:
    """New pods with the lowest names that are not in use by any pod, whoever owns it."""
    taken = {pod.name for pod in view.world.pods}
    name = view.agent.name
    free = (ordinal for ordinal in itertools.count() if f"{name}-{ordinal}" not in taken)
    for ordinal in itertools.islice(free, max(count, 0)):
        yield CreatePod(f"{name}-{ordinal}", worker_pod(view.agent, ordinal, view.installation))


def _removal(view: View, pod: PodFacts) -> Step:
    if view.unborn(pod):
        return DeletePod(pod.name, pod.uid)
    return Drain(pod.name, pod.uid, rfc3339(view.now))


def _excess(view: View, active: list[PodFacts], wanted: int) -> list[PodFacts]:
    """The pods above the wanted number. A new one that starts to replace an old one is not too many."""
    old = any(not view.current(pod) for pod in active)
    starting = any(view.current(pod) and not view.taking(pod) for pod in active)
    count = len(active) - wanted - (1 if old and starting else 0)
    victims = sorted(active, key=lambda pod: view.loss(pod))[: max(count, 0)]
    if view.agent.warm.scale_down_mode is ScaleDown.WAIT:
        return [pod for pod in victims if view.busy(pod) == 0]
    return victims


def _roll(view: View, active: list[PodFacts], draining: list[PodFacts]) -> Iterator[Step]:
    """The next pod's step from an older template to the current one, while all wanted pods are there.

    With room below maxPods a new pod comes first; the old one is then one too many. Without room, and when
    no node has room for the new one, the old pod with fewest calls is drained first: if it has none, or if
    new calls may go to burst meanwhile. A new one that no gateway has replaces nothing yet.
    """
    old = [pod for pod in active if not view.current(pod)]
    if not old:
        return
    starting = [pod for pod in active if view.current(pod) and not view.taking(pod)]
    leaving = [pod for pod in draining if not view.current(pod)]
    if not starting and len(active) + len(draining) < view.agent.warm.max_pods:
        yield from _creations(view, 1)
    elif not leaving and all(pod.unschedulable for pod in starting):
        victim = min(old, key=lambda pod: view.loss(pod))
        if view.overflows() or view.busy(victim) == 0:
            yield _removal(view, victim)


def _ends(view: View, draining: list[PodFacts]) -> Iterator[Step]:
    """Drained pods go. One whose worker is silent is looked at again when no call can be left."""
    for pod in draining:
        if view.drained(pod):
            yield DeletePod(pod.name, pod.uid)
        elif pod.draining_since is not None and view.busy(pod) is None:
            yield Requeue(view.last_call(pod.draining_since) - view.now)


# --- burst -----------------------------------------------------------------------------------------------


def _burst(view: View, growth: float) -> Iterator[Step]:
    """Deployed if policy allows it and something changed; stopped, once silent, if it must not be.

    `growth` is how many more calls come than end, a second.
    """
    facts, burst = view.world.burst, ladder(view.agent).burst
    if facts.working:
        return
    if burst is None:
        if facts.app:
            yield from _stop(view, facts.app, late=False)
        return
    if facts.account and facts.account.hour:  # the next hour has spent nothing yet, which is told
        yield Requeue(HOUR - view.now % HOUR)
    if limit := facts.limit:  # what is told of it changes then, and what stands by
        yield Requeue((limit.until if view.now < limit.until else limit.forgotten) - view.now)
    level = facts.breaker.level if facts.breaker else None
    goal = burst_hash(view.agent, view.installation, level)
    if facts.app and facts.hash == goal:
        yield from _watch(view)
        yield from _stand_by(view, burst, growth)
        return
    if facts.credentials:
        yield Requeue(CREDENTIALS_LOOK)
        return
    yield (step := _retried(view, DeployBurst(burst_app(view.agent), goal), about=goal))
    if isinstance(step, Requeue):  # what was deployed before goes on meanwhile
        yield from _stand_by(view, burst, growth)


def _stand_by(view: View, burst: Burst, growth: float) -> Iterator[Step]:
    """More containers while warm slots run short, and back again; a live setting, no deployment."""
    facts, traffic = view.world.burst, view.world.traffic
    regions = [region for region in burst.regions if region in facts.urls]
    if not regions or facts.credentials:
        return
    ready = [pod.name for pod in view.pods if pod.active and pod.ready]
    workers = [traffic.workers[name] for name in ready if name in traffic.workers]
    free = sum(worker.slots - worker.busy for worker in workers if not worker.draining)
    wish = needed(burst, Rush(free=free, burst=traffic.burst, growth=growth))
    running = math.ceil(traffic.burst / burst.slots_per_container)
    kept = within(wish, facts.limit, running, view.now)
    limited = kept != wish
    wanted = spread(at_cap(kept) if facts.capped else kept, regions, traffic.shut)
    told, wait = following(facts.standing, wanted, view.now, capped=facts.capped, limited=limited)
    refused = facts.unscaled_at + SCALE_RETRY - view.now if facts.unscaled_at else 0.0
    if told is not None:
        yield Requeue(refused) if refused > 0 else ScaleBurst(facts.app, told)
    if wait:
        yield Requeue(wait)


def _watch(view: View) -> Iterator[Step]:
    """How containers start, and how many there are, is asked while there are any; a level that has fallen is tried again in time."""
    facts, breaker = view.world.burst, view.world.burst.breaker
    if breaker is None or facts.credentials:
        return
    if view.world.traffic.burst or facts.containers or facts.refused:
        # Containers that only stand by are counted less often: they cost the same all the time.
        standing = not view.world.traffic.burst and facts.containers <= facts.least
        every = STANDING_LOOK if standing else WATCH_LOOK
        if facts.refused:
            known = facts.limit is not None and view.now < facts.limit.until
            every = WATCH_LOOK if known else REFUSED_LOOK
        wait = facts.watched + every - view.now
        yield Requeue(wait) if wait > 0 else WatchBurst(facts.app)
    if breaker.fallen:
        yield Requeue(probe_at(breaker) - view.now)


def _retried(view: View, step: Step, about: str) -> Step:
    """The step, or a wait if it failed a moment ago."""
    facts = view.world.burst
    if not facts.failures or facts.failed_hash != about:
        return step
    wait = facts.failed_at + retry_wait(facts.failures) - view.now
    return Requeue(wait) if wait > 0 else step


def retry_wait(failures: int) -> float:
    """Seconds between the last of so many failures at Modal and the next try."""
    # The exponent is bounded so that the power is.
    return float(min(FIRST_RETRY * 2 ** min(failures - 1, 10), LONGEST_RETRY))


# --- deletion --------------------------------------------------------------------------------------------


def _farewell(view: View, deleted_at: float) -> Iterator[Step]:
    """All pods drained and gone, the app stopped, then the finalizer. It ends by a deadline.

    An agent that others' finalizers keep has its pods drained, too.
    """
    ours = FINALIZER in view.agent.finalizers
    deadline = view.last_call(deleted_at)
    late = view.now >= deadline
    here = [pod for pod in view.pods if not pod.terminating]
    for pod in here:
        if late or pod.finished or view.unborn(pod) or view.drained(pod):
            yield DeletePod(pod.name, pod.uid)
        elif not pod.draining:
            yield Drain(pod.name, pod.uid, rfc3339(view.now))
    # Past the deadline nobody waits for a pod that is going: its node may be gone.
    empty = not here and (late or not view.pods)
    app, left = (_app_left(view), _app_lost(view, late)) if ours else ("", "")
    if app and not left:
        yield from _stop(view, app, late)
    elif empty:
        if ours:
            yield RemoveFinalizer(left)
        return
    if not late:
        yield Requeue(deadline - view.now)


def _app_left(view: View) -> str:
    """The app that must be stopped; one that may have been deployed unnoticed counts, "" = none."""
    facts = view.world.burst
    if (
        facts.working
    ):  # a deployment that has begun cannot be taken back, only stopped when it is done
        return facts.app or burst_app(view.agent)
    if facts.stopped:
        return ""
    if view.agent.burst is None or facts.credentials:
        return facts.app
    return facts.app or burst_app(view.agent)


def _app_lost(view: View, late: bool) -> str:
    """The app that nobody can stop, so that a deletion never hangs; "" = none.

    One that was perhaps never there is not waited for until the deadline.
    """
    facts = view.world.burst
    failed = facts.failures >= STOP_TRIES and not facts.failed_hash
    lost = (failed and not facts.app) or (late and bool(failed or facts.credentials))
    return _app_left(view) if lost else ""


def _stop(view: View, app: str, late: bool) -> Iterator[Step]:
    facts = view.world.burst
    if facts.working:
        return
    if facts.credentials:
        yield Requeue(CREDENTIALS_LOOK)
    elif late or view.burst_silent():
        yield _retried(view, StopBurst(app), about="")
    else:
        yield from _emptied(facts)
        yield Requeue(LAST_CALL_LOOK)


def _emptied(facts: BurstFacts) -> Iterator[Step]:
    """While last calls end nothing else is paid for; what this operator never told stays as it is."""
    told = facts.standing.scalings
    if told and told != (none := {region: at_cap(each) for region, each in told.items()}):
        yield ScaleBurst(facts.app, none)


def rfc3339(now: float) -> str:
    """A time as the API writes it."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
