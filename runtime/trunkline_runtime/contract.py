"""What Trunkline's processes say to each other: names, ports, headers, close codes and messages.

Control messages are JSON objects in WebSocket text frames, one `type` each. A receiver ignores types and
keys that it does not know. Durations are seconds as a float; clocks of two machines are never compared.
This file imports nothing of ours, so that the operator may read it.
"""

import base64
import hmac
from enum import IntEnum
from typing import Final, Literal, NotRequired, TypedDict

# The resource.
GROUP: Final = "trunkline.dev"
VERSION: Final = "v1alpha1"
PLURAL: Final = "voiceagents"
KIND: Final = "VoiceAgent"

# On what the operator makes.
LABEL_AGENT: Final = f"{GROUP}/agent"
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGED_BY: Final = "trunkline"
ANNOTATION_DRAINING: Final = f"{GROUP}/draining"  # when the drain began, RFC 3339
ANNOTATION_TEMPLATE: Final = f"{GROUP}/template"  # hash of image, model, hardware and slots
ANNOTATION_CA: Final = f"{GROUP}/ca"  # identity of the CA of its links; none: plain
# Of agents with burst: Kubernetes ends pods by itself, and no app at Modal.
FINALIZER: Final = f"{GROUP}/drain"

# Default ports. A gateway listens on the first two and on HEALTH_PORT, a worker on WORKER_PORT and
# HEALTH_PORT, an operator on HEALTH_PORT alone.
CALLS_PORT: Final = 8080
CONTROL_PORT: Final = 8081
WORKER_PORT: Final = 8000
HEALTH_PORT: Final = 9090

# Paths.
REALTIME_PATH: Final = "/v1/realtime"  # OpenAI Realtime, on gateway and worker alike
MOSHI_PATH: Final = "/api/chat"  # Moshi's own protocol, likewise
CLIENT_SECRETS_PATH: Final = "/v1/realtime/client_secrets"  # OpenAI's; a gateway mints
TICKETS_PATH: Final = "/v1/realtime/tickets"  # the same for one use in a URL
WORKERS_PATH: Final = "/v1/workers"  # a worker dials a gateway's control port
OPERATOR_PATH: Final = "/v1/operator"  # the operator dials a gateway's control port
HEALTHZ_PATH: Final = "/healthz"
READYZ_PATH: Final = "/readyz"
METRICS_PATH: Final = "/metrics"
STATE_PATH: Final = "/state"  # of a gateway, on its health port: `State`

# Headers of the data link (gateway to worker); CALL_HEADER also stands in the caller's 101 and 503.
CALL_HEADER: Final = "Trunkline-Call"
TICKET_HEADER: Final = "Trunkline-Ticket"
HOPS_HEADER: Final = "Trunkline-Hops"  # of a call that a gateway sends on: how many have
START_HEADER: Final = "Trunkline-Start"
"""In a burst worker's answers: how its container came up, cold or restored, and for how many seconds it has been."""
SEQ_HEADER: Final = "Trunkline-Seq"
"""In a pod's answer to a gateway that asks for a slot: the `seq` that a `Free` would have right after it."""
AGENT_HEADER: Final = "Trunkline-Agent"  # on the control link: namespace/name
CHANGES_HEADER: Final = (
    "Trunkline-Changes"  # "1" on the operator's link: this side reads what differs
)

# Environment of a worker, in a pod and in a Modal container alike.
ENV_AGENT: Final = "TRUNKLINE_AGENT"  # namespace/name
ENV_WORKER: Final = "TRUNKLINE_WORKER"  # the pod's name
ENV_ENGINE: Final = "TRUNKLINE_ENGINE"  # loopback | speech | moshi
ENV_SLOTS: Final = "TRUNKLINE_SLOTS"  # a number, or AUTO_SLOTS with the Moshi engine
AUTO_SLOTS: Final = "auto"  # as many as the engine finds that it can hold
ENV_HOST: Final = "TRUNKLINE_HOST"  # address to listen on; a pod's own
ENV_PORT: Final = "TRUNKLINE_PORT"
ENV_HEALTH_PORT: Final = "TRUNKLINE_HEALTH_PORT"
ENV_GATEWAYS: Final = "TRUNKLINE_GATEWAYS"  # host:port,… ; a name stands for all its addresses
ENV_WORKER_KEY: Final = "TRUNKLINE_WORKER_KEY"  # proves the agent to gateways; pods only
ENV_TICKET_KEY: Final = "TRUNKLINE_TICKET_KEY"  # checks gateways' tickets; Modal containers only
ENV_MAX_SECONDS: Final = "TRUNKLINE_MAX_SECONDS"  # the longest call, and so the longest drain
# PEM texts, pods only. All three or none: with them every link of the worker is TLS.
ENV_TLS_CA: Final = "TRUNKLINE_TLS_CA"  # whom its gateways' certificates must come from
ENV_TLS_CERT: Final = "TRUNKLINE_TLS_CERT"  # for `worker_server_name`, with any chain behind it
ENV_TLS_KEY: Final = "TRUNKLINE_TLS_KEY"
# Of a worker with the Moshi engine.
ENV_MODEL: Final = "TRUNKLINE_MODEL"  # tiny, owner/name[@revision] at Hugging Face, or a folder
ENV_STT_MODEL: Final = "TRUNKLINE_STT_MODEL"  # likewise; empty for no transcript
ENV_HUB_TOKEN: Final = "HF_TOKEN"  # Hugging Face's own name for it
ENV_DEVICE: Final = "TRUNKLINE_DEVICE"  # cuda | cpu
ENV_INT8: Final = "TRUNKLINE_INT8"  # 1: quantise Moshi's linear layers
ENV_CONTEXT_SECONDS: Final = "TRUNKLINE_CONTEXT_SECONDS"  # 0: as far back as the model can look
ENV_CONTEXT_END: Final = "TRUNKLINE_CONTEXT_END"  # slide | refresh
# Environment of gateway and operator.
ENV_OPERATOR_TOKEN: Final = "TRUNKLINE_OPERATOR_TOKEN"  # the bearer of their link
ENV_LEDGER_TOKEN: Final = "TRUNKLINE_LEDGER_TOKEN"  # a gateway's bearer at its --ledger-url

# Files of a gateway's --control-tls directory and of an operator's --ca-dir, named as in a TLS Secret.
TLS_CERT_FILE: Final = "tls.crt"
TLS_KEY_FILE: Final = "tls.key"
CA_CERT_FILE: Final = "ca.crt"
CA_KEY_FILE: Final = "ca.key"

SETTINGS_TYPE: Final = "trunkline.settings"
"""The type of the first message on a data link, gateway to worker: `{type, settings}`."""

# How a call's account reaches its gateway, which relays without decoding. Pings end at either side of the data link,
# so neither caller nor engine ever sees these. A worker that knows them says so in its 101 by ACCOUNT_HEADER.
END_PING: Final = b"trunkline.end"
"""Gateway to worker: the call is over. It is closed as if the caller had gone; the account follows."""
ACCOUNT_PING: Final = b"trunkline "
"""Worker to gateway, before the Close: this, and a JSON object `{in, out, first, turns, gaps}`, at most 125 bytes in all.

Seconds of audio from the caller and to it, milliseconds from the worker's 101 to the first of the latter (null: none),
how often the agent spoke, and how often it fell silent within a reply because no audio was there.
"""
ACCOUNT_HEADER: Final = "Trunkline-Account"  # "1"

HEARTBEAT_SECONDS: Final = 1.0
DEAD_AFTER_SECONDS: Final = (
    3.0  # silent for so long, a worker gets no new call, and a link is dialled anew
)
PROTOCOL_VERSION: Final = 1  # of operator and gateway, and the routes file
WORKER_PROTOCOL_VERSION: Final = 2  # of worker and gateway

# Gateways behind one name. They are a handful, and a name that stands for more is a mistake.
MAX_GATEWAYS: Final = 256
# The longest control message: 1,000 agents' routes of 8 KiB each fit.
MAX_CONTROL_BYTES: Final = 16 * 2**20
# The longest message of a call. 512 KiB of Realtime JSON is 8 s of PCM16 in one event.
MAX_CALL_MESSAGE_BYTES: Final = 512 * 2**10


def ticket(link: int, key: str, number: int, call: str) -> str:
    """What opens one data link of a pod for one call: `LINK.NUMBER.CALL.MAC`, of printable characters without a blank.

    The gateway counts `number` up on each control link. MAC is HMAC-SHA256 of all before its dot, by the link's
    `ticketKey`, in URL-safe base64. A worker takes each number once, and none of a link that is gone.
    """
    asked = f"{link}.{number}.{call}"
    mac = hmac.digest(key.encode(), asked.encode(), "sha256")
    return f"{asked}.{base64.urlsafe_b64encode(mac).decode()}"


def worker_server_name(agent: str) -> str:
    """The name in the certificate of an agent's workers; `agent` is namespace/name.

    A namespace holds no dot, so no two agents share one. The name is in no DNS: gateways dial addresses.
    """
    namespace, _, name = agent.partition("/")
    return f"{name}.{namespace}.worker.trunkline.internal"


class Close(IntEnum):
    """WebSocket close codes that a caller can meet, and what each asks of the caller."""

    NORMAL = 1000  # the call ended, also at session.maxSeconds or idleSeconds: nothing to do
    PROTOCOL_ERROR = 1002  # the caller broke RFC 6455: mend the client
    POLICY = 1008  # the caller broke a rule of the agent: mend the client
    TOO_BIG = 1009  # a message above MAX_CALL_MESSAGE_BYTES: send shorter ones
    LOST = 1011  # the worker died: call again
    RESTART = 1012  # the gateway's grace ended: call again
    TRY_LATER = 1013  # no room after the answer: call again after a while


# --- worker and gateway, on WORKERS_PATH -------------------------------------------------------------
# The upgrade carries `Authorization: Bearer <worker key>` and AGENT_HEADER. A gateway answers 401 to a
# wrong key and 404 to an agent without a route; the worker tries again with back-off.
#
# A slot is asked for on the data link: its upgrade carries CALL_HEADER and TICKET_HEADER, and the worker's 101 gives
# the slot to the call. It answers 503 where it has none, 403 where the ticket is none of its own.


class Hello(TypedDict):
    """Worker to gateway, first on every control link. The worker's address is the link's peer address."""

    type: Literal["hello"]
    version: int
    agent: str
    worker: str
    boot: str  # new at every start: a restarted pod is a new worker
    slots: int
    port: int
    protocols: list[str]  # "realtime", and "moshi" where its codec is installed
    build: str
    link: int  # which of the worker's links this is
    ticketKey: str  # of this link alone: signs the tickets of what is asked for by it (`ticket`)


class Free(TypedDict):
    """Worker to gateway after each change and each HEARTBEAT_SECONDS; a hint, its 101 is the truth."""

    type: Literal["free"]
    n: int  # slots that a call would find now; 0 while draining
    busy: int  # live slots, of all gateways together
    draining: bool
    seq: int  # grows with every change: links may bring two of these in another order
    late: NotRequired[
        float
    ]  # share of its frames since the last beat that missed their deadline, if any


class Bye(TypedDict):
    """Worker to gateway: it exits now; its data links are closed or will be."""

    type: Literal["bye"]


class Drain(TypedDict):
    """Gateway to worker: `drain` take no new call and keep the ones there; `undrain` the reverse."""

    type: Literal["drain", "undrain"]


class Gateways(TypedDict):
    """Operator to gateway, and gateway to worker: the addresses behind the name by which this gateway is dialled.

    All of them, this gateway's too. DNS says the same, but where it is cached up to half a minute later: a gateway that
    is new would have no worker for so long.
    """

    type: Literal["gateways"]
    hosts: list[str]  # IP addresses, MAX_GATEWAYS at most


class Beat(TypedDict):
    """Gateway to worker and operator, operator to gateway, each HEARTBEAT_SECONDS."""

    type: Literal["beat"]


# --- what travels per call -----------------------------------------------------------------------------


class ReplyRule(TypedDict):
    """A scripted reply: the first rule whose pattern is found in what the caller said is spoken."""

    match: str  # a regular expression, searched without regard to case
    say: str  # may name groups as {1} or {name}, and {heard} for all that was said


class GuardRule(TypedDict):
    """Of the Moshi engine: what is done, once a turn, when the pattern is found in the caller's turn."""

    match: str  # a regular expression as RE2 has it, searched without regard to case
    do: Literal["say", "mute", "hangUp"]
    say: str  # for `say`; may name groups as ReplyRule does


class HookSettings(TypedDict):
    """Of the Moshi engine: who is asked over HTTP what to do while a call goes on."""

    url: str
    token: str  # presented as a bearer; "" for none. It makes a route a secret
    deadlineSeconds: float  # for each answer
    onFailure: Literal["open", "closed"]  # closed: the agent is mute until the hook answers again


class PolicySettings(TypedDict, total=False):
    """Of the Moshi engine: what its agent may say, and what is done about what a caller says."""

    bannedWords: list[str]
    bargeIn: bool
    guards: list[GuardRule]
    hook: HookSettings


class Settings(TypedDict, total=False):
    """What may change from call to call; nothing here replaces a pod or redeploys the Modal app."""

    greeting: str  # spoken when the call begins
    replies: list[ReplyRule]
    fallback: str  # spoken when no rule matches
    idleSeconds: float  # end the call after so long without audio from the caller
    transcripts: bool  # False: no protocol tells the caller what was recognised
    policy: PolicySettings
    call: str  # the call's id; set by the worker alone
    textTemperature: float  # of a Moshi agent's words; set by the worker alone, as the caller asks


# --- operator and gateway, on OPERATOR_PATH ------------------------------------------------------------
# The upgrade carries `Authorization: Bearer <ENV_OPERATOR_TOKEN>`.
#
# Each side says by CHANGES_HEADER, in the upgrade and in its 101, that it reads messages of what differs: after a
# first `Routes` and `Runway` a gateway gets `RouteChanges` and `RunwayChanges`, and between its loads an operator gets
# `LoadChanges`. A side that does not say so is told everything each time, which takes a gateway with 1,000 agents
# longer than a frame of its calls.


class Price(TypedDict):
    """What a second of one call costs where it is, in US dollars, for the ledger and for budgets."""

    callSecond: float
    basis: str  # what it is reckoned from, in words


class WarmRung(TypedDict):
    """The agent's own pods."""

    kind: Literal["warm"]
    price: NotRequired[Price]  # without, it is not known


class BurstRung(TypedDict):
    """One Modal server. Its tokens make a route a secret."""

    kind: Literal["burst"]
    name: str  # the routing region
    url: str
    proxyToken: str  # "wk-….ws-…", or "" where the server takes none
    ticketKey: str  # signs the ticket of each data link
    deadlineSeconds: float  # for the session's start
    slowSeconds: NotRequired[
        float
    ]  # a container that was restored for longer counts as `burstSlow`
    price: NotRequired[Price]


class BurstBudget(TypedDict):
    """The most that an agent's burst may cost at all gateways together, in US dollars; without, no limit.

    It says that a gateway lets a call to burst only below its ceiling (`Allowances`), and what a tenant's share is of.
    """

    perHour: NotRequired[float]
    perDay: NotRequired[float]


class UpstreamRung(TypedDict):
    """Another gateway, or a hosted endpoint, that speaks the caller's protocol. Its token makes a route a secret."""

    kind: Literal["upstream"]
    url: str  # wss://host[:port][/prefix]; the caller's own path goes behind it
    model: str  # what the agent is called there
    token: str  # presented as a bearer; "" for none
    deadlineSeconds: float  # until it has answered 101


class WaitRung(TypedDict):
    """A place in the line for a slot of the agent's own pods, before any 101."""

    kind: Literal["wait"]
    most: int  # callers who may stand in it at one gateway


Rung = WarmRung | BurstRung | UpstreamRung | WaitRung
"""In the order in which they are tried: burst regions stand one after the other, each with its own deadline."""


class Jwt(TypedDict):
    """Whose tokens are taken. One of `jwksUri` and `jwks` is there."""

    issuer: str
    audience: str
    jwksUri: NotRequired[str]
    jwks: NotRequired[str]  # the document itself


class TenantLimits(TypedDict):
    """Of one tenant, at all gateways together; 0 is no limit."""

    concurrentCalls: int
    startsPerMinute: int
    minutesPerDay: int
    guaranteedSlots: int  # warm ones that others leave free for it
    burstShare: NotRequired[int]  # percent of the burst budget; 100 without, and 0 is none of it


class Tenants(TypedDict):
    """How callers are told apart, and what each may have. The name of an API key is its tenant."""

    claim: str  # of a JWT, that names the tenant
    limits: TenantLimits
    overrides: dict[str, TenantLimits]


class Access(TypedDict):
    """Who may call. Keys are the hex SHA-256 of what callers present as a bearer."""

    public: bool
    apiKeys: dict[str, str]  # name of the key → digest
    origins: list[str]  # allowed Origin headers; empty allows all, and no Origin is always allowed
    jwt: NotRequired[Jwt]
    tenants: NotRequired[Tenants]
    mintKey: NotRequired[str]  # signs client secrets and tickets; no worker knows it
    twilio: NotRequired[
        dict[str, list[str]]
    ]  # tenant → SHA-256 of Twilio's signatures for the agent's URL
    holders: NotRequired[list[str]]  # of client certificates, who may call; empty: of any good one


class Route(TypedDict):
    """One agent, as gateways see it."""

    agent: str  # namespace/name
    hash: str  # of all the rest
    workerKey: str  # what its workers present
    access: Access
    answerSeconds: float  # bounds the whole admission
    maxSeconds: float  # the longest call
    admissionMs: float  # slo.admissionMs, or 0 for none
    firstAudioMs: NotRequired[float]  # slo.firstAudioMs, where there is one
    protocols: NotRequired[list[str]]  # what callers may speak; without, all
    settings: Settings
    rungs: list[Rung]
    draining: list[str]  # names of workers that get no new call
    budget: NotRequired[BurstBudget]
    workerTls: NotRequired[str]  # PEM of the CA of its workers' certificates; without, plain links
    defaultNamespace: NotRequired[bool]


class Routes(TypedDict):
    """Operator to gateway, and the routes file. Whole and idempotent; a lower epoch is refused."""

    type: Literal["routes"]
    version: int
    epoch: int
    revision: NotRequired[int]  # grows with every change within an epoch; 0 without
    routes: list[Route]
    share: NotRequired[float]  # of every tenant's limits that this gateway may give; 1 without


class RouteChanges(TypedDict):
    """Operator to gateway: what makes the routes of one revision those of a later one. Idempotent.

    A gateway that has a revision in between, as one with two links may, takes it as well; one that is not as far as
    `since` closes the link, and gets `Routes` on the next.
    """

    type: Literal["routeChanges"]
    epoch: int
    since: int  # the revision that the link was told before
    revision: int
    routes: list[Route]  # new, or no longer as they were
    gone: list[str]  # agents that have no route any more
    share: NotRequired[float]  # as in `Routes`


class Starting(TypedDict):
    """Slots of pods that are on their way."""

    slots: int
    seconds: float  # from the receipt of this until they can be had, as far as anybody knows


class Runway(TypedDict):
    """Operator to gateway, after each change: when more slots come. Whole; it only says when to call again."""

    type: Literal["runway"]
    agents: dict[str, list[Starting]]


class RunwayChanges(TypedDict):
    """The same of some agents; others' slots come as they were told before."""

    type: Literal["runwayChanges"]
    agents: dict[str, list[Starting]]  # empty: none are on their way any more


class Allowances(TypedDict):
    """Operator to gateway: by agent, what burst may cost there since the gateway's start, in US dollars.

    A ceiling for what is spent and reserved together; so it is a total, and the same again changes nothing. One of
    an older epoch than the gateway's routes is not taken.
    """

    type: Literal["allowances"]
    epoch: int
    agents: dict[str, float]


class SpendLoad(TypedDict):
    """One agent's burst at one gateway, in US dollars since the gateway's start."""

    spent: float  # by calls, those that go on included
    reserved: float  # what calls that go on may cost yet
    ceiling: float | None  # the one that it acts on
    starts: int  # sessions that were asked for


class WorkerLoad(TypedDict):
    """One worker, as it last reported itself to this gateway."""

    boot: str
    slots: int
    busy: int
    free: int
    draining: bool
    aside: NotRequired[bool]  # this gateway gives it no call for a while: it failed those before


class AgentLoad(TypedDict):
    """One agent at one gateway. Totals count from the gateway's start and never fall."""

    workers: dict[str, WorkerLoad]
    calls: int  # live at this gateway, burst included
    burst: int  # of them on burst, sessions being started included
    waiting: NotRequired[int]  # callers in line for a slot
    shut: NotRequired[dict[str, str]]  # rungs that are not tried for a while, and why
    arrivals: int  # total: authenticated calls that asked for a slot
    refused: int  # total: answered 503
    lost: int  # total: ended by the death of a worker
    burstFailures: int  # total: session starts or dials that failed
    burstSlow: NotRequired[
        int
    ]  # total: calls whose container took long to be restored, given up or not
    burstLimited: NotRequired[int]  # total: session starts refused for a limit of the workspace
    burstError: str  # the last such failure in words, "" after a success
    spend: NotRequired[SpendLoad]  # without, nothing was spent


class Load(TypedDict):
    """Gateway to operator, each second: all agents. To an operator that reads no changes also within 50 ms of one."""

    type: Literal["load"]
    gateway: str  # its name
    boot: str
    epoch: int  # of the routes it acts on; 0 when it has none
    agents: dict[str, AgentLoad]


class LoadChanges(TypedDict):
    """Gateway to operator within 50 ms of a change that matters: the agents that it is of; others are as they were."""

    type: Literal["loadChanges"]
    gateway: str
    boot: str
    epoch: int
    agents: dict[str, AgentLoad]


# --- what gateways tell people ---------------------------------------------------------------------------


class State(TypedDict):
    """The body of STATE_PATH: the load that the operator is told, and whether callers should come."""

    gateway: str
    boot: str
    epoch: int
    unready: str | None  # why load balancers should send no caller; None when they should
    agents: dict[str, AgentLoad]


# Two of the reasons in `PassedOver`: there was no room, and what is free is kept for other tenants.
NO_SLOT: Final = "no free slot"
KEPT: Final = "its free slots are kept for other tenants"


class PassedOver(TypedDict):
    """One rung or worker that could not take a call."""

    rung: str  # "warm", "burst/" and the region, "upstream", "wait"
    worker: str  # "" where no certain one was asked
    why: str
    ms: float


class WarmThen(TypedDict):
    """An agent's pods as the gateway saw them when a call found no slot on them."""

    pods: int
    slots: int
    busy: int
    free: int
    draining: int  # pods
    aside: NotRequired[int]  # pods that got no call for a while: they failed those before


class CallRecord(TypedDict):
    """One line of the ledger: a caller that asked for a slot, and what became of it.

    `call` is random and unique: a line that arrives twice is the same call. Times are ISO 8601 in UTC, and
    all three are reckoned back from the end by a steady clock. No content, no credential, no address.
    """

    message: Literal["ended", "refused", "left"]
    time: str  # when it was written; the same as `end`
    gateway: str
    call: str
    agent: str
    tenant: str
    caller: str  # keyed hash of who called, "" where nothing tells callers of the tenant apart
    start: str  # when the request was read
    answer: NotRequired[str]  # the 101
    end: str
    rung: str  # that answered, or "none"
    worker: str  # "" on burst
    admission_ms: float  # from the request to the 101, or to the refusal
    answered_ms: NotRequired[float]  # of them at the rung that answered
    burst_start: NotRequired[
        str
    ]  # of a container at Modal: warm, or for this call cold or restored
    passed_over: list[PassedOver]
    rung_ms: NotRequired[dict[str, float]]  # what each rung that was tried has cost, by its name
    warm: NotRequired[WarmThen]
    # Of calls that were answered.
    code: NotRequired[int]  # of the WebSocket's Close; 1006 where there was none
    by: NotRequired[str]  # who ended it: caller, worker, gateway
    lost: NotRequired[bool]  # by the death of its worker
    seconds: NotRequired[float]  # from the 101 to the end
    bytes_up: NotRequired[int]  # from the caller
    bytes_down: NotRequired[int]
    # Of those, what the worker has told; null where it has not: it died, or is not ours.
    audio_seconds_up: NotRequired[float | None]
    audio_seconds_down: NotRequired[float | None]
    first_audio_ms: NotRequired[
        float | None
    ]  # from the worker's 101 to the first audio for the caller
    turns: NotRequired[int | None]  # of the agent
    gaps: NotRequired[int | None]  # silences in the middle of a reply for want of audio
    cost: NotRequired[float | None]  # US dollars; null where no price is known
    price: NotRequired[str | None]  # what the cost is reckoned from, in words


# Tags of an app that the operator deployed; by them it finds those whose agent is gone.
TAG_INSTALLATION: Final = "trunkline-installation"
TAG_NAMESPACE: Final = "trunkline-namespace"
TAG_NAME: Final = "trunkline-name"
TAG_UID: Final = "trunkline-uid"
