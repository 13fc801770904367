"""A gateway's control port: workers and the operator, the routes file, and what the operator is told."""

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gateway_rig import (
    AGENT,
    OPERATOR_TOKEN,
    SECONDS,
    FakeOperator,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    closed,
    dial_control,
    events,
    give,
    http,
    on_uvloop,
    refused,
    routes_text,
    until,
)

from trunkline_runtime.contract import (
    CALL_HEADER,
    OPERATOR_PATH,
    WORKER_PROTOCOL_VERSION,
    AgentLoad,
    Route,
    RouteChanges,
)
from trunkline_runtime.gateway.gateway import DRAINING, NO_ROUTES
from trunkline_runtime.process import CannotListen

pytestmark = pytest.mark.usefixtures("links")

# --- who may dial in -----------------------------------------------------------------------------------


@on_uvloop
async def test_a_worker_is_refused_before_the_101() -> None:
    async with a_gateway(a_route()) as gateway:
        unknown = await refused(dial_control(gateway, agent="default/nobody"))
        wrong = await refused(dial_control(gateway, key="wrong"))
        lost = await refused(dial_control(gateway, path="/elsewhere"))
        assert (unknown.status_code, wrong.status_code, lost.status_code) == (404, 401, 404)
        assert b"not the worker key of default/echo" in wrong.body
    async with a_gateway() as gateway:
        assert (await refused(dial_control(gateway))).status_code == 404


@on_uvloop
async def test_an_operator_is_refused_before_the_101() -> None:
    async with a_gateway() as gateway:
        answer = await refused(dial_control(gateway, key="wrong", path=OPERATOR_PATH))
        assert answer.status_code == 401
    async with a_gateway(operator_token="") as gateway:
        answer = await refused(dial_control(gateway, key="", path=OPERATOR_PATH))
        assert (answer.status_code, answer.body[:12]) == (401, b"this gateway")


HELLO = {
    "type": "hello",
    "version": WORKER_PROTOCOL_VERSION,
    "agent": AGENT,
    "worker": "w",
    "boot": "b",
    "slots": 4,
    "port": 8000,
    "protocols": ["realtime"],
    "build": "",
    "link": 1,
    "ticketKey": "k",
}


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[]",
        '{"type": "free", "n": 1, "busy": 0, "draining": false}',
        json.dumps(HELLO | {"version": WORKER_PROTOCOL_VERSION + 1}),
        json.dumps(HELLO | {"link": 0}),
        json.dumps(HELLO | {"ticketKey": ""}),
        json.dumps({name: value for name, value in HELLO.items() if name != "ticketKey"}),
        json.dumps(HELLO | {"agent": "default/other"}),
        json.dumps(HELLO | {"slots": 0}),
        json.dumps(HELLO | {"slots": 1000}),
        json.dumps(HELLO | {"port": 99999}),
        json.dumps(HELLO | {"worker": ""}),
        json.dumps({**HELLO, "boot": 7}),
    ],
)
def test_a_hello_that_makes_no_sense_ends_the_link_with_a_reason(text: str) -> None:
    @on_uvloop
    async def run() -> None:
        async with a_gateway(a_route()) as gateway, dial_control(gateway) as link:
            await link.send(text)
            code, reason = await closed(link)
            assert code == 1008
            assert reason
            assert not gateway.gateway.load()["agents"][AGENT]["workers"]

    run()


@pytest.mark.parametrize(
    "message",
    [
        {"type": "free", "n": 5, "busy": 0, "draining": False, "seq": 1},
        {"type": "free", "n": -1, "busy": 0, "draining": False, "seq": 1},
        {"type": "free", "n": "1", "busy": 0, "draining": False, "seq": 1},
        {"type": "free", "n": 1, "busy": 0, "draining": False},
        {"type": "free", "n": 1, "busy": 0, "draining": False, "seq": 1, "late": 2},
    ],
)
def test_a_message_that_makes_no_sense_drops_the_worker(message: dict[str, Any]) -> None:
    @on_uvloop
    async def run() -> None:
        async with a_gateway(a_route()) as gateway, dial_control(gateway) as link:
            await link.send(json.dumps(HELLO))
            await link.send(json.dumps({"type": "later", "than": "us"}))  # unknown: ignored
            await link.send(json.dumps(message))
            assert (await closed(link))[0] == 1008
            await until(lambda: not gateway.gateway.load()["agents"][AGENT]["workers"])

    run()


@pytest.mark.parametrize("says_seq", [False, True])
def test_no_slot_is_counted_twice_whatever_comes_first(says_seq: bool) -> None:
    @on_uvloop
    async def run() -> None:
        worker = FakeWorker(slots=8)
        worker.says_seq = says_seq
        async with a_gateway(a_route()) as gateway, worker.serving(gateway):
            async with contextlib.AsyncExitStack() as stack:
                for number in range(1, 9):
                    await stack.enter_async_context(call(gateway))
                    if says_seq:
                        assert worker.row(gateway)["free"] == 8 - number
                    else:  # perhaps twice, until the next beat
                        await until(lambda n=number: worker.row(gateway)["free"] == 8 - n)  # type: ignore[misc]
                assert (await refused(call(gateway))).status_code == 503
            await until(lambda: worker.row(gateway)["free"] == 8)

    run()


@on_uvloop
async def test_a_worker_that_started_again_is_another_worker() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker(slots=2).serving(gateway) as old:
        again = FakeWorker(old.name, slots=3)
        async with again.serving(gateway):
            row = again.row(gateway)
            assert (row["boot"], row["slots"]) == (again.boot, 3)
            await until(lambda: old.links[0].close_code is not None)
            async with call(gateway) as caller:
                await caller.send("new")
                assert await caller.recv() == "new"
                assert again.live
            assert again.row(gateway)["boot"] == again.boot, (
                "the old link's end took the old row only"
            )


# --- draining, and routes that change ------------------------------------------------------------------


@on_uvloop
async def test_a_worker_on_the_drain_list_keeps_its_calls_and_gets_no_new_one() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker("echo-0").serving(gateway) as worker:
        caller = await call(gateway)
        give(gateway, a_route(draining=["echo-0"]))
        await until(lambda: worker.draining and worker.row(gateway)["draining"])
        assert (await refused(call(gateway))).status_code == 503
        await caller.send("still here")
        assert await caller.recv() == "still here"
        give(gateway, a_route())
        await until(lambda: not worker.draining and worker.row(gateway)["free"] == 3)
        await (await call(gateway)).close()
        await caller.close()


@on_uvloop
async def test_a_draining_worker_that_dials_in_is_told_so() -> None:
    leaving = a_route(draining=["echo-0"])
    async with a_gateway(leaving) as gateway, FakeWorker("echo-0").serving(gateway) as worker:
        await until(lambda: worker.draining)


@on_uvloop
async def test_a_worker_without_a_route_is_sent_away_and_its_calls_go_on() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        caller = await call(gateway)
        link = worker.links[0]
        give(gateway, a_route("default/other"))
        await link.wait_closed()
        assert link.close_code == 1008
        assert link.close_reason == "there is no route for default/echo any more"
        assert (await refused(call(gateway))).status_code == 401
        await caller.send("still here")
        assert await caller.recv() == "still here"
        assert gateway.gateway.load()["agents"][AGENT]["calls"] == 1
        await caller.close()
        await until(lambda: gateway.gateway.load()["agents"][AGENT]["calls"] == 0)


@on_uvloop
async def test_a_worker_with_an_old_key_is_sent_away() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        link = worker.links[0]
        give(gateway, a_route(workerKey="another"))
        await link.wait_closed()
        assert link.close_code == 1008
        assert link.close_reason == "default/echo has another worker key now"


@on_uvloop
async def test_totals_survive_a_change_of_the_route() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker(slots=1).serving(gateway):
        async with call(gateway):
            await refused(call(gateway))
        give(gateway)
        give(gateway, a_route(maxSeconds=60.0))
        load = gateway.gateway.load()["agents"][AGENT]
        assert (load["arrivals"], load["refused"]) == (2, 1)


# --- the operator's link -------------------------------------------------------------------------------


@on_uvloop
async def test_an_operator_brings_routes_and_hears_the_load() -> None:
    async with a_gateway() as gateway, FakeOperator().linked(gateway) as operator:
        assert await http(gateway.health_port, "/readyz") == (503, f"{NO_ROUTES}\n")
        answer = await refused(call(gateway))
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        assert answer.headers[CALL_HEADER]
        await operator.push(routes_text(a_route(), epoch=5))
        await until(lambda: bool(operator.loads) and operator.loads[-1]["epoch"] == 5)
        async with FakeWorker().serving(gateway) as worker, call(gateway):
            await until(lambda: operator.loads[-1]["agents"][AGENT]["calls"] == 1)
            load = operator.loads[-1]
            assert (load["gateway"], bool(load["boot"])) == ("gateway-0", True)
            await until(
                lambda: (
                    operator.loads[-1]["agents"][AGENT]["workers"]
                    == {
                        "echo-0": {
                            "boot": worker.boot,
                            "slots": 4,
                            "busy": 1,
                            "free": 3,
                            "draining": False,
                        }
                    }
                )
            )


def was_refused(times: int, load: AgentLoad) -> bool:
    return load["refused"] == times


@on_uvloop
async def test_the_last_free_slot_and_a_refusal_are_told_at_once() -> None:
    async with (
        a_gateway(a_route()) as gateway,
        FakeWorker(slots=1).serving(gateway),
        FakeOperator().linked(gateway) as operator,
    ):
        await until(lambda: bool(operator.loads))

        async def seconds_until(told: Callable[[AgentLoad], bool]) -> float:
            loop = asyncio.get_running_loop()
            began = loop.time()
            await until(lambda: told(operator.loads[-1]["agents"][AGENT]))
            return loop.time() - began

        # Each second a load comes anyway: of three tries, noise may spoil two.
        taken, told = [], []
        for number in range(1, 4):
            caller = await call(gateway)
            taken.append(await seconds_until(lambda load: load["workers"]["echo-0"]["free"] == 0))
            await refused(call(gateway))
            told.append(await seconds_until(partial(was_refused, number)))
            await caller.close()
            await seconds_until(lambda load: load["workers"]["echo-0"]["free"] == 1)
        assert min(taken) < 0.5
        assert min(told) < 0.5


@on_uvloop
async def test_routes_of_an_old_epoch_are_refused() -> None:
    async with a_gateway() as gateway, FakeOperator().linked(gateway) as operator:
        await operator.push(routes_text(a_route(), epoch=5))
        with events("trunkline.gateway") as lines:
            await operator.push(routes_text(epoch=4))
            await until(
                lambda: any(
                    line["message"] == "routes of an old epoch were refused" for line in lines
                )
            )
        assert gateway.gateway.load()["epoch"] == 5
        assert AGENT in gateway.gateway.load()["agents"]
        await operator.push(routes_text(a_route("default/other"), epoch=5))
        await until(lambda: "default/other" in gateway.gateway.load()["agents"])


def changes_text(*routes: Route, since: int, epoch: int = 5, gone: tuple[str, ...] = ()) -> str:
    changes = RouteChanges(
        type="routeChanges",
        epoch=epoch,
        since=since,
        revision=since + 1,
        routes=list(routes),
        gone=list(gone),
    )
    return json.dumps(changes)


@on_uvloop
async def test_what_differs_is_acted_on_and_the_other_agents_stay() -> None:
    async with a_gateway() as gateway, FakeOperator(changes=True).linked(gateway) as operator:
        await operator.push(routes_text(a_route(), a_route("default/other"), epoch=5))
        async with FakeWorker().serving(gateway), call(gateway) as caller:
            await until(lambda: bool(operator.loads) and operator.loads[-1]["epoch"] == 5)
            await operator.push(changes_text(a_route("default/third"), since=0))
            await until(lambda: any("default/third" in it["agents"] for it in operator.changes))
            await caller.send("still there")
            assert await caller.recv() == "still there"
            await operator.push(changes_text(since=1, gone=("default/other",)))
            await operator.push(changes_text(a_route(draining=["echo-0"]), since=2))
            await until(
                lambda: gateway.gateway.load()["agents"][AGENT]["workers"]["echo-0"]["draining"]
            )
            gone = await refused(dial_control(gateway, agent="default/other"))
            here = await refused(dial_control(gateway, agent="default/third", key="wrong"))
            assert (gone.status_code, here.status_code) == (404, 401)


@on_uvloop
async def test_what_differs_from_other_routes_ends_the_link_and_changes_nothing() -> None:
    async with a_gateway() as gateway:
        give(gateway, a_route(), epoch=5)
        async with dial_control(gateway, key=OPERATOR_TOKEN, path=OPERATOR_PATH) as link:
            await link.send(changes_text(a_route("default/other"), since=3))
            code, reason = await closed(link)
            assert (code, "begin at revision 3 of epoch 5" in reason) == (1008, True)
        assert set(gateway.gateway.load()["agents"]) == {AGENT}


@on_uvloop
async def test_only_an_operator_that_reads_changes_is_told_them_and_all_hear_everything() -> None:
    """A gateway that always has news says everything each second, too."""
    async with (
        a_gateway(a_route(), a_route("default/other")) as gateway,
        FakeOperator(changes=True).linked(gateway) as new,
        FakeOperator().linked(gateway) as old,
    ):
        await until(lambda: bool(new.loads) and bool(old.loads))
        began = len(new.loads), len(old.loads)

        async def busy() -> None:
            while True:
                await refused(call(gateway))

        task = asyncio.create_task(busy())
        await until(lambda: len(new.loads) >= began[0] + 2 and bool(new.changes))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert {tuple(changes["agents"]) for changes in new.changes} == {(AGENT,)}
        assert not old.changes
        assert len(old.loads) - began[1] > len(new.loads) - began[0]
        assert set(old.loads[-1]["agents"]) == {AGENT, "default/other"}


@pytest.mark.parametrize(
    "text",
    ["nonsense", '{"type": "routes"}', '{"type": "routeChanges"}', routes_text(a_route("echo"))],
)
def test_routes_that_make_no_sense_end_the_link_and_change_nothing(text: str) -> None:
    @on_uvloop
    async def run() -> None:
        async with a_gateway(a_route()) as gateway:
            async with dial_control(gateway, key=OPERATOR_TOKEN, path=OPERATOR_PATH) as link:
                await link.send(text)
                code, reason = await closed(link)
                assert (code, bool(reason)) == (1008, True)
            assert gateway.gateway.load()["epoch"] == 1

    run()


@on_uvloop
async def test_a_silent_operator_is_let_go() -> None:
    async with a_gateway(a_route()) as gateway:
        link = await dial_control(gateway, key=OPERATOR_TOKEN, path=OPERATOR_PATH)
        assert (await closed(link))[0] == 1006


# --- the routes file -----------------------------------------------------------------------------------


def replace_file(path: Path, text: str) -> None:
    """As a mounted Secret changes: at once."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


@on_uvloop
async def test_the_routes_file_is_read_at_the_start_and_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    path.write_text(routes_text(a_route(), epoch=3))
    async with a_gateway(routes_file=path) as gateway, FakeWorker().serving(gateway):
        await (await call(gateway)).close()
        replace_file(path, routes_text(a_route(), a_route("default/other"), epoch=3))
        await until(lambda: "default/other" in gateway.gateway.load()["agents"])
        with events("trunkline.gateway") as lines:
            replace_file(path, '{"type": "routes"}')
            await until(
                lambda: any("routes file was not taken" in line["message"] for line in lines)
            )
        await (await call(gateway)).close()


@on_uvloop
async def test_a_routes_file_that_comes_late_is_found(tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    with events("trunkline.gateway") as lines:
        async with a_gateway(routes_file=path) as gateway:
            assert gateway.gateway.unready() == NO_ROUTES
            replace_file(path, routes_text(a_route()))
            await until(lambda: gateway.gateway.unready() is None)
    assert sum("cannot be read" in line["message"] for line in lines) == 1


@on_uvloop
async def test_what_the_operator_pushed_outranks_the_file_of_the_same_epoch(tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    path.write_text(routes_text(a_route(), epoch=3))
    async with a_gateway(routes_file=path) as gateway:
        give(gateway, a_route("default/pushed"), epoch=3)
        with events("trunkline.gateway") as lines:
            replace_file(path, routes_text(a_route("default/late"), epoch=3))
            await until(lambda: any("old epoch" in line["message"] for line in lines))
        assert set(gateway.gateway.load()["agents"]) == {"default/pushed"}
        replace_file(path, routes_text(a_route("default/newer"), epoch=4))
        await until(lambda: gateway.gateway.load()["epoch"] == 4)


@on_uvloop
async def test_workers_are_told_which_gateways_there_are() -> None:
    async with a_gateway(a_route()) as gateway, FakeOperator().linked(gateway) as operator:
        first, second = FakeWorker(), FakeWorker("echo-1")

        async def push(*hosts: str) -> None:
            await operator.push(json.dumps({"type": "gateways", "hosts": hosts}))

        def told(worker: FakeWorker) -> list[list[str]]:
            return [order["hosts"] for order in worker.orders if order["type"] == "gateways"]

        async with first.serving(gateway):
            await push("10.0.0.1")
            await until(lambda: told(first) == [["10.0.0.1"]])
            await push("10.0.0.1")
            await push("10.0.0.1", "fd00::1")
            await until(lambda: told(first) == [["10.0.0.1"], ["10.0.0.1", "fd00::1"]])
            async with second.serving(gateway):
                await until(lambda: told(second) == [["10.0.0.1", "fd00::1"]])


@pytest.mark.parametrize("hosts", ["gateway-0", ["gateway-0"], [1], ["10.0.0.1"] * 257])
@on_uvloop
async def test_gateways_that_make_no_sense_cost_the_link_and_are_told_nobody(hosts: object) -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        async with FakeOperator().linked(gateway) as operator:
            await operator.push(json.dumps({"type": "gateways", "hosts": hosts}))
            await until(lambda: not gateway.gateway.operator._seen)
        caller = await call(gateway)
        await caller.send("as before")
        assert await caller.recv() == "as before"
        await caller.close()
        assert "gateways" not in [order["type"] for order in worker.orders]


# --- its own start -------------------------------------------------------------------------------------


@on_uvloop
async def test_a_gateway_with_an_empty_table_lets_callers_wait_for_its_workers() -> None:
    async with a_gateway(settle_seconds=SECONDS) as gateway:
        give(gateway, a_route())
        assert gateway.gateway.unready()
        waiting = asyncio.ensure_future(call(gateway).__aenter__())
        await until(lambda: AGENT in gateway.gateway.load()["agents"])
        async with FakeWorker().serving(gateway):
            caller = await waiting
            await caller.send("patience")
            assert await caller.recv() == "patience"
            await caller.close()


@on_uvloop
async def test_callers_wait_for_workers_that_dial_in_later_than_those_of_another_agent() -> None:
    async with a_gateway(settle_seconds=SECONDS) as gateway:
        give(gateway, a_route(), a_route("default/other"))
        other = FakeWorker("other-0")
        async with other.serving(), other.linked(gateway, "default/other"):
            await until(lambda: gateway.gateway.unready() is None)
            line = [asyncio.ensure_future(call(gateway).__aenter__()) for _ in range(3)]
            await until(lambda: gateway.gateway.load()["agents"][AGENT].get("waiting") == 3)
            async with FakeWorker("echo-0", slots=1).serving(gateway):
                await until(lambda: gateway.gateway.load()["agents"][AGENT].get("waiting") == 2)
                async with FakeWorker("echo-1", slots=2).serving(gateway):
                    for caller in [await waiting for waiting in line]:
                        await caller.send("patience")
                        assert await caller.recv() == "patience"
                        await caller.close()


@on_uvloop
async def test_who_waits_for_workers_to_dial_in_is_refused_when_all_must_have_come() -> None:
    async with a_gateway(settle_seconds=2.0) as gateway:
        give(gateway, a_route(answerSeconds=SECONDS), a_route("default/other"))
        other = FakeWorker("other-0")
        async with other.serving(), other.linked(gateway, "default/other"):
            first = asyncio.ensure_future(refused(call(gateway)))
            await until(lambda: gateway.gateway.load()["agents"][AGENT].get("waiting") == 1)
            assert (await first).body.startswith(b"no slot of default/echo was free in time")
            answer = await refused(call(gateway))
            assert answer.body.startswith(b"every slot of default/echo is taken")


@on_uvloop
async def test_a_caller_waits_for_workers_no_longer_than_for_its_answer() -> None:
    async with a_gateway(settle_seconds=SECONDS) as gateway:
        give(gateway, a_route(answerSeconds=0.2))
        answer = await refused(call(gateway))
        assert answer.body.startswith(b"no slot of default/echo was free in time")


@on_uvloop
async def test_a_port_in_use_is_said_in_a_sentence() -> None:
    async with a_gateway() as gateway:
        for flag, port in (("port", gateway.port), ("control_port", gateway.control_port)):
            with pytest.raises(CannotListen, match=f"{port}.*set --{flag.replace('_', '-')}"):
                async with a_gateway(**{flag: port}):
                    pass


@on_uvloop
async def test_a_draining_gateway_keeps_calls_for_its_grace_and_refuses_new_ones() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        caller = await call(gateway)
        hurry = asyncio.Event()
        draining = asyncio.ensure_future(gateway.gateway.drain(SECONDS, hurry))
        await until(lambda: gateway.gateway.unready() == DRAINING)
        assert (await http(gateway.health_port, "/readyz"))[0] == 503
        answer = await refused(call(gateway))
        assert (answer.status_code, answer.body) == (503, f"{DRAINING}\n".encode())
        await caller.send("still here")
        assert await caller.recv() == "still here"
        assert not draining.done()
        hurry.set()
        await draining
        closing = asyncio.ensure_future(gateway.gateway.close())
        assert await closed(caller) == (1012, "the gateway restarts: call again")
        await closing
        await until(lambda: not worker.live)
        assert worker.closes == [(1012, "the gateway restarts: call again")]
