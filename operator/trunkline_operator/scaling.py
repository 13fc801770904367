"""(load, capacity, now) → pods wanted, and why.

Up at once, down late: the wish of the moment is followed when it rises, and when it falls only after it
has been lower for `warm.scaleDown.delaySeconds`. What must be known for that is a value that goes in and
comes out (`Memory`), so the decision is a function.
"""

from dataclasses import dataclass

from trunkline_operator.spec import Autoscaling, Warm


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is needed and what is there, of one agent at one moment."""

    busy: int  # slots of warm workers that are reserved or live
    burst: int  # calls on burst
    refused: int  # total
    known: bool  # False: some worker's load is unknown, so nothing is taken away
    active: int  # pods that count as capacity, now or soon
    serving: int  # of them, those that are ready


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    pods: int
    reason: str  # in words, for people
    memory: Memory
    look_again: float | None  # seconds until the number falls if nothing else happens


def decided(warm: Warm, demand: Demand, now: float, memory: Memory) -> Decision:
    """How many pods there should be, never below `minPods` nor above `maxPods`."""
    if warm.autoscaling is Autoscaling.EXTERNAL:
        return _external(warm, demand)
    asked, reason = _wish(warm, demand, memory)
    wish = clamped(warm, asked)
    peaks = _peaks(warm, demand, wish, now, memory)
    if wish != asked:
        reason += f", within {warm.min_pods} … {warm.max_pods} pods"
    pods, look_again = wish, None
    if peaks:
        pods = clamped(warm, peaks[0].pods)
        look_again = peaks[0].until + warm.scale_down_delay_seconds - now
    if pods > wish:
        reason = f"{pods} were needed {now - peaks[0].until:.0f} s ago; now {reason}"
    kept = Memory(wish=wish, refused=demand.refused, peaks=peaks)
    return Decision(pods=pods, reason=reason, memory=kept, look_again=look_again)


def clamped(warm: Warm, pods: int) -> int:
    return max(warm.min_pods, min(pods, warm.max_pods))


def _external(warm: Warm, demand: Demand) -> Decision:
    """Whoever writes /scale has its own delays, so its number is followed as it is."""
    asked = warm.min_pods if warm.replicas is None else warm.replicas
    # Whoever takes over from this begins with what is there.
    return Decision(
        pods=clamped(warm, asked),
        reason=f"warm.replicas asks for {asked}",
        memory=Memory(refused=demand.refused),
        look_again=None,
    )


def _wish(warm: Warm, demand: Demand, memory: Memory) -> tuple[int, str]:
    """Pods that the load of this moment needs, and the arithmetic."""
    calls = demand.busy + demand.burst
    wish = -(-(calls + warm.buffer_slots) // warm.slots_per_pod)
    reason = (
        f"{demand.busy} warm and {demand.burst} burst calls and {warm.buffer_slots} spare slots "
        f"at {warm.slots_per_pod} a pod need {wish}"
    )
    # A refused call is demand that no slot shows. Pods that are starting already answer it.
    refused = 0 if memory.refused is None else demand.refused - memory.refused
    if refused > 0 and wish <= demand.serving:
        wish = demand.serving + 1
        reason = f"{refused} calls were refused with {demand.serving} pods ready"
    if not demand.known and wish < demand.active:
        wish = demand.active
        reason = f"the load of some workers is unknown, so all {wish} pods are kept"
    return wish, reason


def _peaks(warm: Warm, demand: Demand, wish: int, now: float, memory: Memory) -> tuple[Peak, ...]:
    """Higher wishes that ended less than the delay ago, the highest first.

    A new operator knows of no wish, so it takes the pods that it finds for the last one.
    """
    last = clamped(warm, demand.active) if memory.wish is None else memory.wish
    peaks = [peak for peak in memory.peaks if peak.pods > wish]
    if last > wish:
        peaks.append(Peak(last, now))
    return tuple(peak for peak in peaks if peak.until + warm.scale_down_delay_seconds > now)
