"""(agent, world, now) → the steps to take. Level-triggered: the same world gives the same steps.

Rules
- A pod that may hold calls is first marked draining, and deleted only when its worker itself has said
  "draining, 0 busy"; unknown counts as busy.
- A draining pod is no capacity. When load returns, a drain is taken back before a pod is made.
- A name that is still in use, even by a pod that is going, is not used again.
- At rest there are no steps.

Whoever carries out a step must expect that it was carried out before: a create finds the name taken, a
delete finds the uid gone, both are fine.
"""

from dataclasses import dataclass

from trunkline_operator.manifests import Installation
from trunkline_operator.scaling import Decision, Memory
from trunkline_operator.spec import Json, VoiceAgent
from trunkline_operator.world import World


@dataclass(frozen=True, slots=True)
class AddFinalizer:
    """Before anything else is made."""


@dataclass(frozen=True, slots=True)
class RemoveFinalizer:
    """The last step of a deletion."""

    left_behind: str = ""  # what could not be cleaned up by the deadline, for an Event and the log


@dataclass(frozen=True, slots=True)
class EnsureSecret:
    """Make the agent's own Secret with new random keys, unless it exists (`manifests.secret`)."""

    name: str


@dataclass(frozen=True, slots=True)
class CreatePod:
    name: str
    manifest: Json


@dataclass(frozen=True, slots=True)
class Drain:
    """Annotate the pod (`ANNOTATION_DRAINING` = since), and list it in the route's drain list."""

    name: str
    uid: str
    since: str  # RFC 3339


@dataclass(frozen=True, slots=True)
class Undrain:
    """Remove the annotation, and the name from the route's drain list."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class DeletePod:
    """With the uid as precondition; the pod's own grace period stays."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class DeployBurst:
    app: str  # its name at Modal
    hash: str  # to be kept as `BurstFacts.hash` once deployed, as `failed_hash` if it fails


@dataclass(frozen=True, slots=True)
class StopBurst:
    """Stop the app; one that does not exist counts as stopped."""

    app: str


@dataclass(frozen=True, slots=True)
class Requeue:
    """Look again after so many seconds, though nothing may have happened by then."""

    after: float


Step = (
    AddFinalizer
    | RemoveFinalizer
    | EnsureSecret
    | CreatePod
    | Drain
    | Undrain
    | DeletePod
    | DeployBurst
    | StopBurst
    | Requeue
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    steps: tuple[Step, ...]
    scaling: Decision | None  # None for an agent that is being deleted
    memory: Memory  # give it to the next look
    draining: tuple[str, ...]  # the route's drain list once the steps are taken, sorted


def planned(
    agent: VoiceAgent, world: World, now: float, memory: Memory, installation: Installation
) -> Plan:
    """The steps from the observed world to the declared one, in the order in which to take them."""
    raise NotImplementedError
