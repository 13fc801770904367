"""Agent → the route that gateways get."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from trunkline_operator.spec import VoiceAgent
from trunkline_runtime.contract import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Secrets of one agent, as text."""

    worker: str  # worker-key of its own Secret
    ticket: str  # ticket-key of its own Secret
    callers: Mapping[str, str] = field(default_factory=dict)  # access.apiKeysSecretRef: name → key
    proxy_token: str = ""  # "wk-….ws-…" where the credentials Secret has one


def route(
    agent: VoiceAgent,
    keys: Keys,
    burst_url: str,
    draining: Iterable[str] = (),
    *,
    default_namespace: bool = False,
) -> Route:
    """The route of an agent; one that is being deleted has no rung, so that it takes no new call."""
    raise NotImplementedError
