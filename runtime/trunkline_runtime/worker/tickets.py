"""Tickets of data links: each is signed by a gateway and good for one call on one link to one agent's worker.

Of a pod's worker a gateway has a key for each control link, so a ticket needs no clock: it dies with its link. A worker
at Modal has no such link; there a ticket is a JWT that expires.
"""

import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

import jwt

from trunkline_runtime.contract import ticket
from trunkline_runtime.worker.orders import MAX_CALL_ID

LEEWAY_SECONDS: Final = 30  # a gateway's clock and Modal's may differ
MAX_AHEAD_SECONDS: Final = 600  # a longer life would only make the list of used ones longer
MAX_USED: Final = 65_536  # 100 calls a second for all that time; each was signed by a gateway
WINDOW: Final = 1024  # numbers of a link that may overtake each other; nobody has more slots


class TicketRefused(Exception):
    """The ticket opens nothing; the text says why, and holds nothing of the ticket."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """One that was found good."""

    call: str
    use: Callable[[], None] = field(repr=False)  # it has opened its link, and opens no other


class Tickets(Protocol):
    """Those that one worker takes."""

    def check(self, token: str, now: float) -> Ticket:
        """The ticket in a token; raises `TicketRefused`. `now` is Unix time."""


@dataclass(slots=True)
class _Link:
    """Of one control link: RFC 4303 keeps packets from being replayed in the same way (section 3.4.3)."""

    key: str = field(repr=False)
    used: set[int] = field(default_factory=set)
    top: int = 0  # the highest number that was used

    def use(self, number: int) -> None:
        self.used.add(number)
        self.top = max(self.top, number)
        if len(self.used) > 2 * WINDOW:
            self.used = {each for each in self.used if each > self.top - WINDOW}


class LinkTickets:
    """A pod's: those of its control links, as `contract.ticket` makes them."""

    def __init__(self) -> None:
        self._links: dict[int, _Link] = {}

    def __repr__(self) -> str:
        return f"<LinkTickets links={sorted(self._links)}>"

    def issue(self, link: int) -> str:
        """The key for a link that is new."""
        key = secrets.token_urlsafe(32)
        self._links[link] = _Link(key)
        return key

    def revoke(self, link: int) -> None:
        """The link is gone, and so is the use of all its tickets."""
        self._links.pop(link, None)

    def check(self, token: str, now: float) -> Ticket:
        asked, _, mac = token.rpartition(".")
        link, _, rest = asked.partition(".")
        number, _, call = rest.partition(".")
        if not (_is_number(link) and _is_number(number) and mac and 0 < len(call) <= MAX_CALL_ID):
            raise TicketRefused("it is no ticket")
        held = self._links.get(int(link))
        if held is None:
            raise TicketRefused("its control link is gone")
        if not hmac.compare_digest(
            ticket(int(link), held.key, int(number), call).encode(), token.encode()
        ):
            raise TicketRefused("its signature is wrong")
        if int(number) in held.used or int(number) <= held.top - WINDOW:
            raise TicketRefused("it was used before, or is old")
        return Ticket(call, partial(held.use, int(number)))


class BurstTickets:
    """Checks JWTs and remembers the used ones until they would have expired anyway."""

    def __init__(self, key: str, agent: str) -> None:
        self._key = key
        self._agent = agent
        self._used: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<BurstTickets agent={self._agent} used={len(self._used)}>"

    def check(self, token: str, now: float) -> Ticket:
        claims = self._claims(token)
        jti, call, expires = claims["jti"], claims["call"], float(claims["exp"])
        if not isinstance(call, str) or not 0 < len(call) <= MAX_CALL_ID or len(jti) > MAX_CALL_ID:
            raise TicketRefused(f"call and jti must have 1 to {MAX_CALL_ID} characters")
        if expires > now + MAX_AHEAD_SECONDS:
            raise TicketRefused(f"it is good for more than {MAX_AHEAD_SECONDS} s")
        if jti in self._used:
            raise TicketRefused("it was used before")
        if len(self._used) >= MAX_USED:
            gone = now - LEEWAY_SECONDS
            self._used = {used: expires for used, expires in self._used.items() if expires > gone}
        if len(self._used) >= MAX_USED:
            raise TicketRefused("too many tickets were used lately")
        return Ticket(call, partial(self._used.__setitem__, jti, expires))

    def _claims(self, token: str) -> dict[str, Any]:
        try:
            return jwt.decode(
                token,
                self._key,
                algorithms=["HS256"],
                audience=self._agent,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "aud", "call", "jti"]},
            )
        except jwt.InvalidTokenError as error:
            raise TicketRefused(str(error)) from error


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 18
