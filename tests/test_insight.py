"""`trunkline explain` and `trunkline top`: what they conclude, and that they read what gateways write."""

import asyncio
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gateway_rig import (
    AGENT,
    FakeModal,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    events,
    on_uvloop,
    refused,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from trunkline_runtime.cli import app
from trunkline_runtime.contract import (
    CALL_HEADER,
    KEPT,
    NO_SLOT,
    AgentLoad,
    SpendLoad,
    State,
    WarmRung,
    WorkerLoad,
)
from trunkline_runtime.gateway.accounts.books import Books
from trunkline_runtime.gateway.accounts.files import LedgerFile
from trunkline_runtime.gateway.process import Running
from trunkline_runtime.insight.asking import states
from trunkline_runtime.insight.board import board
from trunkline_runtime.insight.commands import plain, table, told
from trunkline_runtime.insight.explanation import NotFound, WouldBe, explained, found

CALL = "3f9c1e2200000000000000000000abcd"
FULL = {"pods": 2, "slots": 8, "busy": 8, "free": 0, "draining": 0}


def a_record(**changes: Any) -> dict[str, Any]:
    record = {
        "message": "ended",
        "call": CALL,
        "agent": AGENT,
        "tenant": "shop",
        "gateway": "gateway-0",
        "rung": "burst/us-east",
        "worker": "",
        "admission_ms": 900.0,
        "answered_ms": 880.0,
        "passed_over": [{"rung": "warm", "worker": "", "why": NO_SLOT, "ms": 0.0}],
        "warm": FULL,
        "seconds": 12.5,
        "by": "caller",
        "code": 1000,
        "lost": False,
    }
    return record | changes


def passed(why: str, rung: str = "warm") -> list[dict[str, Any]]:
    return [{"rung": rung, "worker": "echo-0", "why": why, "ms": 3.0}]


# --- what would have been ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "would", "because"),
    [
        ({}, WouldBe.ANSWERED, "its 4 slots would have been free; instead of burst/us-east"),
        ({"rung": "none", "message": "refused"}, WouldBe.ANSWERED, "the call was refused"),
        ({"rung": "warm", "passed_over": []}, WouldBe.NOTHING, "a warm slot was free"),
        ({"rung": "warm", "passed_over": passed("timed out")}, WouldBe.NOTHING, "was free"),
        ({"passed_over": []}, WouldBe.NOTHING, "no warm rung"),
        ({"passed_over": passed("no", "burst/eu")}, WouldBe.NOTHING, "no warm rung"),
        ({"passed_over": passed(KEPT)}, WouldBe.PERHAPS, "kept for other tenants"),
        ({"passed_over": passed("cannot be reached")}, WouldBe.PERHAPS, "asked and failed"),
        ({"warm": {**FULL, "pods": 0, "slots": 0}}, WouldBe.ANSWERED, "its slots would have"),
        ({"message": "left", "rung": "none", "passed_over": []}, WouldBe.UNKNOWN, "left before"),
        (
            {"rung": "warm", "passed_over": [*passed(NO_SLOT), *passed("waited in line", "wait")]},
            WouldBe.ANSWERED,
            "without it the call waited 3 ms for one",
        ),
        (
            {
                "message": "left",
                "rung": "none",
                "passed_over": [*passed(NO_SLOT), *passed("the caller left", "wait")],
            },
            WouldBe.ANSWERED,
            "without it the caller left after 3 ms in line",
        ),
        (
            {"rung": "none", "passed_over": [*passed(NO_SLOT), *passed("no slot came", "wait")]},
            WouldBe.ANSWERED,
            "the call was refused after 3 ms in line",
        ),
    ],
)
def test_one_more_pod(changes: dict[str, Any], would: WouldBe, because: str) -> None:
    verdict = explained(a_record(**changes)).one_more_pod
    assert verdict.would is would
    assert because in verdict.because


def test_the_rungs_are_all_of_the_time() -> None:
    explanation = explained(a_record(passed_over=passed("timed out"), answered_ms=850.0))
    assert [rung.said for rung in explanation.rungs] == ["timed out", "answered"]
    assert explanation.before == pytest.approx(900.0 - 3.0 - 850.0)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(a_record())), st.none() | st.integers() | st.text()))
def test_a_broken_record_is_no_crash(changes: dict[str, Any]) -> None:
    line = json.dumps(a_record() | {key: changes[key] for key in changes if key != "message"})
    try:
        record = found([line], CALL)
    except NotFound:
        return
    assert list(told(explained(record)))


# --- which call -------------------------------------------------------------------------------------------


def test_a_call_is_found_by_its_beginning_behind_whatever_a_tool_wrote() -> None:
    lines = [
        "not json",
        '{"message": "listening"}',
        "[pod/gateway-0] " + json.dumps(a_record(message="placed")),
        "[pod/gateway-0] " + json.dumps(a_record()),
        json.dumps(a_record(call="ffff00")),
        json.dumps(a_record(message="placed")),
    ]
    assert found(lines, CALL[:8].upper())["message"] == "ended"
    assert explained(found(lines[2:3], CALL)).what == "live"


def test_a_call_that_is_not_there_or_is_two_is_told() -> None:
    lines = [json.dumps(a_record(call=f"abcdef{number}")) for number in (1, 2)]
    with pytest.raises(NotFound, match="2 calls begin with abcdef"):
        found(lines, "abcdef")
    with pytest.raises(NotFound, match="in none of the 2 records"):
        found(lines, "0000000")
    with pytest.raises(NotFound, match="too short"):
        found(lines, "abc")


# --- the command ------------------------------------------------------------------------------------------


@on_uvloop
async def test_explain_reads_what_a_gateway_wrote(tmp_path: Path) -> None:
    file = tmp_path / "calls.ndjson"
    async with FakeModal().serving() as modal:
        modal.status = 503
        route = a_route(rungs=[WarmRung(kind="warm"), modal.rung()])
        async with (
            a_gateway(route, books=Books(file=LedgerFile(file))) as gateway,
            FakeWorker(slots=1).serving(gateway),
            call(gateway),
        ):
            answer = await refused(call(gateway))
    number = answer.headers[CALL_HEADER]
    shown = CliRunner().invoke(app, ["explain", number, "--ledger", str(file)])
    assert shown.exit_code == 0, shown.output
    assert "refused with 503" in shown.output
    assert NO_SLOT in shown.output
    assert "burst/us-east" in shown.output
    assert "pods 1, slots 1, busy 1, free 0, draining 0" in shown.output
    assert "with one more pod: answered by a warm pod (its 1 slots" in shown.output
    as_json = CliRunner().invoke(app, ["explain", number[:10], "--json"], input=file.read_text())
    shown_json = json.loads(as_json.output)
    assert shown_json["call"] == number
    assert shown_json["one_more_pod"]["would"] == "answered by a warm pod"


@on_uvloop
async def test_explain_reads_a_log_of_a_call_that_is_live() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway):
        with events("trunkline.calls") as lines:
            async with call(gateway):
                (placed,) = list(lines)
    keys = (
        "message",
        "call",
        "agent",
        "rung",
        "worker",
        "admission_ms",
        "answered_ms",
        "passed_over",
    )
    explanation = explained(found([json.dumps({key: placed[key] for key in keys})], placed["call"]))
    assert explanation.what == "live"
    assert explanation.rungs[-1].worker == "echo-0"


def test_explain_tells_what_is_wrong(tmp_path: Path) -> None:
    missing = CliRunner().invoke(app, ["explain", CALL, "--ledger", str(tmp_path / "none")])
    assert missing.exit_code == 2
    assert "cannot be read" in missing.output
    unknown = CliRunner().invoke(app, ["explain", CALL], input="{}\n")
    assert unknown.exit_code == 1
    assert "in none of the 0 records" in unknown.output


# --- the board --------------------------------------------------------------------------------------------


def a_state(name: str = "g0", arrivals: int = 0, **load: Any) -> State:
    agent = AgentLoad(
        workers={"echo-0": WorkerLoad(boot="b", slots=4, busy=3, free=1, draining=False)},
        calls=2,
        burst=1,
        arrivals=arrivals,
        refused=1,
        lost=0,
        burstFailures=0,
        burstError="",
    )
    agent.update(load)  # type: ignore[typeddict-item]  # a test names only keys of AgentLoad
    return State(gateway=name, boot=f"boot-{name}", epoch=7, unready=None, agents={AGENT: agent})


def test_what_a_call_cost_and_how_it_went_is_told_where_it_is_known() -> None:
    whole = a_record(
        cost=0.01234,
        price="L4 at $0.000222 a second",
        audio_seconds_up=60.5,
        audio_seconds_down=31.0,
        first_audio_ms=420.0,
        turns=7,
        gaps=0,
    )
    text = "\n".join(told(explained(whole)))
    assert "cost: $0.0123 (L4 at $0.000222 a second)" in text
    assert "talk: 60.5 s of audio from the caller, 31.0 s to it, the first after 420.0 ms, 7 turns, 0 gaps" in text  # fmt: skip
    bare = "\n".join(told(explained(a_record(cost=None, turns=None))))
    assert "no price was known" in bare
    assert "talk: not known" in bare


def spent(dollars: float) -> SpendLoad:
    return SpendLoad(spent=dollars, reserved=0.0, ceiling=None, starts=1)


def test_the_board_shows_who_waits_what_is_left_out_and_what_was_spent() -> None:
    aside = WorkerLoad(boot="b", slots=4, busy=0, free=4, draining=False, aside=True)
    one = a_state("g0", waiting=2, shut={"burst/us-east": "open"}, spend=spent(1.25))
    two = a_state("g1", waiting=1, workers={"echo-0": aside}, spend=spent(0.5))
    seen = board({"http://a": one, "http://b": two}, 1.0)
    (row,) = seen.agents
    assert (row.waiting, row.aside, row.shut, row.spent) == (3, 1, ("burst/us-east",), 1.75)
    assert "waiting=3 aside=1 spent=1.7500 shut=burst/us-east" in list(plain(seen))[-1]
    (bare,) = board({"http://a": a_state()}, 1.0).agents
    assert (bare.spent, bare.aside) == (None, 0)
    made = table(seen)
    assert made.row_count == 1


def test_pods_count_once_and_calls_of_all_gateways_are_added() -> None:
    seen = board({"http://a": a_state("g0"), "http://b": a_state("g1"), "http://c": "gone"}, 1.0)
    (row,) = seen.agents
    assert (row.pods, row.slots, row.busy, row.free) == (1, 4, 3, 1)
    assert (row.calls, row.burst, row.refused) == (4, 2, 2)
    assert row.arrivals_a_minute is None
    assert [gateway.trouble for gateway in seen.gateways] == ["", "", "gone"]
    assert not seen.blind
    assert board({"http://c": "gone"}, 1.0).blind


def test_arrivals_are_counted_between_two_looks_at_the_same_gateways() -> None:
    first = board({"a": a_state("g0", 10), "b": a_state("g1", 100)}, 10.0)
    again = board({"a": a_state("g0", 13), "b": a_state("g2", 500)}, 40.0, first)
    assert again.agents[0].arrivals_a_minute == 6.0
    gone = board({"b": a_state("g3", 900)}, 50.0, again)
    assert gone.agents[0].arrivals_a_minute is None


@on_uvloop
async def test_top_sees_what_gateways_say() -> None:
    async with (
        a_gateway(a_route()) as one,
        a_gateway(a_route(), name="gateway-1") as two,
        FakeWorker(slots=2).serving(one, two) as worker,
        call(one),
        call(two),
    ):
        await until(lambda: worker.row(one)["busy"] == worker.row(two)["busy"] == 2)
        urls = [f"http://127.0.0.1:{gateway.health_port}" for gateway in (one, two)]
        dead = "http://127.0.0.1:9"
        seen = board(await states([*urls, dead, "http://[::"]), 0.0)
        (row,) = seen.agents
        assert (row.pods, row.slots, row.busy, row.calls) == (1, 2, 2, 2)
        assert [gateway.name for gateway in seen.gateways] == ["gateway-0", "gateway-1", "", ""]
        assert "cannot be reached" in seen.gateways[2].trouble
        assert seen.gateways[3].trouble
        lines = list(plain(seen))
        assert any(f"agent name={AGENT} pods=1" in line for line in lines)
        text, status = await asyncio.to_thread(ran, "--once", "--gateway-health", urls[0])
        assert status == 0
        assert f"agent name={AGENT} pods=1 draining=0 slots=2 busy=2" in text
        await shows_a_table(one, urls)
    text, status = await asyncio.to_thread(ran, "--once", "--json", "--gateway-health", urls[0])
    assert status == 1
    assert "cannot be reached" in json.loads(text)["gateways"][0]["trouble"]


def ran(*options: str) -> tuple[str, int]:
    """`trunkline top` where standard output is no terminal."""
    result = CliRunner().invoke(app, ["top", *options])
    return result.output, result.exit_code


async def shows_a_table(gateway: Running, urls: list[str]) -> None:
    """The real command on a real terminal, ended by Ctrl-C."""
    leader, follower = pty.openpty()
    options = [part for url in urls for part in ("--gateway-health", url)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
    with subprocess.Popen(
        [sys.executable, "-m", "trunkline_runtime", "top", *options, "--interval", "0.2"],
        stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True,
    ) as child:  # fmt: skip
        os.close(follower)
        shown = b""
        while b"gateway-1: 1 calls" not in shown or AGENT.encode() not in shown:
            chunk = await asyncio.to_thread(os.read, leader, 65536)
            assert chunk, shown
            shown += chunk
        child.send_signal(2)
        assert await asyncio.to_thread(child.wait, 20) in (0, 130)
    os.close(leader)


def test_top_wants_urls() -> None:
    text, status = ran("--once", "--gateway-health", "10.0.0.7:9090")
    assert status == 2
    assert "is no URL" in text
