"""Tickets of burst data links: JWTs that a gateway signs, each good for one link to one agent's worker.

A warm ticket needs none of this: it is a random handle that the worker itself made (`slots`).
"""

from dataclasses import dataclass
from typing import Any, Final

import jwt

LEEWAY_SECONDS: Final = 30  # a gateway's clock and Modal's may differ
MAX_AHEAD_SECONDS: Final = 600  # a longer life would only make the list of used ones longer
MAX_USED: Final = 65_536  # 100 calls a second for all that time; each was signed by a gateway


class TicketRefused(Exception):
    """The ticket opens nothing; the text says why, and holds nothing of the ticket."""


@dataclass(frozen=True, slots=True)
class BurstTicket:
    jti: str
    call: str
    expires: float  # Unix time


class BurstTickets:
    """Checks tickets and remembers the used ones until they would have expired anyway."""

    def __init__(self, key: str, agent: str) -> None:
        self._key = key
        self._agent = agent
        self._used: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<BurstTickets agent={self._agent} used={len(self._used)}>"

    def check(self, token: str, now: float) -> BurstTicket:
        """The ticket in a token; raises `TicketRefused`. `now` is Unix time."""
        claims = self._claims(token)
        jti, call = claims["jti"], claims["call"]
        if not isinstance(call, str) or not 0 < len(call) <= 128 or len(jti) > 128:
            raise TicketRefused("call and jti must have 1 to 128 characters")
        ticket = BurstTicket(jti, call, float(claims["exp"]))
        if ticket.expires > now + MAX_AHEAD_SECONDS:
            raise TicketRefused(f"it is good for more than {MAX_AHEAD_SECONDS} s")
        if jti in self._used:
            raise TicketRefused("it was used before")
        if len(self._used) >= MAX_USED:
            gone = now - LEEWAY_SECONDS
            self._used = {used: expires for used, expires in self._used.items() if expires > gone}
        if len(self._used) >= MAX_USED:
            raise TicketRefused("too many tickets were used lately")
        return ticket

    def use(self, ticket: BurstTicket) -> None:
        """Notes that a ticket that was just checked has opened its link."""
        self._used[ticket.jti] = ticket.expires

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
