"""What goes wrong, and when: a schedule made of a seed and rules.

Pure: the clock is an argument, and whether a rule strikes its nth event depends on the seed, the rule's place
and n alone. So the same seed and the same order of events give the same faults.

There are two sorts. *Events* are struck one by one: the nth of them, or a share. *States* hold for a while.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Final

MAX_RULES: Final = 100  # each event looks at all of them
MAX_SECONDS: Final = 86_400.0
GRPC_STATUSES: Final = (
    *("CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND"),
    *("ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"),
    *("ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"),
    "UNAUTHENTICATED",
)


class FaultError(ValueError):
    """The faults cannot be understood. The message says which, and what would be right."""


class Fault(StrEnum):
    """What can go wrong. The comment says what a rule's `name` is compared with."""

    # Events
    RPC_FAILS = "rpc-fails"  # the call's name, AppPublish
    RPC_HANGS = "rpc-hangs"  # the call's name
    IMAGE_BUILD_FAILS = "image-build-fails"  # the image's commands, in one line
    SESSION_REFUSED = "session-refused"  # APP/REGION
    SESSION_HANGS = "session-hangs"  # APP/REGION
    BOOT_SLOW = "boot-slow"  # APP/cold or APP/restored
    BOOT_CRASHES = "boot-crashes"  # APP/cold or APP/restored
    RESTORE_CRASHES = "restore-crashes"  # APP
    CONTAINER_KILLED = "container-killed"  # APP
    # States
    CONTROL_PLANE_DOWN = "control-plane-down"  # nothing
    TOKEN_REVOKED = "token-revoked"  # the token's id, ak-… or wk-…
    REGION_DOWN = "region-down"  # REGION
    NO_CAPACITY = "no-capacity"  # APP/GPU, or APP/cpu


STATES: Final = frozenset(
    {Fault.CONTROL_PLANE_DOWN, Fault.TOKEN_REVOKED, Fault.REGION_DOWN, Fault.NO_CAPACITY}
)
_WINDOW: Final = ("fault", "name", "after", "lasts")
_EVENT: Final = (*_WINDOW, "nth", "share")
_KEYS: Final[Mapping[Fault, tuple[str, ...]]] = {
    Fault.RPC_FAILS: (*_EVENT, "status", "message", "retryAfter", "done"),
    Fault.RPC_HANGS: (*_EVENT, "seconds"),
    Fault.IMAGE_BUILD_FAILS: (*_EVENT, "message"),
    Fault.SESSION_REFUSED: (*_EVENT, "status"),
    Fault.SESSION_HANGS: (*_EVENT, "seconds"),
    Fault.BOOT_SLOW: (*_EVENT, "seconds", "spread"),
    Fault.BOOT_CRASHES: _EVENT,
    Fault.RESTORE_CRASHES: (*_EVENT, "seconds", "spread"),
    Fault.CONTAINER_KILLED: (*_EVENT, "seconds", "spread"),
    Fault.CONTROL_PLANE_DOWN: _WINDOW,
    Fault.TOKEN_REVOKED: _WINDOW,
    Fault.REGION_DOWN: (*_WINDOW, "cut"),
    Fault.NO_CAPACITY: _WINDOW,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One fault. What a fault does not use stays at its default."""

    fault: Fault
    name: str = "*"
    """Which: a pattern with `*`, `?` and `[…]` for what the fault's comment in `Fault` names."""
    nth: tuple[int, ...] = ()
    """Only these, counted from 1 among those that the rule has seen; empty: any."""
    share: float = 1.0
    """Of those, this share, drawn with the seed."""
    after: float = 0.0
    """Seconds from when the rules were set until this one begins to count."""
    lasts: float | None = None
    """Seconds from then until it is over; None: until the rules are replaced."""
    status: str = ""
    """Of a call, gRPC's name; of a session, HTTP's number. "": UNAVAILABLE, 503."""
    message: str = ""
    retry_after: float | None = None
    """Seconds that the SDK is told to wait before it tries a call again, as when Modal throttles."""
    done: bool = False
    """The call takes effect, and only its answer is lost."""
    seconds: float | None = None
    """How long a hang or a delay is, or when it happens; None: for ever, or at once."""
    spread: float = 0.0
    """Standard deviation of `seconds`, drawn with the seed; what falls below 0 is 0."""
    cut: bool = False
    """Calls that go through the region end, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A seed and rules. For each event the first rule that strikes counts."""

    seed: int = 0
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A rule has struck an event; `seconds` is drawn, None where the rule has none."""

    rule: Rule
    seconds: float | None


def struck(rule: Rule, seed: int, place: int, n: int) -> Strike | None:
    """Whether the rule at this place strikes its nth event, counted from 1."""
    if rule.nth and n not in rule.nth:
        return None
    draw = random.Random(f"{seed} {place} {n}")
    if draw.random() >= rule.share:
        return None
    seconds = rule.seconds
    if seconds is not None and rule.spread:
        seconds = max(0.0, draw.gauss(seconds, rule.spread))
    return Strike(rule=rule, seconds=seconds)


@dataclass(slots=True)
class Count:
    """Events that a rule has seen, and how many of them it struck."""

    seen: int = 0
    struck: int = 0


@dataclass(slots=True)
class Schedule:
    """A plan and what has come of it. `began` is when it was set, on the clock of the other times."""

    plan: Plan = field(default_factory=Plan)
    began: float = 0.0
    counts: list[Count] = field(default_factory=list)

    def replace(self, plan: Plan, now: float) -> None:
        """Forgets the old plan and its counts."""
        self.plan, self.began = plan, now
        self.counts = [Count() for _ in plan.rules]

    def strike(self, fault: Fault, subject: str, now: float) -> Strike | None:
        """Counts an event, and says what goes wrong with it."""
        first: Strike | None = None
        for place, rule in enumerate(self.plan.rules):
            if not self._concerns(rule, fault, subject, now):
                continue
            count = self.counts[place]
            count.seen += 1
            strike = struck(rule, self.plan.seed, place, count.seen)
            if strike and first is None:
                first = strike
                count.struck += 1
        return first

    def holds(self, fault: Fault, subject: str, now: float) -> Rule | None:
        """The rule because of which a state holds now."""
        rules = self.plan.rules
        return next((rule for rule in rules if self._concerns(rule, fault, subject, now)), None)

    def _concerns(self, rule: Rule, fault: Fault, subject: str, now: float) -> bool:
        begins, ends = self._window(rule)
        return rule.fault is fault and begins <= now < ends and fnmatchcase(subject, rule.name)

    def _window(self, rule: Rule) -> tuple[float, float]:
        begins = self.began + rule.after
        return begins, math.inf if rule.lasts is None else begins + rule.lasts

    def next_change(self, now: float) -> float | None:
        """When the next window opens or closes."""
        times = [time for rule in self.plan.rules for time in self._window(rule)]
        return min((time for time in times if now < time < math.inf), default=None)


# --- from and to JSON -----------------------------------------------------------------------------------


def parse(content: Any) -> Plan:
    """`{"seed": 7, "rules": [{"fault": "rpc-fails", …}]}`, or just the list of rules."""
    if isinstance(content, list):
        content = {"rules": content}
    if not isinstance(content, dict) or set(content) - {"seed", "rules"}:
        raise FaultError('faults are an object with "seed" and "rules", or a list of rules')
    seed, rules = content.get("seed", 0), content.get("rules", [])
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise FaultError(f"seed: a whole number, not {seed!r}")
    if not isinstance(rules, list) or len(rules) > MAX_RULES:
        raise FaultError(f"rules: a list of at most {MAX_RULES}")
    return Plan(
        seed=seed,
        rules=tuple(_rule(rule, f"rules[{place}]") for place, rule in enumerate(rules)),
    )


def _rule(content: Any, where: str) -> Rule:
    if not isinstance(content, dict) or not isinstance(name := content.get("fault"), str):
        raise FaultError(f'{where}: an object with "fault"')
    if name not in list(Fault):
        raise FaultError(f"{where}: there is no fault {name!r}; there are {', '.join(Fault)}")
    fault = Fault(name)
    if unknown := sorted(set(content) - set(_KEYS[fault])):
        known = ", ".join(_KEYS[fault])
        raise FaultError(f"{where}: {fault} has no {unknown[0]!r}; it takes {known}")
    reader = _Reader(content, where)
    return Rule(
        fault=fault,
        name=reader.text("name", "*"),
        nth=reader.numbers("nth"),
        share=reader.number("share", most=1.0) if "share" in content else 1.0,
        after=reader.number("after") if "after" in content else 0.0,
        lasts=reader.optional("lasts"),
        status=_status(fault, reader.text("status", ""), where),
        message=reader.text("message", ""),
        retry_after=reader.optional("retryAfter"),
        done=reader.flag("done"),
        seconds=reader.optional("seconds"),
        spread=reader.number("spread") if "spread" in content else 0.0,
        cut=reader.flag("cut"),
    )


def _status(fault: Fault, status: str, where: str) -> str:
    if fault is Fault.RPC_FAILS and status and status not in GRPC_STATUSES:
        raise FaultError(f"{where}.status: one of {', '.join(GRPC_STATUSES)}")
    if (
        fault is Fault.SESSION_REFUSED
        and status
        and not (status.isascii() and status.isdigit() and 400 <= int(status) <= 599)
    ):
        raise FaultError(f"{where}.status: an HTTP status from 400 to 599")
    return status


@dataclass(frozen=True, slots=True)
class _Reader:
    content: Mapping[str, Any]
    where: str

    def text(self, key: str, default: str) -> str:
        value = self.content.get(key, default)
        if key == "status" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise FaultError(f"{self.where}.{key}: a text, not {value!r}")
        return value

    def flag(self, key: str) -> bool:
        value = self.content.get(key, False)
        if not isinstance(value, bool):
            raise FaultError(f"{self.where}.{key}: true or false, not {value!r}")
        return value

    def number(self, key: str, most: float = MAX_SECONDS) -> float:
        value = self.content[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise FaultError(f"{self.where}.{key}: a number from 0 to {most:g}, not {value!r}")
        return float(value)

    def optional(self, key: str) -> float | None:
        return None if self.content.get(key) is None else self.number(key)

    def numbers(self, key: str) -> tuple[int, ...]:
        value = self.content.get(key, [])
        values: Sequence[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in values):
            raise FaultError(f"{self.where}.{key}: a whole number from 1, or a list of them")
        return tuple(values)


def described(schedule: Schedule) -> dict[str, Any]:
    """The plan in the form that `parse` takes, with each rule's counts beside it."""
    rules = [_described(rule) for rule in schedule.plan.rules]
    return {
        "seed": schedule.plan.seed,
        "rules": rules,
        "counts": [{"seen": count.seen, "struck": count.struck} for count in schedule.counts],
    }


def _described(rule: Rule) -> dict[str, Any]:
    values = {
        "fault": rule.fault.value,
        "name": rule.name,
        "nth": list(rule.nth),
        "share": rule.share,
        "after": rule.after,
        "lasts": rule.lasts,
        "status": rule.status,
        "message": rule.message,
        "retryAfter": rule.retry_after,
        "done": rule.done,
        "seconds": rule.seconds,
        "spread": rule.spread,
        "cut": rule.cut,
    }
    return {key: value for key, value in values.items() if key in _KEYS[rule.fault]}
