"""How many slots keep the frame's deadline, found by measurement, and the arithmetic of memory. Decisions only.

A step costs the same however many slots of the batch are in use, for the batch has one size. So a machine
that is too slow for the slots it was given gets a smaller batch, not merely fewer calls.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from trunkline_runtime.engine import FRAME_MS
from trunkline_runtime.engine.moshi.models import FRAME_RATE, ModelError

FRAME_SECONDS: Final = FRAME_MS / 1000
HEADROOM: Final = 0.9  # of a frame may be used by p99 of the steps
ROUNDS: Final = (
    3  # of measurements; the best counts, for a stall of the machine is not the model's speed
)
WINDOW_STEPS: Final = 125  # 10 s
RELIEF: Final = 0.9  # of the budget: below it a strained engine takes calls again
GIB: Final = 2**30


def p99(seconds: Sequence[float]) -> float:
    """The nearest-rank 99th percentile."""
    return sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1]


@dataclass(frozen=True, slots=True)
class Fit:
    """So many slots were found to keep the deadline; `seconds` is their step's p99."""

    slots: int
    seconds: float
    measured: dict[int, float]  # p99 by slots

    @property
    def keeps(self) -> bool:
        return self.seconds <= FRAME_SECONDS * HEADROOM

    def __str__(self) -> str:
        steps = ", ".join(f"{n}: {1000 * s:.1f} ms" for n, s in sorted(self.measured.items()))
        return f"{self.slots} slots; p99 of a step by slots: {steps}"


def fit(slots: int, measure: Callable[[int], float]) -> Fit:
    """The most slots up to `slots` whose step keeps the budget; at least 1, which may not.

    `measure` gives the p99 in seconds for a number of slots. Step time is taken to be linear in the slots.
    """
    budget = FRAME_SECONDS * HEADROOM
    measured = {slots: _best(measure, slots, budget)}
    if measured[slots] > budget and slots > 1:
        measured[1] = _best(measure, 1, budget)
    number = slots
    while measured[number] > budget and number > 1:
        each = (measured[number] - measured[1]) / (number - 1)
        estimate = 1 + math.floor((budget - measured[1]) / each) if each > 0 else number - 1
        number = min(max(estimate, 1), number - 1)
        if number not in measured:
            measured[number] = _best(measure, number, budget)
    return Fit(number, measured[number], measured)


def _best(measure: Callable[[int], float], slots: int, budget: float) -> float:
    best = math.inf
    for _ in range(ROUNDS):
        best = min(best, measure(slots))
        if best <= budget:
            break
    return best


class Strain:
    """Watches the steps of a running engine: while they are too slow, no further call is taken."""

    def __init__(self, judge: Callable[[Sequence[float]], float] = p99) -> None:
        self._judge = judge
        self._steps: deque[float] = deque(maxlen=WINDOW_STEPS)
        self.strained = False

    def __repr__(self) -> str:
        return f"<Strain {self.strained} over {len(self._steps)} steps>"

    def add(self, seconds: float) -> bool:
        """Takes a step's time; returns whether `strained` has changed. Judges whole windows only."""
        self._steps.append(seconds)
        if len(self._steps) < WINDOW_STEPS:
            return False
        budget = FRAME_SECONDS * HEADROOM * (RELIEF if self.strained else 1)
        slow = self._judge(self._steps) > budget
        self._steps.clear()
        changed = slow != self.strained
        self.strained = slow
        return changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What an engine needs, in bytes."""

    weights: int
    slot_fixed: int  # a slot's streaming state that does not grow with the context
    slot_frame: int  # of a slot's keys and values, for each frame of Moshi's context
    context_frames: int
    beside_frames: int = 0  # of one slot more, that of a call which is refreshed

    @property
    def beside(self) -> int:
        return self.slot_frame * self.beside_frames

    @property
    def slot(self) -> int:
        return self.slot_fixed + self.slot_frame * self.context_frames

    def sentence(self, slots: int) -> str:
        """The arithmetic, for the log."""
        total = self.weights + slots * self.slot + self.beside
        refresh = f" + {self.beside / GIB:.3f} GiB to refresh one" if self.beside else ""
        return (
            f"weights {self.weights / GIB:.2f} GiB + {slots} slots × {self.slot / GIB:.3f} GiB"
            f" ({self.context_frames / FRAME_RATE:g} s of context){refresh} = {total / GIB:.2f} GiB"
        )

    def fits(self, free: int, total: int) -> int:
        """The most slots for which `check` is content."""
        return max(0, self._usable(free, total) // self.slot)

    def _usable(self, free: int, total: int) -> int:
        return free - total // 10 - self.beside

    def check(self, slots: int, free: int, total: int) -> None:
        """Raises `ModelError` when the slots do not fit beside the weights, which are loaded already.

        `free` and `total` are the device's, in bytes. A tenth of the total stays for activations, CUDA
        graphs and the libraries' own memory.
        """
        usable = self._usable(free, total)
        if slots * self.slot <= usable:
            return
        most = self.fits(free, total)
        frames = max(0, (usable // slots - self.slot_fixed) // max(1, self.slot_frame))
        advice = [f"slotsPerPod: {most}"] if most else []
        if frames:
            advice.append(f"contextSeconds: {math.floor(frames / FRAME_RATE)}")
        raise ModelError(
            f"{self.sentence(slots)}, and of the device's {total / GIB:.2f} GiB only {usable / GIB:.2f} GiB"
            f" are left for slots: {' or '.join(advice) or 'take a larger GPU, or int8 weights'}"
        )
