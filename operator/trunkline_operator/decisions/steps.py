"""What a plan may ask for, one value a step. Whoever takes a step must expect that it was taken before.

A create finds the name taken, a delete finds the uid gone; both are fine.
"""

from dataclasses import dataclass

from trunkline_operator.agent.spec import Json
from trunkline_operator.burst.standby import Scalings


@dataclass(frozen=True, slots=True)
class AddFinalizer:
    """Before anything else is made."""


@dataclass(frozen=True, slots=True)
class RemoveFinalizer:
    """The last step of a deletion."""

    left_behind: str = (
        ""  # the app that could not be stopped by the deadline, for an Event and the log
    )


@dataclass(frozen=True, slots=True)
class EnsureSecret:
    """Make the agent's own Secret with new random keys, unless it exists (`manifests.secret`)."""

    name: str


@dataclass(frozen=True, slots=True)
class IssueCertificate:
    """Put a new certificate for the workers into the agent's own Secret (`authority.issued`)."""

    name: str
    why: str


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
class AllowEviction:
    """Tell autoscalers of nodes that they may evict the pod (`eviction.EVICTABLE`)."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class ForbidEviction:
    """Tell them that they may not (`eviction.PROTECTED`)."""

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
class WatchBurst:
    """Ask Modal how the app's containers have started, for the breaker of snapshots."""

    app: str


@dataclass(frozen=True, slots=True)
class ScaleBurst:
    """Tell Modal how many containers stand by in each region; no deployment."""

    app: str
    scalings: Scalings


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
    | IssueCertificate
    | CreatePod
    | Drain
    | Undrain
    | AllowEviction
    | ForbidEviction
    | DeletePod
    | DeployBurst
    | WatchBurst
    | ScaleBurst
    | StopBurst
    | Requeue
)
