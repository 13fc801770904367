"""`trunkline simulate`: a user's files, the table, and what is said of wrong ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from trunkline_operator.simulation import reading
from trunkline_operator.simulation.command import best, simulate
from trunkline_operator.simulation.model import Outcome
from trunkline_operator.simulation.reading import TraceError
from trunkline_operator.simulation.settings import Bill
from trunkline_operator.simulation.traces import Call, Trace

AGENT = """
apiVersion: v1
kind: Secret
metadata: {name: keys}
---
apiVersion: trunkline.dev/v1alpha1
kind: VoiceAgent
metadata: {name: desk}
spec:
  engine: {type: loopback}
  warm: {slotsPerPod: 2, minPods: 1, maxPods: 4}
  burst: {modal: {credentialsSecretRef: {name: modal}, slotsPerContainer: 2}}
  access: {public: true}
"""
CSV = "arrival,duration,caller\n" + "".join(f"{n * 20},{60 + n},x\n" for n in range(60))


def log_line(message: str, seconds: float | None = None, **more: Any) -> str:
    entry: dict[str, Any] = {"message": message, "agent": "default/desk", "call": "c"} | more
    return json.dumps(entry if seconds is None else entry | {"seconds": seconds})


def invoked(tmp_path: Path, *arguments: str, agent: str = AGENT, calls: str = CSV) -> Any:
    (tmp_path / "agent.yaml").write_text(agent)
    (tmp_path / "calls.csv").write_text(calls)
    app = typer.Typer()
    app.command()(simulate)
    trace = () if arguments[:1] == ("spike",) else (str(tmp_path / "calls.csv"),)
    options = (*trace, *arguments, "--agent", str(tmp_path / "agent.yaml"))
    return CliRunner().invoke(app, options)


# --- the command --------------------------------------------------------------------------------------------


def test_a_table_of_settings_and_the_same_as_json(tmp_path: Path) -> None:
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    done = invoked(tmp_path, "--json", str(out), "--plot", str(png))
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "60 calls in 0.4 h of calls, for desk"
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert names[:2] == ["setting", "as given"]
    assert {"without burst", "HPA at 70% of slots", "Knative's KPA", "always 4 pods"} <= set(names)
    assert len(names) == len(set(names))
    told = json.loads(out.read_text())
    assert told["trace"] == {"name": "calls", "calls": 60, "seconds": 59 * 20 + 60 + 59}
    assert [setting["setting"] for setting in told["settings"]] == names[1:]
    for setting in told["settings"]:
        assert setting["warm"] + setting["burst"] + setting["refused"] == 60
        assert setting["gpuHours"] >= 0
    assert told["packedGpuHours"] < told["settings"][0]["gpuHours"]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_built_in_trace_needs_no_file(tmp_path: Path) -> None:
    done = invoked(tmp_path, "spike", "--scale", "0.02")
    assert done.exit_code == 0, done.output
    assert "of spike, for desk" in done.stdout


def test_only_settings_that_there_are_can_be_drawn(tmp_path: Path) -> None:
    png = tmp_path / "out.png"
    for name, status in (("Knative's KPA", 0), ("KPA", 2)):
        done = invoked(tmp_path, "--plot", str(png), "--draw", name)
        assert done.exit_code == status
        assert png.exists() == (status == 0)
        assert ("there is no setting 'KPA'" in done.output) == (status == 2)
        png.unlink(missing_ok=True)


def test_prices_are_the_users(tmp_path: Path) -> None:
    own, out = tmp_path / "prices.yaml", tmp_path / "out.json"
    own.write_text(
        "gpus: {L4: {cluster: 10, modal: 20}}\nmodalRegionFactors: {anywhere: 2}\n"
        "containerCpu: 2\nmodalCpuCore: 1\ncontainerMemoryGib: 0"
    )
    invoked(tmp_path, "--prices", str(own), "--json", str(out))
    first, *others = json.loads(out.read_text())["settings"]
    assert first["warmDollars"] == pytest.approx(first["gpuHours"] * 10)
    assert first["burstDollars"] == pytest.approx(first["burstHours"] * (20 + 2) * 2)
    assert all(setting["dollars"] is not None for setting in others)


def test_without_burst_a_gpu_must_be_named_for_dollars(tmp_path: Path) -> None:
    plain = AGENT.replace(
        "  burst: {modal: {credentialsSecretRef: {name: modal}, slotsPerContainer: 2}}\n", ""
    )
    assert "unknown" in invoked(tmp_path, agent=plain).stdout
    assert "unknown" not in invoked(tmp_path, "--gpu", "H100", agent=plain).stdout


def test_health_data_is_simulated_without_burst(tmp_path: Path) -> None:
    phi = AGENT + "  policy: {dataClass: phi}\n"
    done = invoked(tmp_path, agent=phi)
    assert done.exit_code == 0
    assert "without burst" not in done.stdout


@pytest.mark.parametrize(
    ("agent", "calls", "said"),
    [
        ("", CSV, "has 0 of kind VoiceAgent"),
        (AGENT + "---\n" + AGENT.replace("desk", "other"), CSV, "has 2 of kind VoiceAgent"),
        (AGENT.replace("minPods: 1", "minPods: 9"), CSV, "warm.maxPods is below warm.minPods"),
        ("a: b: c", CSV, "agent.yaml cannot be read"),
        (AGENT, "at,for\n1,2\n", "the first line has no column arrival"),
        (AGENT, "arrival,duration\n1,long\n", "line 2: duration 'long' is not seconds"),
        (AGENT, "arrival,duration\nnoon,2\n", "line 2: 'noon' is neither seconds nor a time"),
        (AGENT, "arrival,duration\n1\n", "line 2: duration None is not seconds"),
        (AGENT, "", "the first line has no column arrival"),
        (AGENT, "arrival,duration\n", "there is no call with a duration in it"),
        (AGENT, "{nonsense\n", "line 1 is no JSON"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(
    tmp_path: Path, agent: str, calls: str, said: str
) -> None:
    done = invoked(tmp_path, agent=agent, calls=calls)
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output


def test_a_trace_that_is_nowhere_names_the_built_in_ones() -> None:
    with pytest.raises(
        TraceError, match="Built in are: diurnal, spike, flash-crowd, slow-ramp, weekend"
    ):
        reading.trace("/nowhere.csv", "desk")


# --- traces -------------------------------------------------------------------------------------------------


def made(tmp_path: Path, text: str) -> Trace:
    path = tmp_path / "calls"
    path.write_text(text)
    return reading.trace(str(path), "desk")


def test_arrivals_may_be_seconds_or_times_in_any_order(tmp_path: Path) -> None:
    plain = made(tmp_path, "arrival,duration\n30,5\n10,60\n")
    assert plain.calls == (Call(0, 60), Call(20, 5))
    assert plain.seconds == 60
    zoned = made(
        tmp_path, "duration,arrival\n5,2026-11-27T08:00:30+01:00\n60,2026-11-27T07:00:10Z\n"
    )
    assert zoned.calls == plain.calls
    assert zoned.began == 1795762810.0


def test_a_gateways_log_tells_of_calls_that_ended_and_that_were_refused(tmp_path: Path) -> None:
    lines = [
        log_line("placed", time="2026-11-27 08:00:00,500"),
        log_line("ended", 100.0, time="2026-11-27 08:01:40,000"),
        log_line("ended", 50.0, time="2026-11-27 08:01:00,000"),
        log_line("refused", time="2026-11-27 08:00:20,000"),
        log_line("ended", 7.0, time="2026-11-27 08:01:00,000", agent="default/other"),
        "",
    ]
    trace = made(tmp_path, "\n".join(lines))
    # One that was refused would have lasted as long as others do.
    assert trace.calls == (Call(0, 100.0), Call(10, 50.0), Call(20, 75.0))


def test_a_ledger_line_without_a_duration_is_told(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="line 1: seconds None is no duration"):
        made(tmp_path, log_line("ended", time="2026-11-27 08:01:40,000"))


# --- the cheapest -------------------------------------------------------------------------------------------


def a_bill(name: str, dollars: float | None, refused: int = 0) -> Bill:
    outcome = Outcome(
        calls=9, warm=9 - refused, burst=0, refused=refused, pod_hours=1, burst_hours=0,
        burst_call_hours=0, created=1,
    )  # fmt: skip
    return Bill(setting=name, outcome=outcome, gpu_hours=1, warm_dollars=dollars, burst_dollars=0.0)


def test_the_cheapest_refuses_no_more_calls() -> None:
    bills = [
        a_bill("own", 9.0, 1),
        a_bill("dear", 10.0),
        a_bill("good", 5.0, 1),
        a_bill("better", 4.0),
        a_bill("rude", 1.0, 2),
        a_bill("unknown", None),
    ]
    assert [bill.setting for bill in best(bills)] == ["better", "good"]
    assert best([a_bill("own", None), a_bill("free", 0.0)]) == []
