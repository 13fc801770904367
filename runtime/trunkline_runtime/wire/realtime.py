"""OpenAI Realtime (GA) without I/O: a client's messages to commands, an engine's events to messages.

The worker feeds `RealtimeSession.receive` with text frames, gives its commands to the engine's
`Conversation` and sends its messages; each engine event goes through `send`. What goes out always keeps
the order that stock clients need:

    session.created, then in any number
      turn:      speech_started → speech_stopped → committed → item.added → item.done → transcription
      response:  created → output_item.added → item.added → content_part.added
                 → (output_audio_transcript.delta | output_audio.delta)*
                 → output_audio.done → output_audio_transcript.done → content_part.done
                 → output_item.done → item.done → response.done
      and answers to the client, which may stand anywhere between.

Nothing that a client sends raises: what cannot be acted on is answered with an `error` event, and the
session goes on. Source: https://platform.openai.com/docs/api-reference/realtime and the types of the
`openai` package.
"""

import json
from binascii import Error as NotBase64
from binascii import a2b_base64, b2a_base64
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from trunkline_runtime.engine import (
    SAMPLE_RATE,
    Ended,
    Event,
    Failed,
    Heard,
    ReplyAudio,
    ReplyEnded,
    ReplyStarted,
    ReplyText,
    SpeechStarted,
    SpeechStopped,
    TurnDetection,
)
from trunkline_runtime.wire.realtime_items import (
    Items,
    agent_item,
    caller_item,
    client_item,
    response,
)
from trunkline_runtime.wire.realtime_settings import (
    Object,
    Refused,
    SessionSettings,
    as_session,
    optional,
    refuse_modalities,
    required,
    updated,
)

NewId = Callable[[str], str]
"""Makes an id that no other has, `item_…` from "item"; plain letters, digits, `_` and `-`."""

MIN_COMMIT_MS: Final = 100  # as OpenAI: less holds no word, and recognisers invent one
MAX_DELTA_BYTES: Final = SAMPLE_RATE * 2  # 1 s in one message: an eighth of MAX_CALL_MESSAGE_BYTES
MAX_UNHEARD: Final = 32  # turns committed and not yet recognised


@dataclass(frozen=True, slots=True)
class Configure:
    turn: TurnDetection


@dataclass(frozen=True, slots=True)
class Hear:
    pcm: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    pass


@dataclass(frozen=True, slots=True)
class Clear:
    pass


@dataclass(frozen=True, slots=True)
class Respond:
    instructions: str | None


@dataclass(frozen=True, slots=True)
class Cancel:
    pass


Command = Configure | Hear | Commit | Clear | Respond | Cancel
"""One call of a method of `Conversation`, each by its name."""


@dataclass(frozen=True, slots=True)
class Received:
    """What a client's message asks of the engine, and what the client is told at once."""

    commands: Sequence[Command] = ()
    messages: Sequence[str] = ()


@dataclass(slots=True)
class _Reply:
    """The response in progress."""

    response_id: str
    item_id: str
    before: str | None
    audio_prefix: str  # of an audio delta, up to its base64
    text: list[str] = field(default_factory=list)

    @property
    def at(self) -> Object:
        """Where in the response a content event belongs."""
        return {
            "response_id": self.response_id,
            "item_id": self.item_id,
            "output_index": 0,
            "content_index": 0,
        }


# How a reply's end stands in `response.done`: status, status_details, status of its item.
_ENDINGS: Final[Mapping[Ended, tuple[str, Object | None, Any]]] = {
    Ended.COMPLETED: ("completed", None, "completed"),
    Ended.INTERRUPTED: (
        "cancelled",
        {"type": "cancelled", "reason": "turn_detected"},
        "incomplete",
    ),
    Ended.CANCELLED: (
        "cancelled",
        {"type": "cancelled", "reason": "client_cancelled"},
        "incomplete",
    ),
    Ended.FAILED: (
        "failed",
        {
            "type": "failed",
            "error": {
                "type": "server_error",
                "code": "reply_failed",
                "message": "the reply could not be spoken; ask again",
            },
        },
        "incomplete",
    ),
}


class RealtimeSession:
    """One call's side of the protocol; `opening` is sent first."""

    def __init__(self, model: str, new_id: NewId) -> None:
        self._model = model
        self._new_id = new_id
        self._session_id = new_id("sess")
        self._conversation_id = new_id("conv")
        # Event ids only have to differ within a session, so they are counted: an audio delta costs a
        # third less than with an id of its own.
        self._event_prefix = new_id("event")
        self._events = 0
        self._settings = SessionSettings()
        self._items = Items()
        self._unheard: deque[str] = deque(maxlen=MAX_UNHEARD)
        self._turn: str | None = None  # the item that the caller's speech in progress will become
        self._reply: _Reply | None = None
        self._uncommitted = 0  # bytes

    def __repr__(self) -> str:
        return (
            f"<RealtimeSession turn={self._turn} reply={self._reply and self._reply.item_id}"
            f" unheard={len(self._unheard)} {self._items!r}>"
        )

    def opening(self) -> list[str]:
        """What the client is told first."""
        return [self._event("session.created", session=self._session())]

    def receive(self, text: str) -> Received:
        """Takes one text frame of the client. Never raises."""
        message: Object = {}
        try:
            message = _parsed(text)
            return _HANDLERS.get(message["type"], RealtimeSession._unknown)(self, message)
        except Refused as refused:
            return Received(messages=[self._error(refused, message.get("event_id"))])

    def send(self, event: Event) -> list[str]:
        """The messages that tell the client of an engine's event.

        An event that fits nothing, such as audio of a reply that has ended, is told in no message.
        """
        match event:
            case ReplyAudio(pcm):
                return self._audio(pcm)
            case ReplyText(text):
                return self._text(text)
            case SpeechStarted(at_ms):
                return self._speech_started(at_ms)
            case SpeechStopped(at_ms):
                return self._speech_stopped(at_ms)
            case Heard(text, seconds):
                return self._heard(text, seconds)
            case ReplyStarted():
                return [*self._end_reply(Ended.COMPLETED), *self._start_reply()]
            case ReplyEnded(how):
                return self._end_reply(how)
            case Failed():
                return [*self._end_reply(Ended.FAILED), self._failure()]

    # --- from the client ---------------------------------------------------------------------------

    def _append(self, message: Object) -> Received:
        audio = message.get("audio")
        if not isinstance(audio, str):
            audio = required(message, "audio", str)
        try:
            pcm = a2b_base64(audio, strict_mode=True)
        except (NotBase64, ValueError):
            raise Refused("audio must be base64", code="invalid_value", param="audio") from None
        if len(pcm) % 2:
            raise Refused(
                "audio must hold whole samples of 16 bits; this is an odd number of bytes",
                code="invalid_value",
                param="audio",
            )
        self._uncommitted += len(pcm)
        return Received(commands=[Hear(pcm)] if pcm else ())

    def _commit(self, _: Object) -> Received:
        if self._uncommitted < MIN_COMMIT_MS * SAMPLE_RATE * 2 // 1000:
            raise Refused(
                f"append at least {MIN_COMMIT_MS} ms of audio before a commit",
                code="input_audio_buffer_commit_empty",
            )
        return Received(commands=[Commit()], messages=self._committed())

    def _clear(self, _: Object) -> Received:
        self._turn = None
        self._uncommitted = 0
        return Received(commands=[Clear()], messages=[self._event("input_audio_buffer.cleared")])

    def _update(self, message: Object) -> Received:
        before, self._settings = (
            self._settings,
            updated(self._settings, required(message, "session", dict)),
        )
        changed = before.turn != self._settings.turn
        return Received(
            commands=[Configure(self._settings.turn)] if changed else (),
            messages=[self._event("session.updated", session=self._session())],
        )

    def _create_response(self, message: Object) -> Received:
        wanted = optional(message, "response", dict, "response") or {}
        refuse_modalities(wanted, "response.output_modalities")
        instructions = optional(wanted, "instructions", str, "response.instructions")
        if self._reply is not None:
            raise Refused(
                f"response {self._reply.response_id} is in progress; wait for its response.done",
                code="conversation_already_has_active_response",
            )
        return Received(commands=[Respond(instructions)])

    def _cancel_response(self, message: Object) -> Received:
        wanted = optional(message, "response_id", str, "response_id")
        # A response that was asked for may not have begun, so the engine is told in any case.
        if self._reply is None or wanted not in (None, self._reply.response_id):
            return Received(
                commands=[Cancel()] if self._reply is None else (),
                messages=[self._error(_NOTHING_TO_CANCEL, message.get("event_id"))],
            )
        return Received(commands=[Cancel()])

    def _create_item(self, message: Object) -> Received:
        item = client_item(required(message, "item", dict), self._new_id("item"))
        if item["id"] in self._items:
            raise Refused(
                f"there is an item {item['id']!r} already; leave item.id out or choose another",
                code="item_create_duplicate_item_id",
                param="item.id",
            )
        return Received(messages=self._added_and_done(item))

    def _retrieve_item(self, message: Object) -> Received:
        item = self._items.get(required(message, "item_id", str), "retrieve")
        return Received(messages=[self._event("conversation.item.retrieved", item=item)])

    def _truncate_item(self, message: Object) -> Received:
        item = self._items.get(required(message, "item_id", str), "truncate")
        if item["role"] != "assistant" or required(message, "content_index", int) != 0:
            raise Refused(
                "only the first part of an assistant's message can be truncated",
                code="invalid_value",
                param="item_id",
            )
        end_ms = required(message, "audio_end_ms", int)
        if end_ms < 0:
            raise Refused(
                "audio_end_ms must be 0 or more", code="invalid_value", param="audio_end_ms"
            )
        # As OpenAI: the transcript goes, for it holds words that the caller did not hear.
        self._items.put(agent_item(item["id"], item["status"], ""))
        return Received(
            messages=[
                self._event(
                    "conversation.item.truncated",
                    item_id=item["id"],
                    content_index=0,
                    audio_end_ms=end_ms,
                )
            ]
        )

    def _delete_item(self, message: Object) -> Received:
        item_id = required(message, "item_id", str)
        self._items.delete(item_id)
        return Received(messages=[self._event("conversation.item.deleted", item_id=item_id)])

    def _unknown(self, message: Object) -> Received:
        raise Refused(
            f"there is no client event {message['type'][:64]!r} here; there are {', '.join(_HANDLERS)}",
            code="unknown_event",
            param="type",
        )

    # --- from the engine ---------------------------------------------------------------------------

    def _speech_started(self, at_ms: int) -> list[str]:
        if self._turn is not None:
            return []
        self._turn = self._new_id("item")
        return [
            self._event(
                "input_audio_buffer.speech_started", audio_start_ms=at_ms, item_id=self._turn
            )
        ]

    def _speech_stopped(self, at_ms: int) -> list[str]:
        # No turn: the client committed or cleared it while this was on its way, and has its answer.
        if self._turn is None:
            return []
        stopped = self._event(
            "input_audio_buffer.speech_stopped", audio_end_ms=at_ms, item_id=self._turn
        )
        return [stopped, *self._committed()]

    def _heard(self, text: str, seconds: float) -> list[str]:
        if not self._unheard:
            return []
        item_id = self._unheard.popleft()
        self._items.put(caller_item(item_id, text))
        return [
            self._event(
                "conversation.item.input_audio_transcription.completed",
                item_id=item_id,
                content_index=0,
                transcript=text,
                usage={"type": "duration", "seconds": seconds},
            )
        ]

    def _start_reply(self) -> list[str]:
        response_id, item_id = self._new_id("resp"), self._new_id("item")
        item = agent_item(item_id, "in_progress", None)
        before = self._items.add(item)
        self._reply = reply = _Reply(response_id, item_id, before, "")
        head = json.dumps(
            {"type": "response.output_audio.delta", **reply.at}, separators=(",", ":")
        )
        reply.audio_prefix = f'{head[:-1]},"delta":"'
        created = response(response_id, self._conversation_id, "in_progress", None, [])
        return [
            self._event("response.created", response=created),
            self._event(
                "response.output_item.added", response_id=response_id, output_index=0, item=item
            ),
            self._event("conversation.item.added", item=item, previous_item_id=before),
            self._event(
                "response.content_part.added", part={"type": "audio", "transcript": ""}, **reply.at
            ),
        ]

    def _text(self, text: str) -> list[str]:
        if self._reply is None:
            return []
        self._reply.text.append(text)
        return [self._event("response.output_audio_transcript.delta", delta=text, **self._reply.at)]

    def _audio(self, pcm: bytes) -> list[str]:
        if self._reply is None:
            return []
        prefix = self._reply.audio_prefix
        messages = []
        for start in range(0, len(pcm), MAX_DELTA_BYTES):
            encoded = b2a_base64(pcm[start : start + MAX_DELTA_BYTES], newline=False).decode(
                "ascii"
            )
            self._events += 1
            messages.append(
                f'{prefix}{encoded}","event_id":"{self._event_prefix}_{self._events}"}}'
            )
        return messages

    def _end_reply(self, how: Ended) -> list[str]:
        if self._reply is None:
            return []
        reply, self._reply = self._reply, None
        status, details, item_status = _ENDINGS[how]
        said = "".join(reply.text)
        item = agent_item(reply.item_id, item_status, said)
        self._items.put(item)
        part = {"type": "audio", "transcript": said}
        done = response(reply.response_id, self._conversation_id, status, details, [item])
        return [
            self._event("response.output_audio.done", **reply.at),
            self._event("response.output_audio_transcript.done", transcript=said, **reply.at),
            self._event("response.content_part.done", part=part, **reply.at),
            self._event(
                "response.output_item.done",
                response_id=reply.response_id,
                output_index=0,
                item=item,
            ),
            self._event("conversation.item.done", item=item, previous_item_id=reply.before),
            self._event("response.done", response=done),
        ]

    # --- messages ------------------------------------------------------------------------------------

    def _committed(self) -> list[str]:
        """Makes the caller's turn an item of the conversation."""
        item_id = self._turn or self._new_id("item")
        self._turn = None
        self._uncommitted = 0
        self._unheard.append(item_id)
        committed = self._event(
            "input_audio_buffer.committed", item_id=item_id, previous_item_id=self._items.last
        )
        return [committed, *self._added_and_done(caller_item(item_id, None))]

    def _added_and_done(self, item: Object) -> list[str]:
        before = self._items.add(item)
        return [
            self._event("conversation.item.added", item=item, previous_item_id=before),
            self._event("conversation.item.done", item=item, previous_item_id=before),
        ]

    def _session(self) -> Object:
        return as_session(self._settings, self._session_id, self._model)

    def _error(self, refused: Refused, event_id: object) -> str:
        return self._event(
            "error",
            error={
                "type": "invalid_request_error",
                "code": refused.code,
                "message": str(refused),
                "param": refused.param,
                "event_id": event_id if isinstance(event_id, str) else None,
            },
        )

    def _failure(self) -> str:
        return self._event(
            "error",
            error={
                "type": "server_error",
                "code": "conversation_failed",
                "message": "the conversation cannot go on; call again",
                "param": None,
                "event_id": None,
            },
        )

    def _event(self, type_: str, **fields: object) -> str:
        self._events += 1
        event_id = f"{self._event_prefix}_{self._events}"
        return json.dumps({"type": type_, "event_id": event_id, **fields}, separators=(",", ":"))


# The words are OpenAI's: some clients know this error by them, and pass over it.
_NOTHING_TO_CANCEL: Final = Refused(
    "Cancellation failed: no active response found", code="response_cancel_not_active"
)

_HANDLERS: Final[Mapping[str, Callable[[RealtimeSession, Object], Received]]] = {
    "input_audio_buffer.append": RealtimeSession._append,
    "input_audio_buffer.commit": RealtimeSession._commit,
    "input_audio_buffer.clear": RealtimeSession._clear,
    "session.update": RealtimeSession._update,
    "response.create": RealtimeSession._create_response,
    "response.cancel": RealtimeSession._cancel_response,
    "conversation.item.create": RealtimeSession._create_item,
    "conversation.item.retrieve": RealtimeSession._retrieve_item,
    "conversation.item.truncate": RealtimeSession._truncate_item,
    "conversation.item.delete": RealtimeSession._delete_item,
}


def _parsed(text: str) -> Object:
    """A client's message; raises `Refused` for what is none. Nesting too deep is a RecursionError."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused("a message must be JSON", code="invalid_json") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise Refused(
            "a message must be a JSON object with a string as its type", code="invalid_json"
        )
    return message
