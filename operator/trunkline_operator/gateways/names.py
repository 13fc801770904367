"""Which addresses stand behind the names of gateways."""

import asyncio
import logging
from collections.abc import Iterable
from typing import Final

Address = tuple[str, int]

# An answer of DNS that takes longer is none.
ANSWER_SECONDS: Final = 5.0

log = logging.getLogger("trunkline.fleet")


class Names:
    """Some names are told by whoever knows better, the others are asked of DNS.

    Of those that are `told` DNS is not asked even before the first word: that nobody is there yet would be cached, and
    workers would hear it, too.
    """

    def __init__(self, names: Iterable[Address], told: Iterable[Address] = ()) -> None:
        self._asked = set(names) - set(told)
        self._told: dict[Address, frozenset[str]] = {}  # hosts
        self._found: dict[Address, set[Address]] = {}

    def __repr__(self) -> str:
        return f"Names({self._found})"

    @property
    def addresses(self) -> set[Address]:
        """Behind all names."""
        return {address for found in self._found.values() for address in found}

    def name_of(self, address: Address) -> Address:
        """The name that stands for an address; its host must be in the gateway's certificate."""
        names = (name for name, found in self._found.items() if address in found)
        return next(names, address)

    def hosts(self, name: Address) -> frozenset[str] | None:
        """What was told of a name; None where nothing was."""
        return self._told.get(name)

    def tell(self, name: Address, hosts: frozenset[str] | None) -> None:
        """These stand behind a name; None: it is not known, and DNS is asked from now on."""
        if hosts is None:
            self._told.pop(name, None)
            self._asked.add(name)
            return
        self._asked.discard(name)
        self._told[name] = hosts
        self._found[name] = {(host, name[1]) for host in hosts}

    async def ask(self) -> None:
        """Asks DNS once, for each name that is not told."""
        for name in sorted(self._asked):
            await self._ask(name)

    async def _ask(self, name: Address) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                found = await loop.getaddrinfo(*name, type=1)
        except (OSError, TimeoutError) as error:
            # What was found stays: a name server's failure says nothing about gateways.
            if self._found.get(name) is None:
                log.warning("cannot resolve gateway %s:%d: %s", *name, error or "timeout")
                self._found[name] = set()
            return
        if name in self._asked:  # yet
            self._found[name] = {(str(where[0]), int(where[1])) for *_, where in found}
