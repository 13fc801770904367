"""The order in which a call looks for a slot, and the record of where it looked.

A `Ladder` is asked for the next attempt and told how that went; it never waits and has no clock. Every
attempt has a deadline, and none lies behind the route's `answerSeconds`. The last attempt that there is
has all of that: a worker that is slow to answer is passed over only where there is somewhere else to go.

Standing in line for a slot is an attempt, too. What comes of it is a warm attempt at the worker whose slot came
free (`offered`); where another gateway's caller was faster, the ladder sends its caller back into the line.

In a gateway's first seconds a slot may be missing only because its worker has not found the gateway yet. Until
`settled_at` there is a line for every agent that has pods, be there one in its route or not.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Final

from trunkline_runtime.contract import NO_SLOT
from trunkline_runtime.gateway.routes import BurstRung, Route, UpstreamRung, WaitRung, WarmRung
from trunkline_runtime.gateway.table import Census, Row

Pick = Callable[[Collection[Row]], Row | str | None]
"""The choice among the workers that were not tried yet, or why none may be taken."""

Shut = Callable[[str, float], str | None]
"""Why a rung of this name is not tried now; None lets the call try it until the time that is given."""

EARLY_SECONDS: Final = 0.002  # uvloop counts in milliseconds, so a timer may fire before its time
LAST_SECONDS: Final = (
    0.25  # of answerSeconds that are left when a caller leaves the line: a dial takes 2 ms
)
MOST_STEPS: Final = (
    24  # of a record; a caller in line may lose many races, which are told as one from there on
)
# Callers in an agent's line then; `session.waitingCallers` may be as many.
MOST_SETTLING: Final = 1000
IN_LINE: Final = "waited in line"
LEFT: Final = "the caller left"
UPSTREAM: Final = "upstream"  # the rung's name; there is one at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a gateway waits for others, in seconds, and how many workers a warm rung tries."""

    answer: float = (
        0.5  # a worker answers in 1 ms, or 5 by TLS; one that is silent so long is stuck
    )
    tries: int = 3  # two stuck workers then cost 1 s, and the last one what is left
    # For a caller or a worker that reads nothing: it holds the other for nobody.
    stall: float = 30.0
    # For a worker that is silent on all its links, before its calls are given up. More than the three seconds
    # after which it gets no new one: a machine short of processors kept a healthy worker from its second so long.
    silence: float = 10.0


@dataclass(frozen=True, slots=True)
class TryWarm:
    row: Row
    answer_by: float
    held: bool = False  # one of its slots is kept for this call already


@dataclass(frozen=True, slots=True)
class TryBurst:
    rung: BurstRung
    answer_by: float


@dataclass(frozen=True, slots=True)
class TryUpstream:
    rung: UpstreamRung
    answer_by: float


@dataclass(frozen=True, slots=True)
class TryWait:
    """A place in the line until `until`."""

    rung: WaitRung
    until: float


Attempt = TryWarm | TryBurst | TryUpstream | TryWait


@dataclass(frozen=True, slots=True)
class Warm:
    worker: str


@dataclass(frozen=True, slots=True)
class Burst:
    region: str


@dataclass(frozen=True, slots=True)
class Upstream:
    pass


@dataclass(frozen=True, slots=True)
class Rejected:
    """No rung had a slot in time; the sentence is for the caller."""

    why: str


Result = Warm | Burst | Upstream | Rejected


@dataclass(frozen=True, slots=True)
class Step:
    """One rung or worker that was passed over, why, and how long that took."""

    rung: str
    worker: str
    why: str
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Why a call went where it went."""

    result: Result
    steps: tuple[Step, ...]
    ms: float
    answered_ms: float = 0.0  # of them at the rung that answered
    start: str = ""  # of a container at Modal: warm, or for this call cold or restored
    warm: Census | None = None  # the agent's pods when no slot was found on them

    @property
    def rung(self) -> str:
        match self.result:
            case Warm():
                return "warm"
            case Burst(region):
                return f"burst/{region}"
            case Upstream():
                return UPSTREAM
            case Rejected():
                return "none"

    @property
    def worker(self) -> str:
        return self.result.worker if isinstance(self.result, Warm) else ""

    def again(self, why: str, after: "Placement") -> "Placement":
        """The record of a call whose worker was lost before its first word, and which was placed `after` that.

        `ms` stays what it took to the caller's 101.
        """
        lost = Step(self.rung, self.worker, why, self.answered_ms)
        return replace(
            after,
            steps=(*self.steps, lost, *after.steps),
            ms=self.ms,
            warm=self.warm or after.warm,
        )


class Ladder:
    """One call's way down the rungs of its route. `begun` and every `now` are seconds of one clock.

    `shut` is asked about each rung outside the cluster before it is tried.
    """

    def __init__(
        self,
        route: Route,
        begun: float,
        patience: Patience,
        shut: Shut = lambda *_: None,
        settled_at: float = 0.0,
    ) -> None:
        self._route = route
        self._rungs = route.rungs
        self._begun = begun
        self._end = begun + route.answer_seconds
        self._in_line_until = self._end - LAST_SECONDS
        if begun < settled_at and WarmRung() in route.rungs and not _has_line(route):
            self._rungs = (*route.rungs, WaitRung(MOST_SETTLING))
            self._in_line_until = min(self._in_line_until, settled_at)
        self._patience = patience
        self._shut = shut
        self._rung = 0
        self._tries = 0  # on this rung
        self._tried: set[Row] = set()
        self._steps: list[Step] = []
        self._attempt: Attempt | None = None
        self._since = begun
        self._hoped = False  # there were slots to hope for until the time was over

    def __repr__(self) -> str:
        return f"<Ladder rung={self._rung} tries={self._tries} attempt={self._attempt}>"

    def next(self, now: float, pick: Pick) -> Attempt | Rejected:
        """The next attempt, or the end. The attempt before must have been told of by `failed`."""
        assert self._attempt is None, "an attempt is still open"
        while self._rung < len(self._rungs) and now < self._end - EARLY_SECONDS:
            match self._rungs[self._rung]:
                case WarmRung():
                    attempt: Attempt | None = self._warm(now, pick)
                case WaitRung() as rung:
                    attempt = self._wait(now, rung)
                case BurstRung() | UpstreamRung() as rung:
                    self._descend()
                    attempt = self._beyond(now, rung)
            if attempt is not None:
                self._attempt, self._since = attempt, now
                return attempt
        if self._hoped or now >= self._end - EARLY_SECONDS:
            return Rejected(f"no slot of {self._route.agent} was free in time")
        return Rejected(f"every slot of {self._route.agent} is taken")

    def offered(self, now: float, row: Row) -> TryWarm:
        """The caller has waited long enough: a slot of this worker is held for it."""
        assert isinstance(self._attempt, TryWait), "nobody waits"
        self._note(Step("wait", "", IN_LINE, self._ms(now)))
        self._tries += 1
        # Longer than on the first rung: there is nothing else. Not all there is: others may come free.
        answer_by = min(now + 4 * self._patience.answer, self._end)
        attempt = TryWarm(row, answer_by, held=True)
        self._attempt, self._since = attempt, now
        return attempt

    def failed(self, now: float, why: str) -> None:
        """The open attempt did not end in a call."""
        assert self._attempt is not None, "no attempt is open"
        worker = self._attempt.row.worker if isinstance(self._attempt, TryWarm) else ""
        self._note(Step(_name(self._attempt), worker, why, self._ms(now)))
        if isinstance(self._attempt, TryWait):
            self._descend()
        self._attempt = None

    def answered(self, now: float, start: str = "", warm: Census | None = None) -> Placement:
        """The open attempt's worker has answered: the call is placed. `start` and `warm` are for its record."""
        match self._attempt:
            case TryWarm(row):
                return self._placed(Warm(row.worker), now, start, warm)
            case TryBurst(rung):
                return self._placed(Burst(rung.name), now, start, warm)
            case TryUpstream():
                return self._placed(Upstream(), now, start, warm)
        raise AssertionError("no attempt is open that could be answered")

    def rejected(self, rejected: Rejected, now: float) -> Placement:
        return self._placed(rejected, now)

    def left(self, now: float) -> Placement:
        """The caller went away, at whatever was being tried for it."""
        if self._attempt is not None:
            self.failed(now, LEFT)
        return self._placed(Rejected(LEFT), now)

    def _warm(self, now: float, pick: Pick) -> TryWarm | None:
        row = pick(self._tried) if self._tries < self._patience.tries else None
        if row is None or isinstance(row, str):
            if row is not None or not self._tries:
                self._note(Step("warm", "", row or NO_SLOT, 0.0))
            self._descend()
            return None
        self._tried.add(row)
        self._tries += 1
        if self._nothing_after(pick):
            return TryWarm(row, self._end)  # slow is better than refused
        return TryWarm(row, min(now + self._patience.answer, self._end))

    def _wait(self, now: float, rung: WaitRung) -> TryWait | None:
        if self._in_line_until <= now:
            self._descend()
            return None
        self._hoped = True
        return TryWait(rung, self._in_line_until)

    def _beyond(self, now: float, rung: BurstRung | UpstreamRung) -> TryBurst | TryUpstream | None:
        answer_by = min(now + rung.deadline, self._end)
        attempt: TryBurst | TryUpstream
        match rung:
            case BurstRung():
                attempt = TryBurst(rung, answer_by)
            case UpstreamRung():
                attempt = TryUpstream(rung, answer_by)
        why = self._shut(_name(attempt), answer_by)
        if why is None:
            return attempt
        self._note(Step(_name(attempt), "", why, 0.0))
        return None

    def _nothing_after(self, pick: Pick) -> bool:
        """Whether the attempt that is being made is the last that the call can have, but for a line while workers come."""
        if self._rung + 1 < len(self._route.rungs):
            return False
        return self._tries >= self._patience.tries or not isinstance(pick(self._tried), Row)

    def _descend(self) -> None:
        self._rung += 1
        self._tries = 0

    def _note(self, step: Step) -> None:
        if len(self._steps) < MOST_STEPS:
            self._steps.append(step)
            return
        last = self._steps[-1]
        self._steps[-1] = Step(last.rung, "", "and so on", last.ms + step.ms)

    def _ms(self, now: float) -> float:
        return (now - self._since) * 1000

    def _placed(
        self, result: Result, now: float, start: str = "", warm: Census | None = None
    ) -> Placement:
        return Placement(
            result=result,
            steps=tuple(self._steps),
            ms=(now - self._begun) * 1000,
            answered_ms=0.0 if self._attempt is None else self._ms(now),
            start=start,
            warm=warm,
        )


def _has_line(route: Route) -> bool:
    return any(isinstance(rung, WaitRung) for rung in route.rungs)


def _name(attempt: Attempt) -> str:
    """The rung of an attempt, as records have it."""
    match attempt:
        case TryWarm():
            return "warm"
        case TryBurst(rung):
            return f"burst/{rung.name}"
        case TryUpstream():
            return UPSTREAM
        case TryWait():
            return "wait"
