"""Containers as callers see them: what holds sessions, and what all servers share."""

import asyncio
import ipaddress
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trunkline_dev.modal.faults import Fault
from trunkline_dev.modal.process import ContainerProcess
from trunkline_dev.modal.state import Boot, Config, Gpu, State, new_id, now


class Addresses:
    """Loopback addresses, one per process."""

    def __init__(self, network: ipaddress.IPv4Network) -> None:
        self._free = deque(str(address) for address in network.hosts())

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> str:
        """The address longest out of use."""
        return self._free.popleft()

    def give_back(self, address: str) -> None:
        self._free.append(address)


@dataclass(slots=True, kw_only=True)
class Machine:
    """What all servers share."""

    config: Config
    state: State
    addresses: Addresses
    running: int = 0  # containers of all servers
    gpus: Counter[str] = field(default_factory=Counter)  # in use, by type

    def room(self, app: str, choices: Sequence[Gpu]) -> Gpu | None:
        """The first choice that one more container of the app may have now; None: there is no room."""
        capacity = self.config.capacity
        if not len(self.addresses) or (capacity is not None and self.running >= capacity):
            return None
        return next((gpu for gpu in choices if self._available(app, gpu)), None)

    def _available(self, app: str, gpu: Gpu) -> bool:
        where = f"{app}/{gpu.type or 'cpu'}"
        if self.state.faults.holds(Fault.NO_CAPACITY, where, now()):
            return False
        budget = self.config.gpus
        return budget is None or self.gpus[gpu.type] + gpu.count <= budget.get(gpu.type, 0)

    def take(self, gpu: Gpu) -> None:
        self.running += 1
        self.gpus[gpu.type] += gpu.count

    def give_back(self, gpu: Gpu) -> None:
        self.running -= 1
        self.gpus[gpu.type] -= gpu.count


@dataclass(slots=True, kw_only=True, eq=False)
class Container:
    boot: Boot
    process: ContainerProcess
    port: int
    gpu: Gpu
    ready: bool = False
    stopping: bool = False
    idle_since: float = 0.0
    sessions: set["Session"] = field(default_factory=set)
    quiet: asyncio.Event = field(default_factory=asyncio.Event)  # no session is left


class Session:
    """One caller's claim on a container. Ends when it is told to, or has had no connection for a while."""

    def __init__(self, container: Container, ended: Callable[["Session"], None]) -> None:
        self.id, self.token = new_id("sd"), new_id("st")
        self.container = container
        self.over = False  # takes no new connection; those it has may finish
        self._connections = 0
        self._ended, self._idle_seconds = ended, 0.0
        self._expiry: asyncio.TimerHandle | None = None

    def keep(self, idle_seconds: float) -> None:
        """Starts the idle clock."""
        self._idle_seconds = idle_seconds
        self._watch()

    def _watch(self) -> None:
        if self._expiry:
            self._expiry.cancel()
            self._expiry = None
        if not self.over and not self._connections:
            loop = asyncio.get_running_loop()
            self._expiry = loop.call_later(self._idle_seconds, self.end)

    def connected(self) -> None:
        self._connections += 1
        self._watch()

    def disconnected(self) -> None:
        self._connections -= 1
        self._watch()
        self._settle()

    def end(self) -> None:
        self.over = True
        self._watch()
        self._settle()

    def _settle(self) -> None:
        if self.over and not self._connections:
            self._ended(self)
