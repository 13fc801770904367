"""The routes a gateway acts on, parsed at the edge into frozen values.

They come whole, from the operator or from the routes file, and are taken whole or not at all: a gateway
that acted on half of them would answer 401 to good callers. What differs later comes from the operator alone, and is
taken by whoever has all that came before.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from trunkline_runtime.gateway.access.jwks import KeySet
from trunkline_runtime.gateway.access.limits import Tenancy
from trunkline_runtime.gateway.access.tokens import Expected
from trunkline_runtime.gateway.accounts.budget import Budget, Price


@dataclass(frozen=True, slots=True, kw_only=True)
class JwtAccess:
    """An issuer whose tokens are taken."""

    expected: Expected
    source: str | KeySet = field(repr=False)  # where its keys are, or the keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    public: bool
    digests: Mapping[str, str] = field(repr=False)  # name of a key → its hex SHA-256
    origins: frozenset[str]
    jwt: JwtAccess | None = None
    tenancy: Tenancy = field(default_factory=Tenancy)
    mint_key: str = field(default="", repr=False)  # "": nothing is minted
    twilio: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    """Tenant → hex SHA-256 of each signature that Twilio may make for it."""
    holders: frozenset[str] | None = None  # of certificates; empty: of any good one; None: of none

    def knows(self, holder: str) -> bool:
        """Whether a certificate's holder may call."""
        return self.holders is not None and (not self.holders or holder in self.holders)


@dataclass(frozen=True, slots=True)
class WarmRung:
    """The agent's own pods."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstRung:
    """One Modal server."""

    name: str
    url: str  # without a slash at its end
    proxy_token: str = field(repr=False)
    ticket_key: str = field(repr=False)
    deadline: float  # seconds for the session's start
    slow: float = 0.0  # seconds that a restored container may take; 0 = any
    price: Price | None = None  # None: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamRung:
    """Another gateway or a hosted endpoint."""

    url: str  # without a slash at its end
    model: str
    token: str = field(repr=False)
    deadline: float  # seconds until its 101


@dataclass(frozen=True, slots=True)
class WaitRung:
    """A place in the line for a warm slot."""

    most: int  # callers in it


Rung = WarmRung | BurstRung | UpstreamRung | WaitRung


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One agent."""

    agent: str
    worker_key: str = field(repr=False)
    access: Access
    answer_seconds: float
    max_seconds: float
    admission_ms: float  # 0: no objective
    first_audio_ms: float = 0.0  # likewise
    protocols: frozenset[str] = frozenset()  # what callers may speak; empty: all
    opening: bytes = field(
        repr=False
    )  # what a worker is told of the settings, first on a data link
    rungs: tuple[Rung, ...]
    draining: frozenset[str]
    budget: Budget = field(default_factory=Budget)  # of its burst
    warm_price: Price | None = None  # of a slot on its pods; None: not known
    worker_tls: ssl.SSLContext | None = None  # for dialling its workers; None: plain links


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    epoch: int
    revision: int = 0  # within the epoch
    by_agent: Mapping[str, Route]
    share: float = 1.0  # of every tenant's limits


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteChanges:
    """What differs between two revisions of the routes."""

    epoch: int
    since: int
    revision: int
    by_agent: Mapping[str, Route]  # new, or no longer as they were
    gone: frozenset[str]
    share: float = 1.0


NOBODY: Final = Routes(epoch=0, by_agent={})
"""Before any have come."""
