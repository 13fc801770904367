"""Whether an agent can hold what `slo.callsAtOnce` promises, with the arithmetic. Pure.

Callers who come in the same second are answered by slots that are there by then: those of pods that are kept without
any call, and those of containers that stand by. A pod takes a minute to start, and of containers that have yet to
start nobody can promise that they do within `session.answerSeconds`: Modal publishes 13.8 s as the mean of restores.
Budgets are not looked at: they need prices.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from trunkline_operator.agent.spec import Burst, VoiceAgent, Warm


@dataclass(frozen=True, slots=True)
class Feasibility:
    """What is short of what is expected. `never`: whatever is started, it will not do."""

    never: bool
    words: str  # "3 pods × 2 + 10 containers × 1 = 16 at once, 200 expected: …"


def shortfall(agent: VoiceAgent, warm: bool, burst: Burst | None) -> Feasibility | None:
    """What the rungs that policy allows lack of the calls that are expected at once; None = nothing."""
    expected = agent.slo.calls_at_once
    standing = list(_hosts(agent.warm, warm, burst, standing=True))
    most = list(_hosts(agent.warm, warm, burst, standing=False))
    if _slots(most) < expected:
        advice = _advice(warm, burst, "warm.maxPods", "burst.modal.maxContainers")
        return Feasibility(True, f"never more than {_sum(most)} calls, {expected} expected{advice}")
    if _slots(standing) < expected:
        advice = _advice(warm, burst, "warm.minPods", "burst.modal.minContainers")
        return Feasibility(False, f"{_sum(standing)} at once, {expected} expected{advice}")
    return None


def kept_pods(warm: Warm) -> int:
    """Pods that are there without any call."""
    spare = warm.buffer_slots if isinstance(warm.buffer_slots, int) else 0  # of no calls
    return min(max(warm.min_pods, -(-spare // warm.slots_per_pod)), warm.max_pods)


Hosts = tuple[int, str, int]
"""So many of a kind, with so many slots each."""


def _hosts(warm: Warm, pods: bool, burst: Burst | None, *, standing: bool) -> Iterable[Hosts]:
    if pods:
        yield kept_pods(warm) if standing else warm.max_pods, "pods", warm.slots_per_pod
    if burst:
        kept = min(burst.min_containers + burst.buffer_containers, burst.max_containers)
        number = kept if standing else burst.max_containers
        yield number, "containers", burst.slots_per_container


def _slots(hosts: Iterable[Hosts]) -> int:
    return sum(number * slots for number, _, slots in hosts)


def _sum(hosts: list[Hosts]) -> str:
    terms = " + ".join(f"{number} {kind} × {slots}" for number, kind, slots in hosts)
    return f"{terms} = {_slots(hosts)}" if terms else "no rung = 0"


def _advice(warm: bool, burst: Burst | None, of_pods: str, of_containers: str) -> str:
    fields = [name for name, there in ((of_pods, warm), (of_containers, burst)) if there]
    return f": raise {' or '.join(fields)}" if fields else ""
