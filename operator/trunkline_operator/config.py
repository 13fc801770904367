"""What the operator was started with."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trunkline_runtime.contract import CONTROL_PORT, HEALTH_PORT

STATUS_SECONDS: Final = 15.0
# As long as the cluster autoscaler looks on before it removes a node (`--scale-down-unneeded-time`).
EVICT_IDLE_SECONDS: Final = 600.0


class ConfigError(Exception):
    """What is missing or wrong in how the operator was started, as a sentence that says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorConfig:
    """The operator's flags and environment.

    `gateways` is kept as it was given, because pods get the same text. `status_seconds` bounds how often
    live numbers are written into the status of an agent; conditions and pods are written at once. Of several
    operators the one acts that holds `lease`; without, this one always acts.
    """

    operator_token: str
    gateways: str
    worker_image: str
    moshi_image: str = ""  # "": the same
    namespaces: tuple[str, ...] = ()
    routes_secret: tuple[str, str] | None = None
    burst_secret: tuple[str, str] | None = None
    lease: tuple[str, str] | None = None
    host: str = "0.0.0.0"
    health_port: int = HEALTH_PORT
    default_namespace: str = "default"
    region: str = ""  # of `warm.regions` and `policy.residency`; "" = not told
    status_seconds: float = STATUS_SECONDS
    ca_dir: Path | None = None  # None: plain links
    evict_idle_seconds: float = (
        EVICT_IDLE_SECONDS  # until a pod without calls may be evicted; 0 = never
    )
    prices: str = ""  # YAML over the prices that come with Trunkline

    def __post_init__(self) -> None:
        parse_gateways(self.gateways)


def parse_gateways(text: str) -> list[tuple[str, int]]:
    """`host:port,…` as pairs; a host alone gets the control port. An IPv6 address stands in brackets."""
    return [parse_address(part) for part in filter(None, map(str.strip, text.split(",")))]


def parse_address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(CONTROL_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--gateways: {text!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def parse_region(text: str) -> str:
    """A region's name as agents write it."""
    if text and not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text):
        raise ConfigError(f"--region: {text!r} is not a region's name, such as eu-central-1")
    return text


def parse_name(flag: str, text: str) -> tuple[str, str] | None:
    """`namespace/name` as a pair, and nothing as None."""
    if not text:
        return None
    namespace, slash, name = text.partition("/")
    if not (namespace and slash and name) or "/" in name:
        raise ConfigError(f"{flag}: {text!r} is not namespace/name")
    return namespace, name
