"""What a gateway mints for browsers: client secrets, as OpenAI's Realtime API has them, and one-use tickets.

Both are JWTs that only gateways make and check, so an HMAC serves (RFC 7519, HS256). Its key comes in the route.
The operator derives it from the agent's worker key and its ticket key together: pods know only the first and Modal
containers only the second, so no worker can mint; every gateway has it, so each takes what another has minted; and
nothing more has to be stored or rotated.

A secret depends on its root, the key or issuer that its minter showed: when that is removed from the agent, the
secret opens nothing. It carries a keyed digest of it, so that a browser cannot guess at the key.
"""

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import jwt

from trunkline_runtime.gateway.access.caller import CERTIFICATE_ROOT, Caller, Via, Why
from trunkline_runtime.gateway.access.tokens import MAX_TOKEN_CHARS

LEEWAY_SECONDS: Final = 5  # between the clocks of two gateways
PREFIXES: Final = {Via.SECRET: "ek_", Via.TICKET: "tk_"}
SECRET_SECONDS: Final = range(10, 7201)  # as OpenAI allows, with its default:
SECRET_DEFAULT_SECONDS: Final = 600
TICKET_SECONDS: Final = range(1, 61)  # a ticket stands in a URL, which proxies log
MAX_USED: Final = 65_536  # 1,000 tickets a second for their longest life; 10 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Minted:
    """One secret or ticket."""

    value: str = field(repr=False)
    expires: int  # Unix time


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a good secret or ticket said."""

    caller: Caller
    name: str  # `jti`
    expires: float


@dataclass(frozen=True, slots=True)
class Roots:
    """What may be shown to this agent now: roots of callers by tenant, and those of any tenant."""

    by_tenant: dict[str, str] = field(repr=False)
    of_all: tuple[str, ...] = field(default=(), repr=False)
    holders: Callable[[str], bool] = field(default=lambda _: False, repr=False)
    """Whether the holder of a certificate may call."""

    def of(self, tenant: str) -> list[str]:
        own = [self.by_tenant[tenant]] if tenant in self.by_tenant else []
        own += [f"{CERTIFICATE_ROOT}{tenant}"] if self.holders(tenant) else []
        return [*self.of_all, *own]


def kind_of(token: str) -> Via | None:
    """What a token claims to be by its beginning."""
    return next((kind for kind, prefix in PREFIXES.items() if token.startswith(prefix)), None)


def mint(
    kind: Via, key: str, agent: str, caller: Caller, seconds: int, now: int, name: str
) -> Minted:
    """A secret or ticket for one agent. `now` is Unix time, `name` unique and random.

    It does not outlive what the minter showed.
    """
    until = now + seconds if caller.expires is None else min(now + seconds, int(caller.expires))
    claims = {
        "aud": agent,
        "tenant": caller.tenant,
        "root": _sealed(key, caller.root),
        "jti": name,
        "iat": now,
        "exp": until,
    }
    token = jwt.encode(claims, _key(kind, key), algorithm="HS256")
    return Minted(value=PREFIXES[kind] + token, expires=until)


def opened(kind: Via, token: str, key: str, agent: str, roots: Roots) -> Opened | Why:
    """Whom a secret or ticket stands for, or why for nobody."""
    if len(token) > MAX_TOKEN_CHARS:
        return Why.TOO_LONG
    try:
        claims = jwt.decode(
            token.removeprefix(PREFIXES[kind]),
            _key(kind, key),
            algorithms=["HS256"],
            audience=agent,
            leeway=LEEWAY_SECONDS,
            options={"require": ["exp", "iat", "aud", "jti", "tenant", "root"]},
        )
    except jwt.ExpiredSignatureError:
        return Why.EXPIRED
    except jwt.InvalidAudienceError:
        return Why.AUDIENCE
    except jwt.PyJWTError:
        return Why.SIGNATURE
    return _whom(kind, claims, key, roots)


def _whom(kind: Via, claims: dict[str, Any], key: str, roots: Roots) -> Opened | Why:
    tenant, sealed, expires = str(claims["tenant"]), str(claims["root"]), float(claims["exp"])
    longest = (TICKET_SECONDS if kind is Via.TICKET else SECRET_SECONDS)[-1]
    if expires - float(claims["iat"]) > longest:
        return Why.CLAIMS
    for root in roots.of(tenant):
        if hmac.compare_digest(sealed, _sealed(key, root)):
            caller = Caller(tenant=tenant, via=kind, root=root, expires=expires)
            return Opened(caller=caller, name=str(claims["jti"]), expires=expires)
    return Why.WITHDRAWN


class UsedTickets:
    """The tickets that opened a call at this gateway, remembered until they would have expired anyway."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<UsedTickets {len(self._used)}>"

    def use(self, name: str, expires: float, now: float) -> bool | None:
        """Whether a ticket is used for the first time; None where no more can be remembered."""
        if name in self._used:
            return False
        if len(self._used) >= MAX_USED:
            gone = now - LEEWAY_SECONDS
            self._used = {used: until for used, until in self._used.items() if until > gone}
        if len(self._used) >= MAX_USED:
            return None
        self._used[name] = expires
        return True


def _key(kind: Via, key: str) -> bytes:
    """One key a kind: a ticket is no secret, nor the other way round."""
    return hmac.digest(key.encode(), f"trunkline {kind}".encode(), "sha256")


def _sealed(key: str, root: str) -> str:
    return hmac.new(key.encode(), f"trunkline root {root}".encode(), hashlib.sha256).hexdigest()[
        :32
    ]
