"""The part of the kubelet's API that `kubectl logs` needs."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, Final

from aiohttp import web

from trunkline_dev.kube import Api

POLL_SECONDS: Final = 0.2
CHUNK_BYTES: Final = 1 << 16

_UNKNOWN: Final = "previous", "sinceSeconds", "sinceTime", "timestamps"
"""Options that would need a record of times; refused, rather than left out of the answer."""

Find = Callable[[str, str, str], Path]
Runs = Callable[[str, str], bool]


@contextlib.asynccontextmanager
async def serving_logs(api: Api, host: str, find: Find, runs: Runs) -> AsyncIterator[int]:
    """Serves `find(namespace, pod, container)` to the API server alone, and yields the port.

    A log is followed for as long as `runs(namespace, pod)` says that there will be more of it.
    """
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=api.authority)
    tls.load_cert_chain(*api.certificate)
    tls.verify_mode = ssl.CERT_REQUIRED

    async def read(request: web.Request) -> web.StreamResponse:
        if unknown := [option for option in _UNKNOWN if request.query.get(option) not in _OFF]:
            raise web.HTTPBadRequest(text=f"the development node's logs have no {unknown[0]}")
        names = request.match_info
        path = find(names["namespace"], names["pod"], names["container"])
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise web.HTTPNotFound(text="the container has not started yet") from error
        with file:
            follows = request.query.get("follow") == "true"
            return await _send(
                request, file, lambda: follows and runs(names["namespace"], names["pod"])
            )

    app = web.Application()
    app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", read)
    # Without it a follower who went away would be noticed at the next line only.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, 0, ssl_context=tls).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


_OFF: Final = (None, "", "false")


async def _send(
    request: web.Request, file: IO[bytes], goes_on: Callable[[], bool]
) -> web.StreamResponse:
    file.seek(tail_offset(file, int(request.query.get("tailLines", -1))))
    left = int(request.query.get("limitBytes", 1 << 62))
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):  # They have seen enough.
        while left > 0:
            more = goes_on()  # Asked before the last read, so that no last line is missed.
            while left > 0 and (chunk := file.read(min(CHUNK_BYTES, left))):
                await response.write(chunk)
                left -= len(chunk)
            if not more:
                break
            await asyncio.sleep(POLL_SECONDS)
    return response


def tail_offset(file: IO[bytes], lines: int) -> int:
    """Where the last `lines` lines of a file begin; a negative number means all."""
    if lines < 0:
        return 0
    position = end = file.seek(0, 2)
    wanted = lines
    while position > 0:
        start = max(position - CHUNK_BYTES, 0)
        file.seek(start)
        chunk = file.read(position - start)
        # A newline that ends the file begins no line.
        index = len(chunk) - 1 if position == end else len(chunk)
        while (index := chunk.rfind(b"\n", 0, index)) >= 0:
            wanted -= 1
            if wanted <= 0:
                return start + index + 1 if lines else end
        position = start
    return 0 if lines else end
