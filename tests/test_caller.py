"""The caller: its pure parts on a clock of the test, and whole calls over real sockets."""

import asyncio
import contextlib
import itertools
import json
import time
from array import array
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from trunkline_runtime.audio.pcm import end_of_speech, start_of_speech
from trunkline_runtime.caller import (
    Answer,
    Caller,
    CallError,
    CallLog,
    Count,
    EndedBy,
    Hum,
    Line,
    Plan,
    Playout,
    Question,
    append_message,
    ask,
    audible_span,
)
from trunkline_runtime.caller.hearing import MAX_ANSWER_BYTES, MAX_TEXTS
from trunkline_runtime.contract import CALL_HEADER, Close
from trunkline_runtime.engine import (
    FRAME_BYTES,
    Ended,
    Event,
    Heard,
    ReplyAudio,
    ReplyEnded,
    ReplyStarted,
    ReplyText,
    SpeechStarted,
    SpeechStopped,
)
from trunkline_runtime.wire.realtime import RealtimeSession
from trunkline_runtime.wire.session import Hear

PATIENCE = 20.0  # generous: the machine may be busy
MS = 48  # bytes of audio


def tone(ms: int) -> bytes:
    return array("h", [8000, -8000] * (ms * 12)).tobytes()


def silence(ms: int) -> bytes:
    return bytes(ms * MS)


# --- what is sent -----------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0, 1, -1, 653, -653, 654, -654, 32767, -32768]), max_size=2000))
def test_where_speech_is_agrees_with_the_engines_own_measure(samples: list[int]) -> None:
    pcm = array("h", samples).tobytes()
    span = audible_span(pcm)
    if span is None:
        assert end_of_speech(pcm) == 0
    else:
        assert span == (start_of_speech(pcm), end_of_speech(pcm))


def test_where_speech_is_in_a_long_silence() -> None:
    assert audible_span(silence(700) + tone(300) + silence(900)) == (0.7, 1.0)
    assert audible_span(silence(500)) is None
    assert audible_span(b"") is None


def sent_audio(message: str) -> bytes:
    parsed = json.loads(message)
    assert parsed["type"] == "input_audio_buffer.append"
    return b64decode(parsed["audio"])


def test_a_question_is_said_whole_and_then_silence() -> None:
    audio = tone(50)
    question = Question(audio, Plan(chunk_ms=20))
    chunks = [sent_audio(question.next(n * 0.02)) for n in range(1, 6)]
    assert {len(chunk) for chunk in chunks} == {20 * MS}
    assert b"".join(chunks) == audio + silence(50)


def test_a_question_knows_when_its_last_audible_sample_was_sent() -> None:
    question = Question(silence(30) + tone(40) + silence(500), Plan(chunk_ms=20))
    for n in range(1, 4):
        assert question.spoke_until is None
        question.next(100 + n * 0.02)
    question.next(100.08)  # carries 60…80 ms; the voice ends at 70
    assert question.spoke_until == pytest.approx(100.07)
    question.next(100.10)
    assert question.spoke_until == pytest.approx(100.07)


def test_a_question_without_a_voice_ends_with_its_audio() -> None:
    question = Question(silence(40), Plan(chunk_ms=20))
    question.next(5.02)
    assert question.spoke_until is None
    question.next(5.04)
    assert question.spoke_until == pytest.approx(5.04)


def test_half_a_sample_is_no_audio() -> None:
    with pytest.raises(ValueError, match="whole samples"):
        Question(b"\0", Plan())


# --- what is heard ----------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(1, 200), st.integers(0, 400), st.sampled_from(["", "", "end", "cut"]))
    )
)
def test_a_player_plays_each_sample_once_and_never_early(steps: list[tuple[int, int, str]]) -> None:
    playout, now, dry = Playout(), 0.0, 0
    expected, in_reply = 0.0, False
    for frame_ms, wait_ms, after in steps:
        now += wait_ms / 1000
        dry += in_reply and now > expected
        begins = playout.add(silence(frame_ms), now)
        assert begins == max(now, expected)
        expected = begins + frame_ms / 1000
        assert playout.until == pytest.approx(expected)
        expected = playout.until
        in_reply = not after
        if after:
            playout.end(now, cut=after == "cut")
            if after == "cut":
                assert playout.until <= max(now, begins)
            expected = playout.until
    assert playout.underruns == dry


@dataclass
class Ears:
    """A caller's ear beside a session that makes the messages which it hears."""

    plan: Plan = field(default_factory=Plan)
    audio: bytes = field(default_factory=lambda: tone(20))
    told: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = itertools.count()
        self.session = RealtimeSession("default/ann", lambda kind: f"{kind}_{next(count)}")
        self.question = Question(self.audio, self.plan)
        self.answer = Answer(self.question, self.plan, self.told.append)

    def hear(self, now: float, *events: Event) -> bool:
        texts = [text for event in events for text in self.session.send(event)]
        reached = [self.answer.hear(text, now) for text in texts]
        return any(reached)


def reply(*pcm: bytes, how: Ended = Ended.COMPLETED) -> list[Event]:
    return [ReplyStarted(), ReplyText("Well."), *map(ReplyAudio, pcm), ReplyEnded(how)]


def test_the_answer_is_the_reply_that_begins_after_the_question() -> None:
    ears = Ears()
    assert not ears.hear(1.0, *reply(tone(80)))
    ears.question.next(2.0)
    assert ears.hear(2.5, Heard("hm", 1.0), *reply(silence(30) + tone(50)))
    assert ears.answer.pcm == silence(30) + tone(50)
    assert ears.answer.answer_heard == pytest.approx(2.53)
    assert ears.answer.said == ["Well.", "Well."]


def test_an_answer_is_heard_when_it_is_played_not_when_it_comes() -> None:
    ears = Ears()
    ears.question.next(0.0)
    ears.hear(1.0, ReplyStarted(), ReplyAudio(silence(800)), ReplyAudio(tone(80)))
    assert ears.answer.answer_heard == pytest.approx(1.8)


def test_a_reply_that_was_broken_off_is_no_answer() -> None:
    ears = Ears()
    ears.question.next(0.0)
    assert not ears.hear(1.0, *reply(tone(80), how=Ended.INTERRUPTED))
    assert ears.hear(2.0, *reply(tone(80)))


def test_a_reply_that_failed_is_waited_for_no_longer() -> None:
    ears = Ears()
    ears.question.next(0.0)
    assert ears.hear(1.0, *reply(how=Ended.FAILED))


def test_a_question_waits_until_the_greeting_has_been_played() -> None:
    ears = Ears(plan=Plan(after_greeting=True, chunk_ms=20), audio=tone(20))
    assert sent_audio(ears.question.next(1.0)) == silence(20)
    ears.hear(2.0, *reply(tone(1000)))
    assert sent_audio(ears.question.next(2.9)) == silence(20)
    assert sent_audio(ears.question.next(3.0)) == tone(20)


def test_gaps_count_within_a_reply_only() -> None:
    ears = Ears()
    ears.hear(1.0, ReplyStarted(), ReplyAudio(tone(80)))
    ears.hear(1.3, ReplyAudio(tone(80)), ReplyEnded(Ended.COMPLETED))
    ears.hear(9.0, *reply(tone(80)))
    assert ears.answer.arrivals.max_gap == pytest.approx(0.3)
    assert ears.answer.playout.underruns == 1


def test_what_is_kept_of_a_call_is_bounded() -> None:
    ears = Ears(plan=Plan(replies=0))
    ears.question.next(0.0)
    for _ in range(3):
        ears.hear(1.0, ReplyStarted(), *[ReplyAudio(bytes(2**20))] * 3, ReplyEnded(Ended.COMPLETED))
    for _ in range(MAX_TEXTS + 1):
        ears.hear(1.0, SpeechStarted(0), SpeechStopped(1), Heard("hm", 0.1), *reply())
    assert len(ears.answer.pcm) == MAX_ANSWER_BYTES
    assert len(ears.answer.said) == len(ears.answer.heard) == MAX_TEXTS


def test_whoever_watches_is_told_all_but_audio() -> None:
    ears = Ears()
    ears.hear(1.0, *reply(tone(80)))
    told = [message["type"] for message in ears.told]
    assert told[0] == "response.created"
    assert told[-1] == "response.done"
    assert "response.output_audio.delta" not in told


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"type": 5}', "hello"])
def test_what_is_not_realtime(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        Ears().answer.hear(text, 1.0)


def test_a_held_call_counts_frames_without_reading_them() -> None:
    ears, count = Ears(), Count()
    for text in ears.session.send(ReplyStarted()) + ears.session.send(ReplyAudio(tone(80))):
        assert not count.hear(text, 3.0)
    assert (count.arrivals.frames, count.arrivals.first) == (1, 3.0)
    assert sent_audio(Hum().next(0.0)) == bytes(FRAME_BYTES)


# --- where to call ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("ws://127.0.0.1:8080", "ws://127.0.0.1:8080/v1/realtime?model=default/ann"),
        ("127.0.0.1:8080", "ws://127.0.0.1:8080/v1/realtime?model=default/ann"),
        ("https://calls.example/", "wss://calls.example/v1/realtime?model=default/ann"),
        ("http://[::1]:80/v1", "ws://[::1]:80/v1/realtime?model=default/ann"),
        ("wss://h/other?model=x", "wss://h/other?model=x"),
    ],
)
def test_addresses(url: str, address: str) -> None:
    assert Line(url=url, model="default/ann").address() == address


@pytest.mark.parametrize("url", ["", "ftp://h", "ws://", "ws://h:x", "ws://h:99999"])
def test_what_cannot_be_called(url: str) -> None:
    with pytest.raises(CallError, match="give ws://HOST:PORT"):
        Line(url=url).address()


def test_a_key_that_no_header_can_hold() -> None:
    with pytest.raises(CallError, match="whole key") as refused:
        Line(url="ws://h", key="secret\r\nX: 1").headers()
    assert "secret" not in str(refused.value)


# --- whole calls ------------------------------------------------------------------------------------------

Part = Callable[["Agent", ServerConnection], Awaitable[None]]


class Agent:
    """The other side of a call: a real server that answers, or refuses, as a test tells it."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.refuse_with: Response | None = None
        self.requests: list[Request] = []
        self.heard: list[tuple[float, bytes]] = []  # when, and what
        self.closes: list[int | None] = []
        self.closed = asyncio.Event()
        self.port = 0
        self._count = itertools.count()
        self.session = RealtimeSession("default/ann", lambda kind: f"{kind}_{next(self._count)}")

    @property
    def line(self) -> Line:
        return Line(url=f"ws://127.0.0.1:{self.port}", model="default/ann", key="k")

    async def say(self, connection: ServerConnection, *events: Event) -> None:
        for event in events:
            for text in self.session.send(event):
                await connection.send(text)

    async def hear(self, connection: ServerConnection) -> bytes:
        """The next audio of the caller."""
        received = self.session.receive(str(await connection.recv()))
        (command,) = received.commands
        assert isinstance(command, Hear)
        self.heard.append((time.monotonic(), command.pcm))
        return command.pcm

    async def _serve(self, connection: ServerConnection) -> None:
        try:
            for text in self.session.opening():
                await connection.send(text)
            await self.part(self, connection)
        except ConnectionClosed:
            pass
        self.closes.append(connection.close_code)
        self.closed.set()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        return self.refuse_with

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Agent"]:
        def name(_: ServerConnection, __: Request, response: Response) -> None:
            if response.status_code == 101:
                response.headers[CALL_HEADER] = "call-7"

        async with serve(
            self._serve, "127.0.0.1", 0, process_request=self._admit, process_response=name
        ) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            async with asyncio.timeout(PATIENCE):
                yield self


async def answers(agent: Agent, connection: ServerConnection) -> None:
    """Hears a voice and then 100 ms of silence, and replies as an engine does."""
    voiced = quiet = 0
    while quiet < 100:
        pcm = await agent.hear(connection)
        loud = audible_span(pcm) is not None
        voiced, quiet = voiced or loud, 0 if loud or not voiced else quiet + len(pcm) // MS
    await agent.say(connection, SpeechStarted(0), SpeechStopped(1), Heard("who is there", 0.3))
    await agent.say(connection, ReplyStarted(), ReplyText("It is me."))
    await agent.say(connection, ReplyAudio(silence(40)), ReplyAudio(tone(200)))
    await agent.say(connection, ReplyEnded(Ended.COMPLETED))
    await connection.wait_closed()


async def echoes(agent: Agent, connection: ServerConnection) -> None:
    await agent.say(connection, ReplyStarted())
    while True:
        await agent.say(connection, ReplyAudio(await agent.hear(connection)))


async def stays_silent(agent: Agent, connection: ServerConnection) -> None:
    await connection.wait_closed()


def in_order(*times: float | None) -> bool:
    assert None not in times
    return list(times) == sorted(times)  # type: ignore[type-var]  # there is no None


async def test_a_spoken_call() -> None:
    async with Agent(answers).serving() as agent:
        log = await ask(agent.line, tone(300) + silence(50))
        await agent.closed.wait()
    assert log.ended_by is EndedBy.REPLY
    assert log.call == "call-7"
    assert (log.heard, log.said) == (("who is there",), ("It is me.",))
    assert log.answer == silence(40) + tone(200)
    assert in_order(log.started, log.answered, log.first_message, log.first_audio, log.ended)
    assert in_order(log.spoke_until, log.first_audio, log.answer_heard)
    assert log.response_seconds is not None
    # As long as the agent waited after it had heard the last of the voice, and 40 ms of silence it played. A caller
    # that was late to send makes the wait shorter than its 100 ms, so the agent's own clock says how long it was.
    voiced = max(at for at, pcm in agent.heard if audible_span(pcm))
    waited = agent.heard[-1][0] - voiced
    assert log.response_seconds >= waited + 0.04 - 0.001  # of two clocks
    assert b"".join(pcm for _, pcm in agent.heard).startswith(tone(300) + silence(100))
    assert log.frames_sent >= len(agent.heard)
    assert (log.close_code, agent.closes) == (Close.NORMAL, [Close.NORMAL])
    request = agent.requests[0]
    assert request.path == "/v1/realtime?model=default/ann"
    assert request.headers["Authorization"] == "Bearer k"
    assert "Sec-WebSocket-Extensions" not in request.headers


async def test_a_record_is_json_and_holds_no_audio() -> None:
    async with Agent(answers).serving() as agent:
        log = await ask(agent.line, tone(100))
    record = json.loads(json.dumps(log.record()))
    assert record["ended_by"] == "reply"
    assert record["response_seconds"] == log.response_seconds
    assert "answer" not in record


async def test_a_greeting_is_listened_to_first() -> None:
    async def greets(agent: Agent, connection: ServerConnection) -> None:
        await agent.say(connection, *reply(tone(400)))
        await answers(agent, connection)

    async with Agent(greets).serving() as agent:
        log = await ask(agent.line, tone(100), Plan(after_greeting=True))
    before = list(
        itertools.takewhile(lambda pcm: not audible_span(pcm), (p for _, p in agent.heard))
    )
    assert sum(map(len, before)) >= 380 * MS  # one chunk may have been due when it came
    assert log.said == ("Well.", "It is me.")
    assert log.answer == silence(40) + tone(200)


@pytest.mark.parametrize("chunk_ms", [20, 80])
async def test_frames_are_never_ahead_of_the_clock(chunk_ms: int) -> None:
    async with Agent(echoes).serving() as agent:
        plan = Plan(chunk_ms=chunk_ms, replies=0, timeout_seconds=1.0)
        began = time.monotonic()
        log = await ask(agent.line, b"", plan)
    assert log.ended_by is EndedBy.TIMEOUT
    assert len(agent.heard) > 1
    for n, (at, pcm) in enumerate(agent.heard, 1):
        assert len(pcm) == chunk_ms * MS
        assert at - began >= n * chunk_ms / 1000 - 0.002  # a loop's timer may fire 1 ms early


async def test_a_held_call_until_it_is_hung_up() -> None:
    async with Agent(echoes).serving() as agent:
        caller = Caller.holding(agent.line)
        running = asyncio.create_task(caller.run())
        await caller.settled.wait()
        assert caller.log().answered is not None
        while caller.log().audio_frames_received < 3:
            await asyncio.sleep(0.01)
        caller.hang_up()
        log = await running
        await agent.closed.wait()
    assert log.ended_by is EndedBy.HANG_UP
    assert log.frames_sent >= log.audio_frames_received >= 3
    assert (
        log.frames_received == log.audio_frames_received + 5
    )  # session.created, and of the reply 4
    assert log.bytes_sent == log.frames_sent * len(append_message(bytes(FRAME_BYTES)))
    assert agent.closes == [Close.NORMAL]


async def test_many_calls_in_one_process() -> None:
    agents = [Agent(echoes) for _ in range(60)]
    async with contextlib.AsyncExitStack() as stack:
        for agent in agents:
            await stack.enter_async_context(agent.serving())
        callers = [Caller.holding(agent.line) for agent in agents]
        running = [asyncio.create_task(caller.run()) for caller in callers]
        while min(caller.log().audio_frames_received for caller in callers) < 10:
            await asyncio.sleep(0.05)
        for caller in callers:
            caller.hang_up()
        logs = await asyncio.gather(*running)
    assert {log.ended_by for log in logs} == {EndedBy.HANG_UP}


@pytest.mark.parametrize("status", [401, 403, 404, 503])
async def test_a_refusal_is_a_result(status: int) -> None:
    async with Agent(stays_silent).serving() as agent:
        sentence = "no slot is free; call again later"
        headers = {"Retry-After": "5", CALL_HEADER: "call-9"} if status == 503 else {}
        agent.refuse_with = refusal(status, f"{sentence}\n", **headers)
        log = await ask(agent.line, tone(100))
    assert log.ended_by is EndedBy.REFUSED
    assert (log.status, log.refusal) == (status, sentence)
    assert (log.retry_after, log.call) == ((5.0, "call-9") if status == 503 else (None, ""))
    assert (log.answered, log.frames_sent) == (None, 0)
    assert in_order(log.started, log.ended)


def refusal(status: int, body: str, **headers: str) -> Response:
    return Response(
        status, "No", Headers({**headers, "Content-Length": str(len(body))}), body.encode()
    )


async def test_a_refusal_without_a_number_of_seconds() -> None:
    async with Agent(stays_silent).serving() as agent:
        agent.refuse_with = refusal(
            503, "x" * 9000, **{"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}
        )
        log = await ask(agent.line, tone(100))
    assert log.retry_after is None
    assert len(log.refusal) < 3000


async def test_a_refusal_that_names_the_call_twice() -> None:
    async with Agent(stays_silent).serving() as agent:
        agent.refuse_with = refusal(503, "")
        agent.refuse_with.headers[CALL_HEADER] = "first"
        agent.refuse_with.headers[CALL_HEADER] = "second"
        log = await ask(agent.line, tone(100))
    assert log.call == "first"


async def test_a_close_by_the_other_side() -> None:
    async def restarts(agent: Agent, connection: ServerConnection) -> None:
        await agent.hear(connection)
        await connection.close(Close.RESTART, "call again")

    async with Agent(restarts).serving() as agent:
        caller = Caller.holding(agent.line)
        log = await caller.run()
    assert log.ended_by is EndedBy.CLOSED
    caller.hang_up()
    assert caller.log() == log  # the first reason counts
    assert (log.close_code, log.close_reason) == (Close.RESTART, "call again")


async def test_a_link_that_breaks() -> None:
    async def dies(agent: Agent, connection: ServerConnection) -> None:
        await agent.hear(connection)
        connection.transport.abort()

    async with Agent(dies).serving() as agent:
        log = await Caller.holding(agent.line).run()
    assert (log.ended_by, log.close_code) == (EndedBy.CLOSED, 1006)


@pytest.mark.parametrize(
    "message",
    [
        b"\0",
        "hello",
        "[" * 100_000,
        '{"type":"response.output_audio.delta","delta":"*"}',
    ],
)
async def test_a_server_that_does_not_speak_realtime(message: str | bytes) -> None:
    async def babbles(_: Agent, connection: ServerConnection) -> None:
        await connection.send(message)
        await connection.wait_closed()

    async with Agent(babbles).serving() as agent:
        log = await ask(agent.line, tone(100))
    assert log.ended_by is EndedBy.NONSENSE


async def test_patience_ends() -> None:
    async with Agent(stays_silent).serving() as agent:
        log = await ask(agent.line, tone(20), Plan(timeout_seconds=0.2))
    assert log.ended_by is EndedBy.TIMEOUT
    assert in_order(log.answered, log.ended)


async def test_a_caller_that_is_cancelled_leaves_nothing_behind() -> None:
    async with Agent(echoes).serving() as agent:
        caller = Caller.holding(agent.line)
        running = asyncio.create_task(caller.run())
        await caller.settled.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await agent.closed.wait()
    assert agent.closes == [Close.NORMAL]


async def test_a_call_on_loopback_passes_by_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with plain_server(b"") as nobody:
        pass
    for name in ("http_proxy", "https_proxy", "all_proxy", "socks_proxy"):
        monkeypatch.setenv(name, nobody.url.replace("ws:", "http:"))
    monkeypatch.setenv("no_proxy", "")
    async with Agent(answers).serving() as agent:
        log = await ask(agent.line, tone(20))
    assert log.ended_by is EndedBy.REPLY


# --- calls that cannot be placed --------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def plain_server(answer: bytes | None) -> AsyncIterator[Line]:
    """Says the same to everyone; None: nothing, and the connection stays open."""
    done = asyncio.Event()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if answer is None:
            await done.wait()
        else:
            writer.write(answer)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve_one, "127.0.0.1", 0) as server:
        yield Line(url=f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        done.set()


async def test_nobody_listens() -> None:
    async with plain_server(b"") as line:
        pass
    caller = Caller.asking(line, tone(20))
    with pytest.raises(CallError, match=r"cannot reach ws://127\.0\.0\.1:\d+/v1/realtime: "):
        await caller.run()
    assert caller.settled.is_set()
    assert caller.log().answered is None


@pytest.mark.parametrize("answer", [b"", b"220 mail ready\r\n", b"HTTP/1.1 101 Sure\r\n\r\n"])
async def test_what_listens_is_no_websocket_server(answer: bytes) -> None:
    async with plain_server(answer) as line:
        with pytest.raises(CallError, match="is no WebSocket server"):
            await ask(line, tone(20))


async def test_what_listens_says_nothing() -> None:
    async with plain_server(None) as line:
        with pytest.raises(CallError, match=r"no answer from ws://.* within 0\.2 s"):
            await ask(line, tone(20), Plan(dial_seconds=0.2))


async def test_a_log_can_be_read_before_the_call() -> None:
    log = Caller.holding(Line(url="ws://127.0.0.1:9")).log()
    assert isinstance(log, CallLog)
    assert (log.started, log.ended_by, log.response_seconds) == (None, None, None)
