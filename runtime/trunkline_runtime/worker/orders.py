"""What gateways send to a worker, parsed at the edge into frozen values.

A message that makes no sense raises `Malformed`: gateways are ours, so it is a bug there or a stranger,
and the link is dropped rather than guessed at. Types that are not known are None, for a newer gateway
may send them.
"""

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final

from trunkline_runtime.contract import (
    MAX_GATEWAYS,
    SETTINGS_TYPE,
    GuardRule,
    HookSettings,
    PolicySettings,
    ReplyRule,
    Settings,
)

MAX_CALL_ID: Final = 128  # characters; ours have 26
MAX_REPLIES: Final = 64  # as in the VoiceAgent; of guards and banned words, too
MAX_BANNED_WORD: Final = 64  # characters
MAX_HOOK_SECONDS: Final = 5.0


class Malformed(ValueError):
    """A message that no gateway of ours sends; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class DrainOrder:
    draining: bool


@dataclass(frozen=True, slots=True)
class GatewaysOrder:
    hosts: frozenset[str]  # IP addresses


@dataclass(frozen=True, slots=True)
class Heartbeat:
    pass


Order = DrainOrder | GatewaysOrder | Heartbeat


def order_from(text: str | bytes) -> Order | None:
    """One control message of a gateway; None for a type that is not known. Raises `Malformed`."""
    message = _object(text)
    match message.get("type"):
        case "drain" | "undrain" as kind:
            return DrainOrder(kind == "drain")
        case "gateways":
            return GatewaysOrder(_hosts(message.get("hosts")))
        case "beat":
            return Heartbeat()
        case str():
            return None
    raise Malformed("a control message has a string as its type")


def opening_from(text: str | bytes) -> Settings:
    """The settings that a gateway sends first on a data link. Raises `Malformed`."""
    message = _object(text)
    if message.get("type") != SETTINGS_TYPE:
        raise Malformed(f"the first message on a data link has the type {SETTINGS_TYPE}")
    return settings_from(message.get("settings", {}))


def settings_from(value: object) -> Settings:
    """The known keys of a call's settings. Raises `Malformed`."""
    if not isinstance(value, dict):
        raise Malformed("settings must be an object")
    settings = Settings()
    if "greeting" in value:
        settings["greeting"] = _text(value, "greeting")
    if "fallback" in value:
        settings["fallback"] = _text(value, "fallback")
    if "replies" in value:
        settings["replies"] = _rules(value["replies"])
    if "idleSeconds" in value:
        settings["idleSeconds"] = _positive(value, "idleSeconds")
    if "transcripts" in value:
        settings["transcripts"] = _flag(value, "transcripts")
    if "policy" in value:
        settings["policy"] = _policy(value["policy"])
    return settings


def _hosts(value: object) -> frozenset[str]:
    if not isinstance(value, list) or len(value) > MAX_GATEWAYS:
        raise Malformed(f"hosts must be a list of {MAX_GATEWAYS} at most")
    try:
        return frozenset(str(ipaddress.ip_address(_text({"host": host}, "host"))) for host in value)
    except ValueError:
        raise Malformed("hosts must be IP addresses") from None


def _rules(value: object) -> list[ReplyRule]:
    return [
        ReplyRule(match=_text(rule, "match"), say=_text(rule, "say"))
        for rule in _objects(value, "replies")
    ]


def _policy(value: object) -> PolicySettings:
    if not isinstance(value, dict):
        raise Malformed("policy must be an object")
    policy = PolicySettings()
    if "bannedWords" in value:
        words = _list(value["bannedWords"], "bannedWords")
        policy["bannedWords"] = [
            _text({"bannedWords": w}, "bannedWords", MAX_BANNED_WORD) for w in words
        ]
    if "bargeIn" in value:
        policy["bargeIn"] = _flag(value, "bargeIn")
    if "guards" in value:
        policy["guards"] = [_guard(rule) for rule in _objects(value["guards"], "guards")]
    if "hook" in value:
        policy["hook"] = _hook(value["hook"])
    return policy


def _guard(value: Mapping[str, Any]) -> GuardRule:
    match value.get("do"):
        case "say" | "mute" | "hangUp" as what:
            return GuardRule(match=_text(value, "match"), do=what, say=_text(value, "say"))
    raise Malformed("do must be say, mute or hangUp")


def _hook(value: object) -> HookSettings:
    if not isinstance(value, dict):
        raise Malformed("hook must be an object")
    seconds = min(_positive(value, "deadlineSeconds"), MAX_HOOK_SECONDS)
    match value.get("onFailure"):
        case "open" | "closed" as how:
            return HookSettings(
                url=_text(value, "url", 1024),
                token=_text(value, "token"),
                deadlineSeconds=seconds,
                onFailure=how,
            )
    raise Malformed("onFailure must be open or closed")


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise Malformed(f"{what} must be a list")
    if len(value) > MAX_REPLIES:
        raise Malformed(f"there are {len(value)} {what} and {MAX_REPLIES} are allowed")
    return value


def _objects(value: object, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Malformed(f"{what} must be a list of objects")
    return _list(value, what)


def _object(text: str | bytes) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise Malformed("a message must be JSON") from None
    if not isinstance(message, dict):
        raise Malformed("a message must be a JSON object")
    return message


def _text(message: Mapping[str, Any], key: str, longest: int | None = None) -> str:
    value = message.get(key)
    if not isinstance(value, str):
        raise Malformed(f"{key} must be a string")
    if longest is not None and not 0 < len(value) <= longest:
        raise Malformed(f"{key} must have 1 to {longest} characters")
    return value


def _flag(message: Mapping[str, Any], key: str) -> bool:
    value = message.get(key)
    if not isinstance(value, bool):
        raise Malformed(f"{key} must be true or false")
    return value


def _positive(message: Mapping[str, Any], key: str) -> float:
    value = message.get(key)
    # bool is an int in Python, and JSON's Infinity and NaN are floats.
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise Malformed(f"{key} must be a number")
    if value <= 0:
        raise Malformed(f"{key} must be above 0")
    return float(value)
