"""(load, capacity, now) → pods wanted, and why."""

from dataclasses import dataclass

from trunkline_operator.spec import Warm


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is needed and what is there, of one agent at one moment."""

    busy: int  # slots of warm workers that are reserved or live
    burst: int  # calls on burst
    refused: int  # total; it falls when a gateway restarts
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

    wish: int | None = None
    refused: int | None = None
    peaks: tuple[Peak, ...] = ()  # falling pods, rising times


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    pods: int
    reason: str  # in words, for people
    memory: Memory
    look_again: float | None  # seconds until the number may fall though nothing else happens


def decided(warm: Warm, demand: Demand, now: float, memory: Memory) -> Decision:
    """How many pods there should be."""
    raise NotImplementedError
