"""The stock `openai` client against a real worker: the loopback engine, a spoken conversation, Moshi."""

import asyncio
import contextlib
import itertools
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from typing import Any

import pytest
import worker_rig
from moshi_rig import call, models
from openai import AsyncOpenAI
from openai.resources.realtime.realtime import AsyncRealtimeConnection
from openai.types.realtime import RealtimeSessionCreateRequest
from worker_rig import AGENT, FRAME, FakeGateway, RunningWorker, worker

from trunkline_runtime.contract import TICKET_HEADER
from trunkline_runtime.engine import FRAME_MS, SAMPLE_RATE
from trunkline_runtime.engine.moshi.engine import Knobs, MoshiEngine
from trunkline_runtime.engine.speech import Recogniser, SpeechEngine, Synthesiser

PATIENCE = 60.0  # generous: models are loaded, and the machine may be busy
_calls = itertools.count()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client would otherwise dial 127.0.0.1 through the proxy of whoever runs the tests."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextlib.asynccontextmanager
async def dialled(
    gateway: FakeGateway, running: RunningWorker, **settings: Any
) -> AsyncIterator[AsyncRealtimeConnection]:
    """A call through the client's own front door, that says first what a gateway would say."""
    ticket = gateway.ticket(f"call-{next(_calls)}")
    async with (
        asyncio.timeout(PATIENCE),
        AsyncOpenAI(api_key="k", base_url=f"http://127.0.0.1:{running.host.port}/v1") as client,
        client.realtime.connect(
            model=AGENT,
            extra_headers={TICKET_HEADER: ticket},
        ) as connection,
    ):
        await connection.send_raw(worker_rig.told(**settings))
        yield connection


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[AsyncRealtimeConnection]:
    async with (
        FakeGateway().serving() as gateway,
        worker(gateway) as running,
        dialled(gateway, running) as connection,
    ):
        yield connection


async def until(connection: AsyncRealtimeConnection, kind: str) -> tuple[Any, list[Any]]:
    """The next event of this type, and those that came before it."""
    before: list[Any] = []
    async for event in connection:
        assert event.type != "error" or kind == "error", event
        if event.type == kind:
            return event, before
        before.append(event)
    raise AssertionError(f"the worker closed before {kind}")


async def append(connection: AsyncRealtimeConnection, pcm: bytes) -> None:
    await connection.input_audio_buffer.append(audio=b64encode(pcm).decode())


def audio_of(events: list[Any]) -> bytes:
    deltas = [event.delta for event in events if event.type == "response.output_audio.delta"]
    return b"".join(map(b64decode, deltas))


# --- loopback --------------------------------------------------------------------------------------------


async def test_a_session_is_created_and_updated() -> None:
    async with echo() as connection:
        created, before = await until(connection, "session.created")
        assert before == []
        assert created.session.model == AGENT
        await connection.session.update(
            session={
                "type": "realtime",
                "instructions": "Be brief.",
                "tracing": "auto",
                "audio": {
                    "input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": 420}},
                    "output": {"voice": "marin"},
                },
            }
        )
        updated, _ = await until(connection, "session.updated")
        session = updated.session
        assert isinstance(session, RealtimeSessionCreateRequest)
        assert session.instructions == "Be brief."
        assert session.audio is not None
        assert session.audio.input is not None
        detection = session.audio.input.turn_detection
        assert detection is not None
        assert detection.type == "server_vad"
        assert detection.silence_duration_ms == 420


async def test_audio_comes_back_and_a_response_can_be_cancelled() -> None:
    async with echo() as connection:
        for _ in range(5):
            await append(connection, FRAME)
        created, _ = await until(connection, "response.created")
        last, before = await until(connection, "response.output_audio.delta")
        assert audio_of([*before, last]) == FRAME
        await connection.response.cancel()
        done, _ = await until(connection, "response.done")
        assert done.response.id == created.response.id
        assert done.response.status == "cancelled"
        assert done.response.status_details.reason == "client_cancelled"


async def test_a_turn_that_the_client_commits_is_answered_in_full() -> None:
    async with echo() as connection:
        await connection.session.update(
            session={"type": "realtime", "audio": {"input": {"turn_detection": None}}}
        )
        await append(connection, FRAME * 3)
        await connection.input_audio_buffer.commit()
        committed, _ = await until(connection, "input_audio_buffer.committed")
        done, before = await until(connection, "response.done")
        assert done.response.status == "completed"
        assert audio_of(before) == FRAME * 3
        await connection.conversation.item.retrieve(item_id=committed.item_id)
        retrieved, _ = await until(connection, "conversation.item.retrieved")
        assert (retrieved.item.id, retrieved.item.role) == (committed.item_id, "user")


async def test_what_the_client_does_wrong_is_told_and_the_call_goes_on() -> None:
    async with echo() as connection:
        await connection.input_audio_buffer.append(audio="not base64", event_id="mine")
        told, _ = await until(connection, "error")
        assert told.error.type == "invalid_request_error"
        assert told.error.event_id == "mine"
        await append(connection, FRAME)
        await until(connection, "response.output_audio.delta")


async def test_the_worker_sees_the_client_hang_up() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        async with dialled(gateway, running) as connection:
            await until(connection, "session.created")
            await gateway.until(lambda: gateway.free["busy"] == 1)
        await gateway.until(lambda: gateway.free["busy"] == 0)


# --- speech ----------------------------------------------------------------------------------------------


async def speak(connection: AsyncRealtimeConnection, pcm: bytes) -> None:
    """Says the audio at the pace of speech, then is silent as a microphone is, until cancelled."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    for frame in itertools.count():
        await asyncio.sleep(began + (frame + 1) * FRAME_MS / 1000 - loop.time())
        chunk = pcm[frame * len(FRAME) : (frame + 1) * len(FRAME)]
        await append(connection, chunk.ljust(len(FRAME), b"\0"))


@contextlib.asynccontextmanager
async def speaking(connection: AsyncRealtimeConnection, pcm: bytes) -> AsyncIterator[None]:
    task = asyncio.create_task(speak(connection, pcm))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_spoken_conversation() -> None:
    question = Synthesiser()("My number is four, seven, one.")
    replies = [{"match": r"number is (.+)", "say": "I heard that your number is {1}. " * 3}]
    async with (
        FakeGateway().serving() as gateway,
        worker(gateway, engine=SpeechEngine(slots=2)) as running,
        dialled(gateway, running, greeting="Hello there.", replies=replies) as connection,
    ):
        await until(connection, "session.created")
        done, _ = await until(connection, "response.done")
        assert done.response.output[0].content[0].transcript == "Hello there."
        async with speaking(connection, question):
            started, _ = await until(connection, "input_audio_buffer.speech_started")
            heard, _ = await until(
                connection, "conversation.item.input_audio_transcription.completed"
            )
            assert heard.item_id == started.item_id
            assert "number" in heard.transcript.lower()
            await until(connection, "response.created")
            # Two seconds of the answer, then the client has heard enough.
            answer = b""
            while len(answer) < 2 * 2 * SAMPLE_RATE:
                delta, _ = await until(connection, "response.output_audio.delta")
                answer += b64decode(delta.delta)
            await connection.response.cancel()
            done, _ = await until(connection, "response.done")
        assert done.response.status_details.reason == "client_cancelled"
        assert "number" in Recogniser()(answer).lower()
        await connection.conversation.item.retrieve(item_id=heard.item_id)
        retrieved, _ = await until(connection, "conversation.item.retrieved")
        assert retrieved.item.content[0].transcript == heard.transcript


# --- moshi -----------------------------------------------------------------------------------------------

WORDS = 2
HEARD = "conversation.item.input_audio_transcription.delta"
COMPLETED = "conversation.item.input_audio_transcription.completed"
SAID = "response.output_audio_transcript.delta"


def told(events: list[Any], kind: str) -> list[Any]:
    return [event for event in events if event.type == kind]


async def test_what_caller_and_moshi_say_arrives_while_they_say_it() -> None:
    """Deltas of both transcripts; tiny models say nothing sensible, but they say it in words."""
    noise = itertools.cycle(frame for number in range(8) for frame in call(number))
    async with (
        FakeGateway().serving() as gateway,
        worker(gateway, engine=MoshiEngine(models, Knobs(slots=2, measure=False))) as running,
        dialled(gateway, running) as connection,
    ):
        await connection.session.update(
            session={
                "type": "realtime",
                "audio": {"input": {"transcription": {"model": AGENT}, "turn_detection": None}},
            }
        )
        seen: list[Any] = []
        async with speaking(connection, b"".join(itertools.islice(noise, 750))):
            async for event in connection:
                seen.append(event)
                if min(len(told(seen, HEARD)), len(told(seen, SAID))) >= WORDS:
                    break
            await connection.input_audio_buffer.commit()
            for kind in ("input_audio_buffer.committed", COMPLETED, "response.done"):
                if kind == "response.done":
                    await connection.response.cancel()
                event, before = await until(connection, kind)
                seen += [*before, event]
    (committed,) = told(seen, "input_audio_buffer.committed")
    (completed,) = told(seen, COMPLETED)
    heard = told(seen, HEARD)
    assert {event.item_id for event in heard} == {committed.item_id}
    assert "".join(event.delta for event in heard) == completed.transcript
    assert len(completed.transcript.split()) >= WORDS
    done = told(seen, "response.done")[-1].response
    said = "".join(event.delta for event in told(seen, SAID) if event.response_id == done.id)
    assert said
    assert done.output[0].content[0].transcript == said
