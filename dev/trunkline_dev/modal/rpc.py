"""A gRPC service made of an object whose methods are named like the calls."""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import grpclib.server
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal._utils.grpc_utils import custom_detail_codec
from modal_proto import api_grpc

log = logging.getLogger("trunkline.modal")

# Protocol Buffers messages of `modal_proto`; they are generated, and untyped here.
Message = Any
# Raises GRPCError when a call's metadata does not show who is calling.
Authorize = Callable[[Mapping[str, Any]], None]


def anyone(_: Mapping[str, Any]) -> None:
    """For calls that arrive on a socket which only the right caller can reach."""


def service(handlers: object, caller: str, authorize: Authorize = anyone) -> grpclib.server.Server:
    """A server, not yet listening, that answers each call with the method of that name.

    A handler takes the request and returns the response, or None for an empty one; it may be a coroutine.
    A call without a handler is answered UNIMPLEMENTED and its name logged, so that a new version of the
    SDK says at once what it needs.
    """

    def method(name: str) -> Callable[[Any, Any], Any]:
        async def respond(_: Any, stream: Any) -> None:
            request = await stream.recv_message()
            if request is None:
                return
            authorize(stream.metadata)
            handler = getattr(handlers, name, None)
            if handler is None:
                log.warning("not implemented: %s", name, extra={"rpc": name, "caller": caller})
                raise GRPCError(Status.UNIMPLEMENTED, f"{name} is not part of the local Modal")
            response = handler(request)
            if inspect.isawaitable(response):
                response = await response
            await stream.send_message(Empty() if response is None else response)

        return respond

    names = api_grpc.ModalClientBase.__abstractmethods__
    methods = {name: method(name) for name in names}
    implementation = type("LocalModalClient", (api_grpc.ModalClientBase,), methods)()
    return grpclib.server.Server([implementation], status_details_codec=custom_detail_codec)
