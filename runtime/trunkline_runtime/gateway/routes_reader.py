"""Reads routes, and what else the operator says, from JSON into values. What makes no sense raises `RouteError`."""

import ipaddress
import json
import logging
import re
import ssl
from collections.abc import KeysView, Mapping
from math import isfinite
from typing import Any, Final
from urllib.parse import urlsplit

from trunkline_runtime.contract import MAX_GATEWAYS, PROTOCOL_VERSION, SETTINGS_TYPE
from trunkline_runtime.gateway.access.jwks import JwksError, KeySet, parse_jwks
from trunkline_runtime.gateway.access.limits import Limits, Tenancy
from trunkline_runtime.gateway.access.tokens import Expected
from trunkline_runtime.gateway.accounts.budget import Budget, Price
from trunkline_runtime.gateway.frames import text_frame
from trunkline_runtime.gateway.routes import (
    Access,
    BurstRung,
    JwtAccess,
    Route,
    RouteChanges,
    Routes,
    Rung,
    UpstreamRung,
    WaitRung,
    WarmRung,
)
from trunkline_runtime.gateway.runway import Runway
from trunkline_runtime.tls import TlsError, trusting

log = logging.getLogger("trunkline.routes")

DEFAULT_CLAIM: Final = "sub"
_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")


class RouteError(ValueError):
    """Routes that make no sense; the text says where and what is wrong."""


def runway_from(value: object) -> Runway:
    """Reads a contract.Runway or RunwayChanges message. Raises `RouteError`."""
    agents = _Reader(value, "runway").child("agents")
    return {
        agent: tuple(
            (starting.whole("slots"), starting.number("seconds"))
            for starting in (_Reader(item, where) for where, item in agents.items(agent))
        )
        for agent in agents.names()
    }


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
    return Routes(
        epoch=reader.whole("epoch"),
        revision=reader.whole("revision") if reader.has("revision") else 0,
        by_agent=_by_agent(reader),
        share=_share(reader),
    )


def route_changes_from(value: object) -> RouteChanges:
    """Reads a contract.RouteChanges message. Raises `RouteError`."""
    reader = _Reader(value, "routeChanges")
    return RouteChanges(
        epoch=reader.whole("epoch"),
        since=reader.whole("since"),
        revision=reader.whole("revision"),
        by_agent=_by_agent(reader),
        gone=frozenset(reader.texts("gone")),
        share=_share(reader),
    )


def _by_agent(reader: "_Reader") -> dict[str, Route]:
    routes = [_route(_Reader(item, where)) for where, item in reader.items("routes")]
    by_agent = {route.agent: route for route in routes}
    if len(by_agent) != len(routes):
        raise RouteError(f"{reader.where}.routes names an agent twice")
    return by_agent


def _share(reader: "_Reader") -> float:
    return min(1.0, reader.positive("share")) if reader.has("share") else 1.0


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
        first_audio_ms=reader.number("firstAudioMs") if reader.has("firstAudioMs") else 0.0,
        protocols=frozenset(reader.texts("protocols") if reader.has("protocols") else ()),
        opening=_opening(reader.mapping("settings")),
        rungs=tuple(_rung(_Reader(item, where)) for where, item in reader.items("rungs")),
        draining=frozenset(reader.texts("draining")),
        budget=_budget(reader.child("budget")) if reader.has("budget") else Budget(),
        warm_price=_warm_price(reader),
        worker_tls=_worker_tls(reader),
    )


def _opening(settings: Mapping[str, Any]) -> bytes:
    """Passed on as they are: the worker parses them at its own edge. Made once, for a caller would wait for it."""
    told = json.dumps({"type": SETTINGS_TYPE, "settings": settings})
    return text_frame(told.encode(), masked=True)


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
    digests = reader.mapping("apiKeys")
    for digest in digests.values():
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise RouteError(f"{reader.where}.apiKeys must map names to hex SHA-256 digests")
    tenants = reader.child("tenants") if reader.has("tenants") else None
    claim = tenants.text("claim") if tenants else DEFAULT_CLAIM
    return Access(
        public=reader.flag("public"),
        digests={name: digest.lower() for name, digest in digests.items()},
        origins=frozenset(reader.texts("origins")),
        jwt=_jwt(reader.child("jwt"), claim) if reader.has("jwt") else None,
        tenancy=_tenancy(tenants, frozenset(digests)) if tenants else Tenancy(),
        mint_key=reader.text("mintKey") if reader.has("mintKey") else "",
        twilio=_twilio(reader) if reader.has("twilio") else {},
        holders=frozenset(reader.texts("holders")) if reader.has("holders") else None,
    )


def _twilio(reader: "_Reader") -> dict[str, tuple[str, ...]]:
    digests = reader.child("twilio")
    found = {name: tuple(digests.texts(name)) for name in reader.mapping("twilio")}
    if not all(_DIGEST.fullmatch(digest) for each in found.values() for digest in each):
        raise RouteError(f"{digests.where} must map names to lists of hex SHA-256 digests")
    return found


def _jwt(reader: "_Reader", claim: str) -> JwtAccess:
    expected = Expected(issuer=reader.text("issuer"), audience=reader.text("audience"), claim=claim)
    if not expected.issuer or not expected.audience:
        raise RouteError(f"{reader.where}.issuer and audience must not be empty")
    if reader.has("jwksUri"):
        return JwtAccess(expected=expected, source=reader.text("jwksUri"))
    try:
        keys = parse_jwks(reader.text("jwks"))
    except JwksError as error:
        # The routes of all other agents must not wait for this one's author.
        log.error(
            "an agent's access.jwt.jwks holds no keys: no token is good",
            extra={"where": reader.where, "why": str(error)},
        )
        keys = KeySet({})
    return JwtAccess(expected=expected, source=keys)


def _tenancy(reader: "_Reader", named: frozenset[str]) -> Tenancy:
    overrides = reader.child("overrides")
    return Tenancy(
        limits=_limits(reader.child("limits")),
        overrides={name: _limits(overrides.child(name)) for name in reader.mapping("overrides")},
        named=named,
    )


def _limits(reader: "_Reader") -> Limits:
    return Limits(
        concurrent_calls=reader.whole("concurrentCalls"),
        starts_per_minute=reader.whole("startsPerMinute"),
        minutes_per_day=reader.whole("minutesPerDay"),
        guaranteed_slots=reader.whole("guaranteedSlots"),
        burst_share=min(100, reader.whole("burstShare")) if reader.has("burstShare") else 100,
    )


def _budget(reader: "_Reader") -> Budget:
    return Budget(
        per_hour=reader.number("perHour") if reader.has("perHour") else None,
        per_day=reader.number("perDay") if reader.has("perDay") else None,
    )


def _price(reader: "_Reader") -> Price | None:
    if not reader.has("price"):
        return None
    price = reader.child("price")
    return Price(call_second=price.number("callSecond"), basis=price.text("basis"))


def _warm_price(reader: "_Reader") -> Price | None:
    rungs = (_Reader(item, where) for where, item in reader.items("rungs"))
    return next((_price(rung) for rung in rungs if rung.text("kind") == "warm"), None)


def allowances_from(value: object) -> tuple[int, Mapping[str, float]]:
    """Reads a contract.Allowances message: its epoch, and a ceiling in dollars by agent. Raises `RouteError`."""
    reader = _Reader(value, "allowances")
    agents = reader.child("agents")
    return reader.whole("epoch"), {agent: agents.number(agent) for agent in agents.names()}


def gateways_from(value: object) -> tuple[str, ...]:
    """Reads a contract.Gateways message: IP addresses. Raises `RouteError`."""
    hosts = _Reader(value, "gateways").texts("hosts")
    if len(hosts) > MAX_GATEWAYS:
        raise RouteError(f"gateways.hosts names {len(hosts)} and {MAX_GATEWAYS} are allowed")
    try:
        return tuple(str(ipaddress.ip_address(host)) for host in hosts)
    except ValueError as error:
        raise RouteError(f"gateways.hosts: {error}") from None


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
                url=_url(reader, "https", "http"),
                proxy_token=reader.text("proxyToken"),
                ticket_key=ticket_key,
                deadline=reader.positive("deadlineSeconds"),
                slow=reader.positive("slowSeconds") if reader.has("slowSeconds") else 0.0,
                price=_price(reader),
            )
        case "upstream":
            return UpstreamRung(
                url=_url(reader, "wss", "ws"),
                model=reader.text("model"),
                token=reader.text("token"),
                deadline=reader.positive("deadlineSeconds"),
            )
        case "wait":
            return WaitRung(reader.whole("most"))
        case kind:
            raise RouteError(
                f"{reader.where}.kind must be warm, burst, upstream or wait, not {kind!r}"
            )


def _url(reader: "_Reader", *schemes: str) -> str:
    """What stands there, which must name a host by one of these schemes; a path before the caller's may follow."""
    url = reader.text("url").rstrip("/")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or parts.username:
        wanted = " or ".join(f"{scheme}://host" for scheme in schemes)
        raise RouteError(f"{reader.where}.url must be {wanted}, not {url!r}")
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

    def names(self) -> KeysView[str]:
        return self._value.keys()

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
