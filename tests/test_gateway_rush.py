"""More callers than slots at two gateways at once; real workers; and a gateway's process on its way out."""

import asyncio
import contextlib
import json
import random
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gateway_rig import (
    AGENT,
    SECONDS,
    FakeWorker,
    SlotLog,
    a_gateway,
    a_route,
    call,
    closed,
    events,
    give,
    http,
    on_uvloop,
    refused,
    routes_text,
    until,
)
from process_rig import Process, a_worker_of, worker_environment
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from trunkline_runtime.contract import (
    CALL_HEADER,
    WaitRung,
    WarmRung,
)
from trunkline_runtime.engine.loopback import LoopbackEngine
from trunkline_runtime.gateway.call import MOST_MOVES
from trunkline_runtime.gateway.closes import NOBODY_ELSE, WORKER_LOST
from trunkline_runtime.gateway.process import Running
from trunkline_runtime.worker.config import WorkerConfig
from trunkline_runtime.worker.host import WorkerHost

WARM = WarmRung(kind="warm")
pytestmark = pytest.mark.usefixtures("links")
WORKERS, SLOTS, CALLERS, ROUNDS = 20, 4, 200, 2
ANSWER_SECONDS = 20.0  # of the route: generous, for all of them share a machine with the gateways
DYING, RUSH_SECONDS = 6, 0.5  # workers that die, and the time in which they do


async def outcome(caller: connect, *, speaks: bool = False) -> ClientConnection | int:
    """The call, or the status of the plain answer instead. `speaks`: it says a word, which its worker says back."""
    try:
        answered = await caller
    except InvalidStatus as error:
        return error.response.status_code
    if speaks:
        with contextlib.suppress(ConnectionClosed):
            await answered.send("first")
    return answered


async def rush(log: SlotLog, *gateways: Running) -> list[ClientConnection]:
    """All callers at once; those who were answered, who are exactly as many as there are slots."""
    async with asyncio.timeout(ANSWER_SECONDS):
        outcomes = await asyncio.gather(
            *(outcome(call(gateways[number % len(gateways)])) for number in range(CALLERS))
        )
    answered = [each for each in outcomes if not isinstance(each, int)]
    assert outcomes.count(503) == CALLERS - WORKERS * SLOTS
    assert len(answered) == WORKERS * SLOTS
    assert len(log._holders) == WORKERS * SLOTS
    ids = {each.response.headers[CALL_HEADER] for each in answered if each.response}
    assert ids == set(log._holders.values()), "who was answered holds a slot, and nobody else does"
    return answered


@on_uvloop
async def test_two_gateways_answer_exactly_as_many_callers_as_there_are_slots() -> None:
    log = SlotLog()
    async with contextlib.AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(a_gateway(a_route())) for _ in range(2)]
        for number in range(WORKERS):
            worker = FakeWorker(f"echo-{number}", slots=SLOTS, log=log)
            await stack.enter_async_context(worker.serving(*gateways))
        for _ in range(ROUNDS):
            answered = await rush(log, *gateways)
            for caller in answered:
                await caller.send("hi")
            assert [await caller.recv() for caller in answered] == ["hi"] * len(answered)
            await asyncio.gather(*(caller.close() for caller in answered))
            await until(lambda: not log._holders)
            for gateway in gateways:
                await until(partial(has_free, gateway, WORKERS * SLOTS))


@on_uvloop
async def test_who_waits_in_vain_is_told_so_within_the_deadline_and_nobody_is_booked_twice() -> (
    None
):
    log, answer = SlotLog(), 6.0
    line = a_route(rungs=[WARM, WaitRung(kind="wait", most=CALLERS)], answerSeconds=answer)
    async with contextlib.AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(a_gateway(line)) for _ in range(2)]
        for number in range(WORKERS):
            worker = FakeWorker(f"echo-{number}", slots=SLOTS, log=log)
            await stack.enter_async_context(worker.serving(*gateways))
        rushing = asyncio.create_task(rush(log, *gateways))
        await until(lambda: sum(map(waiting, gateways)) == CALLERS - WORKERS * SLOTS)
        began = asyncio.get_running_loop().time()
        answered = await rushing
        assert asyncio.get_running_loop().time() - began < answer
        await asyncio.gather(*(caller.close() for caller in answered))


def waiting(gateway: Running) -> int:
    return gateway.gateway.load()["agents"][AGENT].get("waiting", 0)


Records = list[dict[str, Any]]


class Mortal(FakeWorker):
    """A worker that may be killed: from then on not a byte comes from it, and its port is closed."""

    def __init__(self, name: str, log: SlotLog) -> None:
        super().__init__(name, slots=SLOTS, log=log)
        self.dead = False
        self.calls: dict[ServerConnection, str] = {}

    def kill(self) -> None:
        self.dead = True
        for connection in (*self.calls, *self.links):
            connection.transport.abort()
        assert self._server is not None
        self._server.close(close_connections=False)

    async def _claim(self, connection: ServerConnection, request: Request) -> Response | None:
        if self.dead:
            connection.transport.abort()
            return connection.respond(503, "")
        found = await super()._claim(connection, request)
        if found is None:
            self.calls[connection] = request.headers[CALL_HEADER]
        return found


@pytest.mark.parametrize("seed", range(4))
def test_workers_that_die_in_the_rush_take_their_own_calls_along_and_no_others(seed: int) -> None:
    @on_uvloop
    async def run() -> None:
        log, chance = SlotLog(), random.Random(seed)
        async with contextlib.AsyncExitStack() as stack:
            gateways = [await stack.enter_async_context(a_gateway(a_route())) for _ in range(2)]
            workers = [Mortal(f"echo-{number}", log) for number in range(WORKERS)]
            for worker in workers:
                await stack.enter_async_context(worker.serving(*gateways))
            records = stack.enter_context(events("trunkline.calls"))
            loop = asyncio.get_running_loop()
            for worker in chance.sample(workers, DYING):
                loop.call_later(chance.uniform(0, RUSH_SECONDS), worker.kill)
            async with asyncio.timeout(ANSWER_SECONDS):
                outcomes = await asyncio.gather(
                    *(
                        outcome(call(gateways[number % 2]), speaks=number % 4 < 2)
                        for number in range(CALLERS)
                    )
                )
            await until(lambda: sum(worker.dead for worker in workers) == DYING)
            answered = [each for each in outcomes if not isinstance(each, int)]
            assert {each for each in outcomes if isinstance(each, int)} <= {503}
            assert len(answered) <= WORKERS * SLOTS
            await each_call_is_where_it_was_booked(answered, workers, log, records)

    run()


async def each_call_is_where_it_was_booked(
    answered: list[ClientConnection], workers: list[Mortal], log: SlotLog, records: Records
) -> None:
    """Whoever was answered had a slot; it lives where its worker lives, and is told where that died.

    What it is told depends on whether its worker had said a word. That is known here: a gateway writes the word before
    the Close, to the same socket.
    """
    # A call whose worker died before its first word may have been given another, which is the one that counts.
    living_last = sorted(workers, key=lambda worker: not worker.dead)
    at = {call: worker for worker in living_last for call in worker.calls.values()}
    dead = {worker.name for worker in workers if worker.dead}
    for caller in answered:
        name = call_id(caller)
        if at[name].dead:
            heard, end = await to_the_end(caller)
            if heard or moves(records, name) == MOST_MOVES:
                assert end == (WORKER_LOST.code, WORKER_LOST.reason)
            else:
                assert end == (NOBODY_ELSE.code, NOBODY_ELSE.reason)
        else:
            await caller.send("last")
            async with asyncio.timeout(SECONDS):
                while await caller.recv() != "last":
                    pass
    held = {call for (name, _), call in log._holders.items() if name not in dead}
    living = {name for name in map(call_id, answered) if not at[name].dead}
    assert held == living, "and no slot is held for nobody"


def call_id(caller: ClientConnection) -> str:
    assert caller.response is not None
    return caller.response.headers[CALL_HEADER]


async def to_the_end(caller: ClientConnection) -> tuple[bool, tuple[int | None, str]]:
    """Whether its worker said a word before the end, and the Close."""
    heard = False
    async with asyncio.timeout(SECONDS):
        with contextlib.suppress(ConnectionClosed):
            while True:
                await caller.recv()
                heard = True
    return heard, (caller.close_code, caller.close_reason or "")


def moves(records: Records, name: str) -> int:
    """How many workers were lost to a call before their first word, and replaced."""
    (record,) = (each for each in records if each["message"] == "ended" and each["call"] == name)
    return sum(step["why"].endswith("before its first word") for step in record["passed_over"])


def knows(gateway: Running, worker: str) -> bool:
    return worker in gateway.gateway.load()["agents"][AGENT]["workers"]


def has_free(gateway: Running, count: int) -> bool:
    return free(gateway) == count


def free(gateway: Running) -> int:
    workers = gateway.gateway.load()["agents"][AGENT]["workers"]
    return sum(worker["free"] for worker in workers.values())


# --- the real worker -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def a_real_worker(name: str, *gateways: Running, slots: int = 4) -> AsyncIterator[WorkerHost]:
    ports = [gateway.control_port for gateway in gateways]
    config = WorkerConfig.from_environment(worker_environment(name, *ports, slots=slots))
    engine = LoopbackEngine(slots=slots)
    engine.load()
    engine.resume()
    host, stop = WorkerHost(config, engine), asyncio.Event()
    running = asyncio.create_task(host.run(stop))
    try:
        for gateway in gateways:
            await until(partial(knows, gateway, name))
        yield host
    finally:
        stop.set()
        await running
        engine.close()


async def first_event(caller: ClientConnection) -> dict[str, Any]:
    async with asyncio.timeout(SECONDS):
        event: dict[str, Any] = json.loads(await caller.recv())
    return event


@on_uvloop
async def test_a_real_worker_holds_calls_and_drains() -> None:
    async with a_gateway(a_route()) as gateway, a_real_worker("real-0", gateway, slots=2):
        callers = [await call(gateway, subprotocols=[Subprotocol("realtime")]) for _ in range(2)]
        for caller in callers:
            assert caller.subprotocol == "realtime"
            assert (await first_event(caller))["type"] == "session.created"
        assert (await refused(call(gateway))).status_code == 503
        await callers.pop().close()
        await until(lambda: free(gateway) == 1)
        give(gateway, a_route(draining=["real-0"]))
        row = gateway.gateway.load
        await until(lambda: row()["agents"][AGENT]["workers"]["real-0"]["draining"])
        assert (await refused(call(gateway))).status_code == 503
        await callers[0].send(
            json.dumps({"type": "session.update", "session": {"type": "realtime"}})
        )
        assert (await first_event(callers[0]))["type"] == "session.updated"
        await callers[0].close()
        await until(lambda: row()["agents"][AGENT]["workers"]["real-0"]["busy"] == 0)


@on_uvloop
async def test_real_workers_and_two_gateways_never_book_twice() -> None:
    async with contextlib.AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(a_gateway(a_route())) for _ in range(2)]
        for number in range(3):
            await stack.enter_async_context(a_real_worker(f"real-{number}", *gateways))
        for _ in range(2):
            outcomes = await asyncio.gather(
                *(outcome(call(gateways[number % 2])) for number in range(30))
            )
            answered = [each for each in outcomes if not isinstance(each, int)]
            assert (len(answered), outcomes.count(503)) == (12, 18)
            for caller in answered:
                assert (await first_event(caller))["type"] == "session.created"
            await asyncio.gather(*(caller.close() for caller in answered))
            for gateway in gateways:
                await until(partial(has_free, gateway, 12))


# --- the process ---------------------------------------------------------------------------------------


@pytest.fixture
def routes(tmp_path: Path) -> Path:
    path = tmp_path / "routes.json"
    path.write_text(routes_text(a_route()))
    return path


@on_uvloop
async def test_sigterm_keeps_live_calls_until_they_end(routes: Path) -> None:
    process = Process(routes)
    async with process.running(grace=SECONDS), a_worker_of(process):
        await process.ready()
        caller = await process.dial()
        assert (await first_event(caller))["type"] == "session.created"
        assert process.child is not None
        process.child.send_signal(signal.SIGTERM)
        answer = await drained(process)
        assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
        await caller.send(json.dumps({"type": "session.update", "session": {"type": "realtime"}}))
        assert (await first_event(caller))["type"] == "session.updated"
        assert process.child.returncode is None
        await caller.close()
        async with asyncio.timeout(SECONDS):
            assert await process.child.wait() == 0


@on_uvloop
async def test_the_grace_ends_with_1012(routes: Path) -> None:
    process = Process(routes)
    async with process.running(grace=0.5), a_worker_of(process):
        await process.ready()
        caller = await process.dial()
        assert process.child is not None
        process.child.send_signal(signal.SIGTERM)
        assert await closed(caller) == (1012, "the gateway restarts: call again")
        async with asyncio.timeout(SECONDS):
            assert await process.child.wait() == 0


async def drained(process: Process) -> Any:
    """The answer to a new caller once the gateway has read its signal."""
    async with asyncio.timeout(SECONDS):
        while (await http(process.health, "/readyz"))[0] == 200:
            await asyncio.sleep(0.02)
    return await refused(process.dial())
