"""Which one of several operators acts: what a candidate for the Lease decides.

1. Who holds the Lease acts. It believes so for DEADLINE_SECONDS from the moment at which it *sent* its last
   write that the API server confirmed, and ends when it could not renew by then.
2. Another takes the Lease only when it has itself seen no change of it for LEASE_SECONDS, by its own clock.
   No two machines' clocks are compared, so they may differ as they like, and run fast or slow by a tenth.
3. Each write names the version that it was decided on; whoever is too late is refused and looks again.

A renewal reaches the server no earlier than it was sent, and is seen no earlier than it arrived. So from the
end of one's belief to the other's begin there are at least LEASE_SECONDS - DEADLINE_SECONDS. The rules are those
of Kubernetes' own components; theirs are 15, 10 and 2 seconds, too.

The epoch of the routes is chosen with the Lease and written with it, above that of whoever had it before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Self

from trunkline_operator.agent.spec import Json
from trunkline_runtime.contract import GROUP, LABEL_MANAGED_BY, MANAGED_BY

LEASE_SECONDS: Final = 15
DEADLINE_SECONDS: Final = 10.0
RENEW_SECONDS: Final = 2.0
# A look is one read of one small object. The next operator begins so much later after a release.
LOOK_SECONDS: Final = 1.0
# So that candidates that started together do not go on asking together.
JITTER: Final = 0.2
# Two tries and a bit fit between a renewal that failed and the deadline.
REQUEST_SECONDS: Final = 4.0
RETRY_SECONDS: Final = 0.5
ANNOTATION_EPOCH: Final = f"{GROUP}/epoch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The Lease as the API server had it."""

    version: str  # changes with each write
    holder: str = ""  # "" = nobody
    seconds: int = LEASE_SECONDS  # that its holder asked others to wait
    transitions: int = 0
    epoch: int = 0

    @classmethod
    def of(cls, obj: Json) -> Self:
        metadata, spec = obj["metadata"], obj.get("spec") or {}
        epoch = (metadata.get("annotations") or {}).get(ANNOTATION_EPOCH, "")
        return cls(
            version=metadata["resourceVersion"],
            holder=spec.get("holderIdentity") or "",
            seconds=spec.get("leaseDurationSeconds") or LEASE_SECONDS,
            transitions=spec.get("leaseTransitions") or 0,
            epoch=int(epoch) if epoch.isdecimal() else 0,
        )


@dataclass(frozen=True, slots=True)
class Read:
    """Read the Lease."""


@dataclass(frozen=True, slots=True)
class Create:
    """Make the Lease, unless there is one by now."""

    body: Json


@dataclass(frozen=True, slots=True)
class Write:
    """Merge this into the Lease, if it still has the version in the body."""

    body: Json


@dataclass(frozen=True, slots=True)
class Sleep:
    seconds: float


@dataclass(frozen=True, slots=True)
class Lost:
    """This operator held the Lease and may not act any more."""

    why: str


@dataclass(frozen=True, slots=True)
class Left:
    """This operator neither holds the Lease nor wants it."""


Action = Read | Create | Write | Sleep | Lost | Left


class Candidate:
    """One operator. Ask `next` what to do and tell what came of it; `now` is its own monotonic clock."""

    def __init__(self, identity: str, name: str, chance: Callable[[], float]) -> None:
        self.identity, self._name, self._chance = identity, name, chance
        self.known: Lease | None = None
        self._fresh = False  # nothing is known that could have changed it since
        self._free_at = float("-inf")  # when nobody else can believe any more that it holds it
        self._due = float("-inf")
        self._held_until: float | None = None
        self._wrote = False  # or tried to: it may have been done without our knowing
        self._leaving = False

    def __repr__(self) -> str:
        holder = self.known.holder if self.known else None
        return f"Candidate({self.identity}, {holder=}, until={self._held_until})"

    def holds(self, now: float) -> bool:
        """It may act."""
        return self._held_until is not None and now < self._held_until

    def patience(self, now: float) -> float:
        """Seconds for which a request that begins now may be waited for."""
        if self._held_until is None:
            return REQUEST_SECONDS
        return max(min(REQUEST_SECONDS, self._held_until - now), 0.0)

    def next(self, now: float, wall: float) -> Action:
        """What to do. `wall` is the time of day, for people and for the epoch."""
        if self._leaving:
            return self._leave(wall)
        if self._held_until is not None and (why := self._end(self._held_until, now)):
            return Lost(why)
        if now < self._due:
            return Sleep(min(self._due, self._held_until or self._due) - now)
        if not self._fresh:
            return Read()
        self._wrote = True
        if self._held_until is not None and self.known:
            return Write(self._body(self.known, {"renewTime": stamp(wall)}))
        if self.known is None:
            return Create(self._first(wall))
        return Write(self._takeover(self.known, wall))

    def leave(self) -> None:
        """It has stopped acting. Go on asking `next` until it has left."""
        self._leaving, self._held_until = True, None

    # --- what came of it ----------------------------------------------------------------------------

    def read(self, lease: Lease | None, now: float) -> None:
        """The Lease is so; None if there is none.

        One that was deleted is waited out as if it had just been renewed: its holder may not know yet.
        """
        before, self.known, self._fresh = self.known, lease, True
        if (lease and lease.version) != (before and before.version):
            held = lease or before
            if held is None or held.holder in ("", self.identity):
                self._free_at = float("-inf")
            else:
                self._free_at = now + max(held.seconds, LEASE_SECONDS)
        if self._held_until is None and now < self._free_at:
            # Not past the moment at which it becomes free.
            self._due = min(now + self._about(LOOK_SECONDS), self._free_at)
            self._fresh = False

    def wrote(self, lease: Lease, sent: float) -> None:
        """The server confirmed what was sent then; the Lease is so now."""
        self.known, self._fresh = lease, True
        if lease.holder == self.identity and not self._leaving:
            self._held_until = sent + DEADLINE_SECONDS
            self._due = sent + self._about(RENEW_SECONDS)

    def refused(self) -> None:
        """The Lease was not as the write expected."""
        self._fresh = False

    def failed(self, now: float) -> None:
        """No answer, or one that says nothing about the Lease: a write may have been done or not."""
        self._fresh = False
        self._due = now + self._about(LOOK_SECONDS if self._held_until is None else RETRY_SECONDS)

    # --- in parts -----------------------------------------------------------------------------------

    def _end(self, held_until: float, now: float) -> str:
        """Why it does not hold the Lease any more, "" if it does."""
        if self.known is None:
            return "the Lease was deleted"
        if self.known.holder != self.identity:
            return f"{self.known.holder or 'nobody'} has the Lease"
        if now >= held_until:
            return f"the Lease could not be renewed for {DEADLINE_SECONDS:g} s"
        return ""

    def _leave(self, wall: float) -> Action:
        if not self._wrote:
            return Left()
        if not self._fresh:
            return Read()
        if self.known is None or self.known.holder != self.identity:
            return Left()
        # Validation wants a positive duration.
        spec = {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": stamp(wall)}
        return Write(self._body(self.known, spec))

    def _takeover(self, lease: Lease, wall: float) -> Json:
        transitions = lease.transitions + 1
        body = self._body(lease, self._tenure(wall) | {"leaseTransitions": transitions})
        body["metadata"]["annotations"] = {ANNOTATION_EPOCH: str(epoch_after(lease.epoch, wall))}
        return body

    def _first(self, wall: float) -> Json:
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": self._name,
                "labels": {LABEL_MANAGED_BY: MANAGED_BY},
                "annotations": {ANNOTATION_EPOCH: str(epoch_after(0, wall))},
            },
            "spec": self._tenure(wall) | {"leaseTransitions": 0},
        }

    def _tenure(self, wall: float) -> Json:
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": LEASE_SECONDS,
            "acquireTime": stamp(wall),
            "renewTime": stamp(wall),
        }

    @staticmethod
    def _body(lease: Lease, spec: Json) -> Json:
        return {"metadata": {"resourceVersion": lease.version}, "spec": spec}

    def _about(self, seconds: float) -> float:
        return seconds * (1 + JITTER * (2 * self._chance() - 1))


def epoch_after(earlier: int, wall: float) -> int:
    """Milliseconds of the day's clock, but more than the earlier epoch, whatever that clock says."""
    return max(int(wall * 1000), earlier + 1)


def stamp(wall: float) -> str:
    """A time as the API writes it in a Lease."""
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
