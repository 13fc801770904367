"""Burst tickets: signed, for one agent, soon over, and each good once."""

import time
from typing import Any

import jwt
import pytest
from worker_rig import AGENT, TICKET_KEY

from trunkline_runtime.worker import tickets as module
from trunkline_runtime.worker.tickets import (
    LEEWAY_SECONDS,
    MAX_AHEAD_SECONDS,
    BurstTickets,
    TicketRefused,
)


def signed(key: str = TICKET_KEY, algorithm: str = "HS256", **changes: Any) -> str:
    claims = {"aud": AGENT, "call": "c1", "jti": "j1", "exp": time.time() + 60, **changes}
    return jwt.encode(
        {name: value for name, value in claims.items() if value is not None}, key, algorithm
    )


def test_a_ticket_is_good_once() -> None:
    tickets = BurstTickets(TICKET_KEY, AGENT)
    token = signed()
    ticket = tickets.check(token, time.time())
    assert (ticket.call, ticket.jti) == ("c1", "j1")
    assert tickets.check(token, time.time()) == ticket, "checking does not use it"
    tickets.use(ticket)
    with pytest.raises(TicketRefused, match="used before"):
        tickets.check(token, time.time())
    assert tickets.check(signed(jti="j2"), time.time()).jti == "j2"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key": "another-key-of-the-tests-0123456789abcdef"}, "Signature"),
        ({"key": TICKET_KEY * 2, "algorithm": "HS512"}, "alg"),
        ({"aud": "default/other"}, "Audience"),
        ({"aud": None}, '"aud"'),
        ({"exp": -LEEWAY_SECONDS - 5}, "expired"),
        ({"exp": None}, '"exp"'),
        ({"exp": MAX_AHEAD_SECONDS + 60}, "more than 600 s"),
        ({"call": None}, '"call"'),
        ({"call": ""}, "1 to 128"),
        ({"call": 7}, "1 to 128"),
        ({"jti": None}, '"jti"'),
        ({"jti": "j" * 129}, "1 to 128"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    if changes.get("exp"):
        changes = {**changes, "exp": time.time() + changes["exp"]}
    with pytest.raises(TicketRefused, match=words):
        BurstTickets(TICKET_KEY, AGENT).check(signed(**changes), time.time())


@pytest.mark.parametrize(
    "token", ["", "a.b.c", f"{signed()}x", jwt.encode({"aud": AGENT}, "", "none")]
)
def test_what_nobody_signed_is_refused(token: str) -> None:
    with pytest.raises(TicketRefused):
        BurstTickets(TICKET_KEY, AGENT).check(token, time.time())


def test_used_tickets_are_forgotten_when_they_would_have_expired() -> None:
    tickets, now = BurstTickets(TICKET_KEY, AGENT), time.time()
    token = signed()
    for number in range(module.MAX_USED):
        tickets.use(module.BurstTicket(f"used-{number}", "c", now + 60))
    with pytest.raises(TicketRefused, match="too many"):
        tickets.check(token, now)
    assert tickets.check(token, now + 61 + LEEWAY_SECONDS).jti == "j1"
    assert repr(tickets) == f"<BurstTickets agent={AGENT} used=0>"
