"""The public keys of an issuer (RFC 7517), each bound to the one algorithm that it verifies.

The key's kind decides the algorithm, never a token's header. So a token cannot choose `none`, nor an HMAC whose
secret would be the public key itself (RFC 8725 §2.1, §3.1).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import jwt

MAX_JWKS_BYTES: Final = (
    256 * 2**10
)  # issuers publish 2 to 10 keys, 2 KiB each with their certificates
MAX_KEYS: Final = 100
RSA_BITS: Final = range(
    2048, 8193
)  # shorter ones are forged, longer ones cost milliseconds a token
ALGORITHMS: Final = {("RSA", None): "RS256", ("EC", "P-256"): "ES256", ("OKP", "Ed25519"): "EdDSA"}
"""(`kty`, `crv`) → `alg`."""


class JwksError(ValueError):
    """Not a set of keys that a token could be checked with; the text says why."""


@dataclass(frozen=True, slots=True)
class KeySet:
    """What one document held. Several keys may share a `kid` if their algorithms differ."""

    keys: Mapping[tuple[str | None, str], Any] = field(repr=False)  # (kid, alg) → public key
    skipped: int = 0  # keys for something else, or too weak

    def find(self, kid: str | None, algorithm: str) -> Any:
        """The key for a token's header, None if there is none.

        A token without `kid` is for an issuer with one key of that kind.
        """
        if kid is not None:
            return self.keys.get((kid, algorithm))
        fitting = [key for (_, alg), key in self.keys.items() if alg == algorithm]
        return fitting[0] if len(fitting) == 1 else None

    def knows(self, kid: str | None) -> bool:
        """Whether a key of that name is there, whatever its kind."""
        return kid is None or any(known == kid for known, _ in self.keys)


def parse_jwks(text: str | bytes) -> KeySet:
    """Reads a JWKS document. Raises `JwksError`."""
    if len(text) > MAX_JWKS_BYTES:
        raise JwksError(f"it is longer than {MAX_JWKS_BYTES} bytes")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise JwksError("it is not JSON") from None
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list) or len(listed) > MAX_KEYS:
        raise JwksError(f"it has no list `keys` of at most {MAX_KEYS} keys")
    keys: dict[tuple[str | None, str], Any] = {}
    for jwk in listed:
        if (found := _key(jwk)) is not None:
            keys.setdefault(*found)
    if not keys:
        raise JwksError(
            "it has no public key for RS256 (2048 to 8192 bits), ES256 or EdDSA (Ed25519)"
        )
    return KeySet(keys, skipped=len(listed) - len(keys))


def _key(jwk: object) -> tuple[tuple[str | None, str], Any] | None:
    """One key under its name, None where it is not for us: sets hold encryption keys too."""
    if not isinstance(jwk, dict):
        return None
    kind, curve, kid = jwk.get("kty"), jwk.get("crv"), jwk.get("kid")
    if not all(part is None or isinstance(part, str) for part in (kind, curve, kid)):
        return None
    algorithm = ALGORITHMS.get((kind or "", None if kind == "RSA" else curve))
    if (
        algorithm is None
        or jwk.get("alg", algorithm) != algorithm
        or jwk.get("use", "sig") != "sig"
        or "d" in jwk  # a private key that somebody published must not be trusted
    ):
        return None
    try:
        key = jwt.PyJWK(jwk, algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    if algorithm == "RS256" and key.key_size not in RSA_BITS:
        return None
    return (kid, algorithm), key
