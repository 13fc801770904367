"""The control links of workers. Workers dial in and offer their slots; each alone decides who has one."""

import asyncio
import hmac
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from websockets.asyncio.server import ServerConnection, broadcast
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from trunkline_runtime.contract import (
    AGENT_HEADER,
    DEAD_AFTER_SECONDS,
    Close,
    Gateways,
)
from trunkline_runtime.gateway.access.wish import bearers
from trunkline_runtime.gateway.dialling import Failed
from trunkline_runtime.gateway.ladder import Patience
from trunkline_runtime.gateway.leg import Leg
from trunkline_runtime.gateway.outliers import LATE_SHARE, SLOW_SECONDS, Demerit, Outliers
from trunkline_runtime.gateway.routes import Route
from trunkline_runtime.gateway.table import Row, Table
from trunkline_runtime.gateway.worker_link import (
    Hello,
    Malformed,
    WorkerLink,
    hello_from,
    message_from,
)
from trunkline_runtime.process import answer

log = logging.getLogger("trunkline.gateway")

HELLO_SECONDS: Final = 5.0
MAX_UNREAD_BYTES: Final = 2**20  # some 50,000 beats that a worker does not read


_Process = tuple[str, str, str]


def _process(row: Row) -> _Process:
    """One run of one worker, whatever links it has."""
    return row.agent, row.worker, row.boot


@dataclass(slots=True)
class _Silence:
    """Of a worker whose link was cut: its calls are given up at `until`, unless it is heard again."""

    row: Row
    until: float
    passed: int  # bytes that its calls had brought by then


class WorkerLinks:
    """All control links of workers.

    `changed` is called with an agent when its workers come or go, or when its last free slot is taken.
    """

    def __init__(
        self,
        table: Table,
        routes: Callable[[], Mapping[str, Route]],
        changed: Callable[[str], None],
        patience: Patience,
    ) -> None:
        self._table = table
        self._routes = routes
        self._changed = changed
        self._patience = patience
        self._links: dict[Row, WorkerLink] = {}
        self._legs: dict[_Process, set[Leg]] = {}  # they outlive a link, and meet the next one
        self._silent: dict[_Process, _Silence] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._outliers = Outliers()
        self._gateways: Sequence[str] = ()  # addresses, where the operator has told them

    def __repr__(self) -> str:
        return f"<WorkerLinks {sorted(f'{row.agent}:{row.worker}' for row in self._links)}>"

    def of(self, row: Row) -> WorkerLink | None:
        """The link behind a row of the table."""
        return self._links.get(row)

    def answered(self, link: WorkerLink, found: Leg | Failed | None, seconds: float) -> None:
        """What a worker has said to a call, and after how long; None where the caller left before that."""
        if route := self._routes().get(link.row.agent):
            link.standby.renew(link.address(route))
        had_free, row = link.row.free > 0, link.row
        full = isinstance(found, Failed) and found.full
        seq = found.seq if found else None
        self._table.settle(row, taken=isinstance(found, Leg), full=full, seq=seq)
        self._spent(link, had_free)
        match found:
            case Leg():
                self._hold(row, found)
                if seconds > SLOW_SECONDS:
                    self._bad(row, Demerit.SLOW)
                else:
                    self._outliers.good(row)
            case Failed(late=True):
                self._bad(row, Demerit.SILENT)
            case Failed(full=False, ours=False):
                self._bad(row, Demerit.REFUSED)

    def yield_places(self) -> None:
        """File descriptors are short: a caller needs one more than a connection that stands by."""
        for link in self._links.values():
            link.standby.yield_place()

    def aside(self) -> dict[str, int]:
        """How many workers are set aside, of agents that have any."""
        return self._outliers.aside()

    def refusal(self, request: Request) -> Response | None:
        """The plain answer instead of a link; None when the worker may dial in."""
        agents = request.headers.get_all(AGENT_HEADER)
        route = self._routes().get(agents[0]) if len(agents) == 1 else None
        if route is None:
            return answer(404, f"there is no route for the agent that {AGENT_HEADER} names\n")
        if not _proves(request, route):
            return answer(401, f"this is not the worker key of {route.agent}\n")
        return None

    async def serve(self, connection: ServerConnection) -> None:
        """One link, from its hello to its end."""
        assert connection.request is not None
        agent = connection.request.headers[AGENT_HEADER]
        link = None
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                link = self._greet(connection, hello_from(await connection.recv(), agent))
            async for text in connection:
                self._heard(link, message_from(text))
        except TimeoutError:
            await connection.close(Close.POLICY, f"no hello came in {HELLO_SECONDS:g} s")
        except Malformed as error:
            log.warning("a worker was dropped", extra={"agent": agent, "why": str(error)})
            await connection.close(Close.POLICY, str(error))
        except ConnectionClosed:
            pass
        finally:
            if link is not None:
                self._lost(link)

    def routes_changed(self) -> None:
        """Pushes drain lists, and drops the workers of agents that are gone or have another key."""
        for link in list(self._links.values()):
            route = self._routes().get(link.row.agent)
            if route is None:
                self._drop(link, f"there is no route for {link.row.agent} any more")
            elif not _proves(link.connection.request, route):
                self._drop(link, f"{link.row.agent} has another worker key now")
            else:
                link.bar(link.row.worker in route.draining)

    def tell_gateways(self, hosts: Sequence[str]) -> None:
        """All gateways behind the name of this one: a new one has its workers at once, whatever DNS says."""
        if hosts != self._gateways:
            self._gateways = hosts
            broadcast([link.connection for link in self._links.values()], self._all_gateways())

    def beat(self) -> None:
        broadcast([link.connection for link in self._links.values()], '{"type":"beat"}')

    def sweep(self, now: float) -> None:
        """A worker that was silent for three seconds gets no new call; its calls have longer."""
        for link in list(self._links.values()):
            unread = link.connection.transport.get_write_buffer_size()
            if now - link.seen > DEAD_AFTER_SECONDS or unread > MAX_UNREAD_BYTES:
                log.warning(
                    "a worker is silent or deaf: it gets no new call",
                    extra={"agent": link.row.agent, "worker": link.row.worker},
                )
                process = _process(link.row)
                until = now + self._patience.silence - DEAD_AFTER_SECONDS
                self._silent[process] = _Silence(link.row, until, self._passed(process))
                link.connection.transport.abort()
            else:
                self._stand_by(link, now)
        for process in list(self._silent):
            self._give_up(process, now)
        for row in self._outliers.back(now):
            self._table.set_aside(row, False)
            self._changed(row.agent)

    def _give_up(self, process: _Process, now: float) -> None:
        """Ends the calls of a worker that has let neither its link nor any call be heard of for too long."""
        silence, passed = self._silent[process], self._passed(process)
        if passed > silence.passed:
            silence.until, silence.passed = now + self._patience.silence, passed
        elif now > silence.until:
            del self._silent[process]
            if legs := tuple(self._legs.get(process, ())):
                log.warning(
                    "a worker is silent: its calls are lost",
                    extra={"agent": silence.row.agent, "worker": silence.row.worker},
                )
                for leg in legs:
                    leg.abort()

    def _passed(self, process: _Process) -> int:
        return sum(leg.passed for leg in self._legs.get(process, ()))

    async def close(self) -> None:
        """Waits for the links that were told to go."""
        if self._closing:
            await asyncio.wait(self._closing)

    def _greet(self, connection: ServerConnection, hello: Hello) -> WorkerLink:
        row = Row(agent=hello.agent, worker=hello.worker, boot=hello.boot, slots=hello.slots)
        link = WorkerLink(connection, row, hello, self._table)
        old = self._table.add(row)
        if old is not None:
            self._links[old].connection.transport.abort()
        self._links[row] = link
        if self._gateways:
            broadcast([connection], self._all_gateways())
        self._stand_by(link, link.seen)
        self._silent.pop(_process(row), None)
        route = self._routes().get(hello.agent)
        link.bar(route is not None and hello.worker in route.draining)
        log.info(
            "a worker dialled in",
            extra={"agent": hello.agent, "worker": hello.worker, "boot": hello.boot},
        )
        self._changed(hello.agent)
        return link

    def _all_gateways(self) -> str:
        return json.dumps(Gateways(type="gateways", hosts=list(self._gateways)))

    def _stand_by(self, link: WorkerLink, now: float) -> None:
        if route := self._routes().get(link.row.agent):
            link.standby.look(link.address(route), now)

    def _bad(self, row: Row, demerit: Demerit) -> None:
        """A worker has failed a call, or is about to fail those that it has."""
        if row not in self._links:
            return
        now, peers = asyncio.get_running_loop().time(), self._table.rows(row.agent)
        seconds = self._outliers.bad(row, demerit, now, peers)
        if seconds is not None:
            extra = {"agent": row.agent, "worker": row.worker, "seconds": seconds}
            log.warning("a worker is set aside", extra={**extra, "why": demerit.value})
            self._table.set_aside(row, True)
            self._changed(row.agent)

    def _hold(self, row: Row, leg: Leg) -> None:
        """A data link to the worker, which dies with it."""
        self._legs.setdefault(_process(row), set()).add(leg)
        leg.home = row
        leg.when_gone(self._let_go)

    def _heard(self, link: WorkerLink, message: Mapping[str, Any]) -> None:
        link.seen = asyncio.get_running_loop().time()
        had_free = link.row.free > 0
        link.late = 0.0
        link.heard(message)
        if link.late > LATE_SHARE:
            self._bad(link.row, Demerit.LATE)
        self._spent(link, had_free)

    def _spent(self, link: WorkerLink, had_free: bool) -> None:
        """The operator is told soon where that was the last free slot of its agent."""
        if had_free and not self._table.free(link.row.agent):
            self._changed(link.row.agent)

    def _lost(self, link: WorkerLink) -> None:
        self._links.pop(link.row, None)
        link.standby.drop()
        self._outliers.forget(link.row)
        if self._table.remove(link.row):
            log.info(
                "a worker's link ended",
                extra={"agent": link.row.agent, "worker": link.row.worker, "boot": link.row.boot},
            )
            self._changed(link.row.agent)

    def _let_go(self, leg: Leg) -> None:
        process = _process(cast(Row, leg.home))
        legs = self._legs[process]
        legs.discard(leg)
        if not legs:
            del self._legs[process]

    def _drop(self, link: WorkerLink, why: str) -> None:
        task = asyncio.get_running_loop().create_task(link.connection.close(Close.POLICY, why))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _proves(request: Request | None, route: Route) -> bool:
    keys = bearers(request.headers) if request is not None else []
    return len(keys) == 1 and hmac.compare_digest(
        keys[0].encode("latin-1"), route.worker_key.encode()
    )
