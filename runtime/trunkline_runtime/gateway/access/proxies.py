"""Whose connection it is where proxies stand between: `X-Forwarded-For`, believed as far as proxies are trusted.

Anybody can write that header, so it counts only where the peer is a proxy that the cluster's operator has named.
Each proxy puts whom it saw behind what it was sent; so the caller is the last address that is no trusted proxy,
read from the right, and whatever stands further left is what that caller claims.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final

FORWARDED: Final = b"x-forwarded-for"
MAX_NETWORKS: Final = 64  # looked through for each connection
MAX_HOPS: Final = 16  # looked at; chains of proxies have two or three


class ProxiesError(ValueError):
    """No list of networks that could be trusted; the text says why."""


@dataclass(frozen=True, slots=True)
class Proxies:
    """The networks of proxies that tell the truth about whom they stand for. Empty: nobody is believed."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Proxies":
        """Reads CIDRs between commas. Raises `ProxiesError`."""
        names = [name.strip() for name in text.split(",") if name.strip()]
        if len(names) > MAX_NETWORKS:
            raise ProxiesError(f"there may be {MAX_NETWORKS} networks")
        return cls(tuple(_network(name) for name in names))

    def trusts(self, address: str) -> bool:
        """Whether a connection from there may speak for others."""
        if not self.networks:
            return False
        found = _address(address)
        return found is not None and any(found in network for network in self.networks)

    def caller(self, peer: str, hops: Sequence[str]) -> str:
        """The address behind a connection from `peer`, whose request names `hops` from left to right."""
        found = peer
        for hop in reversed(hops[-MAX_HOPS:]):
            if not self.trusts(found):
                break
            before = _hop(hop)
            if before is None:  # "unknown", or rubbish: nobody can see further than this proxy
                break
            found = before
        return found


def hops(head: bytes) -> list[str]:
    """What the head of a request says in `X-Forwarded-For`, from left to right; several lines are one list."""
    # As `websockets` reads it: a bare CR or LF does not end a line, and makes the request a bad one.
    pairs = [line.partition(b":") for line in head.split(b"\r\n")[1:]]
    values = [value for name, _, value in pairs if name.lower() == FORWARDED]
    return [hop.strip().decode("latin-1") for value in values for hop in value.split(b",")]


def _network(name: str) -> IPv4Network | IPv6Network:
    try:
        network = ip_network(name)
    except ValueError as error:
        raise ProxiesError(f"{name!r} is no network, such as 10.0.0.0/8: {error}") from None
    if network.prefixlen == 0:
        raise ProxiesError(f"{name} is everybody: then any caller could take any address")
    return network


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def _hop(text: str) -> str | None:
    """One entry's address; some proxies put the port behind it."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    found = _address(text)
    return None if found is None else str(found)
