"""The autoscaler: warm GPU-hours and dollars at equal overflow, against an HPA, a KPA and a fixed pool.

    python bench/scaling.py [--quick] [--json FILE]

A deterministic simulation of fixed traces (`trunkline_operator.simulation`), so one round is enough and nothing
depends on the machine. What a peer overflows over all traces together, ours must not exceed: of our settings
that keep to that, the one with the fewest GPU-hours is compared. The peers get what they would not have: exact
metrics without delay, the gateway's packing, and Trunkline's choice of victims and its drains.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import report

from trunkline_operator.agent.parsing import parsed
from trunkline_operator.agent.spec import Percent, VoiceAgent
from trunkline_operator.scaling.prices import Stakes, read, stakes
from trunkline_operator.simulation.model import Conditions, Outcome, Scaler, Simulation, packed
from trunkline_operator.simulation.peers import Hpa, knative
from trunkline_operator.simulation.scalers import Fixed, Trunkline
from trunkline_operator.simulation.settings import Price, price_of
from trunkline_operator.simulation.traces import FIXED, HELD_OUT, Trace

AGENT: dict[str, Any] = {
    "metadata": {"name": "bench", "namespace": "bench", "uid": "bench"},
    "spec": {
        "engine": {"type": "loopback"},
        "access": {"public": True},
        "warm": {"slotsPerPod": 4, "minPods": 2, "maxPods": 200},
        "burst": {
            "modal": {
                "credentialsSecretRef": {"name": "modal"},
                "gpu": ["L4"],
                "slotsPerContainer": 4,
                "bufferContainers": 2,
                "maxContainers": 100,
            }
        },
    },
}
# What prices make of the reserve, up to its bound; more than that is asked for with warm.bufferSlots.
DEVIATIONS = tuple(n / 10 for n in range(10, 31))
BUFFERS = (20, 25, 30, 35, 40, 45, 50)
QUICK_SCALE = 0.3
CONDITIONS = Conditions()

Make = Callable[[VoiceAgent], Scaler]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One policy over all traces."""

    name: str
    outcomes: tuple[Outcome, ...]
    price: Price

    @property
    def calls(self) -> int:
        return sum(outcome.calls for outcome in self.outcomes)

    @property
    def overflow(self) -> float:
        return 1 - sum(outcome.warm for outcome in self.outcomes) / self.calls

    @property
    def refused(self) -> int:
        return sum(outcome.refused for outcome in self.outcomes)

    @property
    def hours(self) -> float:
        return sum(outcome.pod_hours for outcome in self.outcomes)

    @property
    def burst_hours(self) -> float:
        return sum(outcome.burst_hours for outcome in self.outcomes)

    @property
    def dollars(self) -> float:
        return self.hours * self.price.gpu + self.burst_hours * self.price.container

    def line(self) -> str:
        each = " | ".join(f"{one.overflow:.2%} / {one.pod_hours:.0f}" for one in self.outcomes)
        return (
            f"| {self.name} | {self.overflow:.2%} | {self.refused} | {self.hours:.0f} "
            f"| {self.burst_hours:.0f} | {self.dollars:.0f} | {each} |"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How large a reserve ours keeps."""

    z: float
    buffer: int = 0  # bufferSlots in percent; 0 = as it comes

    def __str__(self) -> str:
        more = f" and bufferSlots {self.buffer}%" if self.buffer else ""
        return f"ours with z {self.z:g}{more}"

    def agent(self, agent: VoiceAgent) -> VoiceAgent:
        if not self.buffer:
            return agent
        return replace(agent, warm=replace(agent.warm, buffer_slots=Percent(self.buffer)))

    def scaler(self, agent: VoiceAgent) -> Scaler:
        return Trunkline(agent.warm, Stakes(z=self.z), CONDITIONS.pod_start_seconds)


class Bench:
    def __init__(self, quick: bool) -> None:
        self.agent = parsed(AGENT)
        scale = QUICK_SCALE if quick else 1.0
        self.traces = [make(scale) for make in FIXED]
        self.unseen = [make(scale, HELD_OUT + number) for number, make in enumerate(FIXED)]
        price = price_of(self.agent, read())
        assert price is not None
        self.price = price

    def run(self, name: str, make: Make, agent: VoiceAgent | None = None) -> Result:
        """One policy; it begins anew for each trace."""
        began = time.monotonic()
        who = agent or self.agent
        outcomes = tuple(
            Simulation(trace, who, make(who), CONDITIONS).run() for trace in self.traces
        )
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        return Result(name=name, outcomes=outcomes, price=self.price)

    def ours(self, setting: Setting) -> Result:
        """The decider of production, with so large a reserve."""
        return self.run(str(setting), setting.scaler, setting.agent(self.agent))

    def elsewhere(self, found: Result, make: Make, agent: VoiceAgent | None = None) -> Result:
        """The same policy with the same settings, on traces that these were not chosen by."""
        who = agent or self.agent
        outcomes = tuple(
            Simulation(trace, who, make(who), CONDITIONS).run() for trace in self.unseen
        )
        return Result(name=found.name, outcomes=outcomes, price=self.price)

    def usual(self) -> Result:
        """As it comes: with the reserve that the shipped prices ask for."""
        found = stakes(self.agent.warm, self.agent.burst, read())
        start = CONDITIONS.pod_start_seconds
        return self.run(
            f"ours as it comes, z {found.z:.2f}", lambda who: Trunkline(who.warm, found, start)
        )

    def pool(self, trace: Trace, overflow: float) -> Outcome:
        """The smallest fixed pool that overflows no more, by bisection."""
        low, high = 0, self.agent.warm.max_pods
        best = None
        while low < high:
            middle = (low + high) // 2
            found = Simulation(trace, self.agent, Fixed(middle), CONDITIONS).run()
            if found.overflow <= overflow:
                high, best = middle, found
            else:
                low = middle + 1
        return best or Simulation(trace, self.agent, Fixed(high), CONDITIONS).run()

    def fixed(self, like: Result) -> Result:
        """For each trace the smallest pool that overflows no more than another policy did."""
        pairs = zip(self.traces, like.outcomes, strict=True)
        pools = tuple(self.pool(trace, outcome.overflow) for trace, outcome in pairs)
        return Result(name="fixed pool, by trace", outcomes=pools, price=self.price)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another autoscaler, and the ratios that ours should reach against it."""

    name: str
    make: Make
    floor: float
    target: float


def hpa(target: float, *, whole: bool) -> Peer:
    name = f"HPA, {target:.0%}" + (", burst counted" if whole else " of slots")
    return Peer(
        name=name, make=lambda who: Hpa(who.warm, target, whole=whole), floor=0.94, target=0.90
    )


PEERS = (
    hpa(0.7, whole=False),
    hpa(0.7, whole=True),
    hpa(0.5, whole=False),
    hpa(0.5, whole=True),
    Peer(name="KPA, 70%", make=lambda who: knative(who.warm), floor=0.90, target=0.85),
)


def measure(quick: bool) -> list[report.Row]:
    bench = Bench(quick)
    tried = [Setting(z=z) for z in DEVIATIONS[:: 3 if quick else 1]]
    tried += [Setting(z=3.0, buffer=buffer) for buffer in BUFFERS]
    settings = {str(setting): setting for setting in tried}
    frontier = [bench.ours(setting) for setting in tried]
    usual = bench.usual()
    theirs = [bench.run(peer.name, peer.make) for peer in PEERS]
    chosen = [at_most(frontier, found.overflow) for found in theirs]
    pool = bench.fixed(chosen[-1])
    _tell(bench.traces, [usual, *frontier, *theirs, pool])
    rows = []
    for peer, found, ours in zip(PEERS, theirs, chosen, strict=True):
        against = f"{peer.name} ({ours.name})"
        if ours.overflow > found.overflow:
            against += f", which overflows less: {found.overflow:.2%} against {ours.overflow:.2%}"
        bounds = peer.floor, peer.target
        rows += [
            _row("warm GPU-hours at equal overflow", against, ours.hours, found.hours, *bounds),
            _row("dollars at equal overflow", against, ours.dollars, found.dollars),
        ]
    for peer, found, ours in zip(PEERS, theirs, chosen, strict=True):
        setting = settings[ours.name]
        mine = bench.elsewhere(ours, setting.scaler, setting.agent(bench.agent))
        other = bench.elsewhere(found, peer.make)
        against = (
            f"{peer.name} ({ours.name}; overflow {mine.overflow:.2%} and {other.overflow:.2%})"
        )
        rows.append(
            _row("warm GPU-hours, same settings, other seeds", against, mine.hours, other.hours)
        )
    ours = chosen[-1]
    packed_hours = sum(packed(trace, 4, bench.agent.warm.max_pods) for trace in bench.traces)
    return [
        *rows,
        _row("warm GPU-hours at equal overflow", pool.name, ours.hours, pool.hours),
        _row("warm GPU-hours", f"packed floor ({ours.name})", ours.hours, packed_hours, None, 1.35),
    ]


def at_most(frontier: Sequence[Result], overflow: float) -> Result:
    """Of those that overflow no more, the one with the fewest GPU-hours; if none, the one nearest to it."""
    fit = [found for found in frontier if found.overflow <= overflow]
    if not fit:
        return min(frontier, key=lambda found: found.overflow)
    return min(fit, key=lambda found: found.hours)


def _row(
    what: str,
    against: str,
    ours: float,
    theirs: float,
    floor: float | None = None,
    target: float | None = None,
) -> report.Row:
    return report.Row(
        what=what,
        against=against,
        unit="$" if what.startswith("dollars") else "h",
        ours=[ours],
        theirs=[theirs],
        floor=floor,
        target=target,
        at_most=True,
    )


def _tell(traces: Sequence[Trace], results: Sequence[Result]) -> None:
    names = " | ".join(f"{trace.name} (overflow / h)" for trace in traces)
    print(f"| policy | overflow | refused | GPU-hours | burst hours | dollars | {names} |")
    print("|---" * (6 + len(traces)) + "|")
    for result in results:
        print(result.line())
    print()


if __name__ == "__main__":
    report.main("scaling", measure)
