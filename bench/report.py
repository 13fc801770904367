"""What all benchmarks share: their options, the rounds, a table to read and JSON to keep.

Ours and theirs take turns in one process on one machine, and medians are compared; what differs from round to
round is the same for both. `noise` is the wider of the two spreads: the distance of the quartiles as a share of
the median.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison. `ratio` is ours over theirs; `floor` and `target` are what it should reach.

    With `at_most`, less is better: time, memory, cost. `theirs` without a number is a peer that cannot be
    run here; `against` then says why.
    """

    what: str
    against: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float]
    floor: float | None = None
    target: float | None = None
    at_most: bool = False

    @property
    def ratio(self) -> float | None:
        if not self.theirs:
            return None
        return statistics.median(self.ours) / statistics.median(self.theirs)

    def met(self, bound: float | None) -> bool | None:
        """Whether the ratio reaches a bound; None where there is nothing to compare."""
        if bound is None or self.ratio is None:
            return None
        return self.ratio <= bound if self.at_most else self.ratio >= bound

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "against": self.against,
            "ours": statistics.median(self.ours),
            "theirs": statistics.median(self.theirs) if self.theirs else None,
            "unit": self.unit,
            "ratio": self.ratio,
            "floor": self.floor,
            "target": self.target,
            "met_floor": self.met(self.floor),
            "met_target": self.met(self.target),
            "rounds": len(self.ours),
            "noise": max(_spread(self.ours), _spread(self.theirs)),
        }


def rounds(
    count: int, runs: Mapping[str, Callable[[], float]], warm_up: int = 1
) -> dict[str, list[float]]:
    """Runs each in turn, `count` times; the first `warm_up` rounds are not kept."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(count + warm_up):
        for name, run in runs.items():
            value = run()
            if number >= warm_up:
                found[name].append(value)
    return found


def main(
    name: str,
    measure: Callable[[bool], Sequence[Row]],
    *,
    arguments: Sequence[str] | None = None,
    given: str = "",
) -> None:
    """The command line of a benchmark. `measure` is told whether to be quick.

    A benchmark with options of its own passes the other `arguments`, and says in `given` what it has read.
    """
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--quick", action="store_true", help="little work: shows that it runs")
    options = parser.parse_args(arguments)
    before = os.getloadavg()[0]
    rows = [row.as_json() for row in measure(options.quick)]
    if options.json is not None:
        command = f"python bench/{name}.py" + given + (" --quick" if options.quick else "")
        found = {"machine": machine() | {"load_before": before}, "command": command, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = [
        "| what | against | ours | theirs | ratio | floor | target | noise |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["what"],
            row["against"],
            *_pair(row["ours"], row["theirs"], row["unit"]),
            _number(row["ratio"]),
            _bound(row["floor"], row["met_floor"]),
            _bound(row["target"], row["met_target"]),
            f"{row['noise']:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _pair(ours: float, theirs: float | None, unit: str) -> tuple[str, str]:
    """Both numbers in three digits, or in as many as show that they are not the same."""
    texts = ((_number(ours, unit, n), _number(theirs, unit, n)) for n in range(3, 18))
    return next(pair for pair in texts if ours == theirs or pair[0] != pair[1])


def _number(value: float | None, unit: str = "", digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g} {unit}".strip()


def _bound(bound: float | None, met: bool | None) -> str:
    if bound is None:
        return "–"
    return f"{bound:g} {'met' if met else 'missed'}" if met is not None else f"{bound:g}"


def _spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
