"""The routes a gateway acts on, parsed at the edge into frozen values.

They come whole, from the operator or from the routes file, and are taken whole or not at all: a gateway
that acted on half of them would answer 401 to good callers.
"""

import json
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final, cast
from urllib.parse import urlsplit

from trunkline_runtime.contract import PROTOCOL_VERSION, Settings
from trunkline_runtime.tls import TlsError, trusting

_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")


class RouteError(ValueError):
    """Routes that make no sense; the text says where and what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    public: bool
    digests: tuple[str, ...] = field(repr=False)  # hex SHA-256 of each key
    origins: frozenset[str]


@dataclass(frozen=True, slots=True)
class WarmRung:
    """The agent's own pods."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstRung:
    """One Modal server."""

    name: str
    url: str  # without a slash at its end
    proxy_token: str = field(repr=False)
    ticket_key: str = field(repr=False)
    deadline: float  # seconds for the session's start


Rung = WarmRung | BurstRung


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One agent."""

    agent: str
    worker_key: str = field(repr=False)
    access: Access
    answer_seconds: float
    max_seconds: float
    admission_ms: float  # 0: no objective
    settings: Settings = field(repr=False)
    rungs: tuple[Rung, ...]
    draining: frozenset[str]
    worker_tls: ssl.SSLContext | None = None  # for dialling its workers; None: plain links


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    epoch: int
    by_agent: Mapping[str, Route]


def parse_routes(text: str | bytes) -> Routes:
    """Reads the text of a contract.Routes message. Raises `RouteError`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RouteError(f"routes are not JSON: {error}") from None
    return routes_from(value)


def routes_from(value: object) -> Routes:
    """Reads a contract.Routes message. Raises `RouteError`."""
    reader = _Reader(value, "routes")
    if reader.text("type") != "routes":
        raise RouteError('routes.type must be "routes"')
    if reader.whole("version") != PROTOCOL_VERSION:
        raise RouteError(f"routes.version must be {PROTOCOL_VERSION}")
    routes = [_route(_Reader(item, where)) for where, item in reader.items("routes")]
    by_agent = {route.agent: route for route in routes}
    if len(by_agent) != len(routes):
        raise RouteError("routes.routes names an agent twice")
    return Routes(epoch=reader.whole("epoch"), by_agent=by_agent)


def _route(reader: "_Reader") -> Route:
    agent = reader.text("agent")
    namespace, slash, name = agent.partition("/")
    if not (slash and namespace and name) or "/" in name:
        raise RouteError(f"{reader.where}.agent must be namespace/name, not {agent!r}")
    worker_key = reader.text("workerKey")
    if not worker_key:
        raise RouteError(f"{reader.where}.workerKey must not be empty")
    return Route(
        agent=agent,
        worker_key=worker_key,
        access=_access(reader.child("access")),
        answer_seconds=reader.positive("answerSeconds"),
        max_seconds=reader.positive("maxSeconds"),
        admission_ms=reader.number("admissionMs"),
        settings=reader.settings("settings"),
        rungs=tuple(_rung(_Reader(item, where)) for where, item in reader.items("rungs")),
        draining=frozenset(reader.texts("draining")),
        worker_tls=_worker_tls(reader),
    )


def _worker_tls(reader: "_Reader") -> ssl.SSLContext | None:
    if not reader.has("workerTls"):
        return None
    try:
        return trusting(reader.text("workerTls"))
    except TlsError as error:
        raise RouteError(
            f"{reader.where}.workerTls must be the CA of its workers: {error}"
        ) from None


def _access(reader: "_Reader") -> Access:
    digests = reader.mapping("apiKeys").values()
    for digest in digests:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise RouteError(f"{reader.where}.apiKeys must map names to hex SHA-256 digests")
    return Access(
        public=reader.flag("public"),
        digests=tuple(digest.lower() for digest in digests),
        origins=frozenset(reader.texts("origins")),
    )


def _rung(reader: "_Reader") -> Rung:
    match reader.text("kind"):
        case "warm":
            return WarmRung()
        case "burst":
            ticket_key = reader.text("ticketKey")
            if not ticket_key:
                raise RouteError(f"{reader.where}.ticketKey must not be empty")
            return BurstRung(
                name=reader.text("name"),
                url=_url(reader),
                proxy_token=reader.text("proxyToken"),
                ticket_key=ticket_key,
                deadline=reader.positive("deadlineSeconds"),
            )
        case kind:
            raise RouteError(f"{reader.where}.kind must be warm or burst, not {kind!r}")


def _url(reader: "_Reader") -> str:
    url = reader.text("url").rstrip("/")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise RouteError(f"{reader.where}.url must be https://host or http://host, not {url!r}")
    return url


class _Reader:
    """An object of the message, and where it stands in it."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise RouteError(f"{where} must be an object")
        self._value: dict[str, Any] = value
        self.where = where

    def _get(self, key: str) -> Any:
        try:
            return self._value[key]
        except KeyError:
            raise RouteError(f"{self.where}.{key} is missing") from None

    def has(self, key: str) -> bool:
        return key in self._value

    def text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            raise RouteError(f"{self.where}.{key} must be a string")
        return value

    def flag(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise RouteError(f"{self.where}.{key} must be true or false")
        return value

    def whole(self, key: str) -> int:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RouteError(f"{self.where}.{key} must be a whole number from 0")
        return value

    def number(self, key: str) -> float:
        value = self._get(key)
        # bool is an int in Python, and JSON as Python reads it has Infinity and NaN.
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise RouteError(f"{self.where}.{key} must be a number")
        if value < 0:
            raise RouteError(f"{self.where}.{key} must not be negative")
        return float(value)

    def positive(self, key: str) -> float:
        value = self.number(key)
        if not value:
            raise RouteError(f"{self.where}.{key} must be above 0")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._get(key)
        if not isinstance(value, dict):
            raise RouteError(f"{self.where}.{key} must be an object")
        return value

    def settings(self, key: str) -> Settings:
        """Passed on as they are: the worker parses them at its own edge."""
        return cast(Settings, self.mapping(key))

    def child(self, key: str) -> "_Reader":
        return _Reader(self._get(key), f"{self.where}.{key}")

    def items(self, key: str) -> list[tuple[str, object]]:
        value = self._get(key)
        if not isinstance(value, list):
            raise RouteError(f"{self.where}.{key} must be a list")
        return [(f"{self.where}.{key}[{index}]", item) for index, item in enumerate(value)]

    def texts(self, key: str) -> list[str]:
        texts = [item for _, item in self.items(key)]
        if not all(isinstance(item, str) for item in texts):
            raise RouteError(f"{self.where}.{key} must be a list of strings")
        return [str(item) for item in texts]
