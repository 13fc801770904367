"""Who may call: from the caller's request to a route, or to the plain answer that says no.

The order matters: the agent, then the key, then the origin. A stranger learns nothing about which
agents exist: an unknown agent is answered like a wrong key.
"""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, urlsplit

from websockets.datastructures import Headers
from websockets.http11 import Request

from trunkline_runtime.contract import REALTIME_PATH
from trunkline_runtime.gateway.routes import Access, Route

SUBPROTOCOL: Final = "realtime"
KEY_SUBPROTOCOL: Final = "openai-insecure-api-key."  # browsers cannot set Authorization
UNAUTHORIZED: Final = (
    "unknown agent or wrong key: send `Authorization: Bearer <key>`, or in a browser the subprotocol "
    f"`{KEY_SUBPROTOCOL}<key>` beside `{SUBPROTOCOL}`, and check the model\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """An authenticated caller."""

    route: Route
    target: str  # path and query, as the worker is to see them
    subprotocol: str | None  # what the caller offers and we may select; never the key


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """The plain answer instead of a call."""

    status: int
    text: str
    outcome: str  # for the ledger
    agent: str = ""  # only where the caller may know that it exists
    headers: tuple[tuple[str, str], ...] = ()


def admit(
    request: Request, routes: Mapping[str, Route], default_namespace: str
) -> Admitted | Denied:
    """Decides about a valid WebSocket upgrade."""
    if not all("!" <= character <= "~" for character in request.path):
        # It goes on to the worker, where a bare CR could end the line for a lenient proxy.
        return _invalid("the path holds characters that a URL must not have\n")
    parts = urlsplit(request.path)
    if parts.path != REALTIME_PATH:
        return _invalid(f"calls are made to {REALTIME_PATH}?model=[namespace/]agent\n", 404)
    try:
        models = parse_qs(parts.query, max_num_fields=32).get("model", [])
    except ValueError:
        models = []
    if len(models) != 1:
        return _invalid("say once which agent you call: ?model=[namespace/]agent\n")
    agent = models[0] if "/" in models[0] else f"{default_namespace}/{models[0]}"
    offered = _offered(request.headers)
    route = routes.get(agent)
    if route is None or not _may(route.access, _keys(request.headers, offered)):
        return Denied(
            status=401,
            text=UNAUTHORIZED,
            outcome="unauthorized",
            agent="" if route is None else agent,
            headers=(("WWW-Authenticate", 'Bearer realm="trunkline"'),),
        )
    origins = request.headers.get_all("Origin")
    if route.access.origins and not route.access.origins.issuperset(origins):
        text = "this agent takes no calls from pages of this origin: see spec.access.origins\n"
        return Denied(status=403, text=text, outcome="forbidden", agent=agent)
    return Admitted(
        route=route,
        target=request.path,
        subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None,
    )


def bearers(headers: Headers) -> list[str]:
    """What stands behind `Authorization: Bearer`."""
    pairs = [value.partition(" ") for value in headers.get_all("Authorization")]
    return [token.strip() for scheme, _, token in pairs if scheme.lower() == "bearer"]


def _invalid(text: str, status: int = 400) -> Denied:
    return Denied(status=status, text=text, outcome="invalid")


def _offered(headers: Headers) -> list[str]:
    lines = headers.get_all("Sec-WebSocket-Protocol")
    return [name.strip() for line in lines for name in line.split(",")]


def _keys(headers: Headers, offered: list[str]) -> list[str]:
    in_subprotocols = [
        name.removeprefix(KEY_SUBPROTOCOL) for name in offered if name.startswith(KEY_SUBPROTOCOL)
    ]
    # More than one of each is nobody's client, and bounds the work of a stranger.
    return [*bearers(headers)[:1], *in_subprotocols[:1]]


def _may(access: Access, keys: list[str]) -> bool:
    if access.public:
        return True
    presented = [hashlib.sha256(key.encode("latin-1")).hexdigest() for key in keys]
    # Header values are bytes that were read as ISO-8859-1. No early end: how long it takes says nothing about which key was close.
    matches = [hmac.compare_digest(mine, known) for mine in presented for known in access.digests]
    return any(matches)
