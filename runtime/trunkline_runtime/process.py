"""What every process of the data plane has: JSON logs, and /healthz, /readyz and /metrics on a port of its own."""

import contextlib
import errno
import http
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from pythonjsonlogger.json import JsonFormatter
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from trunkline_runtime.contract import HEALTHZ_PATH, METRICS_PATH, READYZ_PATH, STATE_PATH

# What is there when a request asks; None means ready, a sentence says why not.
Readiness = Callable[[], str | None]

# What people are shown of a process, as JSON would have it.
Shown = Callable[[], Mapping[str, object]]

QUIET: Final = logging.getLogger("trunkline.websockets")
"""For the protocol objects of `websockets`: their debug lines would hold callers' content."""
QUIET.setLevel(logging.CRITICAL)


class CannotListen(OSError):
    """An address that the process was told to listen on cannot be had; the text says what to do."""


@contextlib.contextmanager
def listening(host: str, port: int, what: str, flag: str) -> Iterator[None]:
    """Turns what keeps a socket from listening into a sentence for whoever set `flag`."""
    try:
        yield
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "the port is in use" if taken else error.strerror or str(error)
        raise CannotListen(
            f"cannot listen on {host}:{port} for {what}: {why}; free it or set {flag}"
        ) from error


def configure_logging(process: str, level: str = "INFO") -> None:
    """One JSON object a line on standard output: time, level, logger, message, process and extras.

    Extras name calls and agents, never content: no token, transcript or audio goes into a log.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            static_fields={"process": process},
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # No line has them, and to look them up is a fifth of its cost: "Optimization" in the HOWTO of `logging`.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.getLogger("websockets").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def answer(status: int, text: str, content_type: str = "text/plain; charset=utf-8") -> Response:
    """A plain HTTP response that closes the connection."""
    body = text.encode()
    headers = Headers(
        {"Content-Type": content_type, "Content-Length": str(len(body)), "Connection": "close"}
    )
    return Response(status, http.HTTPStatus(status).phrase, headers, body)


@contextlib.asynccontextmanager
async def serving_health(
    host: str,
    port: int,
    ready: Readiness,
    registry: CollectorRegistry = REGISTRY,
    flag: str = "--health-port",
    state: Shown | None = None,
) -> AsyncIterator[int]:
    """Serves /healthz, /readyz and /metrics, and /state where there is one; yields the port.

    `flag` is what sets the port; 0 is any. Raises CannotListen.
    """
    paths = [HEALTHZ_PATH, READYZ_PATH, METRICS_PATH]
    paths += [STATE_PATH] if state is not None else []

    def respond(_: ServerConnection, request: Request) -> Response:
        match request.path.partition("?")[0]:
            case path if path == HEALTHZ_PATH:
                return answer(200, "ok\n")
            case path if path == READYZ_PATH:
                why_not = ready()
                return answer(503 if why_not else 200, f"{why_not or 'ready'}\n")
            case path if path == METRICS_PATH:
                return answer(200, generate_latest(registry).decode(), CONTENT_TYPE_LATEST)
            case path if path == STATE_PATH and state is not None:
                return answer(200, json.dumps(state()), "application/json")
        return answer(404, f"there are {', '.join(paths[:-1])} and {paths[-1]}\n")

    async def unreachable(_: ServerConnection) -> None:
        raise AssertionError("every request is answered before the handshake")

    with listening(host, port, "health checks", flag):
        server = await serve(unreachable, host, port, process_request=respond, logger=QUIET)
    async with server:
        yield next(iter(server.sockets)).getsockname()[1]
