"""A call whose worker is lost before its first word goes to another one, and the caller's parser never notices."""

import asyncio
import atexit
import contextlib
import socket
from typing import Any

import pytest
from gateway_rig import (
    AGENT,
    FakeModal,
    FakeWorker,
    a_gateway,
    a_route,
    call,
    closed,
    events,
    metric,
    on_uvloop,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gateway_frames import Sent, chunks, sent
from websockets.client import ClientProtocol
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import OPEN
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from trunkline_runtime.contract import WarmRung
from trunkline_runtime.gateway.call import MAX_KEPT_BYTES, MOST_MOVES, Call, Ending, Facts
from trunkline_runtime.gateway.closes import NOBODY_ELSE, WORKER_LOST
from trunkline_runtime.gateway.handshake import Address, Door, Handshake
from trunkline_runtime.gateway.ladder import Placement, Warm
from trunkline_runtime.gateway.leg import Leg

# --- the relay alone, without sockets: whatever the chunks, fragments, control frames and deaths ----------


OPTIONS = socket.socket()  # on which a leg sets its options


atexit.register(OPTIONS.close)


class Wire(asyncio.Transport):
    """A socket in memory: keeps what is written, and has what each real one has."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.reading = True
        self.closing = False

    def write(self, data: Any) -> None:
        assert not self.closing, "uvloop would raise"
        self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return OPTIONS if name == "socket" else default


class WorkerEnd:
    """A worker's side of one leg: websockets' own parser of what the leg says."""

    def __init__(self) -> None:
        self.wire = Wire()
        door = Door(target="/", subprotocol=None, headers=())
        handshake = Handshake(Address(host="w", port=1), door)
        self.leg = Leg(asyncio.get_running_loop())
        self.leg.ask(handshake)
        self.leg.connection_made(self.wire)
        self.server = ServerProtocol(max_size=None)
        self._read = 0
        self.heard: list[Frame] = []
        (request,) = self._events()
        assert isinstance(request, Request)
        self.server.send_response(self.server.accept(request))
        self.leg.data_received(b"".join(self.server.data_to_send()))

    def _events(self) -> list[Any]:
        self.server.receive_data(self.wire.written[self._read :])
        self._read = len(self.wire.written)
        return self.server.events_received()

    def listen(self) -> list[tuple[Opcode, bytes, bool]]:
        """All data frames that it has been told so far."""
        self.heard += [each for each in self._events() if isinstance(each, Frame)]
        assert self.server.parser_exc is None
        return data_frames(self.heard)

    def die(self, how: int | str) -> None:
        """By a Close with a code, a broken frame, or without a word."""
        if isinstance(how, int):
            self.leg.data_received(
                Frame(Opcode.CLOSE, Close(how, "").serialize()).serialize(mask=False)
            )
        elif how == "broken":
            self.leg.data_received(b"\xc3\x01x")
        self.wire.closing = True
        self.leg.connection_lost(None)


def data_frames(frames: list[Frame]) -> list[tuple[Opcode, bytes, bool]]:
    kinds = (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)
    return [(each.opcode, bytes(each.data), each.fin) for each in frames if each.opcode in kinds]


def sent_frames(stream: bytes, *, mask: bool) -> list[tuple[Opcode, bytes, bool]]:
    parser: Any = (
        ServerProtocol(state=OPEN, max_size=None)
        if mask
        else ClientProtocol(parse_uri("ws://h/"), state=OPEN, max_size=None)
    )
    parser.receive_data(stream)
    return data_frames([each for each in parser.events_received() if isinstance(each, Frame)])


class Stage:
    """One call, its caller's own parser, and workers that come one after the other."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.client = ClientProtocol(parse_uri("ws://h/"), state=OPEN, max_size=None)
        self.frames: list[Frame] = []
        self.endings: list[Ending] = []
        self.workers: list[WorkerEnd] = []
        self.lost: list[str] = []  # why
        self._wanted: asyncio.Future[None] | None = None
        placement = Placement(result=Warm("w-0"), steps=(), ms=1.0)
        self._facts = Facts(
            call="c",
            agent=AGENT,
            tenant="",
            caller="",
            placement=placement,
            max_seconds=60,
            stall_seconds=60,
            audio_times_real=0,
            price=None,
        )
        self.call = Call(
            self._facts,
            self.wire,
            lambda _, ending: self.endings.append(ending),
            lambda _: None,
            self._again,
        )
        self.call.attach(self._worker())

    def _worker(self) -> Leg:
        self.workers.append(WorkerEnd())
        return self.workers[-1].leg

    async def _again(self, facts: Facts, why: str) -> tuple[Leg, Facts] | None:
        self.lost.append(why)
        self._wanted = asyncio.get_running_loop().create_future()
        await self._wanted
        return self._worker(), facts

    @property
    def moving(self) -> bool:
        return self.call._moving is not None

    async def come(self) -> None:
        """The next worker answers, if one is wanted."""
        await asyncio.sleep(0)  # the search begins
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)
            while self.moving:
                await asyncio.sleep(0)

    def hear(self) -> list[tuple[Opcode, bytes, bool]]:
        """All data frames that the caller has got; its parser has no complaint."""
        self.client.receive_data(self.wire.written)
        self.wire.written = b""
        assert self.client.parser_exc is None
        self.frames += [each for each in self.client.events_received() if isinstance(each, Frame)]
        return data_frames(self.frames)

    def close(self) -> None:
        self.call.connection_lost(None)


DEATHS = st.sampled_from([1001, 1011, 1012, 1013, "broken", "silently"])
ACTS = st.lists(
    st.tuples(st.just("caller"), st.integers(1, 400))
    | st.tuples(st.just("worker"), st.integers(1, 30))
    | st.tuples(st.just("death"), DEATHS)
    | st.tuples(st.just("come"), st.none()),
    max_size=30,
)
SMALL = sent.filter(lambda message: message.size <= 4000)


def frame_ends(stream: bytes) -> set[int]:
    """After how many bytes of a worker's stream another frame may follow."""
    ends, at = {0}, 0
    while at < len(stream):
        size, head = stream[at + 1], 2
        if size > 125:
            head = 4 if size == 126 else 10
            size = int.from_bytes(stream[at + 2 : at + head], "big")
        at += head + size
        ends.add(at)
    return ends


def first_word(stream: bytes) -> int:
    """After how many bytes a worker's stream holds a whole message."""
    for size in range(len(stream) + 1):
        frames = sent_frames(stream[:size], mask=False)
        if frames and any(fin for _, _, fin in frames):
            return size
    return len(stream) + 1


@given(
    said=st.lists(SMALL, max_size=6),
    answers=st.lists(SMALL, max_size=4),
    acts=ACTS,
    cuts=st.lists(st.integers(0, 10**6), max_size=12),
)
@settings(max_examples=150, deadline=None)
def test_the_caller_sees_one_legal_stream_and_the_next_worker_gets_all_of_it(
    said: list[Sent],
    answers: list[Sent],
    acts: list[tuple[str, Any]],
    cuts: list[int],
) -> None:
    asyncio.run(play(said, answers, acts, cuts))


async def play(
    said: list[Sent], answers: list[Sent], acts: list[tuple[str, Any]], cuts: list[int]
) -> None:
    up = b"".join(message.wire(mask=True) for message in said)
    down = b"".join(message.wire(mask=False) for message in answers)
    spoken, edges = first_word(down), frame_ends(down)
    stage = Stage()
    told, answered = 0, 0  # bytes of `up`, and of `down` by the worker that is there
    for act, how in acts:
        if stage.endings:
            break
        match act:
            case "caller":
                stage.call.data_received(up[told : told + how])
                told = min(len(up), told + how)
            case "worker" if not stage.moving:
                stage.workers[-1].leg.data_received(down[answered : answered + how])
                answered = min(len(down), answered + how)
            case "death" if not stage.moving:
                may_move = answered < spoken and len(stage.lost) < MOST_MOVES
                # Inside a frame there is no room for a Close: whoever dies there does so without a word.
                stage.workers[-1].die(how if answered in edges else "silently")
                assert stage.moving == may_move
                answered = 0 if may_move else answered
            case "come":
                await stage.come()
    await stage.come()
    if not stage.endings:
        for piece in chunks(up[told:], cuts):
            stage.call.data_received(piece)
        for piece in chunks(down[answered:], cuts):
            stage.workers[-1].leg.data_received(piece)
        # The worker that is there at last has been told everything, once and in order, and so is the caller.
        assert stage.workers[-1].listen() == sent_frames(up, mask=True)
        assert stage.hear() == sent_frames(down, mask=False)
    else:
        # Lost after its first word, or too often: a Close, and no half message before it.
        (ending,) = stage.endings
        heard = stage.hear()
        assert heard == sent_frames(down, mask=False)[: len(heard)]
        assert not heard or heard[-1][2]
        assert stage.client.close_rcvd is not None
        assert stage.client.close_rcvd.code == ending.code
    for (
        worker
    ) in stage.workers:  # those before have been told a beginning of the same, whole messages only
        part = worker.listen()
        assert part == sent_frames(up, mask=True)[: len(part)]
        assert not part or part[-1][2]
    stage.close()
    assert len(stage.endings) == 1


def test_no_more_than_what_is_kept_can_be_told_again() -> None:
    """A caller that has said more stays with its worker; one that goes on while another is looked for waits."""

    async def run() -> None:
        half = Frame(Opcode.BINARY, bytes(MAX_KEPT_BYTES // 2)).serialize(mask=True)
        many = Stage()
        for _ in range(3):
            many.call.data_received(half)
        many.workers[-1].die("silently")
        assert not many.moving
        assert many.endings[0].code == WORKER_LOST.code
        assert many.endings[0].lost
        many.close()
        waits = Stage()
        waits.call.data_received(half)
        waits.workers[-1].die("silently")
        assert waits.wire.reading
        waits.call.data_received(half)
        assert not waits.wire.reading
        await waits.come()
        assert waits.wire.reading
        assert len(waits.workers[-1].listen()) == 2
        assert not waits.call._kept, "it is let go of"
        waits.workers[-1].die("silently")
        assert waits.endings[0].code == WORKER_LOST.code, "there is nothing left to tell a third"
        waits.close()

    asyncio.run(run())


def test_a_caller_that_hangs_up_while_another_worker_is_looked_for_ends_the_search() -> None:
    async def run() -> None:
        stage = Stage()
        stage.workers[-1].die("silently")
        await asyncio.sleep(0)
        search = stage.call._moving
        assert search is not None
        stage.call.data_received(Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True))
        await asyncio.wait([search])
        assert search.cancelled()
        assert stage.endings[0].code == 1000
        assert len(stage.workers) == 1
        stage.close()

    asyncio.run(run())


# --- through a gateway, on real sockets -------------------------------------------------------------------

links = pytest.mark.usefixtures("links")


def bad_and_good(death: str) -> tuple[FakeWorker, FakeWorker]:
    """The first is asked first, for it is the fullest with room; and it ends as `death` says at the first message."""
    bad, good = FakeWorker("bad", slots=1), FakeWorker("good", slots=4)
    bad.last_words = death
    return bad, good


@links
@pytest.mark.parametrize(
    "death", ["die", "raw c30178", *(f"close {n} x" for n in (1001, 1011, 1012, 1013))]
)
def test_a_worker_that_is_lost_before_its_first_word_is_replaced(death: str) -> None:
    @on_uvloop
    async def run() -> None:
        bad, good = bad_and_good(death)
        async with a_gateway(a_route()) as gateway, bad.serving(gateway), good.serving(gateway):
            with events("trunkline.calls") as lines:
                async with call(gateway) as caller:
                    for number in range(3):
                        await caller.send(f"message {number}")
                    assert [await caller.recv() for _ in range(3)] == [
                        f"message {number}" for number in range(3)
                    ]
                    async with asyncio.timeout(5):
                        await (await caller.ping())
                    assert good.live
                await until(lambda: not good.live and not bad.live)
            again = next(line for line in lines if line["message"] == "placed again")
            assert (again["worker"], again["rung"]) == ("good", "warm")
            ended = next(line for line in lines if line["message"] == "ended")
            assert (ended["worker"], ended["lost"], ended["code"]) == ("good", False, 1000)
            (step,) = ended["passed_over"]
            assert step["worker"] == "bad"
            assert step["why"].endswith("before its first word")
            assert await metric(gateway, "trunkline_moved_calls_total", agent=AGENT) == 1
            assert await metric(gateway, "trunkline_live_calls", agent=AGENT) == 0
            load = gateway.gateway.load()["agents"][AGENT]
            assert (load["calls"], load["lost"], load["arrivals"]) == (0, 0, 1)
            assert not gateway.gateway.holdings.legs

    run()


@links
@on_uvloop
async def test_where_no_other_worker_has_room_the_caller_is_told_to_come_later() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        with events("trunkline.calls") as lines:
            caller = await call(gateway)
            await caller.send("die")
            assert await closed(caller) == (NOBODY_ELSE.code, NOBODY_ELSE.reason)
            await until(lambda: not worker.live)
        ended = next(line for line in lines if line["message"] == "ended")
        assert (ended["code"], ended["by"], ended["lost"]) == (1013, "worker", True)
        assert gateway.gateway.load()["agents"][AGENT]["lost"] == 1


@links
@on_uvloop
async def test_a_call_whose_words_kill_workers_does_not_meet_them_all() -> None:
    workers = [FakeWorker(f"echo-{number}") for number in range(5)]
    async with a_gateway(a_route()) as gateway, contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker.serving(gateway))
        caller = await call(gateway)
        await caller.send("die")
        assert await closed(caller) == (WORKER_LOST.code, WORKER_LOST.reason)
        await until(lambda: not any(worker.live for worker in workers))
        assert sum(worker.log.counts("live") for worker in workers) == 1 + MOST_MOVES


@links
@on_uvloop
async def test_a_caller_who_leaves_while_it_is_placed_again_leaves_nothing_behind() -> None:
    bad, good = bad_and_good("die")
    async with a_gateway(a_route()) as gateway, bad.serving(gateway), good.serving(gateway):
        good.late = 0.3
        caller = await call(gateway)
        await caller.send("hello")
        await until(lambda: bool(good.requests))
        caller.transport.abort()
        await until(lambda: good.free == 4 and not gateway.gateway.holdings.connections)
        assert gateway.gateway.load()["agents"][AGENT]["calls"] == 0


@on_uvloop
async def test_burst_takes_over_from_a_warm_worker_and_another_session_from_one_that_dies() -> None:
    modal = FakeModal()
    async with modal.serving():
        rungs = [WarmRung(kind="warm"), modal.rung()]
        bad = FakeWorker("bad", slots=1)
        bad.last_words = "die"
        async with a_gateway(a_route(rungs=rungs)) as gateway, bad.serving(gateway):
            async with call(gateway) as caller:
                await caller.send("hello")
                assert await caller.recv() == "hello"
                load = gateway.gateway.load()["agents"][AGENT]
                assert (load["calls"], load["burst"]) == (1, 1)
            await until(lambda: not modal.sessions)
            bad.draining = True
            await bad.changed()
            modal.deaths = 1
            async with call(gateway) as caller:
                await caller.send("again")
                assert await caller.recv() == "again"
                load = gateway.gateway.load()["agents"][AGENT]
                assert (load["calls"], load["burst"]) == (1, 1)
            keys = [start["x-idempotency-key"] for start in modal.starts]
            assert len(set(keys)) == len(keys) == 3, "Modal gives one key one session"
            await until(lambda: not modal.sessions)
            load = gateway.gateway.load()["agents"][AGENT]
            assert (load["calls"], load["burst"]) == (0, 0)
