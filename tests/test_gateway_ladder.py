"""The rungs below the first ones, at a real gateway: the line, an upstream, breakers, and workers set aside."""

import asyncio
import contextlib
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from gateway_rig import (
    AGENT,
    KEY,
    FakeModal,
    FakeOperator,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    events,
    give,
    metric,
    on_uvloop,
    refused,
    routes_text,
    until,
)
from websockets.asyncio.client import ClientConnection
from websockets.typing import Subprotocol

from trunkline_runtime.contract import (
    CALL_HEADER,
    HOPS_HEADER,
    Route,
    UpstreamRung,
    WaitRung,
    WarmRung,
)
from trunkline_runtime.gateway.accounts.books import Books
from trunkline_runtime.gateway.accounts.files import LedgerFile
from trunkline_runtime.gateway.breaker import Terms
from trunkline_runtime.gateway.ladder import IN_LINE, Patience
from trunkline_runtime.gateway.process import Running

WARM = WarmRung(kind="warm")
PATIENT = 15.0  # answerSeconds of those who are meant to be served while they wait


def with_line(most: int = 10, answer: float = PATIENT, **changes: Any) -> Route:
    return a_route(rungs=[WARM, WaitRung(kind="wait", most=most)], answerSeconds=answer, **changes)


def waiting(gateway: Running) -> int:
    return gateway.gateway.load()["agents"][AGENT].get("waiting", 0)


async def one_more_waits(gateway: Running, **options: Any) -> "asyncio.Task[ClientConnection]":
    """A caller who stands in line now."""
    before = waiting(gateway)

    async def dial() -> ClientConnection:
        return await call(gateway, **options)

    task = asyncio.create_task(dial())
    await until(lambda: waiting(gateway) == before + 1)
    return task


def kept(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- the line ---------------------------------------------------------------------------------------------


@on_uvloop
async def test_a_slot_that_comes_free_goes_to_who_has_waited_longest() -> None:
    async with a_gateway(with_line()) as gateway, FakeWorker(slots=1).serving(gateway):
        holder = await call(gateway)
        line = [await one_more_waits(gateway) for _ in range(3)]
        with events("trunkline.calls") as lines:
            for number, waiter in enumerate(line):
                await holder.close()
                holder = await waiter
                assert [other.done() for other in line] == [n <= number for n in range(3)]
                await holder.send("hi")
                assert await holder.recv() == "hi"
        placed = [line for line in lines if line["message"] == "placed"]
        assert all(line["rung"] == "warm" for line in placed)
        steps = [[step["rung"] for step in line["passed_over"]] for line in placed]
        assert steps == [["warm", "wait"]] * 3
        assert placed[0]["passed_over"][1]["why"] == IN_LINE
        assert await metric(gateway, "trunkline_wait_seconds_count", agent=AGENT) == 3
        await holder.close()


@on_uvloop
async def test_a_pod_that_comes_up_serves_those_who_wait() -> None:
    async with a_gateway(with_line()) as gateway, FakeOperator().linked(gateway) as operator:
        line = [await one_more_waits(gateway) for _ in range(2)]
        await until(lambda: bool(operator.loads))
        await until(lambda: operator.loads[-1]["agents"][AGENT].get("waiting") == 2)
        async with FakeWorker(slots=2).serving(gateway):
            for waiter in line:
                await (await waiter).close()


@on_uvloop
async def test_who_hangs_up_leaves_the_line_at_once_and_who_waits_too_long_is_refused(
    tmp_path: Path,
) -> None:
    file = tmp_path / "calls"
    books = Books(file=LedgerFile(file))
    async with (
        a_gateway(with_line(answer=2.0), books=books) as gateway,
        FakeWorker(slots=1).serving(gateway),
        call(gateway),
    ):
        patient = asyncio.create_task(refused(call(gateway)))
        await until(lambda: waiting(gateway) == 1)
        impatient = await one_more_waits(gateway)
        began = asyncio.get_running_loop().time()
        impatient.cancel()
        await until(lambda: waiting(gateway) == 1)
        assert asyncio.get_running_loop().time() - began < 1.0
        answer = await patient
        assert asyncio.get_running_loop().time() - began < 2.5
        assert answer.status_code == 503
        assert answer.body.startswith(b"no slot of default/echo was free in time")
        assert int(answer.headers["Retry-After"]) >= 1
        assert waiting(gateway) == 0
        left, out_of_time = kept(file)
    assert (left["message"], out_of_time["message"]) == ("left", "refused")
    assert [step["rung"] for step in left["passed_over"]] == ["warm", "wait"]
    assert [step["why"] for step in (left["passed_over"][1], out_of_time["passed_over"][1])] == [
        "the caller left",
        "no slot came free in time",
    ]


@on_uvloop
async def test_a_line_that_is_full_takes_nobody_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "calls"
    books = Books(file=LedgerFile(file))
    async with (
        a_gateway(with_line(most=2), books=books) as gateway,
        FakeWorker(slots=1).serving(gateway),
        call(gateway) as holder,
    ):
        line = [await one_more_waits(gateway) for _ in range(2)]
        answer = await refused(call(gateway))
        assert answer.status_code == 503
        (record,) = kept(file)
        assert [step["rung"] for step in record["passed_over"]] == ["warm", "wait"]
        assert record["passed_over"][1]["why"] == "as many callers as may wait do: 2"
        assert record["rung_ms"].keys() == {"warm", "wait"}
        await holder.close()
        for waiter in line:
            await (await waiter).close()


@on_uvloop
async def test_what_is_kept_for_a_tenant_is_not_given_to_who_waits_longer() -> None:
    key = "key-of-the-hotline"
    digest = hashlib.sha256(key.encode()).hexdigest()
    access: dict[str, Any] = {**a_route()["access"]}
    access["apiKeys"] = access["apiKeys"] | {"hotline": digest}
    none = {"concurrentCalls": 0, "startsPerMinute": 0, "minutesPerDay": 0, "guaranteedSlots": 0}
    access["tenants"] = {"claim": "sub", "limits": none, "overrides": {"hotline": none | {"guaranteedSlots": 1}}}  # fmt: skip
    async with (
        a_gateway(with_line(access=access)) as gateway,
        FakeWorker(slots=1).serving(gateway),
    ):
        # Nobody calls, and yet the one slot is kept: the first waits beside it.
        ordinary = await one_more_waits(gateway)
        hotline = await call(gateway, key=key)
        waits_too = await one_more_waits(gateway, key=key)
        await hotline.close()
        await (await waits_too).close()
        assert not ordinary.done()
        ordinary.cancel()
        await asyncio.gather(ordinary, return_exceptions=True)


@on_uvloop
async def test_two_gateways_race_for_a_slot_and_the_loser_keeps_its_place() -> None:
    async with (
        a_gateway(with_line()) as one,
        a_gateway(with_line(), name="gateway-1") as two,
        FakeWorker(slots=1).serving(one, two) as worker,
    ):
        holder = await call(one)
        line = [await one_more_waits(gateway) for gateway in (one, two, one, two)]
        for _ in range(4):
            await holder.close()
            done, _ = await asyncio.wait(
                [each for each in line if each], return_when=asyncio.FIRST_COMPLETED
            )
            (first,) = done
            line.remove(first)
            holder = first.result()
            await holder.send("hi")
            assert await holder.recv() == "hi"
            assert len(worker.live) == 1
        await holder.close()


@on_uvloop
async def test_slots_that_come_free_while_callers_give_up_are_neither_lost_nor_given_twice() -> (
    None
):
    chance = random.Random(7)
    route = with_line(most=50)
    async with a_gateway(route) as gateway, FakeWorker(slots=2).serving(gateway) as worker:
        for _ in range(25):
            holders = [await call(gateway) for _ in range(2)]
            line = [await one_more_waits(gateway) for _ in range(4)]
            going = [
                *(holder.close() for holder in holders),
                *(_give_up(each) for each in line[:2]),
            ]
            chance.shuffle(going)
            await asyncio.gather(*going)
            for waiter in line[2:]:
                caller = await waiter
                await caller.send("hi")
                assert await caller.recv() == "hi"
                await caller.close()
            await until(lambda: worker.row(gateway)["free"] == 2 and not worker.live)
            (row,) = gateway.gateway._table.rows(AGENT)
            assert row.asked == 0


async def _give_up(waiter: "asyncio.Task[ClientConnection]") -> None:
    """Hangs up, in line or in the very moment in which it is answered."""
    waiter.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await (await waiter).close()


# --- an upstream ------------------------------------------------------------------------------------------


def to(peer: Running, **changes: Any) -> UpstreamRung:
    rung: dict[str, Any] = {"kind": "upstream", "url": f"ws://127.0.0.1:{peer.port}"}
    rung |= {"model": AGENT, "token": KEY, "deadlineSeconds": 10.0}
    return rung | changes  # type: ignore[return-value]  # all its keys


@on_uvloop
async def test_a_call_goes_on_to_a_peers_gateway_with_a_credential_of_its_own(
    tmp_path: Path,
) -> None:
    file = tmp_path / "calls"
    books = Books(file=LedgerFile(file))
    async with a_gateway(a_route(), name="peer") as peer, FakeWorker().serving(peer) as worker:
        access: dict[str, Any] = {**a_route()["access"], "apiKeys": {}, "public": True}
        route = a_route(access=access, rungs=[WARM, to(peer)])
        async with a_gateway(route, books=books) as gateway:
            query = "&temperature=0.5&model_hint=x"
            options: dict[str, Any] = {"subprotocols": [Subprotocol("realtime")]}
            async with call(gateway, key=None, query=query, **options) as caller:
                assert caller.subprotocol == "realtime"
                await caller.send("hi")
                assert await caller.recv() == "hi"
            await until(lambda: file.exists() and bool(kept(file)))
        (request,) = worker.requests
        assert request.path == f"/v1/realtime?model=default%2Fecho{query}"
        (record,) = kept(file)
    assert (record["message"], record["rung"], record["worker"]) == ("ended", "upstream", "")
    assert record["bytes_down"] > 0
    assert "upstream" in record["rung_ms"]


@on_uvloop
async def test_two_gateways_that_name_each_other_do_not_play_ball() -> None:
    async with a_gateway() as one, a_gateway(name="two") as two:
        give(one, a_route(rungs=[to(two)]))
        give(two, a_route(rungs=[to(one)]))
        with events("trunkline.calls") as lines:
            answer = await refused(call(one))
            assert answer.status_code == 503
            odd = await refused(call(two, headers={HOPS_HEADER: "many"}))
            assert odd.status_code == 503
        reasons = [line["passed_over"][0]["why"] for line in lines if line["message"] == "refused"]
        assert reasons == [
            "the call has come from another gateway already",
            "refused its data link with HTTP 503",
            "the call has come from another gateway already",
        ]
        assert not one.gateway.load()["agents"][AGENT].get("shut")


# --- breakers ---------------------------------------------------------------------------------------------


@on_uvloop
async def test_a_rung_that_fails_again_and_again_is_left_out_and_then_probed() -> None:
    async with FakeModal().serving() as bad, FakeModal().serving() as good:
        bad.status = 500
        rungs = [WARM, bad.rung(name="us-east"), good.rung(name="eu-west")]
        terms = Terms(row=2, first=0.3, longest=0.3)
        async with a_gateway(a_route(rungs=rungs), breaker=terms) as gateway:

            async def placed() -> list[str]:
                with events("trunkline.calls") as lines:
                    async with call(gateway):
                        pass
                (line,) = (line for line in lines if line["message"] == "placed")
                assert line["rung"] in ("burst/eu-west", "burst/us-east")
                return [step["why"] for step in line["passed_over"][1:]]

            def shut() -> dict[str, str]:
                return gateway.gateway.load()["agents"][AGENT].get("shut", {})

            for _ in range(2):
                assert await placed() == ["refused a session (HTTP 500)"]
            assert shut() == {"burst/us-east": "open"}
            asked = len(bad.starts)
            (why,) = await placed()
            assert why.startswith("failed too often: tried again in")
            assert len(bad.starts) == asked, "the region that fails costs nobody time any more"
            bad.status = 200
            await asyncio.sleep(0.35)  # the pause of the breaker is what is tested
            assert await placed() == []
            assert not shut()
            state: dict[str, Any] = {"agent": AGENT, "rung": "burst/us-east"}
            for change in ("open", "closed"):
                name = "trunkline_breaker_changes_total"
                assert await metric(gateway, name, state=change, **state) == 1
            await until(lambda: not bad.sessions and not good.sessions)


@on_uvloop
async def test_callers_are_not_refused_any_more_once_a_container_is_there_for_one_who_waited() -> (
    None
):
    """As when a crowd comes: the first wait in vain for containers to start, and then those are there."""
    async with FakeModal().serving() as modal:
        terms = Terms(row=2, first=60.0)
        async with a_gateway(a_route(rungs=[WARM, modal.rung()]), breaker=terms) as gateway:
            modal.gates = [start := asyncio.Event()]

            async def waits() -> None:
                async with call(gateway):
                    pass

            waiting = asyncio.create_task(waits())
            await until(lambda: len(modal.starts) == 1)
            modal.status = 500
            for _ in range(2):
                assert (await refused(call(gateway))).status_code == 503
            modal.status = 200
            assert (await refused(call(gateway))).status_code == 503
            assert len(modal.starts) == 3, "the last one was told at once"
            start.set()
            await waiting
            async with call(gateway):
                assert not gateway.gateway.load()["agents"][AGENT].get("shut")


# --- outliers ---------------------------------------------------------------------------------------------


@on_uvloop
async def test_a_worker_that_offers_a_slot_and_refuses_the_call_is_set_aside_and_the_call_goes_on() -> (
    None
):
    bad, good = FakeWorker("echo-0", slots=1), FakeWorker("echo-1", slots=3)
    bad.refusing = True
    async with a_gateway(a_route()) as gateway, bad.serving(gateway), good.serving(gateway):
        with events("trunkline.calls") as lines, events("trunkline.gateway") as told:
            callers = [await call(gateway) for _ in range(3)]  # the fullest is asked first
        first, *rest = [line for line in lines if line["message"] == "placed"]
        (step,) = first["passed_over"]
        assert (step["rung"], step["worker"]) == ("warm", "echo-0")
        assert step["why"] == "refused its data link with HTTP 403"
        assert all(not line["passed_over"] for line in rest), "only one call paid for it"
        assert bad.row(gateway)["aside"] is True
        async with asyncio.timeout(20):
            while await metric(gateway, "trunkline_workers_aside", agent=AGENT) != 1:
                await asyncio.sleep(0.1)
        assert [line["why"] for line in told if line["message"] == "a worker is set aside"] == [
            "offered a slot and did not take a call"
        ]
        assert bad.row(gateway)["free"] == 1
        for caller in callers:
            await caller.close()


@on_uvloop
async def test_the_only_worker_is_never_set_aside_and_who_waits_avoids_it() -> None:
    worker = FakeWorker(slots=1)
    worker.refusing = True
    async with a_gateway(with_line(answer=1.0)) as gateway, worker.serving(gateway):
        answer = await refused(call(gateway))
        assert answer.status_code == 503
        assert "aside" not in worker.row(gateway)
        assert len(worker.requests) <= 3, "it is not asked for ever"


@on_uvloop
async def test_a_worker_that_misses_its_frames_gets_no_new_call() -> None:
    late, fine = FakeWorker("echo-0", slots=1), FakeWorker("echo-1", slots=2)
    async with a_gateway(a_route()) as gateway, late.serving(gateway), fine.serving(gateway):
        free = {"type": "free", "n": 1, "busy": 0, "draining": False, "seq": 1}
        for share in (0.04, 0.5, 0.5, 0.5):
            await late.links[0].send(json.dumps(free | {"late": share}))
        await until(lambda: "aside" in late.row(gateway))
        async with call(gateway) as caller:
            assert caller.response is not None
            assert caller.response.headers[CALL_HEADER]
            assert (len(fine.live), len(late.live)) == (1, 0)


@on_uvloop
async def test_a_silent_worker_costs_two_callers_a_moment_and_then_nobody() -> None:
    silent, good = FakeWorker("echo-0", slots=1), FakeWorker("echo-1", slots=8)
    silent.silent = True
    patience = Patience(answer=0.1)
    async with (
        a_gateway(a_route(), patience=patience) as gateway,
        silent.serving(gateway),
        good.serving(gateway),
        contextlib.AsyncExitStack() as stack,
    ):
        with events("trunkline.calls") as lines:
            for _ in range(4):
                await stack.enter_async_context(call(gateway))
        slow = [bool(line["passed_over"]) for line in lines]
        assert slow == [True, True, False, False]


# --- when to call again -----------------------------------------------------------------------------------


@on_uvloop
async def test_retry_after_tells_when_the_next_pod_is_ready() -> None:
    async with a_gateway(a_route()) as gateway, FakeOperator().linked(gateway) as operator:
        runway = {"type": "runway", "agents": {AGENT: [{"slots": 1, "seconds": 40.0}], "a/b": []}}
        await operator.push(json.dumps(runway))
        await until(lambda: bool(gateway.gateway._outlook.of(AGENT).coming))
        first = int((await refused(call(gateway))).headers["Retry-After"])
        assert 39 <= first <= 50
        second = int((await refused(call(gateway))).headers["Retry-After"])
        assert second <= 5, "the slot is spoken for, and of more nothing is known"
        await operator.push(json.dumps({"type": "runway", "agents": {}}))
        await until(lambda: not gateway.gateway._outlook.of(AGENT).coming)


# --- what workers and operators may do wrong ---------------------------------------------------------------


@on_uvloop
async def test_what_a_worker_says_after_its_goodbye_counts_for_nothing() -> None:
    worker = FakeWorker(slots=2)
    worker.late = 0.4
    async with a_gateway(a_route()) as gateway, worker.serving(gateway):
        calling = asyncio.ensure_future(call(gateway).__aenter__())
        await until(lambda: bool(worker.requests))
        (link,) = worker.links
        await link.send(json.dumps({"type": "bye"}))
        await until(lambda: worker.row(gateway)["draining"] is True)
        caller = await calling  # what it gives it gives
        free = {"type": "free", "n": 2, "busy": 0, "draining": False, "seq": 99}
        await link.send(json.dumps(free))
        await link.send(json.dumps({"type": "free", "n": "nonsense"}))
        await caller.send("hi")
        assert await caller.recv() == "hi"
        assert worker.row(gateway)["draining"] is True
        assert (await refused(call(gateway))).status_code == 503
        await caller.close()


@on_uvloop
async def test_calls_go_by_the_last_routes_while_the_operator_is_silent_and_a_metric_says_so() -> (
    None
):
    async with a_gateway() as gateway:
        async with FakeOperator().linked(gateway) as operator:
            await operator.push(routes_text(a_route(), epoch=7))
            await until(lambda: gateway.gateway.load()["epoch"] == 7)
        name = "trunkline_operator_silence_seconds"
        async with FakeWorker().serving(gateway), asyncio.timeout(20):
            while await metric(gateway, name) < 1.0:
                await asyncio.sleep(0.1)
            assert await metric(gateway, "trunkline_routes_epoch") == 7
            async with call(gateway) as caller:
                await caller.send("hi")
                assert await caller.recv() == "hi"
        async with FakeOperator().linked(gateway), asyncio.timeout(20):
            while await metric(gateway, name) > 1.5:
                await asyncio.sleep(0.1)
