"""Certificates that change while the process runs."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Gauge

from trunkline_runtime.gateway.access.caller_tls import CallersTls
from trunkline_runtime.tls import MountedIdentity, TlsError

log = logging.getLogger("trunkline.gateway")

LOOK_SECONDS: Final = 1.0  # a kubelet brings a renewed Secret within a minute

CONTROL: Final = "control"  # the names of the two ports that may have a certificate
CALLS: Final = "calls"


class Renewable(Protocol):
    """Something that is read from files, and whether there was something new."""

    def refresh(self) -> bool: ...


class Renewal:
    """Looks after the certificates of one gateway."""

    def __init__(
        self,
        registry: CollectorRegistry,
        control: MountedIdentity | None,
        calls: CallersTls | None,
    ) -> None:
        found: Mapping[str, Renewable | None] = {CONTROL: control, CALLS: calls}
        self._renewable = {port: each for port, each in found.items() if each is not None}
        self._calls = calls
        self._unusable = Gauge(
            "trunkline_certificate_unusable",
            "1 while the files of a port's certificate have changed and cannot be used: the one before is served",
            ["port"],
            registry=registry,
        )
        self._ends = Gauge(
            "trunkline_certificate_ends_timestamp_seconds",
            "When the certificate that callers are answered with ends, in Unix time",
            registry=registry,
        )
        self._told: dict[str, str] = {}
        for port in self._renewable:
            self._unusable.labels(port).set(0)
        self._note_end()

    def __repr__(self) -> str:
        return f"<Renewal {sorted(self._renewable)}>"

    def look(self) -> None:
        """Takes in what is new. A file that cannot be used is told of once."""
        for port, renewable in self._renewable.items():
            try:
                if renewable.refresh():
                    log.info("new connections get the renewed certificate", extra={"port": port})
                    self._note_end()
                self._told[port] = ""
            except TlsError as error:
                if str(error) != self._told.get(port):
                    log.error(
                        "the certificate before stays in use",
                        extra={"port": port, "why": str(error)},
                    )
                self._told[port] = str(error)
            self._unusable.labels(port).set(1 if self._told[port] else 0)

    async def watch(self) -> None:
        """Looks for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()

    def _note_end(self) -> None:
        if self._calls is not None:
            self._ends.set(self._calls.ends)
