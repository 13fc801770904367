"""Agent → bodies of what it owns in the cluster."""

from dataclasses import dataclass

from trunkline_operator.spec import Json, VoiceAgent


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """What all agents of one operator share."""

    worker_image: str  # for agents that name none
    gateways: str  # host:port,… ; handed to workers as it is
    build: str  # version of this distribution; a new one redeploys burst


def secret_name(agent: VoiceAgent) -> str:
    """The agent's own Secret."""
    return f"{agent.name}-trunkline"


def secret(agent: VoiceAgent, worker_key: str, ticket_key: str) -> Json:
    """The agent's own Secret with these two keys."""
    raise NotImplementedError


def secret_strings(secret: Json) -> dict[str, str]:
    """The entries of a Secret as text; one that is not UTF-8 is left out."""
    raise NotImplementedError


def worker_pod(agent: VoiceAgent, ordinal: int, installation: Installation) -> Json:
    """One warm pod."""
    raise NotImplementedError


def template_hash(agent: VoiceAgent, installation: Installation) -> str:
    """Of what a pod cannot change while it runs: image, engine, slots, hardware."""
    raise NotImplementedError


def burst_app(agent: VoiceAgent) -> str:
    """The name of its app at Modal."""
    raise NotImplementedError


def burst_hash(agent: VoiceAgent, installation: Installation) -> str:
    """Of all that a deployment at Modal depends on; "" without burst."""
    raise NotImplementedError
