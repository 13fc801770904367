"""A `VoiceAgent` as frozen values. Defaults stand here and in the CRD, and a test holds the two equal."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from trunkline_operator.scaling.schedule import Window

Json = dict[str, Any]
"""An object of the Kubernetes API, as JSON."""


class SpecError(ValueError):
    """The resource makes no sense; the message says what to change. Its author must act."""


class EngineType(StrEnum):
    LOOPBACK = "loopback"
    SPEECH = "speech"
    MOSHI = "moshi"


class Quantization(StrEnum):
    NONE = "none"
    INT8 = "int8"


class Autoscaling(StrEnum):
    INTERNAL = "internal"  # the operator counts slots
    EXTERNAL = "external"  # something else writes /scale


class ScaleDown(StrEnum):
    DRAIN = "drain"  # the pod with the fewest calls takes no new one, and goes after its last
    WAIT = "wait"  # only a pod without calls is taken away


class Snapshot(StrEnum):
    CPU = "cpu"
    GPU = "gpu"
    NONE = "none"


class Region(StrEnum):
    """Where Modal can take sessions in."""

    US_EAST = "us-east"
    US_WEST = "us-west"
    EU_WEST = "eu-west"
    AP_SOUTH = "ap-south"


class DataClass(StrEnum):
    STANDARD = "standard"
    PHI = "phi"  # protected health information: leaves the cluster only under an agreement


class Transcripts(StrEnum):
    """Who is told what callers say."""

    CALLER = "caller"  # the caller, and the hook of the agent's policy
    NONE = "none"


class Recordings(StrEnum):
    """Who keeps the audio of calls."""

    NONE = "none"


class Protocol(StrEnum):
    """What callers speak."""

    REALTIME = "realtime"
    MOSHI = "moshi"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    match: str
    say: str


class GuardAction(StrEnum):
    SAY = "say"
    MUTE = "mute"
    HANG_UP = "hangUp"


class OnFailure(StrEnum):
    """What follows when a hook does not answer."""

    OPEN = "open"  # the call goes on as without it
    CLOSED = "closed"  # the agent is mute until it answers again


class ContextEnd(StrEnum):
    """What happens to Moshi's window when it is full."""

    SLIDE = "slide"  # the oldest frame is forgotten with each new one
    REFRESH = "refresh"  # half of it is forgotten at once, at a pause


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What is done when a pattern is found in what a caller says."""

    match: str
    do: GuardAction
    say: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """`engine.policy.hook`."""

    url: str
    deadline_milliseconds: int = 500
    on_failure: OnFailure = OnFailure.OPEN
    token_secret: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPolicy:
    """`engine.policy`."""

    banned_words: tuple[str, ...] = ()
    barge_in: bool = False
    guards: tuple[Guard, ...] = ()
    hook: Hook | None = None

    @property
    def listens(self) -> bool:
        """Whether it needs to know what the caller says."""
        return self.barge_in or bool(self.guards) or self.hook is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    type: EngineType
    greeting: str = ""
    replies: tuple[Reply, ...] = ()
    fallback: str = "I did not catch that. Please say it again."
    # Of moshi alone.
    model: str = ""
    stt: str = ""
    token_secret: str = ""
    quantization: Quantization = Quantization.NONE
    context_seconds: int = 0
    context_end: ContextEnd = ContextEnd.SLIDE
    policy: CallPolicy | None = None


PRODUCT_LABEL: Final = "nvidia.com/gpu.product"
"""Of nodes; NVIDIA's GPU feature discovery writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    resource: str = "nvidia.com/gpu"
    count: int = 1
    product: str = ""  # by `PRODUCT_LABEL`; "" = any


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    requests: Mapping[str, str] = field(default_factory=lambda: {"cpu": "250m", "memory": "256Mi"})
    limits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """`warm.template`: what else a pod needs. Entries are as a pod has them, and the API server judges them."""

    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Json, ...] = ()
    affinity: Json = field(default_factory=dict)
    spread: tuple[Json, ...] = ()  # topologySpreadConstraints, of the agent's own pods
    volumes: tuple[Json, ...] = ()
    volume_mounts: tuple[Json, ...] = ()
    env: tuple[Json, ...] = ()
    image_pull_secrets: tuple[Json, ...] = ()
    priority_class: str = ""
    service_account: str = ""
    runtime_class: str = ""


@dataclass(frozen=True, slots=True)
class Percent:
    """So many of a hundred slots."""

    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmRegion:
    """An entry of `warm.regions`: the pods of one region."""

    name: str
    min_pods: int
    max_pods: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    image: str = ""
    slots_per_pod: int = 4  # with `slots_auto` as measured, or else as is assumed
    slots_auto: bool = False
    min_pods: int = 1
    max_pods: int = 4
    regions: tuple[WarmRegion, ...] = ()  # () = any, with the bounds above
    buffer_slots: int | Percent = 1
    gpu: Gpu = Gpu()
    resources: Resources = field(default_factory=Resources)
    template: Template = field(default_factory=Template)
    autoscaling: Autoscaling = Autoscaling.INTERNAL
    replicas: int | None = None
    scale_down_delay_seconds: int = 60
    scale_down_mode: ScaleDown = ScaleDown.DRAIN
    startup_seconds_hint: int = 60
    schedule: tuple[Window, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """`burst.modal.budget`: the most that burst may cost, in US dollars; None is no limit."""

    per_hour: float | None = None
    per_day: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """`spec.burst.modal`."""

    credentials_secret: str
    gpu: tuple[str, ...] = ("L4",)
    regions: tuple[Region, ...] = (Region.US_EAST,)  # in the order in which they are tried
    slots_per_container: int = 4
    min_containers: int = 0
    buffer_containers: int = 0
    max_containers: int = 10
    scaledown_window_seconds: int = 60
    start_deadline_seconds: int = 7
    snapshot: Snapshot = Snapshot.CPU
    environment: str = ""
    image: str = ""
    budget: Budget = Budget()


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """`spec.upstream`: another gateway, or a hosted endpoint, for what finds no slot here."""

    url: str
    model: str = ""  # "" = namespace/name
    token_secret: str = ""
    deadline_seconds: int = 3
    data_classes: tuple[DataClass, ...] = (DataClass.STANDARD,)
    region: str = ""  # "" = nobody knows


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    max_seconds: int = 1800
    idle_seconds: int = 300
    answer_seconds: int = 8
    waiting_callers: int = 0  # at each gateway
    protocols: tuple[Protocol, ...] = ()  # () = all


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """`spec.policy`: what may happen to calls."""

    data_class: DataClass = DataClass.STANDARD
    baa_acknowledged: bool = False
    residency: tuple[str, ...] = ()  # regions, or how their names begin; () = anywhere
    transcripts: Transcripts = Transcripts.CALLER
    recordings: Recordings = Recordings.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """`spec.slo`: what is promised, and so measured; 0 = not."""

    admission_ms: int = 0
    first_audio_ms: int = 0
    calls_at_once: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Jwt:
    """`access.jwt`: the issuer whose tokens are taken."""

    issuer: str
    audience: str
    jwks_uri: str | None = None
    jwks: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """`access.clientCertificates`: holders that may call; none named: all."""

    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Twilio:
    """`access.twilio`: the calls that Twilio makes to one URL."""

    auth_token_secret: str
    public_url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one tenant, at all gateways together; 0 is no limit, but of `burst_share`."""

    concurrent_calls: int = 0
    starts_per_minute: int = 0
    minutes_per_day: int = 0
    guaranteed_slots: int = 0
    burst_share: int = 100  # percent of the agent's burst budget; 0 keeps the tenant off burst


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """One tenant's own limits: fields of `Limits` that differ."""

    tenant: str
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenants:
    """`access.tenants`."""

    claim: str = "sub"
    limits: Limits = Limits()
    overrides: tuple[Override, ...] = ()

    @property
    def guaranteed(self) -> int:
        """Slots that are kept for those with limits of their own, all together."""
        return sum(each.limits.get("guaranteed_slots", 0) for each in self.overrides)

    def of(self, override: Override) -> Limits:
        """The limits of a tenant that has some of its own."""
        return replace(self.limits, **override.limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    public: bool = False
    api_keys_secret: str = ""
    jwt: Jwt | None = None
    certificates: Certificates | None = None
    twilio: Twilio | None = None
    tenants: Tenants = Tenants()
    origins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VoiceAgent:
    """One agent. Times are seconds since the epoch."""

    namespace: str
    name: str
    uid: str
    generation: int
    deleted_at: float | None  # when its deletion was asked for
    finalizers: tuple[str, ...]
    engine: Engine
    warm: Warm
    burst: Burst | None
    session: Session
    access: Access
    policy: Policy = Policy()
    slo: Slo = Slo()
    region: str = ""  # of the operator that serves it (`policy.here`); "" = it was told none
    upstream: Upstream | None = None

    @property
    def key(self) -> str:
        """`namespace/name`, as gateways know it."""
        return f"{self.namespace}/{self.name}"


def epoch(stamp: str | None) -> float | None:
    """Seconds since the epoch, from the API's RFC 3339."""
    return None if stamp is None else datetime.fromisoformat(stamp).timestamp()
