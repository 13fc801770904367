"""Which ways out of its cluster a call may take, by the agent's policy. Pure, and closed: what is not let out stays.

| way | what goes out | standard | phi | residency |
|---|---|---|---|---|
| burst | the call | yes | under an agreement, without a snapshot | to a region that is named |
| upstream | the call | yes | where the agent says so of it | to a region that is named |
| hook | what the caller says | yes | no | no: nobody knows where it is |
| llm, tools, webhooks | what is said | yes | no | no, likewise |
| traces, ledger | who, when, where, how long, what it cost | yes | yes | yes |

Burst is decided by `policy.allowed_burst` and an upstream by `policy`, for they are rungs. No engine calls an LLM,
tools or webhooks yet, and nothing writes traces: whoever adds one asks here. A Service of the cluster is no way out.
"""

from enum import StrEnum
from typing import Final

from trunkline_operator.agent.rules import IN_CLUSTER
from trunkline_operator.agent.spec import DataClass, Hook, Policy, Transcripts, VoiceAgent


class Way(StrEnum):
    """Where something of a call may go that is no rung."""

    HOOK = "hook"
    LLM = "llm"
    TOOLS = "tools"
    WEBHOOKS = "webhooks"
    TRACES = "traces"
    LEDGER = "ledger"


CONTENT: Final = frozenset({Way.HOOK, Way.LLM, Way.TOOLS, Way.WEBHOOKS})
"""Those that are told what is said."""


def permitted(policy: Policy, way: Way, *, in_cluster: bool) -> bool:
    """Whether something may go that way; `in_cluster`: its end is a Service of the cluster."""
    if way is Way.HOOK and policy.transcripts is Transcripts.NONE:
        return False
    if way not in CONTENT or in_cluster:
        return True
    return policy.data_class is DataClass.STANDARD and not policy.residency


def allowed_hook(agent: VoiceAgent) -> Hook | None:
    """The hook that the agent names, if its policy lets it be told what callers say."""
    hook = agent.engine.policy.hook if agent.engine.policy else None
    if hook is None:
        return None
    inside = IN_CLUSTER.match(hook.url) is not None
    return hook if permitted(agent.policy, Way.HOOK, in_cluster=inside) else None
