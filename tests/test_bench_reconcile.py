"""The benchmark of the operator runs from end to end; so little work claims nothing about speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench/reconcile.py"


@pytest.mark.timeout(240)
def test_it_runs_and_what_must_not_be_written_is_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, str(BENCH), "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=220)
    assert done.returncode == 0, done.stderr
    rows = {
        (row["what"], row["against"].partition(",")[0]): row
        for row in json.loads(path.read_text())["rows"]
    }
    assert len(rows) > 20
    assert rows["20 agents at rest: writes (target 0)", "plain kopf"]["ours"] == 0
    edited = "20 agents changed in what replaces no pod: writes of the operator for each"
    assert rows[edited, "plain kopf"]["ours"] == pytest.approx(1, abs=0.1)
