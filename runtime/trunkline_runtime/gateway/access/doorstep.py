"""How many connections one address may open, and have open without an answer. Pure: the time is an argument.

It bounds what a stranger costs before a word is read. Behind a load balancer that hides addresses all callers come
from one: the bounds are wide enough for that, and can be switched off.
"""

import functools
from dataclasses import dataclass
from enum import Enum, auto
from ipaddress import IPv6Address, ip_address
from typing import Final

MAX_ADDRESSES: Final = 65_536  # 15 MB
IPV6_PREFIX_BITS: Final = 64  # what one customer is given


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """0 is no bound. Each waiting connection may hold a head of 16 KiB and what its caller sent early."""

    waiting: int = 4096  # without an answer, from everywhere: 320 MiB at the very worst
    waiting_per_address: int = 1024
    per_second: float = 500.0  # connections an address may open; twice that at once


class Arrival(Enum):
    """What becomes of a new connection."""

    WELCOME = auto()
    TOO_MANY = auto()  # of its address
    CROWDED = auto()  # there is no room even for saying no


@dataclass(slots=True)
class _Address:
    waiting: int
    tokens: float
    seen: float


class Doorstep:
    """Those who wait at one gateway."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._addresses: dict[str, _Address] = {}
        self.waiting = 0

    def __repr__(self) -> str:
        return f"<Doorstep waiting={self.waiting} addresses={len(self._addresses)}>"

    def arrives(self, peer: str, now: float) -> Arrival:
        """Whatever is said of a connection, it counts as waiting until `leaves`.

        `peer` is "" where nobody knows yet whose it is: behind a proxy. Then it counts among all alone.
        """
        self.waiting += 1
        if not peer:
            return self._crowded()
        key, bounds = _network(peer), self._bounds
        address = self._addresses.pop(key, None)
        if address is None:
            self._make_room()
            address = _Address(0, 2 * bounds.per_second, now)
        self._addresses[key] = address
        gained = (now - address.seen) * bounds.per_second
        address.tokens = min(2 * bounds.per_second, address.tokens + gained)
        address.seen = now
        address.waiting += 1
        if self._crowded() is Arrival.CROWDED:
            return Arrival.CROWDED
        if bounds.waiting_per_address and address.waiting > bounds.waiting_per_address:
            return Arrival.TOO_MANY
        if bounds.per_second and address.tokens < 1:
            return Arrival.TOO_MANY
        address.tokens -= 1
        return Arrival.WELCOME

    def leaves(self, peer: str) -> None:
        """It has its answer, or is gone."""
        self.waiting -= 1
        if peer:
            self._addresses[_network(peer)].waiting -= 1

    def _crowded(self) -> Arrival:
        most = self._bounds.waiting
        return Arrival.CROWDED if most and self.waiting > most else Arrival.WELCOME

    def _make_room(self) -> None:
        """Forgets the address that came last the longest ago; one that waits is never forgotten."""
        if len(self._addresses) >= MAX_ADDRESSES:
            idle = next((key for key, each in self._addresses.items() if not each.waiting), None)
            if idle is not None:
                del self._addresses[idle]


@functools.lru_cache(maxsize=1024)
def _network(peer: str) -> str:
    """What counts as one address: IPv4's own, and of IPv6 the network."""
    try:
        address = ip_address(peer.partition("%")[0])
    except ValueError:
        return peer
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) >> IPV6_PREFIX_BITS << IPV6_PREFIX_BITS))
