"""Where a call is dialled to on each rung, and what is said there. Pure but for a burst ticket's time of day."""

import json
import ssl
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from trunkline_runtime.contract import (
    BURST_SETTINGS_TYPE,
    CALL_HEADER,
    HOPS_HEADER,
    TICKET_HEADER,
    worker_server_name,
)
from trunkline_runtime.gateway.burst import Session, ticket
from trunkline_runtime.gateway.frames import text_frame
from trunkline_runtime.gateway.leg import Door
from trunkline_runtime.gateway.routes import Route, UpstreamRung

MODEL: Final = "model"
DEFAULT_PORTS: Final = {"http": 80, "ws": 80, "https": 443, "wss": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an admitted caller wants, as a worker is to see it."""

    call: str
    route: Route
    target: str  # path and query
    subprotocol: str | None


def warm_door(wanted: Wanted, host: str, port: int, granted: str) -> Door:
    """A pod of the agent; `granted` is the ticket that its worker made."""
    return Door(
        host=host,
        port=port,
        tls=wanted.route.worker_tls,
        server_name=worker_server_name(wanted.route.agent),
        target=wanted.target,
        subprotocol=wanted.subprotocol,
        headers=((TICKET_HEADER, granted), (CALL_HEADER, wanted.call)),
    )


def burst_door(wanted: Wanted, session: Session, tls: ssl.SSLContext) -> Door:
    """The container that a session at Modal is held in."""
    url = urlsplit(session.rung.url)
    settings = {"type": BURST_SETTINGS_TYPE, "settings": wanted.route.settings}
    return Door(
        host=url.hostname or "",
        port=url.port or DEFAULT_PORTS[url.scheme],
        tls=tls if url.scheme == "https" else None,
        target=url.path + wanted.target,
        subprotocol=wanted.subprotocol,
        headers=(
            ("Modal-Authorization", f"Bearer {session.token}"),
            (TICKET_HEADER, ticket(session.rung, wanted.route.agent, wanted.call)),
            (CALL_HEADER, wanted.call),
        ),
        opening=text_frame(json.dumps(settings).encode(), masked=True),
    )


def upstream_door(wanted: Wanted, rung: UpstreamRung, hops: int, tls: ssl.SSLContext) -> Door:
    """Another gateway or a hosted endpoint: the caller's path behind the rung's, and its model instead of ours.

    `hops` gateways have sent the call on before. The caller's own credential stays here.
    """
    url = urlsplit(rung.url)
    path, _, query = wanted.target.partition("?")
    fields = [pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] != MODEL]
    headers = [(HOPS_HEADER, str(hops + 1))]
    if rung.token:
        headers.append(("Authorization", f"Bearer {rung.token}"))
    return Door(
        host=url.hostname or "",
        port=url.port or DEFAULT_PORTS[url.scheme],
        tls=tls if url.scheme == "wss" else None,
        target=f"{url.path}{path}?{urlencode([(MODEL, rung.model), *fields])}",
        subprotocol=wanted.subprotocol,
        headers=tuple(headers),
        ours=False,
    )
