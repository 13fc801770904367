"""What an agent's calls cost with its own settings, with others, and with other autoscalers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from trunkline_operator.agent.policy import front
from trunkline_operator.agent.spec import Autoscaling, Percent, VoiceAgent, Warm
from trunkline_operator.scaling.prices import Prices, container_rate, gpu_kind, stakes
from trunkline_operator.simulation.model import (
    Conditions,
    Outcome,
    Scaler,
    Simulation,
    packed,
)
from trunkline_operator.simulation.peers import Hpa, knative
from trunkline_operator.simulation.scalers import Fixed, Trunkline
from trunkline_operator.simulation.traces import Trace

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to run an agent: what it is called, the agent, and who decides."""

    name: str
    agent: VoiceAgent
    scaler: Scaler


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Dollars for an hour of one GPU in the cluster, and of a container at Modal."""

    gpu: float
    container: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """An outcome in dollars; None where no price is known."""

    setting: str
    outcome: Outcome
    gpu_hours: float
    warm_dollars: float | None
    burst_dollars: float | None

    @property
    def dollars(self) -> float | None:
        """Of pods and containers together."""
        if self.warm_dollars is None or self.burst_dollars is None:
            return None
        return self.warm_dollars + self.burst_dollars


def given(
    agent: VoiceAgent, prices: Prices, conditions: Conditions, trace: Trace, name: str = "as given"
) -> Setting:
    """The agent as it is, with the decider of production.

    `autoscaling: external` is followed as a number that nobody changes.
    """
    if agent.warm.autoscaling is Autoscaling.EXTERNAL:
        pods = agent.warm.min_pods if agent.warm.replicas is None else agent.warm.replicas
        bounded = min(max(pods, agent.warm.min_pods), agent.warm.max_pods)
        return Setting(name=name, agent=agent, scaler=Fixed(bounded))
    scaler = Trunkline(
        agent.warm,
        stakes(agent.warm, agent.burst, prices, front(agent, agent.burst)),
        start_seconds=conditions.pod_start_seconds,
        began=trace.began,
    )
    return Setting(name=name, agent=agent, scaler=scaler)


def others(
    agent: VoiceAgent, prices: Prices, conditions: Conditions, trace: Trace
) -> Iterator[Setting]:
    """The same agent with one setting changed at a time, and with other autoscalers."""
    for name, warm in _changes(replace(agent.warm, autoscaling=Autoscaling.INTERNAL)):
        yield given(replace(agent, warm=warm), prices, conditions, trace, name)
    if agent.burst is not None:
        yield given(replace(agent, burst=None), prices, conditions, trace, "without burst")
    warm = agent.warm
    for share in (0.7, 0.5):
        scaler = Hpa(warm, share, whole=True)
        yield Setting(name=f"HPA at {share:.0%} of slots", agent=agent, scaler=scaler)
    yield Setting(name="Knative's KPA", agent=agent, scaler=knative(warm))
    yield Setting(name=f"always {warm.max_pods} pods", agent=agent, scaler=Fixed(warm.max_pods))


def _changes(warm: Warm) -> Iterator[tuple[str, Warm]]:
    """(what is changed, the warm part with it), without those that are as given."""
    tried: list[tuple[str, Warm]] = [
        (f"warm.minPods {pods}", replace(warm, min_pods=pods))
        for pods in sorted({0, 1, warm.min_pods * 2})
        if pods <= warm.max_pods
    ]
    more = max(warm.max_pods * 2, 1)
    tried.append((f"warm.maxPods {more}", replace(warm, max_pods=more)))
    for slots in (0, 4, Percent(25), Percent(50)):
        said = f"{slots.of}%" if isinstance(slots, Percent) else slots
        tried.append((f"warm.bufferSlots {said}", replace(warm, buffer_slots=slots)))
    for delay in (60, 300, 900):
        changed = replace(warm, scale_down_delay_seconds=delay)
        tried.append((f"warm.scaleDown.delaySeconds {delay}", changed))
    yield from ((name, changed) for name, changed in tried if changed != warm)


def billed(
    trace: Trace,
    setting: Setting,
    conditions: Conditions,
    price: Price | None,
    progress: Progress | None = None,
) -> Bill:
    """Runs one setting and counts the money."""
    agent = setting.agent
    outcome = Simulation(trace, agent, setting.scaler, conditions).run(progress)
    gpu_hours = outcome.pod_hours * agent.warm.gpu.count
    if outcome.burst_hours == 0:
        burst_dollars: float | None = 0.0
    elif price is None:
        burst_dollars = None
    else:
        burst_dollars = outcome.burst_hours * price.container
    return Bill(
        setting=setting.name,
        outcome=outcome,
        gpu_hours=gpu_hours,
        warm_dollars=None if price is None else gpu_hours * price.gpu,
        burst_dollars=burst_dollars,
    )


def price_of(agent: VoiceAgent, prices: Prices, gpu: str = "") -> Price | None:
    """Of that GPU, or of those that burst names: warm pods are taken to have the first of them.

    A container costs what budgets and the ledger reckon for it: the dearest of its GPUs, cores and memory, in the
    region where calls are tried first.
    """
    burst = agent.burst
    if burst and gpu:
        burst = replace(burst, gpu=(gpu,))
    name = gpu or (burst.gpu[0] if burst and burst.gpu else "")
    found = prices.gpus.get(gpu_kind(name))
    rate = container_rate(burst, prices, front(agent, burst)) if burst else None
    if found is None or (burst and rate is None):
        return None
    # Without burst there is no container to pay for.
    return Price(gpu=found.cluster, container=rate.hour if rate else 0.0)


def floor_hours(trace: Trace, agent: VoiceAgent) -> float:
    """GPU-hours of perfect packing, which nobody reaches."""
    warm = agent.warm
    return packed(trace, warm.slots_per_pod, warm.max_pods) * warm.gpu.count
