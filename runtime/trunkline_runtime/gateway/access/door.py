"""The door: from a caller's request to who that is, and what it may have.

The order matters: the agent, then what is shown, then the origin. A stranger learns nothing about which agents
exist: an unknown agent is answered like a wrong key.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from websockets.http11 import Request

from trunkline_runtime.contract import MOSHI_PATH
from trunkline_runtime.gateway.access.answers import Admitted, Denied
from trunkline_runtime.gateway.access.caller import (
    CERTIFICATE_ROOT,
    KEY_ROOT,
    Caller,
    Via,
    Why,
)
from trunkline_runtime.gateway.access.issuers import Issuers, Pulse
from trunkline_runtime.gateway.access.jwks import KeySet
from trunkline_runtime.gateway.access.minted import (
    Minted,
    Roots,
    UsedTickets,
    kind_of,
    mint,
    opened,
)
from trunkline_runtime.gateway.access.order import Order
from trunkline_runtime.gateway.access.tokens import UnknownKey, Verifier, looks_like_jwt
from trunkline_runtime.gateway.access.wish import (
    KEY_SUBPROTOCOL,
    SUBPROTOCOL,
    Shown,
    wish,
)
from trunkline_runtime.gateway.routes import Access, JwtAccess, Route

UNAUTHORIZED: Final = (
    "unknown agent or wrong key: send `Authorization: Bearer <key>`, or in a browser the subprotocol "
    f"`{KEY_SUBPROTOCOL}<key>` beside `{SUBPROTOCOL}`, and check the model\n"
)
CHALLENGE: Final = (("WWW-Authenticate", 'Bearer realm="trunkline"'),)
RETRY_SECONDS: Final = "5"  # a caller that comes back has the issuer asked again
TWILIO: Final = "twilio"  # from a signature nothing can be minted
PUBLIC: Final = "public"
"""The tenant of a public agent's callers, all of them."""


@dataclass(frozen=True, slots=True)
class Unready:
    """Nobody can say now whether the caller may; the sentence is for the caller."""

    why: str


Counted = Callable[[str, Why], None]
"""(agent, why what was shown opens nothing)."""


class Door:
    """One gateway's. It holds the issuers' keys, tokens that were good, and the used tickets."""

    def __init__(self, pulse: Pulse, counted: Counted) -> None:
        self.issuers = Issuers(pulse)
        self._counted = counted
        self._used = UsedTickets()
        self._verifiers: dict[str, Verifier] = {}

    def __repr__(self) -> str:
        return f"<Door {self.issuers!r} {self._used!r}>"

    def take(self, routes: Iterable[Route]) -> None:
        """Acts on these routes from now on."""
        jwts = {route.agent: route.access.jwt for route in routes}
        self.issuers.follow(
            jwt.source for jwt in jwts.values() if jwt and isinstance(jwt.source, str)
        )
        for agent in [agent for agent in self._verifiers if not jwts.get(agent)]:
            del self._verifiers[agent]

    async def admit(
        self,
        request: Request,
        holder: str,
        routes: Mapping[str, Route],
        default_namespace: str,
        now: float,
    ) -> Admitted | Denied:
        """Decides about a valid WebSocket upgrade. `now` is Unix time."""
        wanted = wish(request, default_namespace, holder)
        if isinstance(wanted, Denied):
            return wanted
        # A client that cannot say whom it calls means the only one; of several, a stranger learns nothing.
        agent = wanted.agent or (next(iter(routes)) if len(routes) == 1 else "")
        route = routes.get(agent)
        caller = await self._let_in(route, wanted.shown, now)
        if isinstance(caller, Denied):
            return caller
        assert route is not None, "nobody is let in without one"
        spoken = "moshi" if wanted.target.partition("?")[0] == MOSHI_PATH else "realtime"
        if route.protocols and spoken not in route.protocols:
            text = (
                f"{agent} takes no calls in {spoken}'s protocol: session.protocols leaves it out\n"
            )
            return Denied(status=403, text=text, outcome="forbidden", agent=agent)
        return Admitted(
            route=route, caller=caller, target=wanted.target, subprotocol=wanted.subprotocol
        )

    async def mint(self, order: Order, routes: Mapping[str, Route], now: float) -> Minted | Denied:
        """A secret or a ticket for one who may call."""
        route = routes.get(order.agent)
        caller = await self._let_in(route, order.shown, now)
        if isinstance(caller, Denied):
            return caller
        assert route is not None, "nobody is let in without one"
        if caller.via in (Via.SECRET, Via.TICKET):
            text = "a secret mints no other: use the key or the token that you got it with\n"
            return Denied(status=403, text=text, outcome="forbidden", agent=route.agent)
        if not route.access.mint_key:
            text = "this gateway's routes bring no key for minting: the operator is older than it\n"
            return Denied(status=501, text=text, outcome="invalid", agent=route.agent)
        name = secrets.token_urlsafe(16)
        key = route.access.mint_key
        return mint(order.kind, key, route.agent, caller, order.seconds, int(now), name)

    async def close(self) -> None:
        await self.issuers.close()

    async def _let_in(self, route: Route | None, shown: Shown, now: float) -> Caller | Denied:
        found = Why.NOTHING if route is None else await self._recognised(route, shown, now)
        agent = "" if route is None else route.agent
        match found:
            case Why():
                self._counted(agent, found)
                return Denied(
                    status=401,
                    text=UNAUTHORIZED,
                    outcome="unauthorized",
                    agent=agent,
                    headers=CHALLENGE,
                )
            case Unready(why):
                retry = (("Retry-After", RETRY_SECONDS),)
                return Denied(
                    status=503, text=f"{why}\n", outcome="unready", agent=agent, headers=retry
                )
            case Caller():
                pass
        assert route is not None
        if route.access.origins and not route.access.origins.issuperset(shown.origins):
            text = "this agent takes no calls from pages of this origin: see spec.access.origins\n"
            return Denied(status=403, text=text, outcome="forbidden", agent=agent)
        return found

    async def _recognised(self, route: Route, shown: Shown, now: float) -> Caller | Why | Unready:
        """Whom the first of what is shown stands for that stands for somebody."""
        if route.access.public:
            return Caller(tenant=PUBLIC, via=Via.PUBLIC, root=PUBLIC)
        found: Caller | Why | Unready = Why.NOTHING
        for token in shown.tokens:
            found = await self._of(route, token, now)
            if isinstance(found, Caller):
                return found
        for ticket in shown.tickets:
            # In a URL nothing counts but a ticket, and a ticket nowhere else: URLs are logged.
            good = kind_of(ticket) is Via.TICKET
            found = self._minted(route, ticket, Via.TICKET, now) if good else Why.MALFORMED
            if isinstance(found, Caller):
                return found
        for proof in (by_twilio(route.access, shown), by_certificate(route.access, shown)):
            if isinstance(proof, Caller):
                return proof
            # What a proxy puts into every request must not hide why a key was refused.
            found = proof if proof is not None and found is Why.NOTHING else found
        return found

    async def _of(self, route: Route, token: str, now: float) -> Caller | Why | Unready:
        """Whom one token stands for."""
        kind = kind_of(token)
        if (caller := by_key(route.access, token)) is not None:
            return caller
        if kind is Via.SECRET:
            return self._minted(route, token, kind, now)
        if route.access.jwt is not None and looks_like_jwt(token):
            return await self._by_jwt(route.agent, route.access.jwt, token, now)
        return Why.KEY

    def _minted(self, route: Route, token: str, kind: Via, now: float) -> Caller | Why | Unready:
        access = route.access
        if not access.mint_key:
            return Why.SIGNATURE
        found = opened(kind, token, access.mint_key, route.agent, roots(access))
        if isinstance(found, Why):
            return found
        if kind is Via.TICKET:
            match self._used.use(found.name, found.expires, now):
                case False:
                    return Why.USED
                case None:
                    return Unready("too many tickets were used in the last minute: call again")
        return found.caller

    async def _by_jwt(
        self, agent: str, jwt: JwtAccess, token: str, now: float
    ) -> Caller | Why | Unready:
        """Looks for the issuer's newest keys once where the token names one that is not known."""
        verifier = self._verifier(agent, jwt)
        found: Caller | Why | UnknownKey = UnknownKey()
        for last in (False, True):
            keys = self._keys(jwt)
            if keys is not None:
                found = verifier.check(token, keys, now)
            if not isinstance(found, UnknownKey):
                return found
            if not last and isinstance(jwt.source, str):
                await self.issuers.look_again(jwt.source)
        if self._keys(jwt) is None:
            return Unready("the keys of this agent's issuer cannot be read now: call again")
        return Why.SIGNING_KEY

    def _verifier(self, agent: str, jwt: JwtAccess) -> Verifier:
        """The agent's, made anew where it asks something else of tokens than before."""
        verifier = self._verifiers.get(agent)
        if verifier is None or verifier.expected != jwt.expected:
            verifier = self._verifiers[agent] = Verifier(jwt.expected)
        return verifier

    def _keys(self, jwt: JwtAccess) -> KeySet | None:
        return self.issuers.keys(jwt.source) if isinstance(jwt.source, str) else jwt.source


def by_key(access: Access, token: str) -> Caller | None:
    """The caller whose API key it is. Keys are known by their digests alone."""
    # Header values are bytes that were read as ISO-8859-1.
    presented = hashlib.sha256(token.encode("latin-1", "replace")).hexdigest()
    # No early end: how long it takes says nothing about which key was close.
    matches = [
        name for name, known in access.digests.items() if hmac.compare_digest(presented, known)
    ]
    if not matches:
        return None
    return Caller(tenant=matches[0], via=Via.KEY, root=f"{KEY_ROOT}{presented}")


def by_twilio(access: Access, shown: Shown) -> Caller | Why | None:
    """The caller whose call Twilio has signed; None where nothing is signed.

    What Twilio signs is the agent's own URL, so the operator knows the signatures beforehand, and the account's
    token, which signs for much else, never comes here.
    """
    if not shown.signature or not access.twilio:
        return None
    presented = hashlib.sha256(shown.signature.encode("latin-1", "replace")).hexdigest()
    matches = [
        name
        for name, known in access.twilio.items()
        for digest in known
        if hmac.compare_digest(presented, digest)
    ]
    return Caller(tenant=matches[0], via=Via.TWILIO, root=TWILIO) if matches else Why.TWILIO


def by_certificate(access: Access, shown: Shown) -> Caller | Why | None:
    """The holder of the certificate that was shown; None where there is none, or it counts for nothing."""
    if not shown.holder or access.holders is None:
        return None
    if not access.knows(shown.holder):
        return Why.CERTIFICATE
    root = f"{CERTIFICATE_ROOT}{shown.holder}"
    return Caller(tenant=shown.holder, via=Via.CERTIFICATE, root=root)


def roots(access: Access) -> Roots:
    """What minted secrets may come from."""
    of_all = () if access.jwt is None else (access.jwt.expected.root,)
    of_keys = {name: f"{KEY_ROOT}{digest}" for name, digest in access.digests.items()}
    return Roots(of_keys, of_all, access.knows)
