"""The ledger: what a line says, and that the lines of all calls arrive wherever they are sent."""

import asyncio
import contextlib
import itertools
import json
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from gateway_rig import (
    AGENT,
    KEY,
    FakeModal,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    events,
    http,
    metric,
    on_uvloop,
    refused,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from trunkline_operator.simulation import reading
from trunkline_runtime.contract import CALL_HEADER, CallRecord, WarmRung
from trunkline_runtime.gateway.access.caller import Caller, Via
from trunkline_runtime.gateway.accounts.books import Books, BooksError, books_of
from trunkline_runtime.gateway.accounts.courier import Collector, Courier, Verdict, pause, verdict
from trunkline_runtime.gateway.accounts.files import LedgerFile
from trunkline_runtime.gateway.accounts.record import Party, as_line, caller_hash, ended, left
from trunkline_runtime.gateway.accounts.spool import DiskSpool, MemorySpool, Spool
from trunkline_runtime.gateway.accounts.tenants import MOST_TENANTS, OTHERS, TenantCounters
from trunkline_runtime.gateway.call import By, Ending, Facts
from trunkline_runtime.gateway.ladder import Placement, Rejected, Warm

MINT_KEY = "mint-key-of-the-tests"


def a_record(number: int) -> CallRecord:
    party = Party(call=f"call-{number:06d}", agent=AGENT, tenant="test")
    placement = Placement(result=Rejected("the caller left"), steps=(), ms=5.0)
    return left(party, placement, "gateway-0", 1795762810.0)


def names() -> Any:
    count = itertools.count()
    return lambda: f"n{next(count)}"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what a line says -------------------------------------------------------------------------------------


@on_uvloop
async def test_an_ended_call_is_one_line_with_its_times_and_its_end(tmp_path: Path) -> None:
    file = tmp_path / "calls.ndjson"
    access: dict[str, Any] = {**a_route()["access"], "mintKey": MINT_KEY}
    books = Books(file=LedgerFile(file))
    async with a_gateway(a_route(access=access), books=books) as gateway:
        async with FakeWorker().serving(gateway), call(gateway) as caller:
            assert caller.response is not None
            number = caller.response.headers[CALL_HEADER]
            await caller.send("hello")
            assert await caller.recv() == "hello"
        await until(lambda: file.stat().st_size > 0)
    (line,) = lines_of(file)
    assert line["message"] == "ended"
    assert (line["call"], line["agent"], line["tenant"]) == (number, AGENT, "test")
    assert (line["gateway"], line["rung"], line["worker"]) == ("gateway-0", "warm", "echo-0")
    assert (line["code"], line["by"], line["lost"]) == (1000, "caller", False)
    assert line["bytes_up"] == 11
    assert line["bytes_down"] == 7
    start, answer, end = (datetime.fromisoformat(line[key]) for key in ("start", "answer", "end"))
    assert start <= answer <= end
    assert (end - answer).total_seconds() == pytest.approx(line["seconds"], abs=0.003)
    assert (answer - start).total_seconds() * 1000 == pytest.approx(line["admission_ms"], abs=3)
    # uvloop counts in milliseconds, and a worker may answer within one.
    assert 0 <= line["answered_ms"] <= line["admission_ms"]
    assert line["passed_over"] == []
    assert "warm" not in line
    text = file.read_text()
    assert KEY not in text
    assert "hello" not in text
    assert access["apiKeys"]["test"] not in text
    assert len(line["caller"]) == 16


@on_uvloop
async def test_a_call_on_burst_tells_what_the_warm_pods_were_like(tmp_path: Path) -> None:
    file = tmp_path / "calls.ndjson"
    async with FakeModal().serving() as modal:
        route = a_route(rungs=[WarmRung(kind="warm"), modal.rung()])
        async with (
            a_gateway(route, books=Books(file=LedgerFile(file))) as gateway,
            FakeWorker(slots=1).serving(gateway),
            call(gateway),
        ):
            async with call(gateway):
                pass
            await until(lambda: file.stat().st_size > 0)
            (line,) = lines_of(file)
    assert (line["rung"], line["worker"]) == ("burst/us-east", "")
    (step,) = line["passed_over"]
    assert (step["rung"], step["worker"], step["why"]) == ("warm", "", "no free slot")
    assert line["warm"] == {"pods": 1, "slots": 1, "busy": 1, "free": 0, "draining": 0, "aside": 0}


@on_uvloop
async def test_refused_callers_and_those_that_leave_have_a_line(tmp_path: Path) -> None:
    file = tmp_path / "calls.ndjson"
    books = Books(file=LedgerFile(file))
    async with a_gateway(a_route(), books=books) as gateway:
        answer = await refused(call(gateway))
        worker = FakeWorker()
        worker.silent = True
        async with worker.serving(gateway):
            waiting = asyncio.ensure_future(refused(call(gateway)))
            await until(lambda: bool(worker.requests))
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await until(lambda: len(lines_of(file)) == 2)
    first, second = lines_of(file)
    assert (first["message"], first["rung"]) == ("refused", "none")
    assert first["call"] == answer.headers[CALL_HEADER]
    assert first["warm"]["pods"] == 0
    assert "answer" not in first
    assert "code" not in first
    assert (second["message"], second["tenant"]) == ("left", "test")
    assert second["admission_ms"] > 0
    (step,) = second["passed_over"]
    assert (step["rung"], step["worker"], step["why"]) == ("warm", "echo-0", "the caller left")
    assert second["warm"]["pods"] == 1


def test_a_caller_has_one_name_an_agent_and_tenant_and_none_without_a_key() -> None:
    name = caller_hash("k", AGENT, "t", "who")
    assert name == caller_hash("k", AGENT, "t", "who")
    others = {
        caller_hash("k2", AGENT, "t", "who"),
        caller_hash("k", "default/other", "t", "who"),
        caller_hash("k", AGENT, "u", "who"),
        caller_hash("k", AGENT, "t", "another"),
    }
    assert len(others | {name}) == 5
    assert caller_hash("", AGENT, "t", "who") == caller_hash("k", AGENT, "t", "") == ""


def test_who_a_caller_is() -> None:
    keyed = Caller(tenant="shop", via=Via.KEY, root="key 1234")
    minted = Caller(tenant="shop", via=Via.SECRET, root="key 1234", expires=1.0)
    assert keyed.identity == minted.identity != ""
    token = Caller(tenant="shop", via=Via.JWT, root="issuer x", subject="ann")
    other = Caller(tenant="shop", via=Via.JWT, root="issuer x", subject="bob")
    assert token.identity != other.identity
    assert "ann" not in repr(token)
    for nobody in (
        Caller(tenant="public", via=Via.PUBLIC, root="public"),
        Caller(tenant="shop", via=Via.JWT, root="issuer x"),
        Caller(tenant="shop", via=Via.TICKET, root="issuer x"),
    ):
        assert nobody.identity == ""


def test_the_simulator_reads_a_ledger(tmp_path: Path) -> None:
    file = tmp_path / "calls.ndjson"
    keep = LedgerFile(file)
    placement = Placement(result=Warm("echo-0"), steps=(), ms=40.0, answered_ms=1.0)
    ending = Ending(code=1000, by=By.CALLER, lost=False, seconds=60.0, bytes_up=0, bytes_down=0)
    for number in range(2):
        facts = Facts(
            call=f"call-{number}",
            agent=AGENT,
            tenant="test",
            caller="",
            placement=placement,
            price=None,
            max_seconds=600,
            stall_seconds=30,
            audio_times_real=0,
        )
        keep.keep(ended(facts, ending, "gateway-0", 1795762810.0 + 10 * number))
    keep.keep(a_record(3))
    keep.close()
    trace = reading.trace(str(file), "echo")
    assert [(call.at, call.seconds) for call in trace.calls] == [(0, 60), (10, 60)]


def test_tenants_have_counters_and_the_many_share_one() -> None:
    registry = CollectorRegistry()
    counters = TenantCounters(registry)
    for number in range(MOST_TENANTS + 5):
        line = a_record(number)
        line["tenant"], line["seconds"], line["rung"] = f"t{number}", 60.0, "burst/us-east"
        line["cost"] = 0.02
        counters.ended(line)
        counters.ended({**line, "rung": "warm", "cost": None})

    def value(name: str, tenant: str, place: str) -> float | None:
        labels = {"agent": AGENT, "tenant": tenant, "place": place}
        return registry.get_sample_value(f"trunkline_tenant_{name}_total", labels)

    assert value("call_seconds", "t0", "burst") == value("call_seconds", "t0", "warm") == 60
    assert value("cost_dollars", "t0", "burst") == pytest.approx(0.02)
    assert value("cost_dollars", "t0", "warm") is None, "of what has no price, nothing is claimed"
    assert value("calls", OTHERS, "warm") == 5
    assert value("calls", f"t{MOST_TENANTS}", "warm") is None


# --- a file -----------------------------------------------------------------------------------------------


def test_a_file_that_is_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path, old = tmp_path / "calls", tmp_path / "calls.1"
    file = LedgerFile(path)
    file.keep(a_record(1))
    path.rename(old)
    file.keep(a_record(2))
    file.close()
    assert [line["call"] for line in lines_of(old)] == ["call-000001"]
    assert [line["call"] for line in lines_of(path)] == ["call-000002"]


def test_what_does_not_fit_on_the_disk_is_logged_instead_and_told_of_once(tmp_path: Path) -> None:
    path = tmp_path / "calls"
    file = LedgerFile(path)
    with events("trunkline.calls") as logged, events("trunkline.ledger") as told:
        with files_of_at_most(len(as_line(a_record(1))) + 10):
            for number in (1, 2, 3):
                file.keep(a_record(number))
        file.keep(a_record(4))
    file.close()
    assert [line["call"] for line in lines_of(path)] == ["call-000001", "call-000004"]
    assert [line["call"] for line in logged] == ["call-000002", "call-000003"]
    (line,) = told
    assert "calls are logged instead" in line["message"]


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses every write that makes a file longer, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- the spool --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "disk"])
@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from("atd"), st.integers(1, 5)), max_size=30))
def test_a_spool_loses_only_the_oldest_and_counts_them(
    kind: str, steps: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    spool: Spool
    most = 400
    if kind == "memory":
        spool = MemorySpool(most, names())
    else:
        spool = DiskSpool(tmp_path_factory.mktemp("spool") / "s", most, names())
    kept = lost = taken = 0
    for what, count in steps:
        if what == "a":
            lines = [b"%08d%s\n" % (kept + n, b"x" * 41) for n in range(count)]
            lost += spool.append(lines)
            kept += count
        elif what == "t" and (batch := spool.oldest()) is not None:
            assert spool.oldest() == batch, "it stays until it is done"
        elif what == "d" and (batch := spool.oldest()) is not None:
            taken += batch.records
            spool.done(batch)
        assert spool.backlog() <= most
    rest = []
    while (batch := spool.oldest()) is not None:
        rest += [int(line[:8]) for line in batch.body.splitlines()]
        spool.done(batch)
    spool.close()
    assert rest == sorted(rest)
    assert kept == lost + taken + len(rest)
    assert not rest or lost or rest[-1] == kept - 1


def test_a_spool_on_disk_outlives_its_process_and_a_cut_line(tmp_path: Path) -> None:
    spool = DiskSpool(tmp_path, 10_000, names())
    spool.append([b"one\n", b"two\n"])
    with pytest.raises(OSError, match="belongs to another gateway"):
        DiskSpool(tmp_path, 10_000, names())
    spool.close()
    (file,) = tmp_path.glob("*.ndjson")
    file.write_bytes(b"one\ntwo\nth")
    spool = DiskSpool(tmp_path, 10_000, names())
    spool.append([b"four\n"])
    first = spool.oldest()
    assert first is not None
    assert first.body == b"one\ntwo\n"
    spool.done(first)
    second = spool.oldest()
    assert second is not None
    assert second.body == b"four\n"
    spool.done(second)
    spool.close()
    assert list(tmp_path.glob("*.ndjson")) == []


def test_a_spool_on_a_full_disk_counts_what_it_could_not_keep(tmp_path: Path) -> None:
    spool = DiskSpool(tmp_path, 10_000, names())
    assert spool.append([b"first\n"]) == 0
    with files_of_at_most(8):
        assert spool.append([b"too long a line\n"]) == 2, "the oldest made room in vain"
        assert spool.append([b"fits\n"]) == 0
    batch = spool.oldest()
    assert batch is not None
    assert batch.body == b"fits\n"
    spool.close()


# --- a collector ------------------------------------------------------------------------------------------


class FakeCollector:
    """A real HTTP server that keeps what it takes, or does as a test says."""

    def __init__(self) -> None:
        self.status = 200
        self.silent = False  # reads, and does not answer
        self.headers: list[dict[str, str]] = []
        self.batches: list[tuple[str, list[str]]] = []  # key and calls, of requests with a 2xx
        self.asked = 0
        self.port = 0

    @property
    def calls(self) -> list[str]:
        return [name for _, batch in self.batches for name in batch]

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["FakeCollector"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                pairs = (line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
                headers = {name.lower(): value for name, value in pairs}
                body = await reader.readexactly(int(headers["content-length"]))
                self.asked += 1
                self.headers.append(headers)
                if self.silent:
                    await reader.read()  # until the gateway gives up
                    break
                if self.status < 300:
                    calls = [json.loads(line)["call"] for line in body.splitlines()]
                    self.batches.append((headers["idempotency-key"], calls))
                writer.write(f"HTTP/1.1 {self.status} x\r\nContent-Length: 0\r\n\r\n".encode())
        writer.close()


@contextlib.asynccontextmanager
async def a_courier(
    port: int, spool: Spool, registry: CollectorRegistry | None = None, **changes: Any
) -> AsyncIterator[Courier]:
    patience: dict[str, Any] = {"gather": 0.0, "retry": (0.01, 0.05), "farewell": 0.2}
    collector = Collector(url=f"http://127.0.0.1:{port}/calls", **(patience | changes))
    courier = Courier(collector, spool, registry or CollectorRegistry())
    running = asyncio.create_task(courier.run())
    try:
        yield courier
    finally:
        running.cancel()
        await asyncio.wait([running])
        await courier.close()


@on_uvloop
async def test_nothing_is_lost_while_a_collector_fails_in_every_way(tmp_path: Path) -> None:
    collector = FakeCollector()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        collector.port = taken.getsockname()[1]  # nobody listens there at first
    spool = DiskSpool(tmp_path, 2**20, names())
    with events("trunkline.ledger") as told:
        async with a_courier(collector.port, spool, answer=0.3) as courier:
            numbers = itertools.count()

            def some() -> None:
                for _ in range(3):
                    courier.keep(a_record(next(numbers)))

            some()
            await until(lambda: courier._failures > 1)
            async with collector.serving():
                for status in (500, 503, 429, 401, 404, 301):
                    collector.status = status
                    some()
                    seen = collector.asked
                    await until(lambda seen=seen: collector.asked > seen + 1)  # type: ignore[misc]
                collector.silent = True
                some()
                seen = collector.asked
                await until(lambda: collector.asked > seen + 1)
                collector.silent, collector.status = False, 204
                some()
                wanted = next(numbers)
                await until(lambda: len(set(collector.calls)) == wanted)
                await until(lambda: spool.backlog() == 0)
    assert sorted(set(collector.calls)) == [f"call-{number:06d}" for number in range(wanted)]
    keys = [key for key, _ in collector.batches]
    assert len(keys) == len(set(keys)), "a batch that was taken is not sent again"
    assert len(collector.calls) == wanted
    assert [line["message"].split(":")[0] for line in told] == [
        "the ledger's collector takes nothing",
        "the ledger's collector takes records again",
    ]
    assert all("127.0.0.1" not in str(line) for line in told)


@on_uvloop
async def test_what_a_collector_had_taken_without_saying_so_comes_again_with_its_key(
    tmp_path: Path,
) -> None:
    async with FakeCollector().serving() as collector:
        collector.silent = True
        spool = DiskSpool(tmp_path, 2**20, names())
        async with a_courier(collector.port, spool, answer=0.05) as courier:
            courier.keep(a_record(1))
            await until(lambda: collector.asked >= 3)
            collector.silent = False
            await until(lambda: bool(collector.batches))
    assert len({headers["idempotency-key"] for headers in collector.headers}) == 1


@on_uvloop
async def test_records_on_disk_are_sent_by_the_next_gateway(tmp_path: Path) -> None:
    spool = DiskSpool(tmp_path, 2**20, names())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with events("trunkline.ledger") as told:
        async with a_courier(port, spool) as courier:
            for number in range(5):
                courier.keep(a_record(number))
    assert told[-1]["message"] == "records of calls were not sent"
    async with FakeCollector().serving() as collector:
        async with a_courier(collector.port, DiskSpool(tmp_path, 2**20, names()), token="s3cret"):
            await until(lambda: len(collector.calls) == 5)
        assert collector.headers[-1]["authorization"] == "Bearer s3cret"
        assert collector.headers[-1]["content-type"] == "application/x-ndjson"


@on_uvloop
async def test_a_full_spool_drops_the_oldest_and_says_so_once(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    size = len(as_line(a_record(0)))
    spool = DiskSpool(tmp_path, 4 * size, names())

    def dropped() -> float:
        sample = {"outcome": "dropped"}
        return registry.get_sample_value("trunkline_ledger_records_total", sample) or 0.0

    with events("trunkline.ledger") as told:
        async with FakeCollector().serving() as collector:
            collector.status = 500
            async with a_courier(collector.port, spool, registry) as courier:
                courier.keep(a_record(0))
                await until(lambda: collector.asked > 0)
                for wave in (range(1, 10), range(10, 20)):
                    before = dropped()
                    for number in wave:
                        courier.keep(a_record(number))
                    await until(lambda before=before: dropped() > before)  # type: ignore[misc]
                await until(lambda: not courier._queue and spool.backlog() > 3 * size)
                collector.status = 200
                await until(lambda: spool.backlog() == 0)
    delivered = registry.get_sample_value(
        "trunkline_ledger_records_total", {"outcome": "delivered"}
    )
    assert (delivered, dropped()) == (len(collector.calls), 20 - len(collector.calls))
    assert collector.calls[-1] == "call-000019"
    assert sum("spool is full" in line["message"] for line in told) == 1


@on_uvloop
async def test_a_batch_that_will_never_be_taken_does_not_stand_in_the_way(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    async with FakeCollector().serving() as collector:
        collector.status = 400
        spool = MemorySpool(2**20, names())
        async with a_courier(collector.port, spool, registry) as courier:
            courier.keep(a_record(1))
            await until(lambda: collector.asked == 1 and not spool.backlog())
            collector.status = 200
            courier.keep(a_record(2))
            await until(lambda: collector.calls == ["call-000002"])
    rejected = registry.get_sample_value("trunkline_ledger_records_total", {"outcome": "rejected"})
    assert rejected == 1


@on_uvloop
async def test_the_last_records_are_sent_on_the_way_out() -> None:
    async with FakeCollector().serving() as collector:
        async with a_courier(collector.port, MemorySpool(2**20, names()), farewell=20) as courier:
            courier.keep(a_record(1))
        assert collector.calls == ["call-000001"]


@on_uvloop
async def test_calls_of_a_gateway_reach_the_collector_before_it_ends() -> None:
    async with FakeCollector().serving() as collector:
        url = f"http://127.0.0.1:{collector.port}/"
        books = books_of(file=None, url=url, token="", folder=None, most=2**20)
        with events("trunkline.calls") as logged:
            async with a_gateway(a_route(), books=books) as gateway:
                async with FakeWorker().serving(gateway), call(gateway):
                    pass
                assert await metric(gateway, "trunkline_ledger_failures_total") == 0
        (number,) = (line["call"] for line in logged if line["message"] == "ended")
        assert collector.calls == [number]


def test_what_an_answer_means() -> None:
    meanings = {200: "taken", 204: "taken", 301: "later", 400: "hopeless", 401: "later"}
    meanings |= {408: "later", 413: "hopeless", 429: "later", 500: "later", 503: "later"}
    assert {status: verdict(status) for status in meanings} == {
        status: Verdict(meaning) for status, meaning in meanings.items()
    }


@settings(deadline=None)
@given(failures=st.integers(1, 10_000), chance=st.floats(0, 1))
def test_pauses_grow_to_a_bound(failures: int, chance: float) -> None:
    found = pause(failures, chance, (0.5, 30.0))
    assert 0.25 <= found <= 30.0
    assert found <= pause(failures + 1, chance, (0.5, 30.0))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"url": "ledger.example"}, "--ledger-url must be a URL"),
        ({"url": "https://me:pw@ledger.example"}, "must hold no password"),
        ({"folder": Path("/nowhere")}, "give both"),
        ({"url": "http://x", "folder": Path("/proc/nowhere")}, "--ledger-spool: "),
        ({"file": Path("/proc/nowhere/calls")}, "--ledger: /proc/nowhere/calls cannot be written"),
    ],
)
def test_a_mistaken_ledger_is_told_of_before_the_first_call(
    options: dict[str, Any], sentence: str
) -> None:
    asked = {"file": None, "url": "", "token": "", "folder": None, "most": 2**20} | options
    with pytest.raises(BooksError, match=sentence) as raised:
        books_of(**asked)
    assert "pw" not in str(raised.value)


# --- the state --------------------------------------------------------------------------------------------


@on_uvloop
async def test_a_gateway_shows_its_state_on_its_health_port() -> None:
    async with (
        a_gateway(a_route()) as gateway,
        FakeWorker(slots=3).serving(gateway) as worker,
        call(gateway),
    ):
        await until(lambda: worker.row(gateway).get("busy") == 1)
        status, text = await http(gateway.health_port, "/state")
    state = json.loads(text)
    assert status == 200
    assert (state["gateway"], state["epoch"]) == ("gateway-0", 1)
    assert state["agents"][AGENT]["calls"] == 1
    assert state["agents"][AGENT]["workers"]["echo-0"]["slots"] == 3
    assert "key" not in text.lower()
