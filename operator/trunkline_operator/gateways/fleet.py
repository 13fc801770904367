"""The links to all gateways: routes out, load in.

The operator dials. A name stands for all its addresses, so that replicas of a gateway come and go by themselves. Some
names are told by `stands_for`, and what it tells is passed on to the gateways, for their workers. The others are asked
of DNS every RESOLVE_SECONDS. Each link gets the routes whole when it opens, and what differs after
each change; the epoch in them lets a gateway refuse an operator that was replaced.
"""

import asyncio
import contextlib
import json
import logging
import random
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidMessage, InvalidStatus, WebSocketException

from trunkline_operator import parts
from trunkline_operator.gateways.bulletin import RouteBulletin, RunwayBulletin
from trunkline_operator.gateways.loads import AgentReport, Loads, parse_load
from trunkline_operator.gateways.names import Address, Names
from trunkline_runtime.contract import (
    CHANGES_HEADER,
    DEAD_AFTER_SECONDS,
    ENV_OPERATOR_TOKEN,
    HEARTBEAT_SECONDS,
    MAX_CONTROL_BYTES,
    MAX_GATEWAYS,
    OPERATOR_PATH,
    Allowances,
    Beat,
    Gateways,
    Route,
    Routes,
)
from trunkline_runtime.tls import Given, why_no_link

RESOLVE_SECONDS: Final = 5.0
# Several agents often change together, for example when the operator starts.
COALESCE_SECONDS: Final = 0.01
# A gateway that reads no changes is told everything: a thousand agents' routes take it 70 ms, all of its time if it is
# told each 10 ms. So it is told for a twentieth of the time, and waits for news so long at most.
READING_SECONDS: Final = 100e-9  # of one byte
WRITING_SHARE: Final = 20
LONGEST_COALESCE_SECONDS: Final = 0.25
# A gateway that restarts is back within seconds; no link should lag more behind it.
REDIAL_SECONDS: Final = (0.1, 2.0)
# For so long a gateway that cannot be reached is taken for one that lives and has calls.
ABSENCE_SECONDS: Final = 30.0
# From a gateway having received routes until what it says must be said in their light.
TAKE_IN_SECONDS: Final = 0.1

TLS_GIVEN: Final = Given(ca="the operator's --ca-dir", certificate="the gateway's --control-tls")

log = logging.getLogger("trunkline.fleet")
# Its debug lines would hold the bearer and the routes.
quiet = logging.getLogger("trunkline.websockets")
quiet.setLevel(logging.CRITICAL)


@dataclass(slots=True)
class _Link:
    """One open link."""

    name: Address  # that stood for its address when it was dialled
    changes: bool  # the gateway reads what differs
    news: asyncio.Event = field(default_factory=asyncio.Event)
    boot: str = ""  # of the gateway, "" until it has spoken
    received: deque[tuple[int, float]] = field(default_factory=deque)  # revision of routes, when
    sent: int = 0  # the revision of routes that was sent last; 0 = none was
    foretold: int = 0  # likewise of the runway
    met: frozenset[str] = frozenset()  # hosts behind its name that it has been told
    owed: dict[str, float] = field(default_factory=dict)  # ceilings that it has not been told
    acted_on: int = 0  # the newest revision that the gateway has spoken in the light of

    def hear(self, boot: str, ours: bool, now: float) -> None:
        self.boot = boot
        while ours and self.received and self.received[0][1] + TAKE_IN_SECONDS <= now:
            self.acted_on = self.received.popleft()[0]


class Fleet:
    """All gateways; an asynchronous context manager. `changed(agent)` is called in the event loop."""

    def __init__(
        self,
        gateways: Sequence[Address],
        token: str,
        *,
        epoch: int,
        changed: Callable[[str], None],
        tls: ssl.SSLContext | None = None,
        told: Iterable[Address] = (),
        resolve_seconds: float = RESOLVE_SECONDS,
        silent_seconds: float = ABSENCE_SECONDS,
    ) -> None:
        """`told`: of these names `stands_for` will tell. `silent_seconds`: without a word of any gateway."""
        self.loads = Loads()
        self._token = token
        self._changed = changed
        self._tls = tls
        self._resolve_seconds = resolve_seconds
        self._silent_seconds = silent_seconds
        self.silent = False
        """No gateway reports, and that for a while."""
        self._heard_at = time.monotonic()  # when one did
        self._names = Names(gateways, told)
        self._links: dict[Address, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._open: dict[Address, _Link] = {}
        self._absent: dict[Address, float] = {}  # since when, of addresses without an open link
        self._routes = RouteBulletin(epoch)
        self._runway = RunwayBulletin()
        self.published = (
            asyncio.Event()
        )  # set after each change of the document; its reader clears it
        self.replaced: Callable[[str], None] = lambda boot: None
        """Is told the boot of a gateway that is dead: another one answers at its address."""
        self._boots: dict[Address, str] = {}  # the last that answered there
        self._ceilings: dict[
            tuple[str, str], float
        ] = {}  # by boot and agent, the last that was told
        self._held = True
        self._sharing = 1  # gateways
        self._soon: asyncio.TimerHandle | None = None
        self._published_at = 0.0
        self._reading = 0.0  # seconds that a gateway needs for what was published then

    def __repr__(self) -> str:
        return f"Fleet({self.connected} connected, {self._routes!r}, {self.loads!r})"

    async def __aenter__(self) -> Self:
        self._tasks = [
            parts.begin(self._resolve(), "the search for gateways"),
            parts.begin(self._expire(), "the watch over gateways"),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._soon:
            self._soon.cancel()
        # The resolver goes first: it makes links.
        await parts.end(*self._tasks)
        await parts.end(*self._links.values())

    @property
    def epoch(self) -> int:
        return self._routes.epoch

    @property
    def connected(self) -> int:
        """How many links are open."""
        return len(self._open)

    @property
    def complete(self) -> bool:
        """A gateway reports, and none that may have calls is silent."""
        return any(link.boot for link in self._open.values()) and not self._missing()

    def acknowledged(self, agent: str) -> bool:
        """Every gateway acts on the latest route of the agent (or on its having none)."""
        wanted = self._routes.changed_in(agent)
        return not (self._held or self._missing()) and all(
            link.acted_on >= wanted for link in self._open.values()
        )

    def _missing(self) -> bool:
        return self._missing_count() > 0

    def _missing_count(self) -> int:
        now = time.monotonic()
        return sum(now - since < ABSENCE_SECONDS for since in self._absent.values())

    def _gateways(self) -> int:
        """How many share what tenants may have; one that may be alive has its share."""
        boots = {link.boot or id(link) for link in self._open.values()}
        return len(boots) + self._missing_count()

    @property
    def document(self) -> Routes:
        """The routes as they are now."""
        return self._routes.document

    def report(self, agent: str) -> AgentReport:
        return self.loads.report(agent)

    def forget(self, agent: str) -> None:
        """Drops all that is kept of an agent that is no more."""
        self.set_route(agent, None)
        self._runway.forget(agent)
        self.loads.forget(agent)

    def set_route(self, agent: str, route: Route | None) -> bool:
        """Routes an agent so, or no longer; whether that is new."""
        new = self._routes.put(agent, route)
        if new:
            self._publish_soon()
        return new

    def set_runway(self, agent: str, starting: Sequence[tuple[int, float]]) -> None:
        """Which slots are on their way, and in how many seconds they can be had."""
        if self._runway.put(agent, starting, time.monotonic()):
            self._publish_soon()

    @property
    def pushing(self) -> bool:
        """Gateways are told of this operator's routes."""
        return not self._held

    def allow(self, agent: str, ceilings: Mapping[str, float]) -> None:
        """Tells gateways, by boot, what the agent's burst may cost there."""
        for link in self._open.values():
            ceiling = ceilings.get(link.boot)
            if ceiling is not None and self._ceilings.get((link.boot, agent)) != ceiling:
                self._ceilings[link.boot, agent] = link.owed[agent] = ceiling
                link.news.set()

    def open(self) -> None:
        """Begins to push. Until all agents are known, gateways keep the routes that they have."""
        self._sharing = max(1, self._gateways())
        self._held = False
        self._publish()

    def _deal(self) -> None:
        """Tells all gateways their share of tenants' limits when there are more or fewer of them."""
        sharing = max(1, self._gateways())
        if sharing != self._sharing:
            self._sharing = sharing
            if not self._held:
                self._publish()

    def _publish_soon(self) -> None:
        if not self._held and self._soon is None:
            delay = push_delay(time.monotonic() - self._published_at, self._reading)
            self._soon = asyncio.get_running_loop().call_later(delay, self._publish)

    def _publish(self) -> None:
        self._soon = None
        self._published_at, self._reading = time.monotonic(), 0.0
        links = self._open.values()
        told = (link.sent for link in links if link.sent)  # the others are told everything
        self._routes.told_to_all(min(told, default=self._routes.revision))
        if self._routes.publish(self._sharing):
            self.published.set()
        self._runway.publish()
        for link in links:
            link.news.set()

    # --- who there is -------------------------------------------------------------------------------

    def stands_for(self, name: Address, hosts: frozenset[str] | None) -> None:
        """Whoever calls this knows better than DNS, and says so whenever it is different; None: it does not know."""
        self._names.tell(name, hosts)
        self._dial_all()
        if not self._held:
            for link in self._open.values():
                link.news.set()

    async def _resolve(self) -> None:
        while True:
            await self._names.ask()
            self._dial_all()
            await asyncio.sleep(self._resolve_seconds)

    def _dial_all(self) -> None:
        for address in self._names.addresses - self._links.keys():
            self._absent[address] = time.monotonic()
            self._links[address] = asyncio.create_task(self._keep_link(address))
        self._deal()  # before the new ones are told anything

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS / 4)
            for agent in self.loads.expire(time.monotonic()):
                self._changed(agent)
            self._listen()
            self._deal()

    def _listen(self) -> None:
        """All agents must hear it when gateways fall silent, and when that is over."""
        now = time.monotonic()
        if any(link.boot for link in self._open.values()):
            self._heard_at = now
        silent = now - self._heard_at > self._silent_seconds
        if silent is not self.silent:
            self.silent = silent
            for agent in self._routes.agents:
                self._changed(agent)

    # --- one link -----------------------------------------------------------------------------------

    async def _keep_link(self, address: Address) -> None:
        """Dials until the address is no longer one of a gateway's."""
        delay, last = REDIAL_SECONDS[0], ""
        try:
            while address in self._names.addresses:
                began = time.monotonic()
                why = await self._link(address)
                if time.monotonic() - began > DEAD_AFTER_SECONDS:
                    delay, last = REDIAL_SECONDS[0], ""
                if why != last:  # a gateway that stays away is told once
                    log.warning("no link to gateway %s:%d: %s", *address, why)
                    last = why
                await asyncio.sleep(delay * random.uniform(0.5, 1.5))
                delay = min(delay * 2, REDIAL_SECONDS[1])
        finally:
            self._links.pop(address, None)
            self._absent.pop(address, None)
            boot = self._boots.pop(address, "")
            self._ceilings = {key: it for key, it in self._ceilings.items() if key[0] != boot}

    async def _link(self, address: Address) -> str:
        """Holds one link as long as it lives; why it ended."""
        host, port = address
        name = self._names.name_of(address)
        server = name[0]
        uri = f"{'wss' if self._tls else 'ws'}://{f'[{host}]' if ':' in host else host}:{port}{OPERATOR_PATH}"
        why = "it closed the link"
        try:
            async with connect(
                uri,
                ssl=self._tls,
                server_hostname=server if self._tls else None,
                additional_headers={
                    "Authorization": f"Bearer {self._token}",
                    CHANGES_HEADER: "1",
                },
                open_timeout=DEAD_AFTER_SECONDS,
                close_timeout=HEARTBEAT_SECONDS,
                ping_interval=None,  # both sides beat
                max_size=MAX_CONTROL_BYTES,
                compression=None,
                proxy=None,
                logger=quiet,
            ) as socket:
                log.info("linked to gateway %s:%d", *address)
                await self._exchange(socket, address, name)
        except* InvalidStatus as refusals:
            why = refused(refusals.exceptions[0])
        except* (ssl.SSLError, ConnectionResetError, InvalidMessage) as failures:
            why = why_no_link(failures.exceptions[0], server, TLS_GIVEN, tls=self._tls is not None)
        except* (OSError, TimeoutError, WebSocketException, ValueError) as failures:
            first = failures.exceptions[0]
            why = str(first) or f"silent for {DEAD_AFTER_SECONDS:g} s"
        return why

    async def _exchange(self, socket: ClientConnection, address: Address, name: Address) -> None:
        assert socket.response is not None, "a link that is open was answered"
        changes = CHANGES_HEADER in socket.response.headers
        link = self._open[address] = _Link(name=name, changes=changes)
        self._absent.pop(address, None)
        boot = self._boots.get(address, "")  # what was on its way to it may be lost
        self._ceilings = {key: it for key, it in self._ceilings.items() if key[0] != boot}
        if not self._held:
            link.news.set()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send(socket, link))
                group.create_task(self._receive(socket, link, address))
        finally:
            del self._open[address]
            self._absent[address] = time.monotonic()

    async def _send(self, socket: ClientConnection, link: _Link) -> None:
        beat = json.dumps(Beat(type="beat"))
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(link.news.wait(), HEARTBEAT_SECONDS)
            # Whoever does not take a message for so long is as good as dead.
            async with asyncio.timeout(DEAD_AFTER_SECONDS):
                news = link.news.is_set()
                link.news.clear()
                if not (news and await self._tell(socket, link)):
                    await socket.send(beat)

    async def _tell(self, socket: ClientConnection, link: _Link) -> bool:
        """What is new to a gateway: who else there is, the routes, and then what may be expected for them.

        Whether there was anything: what has changed may have changed back.
        """
        told = False
        hosts = self._names.hosts(link.name)
        if hosts is not None and hosts != link.met:
            link.met = hosts
            named = Gateways(type="gateways", hosts=sorted(hosts)[:MAX_GATEWAYS])
            told |= await self._say(socket, json.dumps(named))
        before, link.sent = link.sent, self._routes.revision
        whole, routed = not (before and link.changes), self._routes.new_since(before)
        if before != link.sent:
            routes = self._routes.whole() if whole else self._routes.since(before)
            told |= await self._say(socket, routes)
            await (await socket.ping())  # the pong says that the routes have arrived
            link.received.append((link.sent, time.monotonic()))
        # What was foretold before a gateway knew an agent was lost on it.
        if routed or link.foretold != self._runway.revision:
            foretold, link.foretold = link.foretold, self._runway.revision
            now = time.monotonic()
            runway = self._runway.whole(now) if whole else self._runway.since(foretold, routed, now)
            told |= await self._say(socket, runway)
        if link.owed:
            owed, link.owed = link.owed, {}
            allowances = Allowances(type="allowances", epoch=self.epoch, agents=owed)
            told |= await self._say(socket, json.dumps(allowances))
        return told

    async def _say(self, socket: ClientConnection, text: str) -> bool:
        """Whether there was anything to say."""
        self._reading = max(self._reading, len(text) * READING_SECONDS)
        if text:
            await socket.send(text)
        return bool(text)

    def _forget_boot(self, boot: str) -> None:
        self._ceilings = {key: it for key, it in self._ceilings.items() if key[0] != boot}
        self.replaced(boot)

    async def _receive(self, socket: ClientConnection, link: _Link, address: Address) -> None:
        while True:
            async with asyncio.timeout(DEAD_AFTER_SECONDS):
                message = await socket.recv()
            now = time.monotonic()
            load = parse_load(message)
            if load is None:
                self.loads.beat(link.boot, now)
                continue
            if load["epoch"] > self.epoch and load["boot"] != link.boot:
                log.error(
                    "gateway %s takes its routes from a newer operator: is another one running?",
                    load["gateway"],
                )
            before = self._boots.get(address, load["boot"])
            self._boots[address] = load["boot"]
            if before != load["boot"]:
                self._forget_boot(before)
            link.hear(load["boot"], load["epoch"] == self.epoch, now)
            for agent in self.loads.hear(load, now):
                self._changed(agent)


def push_delay(since: float, writing: float) -> float:
    """Seconds until the document is written again, since it last was and from how long that took."""
    return min(max(COALESCE_SECONDS, WRITING_SHARE * writing - since), LONGEST_COALESCE_SECONDS)


def refused(error: BaseException) -> str:
    if isinstance(error, InvalidStatus) and error.response.status_code in (401, 403):
        return f"it refused the token: give operator and gateway the same {ENV_OPERATOR_TOKEN}"
    return str(error)
