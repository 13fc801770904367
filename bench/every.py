"""All benchmarks that need no GPU, one after another; their numbers go to docs/benchmarks.

    python bench/every.py [--quick | --page] [--only NAME …]

Each runs in a process of its own. One that fails is named at the end, and the others are kept.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from report import table

HERE: Final = Path(__file__).parent
KEPT: Final = HERE.parent / "docs/benchmarks"
NAMES: Final = ("gateway", "steering", "reconcile", "scaling", "engine", "calls", "loader", "burst")
SECONDS: Final = 1800
"""For one of them; the longest has taken ten minutes."""


def main() -> int:
    """The exit status: 1 if one failed."""
    parser = argparse.ArgumentParser(prog="bench/every.py")
    parser.add_argument("--quick", action="store_true", help="little work, and nothing is kept")
    parser.add_argument("--page", action="store_true", help="only write the page from what is kept")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    options = parser.parse_args()
    chosen = () if options.page else options.only
    failed = [name for name in chosen if not ran(name, quick=options.quick)]
    if not options.quick:
        (KEPT / "README.md").write_text(page())
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def ran(name: str, *, quick: bool) -> bool:
    """Runs one, with its own words on the terminal; whether it came to an end."""
    command = [sys.executable, str(HERE / f"{name}.py")]
    command += ["--quick"] if quick else ["--json", str(KEPT / f"{name}.json")]
    print(f"\n== {name}", flush=True)
    began = time.monotonic()
    try:
        done = subprocess.run(command, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False
    print(f"   {time.monotonic() - began:.0f} s", flush=True)
    return done.returncode == 0


def page() -> str:
    """What is kept, as Markdown; numbers of a benchmark that was not run anew stay as they are."""
    about = (
        "`make bench` writes this page. Ours and the peers' take turns in one run, and medians are compared."
        " A target that is missed stays here as missed. `noise` is the wider spread of the two."
    )
    parts = ["# Benchmarks", about]
    for name in NAMES:
        file = KEPT / f"{name}.json"
        if file.exists():
            found: dict[str, Any] = json.loads(file.read_text())
            parts += [f"## {name}", f"`python bench/{name}.py` on {place(found['machine'])}."]
            parts.append(table(found["rows"]))
    return "\n\n".join(parts) + "\n"


def place(machine: dict[str, Any]) -> str:
    """The machine in words."""
    return (
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gb']} GB,"
        f" {machine['system']}, Python {machine['python']}, load {machine['load_before']:.1f} before"
    )


if __name__ == "__main__":
    raise SystemExit(main())
