"""Who a JWT of an issuer stands for.

Verified with PyJWT; this file says what is asked of it (RFC 8725): the algorithm is the key's, issuer, audience and
expiry must be there, and a token that was good is remembered by its digest until it expires, so that a page that
calls again costs microseconds.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import jwt

from trunkline_runtime.gateway.access.caller import Caller, Via, Why
from trunkline_runtime.gateway.access.jwks import ALGORITHMS, KeySet

LEEWAY_SECONDS: Final = 30  # between the issuer's clock and ours
MAX_TOKEN_CHARS: Final = 8192  # a header line cannot hold more anyway
MAX_TENANT_CHARS: Final = 128
REMEMBERED: Final = 1024  # tokens an agent; 0.5 MB

_WHY: Final[dict[type[jwt.PyJWTError], Why]] = {
    jwt.ExpiredSignatureError: Why.EXPIRED,
    jwt.ImmatureSignatureError: Why.NOT_YET,
    jwt.InvalidAudienceError: Why.AUDIENCE,
    jwt.InvalidIssuerError: Why.ISSUER,
    jwt.InvalidSignatureError: Why.SIGNATURE,
    jwt.InvalidAlgorithmError: Why.ALGORITHM,
    jwt.DecodeError: Why.MALFORMED,
}
"""The first entry that fits counts: an `InvalidSignatureError` is a `DecodeError` too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What an agent asks of a token."""

    issuer: str
    audience: str
    claim: str  # that names the tenant

    @property
    def root(self) -> str:
        """What a secret minted for the bearer of such a token depends on."""
        return f"jwt {self.issuer} {self.audience}"


@dataclass(frozen=True, slots=True)
class UnknownKey:
    """It names a key that the set does not hold: the issuer may have a new one."""


def looks_like_jwt(token: str) -> bool:
    """Whether it could be one: a header that is a JSON object begins so in Base64."""
    return token.startswith("eyJ") and token.count(".") == 2


def verified(token: str, keys: KeySet, expected: Expected) -> Caller | Why | UnknownKey:
    """The caller that a token stands for, or why for none. The clock is the library's."""
    if len(token) > MAX_TOKEN_CHARS:
        return Why.TOO_LONG
    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError:
        return Why.MALFORMED
    algorithm, kid = str(header.get("alg")), header.get("kid")
    if algorithm not in ALGORITHMS.values():
        return Why.ALGORITHM
    key = keys.find(kid, algorithm)
    if key is None:
        return Why.ALGORITHM if kid is not None and keys.knows(kid) else UnknownKey()
    try:
        claims = jwt.decode(
            token,
            key,
            algorithms=[algorithm],
            audience=expected.audience,
            issuer=expected.issuer,
            leeway=LEEWAY_SECONDS,
            options={"require": ["exp", "iss", "aud"]},
        )
    except jwt.PyJWTError as error:
        return next((why for kind, why in _WHY.items() if isinstance(error, kind)), Why.CLAIMS)
    return _caller(claims, expected)


def _caller(claims: dict[str, Any], expected: Expected) -> Caller | Why:
    tenant = claims.get(expected.claim)
    if not isinstance(tenant, str) or not 0 < len(tenant) <= MAX_TENANT_CHARS:
        return Why.CLAIMS
    if not tenant.isprintable():
        return Why.CLAIMS
    expires = float(claims["exp"])
    subject = claims.get("sub")
    return Caller(
        tenant=tenant,
        via=Via.JWT,
        root=expected.root,
        expires=expires,
        subject=subject if isinstance(subject, str) else "",
    )


class Verifier:
    """One agent's tokens, those that were good remembered until they expire or the keys change."""

    def __init__(self, expected: Expected, remembered: int = REMEMBERED) -> None:
        self.expected = expected
        self._remembered = remembered
        self._keys: KeySet | None = None
        self._good: OrderedDict[bytes, Caller] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Verifier {self.expected.issuer} remembered={len(self._good)}>"

    def check(self, token: str, keys: KeySet, now: float) -> Caller | Why | UnknownKey:
        """As `verified`. `now` is Unix time."""
        if keys is not self._keys:  # a key that the issuer took back opens nothing any more
            self._keys = keys
            self._good.clear()
        digest = hashlib.sha256(token.encode("latin-1", "replace")).digest()
        known = self._good.get(digest)
        if known is not None and known.expires is not None and now < known.expires:
            self._good.move_to_end(digest)
            return known
        found = verified(token, keys, self.expected)
        if isinstance(found, Caller):
            self._good[digest] = found
            if len(self._good) > self._remembered:
                self._good.popitem(last=False)
        return found
