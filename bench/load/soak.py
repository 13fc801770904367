"""A gateway that holds calls for long, which hang up and call again: nothing may be lost, and nothing may grow."""

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import report
from load import relays
from load.relays import Stand
from load.rig import Places, build, free_ports, loading, tell

LOOKS: Final = 20  # at memory and descriptors, evenly over the time
SETTLED: Final = 0.25  # of the time, after which nothing may grow
GROWTH: Final = 1.05  # of resident memory, from the first half of the settled time to the second
SPARE_FILES: Final = 16  # connections that come and go at the moment of a look


@dataclass(frozen=True, slots=True, kw_only=True)
class Churn:
    """So many calls at a time, of so many seconds in the mean, each with so many messages a second both ways."""

    calls: int
    lasting: float
    rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A gateway at one moment of a soak."""

    seconds: float
    resident_kb: float
    files: int


def faults(looks: Sequence[Look], counted: Mapping[str, Any], calls: int) -> list[str]:
    """What a soak with so many calls must not show, in sentences; none is good."""
    why = ", ".join(f"{count} {name}" for name, count in counted["why"].items() if count)
    found = [
        f"{counted[key]} {what}"
        for key, what in {
            "lost": f"calls ended by themselves ({why}; the last Close said {counted['code']})",
            "refused": f"calls were refused, the last with HTTP {counted['status']}",
            "stuck": "callers were not answered, or their Close was not",
            "gaps": "times a message was missing",
        }.items()
        if counted[key]
    ]
    settled = looks[round(len(looks) * SETTLED) :]
    early, late = settled[: len(settled) // 2], settled[len(settled) // 2 :]
    before, after = (statistics.median(each.resident_kb for each in half) for half in (early, late))
    if after > before * GROWTH:
        found.append(f"resident memory grew from {before:.0f} to {after:.0f} KB")
    files = [statistics.median(each.files for each in half) for half in (early, late)]
    if files[1] > files[0] + max(SPARE_FILES, calls // 20):
        found.append(f"open files grew from {files[0]:.0f} to {files[1]:.0f}")
    return found


def soak(minutes: float, churn: Churn, path: Path | None) -> int:
    """Calls that come and go, for so long; the exit status."""
    looks = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A neighbour that keeps a worker's end from its core for seconds would be counted as a gateway's fault.
        places = Places.of_this_machine(urgent=True)
        stand = Stand(folder=folder, places=places, worker_port=free_ports(1)[0])
        callers, generator = relays.Callers(folder), build(folder)
        with relays.before_workers(stand, callers) as gateway:
            where = ("-p", gateway.port, "-b", stand.worker_port, "-t", callers.keys)
            options = (*where, "-l", churn.lasting, "-r", churn.rate)
            with loading(generator, places.load, *options) as load:
                load.calls(churn.calls)
                load.reset()
                began = time.monotonic()
                for _ in range(LOOKS):
                    time.sleep(minutes * 60 / LOOKS)
                    look = Look(
                        seconds=time.monotonic() - began,
                        resident_kb=gateway.process.resident(),
                        files=gateway.process.files(),
                    )
                    looks.append(look)
                    tell(f"{look.seconds:.0f} s: {look.resident_kb:.0f} KB, {look.files} files")
                counted = load.report()
    found = faults(looks, counted, churn.calls)
    kept = {"live", "opened", "ended", "received", "gaps", "refused", "lost", "stuck", "why"}
    record = {key: counted[key] for key in sorted(kept)} | {
        "minutes": minutes,
        **asdict(churn),
        "resident_kb": [look.resident_kb for look in looks],
        "files": [look.files for look in looks],
        "faults": found,
    }
    print(json.dumps(record, indent=1))
    if path is not None:
        path.write_text(json.dumps({"machine": report.machine(), "soak": record}, indent=1) + "\n")
    return 1 if found else 0
