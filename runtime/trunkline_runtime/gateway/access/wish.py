"""What an upgrade, or a request for a secret, asks for and shows. Nothing is believed yet."""

import base64
import functools
import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qs, unquote_plus, urlsplit

from websockets.datastructures import Headers
from websockets.http11 import Request

from trunkline_runtime.contract import MOSHI_PATH, REALTIME_PATH
from trunkline_runtime.gateway.access.answers import Denied
from trunkline_runtime.upgrade import offered

SUBPROTOCOL: Final = "realtime"
KEY_SUBPROTOCOL: Final = "openai-insecure-api-key."  # browsers cannot set Authorization
TICKET: Final = "ticket"
TWILIO_SIGNATURE: Final = "X-Twilio-Signature"
MAX_FIELDS: Final = 32  # of a query
_VISIBLE: Final = re.compile(r"[!-~]*")
# Before MOSHI_PATH, for its own client takes an address that may end in a path and has no other way to say whom
# it calls: `moshi.client --url ws://gateway:8080/default/echo`.
_AGENT_IN_PATH: Final = re.compile(r"(?:/([a-z0-9.-]+))?/([a-z0-9.-]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a caller shows of itself."""

    tokens: tuple[str, ...] = field(repr=False)  # keys, JWTs or client secrets; two at most
    tickets: tuple[str, ...] = field(default=(), repr=False)
    origins: tuple[str, ...] = ()  # empty: no browser
    signature: str = field(default="", repr=False)  # of Twilio
    holder: str = ""  # of a certificate, which TLS has verified


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A call that somebody would like."""

    agent: str  # namespace/name; "" for the only one that there is
    target: str  # path and query as a worker takes them, without the ticket
    subprotocol: str | None
    shown: Shown


def wish(request: Request, default_namespace: str, holder: str = "") -> Wish | Denied:
    """Reads a valid WebSocket upgrade; `holder` is who has proved itself by a certificate."""
    path = request.path
    found = _named(path) if "%" in path or TICKET in path else _named_often(path)
    if isinstance(found, Denied):
        return found
    names_offered = offered(request.headers)
    return Wish(
        agent=full_name(found.name, default_namespace) if found.name else "",
        target=found.target,
        subprotocol=SUBPROTOCOL if SUBPROTOCOL in names_offered else None,
        shown=Shown(
            tokens=(*_authorized(request.headers)[:1], *_keys(names_offered)[:1]),
            # More than one of each is nobody's client, and bounds the work of a stranger.
            tickets=found.tickets,
            origins=tuple(request.headers.get_all("Origin")),
            signature=next(iter(request.headers.get_all(TWILIO_SIGNATURE)), ""),
            holder=holder,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Named:
    """What stands in the first line of a request."""

    name: str  # of the agent, "" for the only one
    target: str
    tickets: tuple[str, ...] = field(repr=False)


def _named(asked: str) -> _Named | Denied:
    """Whom a path with its query calls."""
    if not _VISIBLE.fullmatch(asked):
        # It goes on to the worker, where a bare CR could end the line for a lenient proxy.
        return invalid("the path holds characters that a URL must not have\n")
    path, _, query = asked.partition("?")
    try:
        fields = parse_qs(query, max_num_fields=MAX_FIELDS)
    except ValueError:
        fields = {}
    models = fields.get("model", [])
    if urlsplit(asked).path == REALTIME_PATH:
        names = models
    elif path.endswith(MOSHI_PATH) and (named := _before(MOSHI_PATH, path)) is not None:
        path, names = MOSHI_PATH, [*models, *named] or [""]
    else:
        return invalid(
            f"calls are made to {REALTIME_PATH}?model=[namespace/]agent, and Moshi's own to"
            f" [/namespace]/agent{MOSHI_PATH}\n",
            404,
        )
    if len(names) != 1:
        return invalid("say once which agent you call: ?model=[namespace/]agent\n")
    return _Named(names[0], _without_ticket(path, query), tuple(fields.get(TICKET, [])[:1]))


# An agent's callers ask with the same words. What may hold a ticket is not kept: no secret outlives its request here.
_named_often = functools.lru_cache(maxsize=64)(_named)


def full_name(model: str, default_namespace: str) -> str:
    """`namespace/name` of what a caller calls a model."""
    return model if "/" in model else f"{default_namespace}/{model}"


def bearers(headers: Headers) -> list[str]:
    """What stands behind `Authorization: Bearer`."""
    pairs = [value.partition(" ") for value in headers.get_all("Authorization")]
    return [token.strip() for scheme, _, token in pairs if scheme.lower() == "bearer"]


def _authorized(headers: Headers) -> list[str]:
    """Bearer tokens, and the passwords of clients that know no other way than a URL's user and password."""
    return [*bearers(headers), *_passwords(headers)]


def _passwords(headers: Headers) -> list[str]:
    pairs = [value.partition(" ") for value in headers.get_all("Authorization")]
    found = []
    for scheme, _, encoded in pairs:
        if scheme.lower() == "basic":
            try:
                plain = base64.b64decode(encoded.strip(), validate=True).decode("latin-1")
            except ValueError:
                continue
            found.append(plain.partition(":")[2])
    return found


def _before(suffix: str, path: str) -> list[str] | None:
    """The agent that stands before the end of a path, if any; None where it is something else."""
    prefix = path.removesuffix(suffix)
    if not prefix:
        return []
    match = _AGENT_IN_PATH.fullmatch(prefix)
    return None if match is None else ["/".join(filter(None, match.groups()))]


def invalid(text: str, status: int = 400) -> Denied:
    """The answer to what nobody could have meant."""
    return Denied(status=status, text=text, outcome="invalid")


def _without_ticket(path: str, query: str) -> str:
    """Workers, and whatever logs between here and there, see no ticket."""
    fields = query.split("&")
    rest = [each for each in fields if unquote_plus(each.partition("=")[0]) != TICKET]
    return f"{path}?{'&'.join(rest)}" if query else path


def _keys(names: list[str]) -> list[str]:
    return [
        name.removeprefix(KEY_SUBPROTOCOL) for name in names if name.startswith(KEY_SUBPROTOCOL)
    ]
