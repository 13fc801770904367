"""The callers who wait for a slot, in the order in which they came. Pure: no clock, no futures.

Whenever slots come free, `serve` gives them out: to the one who has waited longest, unless what is free is kept
for other tenants, and then to the first who may have it. So it is first come, first served within what each
tenant may have. Someone who was given a slot that then went to another gateway's caller keeps their place.

Each gateway has a line of its own, and callers of two gateways race for a slot that both have seen.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from trunkline_runtime.gateway.table import Row


class Nothing(Enum):
    """Who may have none of the slots that are free now."""

    FOR_ANYBODY = auto()  # there are none
    FOR_TENANT = auto()  # they are kept for others
    FOR_CALLER = auto()  # its call has failed at these workers


Give = Callable[["Waiter"], Row | Nothing]
"""A worker whose slot is held for this waiter from now on, or who may have none."""


@dataclass(slots=True, eq=False)
class Waiter:
    """One caller's place. `woken` is called with the worker whose slot is held for it."""

    tenant: str
    take: Callable[[Callable[[], int]], bool] = field(repr=False)
    woken: Callable[[Row], None] = field(repr=False)
    avoid: set[Row] = field(default_factory=set)  # workers that did not take its call
    number: int = 0


class Lines:
    """One line for each agent."""

    def __init__(self) -> None:
        self._lines: dict[str, dict[int, Waiter]] = {}
        self._numbers = itertools.count(1)

    def __repr__(self) -> str:
        return f"<Lines { {agent: len(line) for agent, line in self._lines.items()} }>"

    def waiting(self, agent: str) -> int:
        """How many stand in an agent's line."""
        return len(self._lines.get(agent, ()))

    def agents(self) -> tuple[str, ...]:
        """Whose lines are not empty."""
        return tuple(self._lines)

    def join(self, agent: str, waiter: Waiter, most: int) -> bool:
        """Takes a place at the end, or the one that the waiter had before; False where `most` stand there."""
        line = self._lines.setdefault(agent, {})
        back = bool(waiter.number)
        if not back and len(line) >= most:
            if not line:
                del self._lines[agent]
            return False
        waiter.number = waiter.number or next(self._numbers)
        line[waiter.number] = waiter
        if back and next(reversed(line)) == waiter.number and len(line) > 1:
            self._lines[agent] = dict(sorted(line.items()))  # it came before those who stand there
        return True

    def leave(self, agent: str, waiter: Waiter) -> None:
        """Gives the place up; nothing where it has none."""
        line = self._lines.get(agent)
        if line is None or line.pop(waiter.number, None) is None:
            return
        if not line:
            del self._lines[agent]

    def serve(self, agent: str, give: Give) -> None:
        """Gives out what is free. Whoever gets a slot leaves the line and is woken."""
        passed: set[str] = set()  # tenants that may have nothing of what is free now
        for waiter in list(self._lines.get(agent, {}).values()):
            if waiter.tenant in passed or waiter.number not in self._lines.get(agent, {}):
                continue  # or it was served meanwhile: whoever is woken may call this again
            match give(waiter):
                case Nothing.FOR_ANYBODY:
                    return
                case Nothing.FOR_TENANT:
                    passed.add(waiter.tenant)
                case Nothing.FOR_CALLER:
                    pass
                case Row() as row:
                    self.leave(agent, waiter)
                    waiter.woken(row)
