"""Where a call is dialled to on each rung, and what is said there. Pure but for a burst ticket's time of day."""

import ssl
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from trunkline_runtime.contract import (
    CALL_HEADER,
    HOPS_HEADER,
    TICKET_HEADER,
    worker_server_name,
)
from trunkline_runtime.gateway.burst import Session, burst_ticket
from trunkline_runtime.gateway.handshake import Address, Door
from trunkline_runtime.gateway.routes import BurstRung, Route, UpstreamRung

MODEL: Final = "model"
DEFAULT_PORTS: Final = {"http": 80, "ws": 80, "https": 443, "wss": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an admitted caller wants, as a worker is to see it."""

    call: str
    route: Route
    target: str  # path and query
    subprotocol: str | None


def warm_address(route: Route, host: str, port: int) -> Address:
    """A pod of the agent."""
    return Address(
        host=host, port=port, tls=route.worker_tls, server_name=worker_server_name(route.agent)
    )


def warm_door(wanted: Wanted, ticket: str) -> Door:
    """`ticket` is signed for this call at the pod's worker."""
    return Door(
        target=wanted.target,
        subprotocol=wanted.subprotocol,
        headers=((TICKET_HEADER, ticket), (CALL_HEADER, wanted.call)),
        opening=wanted.route.opening,
    )


def burst_address(rung: BurstRung, tls: ssl.SSLContext) -> Address:
    """Modal's door to the containers of a region."""
    return _address(rung.url, tls, "https")


def burst_door(wanted: Wanted, session: Session) -> Door:
    """The container that a session at Modal is held in."""
    return Door(
        target=urlsplit(session.rung.url).path + wanted.target,
        subprotocol=wanted.subprotocol,
        headers=(
            ("Modal-Authorization", f"Bearer {session.token}"),
            (TICKET_HEADER, burst_ticket(session.rung, wanted.route.agent, wanted.call)),
            (CALL_HEADER, wanted.call),
        ),
        opening=wanted.route.opening,
    )


def upstream_address(rung: UpstreamRung, tls: ssl.SSLContext) -> Address:
    """Another gateway or a hosted endpoint."""
    return _address(rung.url, tls, "wss")


def upstream_door(wanted: Wanted, rung: UpstreamRung, hops: int) -> Door:
    """The caller's path behind the rung's, and its model instead of ours.

    `hops` gateways have sent the call on before. The caller's own credential stays here.
    """
    path, _, query = wanted.target.partition("?")
    fields = [pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] != MODEL]
    headers = [(HOPS_HEADER, str(hops + 1))]
    if rung.token:
        headers.append(("Authorization", f"Bearer {rung.token}"))
    return Door(
        target=f"{urlsplit(rung.url).path}{path}?{urlencode([(MODEL, rung.model), *fields])}",
        subprotocol=wanted.subprotocol,
        headers=tuple(headers),
        ours=False,
    )


def _address(url: str, tls: ssl.SSLContext, secure: str) -> Address:
    parts = urlsplit(url)
    return Address(
        host=parts.hostname or "",
        port=parts.port or DEFAULT_PORTS[parts.scheme],
        tls=tls if parts.scheme == secure else None,
    )
