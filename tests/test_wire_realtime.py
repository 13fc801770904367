"""The Realtime protocol without I/O: what each client message asks, what each engine event tells, in which order.

Every message is checked against the types of the `openai` package and against the grammar of the order.
"""

import itertools
import json
import typing
from base64 import b64decode, b64encode
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.realtime import RealtimeServerEvent

from trunkline_runtime.contract import MAX_CALL_MESSAGE_BYTES
from trunkline_runtime.engine import (
    FRAME_BYTES,
    Ended,
    Event,
    Failed,
    Heard,
    HeardPart,
    ReplyAudio,
    ReplyEnded,
    ReplyStarted,
    ReplyText,
    SpeechStarted,
    SpeechStopped,
    TurnDetection,
)
from trunkline_runtime.wire.realtime import RealtimeSession
from trunkline_runtime.wire.realtime_items import MAX_ITEM_CHARS, MAX_ITEMS, MAX_PARTS
from trunkline_runtime.wire.session import (
    Cancel,
    Clear,
    Command,
    Commit,
    Configure,
    Hear,
    Message,
    Received,
    Respond,
)

Json = dict[str, Any]

# --- what a stock client accepts -------------------------------------------------------------------------


def models() -> dict[str, Any]:
    """The openai package's model of each server event, by the event's type."""
    union = typing.get_args(RealtimeServerEvent)[0]
    by_type = {}
    for model in typing.get_args(union):
        (name,) = typing.get_args(model.model_fields["type"].annotation)
        by_type[name] = model
    return by_type


MODELS = models()

# The order within a turn, by its item: state → event → state. A client's own item takes the short way.
TURN = {
    "absent": {
        "input_audio_buffer.speech_started": "speaking",
        "input_audio_buffer.committed": "committed",  # by the client, without voice activity
        "conversation.item.added": "added",  # a client's own item
        "conversation.item.input_audio_transcription.delta": "speaking",  # without voice activity
    },
    "speaking": {
        "conversation.item.input_audio_transcription.delta": "speaking",
        "input_audio_buffer.speech_stopped": "stopped",
        "input_audio_buffer.committed": "committed",
    },
    "stopped": {"input_audio_buffer.committed": "committed"},
    "committed": {"conversation.item.added": "added"},
    "added": {"conversation.item.done": "done"},
    "done": {
        "conversation.item.input_audio_transcription.delta": "done",
        "conversation.item.input_audio_transcription.completed": "heard",
    },
    "heard": {},
}

# The order within a response; one is open at a time.
RESPONSE = {
    "none": {"response.created": "created"},
    "created": {"response.output_item.added": "output"},
    "output": {"conversation.item.added": "item"},
    "item": {"response.content_part.added": "speaking"},
    "speaking": {
        "response.output_audio_transcript.delta": "speaking",
        "response.output_audio.delta": "speaking",
        "response.output_audio.done": "audio done",
    },
    "audio done": {"response.output_audio_transcript.done": "text done"},
    "text done": {"response.content_part.done": "part done"},
    "part done": {"response.output_item.done": "output done"},
    "output done": {"conversation.item.done": "item done"},
    "item done": {"response.done": "none"},
}

ANYWHERE = {
    "session.updated",
    "error",
    "input_audio_buffer.cleared",
    "conversation.item.retrieved",
    "conversation.item.truncated",
    "conversation.item.deleted",
}


class Client:
    """A session with its client's reading of it: fails on what a stock client could not take."""

    def __init__(self) -> None:
        count = itertools.count(1)
        self.session = RealtimeSession("default/ann", lambda kind: f"{kind}_{next(count)}")
        self.turns: dict[str, str] = {}
        self.response = "none"
        self.response_ids: Json = {}
        self.event_ids: set[str] = set()
        (created,) = self.read(self.session.opening(), first=True)
        assert created["type"] == "session.created"

    def asks(self, message: Json | str) -> tuple[list[Command], list[Json]]:
        text = message if isinstance(message, str) else json.dumps(message)
        received = self.session.receive(text)
        assert isinstance(received, Received)
        return list(received.commands), self.read(received.messages)

    def is_told(self, *events: Event) -> list[Json]:
        return [message for event in events for message in self.read(self.session.send(event))]

    def read(self, texts: Iterable[Message], first: bool = False) -> list[Json]:
        messages = [json.loads(text) for text in texts]
        for message in messages:
            MODELS[message["type"]].model_validate(message)
            assert message["event_id"] not in self.event_ids
            self.event_ids.add(message["event_id"])
            if not first:
                self.step(message)
        return messages

    def step(self, message: Json) -> None:
        kind = message["type"]
        if kind in ANYWHERE:
            return
        item = message.get("item") or {}
        if kind.startswith("response.") or (
            item.get("role") == "assistant" and self.opening_item(item)
        ):
            self.response = RESPONSE[self.response][kind]
            self.same_response(message)
            return
        item_id = message.get("item_id") or item["id"]
        self.turns[item_id] = TURN[self.turns.get(item_id, "absent")][kind]

    def opening_item(self, item: Json) -> bool:
        """Whether this assistant item is the open response's own and not one that the client made."""
        return bool(self.response != "none" and item["id"] == self.response_ids.get("item_id"))

    def same_response(self, message: Json) -> None:
        """All events of a response name the same response and item, and each names what it must."""
        if message["type"] == "response.created":
            self.response_ids = {"response_id": message["response"]["id"]}
            return
        named: Json = {key: message[key] for key in ("response_id", "item_id") if key in message}
        if "response" in message:
            named["response_id"] = message["response"]["id"]
        if "item" in message:
            named["item_id"] = message["item"]["id"]
        assert named
        self.response_ids = {**named, **self.response_ids}
        assert named.items() <= self.response_ids.items()


def append(pcm: bytes) -> Json:
    return {"type": "input_audio_buffer.append", "audio": b64encode(pcm).decode()}


def update(**session: object) -> Json:
    return {"type": "session.update", "session": {"type": "realtime", **session}}


def detection(value: object) -> Json:
    return update(audio={"input": {"turn_detection": value}})


def kinds(messages: list[Json]) -> list[str]:
    return [message["type"] for message in messages]


def error(client: Client, message: Json | str) -> Json:
    """The error that answers the message, which asks nothing of the engine."""
    commands, messages = client.asks(message)
    assert commands == []
    assert kinds(messages) == ["error"]
    found: Json = messages[0]["error"]
    return found


# --- any sequence keeps the order -----------------------------------------------------------------------------

# Ids that are made for the caller's own turns cannot be guessed before they are told.
own_ids = st.sampled_from([f"mine_{n}" for n in range(4, 12)])
item_ids = st.sampled_from([f"{kind}_{n}" for n in range(4, 12) for kind in ("item", "mine")])
texts = st.text(max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2)
)
parts = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["input_text", "input_audio", "output_text", "output_audio"])
        | values
    },
    optional={"text": texts | values, "transcript": texts, "audio": texts},
)
items = st.fixed_dictionaries(
    {
        "type": st.just("message"),
        "role": st.sampled_from(["user", "assistant", "system"]),
        "content": st.lists(parts, max_size=2),
    },
    optional={"id": own_ids | values},
)
detections = st.fixed_dictionaries(
    {"type": st.sampled_from(["server_vad", "semantic_vad"])},
    optional={
        "threshold": st.floats(0, 1) | values,
        "silence_duration_ms": st.integers(0, 900) | values,
        "create_response": st.booleans() | values,
        "eagerness": st.sampled_from(["low", "medium", "high", "auto"]) | values,
    },
)
formats = st.sampled_from([{"type": "audio/pcm", "rate": 24000}, {"type": "audio/pcmu"}]) | values
sessions = st.fixed_dictionaries(
    {},
    optional={
        "audio": st.fixed_dictionaries(
            {},
            optional={
                "input": st.fixed_dictionaries(
                    {},
                    optional={
                        "turn_detection": st.none() | detections | values,
                        "transcription": st.none() | values,
                        "format": formats,
                    },
                )
                | values,
                "output": values,
            },
        )
        | values,
        "instructions": texts | values,
        "tools": values,
        "model": texts,
    },
)


def message(type_: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    """A client event whose fields are right, or missing, or anything."""
    either = {key: field | values for key, field in fields.items()}
    return st.one_of(
        st.fixed_dictionaries({"type": st.just(type_), **fields}),
        st.fixed_dictionaries(
            {"type": st.just(type_)}, optional={**either, "event_id": texts | values}
        ),
    )


client_messages: st.SearchStrategy[Json | str] = st.one_of(
    st.binary(max_size=6).map(append),
    st.just(append(bytes(2 * FRAME_BYTES))),
    message("input_audio_buffer.append", audio=texts),
    message("input_audio_buffer.commit"),
    message("input_audio_buffer.clear"),
    message("session.update", session=sessions),
    message(
        "response.create", response=st.fixed_dictionaries({}, optional={"instructions": texts})
    ),
    message("response.cancel", response_id=st.sampled_from(["resp_4", "resp_5"])),
    message("conversation.item.create", item=items),
    message("conversation.item.retrieve", item_id=item_ids),
    message("conversation.item.delete", item_id=item_ids),
    message(
        "conversation.item.truncate",
        item_id=item_ids,
        content_index=st.just(0),
        audio_end_ms=st.integers(-1, 900),
    ),
    texts,
    values.map(json.dumps),
    st.dictionaries(texts | st.just("type"), values, max_size=3),
)

events: st.SearchStrategy[Event] = st.one_of(
    st.builds(SpeechStarted, st.integers(0, 9)),
    st.builds(SpeechStopped, st.integers(0, 9)),
    st.builds(HeardPart, texts),
    st.builds(Heard, texts, st.floats(0, 60)),
    st.just(ReplyStarted()),
    st.builds(ReplyText, texts),
    st.binary(max_size=4).map(lambda half: ReplyAudio(half + half)),
    st.builds(ReplyEnded, st.sampled_from(Ended)),
    st.just(Failed("gone")),
)


# Flat-mapped, so that an engine's event is as likely as any of the many client messages together.
steps_of_both = st.sampled_from([client_messages, events]).flatmap(lambda strategy: strategy)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps_of_both, min_size=15, max_size=40))
def test_any_sequence_keeps_the_order_and_the_types(steps: list[Json | str | Event]) -> None:
    client = Client()
    for step in steps:
        if isinstance(step, dict | str):
            _, messages = client.asks(step)
            assert len(messages) <= 3
        else:
            client.is_told(step)
    assert repr(client.session).startswith("<RealtimeSession")


@settings(max_examples=60, deadline=None)
@given(st.lists(client_messages, max_size=20))
def test_every_client_message_is_acted_on_or_answered(steps: list[Json | str]) -> None:
    client = Client()
    for step in steps:
        commands, messages = client.asks(step)
        silent = isinstance(step, dict) and step.get("type") == "input_audio_buffer.append"
        assert commands or messages or silent


# --- a call as stock clients see it -----------------------------------------------------------------------------


def test_a_turn_and_its_reply() -> None:
    client = Client()
    messages = client.is_told(
        SpeechStarted(120),
        SpeechStopped(1900),
        Heard("what is the time", 1.6),
        ReplyStarted(),
        ReplyText("It is "),
        ReplyAudio(b"\x01\x00" * 3),
        ReplyText("noon."),
        ReplyAudio(b"\x02\x00" * 3),
        ReplyEnded(Ended.COMPLETED),
    )
    assert kinds(messages) == [
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
        "conversation.item.input_audio_transcription.completed",
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        "response.output_audio_transcript.delta",
        "response.output_audio.delta",
        "response.output_audio_transcript.delta",
        "response.output_audio.delta",
        "response.output_audio.done",
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "response.output_item.done",
        "conversation.item.done",
        "response.done",
    ]
    assert messages[0]["audio_start_ms"] == 120
    assert messages[1]["audio_end_ms"] == 1900
    assert messages[5]["transcript"] == "what is the time"
    assert messages[5]["usage"] == {"type": "duration", "seconds": 1.6}
    asked, answered = messages[0]["item_id"], messages[7]["item"]["id"]
    assert [messages[at]["previous_item_id"] for at in (3, 8, 18)] == [None, asked, asked]
    assert messages[15]["transcript"] == "It is noon."
    done = messages[-1]["response"]
    assert done["status"] == "completed"
    assert done["output"][0]["id"] == answered
    assert done["output"][0]["content"] == [{"type": "output_audio", "transcript": "It is noon."}]


@pytest.mark.parametrize(
    ("how", "status", "details"),
    [
        (Ended.COMPLETED, "completed", None),
        (Ended.INTERRUPTED, "cancelled", {"type": "cancelled", "reason": "turn_detected"}),
        (Ended.CANCELLED, "cancelled", {"type": "cancelled", "reason": "client_cancelled"}),
    ],
)
def test_how_a_reply_ended(how: Ended, status: str, details: Json | None) -> None:
    client = Client()
    *_, item_done, done = client.is_told(ReplyStarted(), ReplyText("Well"), ReplyEnded(how))
    assert done["response"]["status"] == status
    assert done["response"]["status_details"] == details
    assert item_done["item"]["status"] == ("completed" if how is Ended.COMPLETED else "incomplete")


def test_a_failed_reply_tells_the_caller_nothing_of_the_inside() -> None:
    client = Client()
    *_, done = client.is_told(
        ReplyStarted(), ReplyEnded(Ended.FAILED, "/models/voice.onnx is gone")
    )
    assert done["response"]["status"] == "failed"
    assert "onnx" not in json.dumps(done)


def test_a_failed_conversation_ends_its_reply_and_says_so() -> None:
    client = Client()
    client.is_told(ReplyStarted())
    *_, done, failure = client.is_told(Failed("out of memory"))
    assert done["response"]["status"] == "failed"
    assert failure["error"]["type"] == "server_error"
    assert "call again" in failure["error"]["message"]


def test_audio_goes_both_ways_unchanged() -> None:
    client = Client()
    pcm = bytes(range(256)) * 15
    assert client.asks(append(pcm)) == ([Hear(pcm)], [])
    *_, delta = client.is_told(ReplyStarted(), ReplyAudio(pcm))
    assert b64decode(delta["delta"]) == pcm


def test_long_audio_is_split_into_messages_that_a_call_may_carry() -> None:
    client = Client()
    client.is_told(ReplyStarted())
    pcm = bytes(range(250)) * 4000  # 20 s
    texts = client.session.send(ReplyAudio(pcm))
    assert max(map(len, texts)) < MAX_CALL_MESSAGE_BYTES / 4
    assert b"".join(b64decode(message["delta"]) for message in client.read(texts)) == pcm


def test_what_comes_after_a_reply_has_ended_is_not_told() -> None:
    client = Client()
    client.is_told(ReplyStarted(), ReplyEnded(Ended.CANCELLED))
    assert client.is_told(ReplyAudio(b"\0\0"), ReplyText("x"), ReplyEnded(Ended.COMPLETED)) == []


# --- the caller's turn ------------------------------------------------------------------------------------------


def test_the_client_commits_its_own_turn() -> None:
    client = Client()
    assert client.asks(detection(None))[0] == [Configure(TurnDetection(enabled=False))]
    client.asks(append(bytes(2 * FRAME_BYTES)))
    commands, messages = client.asks({"type": "input_audio_buffer.commit"})
    assert commands == [Commit()]
    assert kinds(messages) == [
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
    ]
    (heard,) = client.is_told(Heard("hello", 0.2))
    assert heard["item_id"] == messages[0]["item_id"]


def test_a_commit_needs_audio() -> None:
    client = Client()
    client.asks(append(bytes(FRAME_BYTES)))
    refused = error(client, {"type": "input_audio_buffer.commit"})
    assert refused["code"] == "input_audio_buffer_commit_empty"
    assert "100 ms" in refused["message"]


def test_a_commit_while_the_caller_speaks_ends_that_turn_once() -> None:
    client = Client()
    client.asks(append(bytes(2 * FRAME_BYTES)))
    (started,) = client.is_told(SpeechStarted(0))
    _, messages = client.asks({"type": "input_audio_buffer.commit"})
    assert messages[0]["item_id"] == started["item_id"]
    assert client.is_told(SpeechStopped(160)) == []  # it was on its way


def test_clear_forgets_the_turn() -> None:
    client = Client()
    client.asks(append(bytes(2 * FRAME_BYTES)))
    client.is_told(SpeechStarted(0))
    commands, messages = client.asks({"type": "input_audio_buffer.clear"})
    assert commands == [Clear()]
    assert kinds(messages) == ["input_audio_buffer.cleared"]
    assert client.is_told(SpeechStopped(160), Heard("no", 1.0)) == []
    assert error(client, {"type": "input_audio_buffer.commit"})["code"] == (
        "input_audio_buffer_commit_empty"
    )


def test_a_turn_begins_once() -> None:
    client = Client()
    client.is_told(SpeechStarted(0))
    assert client.is_told(SpeechStarted(1)) == []


def test_a_reply_that_begins_ends_the_one_before() -> None:
    client = Client()
    messages = client.is_told(ReplyStarted(), ReplyStarted())
    assert kinds(messages).count("response.done") == 1
    assert (
        kinds(messages).index("response.done") < kinds(messages[5:]).index("response.created") + 5
    )


def test_turns_are_heard_in_the_order_in_which_they_ended() -> None:
    client = Client()
    first, *_ = client.is_told(SpeechStarted(0), SpeechStopped(1))
    second, *_ = client.is_told(SpeechStarted(2), SpeechStopped(3))
    heard = client.is_told(Heard("one", 1.0), Heard("two", 1.0), Heard("nobody's", 1.0))
    assert [(m["item_id"], m["transcript"]) for m in heard] == [
        (first["item_id"], "one"),
        (second["item_id"], "two"),
    ]


def test_words_are_told_while_the_turn_goes_on_and_belong_to_its_item() -> None:
    client = Client()
    told = client.is_told(SpeechStarted(0), HeardPart("what"), HeardPart(" is"), SpeechStopped(1))
    started, *deltas = told[:3]
    assert kinds(deltas) == ["conversation.item.input_audio_transcription.delta"] * 2
    assert {message["item_id"] for message in deltas} == {started["item_id"]}
    (completed,) = client.is_told(Heard("what is", 1.0))
    assert "".join(message["delta"] for message in deltas) == completed["transcript"]


def test_words_that_come_after_the_clients_commit_belong_to_what_it_committed() -> None:
    client = Client()
    client.asks(append(bytes(2 * FRAME_BYTES)))
    client.is_told(SpeechStarted(0))
    _, (committed, *_) = client.asks({"type": "input_audio_buffer.commit"})
    first, heard = client.is_told(HeardPart("late"), Heard("late", 1.0))
    assert first["item_id"] == heard["item_id"] == committed["item_id"]


def test_without_turn_detection_the_first_word_names_the_item_that_the_commit_makes() -> None:
    client = Client()
    client.asks(detection(None))
    client.asks(append(bytes(2 * FRAME_BYTES)))
    first, second = client.is_told(HeardPart("one"), HeardPart(" two"))
    _, (committed, *_) = client.asks({"type": "input_audio_buffer.commit"})
    assert first["item_id"] == second["item_id"] == committed["item_id"]


def test_a_word_of_a_turn_that_was_cleared_on_its_way_is_not_told() -> None:
    client = Client()
    client.is_told(SpeechStarted(0))
    client.asks({"type": "input_audio_buffer.clear"})
    assert client.is_told(HeardPart("no")) == []
    assert kinds(client.is_told(SpeechStarted(2))) == ["input_audio_buffer.speech_started"]


def test_a_client_that_wants_no_transcription_gets_none() -> None:
    client = Client()
    _, (updated,) = client.asks(update(audio={"input": {"transcription": None}}))
    assert updated["session"]["audio"]["input"]["transcription"] is None
    told = client.is_told(SpeechStarted(0), HeardPart("a"), SpeechStopped(1), Heard("a", 1.0))
    assert not [kind for kind in kinds(told) if "transcription" in kind]
    client.asks(update(audio={"input": {"transcription": {"model": "any"}}}))
    told = client.is_told(SpeechStarted(2), HeardPart("b"), SpeechStopped(3), Heard("b", 1.0))
    assert len([kind for kind in kinds(told) if "transcription" in kind]) == 2


def test_a_turn_that_was_cleared_on_its_way_takes_no_other_turns_words() -> None:
    client = Client()
    first, *_ = client.is_told(SpeechStarted(0), SpeechStopped(1))
    client.is_told(SpeechStarted(2))
    client.asks({"type": "input_audio_buffer.clear"})
    client.is_told(SpeechStopped(3))
    third, *_ = client.is_told(SpeechStarted(4), SpeechStopped(5))
    heard = client.is_told(Heard("one", 1.0), Heard("two", 1.0), Heard("three", 1.0))
    assert [(m["item_id"], m["transcript"]) for m in heard] == [
        (first["item_id"], "one"),
        (third["item_id"], "three"),
    ]


# --- settings ----------------------------------------------------------------------------------------------------


def test_turn_detection_merges_while_its_type_stays() -> None:
    client = Client()
    client.asks(detection({"type": "server_vad", "threshold": 0.7, "interrupt_response": False}))
    commands, (updated,) = client.asks(
        detection({"type": "server_vad", "silence_duration_ms": 450})
    )
    assert commands == [
        Configure(TurnDetection(threshold=0.7, interrupt_response=False, silence_ms=450))
    ]
    told = updated["session"]["audio"]["input"]["turn_detection"]
    assert (told["threshold"], told["silence_duration_ms"]) == (0.7, 450)
    commands, _ = client.asks(detection({"type": "semantic_vad"}))
    assert commands == [Configure(TurnDetection(silence_ms=500))]


@pytest.mark.parametrize(
    ("eagerness", "silence_ms"), [("low", 900), ("medium", 500), ("auto", 500), ("high", 300)]
)
def test_eagerness_becomes_a_silence(eagerness: str, silence_ms: int) -> None:
    client = Client()
    client.asks(detection(None))
    commands, (updated,) = client.asks(detection({"type": "semantic_vad", "eagerness": eagerness}))
    assert commands == [Configure(TurnDetection(silence_ms=silence_ms))]
    told = updated["session"]["audio"]["input"]["turn_detection"]
    assert (told["type"], told["eagerness"]) == ("semantic_vad", eagerness)


def test_no_turn_detection_is_read_back_as_null_and_can_be_turned_on_again() -> None:
    client = Client()
    _, (updated,) = client.asks(detection(None))
    assert updated["session"]["audio"]["input"]["turn_detection"] is None
    commands, _ = client.asks(detection({"type": "server_vad"}))
    assert commands == [Configure(TurnDetection())]


def test_settings_of_known_clients_that_do_not_matter_are_ignored_and_not_kept() -> None:
    client = Client()
    _, (before,) = client.asks(update())
    commands, (after,) = client.asks(
        update(
            model="gpt-realtime-2.1",
            tracing="auto",
            tools=[{"type": "function", "name": "f"}],
            output_modalities=["audio"],
            audio={
                "input": {
                    "format": {"type": "audio/pcm", "rate": 24000},
                    "transcription": {"model": "gpt-4o-transcribe"},
                    "noise_reduction": {"type": "near_field"},
                },
                "output": {"voice": "marin", "speed": 1.2},
            },
        )
    )
    assert commands == []
    assert after["session"] == before["session"]


def test_instructions_are_read_back() -> None:
    _, (updated,) = Client().asks(update(instructions="Be brief."))
    assert updated["session"]["instructions"] == "Be brief."


@pytest.mark.parametrize(
    ("session", "param", "says"),
    [
        (
            {"audio": {"input": {"format": {"type": "audio/pcmu"}}}},
            "session.audio.input.format",
            "24000",
        ),
        (
            {"audio": {"output": {"format": {"type": "audio/pcm", "rate": 16000}}}},
            "session.audio.output.format",
            "24000",
        ),
        ({"output_modalities": ["text"]}, "session.output_modalities", '["audio"]'),
        ({"type": "transcription"}, "session.type", "realtime"),
        ({"audio": []}, "session.audio", "object"),
        ({"instructions": 5}, "session.instructions", "string"),
        (
            {"audio": {"input": {"transcription": "whisper"}}},
            "session.audio.input.transcription",
            "object",
        ),
        (
            {"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 1.5}}}},
            "turn_detection.threshold",
            "0 to 1",
        ),
        (
            {
                "audio": {
                    "input": {"turn_detection": {"type": "server_vad", "threshold": float("nan")}}
                }
            },
            "turn_detection.threshold",
            "0 to 1",
        ),
        (
            {"audio": {"input": {"turn_detection": {"type": "ears"}}}},
            "session.audio.input.turn_detection",
            "semantic_vad",
        ),
        (
            {"audio": {"input": {"turn_detection": {"type": "semantic_vad", "eagerness": "much"}}}},
            "session.audio.input.turn_detection.eagerness",
            "medium",
        ),
    ],
)
def test_a_setting_that_cannot_be_had_is_refused_and_nothing_of_its_update_taken(
    session: Json, param: str, says: str
) -> None:
    client = Client()
    refused = error(client, update(**{"instructions": "Shout.", **session}))
    assert refused["param"] == param
    assert says in refused["message"]
    _, (updated,) = client.asks(update())
    assert updated["session"]["instructions"] == ""


# --- replies on request -------------------------------------------------------------------------------------------


def test_a_reply_on_request_with_instructions_of_its_own() -> None:
    client = Client()
    assert client.asks({"type": "response.create"})[0] == [Respond(None)]
    wanted = {"type": "response.create", "response": {"instructions": "Greet."}}
    assert client.asks(wanted) == ([Respond("Greet.")], [])


def test_one_reply_at_a_time() -> None:
    client = Client()
    client.is_told(ReplyStarted())
    refused = error(client, {"type": "response.create"})
    assert refused["code"] == "conversation_already_has_active_response"


def test_cancel_ends_the_open_reply_and_no_other() -> None:
    client = Client()
    created, *_ = client.is_told(ReplyStarted())
    open_id = created["response"]["id"]
    assert error(client, {"type": "response.cancel", "response_id": "resp_x"})["code"] == (
        "response_cancel_not_active"
    )
    wanted = {"type": "response.cancel", "response_id": open_id}
    assert client.asks(wanted) == ([Cancel()], [])


def test_cancel_reaches_a_reply_that_was_asked_for_and_has_not_begun() -> None:
    client = Client()
    client.asks({"type": "response.create"})
    commands, (answer,) = client.asks({"type": "response.cancel"})
    assert commands == [Cancel()]
    assert answer["error"]["message"].startswith("Cancellation failed")


# --- items -------------------------------------------------------------------------------------------------------


def own_item(**fields: object) -> Json:
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    return {"type": "conversation.item.create", "item": {**item, **fields}}


def test_items_can_be_retrieved_with_what_was_heard_and_said() -> None:
    client = Client()
    started, *_ = client.is_told(SpeechStarted(0), SpeechStopped(9), Heard("two and two", 1.0))
    _, output, *_ = client.is_told(ReplyStarted(), ReplyText("Four."), ReplyEnded(Ended.COMPLETED))
    for item_id, transcript in (
        (started["item_id"], "two and two"),
        (output["item"]["id"], "Four."),
    ):
        _, (answer,) = client.asks({"type": "conversation.item.retrieve", "item_id": item_id})
        assert answer["type"] == "conversation.item.retrieved"
        assert answer["item"]["content"][0]["transcript"] == transcript


def test_a_clients_own_item_is_kept_without_its_audio() -> None:
    client = Client()
    sound = {"type": "input_audio", "audio": "AAAA", "transcript": "hm"}
    _, (added, _) = client.asks(own_item(id="mine", content=[sound]))
    assert added["item"]["id"] == "mine"
    assert added["item"]["content"] == [{"type": "input_audio", "transcript": "hm"}]
    assert error(client, own_item(id="mine"))["code"] == "item_create_duplicate_item_id"


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"role": "nobody"},
        {"role": ["user"]},
        {"content": None},
        {"content": ["hi"]},
        {"content": [{"type": "input_image"}]},
        {"content": [{"type": ["input_text"]}]},
        {"content": [{"type": "input_text", "text": 5}]},
        {"content": [{"type": "input_text", "text": "x" * (MAX_ITEM_CHARS + 1)}]},
        {"content": [{"type": "input_text", "text": "x"}] * (MAX_PARTS + 1)},
        {"id": 5},
        {"id": "x" * 65},
    ],
)
def test_an_item_that_cannot_be_kept_is_refused(fields: Json) -> None:
    assert error(Client(), own_item(**fields))["type"] == "invalid_request_error"


def test_truncate_forgets_words_that_the_caller_did_not_hear() -> None:
    client = Client()
    _, output, *_ = client.is_told(
        ReplyStarted(), ReplyText("A long story."), ReplyEnded(Ended.INTERRUPTED)
    )
    item_id = output["item"]["id"]
    cut = {
        "type": "conversation.item.truncate",
        "item_id": item_id,
        "content_index": 0,
        "audio_end_ms": 420,
    }
    _, (answer,) = client.asks(cut)
    assert (answer["item_id"], answer["audio_end_ms"]) == (item_id, 420)
    _, (item,) = client.asks({"type": "conversation.item.retrieve", "item_id": item_id})
    assert item["item"]["content"][0]["transcript"] == ""
    for wrong in ({"audio_end_ms": -1}, {"content_index": 1}, {"audio_end_ms": True}):
        assert error(client, {**cut, **wrong})["type"] == "invalid_request_error"


def test_delete_and_what_it_leaves() -> None:
    client = Client()
    client.asks(own_item(id="first"))
    client.asks(own_item(id="second"))
    gone = {"type": "conversation.item.delete", "item_id": "second"}
    assert kinds(client.asks(gone)[1]) == ["conversation.item.deleted"]
    assert error(client, gone)["code"] == "item_delete_invalid_item_id"
    _, (added, _) = client.asks(own_item(id="third"))
    assert added["previous_item_id"] == "first"


def test_only_the_newest_items_are_remembered() -> None:
    client = Client()
    for n in range(MAX_ITEMS + 1):
        client.asks(own_item(id=f"mine_{n}"))
    missing = error(client, {"type": "conversation.item.retrieve", "item_id": "mine_0"})
    assert missing["code"] == "item_retrieve_invalid_item_id"
    assert str(MAX_ITEMS) in missing["message"]
    _, (found,) = client.asks({"type": "conversation.item.retrieve", "item_id": "mine_1"})
    assert found["item"]["id"] == "mine_1"


# --- what is no message -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "[1]",
        "{}",
        '{"type": 5}',
        "[" * 100_000,
        '{"type":"input_audio_buffer.append"}',
        '{"type":"input_audio_buffer.append","audio":7}',
        '{"type":"input_audio_buffer.append","audio":"*"}',
        '{"type":"input_audio_buffer.append","audio":"AAA"}',
        '{"type":"input_audio_buffer.append","audio":"AA=="}',
        '{"type":"input_audio_buffer.append","audio":"AAAA"}',
        '{"type":"input_audio_buffer.append","audio":"\\u00e9\\ud800AA"}',
        '{"type":"session.update"}',
        '{"type":"conversation.item.retrieve"}',
        '{"type":"conversation.item.truncate","item_id":"x"}',
    ],
)
def test_what_is_no_message_is_an_error_and_the_session_goes_on(text: str) -> None:
    client = Client()
    assert error(client, text)["type"] == "invalid_request_error"
    assert client.asks(append(b"\0\0"))[0] == [Hear(b"\0\0")]


def test_an_unknown_event_is_named_with_the_clients_own_event_id() -> None:
    refused = error(Client(), {"type": "output_audio_buffer.clear", "event_id": "mine-7"})
    assert refused["event_id"] == "mine-7"
    assert "output_audio_buffer.clear" in refused["message"]
    assert "session.update" in refused["message"]
