"""What one line of the ledger says. Durations come from a steady clock; `now` alone is the time of day."""

import hashlib
import hmac
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal

from trunkline_runtime.contract import CallRecord, PassedOver, WarmThen
from trunkline_runtime.gateway.call import Ending, Facts
from trunkline_runtime.gateway.ladder import Placement

HASH_CHARS: Final = 16  # 64 bits tell a tenant's callers apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """Who called whom."""

    call: str
    agent: str  # namespace/name
    tenant: str
    caller: str = field(default="", repr=False)  # as `caller_hash` makes it


def caller_hash(key: str, agent: str, tenant: str, identity: str) -> str:
    """A caller's name in the ledger: HMAC-SHA256, shortened; "" without a key or an identity.

    The agent's own key makes all gateways write the same for one caller, and keeps others from trying
    identities. Agent and tenant are hashed along, so that nobody can be followed from one to another.
    """
    if not key or not identity:
        return ""
    text = f"trunkline caller\0{agent}\0{tenant}\0{identity}"
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()[:HASH_CHARS]


def ended(facts: Facts, ending: Ending, gateway: str, now: float) -> CallRecord:
    """A call that was answered and is over."""
    placement = facts.placement
    party = Party(call=facts.call, agent=facts.agent, tenant=facts.tenant, caller=facts.caller)
    answer = now - ending.seconds
    record = _begun("ended", party, gateway, answer - placement.ms / 1000, now, placement.ms)
    _placed(record, placement)
    record["answer"] = _moment(answer)
    record["answered_ms"] = round(placement.answered_ms, 1)
    record["code"] = ending.code
    record["by"] = ending.by.value
    record["lost"] = ending.lost
    record["seconds"] = round(ending.seconds, 3)
    record["bytes_up"] = ending.bytes_up
    record["bytes_down"] = ending.bytes_down
    return record


def refused(party: Party, placement: Placement, gateway: str, now: float) -> CallRecord:
    """No rung had a slot in time: the caller was told 503."""
    record = _begun("refused", party, gateway, now - placement.ms / 1000, now, placement.ms)
    _placed(record, placement)
    return record


def left(party: Party, ms: float, gateway: str, now: float) -> CallRecord:
    """The caller went away after so many milliseconds, while it was being placed."""
    return _begun("left", party, gateway, now - ms / 1000, now, ms)


def as_line(record: CallRecord) -> bytes:
    """One JSON object and a newline."""
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def passed_over(placement: Placement) -> list[PassedOver]:
    """The rungs and workers that could not take the call."""
    return [
        PassedOver(rung=step.rung, worker=step.worker, why=step.why, ms=round(step.ms, 1))
        for step in placement.steps
    ]


def _begun(
    message: Literal["ended", "refused", "left"],
    party: Party,
    gateway: str,
    start: float,
    now: float,
    ms: float,
) -> CallRecord:
    end = _moment(now)
    return CallRecord(
        message=message,
        time=end,
        gateway=gateway,
        call=party.call,
        agent=party.agent,
        tenant=party.tenant,
        caller=party.caller,
        start=_moment(start),
        end=end,
        rung="none",
        worker="",
        admission_ms=round(ms, 1),
        passed_over=[],
    )


def _placed(record: CallRecord, placement: Placement) -> None:
    record["rung"] = placement.rung
    record["worker"] = placement.worker
    record["passed_over"] = passed_over(placement)
    if placement.warm is not None:
        warm = placement.warm
        record["warm"] = WarmThen(
            pods=warm.pods,
            slots=warm.slots,
            busy=warm.busy,
            free=warm.free,
            draining=warm.draining,
        )


def _moment(seconds: float) -> str:
    """Unix time as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
