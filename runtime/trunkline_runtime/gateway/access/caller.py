"""Somebody who may call, and the reasons why somebody may not."""

from dataclasses import dataclass, field
from enum import StrEnum


class Via(StrEnum):
    """By what a caller was recognised."""

    PUBLIC = "public"
    KEY = "key"
    JWT = "jwt"
    SECRET = "secret"
    TICKET = "ticket"


class Why(StrEnum):
    """Why what a caller showed opens nothing. For metrics: a closed set, and nothing of the credential."""

    NOTHING = "nothing_shown"
    KEY = "unknown_key"
    MALFORMED = "malformed"
    TOO_LONG = "too_long"
    ALGORITHM = "algorithm"
    SIGNING_KEY = "unknown_signing_key"
    SIGNATURE = "signature"
    EXPIRED = "expired"
    NOT_YET = "not_yet_valid"
    AUDIENCE = "audience"
    ISSUER = "issuer"
    CLAIMS = "claims"
    WITHDRAWN = "withdrawn"  # what a minted secret was minted from is no longer good
    USED = "used_before"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Somebody who may call an agent."""

    tenant: str
    via: Via
    root: str = field(repr=False)  # what a secret minted for them depends on; see `minted`
    expires: float | None = None  # Unix time, of a token
