"""Agent and world → the status that people read."""

from trunkline_operator.plan import Plan
from trunkline_operator.spec import Json, SpecError, VoiceAgent
from trunkline_operator.world import World


def reported(agent: VoiceAgent, world: World, plan: Plan, previous: Json, now: float) -> Json:
    """The whole `status`. Equal to the previous one when nothing changed, so write it only if it differs."""
    raise NotImplementedError


def rejected(obj: Json, error: SpecError, now: float) -> Json:
    """The whole `status` of an object that makes no sense: what was known, and Accepted = False."""
    raise NotImplementedError


def only_numbers_differ(old: Json, new: Json) -> bool:
    """Only live numbers changed (busy, free, calls), which need no write more often than each 15 s."""
    raise NotImplementedError
