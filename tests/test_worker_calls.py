"""Calls through a real worker: from the ticket to the close."""

import asyncio
import base64
import logging
import time
from typing import Any

import jwt
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol
from worker_rig import (
    AGENT,
    FRAME,
    PATIENCE,
    TICKET_KEY,
    FakeGateway,
    RunningWorker,
    append,
    closed,
    next_message,
    refusal,
    worker,
)

from trunkline_runtime.contract import SEQ_HEADER, Settings
from trunkline_runtime.engine import (
    Emit,
    Event,
    Failed,
    Heard,
    HeardPart,
    ReplyAudio,
    ReplyStarted,
    SpeechStarted,
    SpeechStopped,
)
from trunkline_runtime.engine.loopback import LoopbackConversation, LoopbackEngine

pytestmark = pytest.mark.usefixtures("links")
SECOND = ReplyAudio(bytes(48_000))


# --- warm ------------------------------------------------------------------------------------------------


async def test_a_caller_with_a_ticket_hears_the_echo() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        ticket = gateway.ticket("call-1")
        async with running.dial(ticket, path="/v1/realtime?model=front-desk") as caller:
            created = await next_message(caller, "session.created")
            assert created["session"]["model"] == "front-desk"
            await caller.send(append())
            audio = await next_message(caller, "response.output_audio.delta")
            assert base64.b64decode(audio["delta"]) == FRAME
            await caller.send('{"type": "response.cancel"}')
            done = await next_message(caller, "response.done")
            assert done["response"]["status"] == "cancelled"
            await gateway.until(lambda: gateway.free["busy"] == 1)
        await gateway.until(lambda: gateway.free["busy"] == 0)
        status, metrics = await running.health("/metrics")
        assert status == 200
        await metric(running, 'trunkline_worker_calls_total{code="caller"} 1.0')
        for line in (
            'trunkline_worker_slots{state="free"} 2.0',
            f'trunkline_worker_audio_bytes_total{{direction="in"}} {float(len(FRAME))}',
            f'trunkline_worker_audio_bytes_total{{direction="out"}} {float(len(FRAME))}',
            "trunkline_worker_links 1.0",
            "trunkline_worker_draining 0.0",
            "trunkline_engine_frames_total 1.0",
        ):
            assert line in metrics


async def test_tickets_that_open_nothing() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        ticket = gateway.ticket("a")
        assert (await refusal(running.dial("never signed")))[0] == 403
        assert (await refusal(running.dial("")))[0] == 403
        assert (await refusal(running.dial(ticket[:-2] + "x=")))[0] == 403
        assert await refusal(running.dial(ticket, path="/v1/chat")) == (
            404,
            "there is /v1/realtime and /api/chat\n",
        )
        async with running.dial(ticket) as caller:
            await next_message(caller, "session.created")
            status, words = await refusal(running.dial(ticket))
            assert status == 403
            assert "used" in words
            assert ticket not in words
            # Its call has a slot already, and gets no second one.
            assert (await refusal(running.dial(gateway.ticket("a"))))[0] == 503
        assert (await refusal(running.dial(ticket)))[0] == 403, "not even when its call is over"


async def test_an_answer_tells_which_state_comes_after_it() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway, slots=1) as running:
        before = gateway.free["seq"]
        async with running.dial(gateway.ticket("a")) as caller:
            assert caller.response is not None
            seq = int(caller.response.headers[SEQ_HEADER])
            assert seq > before
            with pytest.raises(InvalidStatus) as refused:
                await running.dial(gateway.ticket("b"))
            assert refused.value.response.headers[SEQ_HEADER] == str(seq)
            await gateway.until(lambda: gateway.free["seq"] == seq)
            assert (gateway.free["n"], gateway.free["busy"]) == (0, 1)
        await gateway.until(lambda: gateway.free["n"] == 1 and gateway.free["seq"] > seq)


async def test_one_ticket_dialled_many_times_at_once_opens_one_link() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        ticket = gateway.ticket("a")
        dials = await asyncio.gather(
            *(running.dial(ticket) for _ in range(8)), return_exceptions=True
        )
        links = [dial for dial in dials if not isinstance(dial, BaseException)]
        assert len(links) == 1
        assert all(isinstance(dial, InvalidStatus) for dial in dials if dial not in links)
        await next_message(links[0], "session.created")
        await links[0].close()


async def test_callers_that_leave_at_any_moment_leave_no_slot_behind() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        for number in range(30):
            request = (
                "GET /v1/realtime HTTP/1.1\r\nHost: w\r\nUpgrade: websocket\r\n"
                "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                f"Trunkline-Ticket: {gateway.ticket(str(number))}\r\n\r\n"
            )
            _, writer = await running.open()
            writer.write(request.encode())
            writer.transport.abort()  # with the request on its way, or in the worker's buffer
        async with running.dial(gateway.ticket("b")) as caller:  # after all of these
            await next_message(caller, "session.created")
        await gateway.until(lambda: gateway.free["busy"] == 0)


async def test_realtime_is_chosen_among_subprotocols_and_never_demanded() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        for offered, chosen in (
            (["openai-insecure-api-key.x", "realtime"], "realtime"),
            (["other"], None),
            (None, None),
        ):
            ticket = gateway.ticket(str(offered))
            protocols = None if offered is None else [Subprotocol(name) for name in offered]
            async with running.dial(ticket, subprotocols=protocols) as caller:
                assert caller.subprotocol == chosen


# --- burst -----------------------------------------------------------------------------------------------


def signed(jti: str, **changes: Any) -> str:
    claims = {"aud": AGENT, "call": f"call-{jti}", "jti": jti, "exp": time.time() + 60}
    return jwt.encode({**claims, **changes}, TICKET_KEY, "HS256")


async def test_a_burst_call_brings_its_settings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trunkline.slots")
    async with worker(slots=1) as running:
        async with running.dial(signed("1"), settings={"idleSeconds": 0.2}) as caller:
            await next_message(caller, "session.created")
            assert await refusal(running.dial(signed("2"))) == (503, "no slot is free\n")
            assert await closed(caller) == (1000, "no audio from the caller for 0.2 s")
        assert (await refusal(running.dial(signed("1"))))[0] == 403
        async with running.dial(signed("2")) as caller:  # was refused, so it is not used
            await next_message(caller, "session.created")
    steps = [(r.message, r.__dict__["call"]) for r in caplog.records if r.name == "trunkline.slots"]
    assert steps == [
        ("live", "call-1"),
        ("freed", "call-1"),
        ("live", "call-2"),
        ("freed", "call-2"),
    ]


async def test_burst_tickets_that_open_nothing() -> None:
    async with worker() as running:
        for token in ("", "x", signed("1", aud="default/other"), signed("2", exp=1)):
            status, words = await refusal(running.dial(token))
            assert status == 403
            assert not token or token not in words
        assert running.host.why_unready() is None


@pytest.mark.parametrize(
    "first", [append(), "no json", '{"type": "trunkline.settings", "settings": 1}']
)
async def test_a_call_without_settings_is_refused(first: str) -> None:
    async with FakeGateway().serving() as gateway, worker(gateway, slots=1) as running:
        for name in ("1", "2"):  # the slot is free again
            await gateway.until(lambda: gateway.free["n"] == 1)
            async with running.knock(gateway.ticket(name)) as caller:
                await caller.send(first)
                code, reason = await closed(caller)
                assert code == 1008
                assert reason


async def test_a_call_that_leaves_before_its_settings_frees_its_slot() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway, slots=1) as running:
        for name in ("1", "2", "3"):
            caller = await running.knock(gateway.ticket(name))
            caller.transport.abort()
            await caller.wait_closed()
            await metric(running, 'trunkline_worker_slots{state="free"} 1.0')


# --- how calls end ---------------------------------------------------------------------------------------


class StagedConversation(LoopbackConversation):
    """A conversation whose events the test makes."""

    def __init__(self, engine: "StagedEngine", emit: Emit) -> None:
        super().__init__(engine, emit)
        self.emit = emit
        self.closes = 0

    def close(self) -> None:
        self.closes += 1
        super().close()


class StagedEngine(LoopbackEngine):
    """A loopback engine that shows its conversations and can be made to fail."""

    def __init__(self, slots: int = 2, error: Exception | None = None) -> None:
        super().__init__(slots=slots)
        self.error = error
        self.opened: list[StagedConversation] = []
        self.settings: list[Settings] = []

    def open(self, settings: Settings, emit: Emit) -> StagedConversation:
        if self.error is not None:
            raise self.error
        conversation = StagedConversation(self, emit)
        self.opened.append(conversation)
        self.settings.append(settings)
        return conversation


async def call_to(gateway: FakeGateway, running: RunningWorker, **options: Any) -> Any:
    """A caller who has been answered."""
    caller = await running.dial(gateway.ticket("a"), settings=options)
    await next_message(caller, "session.created")
    return caller


async def emit_from_a_thread(conversation: StagedConversation, *events: Event) -> None:
    def emit() -> None:
        for event in events:
            conversation.emit(event)

    await asyncio.to_thread(emit)


async def test_an_engine_that_fails_ends_the_call_with_1011_and_says_so_first() -> None:
    engine = StagedEngine()
    async with FakeGateway().serving() as gateway, worker(gateway, engine=engine) as running:
        caller = await call_to(gateway, running, greeting="Hello.")
        assert engine.settings == [{"greeting": "Hello.", "call": "a"}]
        await emit_from_a_thread(engine.opened[0], Failed("out of memory"), ReplyStarted())
        error = await next_message(caller, "error")
        assert error["error"]["code"] == "conversation_failed"
        with pytest.raises(ConnectionClosed):  # the error is the last that is said
            await caller.recv()
        assert await closed(caller) == (1011, "the engine failed: call again")
        await gateway.until(lambda: gateway.free["busy"] == 0)
        assert engine.opened[0].closes == 1


@pytest.mark.parametrize("error", [RuntimeError("no memory"), ValueError("a bug")])
async def test_an_engine_that_cannot_open_costs_that_call_alone(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    engine = StagedEngine()
    async with FakeGateway().serving() as gateway, worker(gateway, engine=engine) as running:
        other = await call_to(gateway, running)
        engine.error = error
        ticket = gateway.ticket("b")
        async with running.dial(ticket) as caller:
            assert await closed(caller) == (1011, "the worker failed: call again")
        failure = next(r for r in caplog.records if r.message == "a call failed")
        assert failure.exc_info is not None
        assert failure.__dict__["call"] == "b"
        await other.send('{"type": "input_audio_buffer.clear"}')
        await next_message(other, "input_audio_buffer.cleared")
        await other.close()
        await gateway.until(lambda: gateway.free["busy"] == 0)


async def test_a_call_without_audio_from_the_caller_ends_while_one_with_audio_goes_on() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        caller = await call_to(gateway, running, idleSeconds=1.0)
        began = asyncio.get_running_loop().time()
        for _ in range(15):
            await caller.send(append())
            await asyncio.sleep(0.1)
        assert asyncio.get_running_loop().time() - began > 1.0
        assert await closed(caller) == (1000, "no audio from the caller for 1 s")


async def test_a_call_has_a_longest_time() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway, max_seconds=1) as running:
        caller = await call_to(gateway, running)
        assert await closed(caller) == (1000, "the call has lasted 1 s, its limit")


async def test_the_code_arrives_though_the_caller_never_stops_sending() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway, max_seconds=1) as running:
        caller = await call_to(gateway, running)

        async def talk() -> None:
            while True:
                await caller.send(append())
                await asyncio.sleep(0.005)

        talking = asyncio.create_task(talk())
        began = time.monotonic()
        assert await closed(caller) == (1000, "the call has lasted 1 s, its limit")
        talking.cancel()
        await asyncio.wait({talking})
        await gateway.until(lambda: gateway.free["busy"] == 0)
        assert time.monotonic() - began < PATIENCE


async def test_a_binary_message_is_refused() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        caller = await call_to(gateway, running)
        await caller.send(b"\x00\x01")
        assert await closed(caller) == (1008, "a binary message: send JSON as text")


async def test_a_message_that_is_too_long_is_refused() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        caller = await call_to(gateway, running)
        await caller.send(append(bytes(400 * 1024)))
        code, _ = await closed(caller)
        assert code == 1009
        await gateway.until(lambda: gateway.free["busy"] == 0)


async def test_a_caller_who_does_not_read_is_dropped() -> None:
    engine = StagedEngine()
    async with FakeGateway().serving() as gateway, worker(gateway, engine=engine) as running:
        ticket = gateway.ticket("a")
        caller = await running.dial(ticket, max_queue=1)
        await gateway.until(lambda: bool(engine.opened))
        # More than waits at most and than sockets on loopback can hold.
        await emit_from_a_thread(engine.opened[0], ReplyStarted(), *[SECOND] * 400)
        # The slot is free though the caller has not even read the close.
        await gateway.until(lambda: gateway.free["busy"] == 0)
        assert engine.opened[0].closes == 1
        caller.transport.abort()
        await metric(running, 'trunkline_worker_calls_total{code="1008"} 1.0')


async def metric(running: RunningWorker, line: str) -> None:
    """Waits for a line of /metrics: a call is counted when its link is closed."""
    async with asyncio.timeout(PATIENCE):
        while line not in (await running.health("/metrics"))[1]:
            await asyncio.sleep(0.05)


async def test_the_longest_reply_may_come_at_once() -> None:
    engine = StagedEngine()
    async with FakeGateway().serving() as gateway, worker(gateway, engine=engine) as running:
        caller = await call_to(gateway, running)
        engine.opened[0].emit(ReplyStarted())
        for _ in range(3):  # more in all than may wait at once
            for _ in range(70):
                engine.opened[0].emit(SECOND)
            for _ in range(70):
                await next_message(caller, "response.output_audio.delta")
        await caller.close()


@pytest.mark.parametrize(
    ("transcripts", "said"), [(None, "my number is 4711"), (True, "my number is 4711"), (False, "")]
)
async def test_a_caller_is_told_what_was_recognised_unless_the_agent_forbids_it(
    transcripts: bool | None, said: str
) -> None:
    engine, options = StagedEngine(), {} if transcripts is None else {"transcripts": transcripts}
    async with FakeGateway().serving() as gateway, worker(gateway, engine=engine) as running:
        caller = await call_to(gateway, running, **options)
        turn = (SpeechStarted(0), HeardPart("my number"), SpeechStopped(900))
        await emit_from_a_thread(engine.opened[0], *turn, Heard("my number is 4711", 0.9))
        name = "conversation.item.input_audio_transcription"
        part = await next_message(caller, f"{name}.delta")
        heard = await next_message(caller, f"{name}.completed")
        assert (part["delta"], heard["transcript"]) == ("my number" if said else "", said)
        await caller.close()


async def test_what_waits_is_still_said_before_the_close() -> None:
    engine = StagedEngine()
    async with FakeGateway().serving() as gateway, worker(gateway, engine=engine) as running:
        caller = await call_to(gateway, running)
        # More than sockets on loopback take at once, so that the failure comes while audio waits.
        await emit_from_a_thread(
            engine.opened[0], ReplyStarted(), *[SECOND] * 120, Failed("out of memory")
        )
        for _ in range(120):
            await next_message(caller, "response.output_audio.delta")
        await next_message(caller, "error")
        assert await closed(caller) == (1011, "the engine failed: call again")
