"""Rules across an agent's fields: what must hold, and the sentence when it does not.

In the CRD's words; the CRD's other rules are about policy (policy.py) and about changes.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from trunkline_operator.agent.spec import (
    PRODUCT_LABEL,
    Autoscaling,
    Burst,
    DataClass,
    Engine,
    EngineType,
    Json,
    Session,
    Snapshot,
    Transcripts,
    VoiceAgent,
    Warm,
)

MAX_SECONDS_WITH_BURST: Final = 3600
"""Modal lets a container finish its calls for at most an hour (`exit_grace_period`)."""

TWILIO_URL: Final = re.compile(r'wss://[A-Za-z0-9.-]+(:[0-9]{1,5})?/[!-"$-~]*')
KEYS_ADDRESS: Final = re.compile(
    r"https://[^/]+/|http://([a-z0-9-]+[.][a-z0-9-]+[.]svc([.]cluster[.]local)?|localhost|127[.][0-9.]+)(:[0-9]+)?/"
)

# A Service by its full name: what stands behind `.svc` in other names may lie anywhere.
IN_CLUSTER: Final = re.compile(
    r"https?://([a-z0-9-]+[.][a-z0-9-]+[.]svc([.]cluster[.]local)?|localhost|127[.][0-9.]+)(:[0-9]+)?/"
)
HOOK_ADDRESS: Final = re.compile(rf"{IN_CLUSTER.pattern}|https://[A-Za-z0-9.-]+(:[0-9]+)?/")
UPSTREAM_ADDRESS: Final = re.compile(
    r"(wss://[A-Za-z0-9.-]+|ws://([a-z0-9-]+[.][a-z0-9-]+[.]svc([.]cluster[.]local)?|localhost|127[.][0-9.]+))"
    r"(:[0-9]+)?(/[A-Za-z0-9._~/-]*)?"
)
# Lookaround, a condition, a reference to a group, an atomic group, a possessive repeat.
NOT_RE2: Final = re.compile(r"[(][?]([=!>(]|<[=!]|P=)|\\[1-9]|[*+?}][+]")


def _most_pods(warm: Warm) -> int:
    """In the region with most."""
    return max((region.max_pods for region in warm.regions), default=warm.max_pods)


def _operators(variable: Json) -> bool:
    """Whether an entry of the environment is the operator's to set."""
    name: str = variable["name"]
    return name.startswith("TRUNKLINE_") or name == "HF_TOKEN"


def _hook_address(agent: VoiceAgent) -> str:
    policy = agent.engine.policy
    return policy.hook.url if policy and policy.hook else ""


def _patterns(engine: Engine) -> tuple[str, ...]:
    guards = engine.policy.guards if engine.policy else ()
    return (*(reply.match for reply in engine.replies), *(guard.match for guard in guards))


AGENT_RULES: Final[Mapping[str, Callable[[VoiceAgent], bool]]] = {
    "engine.type moshi needs engine.model: name a Hugging Face repository (owner/name), a folder in the "
    "pod, or tiny": (
        lambda agent: agent.engine.type is not EngineType.MOSHI or bool(agent.engine.model)
    ),
    "engine.model is for engine.type moshi: remove it or set the type": (
        lambda agent: agent.engine.type is EngineType.MOSHI or not agent.engine.model
    ),
    "engine.policy is for engine.type moshi: remove it or set the type": (
        lambda agent: agent.engine.type is EngineType.MOSHI or agent.engine.policy is None
    ),
    "engine.policy can only hear callers with engine.stt: name an STT model there, or leave out bargeIn, "
    "guards and hook": (
        lambda agent: (
            agent.engine.type is not EngineType.MOSHI
            or agent.engine.policy is None
            or not agent.engine.policy.listens
            or bool(agent.engine.stt)
            or agent.engine.model == "tiny"
        )
    ),
    "engine.type moshi looks for patterns with RE2: use no lookaround, backreference, atomic group or "
    "possessive repeat in engine.replies and engine.policy.guards": (
        lambda agent: (
            agent.engine.type is not EngineType.MOSHI
            or not any(map(NOT_RE2.search, _patterns(agent.engine)))
        )
    ),
    "engine.policy.hook.url must be an https URL, or http to a Service of the cluster "
    "(http://name.namespace.svc/…), because it is sent what callers say": (
        lambda agent: (
            not _hook_address(agent) or HOOK_ADDRESS.match(_hook_address(agent)) is not None
        )
    ),
    "policy.dataClass phi keeps calls in the cluster: let engine.policy.hook.url name a Service of it "
    "(https://name.namespace.svc/…) or set dataClass to standard": (
        lambda agent: (
            not _hook_address(agent)
            or agent.policy.data_class is not DataClass.PHI
            or IN_CLUSTER.match(_hook_address(agent)) is not None
        )
    ),
    "policy.residency keeps what callers say in its regions, and nobody knows where engine.policy.hook is: "
    "let its url name a Service of the cluster or leave residency empty": (
        lambda agent: (
            not _hook_address(agent)
            or not agent.policy.residency
            or IN_CLUSTER.match(_hook_address(agent)) is not None
        )
    ),
    "policy.transcripts none tells nobody what callers say: remove engine.policy.hook or set transcripts "
    "to caller": (
        lambda agent: agent.policy.transcripts is not Transcripts.NONE or not _hook_address(agent)
    ),
    "warm.maxPods is below warm.minPods: raise maxPods or lower minPods": (
        lambda agent: agent.warm.max_pods >= agent.warm.min_pods
    ),
    "warm.schedule asks for more pods than warm.maxPods: raise maxPods or lower minPods there": (
        lambda agent: all(
            window.min_pods <= _most_pods(agent.warm) for window in agent.warm.schedule
        )
    ),
    "warm.autoscaling external needs warm.replicas: set it to the number of pods to begin with": (
        lambda agent: (
            agent.warm.autoscaling is Autoscaling.INTERNAL or agent.warm.replicas is not None
        )
    ),
    "warm.resources names the resource of warm.gpu: remove it there and set warm.gpu.count": (
        lambda agent: (
            agent.warm.gpu.resource not in agent.warm.resources.requests
            and agent.warm.gpu.resource not in agent.warm.resources.limits
        )
    ),
    "warm.gpu.product is for GPUs of nvidia.com: remove it, or name a label of your nodes in "
    "warm.template.nodeSelector": (
        lambda agent: (
            not agent.warm.gpu.product
            or (agent.warm.gpu.count > 0 and agent.warm.gpu.resource.startswith("nvidia.com/"))
        )
    ),
    "warm.template.nodeSelector names nvidia.com/gpu.product, as warm.gpu.product does: remove one of "
    "them": (
        lambda agent: (
            not agent.warm.gpu.product or PRODUCT_LABEL not in agent.warm.template.node_selector
        )
    ),
    "warm.slotsPerPod auto is for engine.type moshi, whose workers measure: set a number": (
        lambda agent: not agent.warm.slots_auto or agent.engine.type is EngineType.MOSHI
    ),
    "warm.template.volumeMounts names a volume that is not in warm.template.volumes: add it there": (
        lambda agent: (
            {mount["name"] for mount in agent.warm.template.volume_mounts}
            <= {volume["name"] for volume in agent.warm.template.volumes}
        )
    ),
    "warm.template.env sets what the operator sets, TRUNKLINE_… or HF_TOKEN: remove it there and use the "
    "fields of engine, warm and session": (
        lambda agent: not any(map(_operators, agent.warm.template.env))
    ),
    "upstream.url must be wss://host, or ws:// to a Service of the cluster (ws://name.namespace.svc), with "
    "nothing behind its path": (
        lambda agent: (
            agent.upstream is None or UPSTREAM_ADDRESS.fullmatch(agent.upstream.url) is not None
        )
    ),
    "upstream.deadlineSeconds is above session.answerSeconds, so callers would be refused before it: lower "
    "deadlineSeconds or raise answerSeconds": (
        lambda agent: (
            agent.upstream is None
            or agent.upstream.deadline_seconds <= agent.session.answer_seconds
        )
    ),
    "no call could ever be placed: raise warm.maxPods or add burst.modal": (
        lambda agent: _most_pods(agent.warm) > 0 or agent.burst is not None
    ),
    "access needs either public: true, or some of apiKeysSecretRef, jwt, clientCertificates and twilio: "
    "set one side and remove the other": (
        lambda agent: (
            agent.access.public
            != (
                bool(agent.access.api_keys_secret)
                or agent.access.jwt is not None
                or agent.access.certificates is not None
                or agent.access.twilio is not None
            )
        )
    ),
    "access.twilio.publicUrl must be the wss URL that Twilio calls, with a path, such as "
    "wss://calls.example/desk": (
        lambda agent: (
            agent.access.twilio is None
            or TWILIO_URL.fullmatch(agent.access.twilio.public_url) is not None
        )
    ),
    "access.jwt needs exactly one of jwksUri and jwks: set one and remove the other": (
        lambda agent: (
            agent.access.jwt is None
            or bool(agent.access.jwt.jwks_uri) != bool(agent.access.jwt.jwks)
        )
    ),
    "access.jwt.jwksUri must be an https URL, or http to a Service of the cluster "
    "(http://name.namespace.svc/…): over plain http anybody on the way could give keys": (
        lambda agent: (
            agent.access.jwt is None
            or not agent.access.jwt.jwks_uri
            or KEYS_ADDRESS.match(agent.access.jwt.jwks_uri) is not None
        )
    ),
    "access.tenants guarantees more slots than there can be: lower guaranteedSlots, or raise "
    "warm.maxPods or warm.slotsPerPod": (
        lambda agent: (
            bool(agent.warm.regions)
            or agent.warm.slots_auto
            or agent.access.tenants.guaranteed <= agent.warm.max_pods * agent.warm.slots_per_pod
        )
    ),
}

BURST_RULES: Final[Mapping[str, Callable[[Burst, Session], bool]]] = {
    "burst.modal.maxContainers is below minContainers: raise maxContainers or lower minContainers": (
        lambda burst, _: burst.max_containers >= burst.min_containers
    ),
    "burst.modal.regions names a region twice: remove one": (
        lambda burst, _: len(set(burst.regions)) == len(burst.regions)
    ),
    "burst.modal.budget.perHour is above perDay and would never be reached: lower it or raise perDay": (
        lambda burst, _: (
            burst.budget.per_hour is None
            or burst.budget.per_day is None
            or burst.budget.per_hour <= burst.budget.per_day
        )
    ),
    "burst.modal.snapshot gpu needs a GPU: name one in burst.modal.gpu or set snapshot to cpu": (
        lambda burst, _: burst.snapshot is not Snapshot.GPU or bool(burst.gpu)
    ),
    "burst.modal.startDeadlineSeconds is above session.answerSeconds, so callers would be refused "
    "before it: lower startDeadlineSeconds or raise answerSeconds": (
        lambda burst, session: burst.start_deadline_seconds <= session.answer_seconds
    ),
    "session.maxSeconds is at most 3600 with burst, because Modal lets a container finish its calls for "
    "one hour: lower maxSeconds or remove burst": (
        lambda _, session: session.max_seconds <= MAX_SECONDS_WITH_BURST
    ),
}


def broken(agent: VoiceAgent) -> Iterator[str]:
    """The sentences of the rules that the agent breaks."""
    yield from (sentence for sentence, holds in AGENT_RULES.items() if not holds(agent))
    if burst := agent.burst:
        rules = BURST_RULES.items()
        yield from (sentence for sentence, holds in rules if not holds(burst, agent.session))
