"""What one line of the ledger says. Durations come from a steady clock; `now` alone is the time of day."""

import hashlib
import hmac
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal

from trunkline_runtime.contract import ACCOUNT_PING, CallRecord, PassedOver, WarmThen
from trunkline_runtime.gateway.call import Ending, Facts
from trunkline_runtime.gateway.ladder import Placement

MOST: Final = 1e9  # of seconds, turns or milliseconds; more, or no number at all, is nonsense
HASH_CHARS: Final = 16  # 64 bits tell a tenant's callers apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """Who called whom."""

    call: str
    agent: str  # namespace/name
    tenant: str
    caller: str = field(default="", repr=False)  # as `caller_hash` makes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A worker's account of a call; see contract.ACCOUNT_PING. None: nobody knows."""

    audio_up: float | None = None  # seconds
    audio_down: float | None = None
    first_audio_ms: float | None = None
    turns: int | None = None
    gaps: int | None = None


def told(payload: bytes | None) -> Told:
    """Reads an account; of one that makes no sense, nothing is believed."""
    if payload is None:
        return Told()
    try:
        said = json.loads(payload.removeprefix(ACCOUNT_PING))
        return Told(
            audio_up=_measured(said["in"]),
            audio_down=_measured(said["out"]),
            first_audio_ms=None if said["first"] is None else _measured(said["first"]),
            turns=int(_measured(said["turns"])),
            gaps=int(_measured(said["gaps"])),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return Told()


def _measured(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MOST:
        raise ValueError("no measure")
    return float(value)


def caller_hash(key: str, agent: str, tenant: str, identity: str) -> str:
    """A caller's name in the ledger: HMAC-SHA256, shortened; "" without a key or an identity.

    The agent's own key makes all gateways write the same for one caller, and keeps others from trying
    identities. Agent and tenant are hashed along, so that nobody can be followed from one to another.
    """
    if not key or not identity:
        return ""
    text = f"trunkline caller\0{agent}\0{tenant}\0{identity}"
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()[:HASH_CHARS]


def ended(
    facts: Facts, ending: Ending, gateway: str, now: float, account: Told | None = None
) -> CallRecord:
    """A call that was answered and was over at `now`. Without an account, what it would say is null."""
    account = account or Told()
    placement = facts.placement
    party = Party(call=facts.call, agent=facts.agent, tenant=facts.tenant, caller=facts.caller)
    answer = now - ending.seconds
    record = _begun("ended", party, gateway, answer - placement.ms / 1000, now, placement.ms)
    _placed(record, placement)
    record["answer"] = _moment(answer)
    record["answered_ms"] = round(placement.answered_ms, 1)
    if placement.start:
        record["burst_start"] = placement.start
    record["code"] = ending.code
    record["by"] = ending.by.value
    record["lost"] = ending.lost
    record["seconds"] = round(ending.seconds, 3)
    record["bytes_up"] = ending.bytes_up
    record["bytes_down"] = ending.bytes_down
    record["audio_seconds_up"] = account.audio_up
    record["audio_seconds_down"] = account.audio_down
    record["first_audio_ms"] = account.first_audio_ms
    record["cost"] = None if ending.cost is None else round(ending.cost, 6)
    record["price"] = facts.price.basis if facts.price else None
    record["turns"] = account.turns
    record["gaps"] = account.gaps
    return record


def refused(party: Party, placement: Placement, gateway: str, now: float) -> CallRecord:
    """No rung had a slot in time: the caller was told 503."""
    record = _begun("refused", party, gateway, now - placement.ms / 1000, now, placement.ms)
    _placed(record, placement)
    return record


def left(party: Party, placement: Placement, gateway: str, now: float) -> CallRecord:
    """The caller went away while it was being placed."""
    record = _begun("left", party, gateway, now - placement.ms / 1000, now, placement.ms)
    _placed(record, placement)
    return record


def as_line(record: CallRecord) -> bytes:
    """One JSON object and a newline."""
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def passed_over(placement: Placement) -> list[PassedOver]:
    """The rungs and workers that could not take the call."""
    return [
        PassedOver(rung=step.rung, worker=step.worker, why=step.why, ms=round(step.ms, 1))
        for step in placement.steps
    ]


def rung_ms(placement: Placement) -> dict[str, float]:
    """What each rung that was tried has cost the caller, the one that answered among them."""
    spent: dict[str, float] = {}
    for step in placement.steps:
        spent[step.rung] = spent.get(step.rung, 0.0) + step.ms
    if placement.rung != "none":
        spent[placement.rung] = spent.get(placement.rung, 0.0) + placement.answered_ms
    return {rung: round(ms, 1) for rung, ms in spent.items()}


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
    record["rung_ms"] = rung_ms(placement)
    if placement.warm is not None:
        warm = placement.warm
        record["warm"] = WarmThen(
            pods=warm.pods,
            slots=warm.slots,
            busy=warm.busy,
            free=warm.free,
            draining=warm.draining,
            aside=warm.aside,
        )


def _moment(seconds: float) -> str:
    """Unix time as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
