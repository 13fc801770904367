"""A worker's account of a call: what it counts, and that it reaches the ledger however the call ends."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from gateway_rig import (
    AGENT,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    closed,
    metric,
    on_uvloop,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gateway_rush import a_real_worker, first_event
from websockets.asyncio.client import ClientConnection

from trunkline_runtime.contract import ACCOUNT_PING
from trunkline_runtime.gateway.accounts.books import Books
from trunkline_runtime.gateway.accounts.files import LedgerFile
from trunkline_runtime.gateway.accounts.record import Told, told
from trunkline_runtime.worker.account import Account

SECOND = 48_000  # bytes of PCM16 at 24 kHz


# --- what is counted --------------------------------------------------------------------------------------


def test_an_account_counts_seconds_turns_and_silences() -> None:
    account = Account(100.0)
    assert told(account.told()) == Told(audio_up=0, audio_down=0, turns=0, gaps=0)
    account.heard(SECOND * 3)
    account.reply_begins()
    account.said(SECOND, 101.5)  # plays until 102.5
    account.said(SECOND, 101.6)  # until 103.5
    account.said(SECOND, 103.6)  # 100 ms of silence, then until 104.6
    account.said(SECOND, 104.63)  # within what nobody hears
    account.reply_ends()
    account.reply_begins()
    account.said(SECOND // 2, 120.0)
    assert told(account.told()) == Told(
        audio_up=3.0, audio_down=4.5, first_audio_ms=1500, turns=2, gaps=1
    )


@given(st.lists(st.tuples(st.integers(0, 10**12), st.floats(0, 1e5)), max_size=50))
@settings(deadline=None)
def test_an_account_fits_into_a_ping(steps: list[tuple[int, float]]) -> None:
    account, now = Account(0.0), 0.0
    for size, passed in steps:
        now += passed
        account.reply_begins()
        account.heard(size)
        account.said(size, now)
    assert len(account.told()) <= 125
    assert account.told().startswith(ACCOUNT_PING)


@pytest.mark.parametrize(
    "payload",
    [None, b"", b"x", b"[]", b'{"in":1}', b'{"in":-1,"out":0,"first":0,"turns":0,"gaps":0}',
     b'{"in":true,"out":0,"first":0,"turns":0,"gaps":0}', b'{"in":NaN,"out":0,"first":0,"turns":0,"gaps":0}',
     b'{"in":1e99,"out":0,"first":0,"turns":0,"gaps":0}', b"\xff\xfe"],
)  # fmt: skip
def test_of_an_account_that_makes_no_sense_nothing_is_believed(payload: bytes | None) -> None:
    assert told(None if payload is None else ACCOUNT_PING + payload) == Told()


# --- how it reaches the ledger ----------------------------------------------------------------------------


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


async def talk(caller: ClientConnection, seconds: float = 0.8) -> None:
    """Says something to a loopback worker and hears its echo begin."""
    assert (await first_event(caller))["type"] == "session.created"
    audio = base64.b64encode(bytes(int(SECOND * seconds))).decode()
    await caller.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
    while (await first_event(caller))["type"] != "response.output_audio.delta":
        pass


@on_uvloop
async def test_who_hangs_up_and_who_vanishes_leave_a_whole_account(tmp_path: Path) -> None:
    file = tmp_path / "calls"
    books = Books(file=LedgerFile(file))
    async with a_gateway(a_route(), books=books) as gateway, a_real_worker("real-0", gateway):
        async with call(gateway) as caller:
            await talk(caller)
        await until(lambda: len(lines(file)) == 1)
        vanishing = await call(gateway)
        await talk(vanishing)
        vanishing.transport.abort()
        await until(lambda: len(lines(file)) == 2)
        # The seat is free at once, not when the gateway has done with the link.
        await until(lambda: _free(gateway) == 4)
        assert await metric(gateway, "trunkline_first_audio_seconds_count") == 2
    for line, code in zip(lines(file), (1000, 1006), strict=True):
        assert (line["code"], line["by"], line["rung"]) == (code, "caller", "warm")
        assert line["audio_seconds_up"] == pytest.approx(0.8)
        assert 0 < line["audio_seconds_down"] <= 0.8
        assert line["first_audio_ms"] > 0
        assert line["turns"] == 1
        assert line["gaps"] >= 0


@on_uvloop
@pytest.mark.parametrize(("objective", "counted"), [(0.001, 1), (60_000.0, 0)])
async def test_an_agent_that_is_silent_for_longer_than_it_promises_is_counted(
    tmp_path: Path, objective: float, counted: int
) -> None:
    file, route = tmp_path / "calls", a_route(firstAudioMs=objective)
    async with (
        a_gateway(route, books=Books(file=LedgerFile(file))) as gateway,
        a_real_worker("real-0", gateway),
    ):
        async with call(gateway) as caller:
            await talk(caller)
        await until(lambda: len(lines(file)) == 1)
        name = "trunkline_slow_first_audio_total"
        assert await metric(gateway, name, agent=AGENT) == counted


def _free(gateway: Any) -> int:
    workers = gateway.gateway.load()["agents"]["default/echo"]["workers"]
    return sum(worker["free"] for worker in workers.values())


@on_uvloop
async def test_a_call_that_the_worker_or_the_gateway_ends_has_its_account_too(
    tmp_path: Path,
) -> None:
    file = tmp_path / "calls"
    books = Books(file=LedgerFile(file))
    idle = a_route(settings={"idleSeconds": 0.5})
    async with a_gateway(idle, books=books) as gateway, a_real_worker("real-0", gateway):
        caller = await call(gateway)
        await talk(caller)
        assert (await closed(caller))[0] == 1000
        await until(lambda: len(lines(file)) == 1)
    file2 = tmp_path / "calls2"
    books = Books(file=LedgerFile(file2))
    short = a_route(maxSeconds=0.7)
    async with a_gateway(short, books=books) as gateway, a_real_worker("real-0", gateway):
        caller = await call(gateway)
        await talk(caller, 0.2)
        assert (await closed(caller))[0] == 1000
        await until(lambda: len(lines(file2)) == 1)
    by_worker, by_gateway = lines(file)[0], lines(file2)[0]
    assert (by_worker["by"], by_gateway["by"]) == ("worker", "gateway")
    assert by_worker["audio_seconds_up"] == pytest.approx(0.8)
    assert by_gateway["audio_seconds_up"] == pytest.approx(0.2)
    assert by_worker["turns"] == by_gateway["turns"] == 1


@on_uvloop
async def test_a_worker_that_tells_nothing_leaves_null_and_costs_no_time(tmp_path: Path) -> None:
    file = tmp_path / "calls"
    books = Books(file=LedgerFile(file))
    async with (
        a_gateway(a_route(), books=books) as gateway,
        FakeWorker().serving(gateway) as worker,
    ):
        async with call(gateway) as caller:
            await caller.send("hi")
            assert await caller.recv() == "hi"
        await until(lambda: bool(worker.closes) and bool(file.exists()) and bool(lines(file)))
        assert worker.closes == [(1000, "")]
        async with call(gateway) as caller:
            await caller.send("die")
            await closed(caller)
        await until(lambda: len(lines(file)) == 2)
    for line in lines(file):
        for key in ("audio_seconds_up", "audio_seconds_down", "first_audio_ms", "turns", "gaps"):
            assert line[key] is None
    assert lines(file)[1]["lost"] is True


@on_uvloop
async def test_a_gateway_that_ends_writes_the_accounts_of_its_last_calls(tmp_path: Path) -> None:
    file = tmp_path / "calls"
    books = Books(file=LedgerFile(file))
    worker = FakeWorker()
    async with a_gateway(a_route(), books=books) as gateway:
        running = worker.serving(gateway)
        await running.__aenter__()
        callers = [await call(gateway) for _ in range(3)]
    for caller in callers:
        assert (await closed(caller))[0] == 1012
    assert [line["code"] for line in lines(file)] == [1012] * 3
    await running.__aexit__(None, None, None)
