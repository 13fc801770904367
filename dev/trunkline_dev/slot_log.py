"""The slot logs of workers, read back from the files in which pods and containers wrote them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SLOT_LOGGER: Final = '"trunkline.slots"'


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """One change of one slot."""

    what: str  # reserved | live | freed | lapsed
    call: str
    place: str  # warm | burst
    worker: str
    boot: str
    slot: int
    t: float  # seconds since the epoch


def read_slot_log(folder: Path, place: str) -> list[SlotRecord]:
    """All slot records of the log files in `folder`, unordered."""
    return [
        record
        for file in sorted(folder.rglob("*.log"))
        for record in parse_slot_log(file.read_text(errors="replace"), place)
    ]


def parse_slot_log(log: str, place: str) -> list[SlotRecord]:
    """The slot records in a worker's log."""
    entries = (json.loads(line) for line in log.splitlines() if SLOT_LOGGER in line)
    return [
        SlotRecord(
            what=entry["message"],
            call=entry["call"],
            place=place,
            worker=entry["worker"],
            boot=entry["boot"],
            slot=entry["slot"],
            t=entry["t"],
        )
        for entry in entries
    ]
