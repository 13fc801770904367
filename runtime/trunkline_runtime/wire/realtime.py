"""OpenAI Realtime (GA) without I/O: a client's messages to commands, an engine's events to messages.

The worker feeds `RealtimeSession.receive` with text frames, gives its commands to the engine's
`Conversation` and sends its messages; each engine event goes through `send`. What goes out always keeps
the order that stock clients need:

    session.created, then in any number
      turn:      speech_started → speech_stopped → committed → item.added → item.done
                 → input_audio_transcription.completed; its deltas from speech_started on
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
from binascii import a2b_base64
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

from trunkline_runtime.engine import (
    SAMPLE_RATE,
    Ended,
    Event,
    Failed,
    Heard,
    HeardPart,
    HungUp,
    ReplyAudio,
    ReplyEnded,
    ReplyStarted,
    ReplyText,
    SpeechStarted,
    SpeechStopped,
)
from trunkline_runtime.wire.realtime_items import Items, agent_item, caller_item, client_item
from trunkline_runtime.wire.realtime_replies import Messages, Reply
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
from trunkline_runtime.wire.session import (
    Cancel,
    Clear,
    Commit,
    Configure,
    Hear,
    Message,
    Received,
    Respond,
)

NewId = Callable[[str], str]
"""Makes an id that no other has, `item_…` from "item"; plain letters, digits, `_` and `-`."""

BYTES_PER_SECOND: Final = 64_000  # base64 of the audio; the JSON around it is little
MIN_COMMIT_MS: Final = 100  # as OpenAI: less holds no word, and recognisers invent one
MAX_UNHEARD: Final = 32  # turns committed and not yet recognised


class RealtimeSession:
    """One call's side of the protocol; `opening` is sent first."""

    bytes_per_second = BYTES_PER_SECOND
    quiet_seconds: float | None = None

    def __init__(self, model: str, new_id: NewId) -> None:
        self._model = model
        self._new_id = new_id
        self._session_id = new_id("sess")
        self._conversation_id = new_id("conv")
        self._messages = Messages(new_id("event"))
        self._event = self._messages.event
        self._settings = SessionSettings()
        self._items = Items()
        self._turn: str | None = None  # the item that the caller's speech in progress will become
        # One `Heard` follows each commit and each end of speech, in this order; None: for no item.
        self._unheard: deque[str | None] = deque(maxlen=MAX_UNHEARD)
        self._reply: Reply | None = None
        self._uncommitted = 0  # bytes of audio

    def __repr__(self) -> str:
        return (
            f"<RealtimeSession turn={self._turn} reply={self._reply!r}"
            f" unheard={len(self._unheard)} {self._items!r}>"
        )

    def opening(self) -> list[str]:
        """What the client is told first."""
        return [self._event("session.created", session=self._session())]

    def receive(self, message: Message) -> Received:
        """Takes one frame of the client. Never raises."""
        if isinstance(message, bytes):
            return Received(refused="a binary message: send JSON as text")
        event: Object = {}
        try:
            event = _parsed(message)
            return _HANDLERS.get(event["type"], RealtimeSession._unknown)(self, event)
        except Refused as refused:
            return Received(messages=[self._messages.refusal(refused, event.get("event_id"))])

    def still_there(self) -> list[str]:
        """A client waits as long as it likes."""
        return []

    def send(self, event: Event) -> list[str]:
        """The messages that tell the client of an engine's event.

        An event that fits nothing, such as audio of a reply that has ended, makes no message.
        """
        match event:
            case ReplyAudio(pcm):
                return self._reply.audio(pcm) if self._reply else []
            case ReplyText(text):
                return self._reply.text(text) if self._reply else []
            case SpeechStarted(at_ms):
                return self._speech_started(at_ms)
            case SpeechStopped(at_ms):
                return self._speech_stopped(at_ms)
            case HeardPart(text):
                return self._heard_part(text)
            case Heard(text, seconds):
                return self._heard(text, seconds)
            case ReplyStarted():
                return [*self._end_reply(Ended.COMPLETED), *self._start_reply()]
            case ReplyEnded(how):
                return self._end_reply(how)
            case HungUp():
                return self._end_reply(Ended.COMPLETED)
            case Failed():
                return [*self._end_reply(Ended.FAILED), self._messages.failure()]

    # --- from the client ---------------------------------------------------------------------------

    def _append(self, message: Object) -> Received:
        audio = required(message, "audio", str)
        try:
            pcm = a2b_base64(audio, strict_mode=True)
        except ValueError:
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
        before = self._settings
        self._settings = updated(before, required(message, "session", dict))
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
        if self._reply is not None and wanted in (None, self._reply.response_id):
            return Received(commands=[Cancel()])
        # A response that was asked for may not have begun, so the engine is told even of none.
        return Received(
            commands=[Cancel()] if self._reply is None else (),
            messages=[self._messages.refusal(_NOTHING_TO_CANCEL, message.get("event_id"))],
        )

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
        at = {key: required(message, key, int) for key in ("content_index", "audio_end_ms")}
        if item["role"] != "assistant" or at["content_index"] != 0 or at["audio_end_ms"] < 0:
            raise Refused(
                "a truncate needs an item of the assistant, content_index 0 and audio_end_ms ≥ 0",
                code="invalid_value",
            )
        # As OpenAI: the transcript goes, for it holds words that the caller did not hear.
        self._items.put(agent_item(item["id"], item["status"], ""))
        truncated = self._event("conversation.item.truncated", item_id=item["id"], **at)
        return Received(messages=[truncated])

    def _delete_item(self, message: Object) -> Received:
        item_id = required(message, "item_id", str)
        self._items.delete(item_id)
        return Received(messages=[self._event("conversation.item.deleted", item_id=item_id)])

    def _unknown(self, message: Object) -> Received:
        known = ", ".join(_HANDLERS)
        raise Refused(
            f"there is no client event {message['type'][:64]!r} here; there are {known}",
            code="unknown_event",
            param="type",
        )

    # --- from the engine ---------------------------------------------------------------------------

    def _speech_started(self, at_ms: int) -> list[str]:
        if self._turn is not None:
            return []
        self._turn = item_id = self._new_id("item")
        return [
            self._event("input_audio_buffer.speech_started", audio_start_ms=at_ms, item_id=item_id)
        ]

    def _speech_stopped(self, at_ms: int) -> list[str]:
        # No turn: the client committed or cleared it while this was on its way, and has its answer.
        if self._turn is None:
            self._unheard.append(None)
            return []
        stopped = self._event(
            "input_audio_buffer.speech_stopped", audio_end_ms=at_ms, item_id=self._turn
        )
        return [stopped, *self._committed()]

    def _heard_part(self, text: str) -> list[str]:
        if self._unheard:
            item_id = self._unheard[0]
        else:
            if self._turn is None and not self._settings.turn.enabled:
                # Nobody says where a turn begins; the client's commit will make this item of it.
                self._turn = self._new_id("item")
            item_id = self._turn
        if item_id is None or not self._settings.transcribed:
            return []
        return [
            self._event(
                "conversation.item.input_audio_transcription.delta",
                item_id=item_id,
                content_index=0,
                delta=text,
            )
        ]

    def _heard(self, text: str, seconds: float) -> list[str]:
        item_id = self._unheard.popleft() if self._unheard else None
        if item_id is None or not self._settings.transcribed:
            return []
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
        ids = self._new_id("resp"), self._new_id("item")
        self._reply = Reply(self._messages, self._items, self._conversation_id, ids)
        return self._reply.opening()

    def _end_reply(self, how: Ended) -> list[str]:
        reply, self._reply = self._reply, None
        return reply.ending(how) if reply else []

    # --- both ----------------------------------------------------------------------------------------

    def _committed(self) -> list[str]:
        """Makes the caller's turn an item of the conversation."""
        item_id, self._turn = self._turn or self._new_id("item"), None
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
    """A client's message. Raises `Refused`; JSON nested too deep is a RecursionError."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused("a message must be JSON", code="invalid_json") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise Refused(
            "a message must be a JSON object with a string as its type", code="invalid_json"
        )
    return message
