"""A user's own calls: a CSV of arrivals and durations, or the lines that gateways log of finished calls."""

import csv
import io
import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from trunkline_operator.simulation.traces import FIXED, Call, Trace

# A week of 100 calls at a time, six times: more is no trace but a mistake.
MOST_CALLS: Final = 2_000_000
MOST_BYTES: Final = 2**30
COLUMNS: Final = ("arrival", "duration")


class TraceError(ValueError):
    """The file is no trace; the message says where and what to change."""


@dataclass(frozen=True, slots=True)
class Told:
    """One call of a file; `seconds` is None for one that was refused, so nobody knows how long it would last."""

    at: float
    seconds: float | None


def trace(source: str, agent: str, scale: float = 1.0) -> Trace:
    """The calls of a file, or the fixed trace of that name. `agent` chooses among a ledger's agents.

    Raises TraceError, also for a file that cannot be read.
    """
    fixed = {make.__name__.replace("_", "-"): make for make in FIXED}
    if source in fixed:
        return fixed[source](scale)
    path = Path(source)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise TraceError(f"{path} has more than {MOST_BYTES >> 20} MiB: give a shorter time")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(fixed)
        raise TraceError(f"{path} cannot be read: {error}. Built in are: {names}") from error
    told = list(_ledger(text, agent) if text.lstrip().startswith("{") else _table(text))
    return assembled(path.stem, told)


def assembled(name: str, told: Iterable[Told]) -> Trace:
    """The trace of calls in any order; it begins with the first and ends with the last one's end."""
    calls = sorted(told, key=lambda one: one.at)
    lengths = [one.seconds for one in calls if one.seconds is not None]
    if not lengths:
        raise TraceError("there is no call with a duration in it")
    began, usual = calls[0].at, statistics.fmean(lengths)
    made = tuple(
        Call(one.at - began, usual if one.seconds is None else one.seconds) for one in calls
    )
    return Trace(
        name=name, calls=made, seconds=max(call.at + call.seconds for call in made), began=began
    )


def _table(text: str) -> Iterator[Told]:
    """Rows of a CSV with the columns arrival and duration; others are left alone."""
    rows = csv.DictReader(io.StringIO(text))
    missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise TraceError(
            f"the first line has no column {missing[0]}: it must name arrival and duration"
        )
    for number, row in enumerate(rows, start=2):
        _bounded(number)
        where = f"line {number}"
        seconds = _number(row["duration"])
        if seconds is None or not 0 <= seconds <= 86_400:
            raise TraceError(
                f"{where}: duration {row['duration']!r} is not seconds from 0 to 86400"
            )
        yield Told(_moment(row["arrival"], where), seconds)


def _ledger(text: str, agent: str) -> Iterator[Told]:
    """Lines of a gateway's log: calls that ended, and those that were refused. Others are passed over."""
    for number, line in enumerate(text.splitlines(), start=1):
        _bounded(number)
        where = f"line {number}"
        try:
            entry = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            raise TraceError(f"{where} is no JSON: {error}") from error
        if not isinstance(entry, dict) or not _of(entry, agent):
            continue
        if entry.get("message") == "ended":
            seconds = _number(entry.get("seconds"))
            if seconds is None or seconds < 0:
                raise TraceError(f"{where}: seconds {entry.get('seconds')!r} is no duration")
            yield Told(_moment(entry.get("time"), where) - seconds, seconds)
        elif entry.get("message") == "refused":
            yield Told(_moment(entry.get("time"), where), None)


def _of(entry: dict[str, Any], agent: str) -> bool:
    return str(entry.get("agent", "")).rpartition("/")[2] == agent


def _bounded(number: int) -> None:
    if number > MOST_CALLS:
        raise TraceError(f"there are more than {MOST_CALLS} lines: give a shorter time")


def _moment(value: Any, where: str) -> float:
    """Seconds, since whenever, or a date and time in ISO 8601 (of UTC, where it names no zone)."""
    if (number := _number(value)) is not None:
        return number
    try:
        when = datetime.fromisoformat(str(value).strip())
    except ValueError as error:
        raise TraceError(f"{where}: {value!r} is neither seconds nor a time in ISO 8601") from error
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < 1e12 else None
