"""What the door says: let in, or the plain HTTP answer instead of a call."""

from dataclasses import dataclass
from enum import StrEnum

from trunkline_runtime.gateway.access.caller import Caller
from trunkline_runtime.gateway.routes import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """An authenticated caller."""

    route: Route
    caller: Caller
    target: str  # path and query, as the worker is to see them; never a ticket
    subprotocol: str | None  # what the caller offers and we may select; never the key


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """The plain answer instead of a call."""

    status: int
    text: str
    outcome: str  # for the ledger
    agent: str = ""  # only where the caller may know that it exists
    headers: tuple[tuple[str, str], ...] = ()


class Away(StrEnum):
    """Why a connection was ended before its first word. For metrics: a closed set."""

    TLS = "tls"  # no handshake that could succeed: plain HTTP, or an old version
    CERTIFICATE = "certificate"  # none, or none of the authorities that are trusted
    LATE = "late"
    PROXY_HEADER = "proxy_header"  # a trusted proxy sent none, or a bad one
    GONE = "gone"  # the peer left; so do health checks of load balancers
