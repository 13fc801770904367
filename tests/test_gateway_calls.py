"""Calls through a gateway to warm workers, on real sockets: how they begin, go on and end."""

import asyncio
import base64
import contextlib
import json
import os
import time
from typing import cast

import pytest
from gateway_rig import (
    AGENT,
    KEY,
    SECONDS,
    FakeWorker,
    SlotLog,
    a_gateway,
    a_route,
    call,
    closed,
    events,
    http,
    live_call,
    metric,
    on_uvloop,
    refused,
    until,
    worker_tls,
)
from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol

from trunkline_runtime.contract import CALL_HEADER, MAX_CALL_MESSAGE_BYTES, TICKET_HEADER
from trunkline_runtime.gateway.ladder import Patience
from trunkline_runtime.gateway.process import Running

pytestmark = pytest.mark.usefixtures("links")
HEAD = (
    f"GET /v1/realtime?model=echo HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
    f"Connection: Upgrade\r\nSec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\n"
    f"Sec-WebSocket-Version: 13\r\nAuthorization: Bearer {KEY}\r\n\r\n"
).encode()


# --- how a call begins ---------------------------------------------------------------------------------


@on_uvloop
async def test_a_call_is_relayed_to_a_warm_worker() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        async with call(gateway) as caller:
            for message in ("hello", b"\x00" * 70_000, "", "end"):
                await caller.send(message)
                assert await caller.recv() == message
            await caller.send(["in ", "three ", "fragments"])
            assert await caller.recv() == "in three fragments"
            assert worker.live
            assert caller.response is not None
            assert list(worker.live.values()) == [caller.response.headers[CALL_HEADER]]
        await until(lambda: not worker.live)
        assert worker.closes == [(1000, "")]


@on_uvloop
async def test_the_worker_gets_path_query_ticket_and_call_and_no_compression() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway):
        caller = call(
            gateway,
            query="&intent=test%20it",
            compression="deflate",
            subprotocols=["realtime", f"openai-insecure-api-key.{KEY}"],
            key=None,
            headers={"X-Mine": "secret"},
        )
        async with caller as connection:
            assert connection.subprotocol == "realtime"
            assert connection.response is not None
            assert "Sec-WebSocket-Extensions" not in connection.response.headers
            assert KEY not in str(connection.response.headers)
            await connection.send("request")
            path, headers = json.loads(await connection.recv())
    names = dict(headers)
    assert path == f"/v1/realtime?model={AGENT}&intent=test%20it"
    assert names[TICKET_HEADER]
    assert names[CALL_HEADER] == connection.response.headers[CALL_HEADER]
    assert names["Sec-WebSocket-Protocol"] == "realtime"
    assert not {"Sec-WebSocket-Extensions", "Authorization", "X-Mine"} & set(names)
    assert KEY not in str(headers)


@on_uvloop
async def test_settings_go_first_to_the_worker() -> None:
    async with (
        a_gateway(a_route()) as gateway,
        FakeWorker().serving(gateway) as worker,
        call(gateway) as caller,
    ):
        await caller.send("hi")
        assert await caller.recv() == "hi"
        settings = {"type": "trunkline.settings", "settings": {"greeting": "Hello."}}
        assert worker.settings == [settings]


@on_uvloop
async def test_a_full_agent_answers_503_with_when_to_come_back() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker(slots=1).serving(gateway) as worker:
        with events("trunkline.calls") as lines:
            async with call(gateway):
                answer = await refused(call(gateway))
            await until(lambda: not worker.live)
        assert answer.status_code == 503
        assert 1 <= int(answer.headers["Retry-After"]) <= 10
        assert answer.headers[CALL_HEADER]
        assert answer.body == b"every slot of default/echo is taken: call again after a while\n"
        line = next(line for line in lines if line["message"] == "refused")
        assert line["call"] == answer.headers[CALL_HEADER]
        assert line["passed_over"][0]["why"] == "no free slot"
        assert gateway.gateway.load()["agents"][AGENT]["refused"] == 1
        async with call(gateway) as caller:
            await caller.send("again")
            assert await caller.recv() == "again"


@on_uvloop
async def test_wrong_callers_get_plain_answers() -> None:
    access = {**a_route()["access"], "origins": ["https://good.example"]}
    async with (
        a_gateway(a_route(access=access)) as gateway,
        FakeWorker().serving(gateway) as worker,
    ):
        wrong = await refused(call(gateway, key="wrong"))
        assert (wrong.status_code, wrong.headers["WWW-Authenticate"][:6]) == (401, "Bearer")
        assert (await refused(call(gateway, agent="nobody"))).status_code == 401
        origin = await refused(call(gateway, origin="https://bad.example"))
        assert origin.status_code == 403
        assert not worker.requests
        async with call(gateway, origin="https://good.example") as caller:
            await caller.send("good")
            assert await caller.recv() == "good"
        assert await metric(gateway, "trunkline_calls_total", outcome="unauthorized") == 1


async def answer_to(gateway: Running, *parts: bytes) -> bytes:
    """All that a raw client gets, up to the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        async with asyncio.timeout(SECONDS):
            return await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /v1/realtime?model=echo HTTP/1.1\r\nHost: x\r\n\r\n", b"426"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"426"),
        (b"POST /v1/realtime HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", b"405"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", b"400"),
        (HEAD.replace(b"Version: 13", b"Version: 12"), b"400"),
        (HEAD.replace(b"AAAAAAAAAAAAAAAAAAAAAA==", b"short"), b"400"),
        (HEAD.replace(b"HTTP/1.1", b"HTTP/1.0"), b"505"),
        (HEAD.replace(b"model=echo", b"model=\xff"), b"400"),
        (HEAD.replace(b"/v1/realtime", b"/elsewhere"), b"404"),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"400"),
        (b"GET /" + b"x" * 20_000, b"431"),
        (HEAD.replace(b"Host: x", b"Host: " + b"x" * 17_000), b"431"),
        (HEAD.replace(b"Host: x", b"Host: " + b"x" * 9_000), b"431"),
    ],
)
def test_what_is_no_call_gets_a_plain_answer(head: bytes, status: bytes) -> None:
    @on_uvloop
    async def run() -> None:
        async with a_gateway(a_route()) as gateway:
            answer = await answer_to(gateway, head)
            assert answer.split(b" ", 2)[1] == status
            assert answer.partition(b"\r\n\r\n")[2], "it says why"
            assert b"Connection: close" in answer

    run()


@on_uvloop
async def test_a_head_in_drops_is_answered_408_in_bounded_time() -> None:
    async with a_gateway(a_route()) as gateway:
        began = asyncio.get_running_loop().time()
        answer = await answer_to(gateway, HEAD[:20])
        assert b" 408 " in answer
        assert asyncio.get_running_loop().time() - began < SECONDS


@on_uvloop
async def test_what_a_hasty_caller_sends_before_its_101_is_relayed() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway):
        early = Frame(Opcode.TEXT, b"early").serialize(mask=True)
        bye = Frame(Opcode.TEXT, b"close 1000 done").serialize(mask=True)
        answer = await answer_to(gateway, HEAD[:30], HEAD[30:] + early[:3], early[3:] + bye)
        assert b" 101 " in answer
        assert answer.endswith(b"\x81\x05early\x88\x06\x03\xe8done")


@on_uvloop
async def test_a_caller_that_sends_much_before_its_101_is_cut_off() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        worker.late = 3
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(HEAD + bytes(200_000))
        async with asyncio.timeout(SECONDS):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
        await until(lambda: not gateway.gateway.holdings.connections)
        await until(lambda: worker.free == 4)


@on_uvloop
async def test_what_a_worker_says_in_one_breath_with_its_101_is_relayed() -> None:
    class Hasty(asyncio.Protocol):
        """Greets and hangs up in the packet that holds its 101."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.Transport, transport)

        def data_received(self, data: bytes) -> None:
            server = ServerProtocol()
            server.receive_data(data)
            for request in server.events_received():
                if isinstance(request, Request):
                    server.send_response(server.accept(request))
                    server.send_text(b"hello")
                    server.send_close(4000, "and goodbye")
                    self.transport.write(b"".join(server.data_to_send()))

    hasty = await asyncio.get_running_loop().create_server(Hasty, "127.0.0.1", 0, ssl=worker_tls())
    async with hasty, a_gateway(a_route()) as gateway:
        worker = FakeWorker()
        worker.port = hasty.sockets[0].getsockname()[1]
        async with worker.linked(gateway):
            caller = await call(gateway)
            assert await caller.recv() == "hello"
            assert await closed(caller) == (4000, "and goodbye")


# --- the worker that does not take it ------------------------------------------------------------------


@on_uvloop
async def test_a_worker_that_refuses_its_ticket_is_passed_over() -> None:
    async with a_gateway(a_route()) as gateway:
        bad, good = FakeWorker("bad", slots=1), FakeWorker("good", slots=4)
        bad.refusing = True
        async with bad.serving(gateway), good.serving(gateway):
            with events("trunkline.calls") as lines:
                async with call(gateway) as caller:
                    await caller.send("hi")
                    assert await caller.recv() == "hi"
            assert good.log.counts("freed") + len(good.live) == 1
            assert not bad.log.lines
            placed = next(line for line in lines if line["message"] == "placed")
            assert placed["worker"] == "good"
            (step,) = placed["passed_over"]
            assert (step["worker"], step["why"]) == ("bad", "refused its data link with HTTP 403")


@on_uvloop
async def test_a_worker_that_is_silent_costs_a_moment_and_its_late_answer_finds_nobody() -> None:
    async with a_gateway(a_route(), patience=Patience(answer=0.25)) as gateway:
        slow, good = FakeWorker("slow", slots=1), FakeWorker("good", slots=4)
        slow.late = 0.6
        async with slow.serving(gateway), good.serving(gateway):
            with events("trunkline.calls") as lines:
                async with call(gateway) as caller:
                    await caller.send("hi")
                    assert await caller.recv() == "hi"
            placed = next(line for line in lines if line["message"] == "placed")
            assert placed["passed_over"][0]["why"] == "did not answer its data link in time"
            assert 240 <= placed["passed_over"][0]["ms"] < 5000
            assert slow.row(gateway)["free"] == 1
            await asyncio.sleep(slow.late)
            assert not slow.log.lines


@on_uvloop
async def test_the_only_worker_is_waited_for() -> None:
    async with a_gateway(a_route(), patience=Patience(answer=0.05)) as gateway:
        slow = FakeWorker("slow")
        slow.late = 0.5
        async with slow.serving(gateway), call(gateway) as caller:
            await caller.send("hi")
            assert await caller.recv() == "hi"


@on_uvloop
async def test_a_worker_that_nobody_can_reach_is_passed_over() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker("gone").serving(gateway) as gone:
        assert gone._server is not None
        gone._server.close()
        await gone._server.wait_closed()
        answer = await refused(call(gateway))
        assert answer.status_code == 503
        await until(lambda: gone.free == 4)


@on_uvloop
async def test_full_is_believed_until_the_worker_says_otherwise() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker(slots=1).serving(gateway) as worker:
        worker.reported = 1  # wrong on purpose, as when another gateway was quicker
        async with call(gateway):
            answer = await refused(call(gateway))
        assert answer.status_code == 503


@on_uvloop
async def test_callers_who_leave_at_any_moment_leave_nothing_behind() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker(slots=4).serving(gateway) as worker:
        for number in range(200):
            _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(HEAD)
            await asyncio.sleep(0.004 * (number % 50) / 50)
            writer.transport.abort()
        await until(lambda: worker.free == 4 and not gateway.gateway.holdings.connections)
        await until(lambda: worker.row(gateway)["free"] == 4)
        load = gateway.gateway.load()["agents"][AGENT]
        assert load["calls"] == 0
        callers = [await call(gateway) for _ in range(4)]
        assert len(worker.live) == 4
        await asyncio.gather(*(caller.close() for caller in callers))


@on_uvloop
async def test_a_slot_given_in_the_turn_in_which_the_caller_leaves_is_given_back() -> None:
    class Leaving(FakeWorker):
        """Its caller hangs up as it answers."""

        def _answer(self, connection: ServerConnection, request: Request, answer: Response) -> None:
            super()._answer(connection, request, answer)
            writers.pop().transport.abort()

    writers: list[asyncio.StreamWriter] = []
    async with a_gateway(a_route()) as gateway, Leaving(slots=1).serving(gateway) as worker:
        for count in range(1, 4):
            _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writers.append(writer)
            writer.write(HEAD)
            await until(lambda count=count: worker.log.counts("freed") == count)  # type: ignore[misc]
            await until(lambda: not gateway.gateway.holdings.connections)
            await until(lambda: worker.row(gateway)["free"] == 1)


@on_uvloop
async def test_a_caller_who_leaves_while_a_worker_thinks_takes_no_slot() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker(slots=1).serving(gateway) as worker:
        worker.late = 0.3
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(HEAD)
        await until(lambda: bool(worker.requests))
        assert gateway.gateway._table.view(AGENT) == 0, "it is spoken for"
        writer.transport.abort()
        async with asyncio.timeout(SECONDS):
            while await metric(gateway, "trunkline_calls_total", outcome="left") != 1:
                await asyncio.sleep(0.01)
        assert gateway.gateway._table.view(AGENT) == 1
        await asyncio.sleep(worker.late)
        assert not worker.log.lines


# --- how a call ends -----------------------------------------------------------------------------------


@on_uvloop
async def test_the_workers_close_is_passed_on() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        with events("trunkline.calls") as lines:
            caller = await call(gateway)
            await caller.send("close 4321 we are done")
            assert await closed(caller) == (4321, "we are done")
            await until(lambda: not worker.live)
        assert worker.closes == [(4321, "we are done")]
        ended = next(line for line in lines if line["message"] == "ended")
        assert (ended["code"], ended["by"], ended["lost"]) == (4321, "worker", False)
        assert (ended["rung"], ended["worker"]) == ("warm", "echo-0")
        assert ended["bytes_up"] > 20
        assert ended["bytes_down"] == 0


@on_uvloop
async def test_the_callers_close_is_passed_on() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        caller = await call(gateway)
        await caller.close(4000, "bye")
        await until(lambda: not worker.live)
        assert worker.closes == [(4000, "bye")]
        assert (caller.close_code, caller.close_reason) == (4000, "bye")


@on_uvloop
async def test_a_worker_that_is_late_to_read_a_close_reads_it_and_is_not_reset() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        caller = await call(gateway)
        await caller.send("deaf 2.5")  # as one that waits for a processor; it goes on to speak
        await caller.recv()
        await caller.close(4000, "bye")
        await until(lambda: not worker.live)
        assert worker.closes == [(4000, "bye")]


@on_uvloop
async def test_a_caller_that_vanishes_ends_the_leg() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        with events("trunkline.calls") as lines:
            caller = await call(gateway)
            caller.transport.abort()
            await until(lambda: not worker.live)
        assert worker.closes == [(1001, "the caller is gone")]
        ended = next(line for line in lines if line["message"] == "ended")
        assert (ended["code"], ended["by"]) == (1006, "caller")


@on_uvloop
async def test_a_worker_that_dies_in_a_call_is_told_and_counted() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        with events("trunkline.calls") as lines:
            caller = await call(gateway)
            await caller.send("a word")
            assert await caller.recv() == "a word"
            await caller.send("die")
            assert await closed(caller) == (1011, "worker lost: call again")
            await until(lambda: not worker.live)
        ended = next(line for line in lines if line["message"] == "ended")
        assert (ended["by"], ended["lost"]) == ("worker", True)
        assert gateway.gateway.load()["agents"][AGENT]["lost"] == 1
        assert await metric(gateway, "trunkline_lost_calls_total", agent=AGENT) == 1
        assert await metric(gateway, "trunkline_live_calls", agent=AGENT) == 0


@on_uvloop
async def test_a_worker_that_dies_inside_a_message_leaves_the_caller_no_half_of_it() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway):
        caller = await call(gateway)
        await caller.send("a word")
        assert await caller.recv() == "a word"
        await caller.send("raw 827effff" + "00" * 100)  # the head of 65,535 bytes and some of them
        await caller.send("die")
        assert await closed(caller) == (1011, "worker lost: call again")


@on_uvloop
async def test_a_worker_that_breaks_the_protocol_is_lost() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        caller = await call(gateway)
        await caller.send("raw 81036f6e65c3017821")  # "one", then reserved bits
        assert await caller.recv() == "one"
        assert await closed(caller) == (1011, "worker lost: call again")
        await until(lambda: not worker.live)


@on_uvloop
async def test_a_silent_worker_gets_no_new_call_and_later_its_calls_are_lost() -> None:
    patience = Patience(answer=10, silence=5.0)
    async with (
        a_gateway(a_route(), patience=patience) as gateway,
        FakeWorker().serving(gateway) as worker,
    ):
        caller = await call(gateway)
        worker.mute = True
        await until(lambda: not worker.row(gateway))
        assert (await refused(call(gateway))).status_code == 503
        # A call that brings something keeps all of them; silence ends them.
        await caller.send("hi")
        assert await caller.recv() == "hi"
        began = time.monotonic()
        assert await closed(caller) == (1011, "worker lost: call again")
        assert time.monotonic() - began > 3


@on_uvloop
async def test_a_worker_that_comes_back_in_time_keeps_its_calls() -> None:
    patience = Patience(answer=10, silence=4.0)
    async with (
        a_gateway(a_route(), patience=patience) as gateway,
        FakeWorker().serving(gateway) as worker,
    ):
        caller = await call(gateway)
        worker.mute = True
        await until(lambda: not worker.row(gateway))
        worker.mute = False
        async with worker.linked(gateway):
            with pytest.raises(
                TimeoutError
            ):  # No close comes when its calls would have been given up.
                async with asyncio.timeout(2):
                    await caller.recv()
            await caller.send("still here")
            assert await caller.recv() == "still here"


@on_uvloop
async def test_a_lost_control_link_ends_no_call_and_the_next_one_takes_over() -> None:
    patience = Patience(answer=10, silence=4.0)
    async with (
        a_gateway(a_route(), patience=patience) as gateway,
        FakeWorker().serving(gateway) as worker,
    ):
        caller = await call(gateway)
        worker.links[0].transport.abort()
        await until(lambda: not worker.row(gateway))
        await caller.send("still here")
        assert await caller.recv() == "still here"
        async with worker.linked(gateway):
            assert worker.row(gateway)["busy"] == 1
            await caller.send("and now")
            assert await caller.recv() == "and now"
            worker.mute = True  # the new link speaks for the old one's calls
            assert await closed(caller) == (1011, "worker lost: call again")


@on_uvloop
async def test_pings_are_answered_here_on_both_legs() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway):
        caller = await call(gateway)
        async with asyncio.timeout(SECONDS):
            await (await caller.ping(b"mine"))
        await caller.send("ping")
        assert await caller.recv() == "ponged"
        await caller.close()


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\x82\x01x", 1002),
        (b"\xc2\x81\0\0\0\0x", 1002),
        (b"\x09\x80\0\0\0\0", 1002),
        (b"\x82\xff" + (MAX_CALL_MESSAGE_BYTES + 1).to_bytes(8, "big") + b"\0\0\0\0", 1009),
    ],
)
def test_a_caller_that_breaks_the_rules_is_told(frame: bytes, code: int) -> None:
    @on_uvloop
    async def run() -> None:
        async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
            answer = await answer_to(gateway, HEAD, frame)
            close = answer.partition(b"\r\n\r\n")[2]
            assert close[0] == 0x88
            assert int.from_bytes(close[2:4], "big") == code
            await until(lambda: not worker.live)
            assert worker.closes == [(1001, "the caller broke the protocol")]

    run()


@on_uvloop
async def test_a_message_of_the_limit_passes() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway):
        caller = await call(gateway)
        message = os.urandom(MAX_CALL_MESSAGE_BYTES)
        await caller.send(message)
        assert await caller.recv() == message
        await caller.close()


@on_uvloop
async def test_the_longest_call_ends_with_1000_and_a_reason() -> None:
    async with (
        a_gateway(a_route(maxSeconds=0.3)) as gateway,
        FakeWorker().serving(gateway) as worker,
    ):
        caller = await call(gateway)
        assert await closed(caller) == (1000, "the call reached its 0.3 s: call again")
        await until(lambda: not worker.live)


@on_uvloop
async def test_slow_admissions_are_counted() -> None:
    slow = a_route(admissionMs=200.0)
    async with a_gateway(slow) as gateway, FakeWorker().serving(gateway) as worker:
        worker.late = 0.3
        await (await call(gateway)).close()
        assert await metric(gateway, "trunkline_slow_admissions_total", agent=AGENT) == 1
        assert await metric(gateway, "trunkline_admission_seconds_count", rung="warm") == 1


# --- back-pressure -------------------------------------------------------------------------------------


@on_uvloop
async def test_a_caller_that_does_not_read_holds_its_worker_back() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway) as worker:
        caller = await call(gateway, max_queue=1)
        await caller.send("flood 400")  # 25 MB
        live = live_call(gateway)
        await until(lambda: live._jammed)
        assert live._transport.get_write_buffer_size() < 2 * 65536 + MAX_CALL_MESSAGE_BYTES
        assert live._leg is not None
        passed = live._leg.passed
        assert passed < 400 * 65536
        for _ in range(400):
            assert len(await caller.recv()) == 65536
        await caller.send("all read")
        assert await caller.recv() == "all read"
        await caller.close()
        await until(lambda: not worker.live)


@on_uvloop
async def test_a_worker_that_does_not_read_holds_its_caller_back() -> None:
    impatient = Patience(answer=10, stall=1)
    async with (
        a_gateway(a_route(), patience=impatient) as gateway,
        FakeWorker().serving(gateway) as worker,
    ):
        caller = await call(gateway)
        await caller.send("deaf")

        async def speak() -> None:
            for _ in range(800):
                await caller.send(bytes(65536))

        speaking = asyncio.create_task(speak())
        live = live_call(gateway)
        leg = live._leg
        assert leg is not None
        assert leg._transport is not None
        await until(lambda: leg._jammed)
        assert leg._transport.get_write_buffer_size() < 2 * 65536 + MAX_CALL_MESSAGE_BYTES
        assert not speaking.done()
        speaking.cancel()
        caller.transport.abort()  # unseen, for nothing is read from it; the stall ends the call
        await until(lambda: not gateway.gateway.holdings.connections)
        assert gateway.gateway.load()["agents"][AGENT]["lost"] == 1
        assert worker._server is not None
        for connection in worker._server.connections:
            connection.transport.abort()
        await until(lambda: not worker.live)


@on_uvloop
async def test_a_caller_that_never_reads_is_ended() -> None:
    impatient = Patience(answer=10, stall=0.5)
    async with (
        a_gateway(a_route(), patience=impatient) as gateway,
        FakeWorker().serving(gateway) as worker,
    ):
        with events("trunkline.calls") as lines:
            caller = await call(gateway, max_queue=1)
            await caller.send("flood 400")
            await until(lambda: not worker.live and not gateway.gateway.holdings.connections)
        ended = next(line for line in lines if line["message"] == "ended")
        assert (ended["code"], ended["by"], ended["lost"]) == (1008, "gateway", False)
        caller.transport.abort()


@on_uvloop
async def test_a_ping_of_a_caller_that_does_not_read_is_answered_once_it_does() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker().serving(gateway):
        caller = await call(gateway, max_queue=1)
        await caller.send("flood 400")
        live = live_call(gateway)
        await until(lambda: live._jammed)
        pongs = [await caller.ping(str(number)) for number in range(3)]
        await until(lambda: live._ping_due == b"2")
        for _ in range(400):
            await caller.recv()
        async with asyncio.timeout(SECONDS):
            await pongs[-1]
        await caller.close()


@on_uvloop
async def test_health_says_ready_and_counts() -> None:
    async with a_gateway(a_route()) as gateway, FakeWorker(log=SlotLog()).serving(gateway):
        await until(lambda: gateway.gateway.unready() is None)
        assert await http(gateway.health_port, "/readyz") == (200, "ready\n")
        assert await metric(gateway, "process_resident_memory_bytes") > 0
