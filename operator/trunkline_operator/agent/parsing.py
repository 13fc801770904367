"""The object that the API holds, parsed once at the edge into the values of spec.py.

The API server checks shapes and most rules; what it cannot say (a pattern that is no regular expression),
and whatever an older CRD let pass, ends here as a `SpecError` with a sentence for whoever wrote the resource.
"""

from collections.abc import Mapping
from typing import Any, Final

from trunkline_operator.agent.readers import (
    AUTO,
    Reader,
    dollars,
    entry,
    flag,
    guard_rule,
    jwks_document,
    label_value,
    labels,
    many,
    number,
    one_of,
    quantities,
    region_name,
    region_or_none,
    reply_rule,
    schedule_window,
    slots_or_auto,
    slots_or_percent,
    text,
    volume,
    warm_region,
)
from trunkline_operator.agent.rules import broken
from trunkline_operator.agent.spec import (
    Access,
    Autoscaling,
    Budget,
    Burst,
    CallPolicy,
    Certificates,
    ContextEnd,
    DataClass,
    Engine,
    EngineType,
    Gpu,
    Hook,
    Json,
    Jwt,
    Limits,
    OnFailure,
    Override,
    Policy,
    Protocol,
    Quantization,
    Recordings,
    Region,
    Resources,
    ScaleDown,
    Session,
    Slo,
    Snapshot,
    SpecError,
    Template,
    Tenants,
    Transcripts,
    Twilio,
    Upstream,
    VoiceAgent,
    Warm,
    epoch,
)


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
            template=Template(**_fields(spec, "warm.template")),
            **_warm_fields(spec),
        ),
        burst=_burst(spec),
        session=Session(**_fields(spec, "session")),
        access=_access(spec),
        policy=Policy(**_fields(spec, "policy")),
        slo=Slo(**_fields(spec, "slo")),
        upstream=_upstream(spec),
    )
    if sentences := "; ".join(broken(agent)):
        raise SpecError(sentences)
    return agent


# --- from JSON, a table a group -------------------------------------------------------------------------

Table = Mapping[str, tuple[str, Reader]]
"""Path within the group → (field of the dataclass, reader)."""

LIMITS: Final[Table] = {
    "concurrentCalls": ("concurrent_calls", number(0, 100_000)),
    "startsPerMinute": ("starts_per_minute", number(0, 100_000)),
    "minutesPerDay": ("minutes_per_day", number(0, 10_000_000)),
    "guaranteedSlots": ("guaranteed_slots", number(0, 10_000)),
    "burstShare": ("burst_share", number(0, 100)),
}


def _override(value: Any, path: str) -> Override:
    if not isinstance(value, dict) or "tenant" not in value:
        raise SpecError(f"{path} needs tenant")
    given = {key: LIMITS[key] for key in value if key in LIMITS}
    limits = {name: read(value[key], f"{path}.{key}") for key, (name, read) in given.items()}
    return Override(tenant=text(128)(value["tenant"], f"{path}.tenant"), limits=limits)


FIELDS: Final[Mapping[str, Table]] = {
    "engine": {
        "type": ("type", one_of(EngineType)),
        "greeting": ("greeting", text(1024)),
        "replies": ("replies", many(64, reply_rule)),
        "fallback": ("fallback", text(1024)),
        "model": ("model", text(512)),
        "stt": ("stt", text(512)),
        "tokenSecretRef.name": ("token_secret", text(253)),
        "quantization": ("quantization", one_of(Quantization)),
        "contextSeconds": ("context_seconds", number(0, 3600)),
        "contextEnd": ("context_end", one_of(ContextEnd)),
    },
    "engine.policy": {
        "bannedWords": ("banned_words", many(64, text(64))),
        "bargeIn": ("barge_in", flag),
        "guards": ("guards", many(64, guard_rule)),
    },
    "engine.policy.hook": {
        "url": ("url", text(1024)),
        "deadlineMilliseconds": ("deadline_milliseconds", number(50, 5000)),
        "onFailure": ("on_failure", one_of(OnFailure)),
        "tokenSecretRef.name": ("token_secret", text(253)),
    },
    "warm": {
        "image": ("image", text(1024)),
        "slotsPerPod": ("slots_per_pod", slots_or_auto),
        "minPods": ("min_pods", number(0, 1000)),
        "maxPods": ("max_pods", number(0, 1000)),
        "regions": ("regions", many(16, warm_region)),
        "bufferSlots": ("buffer_slots", slots_or_percent),
        "autoscaling": ("autoscaling", one_of(Autoscaling)),
        "replicas": ("replicas", number(0, 2**31 - 1)),
        "scaleDown.delaySeconds": ("scale_down_delay_seconds", number(0, 86_400)),
        "scaleDown.mode": ("scale_down_mode", one_of(ScaleDown)),
        "startupSecondsHint": ("startup_seconds_hint", number(1, 3600)),
        "schedule": ("schedule", many(16, schedule_window)),
    },
    "warm.gpu": {
        "resource": ("resource", text(253)),
        "count": ("count", number(0, 8)),
        "product": ("product", label_value),
    },
    "warm.resources": {
        "requests": ("requests", quantities),
        "limits": ("limits", quantities),
    },
    "warm.template": {
        "nodeSelector": ("node_selector", labels),
        "tolerations": ("tolerations", many(32, entry())),
        "affinity": ("affinity", entry()),
        "topologySpreadConstraints": (
            "spread",
            many(8, entry("maxSkew", "topologyKey", "whenUnsatisfiable")),
        ),
        "volumes": ("volumes", many(16, volume)),
        "volumeMounts": ("volume_mounts", many(16, entry("name", "mountPath"))),
        "env": ("env", many(32, entry("name", "value"))),
        "imagePullSecrets": ("image_pull_secrets", many(8, entry("name"))),
        "priorityClassName": ("priority_class", text(253)),
        "serviceAccountName": ("service_account", text(253)),
        "runtimeClassName": ("runtime_class", text(253)),
    },
    "burst.modal": {
        "credentialsSecretRef.name": ("credentials_secret", text(253)),
        "gpu": ("gpu", many(8, text(64))),
        "regions": ("regions", many(4, one_of(Region), least=1)),
        "slotsPerContainer": ("slots_per_container", number(1, 256)),
        "minContainers": ("min_containers", number(0, 1000)),
        "bufferContainers": ("buffer_containers", number(0, 1000)),
        "maxContainers": ("max_containers", number(1, 1000)),
        "scaledownWindowSeconds": ("scaledown_window_seconds", number(2, 3600)),
        "startDeadlineSeconds": ("start_deadline_seconds", number(1, 60)),
        "snapshot": ("snapshot", one_of(Snapshot)),
        "environment": ("environment", text(64)),
        "image": ("image", text(1024)),
    },
    "burst.modal.budget": {
        "perHour": ("per_hour", dollars),
        "perDay": ("per_day", dollars),
    },
    "upstream": {
        "url": ("url", text(512)),
        "model": ("model", text(256)),
        "tokenSecretRef.name": ("token_secret", text(253)),
        "deadlineSeconds": ("deadline_seconds", number(1, 60)),
        "dataClasses": ("data_classes", many(2, one_of(DataClass), least=1)),
        "region": ("region", region_or_none),
    },
    "session": {
        "maxSeconds": ("max_seconds", number(60, 86_400)),
        "idleSeconds": ("idle_seconds", number(5, 86_400)),
        "answerSeconds": ("answer_seconds", number(1, 60)),
        "waitingCallers": ("waiting_callers", number(0, 1000)),
        "protocols": ("protocols", many(4, one_of(Protocol))),
    },
    "access": {
        "public": ("public", flag),
        "apiKeysSecretRef.name": ("api_keys_secret", text(253)),
        "origins": ("origins", many(64, text(256))),
    },
    "access.jwt": {
        "issuer": ("issuer", text(512)),
        "audience": ("audience", text(512)),
        "jwksUri": ("jwks_uri", text(1024)),
        "jwks": ("jwks", jwks_document),
    },
    "access.clientCertificates": {"names": ("names", many(64, text(128)))},
    "access.twilio": {
        "authTokenSecretRef.name": ("auth_token_secret", text(253)),
        "publicUrl": ("public_url", text(1024)),
    },
    "access.tenants": {
        "claim": ("claim", text(256)),
        "overrides": ("overrides", many(64, _override)),
    },
    "access.tenants.limits": LIMITS,
    "policy": {
        "dataClass": ("data_class", one_of(DataClass)),
        "baa.acknowledged": ("baa_acknowledged", flag),
        "residency": ("residency", many(16, region_name)),
        "transcripts": ("transcripts", one_of(Transcripts)),
        "recordings": ("recordings", one_of(Recordings)),
    },
    "slo": {
        "admissionMs": ("admission_ms", number(0, 60_000)),
        "firstAudioMs": ("first_audio_ms", number(0, 60_000)),
        "callsAtOnce": ("calls_at_once", number(0, 100_000)),
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
    return Access(
        jwt=jwt,
        certificates=_certificates(spec),
        twilio=_twilio(spec),
        tenants=tenants,
        **_fields(spec, "access"),
    )


def _certificates(spec: Json) -> Certificates | None:
    if _at(spec, "access.clientCertificates") is None:
        return None
    return Certificates(**_fields(spec, "access.clientCertificates"))


def _twilio(spec: Json) -> Twilio | None:
    if _at(spec, "access.twilio") is None:
        return None
    sentence = (
        "access.twilio needs authTokenSecretRef.name and publicUrl: whose calls, and to where"
    )
    fields = _required(_fields(spec, "access.twilio"), "auth_token_secret", sentence)
    return Twilio(**_required(fields, "public_url", sentence))


def _warm_fields(spec: Json) -> dict[str, Any]:
    fields = _fields(spec, "warm")
    if fields.get("slots_per_pod") != AUTO:
        return fields
    assumed = {name: value for name, value in fields.items() if name != "slots_per_pod"}
    return assumed | {"slots_auto": True}


def _burst(spec: Json) -> Burst | None:
    if _at(spec, "burst.modal") is None:
        return None
    fields = _fields(spec, "burst.modal")
    sentence = (
        "burst.modal.credentialsSecretRef.name must name a Secret with token-id and token-secret"
    )
    budget = Budget(**_fields(spec, "burst.modal.budget"))
    return Burst(budget=budget, **_required(fields, "credentials_secret", sentence))


def _upstream(spec: Json) -> Upstream | None:
    if _at(spec, "upstream") is None:
        return None
    sentence = "upstream needs url: where calls are to go"
    return Upstream(**_required(_fields(spec, "upstream"), "url", sentence))
