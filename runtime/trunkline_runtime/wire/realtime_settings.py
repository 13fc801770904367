"""The session of OpenAI Realtime as Trunkline has it: what a client may set, and what it is told back.

A client may send any setting of the protocol. The ones in `SessionSettings` act; those that would have to
act but cannot are refused with what is supported; all others are ignored and never stored, so that what a
session holds is bounded. Source: the types of the `openai` package, `openai.types.realtime`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from trunkline_runtime.engine import SAMPLE_RATE, TurnDetection

Object = dict[str, Any]
"""A JSON object, as a client sent it or as it goes to one."""

AUDIO_FORMAT: Final[Object] = {"type": "audio/pcm", "rate": SAMPLE_RATE}

SEMANTIC_SILENCE_MS: Final = {"low": 900, "medium": 500, "auto": 500, "high": 300}
"""`semantic_vad` asks for a model that judges whether a sentence is over. The engine judges by silence
alone, so eagerness becomes a length of silence; `auto` is `medium`, as in the protocol."""

MAX_PADDING_MS: Final = 5_000
MAX_SILENCE_MS: Final = 10_000


class Refused(Exception):
    """A client's message that cannot be acted on; the text says what to do instead."""

    def __init__(self, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """What acts in a session, and what a client expects to read back."""

    instructions: str = ""
    detector: Literal["server_vad", "semantic_vad"] = "server_vad"
    eagerness: str = "auto"
    turn: TurnDetection = field(default_factory=TurnDetection)
    transcribed: bool = True  # the client is told what the caller says


def as_session(settings: SessionSettings, session_id: str, model: str) -> Object:
    """The session object of `session.created` and `session.updated`."""
    return {
        "type": "realtime",
        "object": "realtime.session",
        "id": session_id,
        "model": model,
        "output_modalities": ["audio"],
        "instructions": settings.instructions,
        "tools": [],
        "tool_choice": "auto",
        "max_output_tokens": "inf",
        "tracing": None,
        "prompt": None,
        "include": None,
        "audio": {
            "input": {
                "format": AUDIO_FORMAT,
                "transcription": {"model": model} if settings.transcribed else None,
                "noise_reduction": None,
                "turn_detection": _as_detection(settings),
            },
            "output": {"format": AUDIO_FORMAT, "speed": 1.0},
        },
    }


def updated(settings: SessionSettings, update: Object) -> SessionSettings:
    """The settings after a `session.update` that carries this session; all of it is taken or none.

    Raises `Refused`.
    """
    if update.get("type", "realtime") != "realtime":
        raise _unsupported(
            "session.type", 'sessions of type "realtime" only; leave it out or set it to that'
        )
    refuse_modalities(update, "session.output_modalities")
    audio = optional(update, "audio", dict, "session.audio") or {}
    for side in ("input", "output"):
        _refuse_format(optional(audio, side, dict, f"session.audio.{side}") or {}, side)
    instructions = optional(update, "instructions", str, "session.instructions")
    if instructions is not None:
        settings = replace(settings, instructions=instructions)
    hearing: Object = audio.get("input") or {}
    if "transcription" in hearing:
        # Which model transcribes is the agent's affair, so what the object holds is not looked at.
        wanted = optional(hearing, "transcription", dict, "session.audio.input.transcription")
        settings = replace(settings, transcribed=wanted is not None)
    if "turn_detection" in hearing:
        settings = _detecting(settings, hearing["turn_detection"])
    return settings


def refuse_modalities(holder: Object, param: str) -> None:
    """Raises `Refused` where a client asks for text instead of speech."""
    if holder.get("output_modalities") not in (None, ["audio"]):
        raise _unsupported(
            param, 'speech with its transcript only; leave it out or set it to ["audio"]'
        )


def optional(holder: Object, key: str, kind: type, param: str) -> Any:
    """The value at `key`, None where it is missing or null; raises `Refused` where it is another kind."""
    value = holder.get(key)
    if value is None or (isinstance(value, kind) and not (kind is int and value is True)):
        return value
    raise Refused(f"{param} must be {_KINDS[kind]}", code="invalid_type", param=param)


def required(holder: Object, key: str, kind: type) -> Any:
    """The value at `key`; raises `Refused` where it is missing or of another kind."""
    value = optional(holder, key, kind, key)
    if value is None:
        raise Refused(
            f"{key} is missing; it is {_KINDS[kind]}", code="missing_required_parameter", param=key
        )
    return value


_KINDS: Final[Mapping[type, str]] = {
    str: "a string",
    dict: "an object",
    list: "a list",
    bool: "true or false",
    int: "a whole number",
}


def _unsupported(param: str, supported: str) -> Refused:
    return Refused(f"{param}: this agent does {supported}", code="unsupported_value", param=param)


def _refuse_format(side: Object, name: str) -> None:
    param = f"session.audio.{name}.format"
    audio_format = optional(side, "format", dict, param) or {}
    if audio_format.get("type", "audio/pcm") != "audio/pcm" or (
        audio_format.get("rate", SAMPLE_RATE) != SAMPLE_RATE
    ):
        raise _unsupported(
            param,
            f'{{"type": "audio/pcm", "rate": {SAMPLE_RATE}}} only; leave it out or set it to that',
        )


def _detecting(settings: SessionSettings, wanted: object) -> SessionSettings:
    """The settings with another turn detection; what it leaves out stays while its type stays."""
    param = "session.audio.input.turn_detection"
    if wanted is None:
        return replace(settings, turn=replace(settings.turn, enabled=False))
    if not isinstance(wanted, dict) or wanted.get("type") not in ("server_vad", "semantic_vad"):
        raise _unsupported(param, '"server_vad", "semantic_vad" or null as its type')
    given: Object = wanted
    detector = given["type"]
    same = detector == settings.detector and settings.turn.enabled
    before = settings.turn if same else TurnDetection()
    turn = replace(
        before,
        enabled=True,
        create_response=_flag(given, "create_response", before.create_response),
        interrupt_response=_flag(given, "interrupt_response", before.interrupt_response),
    )
    if detector == "semantic_vad":
        eagerness = given.get("eagerness") or (settings.eagerness if same else "auto")
        if not isinstance(eagerness, str) or eagerness not in SEMANTIC_SILENCE_MS:
            raise _unsupported(f"{param}.eagerness", f"{', '.join(SEMANTIC_SILENCE_MS)}")
        turn = replace(turn, silence_ms=SEMANTIC_SILENCE_MS[eagerness])
        return replace(settings, detector="semantic_vad", eagerness=eagerness, turn=turn)
    turn = replace(
        turn,
        threshold=_number(given, "threshold", before.threshold, 1),
        prefix_padding_ms=int(
            _number(given, "prefix_padding_ms", before.prefix_padding_ms, MAX_PADDING_MS)
        ),
        silence_ms=int(_number(given, "silence_duration_ms", before.silence_ms, MAX_SILENCE_MS)),
    )
    return replace(settings, detector="server_vad", turn=turn)


def _as_detection(settings: SessionSettings) -> Object | None:
    turn = settings.turn
    if not turn.enabled:
        return None
    answers = {
        "create_response": turn.create_response,
        "interrupt_response": turn.interrupt_response,
    }
    if settings.detector == "semantic_vad":
        return {"type": "semantic_vad", "eagerness": settings.eagerness, **answers}
    return {
        "type": "server_vad",
        "threshold": turn.threshold,
        "prefix_padding_ms": turn.prefix_padding_ms,
        "silence_duration_ms": turn.silence_ms,
        "idle_timeout_ms": None,
        **answers,
    }


def _flag(given: Object, key: str, before: bool) -> bool:
    value = optional(given, key, bool, f"turn_detection.{key}")
    return before if value is None else bool(value)


def _number(given: Object, key: str, before: float, highest: float) -> float:
    value = given.get(key)
    if value is None:
        return before
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
        param = f"turn_detection.{key}"
        raise Refused(
            f"{param} must be a number from 0 to {highest}", code="invalid_value", param=param
        )
    return float(value)
