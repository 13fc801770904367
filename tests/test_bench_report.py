"""The table of the benchmarks: what is judged otherwise than its numbers read misleads."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FILE = Path(__file__).parents[1] / "bench/report.py"


def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_report", FILE)
    assert spec
    assert spec.loader
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # its dataclasses ask for it
    spec.loader.exec_module(made)
    return made


def line(ours: float, theirs: float) -> list[str]:
    module = report()
    row = module.Row(
        what="w", against="a", unit="", ours=[ours], theirs=[theirs], at_most=True, floor=1.0
    )
    text: str = module.table([row.as_json()])
    return [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]


def test_two_numbers_that_are_not_the_same_do_not_look_so() -> None:
    assert line(2.004, 2.0)[2:4] == ["2.004", "2"]
    assert line(2.004, 2.0)[5] == "1 missed"
    assert line(2.0, 2.0)[2:4] == ["2", "2"]
    assert line(2.0, 2.0)[5] == "1 met"
    assert line(1.5, 2.0)[2:4] == ["1.5", "2"]
