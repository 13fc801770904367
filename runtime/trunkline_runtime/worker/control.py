"""The links from a worker to all gateways: it dials them, offers its slots and drains as they wish.

Names are resolved again and again, so gateways may come and go; each address has one link. DNS may be half a minute
late, so gateways say who else stands behind their name. A link that is lost takes its tickets and what it has said
with it, and ends no call. Everything that a link says goes through `broadcast`, which writes
at once: a gateway that does not read is dropped by the size of what waits for it.
"""

import asyncio
import itertools
import json
import logging
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.connection import broadcast
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from trunkline_runtime.contract import (
    AGENT_HEADER,
    DEAD_AFTER_SECONDS,
    ENV_TLS_CA,
    HEARTBEAT_SECONDS,
    MAX_CONTROL_BYTES,
    MAX_GATEWAYS,
    WORKERS_PATH,
    Bye,
    Hello,
)
from trunkline_runtime.process import QUIET
from trunkline_runtime.tls import Given, why_no_link
from trunkline_runtime.worker.orders import (
    DrainOrder,
    GatewaysOrder,
    Malformed,
    order_from,
)
from trunkline_runtime.worker.switchboard import Switchboard
from trunkline_runtime.worker.tickets import LinkTickets

log = logging.getLogger("trunkline.control")

RESOLVE_TIMEOUT_SECONDS: Final = 5.0
DIAL_SECONDS: Final = 5.0
MIN_BACKOFF_SECONDS: Final = 0.1
MAX_BACKOFF_SECONDS: Final = 5.0
MAX_UNREAD_BYTES: Final = 2**20  # some 10,000 control messages

TLS_GIVEN: Final = Given(ca=ENV_TLS_CA, certificate="the gateway's --control-tls")
WHY_REFUSED: Final[Mapping[int, str]] = {
    401: "it does not take the worker key: the agent's Secret and the route disagree",
    404: "it has no route for the agent yet",
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A gateway's control port: a name, or an address once it is resolved."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Resolve = Callable[[Endpoint], Awaitable[frozenset[Endpoint]]]
"""All addresses that a name stands for; raises OSError or TimeoutError."""


async def addresses_of(gateway: Endpoint) -> frozenset[Endpoint]:
    """As the system's resolver has it."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(RESOLVE_TIMEOUT_SECONDS):
        found = await loop.getaddrinfo(gateway.host, gateway.port, type=socket.SOCK_STREAM)
    return frozenset(Endpoint(str(info[4][0]), gateway.port) for info in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialling:
    """How a worker finds gateways and presents itself."""

    hello: Callable[[int, str], Hello]
    """What is said first on a link, of its number and the key of its tickets."""
    agent: str  # namespace/name
    key: str
    source: str | None  # the address to dial from, where gateways will find the data server
    tls: ssl.SSLContext | None = (
        None  # the gateway's name, as the worker knows it, is in its certificate
    )
    resolve: Resolve = addresses_of
    resolve_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class _Told:
    """What a gateway has said of those behind its name."""

    name: Endpoint
    addresses: frozenset[Endpoint]


class ControlLinks:
    """One link to each address of each gateway. `run` keeps them, `bye` ends them."""

    def __init__(
        self,
        dialling: Dialling,
        gateways: tuple[Endpoint, ...],
        switchboard: Switchboard,
        tickets: LinkTickets,
        late: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`late` is asked at each beat for the share of frames since the last that came too late."""
        self._dialling = dialling
        self._gateways = gateways
        self._switchboard = switchboard
        self._tickets = tickets
        self._late = late
        self._addresses: dict[Endpoint, frozenset[Endpoint]] = {}  # by name, as DNS has them
        self._told: dict[int, _Told] = {}  # by link
        self._news = asyncio.Event()  # of addresses
        self._links: dict[Endpoint, asyncio.Task[None]] = {}
        self._up: dict[int, ClientConnection] = {}
        self._numbers = itertools.count(1)
        self._states: dict[Endpoint, str] = {}
        self._leaving = False
        switchboard.on_change(self._tell)

    def __repr__(self) -> str:
        return f"<ControlLinks up={len(self._up)} of {len(self._links)}>"

    @property
    def up(self) -> int:
        """How many gateways know this worker."""
        return len(self._up)

    async def run(self) -> None:
        """Dials and serves until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat())
            group.create_task(self._resolve())
            while True:
                await self._news.wait()
                self._news.clear()
                self._dial_all(group)

    async def bye(self) -> None:
        """Tells every gateway that the worker exits, and closes; no link is dialled again."""
        self._switchboard.tell()  # the end of the last call, so that nothing follows the goodbye
        self._leaving = True
        connections = list(self._up.values())
        broadcast(connections, json.dumps(Bye(type="bye")))
        await asyncio.gather(*(connection.close() for connection in connections))

    # --- which addresses ---------------------------------------------------------------------------

    async def _resolve(self) -> None:
        """Asks DNS again and again."""
        while True:
            for gateway in self._gateways:
                self._addresses[gateway] = await self._addresses_of(gateway)
                self._news.set()
            await asyncio.sleep(self._dialling.resolve_seconds)

    def _dial_all(self, group: asyncio.TaskGroup) -> None:
        """Starts a link to each address that is new."""
        for address in sorted(self._wanted(), key=str)[:MAX_GATEWAYS]:
            if address not in self._links:
                self._links[address] = group.create_task(self._keep(address))

    def _wanted(self) -> frozenset[Endpoint]:
        told = (told.addresses for told in self._told.values())
        return frozenset().union(*self._addresses.values(), *told)

    async def _addresses_of(self, gateway: Endpoint) -> frozenset[Endpoint]:
        try:
            addresses = await self._dialling.resolve(gateway)
        except (OSError, TimeoutError) as error:
            self._note(gateway, f"cannot resolve the name: {str(error) or 'no answer in time'}")
            # What was known stays: DNS that is down must not cost the links that are up.
            return self._addresses.get(gateway, frozenset())
        if addresses != {gateway}:
            self._note(gateway, f"stands for {', '.join(sorted(map(str, addresses)))}")
        return addresses

    def _still_wanted(self, address: Endpoint) -> bool:
        return address in self._wanted() and not self._leaving

    # --- one link ----------------------------------------------------------------------------------

    async def _keep(self, address: Endpoint) -> None:
        """Dials one address again and again until neither DNS nor a gateway says that it is one."""
        failures = 0
        while self._still_wanted(address):
            heard = False
            try:
                async with self._dial(address) as connection:
                    heard = await self._serve(address, connection)
            except InvalidStatus as error:
                status = error.response.status_code
                self._note(address, f"refused: {WHY_REFUSED.get(status, f'it answers {status}')}")
            except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed) as error:
                self._note(address, self._why_no_link(error, address))
            failures = 0 if heard else failures + 1
            await asyncio.sleep(backoff(failures, random.random()))
        del self._links[address]
        self._states.pop(address, None)

    def _name_of(self, address: Endpoint) -> Endpoint:
        """The name that stands for an address."""
        for name, addresses in self._addresses.items():
            if address in addresses:
                return name
        told = (told.name for told in self._told.values() if address in told.addresses)
        return next(told, address)

    def _why_no_link(self, error: Exception, address: Endpoint) -> str:
        tls = self._dialling.tls is not None
        return why_no_link(error, self._name_of(address).host, TLS_GIVEN, tls=tls)

    def _dial(self, address: Endpoint) -> connect:
        tls = self._dialling.tls
        return connect(
            f"{'wss' if tls else 'ws'}://{address}{WORKERS_PATH}",
            ssl=tls,
            server_hostname=self._name_of(address).host if tls else None,
            additional_headers={
                "Authorization": f"Bearer {self._dialling.key}",
                AGENT_HEADER: self._dialling.agent,
            },
            local_addr=(self._dialling.source, 0) if self._dialling.source else None,
            compression=None,
            proxy=None,  # a proxy for the way out must not stand between pods
            max_size=MAX_CONTROL_BYTES,
            open_timeout=DIAL_SECONDS,
            close_timeout=1,
            ping_interval=None,  # beats do that
            logger=QUIET,
        )

    async def _serve(self, address: Endpoint, connection: ClientConnection) -> bool:
        """Lives through one link; returns whether the gateway ever said anything."""
        number, name = next(self._numbers), self._name_of(address)
        self._up[number] = connection
        self._note(address, "linked")
        heard = False
        try:
            hello = self._dialling.hello(number, self._tickets.issue(number))
            broadcast([connection], json.dumps(hello))
            broadcast([connection], self._free())
            while True:
                async with asyncio.timeout(DEAD_AFTER_SECONDS):
                    message = await connection.recv()
                heard = True
                self._obey(message, number, name)
        except TimeoutError:
            self._note(address, f"lost: silent for {DEAD_AFTER_SECONDS:g} s")
            connection.transport.abort()
        except Malformed as error:
            self._note(address, f"dropped: {error}")
            await connection.close(1002, str(error)[:100])
        except ConnectionClosed as error:
            self._note(address, "left" if self._leaving else f"lost: {error}")
        finally:
            del self._up[number]
            self._told.pop(number, None)
            self._tickets.revoke(number)
            self._switchboard.lose(number)
        return heard

    def _obey(self, message: str | bytes, number: int, name: Endpoint) -> None:
        """`name` is what stood for the gateway when it was dialled."""
        match order_from(message):
            case DrainOrder(draining):
                self._switchboard.drain(number, wanted=draining)
            case GatewaysOrder(hosts):
                addresses = frozenset(Endpoint(host, name.port) for host in hosts)
                self._told[number] = _Told(name, addresses)
                self._news.set()

    # --- what gateways are told ----------------------------------------------------------------------

    def _free(self, late: float = 0.0) -> str:
        free = self._switchboard.free()
        if late:
            free["late"] = round(late, 3)
        return json.dumps(free)

    def _tell(self, late: float = 0.0) -> None:
        """Sends the count of free slots to all; drops those that do not read."""
        if self._leaving:
            return
        for connection in self._up.values():
            if connection.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
                connection.transport.abort()
        broadcast(self._up.values(), self._free(late))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            self._tell(self._late())

    def _note(self, endpoint: Endpoint, state: str) -> None:
        """Logs what is the matter with an endpoint when it is no longer what it was."""
        if self._states.get(endpoint) != state:
            self._states[endpoint] = state
            level = (
                logging.INFO if state.startswith(("linked", "stands", "left")) else logging.WARNING
            )
            log.log(level, "gateway %s: %s", endpoint, state)


def backoff(failures: int, chance: float) -> float:
    """Seconds until the next dial, after `failures` in a row; `chance` from 0 to 1 spreads workers out."""
    longest = min(MIN_BACKOFF_SECONDS * 2.0 ** min(failures + 1, 16), MAX_BACKOFF_SECONDS)
    return MIN_BACKOFF_SECONDS + (longest - MIN_BACKOFF_SECONDS) * chance
