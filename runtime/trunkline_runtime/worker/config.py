"""A worker's environment as a frozen value; what cannot be is refused with a sentence that names the variable."""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from trunkline_runtime.contract import (
    AUTO_SLOTS,
    ENV_AGENT,
    ENV_CONTEXT_END,
    ENV_CONTEXT_SECONDS,
    ENV_DEVICE,
    ENV_ENGINE,
    ENV_GATEWAYS,
    ENV_HEALTH_PORT,
    ENV_HOST,
    ENV_INT8,
    ENV_MAX_SECONDS,
    ENV_MODEL,
    ENV_PORT,
    ENV_SLOTS,
    ENV_STT_MODEL,
    ENV_TICKET_KEY,
    ENV_TLS_CA,
    ENV_TLS_CERT,
    ENV_TLS_KEY,
    ENV_WORKER,
    ENV_WORKER_KEY,
    HEALTH_PORT,
    WORKER_PORT,
)
from trunkline_runtime.tls import TlsError, WorkerTls, proving, trusting
from trunkline_runtime.worker.control import Endpoint

ENGINES: Final = ("loopback", "speech", "moshi")
MAX_SLOTS: Final = 256  # as warm.slotsPerPod
MOST_AUTO: Final = 96  # of a worker that measures; the arithmetic gives an H200 72
MIN_TICKET_KEY: Final = 32  # characters; RFC 7518 §3.2 wants a key as long as the hash


class ConfigError(ValueError):
    """The environment asks for what cannot be; the text names the variable and what to put there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoshiConfig:
    """What the Moshi engine loads and how; the other engines take no notice."""

    model: str = "tiny"  # or a Hugging Face repository (owner/name[@revision]), or a folder
    stt: str = ""  # likewise; "" for none. The tiny model brings its own
    device: str = ""  # "" is cuda, and cpu for the tiny model
    int8: bool = False
    context_seconds: float | None = None  # None: as far back as the model can look
    refresh: bool = False  # at the end of the context; False: it slides

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "MoshiConfig":
        """Reads `contract.ENV_MODEL` and what belongs to it; raises `ConfigError`."""
        return cls(
            model=env.get(ENV_MODEL) or "tiny",
            stt=env.get(ENV_STT_MODEL, ""),
            device=_matching(env, ENV_DEVICE, r"|cpu|cuda(:[0-9]+)?", "cuda, cuda:0 or cpu"),
            int8=_matching(env, ENV_INT8, r"|0|1", "0 or 1") == "1",
            context_seconds=_integer(env, ENV_CONTEXT_SECONDS, 0, 3_600, 0) or None,
            refresh=_matching(env, ENV_CONTEXT_END, "|slide|refresh", "slide or refresh")
            == "refresh",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """A worker's environment, read once."""

    agent: str
    worker: str
    engine: str
    slots: int  # with `auto_slots` the most that there may be
    host: str
    port: int
    health_port: int
    gateways: tuple[Endpoint, ...]
    worker_key: str
    ticket_key: str
    max_seconds: float
    tls: WorkerTls | None = None  # None: plain links
    moshi: MoshiConfig = MoshiConfig()
    auto_slots: bool = False

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "WorkerConfig":
        """Reads `contract.ENV_*`; raises `ConfigError`."""
        auto = env.get(ENV_SLOTS) == AUTO_SLOTS
        if auto and env.get(ENV_ENGINE) != "moshi":
            raise ConfigError(f"set {ENV_SLOTS} to a number: only the Moshi engine measures")
        config = cls(
            agent=_matching(env, ENV_AGENT, r"[^/\s]+/[^/\s]+", "namespace/name"),
            worker=env.get(ENV_WORKER) or socket.gethostname(),
            engine=_matching(env, ENV_ENGINE, "|".join(ENGINES), " or ".join(ENGINES)),
            slots=MOST_AUTO if auto else _integer(env, ENV_SLOTS, 1, MAX_SLOTS),
            auto_slots=auto,
            host=env.get(ENV_HOST) or "0.0.0.0",
            port=_integer(env, ENV_PORT, 0, 65_535, WORKER_PORT),
            health_port=_integer(env, ENV_HEALTH_PORT, 0, 65_535, HEALTH_PORT),
            gateways=_gateways(env.get(ENV_GATEWAYS, "")),
            worker_key=env.get(ENV_WORKER_KEY, ""),
            ticket_key=env.get(ENV_TICKET_KEY, ""),
            max_seconds=_integer(env, ENV_MAX_SECONDS, 1, 86_400, 1_800),
            tls=_tls(env),
            moshi=MoshiConfig.from_environment(env),
        )
        config._check_ways_in()
        return config

    def _check_ways_in(self) -> None:
        """A worker is reached by tickets of its own (a pod) or by signed ones (Modal), never both."""
        if self.ticket_key:
            if self.tls is not None:
                raise ConfigError(
                    f"{ENV_TLS_CERT} is for pods: to a Modal container, Modal brings TLS itself"
                )
            if self.gateways or self.worker_key:
                raise ConfigError(
                    f"set {ENV_TICKET_KEY} in a Modal container, or {ENV_GATEWAYS} and"
                    f" {ENV_WORKER_KEY} in a pod, not both"
                )
            if len(self.ticket_key) < MIN_TICKET_KEY:
                raise ConfigError(f"{ENV_TICKET_KEY} must have {MIN_TICKET_KEY} characters or more")
        elif not self.gateways:
            raise ConfigError(f"set {ENV_GATEWAYS} to host:port of each gateway's control port")
        elif not self.worker_key:
            raise ConfigError(f"set {ENV_WORKER_KEY}: gateways take no worker without it")


def _matching(env: Mapping[str, str], name: str, pattern: str, wanted: str) -> str:
    value = env.get(name, "")
    if not re.fullmatch(pattern, value):
        raise ConfigError(f"set {name} to {wanted}" + (f"; it is {value!r}" if value else ""))
    return value


def _integer(
    env: Mapping[str, str], name: str, lowest: int, highest: int, default: int | None = None
) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or not lowest <= int(text) <= highest:
        was = f"; it is {text!r}" if text else ""
        raise ConfigError(f"set {name} to a whole number from {lowest} to {highest}{was}")
    return int(text)


def _tls(env: Mapping[str, str]) -> WorkerTls | None:
    texts = {name: env.get(name, "") for name in (ENV_TLS_CA, ENV_TLS_CERT, ENV_TLS_KEY)}
    if not any(texts.values()):
        return None
    if missing := [name for name, text in texts.items() if not text]:
        raise ConfigError(f"set {' and '.join(missing)} too: TLS needs all of {', '.join(texts)}")
    try:
        gateways = trusting(texts[ENV_TLS_CA])
    except TlsError as error:
        raise ConfigError(
            f"set {ENV_TLS_CA} to the PEM text of the gateways' CA: {error}"
        ) from None
    try:
        calls = proving(texts[ENV_TLS_CERT].encode(), texts[ENV_TLS_KEY].encode())
    except TlsError as error:
        raise ConfigError(f"set {ENV_TLS_CERT} and {ENV_TLS_KEY} to PEM texts: {error}") from None
    return WorkerTls(gateways=gateways, calls=calls)


def _gateways(text: str) -> tuple[Endpoint, ...]:
    endpoints = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        # A name, an IPv4 address, or an IPv6 address in brackets.
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/]+)):([0-9]{1,5})", part)
        if match is None or not 0 < int(match[3]) < 65_536:
            raise ConfigError(f"{ENV_GATEWAYS} must be host:port,…; {part!r} is not one of these")
        endpoints.append(Endpoint(match[1] or match[2], int(match[3])))
    return tuple(endpoints)
