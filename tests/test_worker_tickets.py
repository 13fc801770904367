"""Tickets of data links: signed, for one agent or one control link, soon over, and each good once."""

import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worker_rig import AGENT, TICKET_KEY

from trunkline_runtime.contract import ticket
from trunkline_runtime.worker import tickets as module
from trunkline_runtime.worker.tickets import (
    LEEWAY_SECONDS,
    MAX_AHEAD_SECONDS,
    WINDOW,
    BurstTickets,
    LinkTickets,
    TicketRefused,
)

NOW = 0.0  # a link's tickets know no time


def signed(key: str = TICKET_KEY, algorithm: str = "HS256", **changes: Any) -> str:
    claims = {"aud": AGENT, "call": "c1", "jti": "j1", "exp": time.time() + 60, **changes}
    return jwt.encode(
        {name: value for name, value in claims.items() if value is not None}, key, algorithm
    )


def test_a_ticket_is_good_once() -> None:
    tickets = BurstTickets(TICKET_KEY, AGENT)
    token = signed()
    ticket = tickets.check(token, time.time())
    assert ticket.call == "c1"
    assert tickets.check(token, time.time()).call == "c1", "checking does not use it"
    ticket.use()
    with pytest.raises(TicketRefused, match="used before"):
        tickets.check(token, time.time())
    assert tickets.check(signed(jti="j2", call="c2"), time.time()).call == "c2"


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
        tickets._used[f"used-{number}"] = now + 60
    with pytest.raises(TicketRefused, match="too many"):
        tickets.check(token, now)
    assert tickets.check(token, now + 61 + LEEWAY_SECONDS).call == "c1"
    assert repr(tickets) == f"<BurstTickets agent={AGENT} used=0>"


# --- those of a control link ---------------------------------------------------------------------------


def test_a_links_ticket_is_good_once_and_while_its_link_is_there() -> None:
    tickets = LinkTickets()
    first, second = tickets.issue(1), tickets.issue(2)
    token = ticket(1, first, 1, "a.b")
    assert tickets.check(token, NOW).call == "a.b"
    tickets.check(token, NOW).use()
    with pytest.raises(TicketRefused, match="used before"):
        tickets.check(token, NOW)
    assert tickets.check(ticket(1, first, 2, "c"), NOW).call == "c"
    tickets.revoke(1)
    tickets.revoke(1)
    with pytest.raises(TicketRefused, match="link is gone"):
        tickets.check(ticket(1, first, 3, "d"), NOW)
    assert tickets.check(ticket(2, second, 1, "d"), NOW).call == "d"
    assert first != second
    assert second not in repr(tickets) + repr(tickets._links)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda token: "", "no ticket"),
        (lambda token: "1.2.3", "no ticket"),
        (lambda token: token.replace("1.", "x.", 1), "no ticket"),
        (lambda token: token.replace("1.", "\u00b9.", 1), "no ticket"),
        (lambda token: token.replace("1.", "1" * 40 + ".", 1), "no ticket"),
        (lambda token: token.replace("1.", "9.", 1), "link is gone"),
        (lambda token: token.replace("1.", "2.", 1), "signature"),
        (lambda token: token.replace("1.", "01.", 1), "signature"),
        (lambda token: token.replace(".7.", ".8."), "signature"),
        (lambda token: token.replace("call", "other"), "signature"),
        (lambda token: token[:-1], "signature"),
        (lambda token: token + "=", "signature"),
    ],
)
def test_what_is_no_ticket_of_the_link(change: Callable[[str], str], words: str) -> None:
    tickets = LinkTickets()
    token = ticket(1, tickets.issue(1), 7, "call")
    tickets.issue(2)
    with pytest.raises(TicketRefused, match=words):
        tickets.check(change(token), NOW)
    assert tickets.check(token, NOW).call == "call"


def test_a_call_without_a_name_or_with_a_long_one_is_refused() -> None:
    tickets = LinkTickets()
    key = tickets.issue(1)
    for call in ("", "c" * 129):
        with pytest.raises(TicketRefused, match="no ticket"):
            tickets.check(ticket(1, key, 1, call), NOW)


@given(st.lists(st.integers(1, 5 * WINDOW), max_size=60), st.booleans())
def test_no_number_opens_two_links_whatever_the_order(numbers: list[int], many: bool) -> None:
    tickets, opened = LinkTickets(), set[int]()
    key = tickets.issue(1)
    for number in [*(range(1, 3 * WINDOW) if many else ()), *numbers, *numbers]:
        token = ticket(1, key, number, "call")
        try:
            tickets.check(token, NOW).use()
        except TicketRefused:
            assert number in opened or number <= max(opened) - WINDOW
        else:
            assert number not in opened
            opened.add(number)
    assert len(tickets._links[1].used) <= 2 * WINDOW


@given(st.text())
def test_whatever_a_stranger_presents_is_refused(token: str) -> None:
    tickets = LinkTickets()
    tickets.issue(1)
    with pytest.raises(TicketRefused):
        tickets.check(token, NOW)
