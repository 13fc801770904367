"""A gRPC service made of objects whose methods are named like the calls."""

import inspect
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpclib.server
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from grpclib.protocol import H2Protocol
from modal._utils.grpc_utils import custom_detail_codec
from modal_proto import api_grpc

from trunkline_dev.modal.http import reserved

log = logging.getLogger("trunkline.modal")

# Protocol Buffers messages of `modal_proto`; they are generated, and untyped here.
Message = Any
# Looks at a call's name and metadata before it is served. Raises what the call shall fail with; returns
# what it shall fail with although it is served: then its answer is lost.
Admit = Callable[[str, Mapping[str, Any]], Awaitable[GRPCError | None]]


@dataclass(frozen=True, slots=True)
class Tally:
    """How often each call was made, by name."""

    served: Counter[str] = field(default_factory=Counter)
    unimplemented: Counter[str] = field(default_factory=Counter)


# Told of a call that has been admitted, and of one whose answer is about to go out, by its name.
Witness = Callable[[str], Awaitable[None]]


async def nobody(_: str) -> None:
    """For calls that no test looks at."""


async def anyone(_: str, __: Mapping[str, Any]) -> None:
    """For calls that arrive on a socket which only the right caller can reach."""


def service(
    handlers: Sequence[object],
    caller: str,
    tally: Tally,
    admit: Admit = anyone,
    witnesses: tuple[Witness, Witness] = (nobody, nobody),
) -> "Service":
    """A server, not yet listening, that answers each call with the first method of that name.

    A handler takes the request and returns the response, None for an empty one, or a list for a stream of them; it
    may be a coroutine.
    A call without a handler is answered UNIMPLEMENTED, logged and counted, so that a new version of the
    SDK says at once what it needs.
    """

    def method(name: str) -> Callable[[Any, Any], Any]:
        found = (getattr(one, name) for one in handlers if hasattr(one, name))
        handler = next(found, None)

        async def respond(_: Any, stream: Any) -> None:
            request = await stream.recv_message()
            if request is None:
                return
            lost = await admit(name, stream.metadata)
            await witnesses[0](name)
            if handler is None:
                tally.unimplemented[name] += 1
                log.warning("not implemented: %s", name, extra={"rpc": name, "caller": caller})
                raise GRPCError(Status.UNIMPLEMENTED, f"{name} is not part of the local Modal")
            tally.served[name] += 1
            response = handler(request)
            if inspect.isawaitable(response):
                response = await response
            await witnesses[1](name)
            if lost:
                raise lost
            if isinstance(response, list):  # of a call that is answered with a stream
                for each in response:
                    await stream.send_message(each)
            else:
                await stream.send_message(Empty() if response is None else response)

        return respond

    names = api_grpc.ModalClientBase.__abstractmethods__
    methods = {name: method(name) for name in names}
    implementation = type("LocalModalClient", (api_grpc.ModalClientBase,), methods)()
    return Service([implementation])


class _Server(grpclib.server.Server):  # type: ignore[misc]  # mypy skips grpclib
    """Remembers its connections: grpclib's own ends only the calls in them."""

    def __init__(self, handlers: list[Any]) -> None:
        super().__init__(handlers, status_details_codec=custom_detail_codec)
        self.protocols: list[H2Protocol] = []

    def _protocol_factory(self) -> Any:
        protocol = super()._protocol_factory()
        self.protocols = [one for one in self.protocols if not one.handler.closing]
        self.protocols.append(protocol)
        return protocol


class Service:
    """Listens at one address, and can be away for a while."""

    def __init__(self, handlers: list[Any]) -> None:
        self._handlers = handlers
        self._server: _Server | None = None
        self._address: tuple[str, int] = ("", 0)
        self._keeper: socket.socket | None = None  # holds the port while nothing listens

    async def start(self, host: str, port: int) -> int:
        """Listens there, and returns the port."""
        self._server = _Server(self._handlers)
        await self._server.start(host, port)
        # grpclib keeps its listening server to itself, and with port 0 it alone knows the port.
        self._address = host, self._server._server.sockets[0].getsockname()[1]
        return self._address[1]

    async def start_at(self, path: str) -> None:
        """Listens at a Unix socket."""
        self._server = _Server(self._handlers)
        await self._server.start(path=path)

    async def refuse(self) -> None:
        """Ends all connections, and takes no more."""
        if self._server:
            await self._stop()
            self._keeper = reserved(*self._address)

    async def accept(self) -> None:
        """Takes connections again, at the same address."""
        if self._keeper:
            self._keeper.close()
            self._keeper = None
            await self.start(*self._address)

    async def close(self) -> None:
        if self._keeper:
            self._keeper.close()
            self._keeper = None
        await self._stop()

    async def _stop(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for protocol in server.protocols:
            protocol.connection.close()
        await server.wait_closed()
