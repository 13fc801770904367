"""The benchmarks of the gateway run from end to end, and its soak finds what it is for. No time is judged here."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from load.soak import Look, faults

needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

CLEAN: dict[str, Any] = {"lost": 0, "refused": 0, "stuck": 0, "gaps": 0}
CLEAN |= {"status": 0, "code": 0, "why": {"cut": 0, "told": 0}}
STEADY = [Look(seconds=number, resident_kb=50_000, files=220) for number in range(20)]


def benchmark(path: Path, *options: str, name: str = "gateway") -> tuple[int, str, Any]:
    """Status, what it printed and its JSON."""
    command = [sys.executable, str(BENCH / f"{name}.py"), "--json", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert path.exists(), done.stderr
    return done.returncode, done.stdout, json.loads(path.read_text())


@needs_a_compiler
@pytest.mark.timeout(300)
def test_the_benchmark_runs(tmp_path: Path) -> None:
    status, printed, found = benchmark(tmp_path / "rows.json", "--quick")
    assert status == 0
    assert "| what | against |" in printed
    rows = found["rows"]
    for what in ("relay, plain TCP: CPU a message", "admission by API key, p50"):
        assert any(row["what"] == what and row["ours"] > 0 for row in rows), what
    ours = {row["against"]: row for row in rows if row["what"] == "relay, plain TCP: CPU a message"}
    assert ours["websockets on asyncio"]["floor"] == pytest.approx(1 / 3)
    for row in rows:
        # A peer that is not here is still a row, and says how it would be.
        assert row["ratio"] is not None or "install" in row["against"], row


@needs_a_compiler
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("only", "what"), [("admission", "admission by API key, p99"), ("memory", "memory a call")]
)
def test_a_part_is_measured_alone(tmp_path: Path, only: str, what: str) -> None:
    status, _, found = benchmark(tmp_path / "rows.json", "--only", only, "--quick")
    assert status == 0
    assert found["command"] == f"python bench/gateway.py --only {only} --quick"
    assert all(only in row["what"] for row in found["rows"])
    assert any(what in row["what"] and row["ours"] > 0 for row in found["rows"])


@pytest.mark.timeout(120)
def test_what_the_operators_link_costs_is_measured(tmp_path: Path) -> None:
    status, _, found = benchmark(tmp_path / "rows.json", "--quick", name="steering")
    assert status == 0
    assert len(found["rows"]) == 2
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in found["rows"])


@needs_a_compiler
@pytest.mark.timeout(120)
def test_a_soak_with_churn_loses_no_call_and_no_message(tmp_path: Path) -> None:
    options = ("--soak", "0.1", "--calls", "20", "--lasting", "1")
    status, _, found = benchmark(tmp_path / "soak.json", *options)
    soak = found["soak"]
    assert soak["faults"] == []
    assert status == 0
    assert soak["ended"] >= 20, "calls came and went"
    assert soak["received"] > 1_000
    assert soak["lost"] == soak["refused"] == soak["stuck"] == soak["gaps"] == 0


def test_a_soak_without_fault_has_none() -> None:
    assert faults(STEADY, CLEAN, calls=100) == []


@pytest.mark.parametrize(
    ("counted", "sentence"),
    [
        (
            {"lost": 2, "why": {"cut": 0, "told": 2}, "code": 1011},
            "2 calls ended by themselves (2 told; the last Close said 1011)",
        ),
        ({"refused": 3, "status": 503}, "3 calls were refused, the last with HTTP 503"),
        ({"stuck": 1}, "1 callers were not answered"),
        ({"gaps": 4}, "4 times a message was missing"),
    ],
)
def test_a_soak_tells_what_went_wrong_with_calls(counted: dict[str, Any], sentence: str) -> None:
    (fault,) = faults(STEADY, CLEAN | counted, calls=100)
    assert fault.startswith(sentence)


@pytest.mark.parametrize(
    ("grown", "sentence"),
    [({"resident_kb": 2_000}, "resident memory grew"), ({"files": 10}, "open files grew")],
)
def test_a_soak_tells_what_grows(grown: dict[str, float], sentence: str) -> None:
    looks = [
        replace(look, **{key: getattr(look, key) + by * look.seconds for key, by in grown.items()})
        for look in STEADY
    ]
    (fault,) = faults(looks, CLEAN, calls=100)
    assert fault.startswith(sentence)


def test_memory_that_grows_only_at_first_is_no_fault() -> None:
    looks = [replace(look, resident_kb=30_000) if look.seconds < 5 else look for look in STEADY]
    assert faults(looks, CLEAN, calls=100) == []
