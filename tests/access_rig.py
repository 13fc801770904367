"""An issuer of tokens on loopback: real keys, and a real HTTP server for its JWKS."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from trunkline_runtime.gateway.access.tokens import Expected

ISSUER: Final = "https://id.example/realms/us"
AUDIENCE: Final = "calls"
EXPECTED: Final = Expected(issuer=ISSUER, audience=AUDIENCE, claim="org")

# Made once: an RSA key takes a tenth of a second.
PRIVATE: Final[dict[str, Any]] = {
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
STRANGER: Final = rsa.generate_private_key(public_exponent=65537, key_size=2048)
_TO_JWK: Final[dict[str, Callable[..., Any]]] = {
    "RS256": RSAAlgorithm.to_jwk,
    "ES256": ECAlgorithm.to_jwk,
    "EdDSA": OKPAlgorithm.to_jwk,
}


def jwk(algorithm: str = "RS256", kid: str | None = None, key: Any = None, **more: Any) -> Any:
    """A public key as its issuer publishes it; its `kid` is the algorithm's name unless another is given."""
    public = (key or PRIVATE[algorithm]).public_key()
    found = _TO_JWK[algorithm](public, as_dict=True)
    found.pop("key_ops", None)
    return {**found, "kid": kid or algorithm, "use": "sig", "alg": algorithm, **more}


def jwks(*keys: Any) -> str:
    """A document of these keys, or of one of each kind."""
    return json.dumps({"keys": list(keys) or [jwk(algorithm) for algorithm in PRIVATE]})


def claims(**changes: Any) -> dict[str, Any]:
    """What a good token says; None takes a claim away."""
    now = int(time.time())
    all_of_them = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "user-1",
        "org": "acme",
        "iat": now,
        "exp": now + 86_400,  # some are made when tests are collected, long before they are used
    }
    return {name: value for name, value in (all_of_them | changes).items() if value is not None}


def token(
    algorithm: str = "RS256",
    *,
    key: Any = None,
    kid: str | None = "",
    headers: dict[str, Any] | None = None,
    **changes: Any,
) -> str:
    """A token; `kid` "" is the algorithm's own, None leaves it out."""
    named = {} if kid is None else {"kid": kid or algorithm}
    return jwt.encode(
        claims(**changes),
        key or PRIVATE[algorithm],
        algorithm,
        headers={**named, **(headers or {})},
    )


def jwt_access(uri: str = "", **changes: Any) -> dict[str, Any]:
    """`access` of a route that takes this issuer's tokens."""
    source = {"jwksUri": uri} if uri else {"jwks": jwks()}
    access: dict[str, Any] = {"public": False, "apiKeys": {}, "origins": [], "mintKey": "m" * 64}
    access["jwt"] = {"issuer": ISSUER, "audience": AUDIENCE, **source}
    access["tenants"] = tenants()
    return access | changes


def tenants(claim: str = "org", overrides: Any = None, **changes: int) -> dict[str, Any]:
    """`access.tenants` of a route; keyword arguments are limits of everybody."""
    none = {"concurrentCalls": 0, "startsPerMinute": 0, "minutesPerDay": 0, "guaranteedSlots": 0}
    own = {name: none | changes | limits for name, limits in (overrides or {}).items()}
    return {"claim": claim, "limits": none | changes, "overrides": own}


class Issuer:
    """Serves a JWKS, or misbehaves as it is told."""

    def __init__(self) -> None:
        self.text = jwks()
        self.status = "200 OK"
        self.silent = False
        self.endless = False
        self.sent = 0  # of a document without end
        self.asked = 0
        self.headers = ""
        self._server: asyncio.Server | None = None

    @property
    def uri(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/certs"

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator["Issuer"]:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", port)
        try:
            yield self
        finally:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            if self.silent:
                await reader.read()
            if self.endless:
                writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
                while self.sent < 2**26:
                    writer.write(bytes(2**16))
                    await writer.drain()
                    self.sent += 2**16
            body = self.text.encode()
            head = f"HTTP/1.1 {self.status}\r\nContent-Length: {len(body)}\r\n{self.headers}"
            writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
            await writer.drain()
        writer.close()
