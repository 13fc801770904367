"""Somebody who may call, and the reasons why somebody may not."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

KEY_ROOT: Final = "key "  # how the root of those begins who showed a key, or what was made with one
CERTIFICATE_ROOT: Final = "certificate "  # likewise, of a certificate


class Via(StrEnum):
    """By what a caller was recognised."""

    PUBLIC = "public"
    KEY = "key"
    JWT = "jwt"
    SECRET = "secret"
    TICKET = "ticket"
    TWILIO = "twilio"
    CERTIFICATE = "certificate"


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
    TWILIO = "twilio_signature"
    CERTIFICATE = "certificate"  # a good one, whose holder the agent does not name


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Somebody who may call an agent."""

    tenant: str
    via: Via
    root: str = field(repr=False)  # what a secret minted for them depends on; see `minted`
    expires: float | None = None  # Unix time, of a token
    subject: str = field(default="", repr=False)  # `sub` of a token

    @property
    def identity(self) -> str:
        """What tells this caller from others of its tenant: a key's digest, a certificate's holder, or who the issuer says
        it is.

        "" where nothing does. Whoever shows a secret or ticket is the key that it was made with; one that was
        made with a token does not say whose.
        """
        if self.via is Via.JWT:
            return f"{self.root} {self.subject}" if self.subject else ""
        return self.root if self.root.startswith((KEY_ROOT, CERTIFICATE_ROOT)) else ""
