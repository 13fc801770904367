"""The benchmarks of the Moshi engine run from end to end where there is no GPU; what they print claims nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


# Minutes, where others keep the processors busy: gpu.py starts two processes that import torch.
SECONDS = 240


@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize(
    ("name", "options"), [("gpu.py", ["--device", "cpu", "--tiny"]), ("engine.py", [])]
)
def test_a_benchmark_runs(name: str, options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, str(BENCH / name), "--quick", "--json", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    rows = {row["what"]: row for row in found["rows"]}
    assert all(row["ours"] is not None for row in rows.values())
    assert found["command"].startswith(f"python bench/{name}")
    assert found["machine"]["processor"]
    if name == "gpu.py":
        assert any("loading, read" in what for what in rows), "from a file, by phases"
        assert rows["tokens that change when a neighbour joins and leaves"]["ours"] == 0
        assert not any(row["target"] for row in rows.values()), "tiny models meet no target"
    assert "| what | against |" in done.stdout
