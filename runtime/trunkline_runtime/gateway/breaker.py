"""When a rung is not tried for a while, because it has failed too often. Pure: the time is an argument.

    state    | event                        | next
    ---------|------------------------------|--------------------------------------------------
    closed   | a fault, and too many so far | open, for `Terms.first` seconds
    open     | asked, the time is over      | trying: this call is the probe, others pass by
    open     | an earlier call was answered | open, and its time is over: it may work again
    trying   | the probe was answered       | closed
    trying   | a fault                      | open, for twice as long as before
    trying   | neither, or nothing for long | trying: the next that asks is the probe

Only faults count: a place that has no room has answered, and the next call may find some.
"""

from collections.abc import Collection, Hashable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final


class State(StrEnum):
    """Whether calls are let through."""

    CLOSED = "closed"
    OPEN = "open"
    TRYING = "trying"


class Outcome(StrEnum):
    """How an attempt ended."""

    GOOD = "good"  # with a call
    FAULT = "fault"  # no answer in time, or one that says that it does not work
    NEITHER = "neither"  # there was no room, or the caller left


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What opens a breaker, and for how long; seconds."""

    row: int = 4  # faults one after the other
    share: float = 0.5  # or of the attempts within `window`, at least `least` of them
    window: float = 30.0
    least: int = 10
    first: float = 5.0  # a caller that was refused comes back after so long
    longest: float = 60.0  # a place that works again is known after a minute at most


MOST_REMEMBERED: Final = 64  # attempts; at more than two a second the window is shorter


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """One rung's. `Breaker()` is that of a rung that was never tried."""

    state: State = State.CLOSED
    until: float = 0.0  # when an open one is tried, or when a probe counts as lost
    wait: float = 0.0  # for how long it was opened last
    row: int = 0  # faults since the last success
    recent: tuple[tuple[float, bool], ...] = ()  # when, and whether it was a fault


def shut(breaker: Breaker, now: float) -> float:
    """Seconds for which calls pass a rung by; 0 for one that may be tried."""
    return 0.0 if breaker.state is State.CLOSED else max(0.0, breaker.until - now)


def tried(breaker: Breaker, now: float, answer_by: float) -> Breaker:
    """A call tries the rung, and will know by `answer_by`. To be asked for only where it is not `shut`."""
    if breaker.state is State.CLOSED:
        return breaker
    return replace(breaker, state=State.TRYING, until=answer_by)


def told(breaker: Breaker, outcome: Outcome, now: float, terms: Terms) -> Breaker:
    """An attempt has ended. Of those that began before the breaker opened only an answer changes anything.

    So it is with containers that a crowd has to wait for: the first are told in time that there is none, and the
    next must not be, once there are some.
    """
    match breaker.state, outcome:
        case (State.CLOSED, Outcome.GOOD):
            return replace(_with(breaker, now, False, terms), row=0, wait=0.0)
        case (State.CLOSED, Outcome.FAULT):
            after = _with(breaker, now, True, terms)
            return _opened(after, now, terms) if _too_many(after, terms) else after
        case (State.OPEN, Outcome.GOOD):
            return replace(breaker, until=now)
        case (State.TRYING, Outcome.GOOD):
            return Breaker()
        case (State.TRYING, Outcome.FAULT):
            return _opened(breaker, now, terms)
        case (State.TRYING, Outcome.NEITHER):
            return replace(breaker, until=now)
        case _:
            return breaker


def _with(breaker: Breaker, now: float, fault: bool, terms: Terms) -> Breaker:
    recent = [each for each in breaker.recent if each[0] > now - terms.window]
    recent = [*recent, (now, fault)][-MOST_REMEMBERED:]
    return replace(breaker, row=breaker.row + fault, recent=tuple(recent))


def _too_many(breaker: Breaker, terms: Terms) -> bool:
    faults = sum(fault for _, fault in breaker.recent)
    many = len(breaker.recent) >= terms.least and faults >= terms.share * len(breaker.recent)
    return breaker.row >= terms.row or many


def _opened(breaker: Breaker, now: float, terms: Terms) -> Breaker:
    wait = min(2 * breaker.wait or terms.first, terms.longest)
    return Breaker(state=State.OPEN, until=now + wait, wait=wait, row=breaker.row)


class Breakers:
    """The breakers of all rungs; a rung is named by whatever the caller of this names it by."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._breakers: dict[Hashable, Breaker] = {}

    def __repr__(self) -> str:
        states = {name: str(breaker.state) for name, breaker in self._breakers.items()}
        return f"<Breakers {states}>"

    def state(self, rung: Hashable) -> Breaker:
        """As it is."""
        return self._breakers.get(rung, Breaker())

    def why_not(self, rung: Hashable, now: float, answer_by: float) -> str | None:
        """Why a call must pass the rung by; None lets it try, and `told` must follow."""
        breaker = self.state(rung)
        if seconds := shut(breaker, now):
            if breaker.state is State.TRYING:
                return "failed too often: another call tries it"
            return f"failed too often: tried again in {seconds:.0f} s"
        self._breakers[rung] = tried(breaker, now, answer_by)
        return None

    def told(self, rung: Hashable, outcome: Outcome, now: float) -> bool:
        """An attempt has ended; whether that has opened or closed the breaker."""
        before = self.state(rung)
        after = told(before, outcome, now, self._terms)
        self._breakers[rung] = after
        return (before.state is State.CLOSED) is not (after.state is State.CLOSED)

    def keep(self, rungs: Collection[Hashable]) -> None:
        """Forgets all but these: the routes name no others."""
        for rung in self._breakers.keys() - set(rungs):
            del self._breakers[rung]
