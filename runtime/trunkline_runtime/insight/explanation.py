"""Why a call went where it went, from its line in a ledger or a gateway's log.

A live call has only the line `placed`, which every log has; one that is over has `ended`, `refused` or `left`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from trunkline_runtime.contract import KEPT, NO_SLOT

OVER: Final = ("ended", "refused", "left")
WARM: Final = ("pods", "slots", "busy", "free", "draining")
LEAST_CHARS: Final = 6  # of a call's beginning: 2 ** 24 calls, one of which is meant
MOST_LINE: Final = 64 * 2**10  # a record is shorter than 4 KiB; a longer line is none


class NotFound(LookupError):
    """There is no such call, or more than one; the text says what to do."""


class WouldBe(StrEnum):
    """What one more pod would have changed."""

    NOTHING = "nothing"
    ANSWERED = "answered by a warm pod"
    PERHAPS = "perhaps answered by a warm pod"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one more pod would have changed, and how that is known."""

    would: WouldBe
    because: str


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung or worker that was asked; `answered` is true for the last one of a call that was placed."""

    rung: str
    worker: str
    said: str
    ms: float
    answered: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One call. Milliseconds are the gateway's; `before` is what passed before the first rung."""

    record: dict[str, Any]
    what: str  # ended, refused, left or live
    before: float
    rungs: tuple[Rung, ...]
    one_more_pod: Verdict

    def as_json(self) -> dict[str, Any]:
        """The record, and what was concluded from it."""
        verdict = self.one_more_pod
        return {
            **self.record,
            "what": self.what,
            "before_ms": self.before,
            "one_more_pod": {"would": verdict.would.value, "because": verdict.because},
        }


def found(lines: Iterable[str], call: str) -> dict[str, Any]:
    """The record of a call, by its id or the beginning of it. The last word on it counts.

    Lines that are no records are passed over, and what stands before the first brace of one: tools that
    collect logs put the pod's name there. Raises NotFound.
    """
    call = call.strip().lower()
    if len(call) < LEAST_CHARS:
        raise NotFound(
            f"{call!r} is too short: give {LEAST_CHARS} characters of the call's id or more"
        )
    matches: dict[str, dict[str, Any]] = {}
    read = 0
    for line in lines:
        record = _record(line)
        if record is None:
            continue
        read += 1
        name = record["call"]
        if name.startswith(call) and (name not in matches or record["message"] in OVER):
            matches[name] = record
    if not matches:
        raise NotFound(
            f"call {call} is in none of the {read} records that were read: is it another gateway's, or"
            " older than this ledger?"
        )
    if len(matches) > 1:
        raise NotFound(f"{len(matches)} calls begin with {call}: give more of the id")
    return next(iter(matches.values()))


def explained(record: dict[str, Any]) -> Explanation:
    """What became of a call, and why. `record` is as `found` returns it."""
    steps, rung = [_rung(step) for step in record["passed_over"]], record["rung"]
    if rung != "none":
        ms = _number(record.get("answered_ms"))
        steps.append(Rung(rung, str(record.get("worker", "")), "answered", ms, answered=True))
    spent = sum(step.ms for step in steps)
    what = "live" if record["message"] == "placed" else record["message"]
    return Explanation(
        record=record,
        what=what,
        before=round(max(0.0, _number(record.get("admission_ms")) - spent), 1),
        rungs=tuple(steps),
        one_more_pod=_one_more_pod(what, rung, steps, record.get("warm") or {}),
    )


def _one_more_pod(what: str, rung: str, steps: list[Rung], warm: dict[str, Any]) -> Verdict:
    full = any(step.rung == "warm" and step.said == NO_SLOT for step in steps)
    if what == "left" and not full:
        return Verdict(WouldBe.UNKNOWN, "the caller left before the gateway was through")
    waited = round(sum(step.ms for step in steps if step.rung == "wait"))
    if rung == "warm" and not waited:
        return Verdict(WouldBe.NOTHING, "a warm slot was free")
    asked = [step for step in steps if step.rung == "warm"]
    if not asked:
        return Verdict(WouldBe.NOTHING, "the agent's route has no warm rung")
    pods, slots = int(_number(warm.get("pods"))), int(_number(warm.get("slots")))
    more = f"its {slots // pods} slots" if pods and slots >= pods else "its slots"
    if full:
        then = _without("left" if what == "left" else rung, waited)
        return Verdict(WouldBe.ANSWERED, f"{more} would have been free; {then}")
    if any(step.said == KEPT for step in asked):
        return Verdict(
            WouldBe.PERHAPS,
            f"{more} would have been free, less what is kept for other tenants: see guaranteedSlots",
        )
    return Verdict(
        WouldBe.PERHAPS,
        "warm pods with free slots were asked and failed: see why, for a new pod may fail in the same way",
    )


def _without(rung: str, waited: int) -> str:
    """What has become of the call instead."""
    if rung == "warm":
        return f"without it the call waited {waited} ms for one"
    after = f" after {waited} ms in line" if waited else ""
    become = {
        "none": f"without it the call was refused{after}",
        "left": f"without it the caller left{after}",
    }
    return become.get(rung, f"instead of {rung}")


def _record(line: str) -> dict[str, Any] | None:
    start = line.find("{")
    if start < 0 or len(line) > MOST_LINE:
        return None
    try:
        found = json.loads(line[start:])
    except json.JSONDecodeError:
        return None
    if not isinstance(found, dict) or found.get("message") not in (*OVER, "placed"):
        return None
    return found if _sound(found) else None


def _sound(record: dict[str, Any]) -> bool:
    """Whether what is concluded from is there and of its kind."""
    steps, warm = record.get("passed_over"), record.get("warm")
    return (
        isinstance(record.get("call"), str)
        and isinstance(record.get("rung"), str)
        and isinstance(steps, list)
        and all(isinstance(step, dict) for step in steps)
        and (warm is None or (isinstance(warm, dict) and warm.keys() >= set(WARM)))
    )


def _rung(step: dict[str, Any]) -> Rung:
    rung, worker, why = (str(step.get(key, "")) for key in ("rung", "worker", "why"))
    return Rung(rung, worker, why, _number(step.get("ms")))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
