"""The object that the API holds, parsed once at the edge into the values of spec.py.

The API server checks shapes and most rules; what it cannot say (a pattern that is no regular expression),
and whatever an older CRD let pass, ends here as a `SpecError` with a sentence for whoever wrote the resource.
"""

import json
import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final

from trunkline_operator.agent.rules import broken
from trunkline_operator.agent.spec import (
    Access,
    Autoscaling,
    Budget,
    Burst,
    CallPolicy,
    DataClass,
    Engine,
    EngineType,
    Gpu,
    Guard,
    GuardAction,
    Hook,
    Json,
    Jwt,
    Limits,
    OnFailure,
    Override,
    Percent,
    Policy,
    Protocol,
    Quantization,
    Recordings,
    Region,
    Reply,
    Resources,
    ScaleDown,
    Session,
    Slo,
    Snapshot,
    SpecError,
    Tenants,
    Transcripts,
    VoiceAgent,
    Warm,
    epoch,
)
from trunkline_operator.scaling.schedule import LONGEST_WINDOW_SECONDS, Window, trouble

# More than anybody's voice agent costs in a day; it catches an amount that was meant in cents.
MOST_DOLLARS: Final = 1_000_000


def parsed(obj: Json) -> VoiceAgent:
    """The agent that an API object describes.

    Raises `SpecError`, except for an object that is being deleted: that one must still be drained, so
    what makes no sense in it is replaced by defaults.
    """
    deleted_at = epoch(obj["metadata"].get("deletionTimestamp"))
    try:
        return _agent(obj, obj.get("spec") or {}, deleted_at)
    except SpecError:
        if deleted_at is None:
            raise
        return _agent(obj, {"engine": {"type": "loopback"}, "access": {"public": True}}, deleted_at)


def _agent(obj: Json, spec: Json, deleted_at: float | None) -> VoiceAgent:
    metadata = obj["metadata"]
    engine = _required(
        _fields(spec, "engine"), "type", "engine.type must be one of: loopback, speech, moshi"
    )
    agent = VoiceAgent(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 1),
        deleted_at=deleted_at,
        finalizers=tuple(metadata.get("finalizers") or ()),
        engine=Engine(policy=_call_policy(spec), **engine),
        warm=Warm(
            gpu=Gpu(**_fields(spec, "warm.gpu")),
            resources=Resources(**_fields(spec, "warm.resources")),
            **_fields(spec, "warm"),
        ),
        burst=_burst(spec),
        session=Session(**_fields(spec, "session")),
        access=_access(spec),
        policy=Policy(**_fields(spec, "policy")),
        slo=Slo(**_fields(spec, "slo")),
    )
    if sentences := "; ".join(broken(agent)):
        raise SpecError(sentences)
    return agent


# --- from JSON, a table a group -------------------------------------------------------------------------

Reader = Callable[[Any, str], Any]
"""(value, its path) → the value to keep; raises SpecError."""


def _number(low: int, high: int) -> Reader:
    def read(value: Any, path: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise SpecError(f"{path} must be a whole number from {low} to {high}")
        return value

    return read


def _dollars(value: Any, path: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= MOST_DOLLARS:
        raise SpecError(f"{path} must be US dollars from 0 to {MOST_DOLLARS}")
    return float(value)


def _text(longest: int) -> Reader:
    def read(value: Any, path: str) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise SpecError(f"{path} must be a text of at most {longest} characters")
        return value

    return read


def _flag(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"{path} must be true or false")
    return value


def _one_of(words: type[StrEnum]) -> Reader:
    def read(value: Any, path: str) -> StrEnum:
        if value not in list(words):
            raise SpecError(f"{path} must be one of: {', '.join(words)}")
        return words(value)

    return read


def _many(most: int, item: Reader, least: int = 0) -> Reader:
    def read(value: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            bounds = f"{least} to {most}" if least else f"at most {most}"
            raise SpecError(f"{path} must be a list of {bounds} entries")
        return tuple(item(entry, f"{path}[{n}]") for n, entry in enumerate(value))

    return read


def _region_name(value: Any, path: str) -> str:
    """A region, or how the names of some begin."""
    text: str = _text(63)(value, path)
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text):
        raise SpecError(f"{path} must be a region or how its name begins, such as eu or eu-west")
    return text


def _slots_or_percent(value: Any, path: str) -> int | Percent:
    """A number of slots, or a text such as 25%."""
    if type(value) is int and 0 <= value <= 10_000:
        return value
    if isinstance(value, str) and re.fullmatch(r"(0|[1-9]?[0-9])%", value):
        return Percent(int(value[:-1]))
    raise SpecError(f"{path} must be a whole number from 0 to 10000, or a percentage such as 25%")


def _window(value: Any, path: str) -> Window:
    """A window whose cron expression and time zone are known."""
    if not isinstance(value, dict) or not {"start", "durationSeconds", "minPods"} <= value.keys():
        raise SpecError(f"{path} needs start, durationSeconds and minPods")
    window = Window(
        start=_text(128)(value["start"], f"{path}.start"),
        duration_seconds=_number(60, LONGEST_WINDOW_SECONDS)(
            value["durationSeconds"], f"{path}.durationSeconds"
        ),
        min_pods=_number(0, 1000)(value["minPods"], f"{path}.minPods"),
        time_zone=_text(64)(value.get("timeZone", "UTC"), f"{path}.timeZone"),
    )
    if why := trouble(window):
        raise SpecError(f"{path}.{why}")
    return window


def _quantities(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise SpecError(f"{path} must name resources and amounts, such as cpu: 2")
    return {str(name): str(amount) for name, amount in value.items()}


def _reply(value: Any, path: str) -> Reply:
    """A rule whose pattern compiles and whose answer names only groups that the pattern has."""
    if not isinstance(value, dict) or not {"match", "say"} <= value.keys():
        raise SpecError(f"{path} needs match and say")
    match = _text(256)(value["match"], f"{path}.match")
    say = _text(1024)(value["say"], f"{path}.say")
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise SpecError(f"{path}.match is not a regular expression: {error}") from error
    groups = {str(n) for n in range(pattern.groups + 1)} | pattern.groupindex.keys() | {"heard"}
    if strange := sorted(set(re.findall(r"\{(\w+)\}", say)) - groups):
        raise SpecError(
            f"{path}.say names {{{strange[0]}}}, but match has no such group: it has {pattern.groups}"
        )
    return Reply(match=match, say=say)


def _guard(value: Any, path: str) -> Guard:
    """A guard that has something to say where it is to say something."""
    if not isinstance(value, dict) or not {"match", "do"} <= value.keys():
        raise SpecError(f"{path} needs match and do")
    guard = Guard(
        match=_text(256)(value["match"], f"{path}.match"),
        do=_one_of(GuardAction)(value["do"], f"{path}.do"),
        say=_text(1024)(value.get("say", ""), f"{path}.say"),
    )
    if bool(guard.say) != (guard.do is GuardAction.SAY):
        raise SpecError(f"{path}: say goes with do: say; set both or neither")
    return guard


def _jwks(value: Any, path: str) -> str:
    """A JWKS document. Whether its keys can be used, the gateway knows; that it holds none that are private
    is said here, for whoever writes one into a resource has told it to all who may read that.
    """
    text: str = _text(8192)(value, path)
    try:
        keys = json.loads(text)["keys"]
        usable = all(isinstance(key["kty"], str) for key in keys) and bool(keys)
        private = any("d" in key or key["kty"] == "oct" for key in keys)
    except (ValueError, TypeError, KeyError, RecursionError):
        usable = private = False
    if private:
        raise SpecError(f"{path} holds a private key: remove it, and take that key out of use")
    if not usable:
        raise SpecError(f'{path} must be a JWKS document: {{"keys": [{{"kty": …}}, …]}}')
    return text


Table = Mapping[str, tuple[str, Reader]]
"""Path within the group → (field of the dataclass, reader)."""

LIMITS: Final[Table] = {
    "concurrentCalls": ("concurrent_calls", _number(0, 100_000)),
    "startsPerMinute": ("starts_per_minute", _number(0, 100_000)),
    "minutesPerDay": ("minutes_per_day", _number(0, 10_000_000)),
    "guaranteedSlots": ("guaranteed_slots", _number(0, 10_000)),
    "burstShare": ("burst_share", _number(0, 100)),
}


def _override(value: Any, path: str) -> Override:
    if not isinstance(value, dict) or "tenant" not in value:
        raise SpecError(f"{path} needs tenant")
    given = {key: LIMITS[key] for key in value if key in LIMITS}
    limits = {name: read(value[key], f"{path}.{key}") for key, (name, read) in given.items()}
    return Override(tenant=_text(128)(value["tenant"], f"{path}.tenant"), limits=limits)


FIELDS: Final[Mapping[str, Table]] = {
    "engine": {
        "type": ("type", _one_of(EngineType)),
        "greeting": ("greeting", _text(1024)),
        "replies": ("replies", _many(64, _reply)),
        "fallback": ("fallback", _text(1024)),
        "model": ("model", _text(512)),
        "stt": ("stt", _text(512)),
        "tokenSecretRef.name": ("token_secret", _text(253)),
        "quantization": ("quantization", _one_of(Quantization)),
        "contextSeconds": ("context_seconds", _number(0, 3600)),
    },
    "engine.policy": {
        "bannedWords": ("banned_words", _many(64, _text(64))),
        "bargeIn": ("barge_in", _flag),
        "guards": ("guards", _many(64, _guard)),
    },
    "engine.policy.hook": {
        "url": ("url", _text(1024)),
        "deadlineMilliseconds": ("deadline_milliseconds", _number(50, 5000)),
        "onFailure": ("on_failure", _one_of(OnFailure)),
        "tokenSecretRef.name": ("token_secret", _text(253)),
    },
    "warm": {
        "image": ("image", _text(1024)),
        "slotsPerPod": ("slots_per_pod", _number(1, 256)),
        "minPods": ("min_pods", _number(0, 1000)),
        "maxPods": ("max_pods", _number(0, 1000)),
        "bufferSlots": ("buffer_slots", _slots_or_percent),
        "autoscaling": ("autoscaling", _one_of(Autoscaling)),
        "replicas": ("replicas", _number(0, 2**31 - 1)),
        "scaleDown.delaySeconds": ("scale_down_delay_seconds", _number(0, 86_400)),
        "scaleDown.mode": ("scale_down_mode", _one_of(ScaleDown)),
        "startupSecondsHint": ("startup_seconds_hint", _number(1, 3600)),
        "schedule": ("schedule", _many(16, _window)),
    },
    "warm.gpu": {
        "resource": ("resource", _text(253)),
        "count": ("count", _number(0, 8)),
    },
    "warm.resources": {
        "requests": ("requests", _quantities),
        "limits": ("limits", _quantities),
    },
    "burst.modal": {
        "credentialsSecretRef.name": ("credentials_secret", _text(253)),
        "gpu": ("gpu", _many(8, _text(64))),
        "regions": ("regions", _many(4, _one_of(Region), least=1)),
        "slotsPerContainer": ("slots_per_container", _number(1, 256)),
        "minContainers": ("min_containers", _number(0, 1000)),
        "bufferContainers": ("buffer_containers", _number(0, 1000)),
        "maxContainers": ("max_containers", _number(1, 1000)),
        "scaledownWindowSeconds": ("scaledown_window_seconds", _number(2, 3600)),
        "startDeadlineSeconds": ("start_deadline_seconds", _number(1, 60)),
        "snapshot": ("snapshot", _one_of(Snapshot)),
        "environment": ("environment", _text(64)),
        "image": ("image", _text(1024)),
    },
    "burst.modal.budget": {
        "perHour": ("per_hour", _dollars),
        "perDay": ("per_day", _dollars),
    },
    "session": {
        "maxSeconds": ("max_seconds", _number(60, 86_400)),
        "idleSeconds": ("idle_seconds", _number(5, 86_400)),
        "answerSeconds": ("answer_seconds", _number(1, 60)),
        "protocols": ("protocols", _many(4, _one_of(Protocol))),
    },
    "access": {
        "public": ("public", _flag),
        "apiKeysSecretRef.name": ("api_keys_secret", _text(253)),
        "origins": ("origins", _many(64, _text(256))),
    },
    "access.jwt": {
        "issuer": ("issuer", _text(512)),
        "audience": ("audience", _text(512)),
        "jwksUri": ("jwks_uri", _text(1024)),
        "jwks": ("jwks", _jwks),
    },
    "access.tenants": {
        "claim": ("claim", _text(256)),
        "overrides": ("overrides", _many(64, _override)),
    },
    "access.tenants.limits": LIMITS,
    "policy": {
        "dataClass": ("data_class", _one_of(DataClass)),
        "baa.acknowledged": ("baa_acknowledged", _flag),
        "residency": ("residency", _many(16, _region_name)),
        "transcripts": ("transcripts", _one_of(Transcripts)),
        "recordings": ("recordings", _one_of(Recordings)),
    },
    "slo": {
        "admissionMs": ("admission_ms", _number(0, 60_000)),
        "firstAudioMs": ("first_audio_ms", _number(0, 60_000)),
    },
}


def _at(value: Any, path: str) -> Any:
    """What stands at a dotted path, None if nothing does."""
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _fields(spec: Json, group: str) -> dict[str, Any]:
    """The dataclass fields that a group sets; what it leaves out keeps the dataclass's default."""
    values = {path: _at(spec, f"{group}.{path}") for path in FIELDS[group]}
    return {
        field_name: read(value, f"{group}.{path}")
        for path, (field_name, read) in FIELDS[group].items()
        if (value := values[path]) is not None
    }


def _required(fields: dict[str, Any], name: str, sentence: str) -> dict[str, Any]:
    if name not in fields:
        raise SpecError(sentence)
    return fields


def _call_policy(spec: Json) -> CallPolicy | None:
    if _at(spec, "engine.policy") is None:
        return None
    hook = None
    if _at(spec, "engine.policy.hook") is not None:
        sentence = "engine.policy.hook needs url: where to ask"
        hook = Hook(**_required(_fields(spec, "engine.policy.hook"), "url", sentence))
    return CallPolicy(hook=hook, **_fields(spec, "engine.policy"))


def _access(spec: Json) -> Access:
    tenants = Tenants(
        limits=Limits(**_fields(spec, "access.tenants.limits")), **_fields(spec, "access.tenants")
    )
    jwt = None
    if _at(spec, "access.jwt") is not None:
        sentence = "access.jwt needs issuer and audience: what iss and aud of your tokens are"
        fields = _required(_fields(spec, "access.jwt"), "issuer", sentence)
        jwt = Jwt(**_required(fields, "audience", sentence))
    return Access(jwt=jwt, tenants=tenants, **_fields(spec, "access"))


def _burst(spec: Json) -> Burst | None:
    if _at(spec, "burst.modal") is None:
        return None
    fields = _fields(spec, "burst.modal")
    sentence = (
        "burst.modal.credentialsSecretRef.name must name a Secret with token-id and token-secret"
    )
    budget = Budget(**_fields(spec, "burst.modal.budget"))
    return Burst(budget=budget, **_required(fields, "credentials_secret", sentence))
