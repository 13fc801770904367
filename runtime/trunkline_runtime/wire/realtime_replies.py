"""What OpenAI Realtime tells a client: numbered messages, and one reply from its first to its last."""

import json
from binascii import b2a_base64
from collections.abc import Mapping
from typing import Any, Final

from trunkline_runtime.engine import SAMPLE_RATE, Ended
from trunkline_runtime.wire.realtime_items import Items, agent_item, response
from trunkline_runtime.wire.realtime_settings import Object, Refused

MAX_DELTA_BYTES: Final = SAMPLE_RATE * 2  # 1 s in one message: an eighth of MAX_CALL_MESSAGE_BYTES


class Messages:
    """Makes the JSON text of server events.

    Event ids only have to differ within a session, so they are counted.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._count = 0

    def event_id(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"

    def event(self, type_: str, **fields: object) -> str:
        message = {"type": type_, "event_id": self.event_id(), **fields}
        return json.dumps(message, separators=(",", ":"))

    def refusal(self, refused: Refused, event_id: object) -> str:
        """The `error` that answers a client's event, with the id that the client gave it."""
        return self._error(
            "invalid_request_error",
            refused.code,
            str(refused),
            param=refused.param,
            event_id=event_id if isinstance(event_id, str) else None,
        )

    def failure(self) -> str:
        """The `error` after which the call is closed."""
        return self._error(
            "server_error", "conversation_failed", "the conversation cannot go on; call again"
        )

    def _error(self, type_: str, code: str, message: str, **more: str | None) -> str:
        blank = {"param": None, "event_id": None}
        error = {"type": type_, "code": code, "message": message, **blank, **more}
        return self.event("error", error=error)


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


class Reply:
    """One response, of one item with one part: what the agent says in one go."""

    def __init__(
        self, messages: Messages, items: Items, conversation_id: str, ids: tuple[str, str]
    ) -> None:
        """`ids` are those of the response and of its item, which becomes the newest of `items`."""
        self._messages = messages
        self._items = items
        self._conversation_id = conversation_id
        self.response_id, self.item_id = ids
        self._item = agent_item(self.item_id, "in_progress", None)
        self._before = items.add(self._item)
        self._text: list[str] = []
        self._at: Object = {
            "response_id": self.response_id,
            "item_id": self.item_id,
            "output_index": 0,
            "content_index": 0,
        }
        # An audio delta is made by joining strings: 15 µs for 80 ms, most of it base64.
        head = json.dumps(
            {"type": "response.output_audio.delta", **self._at}, separators=(",", ":")
        )
        self._audio_prefix = f'{head[:-1]},"delta":"'

    def __repr__(self) -> str:
        return f"<Reply {self.response_id} {self.item_id}>"

    def opening(self) -> list[str]:
        event = self._messages.event
        return [
            event("response.created", response=self._response("in_progress", None, [])),
            event(
                "response.output_item.added",
                response_id=self.response_id,
                output_index=0,
                item=self._item,
            ),
            event("conversation.item.added", item=self._item, previous_item_id=self._before),
            event(
                "response.content_part.added", part={"type": "audio", "transcript": ""}, **self._at
            ),
        ]

    def text(self, text: str) -> list[str]:
        self._text.append(text)
        return [
            self._messages.event("response.output_audio_transcript.delta", delta=text, **self._at)
        ]

    def audio(self, pcm: bytes) -> list[str]:
        return [
            self._audio_delta(pcm[start : start + MAX_DELTA_BYTES])
            for start in range(0, len(pcm), MAX_DELTA_BYTES)
        ]

    def ending(self, how: Ended) -> list[str]:
        status, details, item_status = _ENDINGS[how]
        said = "".join(self._text)
        item = agent_item(self.item_id, item_status, said)
        self._items.put(item)
        event = self._messages.event
        return [
            event("response.output_audio.done", **self._at),
            event("response.output_audio_transcript.done", transcript=said, **self._at),
            event(
                "response.content_part.done", part={"type": "audio", "transcript": said}, **self._at
            ),
            event(
                "response.output_item.done", response_id=self.response_id, output_index=0, item=item
            ),
            event("conversation.item.done", item=item, previous_item_id=self._before),
            event("response.done", response=self._response(status, details, [item])),
        ]

    def _audio_delta(self, pcm: bytes) -> str:
        encoded = b2a_base64(pcm, newline=False).decode("ascii")
        return f'{self._audio_prefix}{encoded}","event_id":"{self._messages.event_id()}"}}'

    def _response(self, status: str, details: Object | None, output: list[Object]) -> Object:
        return response(self.response_id, self._conversation_id, status, details, output)
