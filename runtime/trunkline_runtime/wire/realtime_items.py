"""The conversation of OpenAI Realtime: its items as they stand on the wire, and a bounded memory of them."""

from typing import Final, Literal

from trunkline_runtime.wire.realtime_settings import (
    AUDIO_FORMAT,
    Object,
    Refused,
    optional,
    required,
)

MAX_ITEMS: Final = 256  # remembered for `conversation.item.retrieve`; clients ask for the newest
MAX_ITEM_CHARS: Final = 16_384  # of a client's own item: 256 of them are 4 MiB of a worker's memory
MAX_ID_CHARS: Final = 64
MAX_PARTS: Final = 16

# Which parts a client's own message may have, by its role, and which of their fields is kept.
_PARTS: Final[dict[str, dict[str, str]]] = {
    "user": {"input_text": "text", "input_audio": "transcript"},
    "assistant": {"output_text": "text", "output_audio": "transcript"},
    "system": {"input_text": "text"},
}

Status = Literal["in_progress", "completed", "incomplete"]


class Items:
    """The items of one conversation in their order; the oldest are forgotten."""

    def __init__(self) -> None:
        self._items: dict[str, Object] = {}
        self.last: str | None = None  # where the next item goes

    def __repr__(self) -> str:
        return f"<Items {len(self._items)} last={self.last}>"

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._items

    def add(self, item: Object) -> str | None:
        """Appends the item; returns the id of the one before it."""
        before, self.last = self.last, item["id"]
        self._items[item["id"]] = item
        if len(self._items) > MAX_ITEMS:
            del self._items[next(iter(self._items))]
        return before

    def put(self, item: Object) -> None:
        """Replaces an item that is still remembered."""
        if item["id"] in self._items:
            self._items[item["id"]] = item

    def get(self, item_id: str, verb: str) -> Object:
        """Raises `Refused` for an item that was never there, was deleted or is forgotten."""
        try:
            return self._items[item_id]
        except KeyError:
            raise Refused(
                f"there is no item {item_id[:MAX_ID_CHARS]!r} to {verb}; the newest {MAX_ITEMS} items are kept",
                code=f"item_{verb}_invalid_item_id",
                param="item_id",
            ) from None

    def delete(self, item_id: str) -> None:
        self.get(item_id, "delete")
        del self._items[item_id]
        if self.last == item_id:
            self.last = next(reversed(self._items), None)


def caller_item(item_id: str, transcript: str | None) -> Object:
    """A turn of the caller; its transcript comes later."""
    return _message(
        item_id, "user", "completed", [{"type": "input_audio", "transcript": transcript}]
    )


def agent_item(item_id: str, status: Status, transcript: str | None) -> Object:
    """A reply of the agent; None is a reply without content as yet."""
    content = [] if transcript is None else [{"type": "output_audio", "transcript": transcript}]
    return _message(item_id, "assistant", status, content)


def client_item(item: Object, fresh_id: str) -> Object:
    """A client's own item, reduced to what is kept of it: text and transcripts, never audio.

    Raises `Refused`.
    """
    if item.get("type") != "message":
        raise Refused(
            'only items of type "message" are supported: this agent calls no tools',
            code="unsupported_value",
            param="item.type",
        )
    role = item.get("role")
    if not isinstance(role, str) or role not in _PARTS:
        raise Refused(
            f"item.role must be one of {', '.join(_PARTS)}", code="invalid_value", param="item.role"
        )
    item_id = optional(item, "id", str, "item.id") or fresh_id
    if len(item_id) > MAX_ID_CHARS:
        raise Refused(
            f"item.id is longer than {MAX_ID_CHARS} characters",
            code="invalid_value",
            param="item.id",
        )
    parts = required(item, "content", list)
    if len(parts) > MAX_PARTS:
        raise Refused(
            f"an item has at most {MAX_PARTS} parts", code="invalid_value", param="item.content"
        )
    content = [_part(part, _PARTS[role]) for part in parts]
    if (
        sum(len(part.get("text") or part.get("transcript") or "") for part in content)
        > MAX_ITEM_CHARS
    ):
        raise Refused(
            f"an item has at most {MAX_ITEM_CHARS} characters",
            code="invalid_value",
            param="item.content",
        )
    return _message(item_id, role, "completed", content)


def response(
    response_id: str,
    conversation_id: str,
    status: str,
    details: Object | None,
    output: list[Object],
) -> Object:
    """The response object of `response.created` and `response.done`. Tokens are not counted."""
    return {
        "id": response_id,
        "object": "realtime.response",
        "status": status,
        "status_details": details,
        "output": output,
        "conversation_id": conversation_id,
        "output_modalities": ["audio"],
        "max_output_tokens": "inf",
        "audio": {"output": {"format": AUDIO_FORMAT}},
        "usage": None if status == "in_progress" else _NO_TOKENS,
        "metadata": None,
    }


# Clients add these up, and some fail where they are missing.
_NO_TOKENS: Final[Object] = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_token_details": {"text_tokens": 0, "audio_tokens": 0, "cached_tokens": 0},
    "output_token_details": {"text_tokens": 0, "audio_tokens": 0},
}


def _message(item_id: str, role: str, status: Status, content: list[Object]) -> Object:
    return {
        "id": item_id,
        "object": "realtime.item",
        "type": "message",
        "role": role,
        "status": status,
        "content": content,
    }


def _part(part: object, kept: dict[str, str]) -> Object:
    # Looked up in a list: a type that is no string may not be hashable.
    if not isinstance(part, dict) or part.get("type") not in list(kept):
        raise Refused(
            f"each part of this item's content must be an object of type {' or '.join(kept)}",
            code="unsupported_value",
            param="item.content",
        )
    name = kept[part["type"]]
    return {"type": part["type"], name: optional(part, name, str, f"item.content.{name}")}
