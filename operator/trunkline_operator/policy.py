"""What an agent's policy allows: the ladder, and the arithmetic of what it can hold."""

from dataclasses import dataclass

from trunkline_operator.spec import VoiceAgent


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The rungs that a call of this agent may be placed on."""

    warm: bool
    burst: bool
    words: str  # the arithmetic: "at most 4 × 4 warm + 10 × 4 burst = 56 calls"
    warnings: tuple[str, ...] = ()  # what is allowed but will surprise


def ladder(agent: VoiceAgent) -> Ladder:
    """The rungs that policy allows; an agent that is being deleted has none."""
    raise NotImplementedError
