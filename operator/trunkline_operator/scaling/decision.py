"""(load, capacity, now) → pods wanted, and why.

Slots are wanted for every call that is there, warm or burst, and for those who come before a pod that is
asked for now has started: what `warm.bufferSlots` keeps free, or the reserve that arrivals, the measured
start of a pod and prices ask for (`staffing.py`, `prices.py`), with slots for crowds such as came before
(`crowds.py`), whichever is more. Pods that are starting are an answer that was given, not capacity: they
are not asked for twice, and no call is counted on them.

Up at once, down late: the wish of the moment is followed when it rises, and when it falls only after it
has been lower for `warm.scaleDown.delaySeconds`. What must be known for that is a value that goes in and
comes out (`Memory`), so the decision is a function.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from trunkline_operator.agent.spec import Autoscaling, Percent, Warm
from trunkline_operator.scaling.advice import Day, advice, watched
from trunkline_operator.scaling.crowds import Crowds, after, expected
from trunkline_operator.scaling.prices import Stakes
from trunkline_operator.scaling.schedule import floor
from trunkline_operator.scaling.staffing import RATE_SECONDS, Count, Flow, followed, reserve

# Without calls the rates fall by themselves: what they ask for is looked at so often, while it is anything. So is what
# refused calls asked for.
EBB_SECONDS: Final = RATE_SECONDS / 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is needed and what is there, of one agent at one moment."""

    busy: int  # slots of warm workers that are reserved or live
    burst: int  # calls on burst
    arrivals: int = 0  # total
    refused: int  # total
    waiting: int = 0  # callers in line for a slot
    known: bool  # False: some worker's load is unknown, so nothing is taken away
    active: int  # pods that count as capacity, now or soon
    serving: int  # of them, those that are ready
    offers: tuple[int, ...] = ()  # slots of each of them, the last to be taken away first; () = all
    # have the usual number
    usual: int | None = None  # slots that one more pod is expected to have; None = `slotsPerPod`
    start_seconds: float | None = None  # of a pod until it was ready, measured; None = not yet
    stakes: Stakes = field(default_factory=Stakes)

    @property
    def calls(self) -> int:
        """Those who want a slot: who has one here, who has one at Modal, and who waits for one."""
        return self.busy + self.burst + self.waiting


@dataclass(frozen=True, slots=True)
class Peak:
    """So many pods were wanted until this moment."""

    pods: int
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What one decision must know of earlier ones. `Memory()` is that of a new operator."""

    wish: int | None = None  # the last one
    refused: int | None = None  # the total then
    peaks: tuple[Peak, ...] = ()  # all above the wish; pods fall, times rise: at most maxPods
    flow: Flow = field(default_factory=Flow)
    crowds: Crowds = field(default_factory=Crowds)
    day: Day = field(default_factory=Day)
    idle: Mapping[str, float] | None = None  # see `decisions.eviction`
    unlinked: Mapping[str, float] = field(default_factory=dict)  # see `decisions.reach`


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    pods: int
    reason: str  # in words, for people
    memory: Memory
    # Seconds until the number, or the growth in the memory, may be another if nothing else happens; None = never.
    look_again: float | None
    advice: str = ""  # what other settings would save; "" = nothing


def decided(warm: Warm, demand: Demand, now: float, memory: Memory) -> Decision:
    """How many pods there should be, never below `minPods` and the schedule nor above `maxPods`."""
    least = floor(warm.schedule, now, start_seconds(warm, demand))
    bottom = max(warm.min_pods, least.pods)
    memory = _noted(warm, demand, now, memory)
    words = advice(memory.day, demand.stakes)
    waits = [least.changes_in, _ebbs(warm, demand, memory)]
    if warm.autoscaling is Autoscaling.EXTERNAL:
        return _external(warm, demand, memory, bottom, waits, words)
    if memory.refused is not None and demand.refused > memory.refused:
        waits.append(EBB_SECONDS)  # calls are refused once, and a pod for them is wished once
    asked, reason = _wish(warm, demand, memory)
    wish = clamped(warm, asked, bottom)
    peaks = _peaks(warm, demand, wish, now, memory)
    if wish != asked:
        reason += f", within {bottom} … {warm.max_pods} pods"
    pods = wish
    if peaks:
        pods = clamped(warm, peaks[0].pods, bottom)
        waits.append(peaks[0].until + warm.scale_down_delay_seconds - now)
    if pods > wish:
        reason = f"{pods} were needed {now - peaks[0].until:.0f} s ago; now {reason}"
    return Decision(
        pods=pods,
        reason=reason,
        memory=replace(memory, wish=wish, refused=demand.refused, peaks=peaks),
        look_again=_soonest(waits),
        advice=words,
    )


def _soonest(waits: Iterable[float | None]) -> float | None:
    return min((wait for wait in waits if wait is not None), default=None)


def clamped(warm: Warm, pods: int, bottom: int) -> int:
    """Within the floor of the moment and `maxPods`, which is the stronger of the two."""
    return min(max(bottom, pods), warm.max_pods)


def start_seconds(warm: Warm, demand: Demand) -> float:
    """How long a pod takes until it is ready: as measured, or else as hinted."""
    measured = demand.start_seconds
    return float(warm.startup_seconds_hint) if measured is None else measured


def spare(warm: Warm, calls: int) -> int:
    """Slots that `warm.bufferSlots` keeps free beside so many calls; a percentage is of all slots."""
    match warm.buffer_slots:
        case Percent(of=of):
            return -(-calls * of // (100 - of))
        case slots:
            return slots


def _noted(warm: Warm, demand: Demand, now: float, memory: Memory) -> Memory:
    """The memory with this look's counts; those of silent gateways are no news."""
    if not demand.known:
        return memory
    count = Count(arrivals=demand.arrivals, refused=demand.refused, calls=demand.calls)
    flow, start = followed(memory.flow, count, now), start_seconds(warm, demand)
    free = reserve(flow, start, demand.stakes.z)
    full = demand.active >= warm.max_pods
    return replace(
        memory,
        flow=flow,
        crowds=after(memory.crowds, demand.calls, free, start, now),
        day=watched(memory.day, warm, demand.stakes, demand.burst, full, now),
    )


def _external(
    warm: Warm,
    demand: Demand,
    memory: Memory,
    bottom: int,
    waits: Iterable[float | None],
    words: str,
) -> Decision:
    """Whoever writes /scale has its own delays, so its number is followed as it is."""
    asked = warm.min_pods if warm.replicas is None else warm.replicas
    # Whoever takes over from this begins with what is there.
    return Decision(
        pods=clamped(warm, asked, bottom),
        reason=f"warm.replicas asks for {asked}",
        memory=Memory(refused=demand.refused, flow=memory.flow, day=memory.day),
        look_again=_soonest(waits),
        advice=words,
    )


def _wish(warm: Warm, demand: Demand, memory: Memory) -> tuple[int, str]:
    """Pods that the load of this moment needs, and the arithmetic."""
    wish, reason = _staffed(warm, demand, memory)
    # A refused call is demand that no slot shows. Pods that are starting already answer it.
    refused = 0 if memory.refused is None else demand.refused - memory.refused
    if refused > 0 and wish <= demand.serving:
        wish = demand.serving + 1
        reason = f"{refused} calls were refused with {demand.serving} pods ready"
    if not demand.known and wish < demand.active:
        wish = demand.active
        reason = f"the load of some workers is unknown, so all {wish} pods are kept"
    return wish, reason


def _staffed(warm: Warm, demand: Demand, memory: Memory) -> tuple[int, str]:
    """Pods for the calls that are there and the slots to keep free."""
    if not demand.stakes.pays:
        return 0, f"{demand.stakes.words}, so none beside warm.minPods"
    free, why = spare(warm, demand.calls), "spare slots"
    need, crowd = _reserve(warm, demand, memory)
    if need > free:
        free = need
        why = f"slots for {memory.flow.arriving * 60:.1f} calls a minute while a pod starts"
        why += f", {crowd} of them for a crowd as in the last hours," if crowd else ""
    usual = warm.slots_per_pod if demand.usual is None else demand.usual
    wish = pods_for(demand.calls + free, demand.offers, usual)
    waiting = f"and {demand.waiting} who wait " if demand.waiting else ""
    each = f"at {usual} a pod"
    if demand.offers:
        each = (
            f"with {sum(demand.offers)} slots in {len(demand.offers)} pods and {usual} in each more"
        )
    return wish, (
        f"{demand.busy} warm and {demand.burst} burst calls {waiting}and {free} {why} "
        f"{each} need {wish}"
    )


def _reserve(warm: Warm, demand: Demand, memory: Memory) -> tuple[int, int]:
    """Slots to keep free, and how many of them for a crowd.

    Rounded to the nearest: a rate never quite falls to zero, and would else keep a slot for ever.
    """
    z = demand.stakes.z
    need = math.floor(reserve(memory.flow, start_seconds(warm, demand), z) + 0.5)
    # Where nobody calls any more nobody is waited for, however many came at once before.
    crowd = expected(memory.crowds, z) if need else 0
    return need + crowd, crowd


def _ebbs(warm: Warm, demand: Demand, memory: Memory) -> float | None:
    """Seconds until rates and crowds may ask for something else.

    Rates only fall, so what they ask for never comes back by itself. A crowd that is there may become worth it.
    """
    if not demand.known:  # nothing is counted, so they stay
        return None
    asked = demand.stakes.pays and _reserve(warm, demand, memory)[0] > spare(warm, demand.calls)
    changes = asked or memory.flow.growth > 0 or memory.crowds.missing > 0
    return EBB_SECONDS if changes else None


def pods_for(slots: int, offers: tuple[int, ...], usual: int) -> int:
    """The fewest pods that have so many slots: of those with `offers`, in that order, and then `usual` ones."""
    if slots <= 0:
        return 0
    for count, total in enumerate(itertools.accumulate(offers), 1):
        if total >= slots:
            return count
    return len(offers) - (sum(offers) - slots) // usual


def _peaks(warm: Warm, demand: Demand, wish: int, now: float, memory: Memory) -> tuple[Peak, ...]:
    """Higher wishes that ended less than the delay ago, the highest first.

    A new operator knows of no wish, so it takes the pods that it finds for the last one.
    """
    last = clamped(warm, demand.active, warm.min_pods) if memory.wish is None else memory.wish
    peaks = [peak for peak in memory.peaks if peak.pods > wish]
    if last > wish:
        peaks.append(Peak(last, now))
    return tuple(peak for peak in peaks if peak.until + warm.scale_down_delay_seconds > now)
