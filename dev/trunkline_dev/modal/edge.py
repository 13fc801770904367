"""What stands in front of one server: its URL, its sessions, and the pools behind it."""

import asyncio
import hmac
from collections.abc import Iterator
from typing import Final

from trunkline_dev.modal.containers import Machine, Session
from trunkline_dev.modal.control import Tokens
from trunkline_dev.modal.faults import Fault
from trunkline_dev.modal.gate import HANG_SECONDS
from trunkline_dev.modal.http import Listener, Request, Response, Splice, page, text
from trunkline_dev.modal.pool import Pool
from trunkline_dev.modal.process import Launch
from trunkline_dev.modal.state import ServerRecord, now

START_PATH: Final = "/_modal/sessions/start"
TERMINATE_PATH: Final = "/_modal/sessions/terminate"
IDLE_SECONDS: Final = 600.0  # when a start names none
# Modal's own credentials stop at its edge.
OWN_HEADERS: Final = frozenset({"modal-key", "modal-secret", "modal-authorization"})


class Edge:
    """Keeps its URL over deployments. Sessions stay with the container that they started on."""

    def __init__(self, machine: Machine, tokens: Tokens) -> None:
        self.pool: Pool | None = None  # of the newest deployment; None: stopped
        self.retired: list[Pool] = []
        self.url = ""
        self.app = self.region = ""
        self._refusing = False
        self._machine, self._tokens = machine, tokens
        self._listener = Listener(self._handle)

    async def start(self, host: str) -> None:
        self.url = await self._listener.start(host)

    async def follow_faults(self) -> None:
        """Refuses connections while its region is down."""
        down = self._machine.state.faults.holds(Fault.REGION_DOWN, self.region, now())
        if down and not self._refusing:
            await self._listener.refuse(cut=down.cut)
        elif self._refusing and not down:
            await self._listener.accept()
        self._refusing = down is not None

    async def close(self) -> None:
        await self._listener.close()
        for pool in self.pools:
            await pool.close()

    @property
    def pools(self) -> list[Pool]:
        return [*self.retired, *([self.pool] if self.pool else [])]

    # --- deployments ------------------------------------------------------------------------------

    def deploy(self, record: ServerRecord, app: str, launch: Launch) -> None:
        """Sends new sessions to new containers; the old ones go when theirs have ended."""
        if self.pool and self.pool.definition_id == record.definition_id:
            self.pool.wake()
            return
        self.app = app
        old, self.pool = self.pool, Pool(self._machine, record, app, launch)
        if old:
            self.pool.waiting.extend(old.waiting)
            self._retire(old)

    def stop(self) -> None:
        if self.pool:
            for waiter in self.pool.waiting:
                waiter.cancel()
            self._retire(self.pool)
            self.pool = None

    def _retire(self, pool: Pool) -> None:
        self.retired = [old for old in self.retired if not old.drained.is_set()]
        self.retired.append(pool)
        pool.drain()

    # --- requests ---------------------------------------------------------------------------------

    async def _handle(self, request: Request) -> Response | Splice:
        if request.method == "POST" and request.path == START_PATH:
            return await self._start_session(request)
        if request.method == "POST" and request.path == TERMINATE_PATH:
            return self._end_session(request)
        token = request.header("modal-authorization").removeprefix("Bearer ").strip()
        session = self._find(token)
        if session is None:
            return text(401, "modal-http: invalid session token")
        session.connected()
        return Splice(
            host=session.container.process.address,
            port=session.container.port,
            without=OWN_HEADERS,
            closed=session.disconnected,
        )

    def _authorized(self, request: Request) -> bool:
        """A proxy token in one of its two forms, or the token that the SDK got for this."""
        token, secret = request.header("modal-key"), request.header("modal-secret")
        bearer = request.header("authorization").removeprefix("Bearer ")
        if not token and bearer.startswith("wk-"):
            token, _, secret = bearer.partition(".")
        expected = self._machine.state.proxy_tokens.get(token)
        if self._machine.state.faults.holds(Fault.TOKEN_REVOKED, token, now()):
            expected = None
        if expected and hmac.compare_digest(expected.encode(), secret.encode()):
            return True
        return self._tokens.valid(request.header("modal-authorization").removeprefix("Bearer "))

    def _sessions(self) -> Iterator[Session]:
        for pool in self.pools:
            for container in pool.containers.values():
                yield from container.sessions

    def _find(self, token: str) -> Session | None:
        live = (session for session in self._sessions() if not session.over)
        return next((session for session in live if session.token == token), None)

    async def _start_session(self, request: Request) -> Response:
        if not self._authorized(request):
            return text(401, "modal-http: missing credentials for proxy authorization")
        if refusal := await self._faulty():
            return refusal
        try:
            idle_seconds = float(
                request.header("x-modal-server-session-idle-timeout") or IDLE_SECONDS
            )
        except ValueError:
            return text(400, "modal-http: the idle timeout is no number")
        if self.pool is None:
            return text(404, "modal-http: app is stopped")
        session = await self._queue(self.pool)
        if session is None:
            return text(503, "modal-http: no capacity for the session")
        session.keep(idle_seconds)
        return page({"session_id": session.id, "token": session.token})

    async def _faulty(self) -> Response | None:
        """Keeps a start waiting, or refuses it, as the faults want it."""
        faults, subject = self._machine.state.faults, f"{self.app}/{self.region}"
        if strike := faults.strike(Fault.SESSION_HANGS, subject, now()):
            await asyncio.sleep(HANG_SECONDS if strike.seconds is None else strike.seconds)
        if strike := faults.strike(Fault.SESSION_REFUSED, subject, now()):
            return text(int(strike.rule.status or 503), "modal-http: a fault of the local Modal")
        return None

    async def _queue(self, pool: Pool) -> Session | None:
        """Waits for a container with room. None: there was none in time, or the server was stopped."""
        waiter: asyncio.Future[Session] = asyncio.get_running_loop().create_future()
        pool.waiting.append(waiter)
        pool.wake()
        try:
            await asyncio.wait([waiter], timeout=self._machine.config.queue_seconds)
        except asyncio.CancelledError:  # the caller went away
            if waiter.done() and not waiter.cancelled():
                waiter.result().end()
            waiter.cancel()
            pool.wake()
            raise
        if waiter.done() and not waiter.cancelled():
            return waiter.result()
        waiter.cancel()
        return None

    def _end_session(self, request: Request) -> Response:
        session = self._find(request.header("x-modal-server-session-token"))
        if session is None:
            return text(404, "modal-http: no such session")
        session.end()
        return page({})
