"""`python -m trunkline_dev.modal`: a local Modal until it is interrupted.

The first line on standard output says where it is, as one JSON object; the lines after it are its log.
"""

import argparse
import asyncio
import ipaddress
import json
import signal
from pathlib import Path

import uvloop

from trunkline_dev.modal.faults import Plan, parse
from trunkline_dev.modal.gate import WrongModal
from trunkline_dev.modal.server import LocalModal
from trunkline_dev.modal.state import Config
from trunkline_runtime.process import CannotListen, configure_logging


def pair(text: str) -> tuple[str, str]:
    token, colon, secret = text.partition(":")
    if not colon or not token or not secret:
        raise argparse.ArgumentTypeError("a token and its secret, as in wk-1:ws-2")
    return token, secret


def gpus(text: str) -> tuple[str, int]:
    name, equals, count = text.partition("=")
    if not name or not equals or not count.isdecimal():
        raise argparse.ArgumentTypeError("a type and how many there are, as in L4=2")
    return name, int(count)


def faults(text: str) -> Plan:
    try:
        return parse(json.loads(Path(text).read_text()))
    except (OSError, ValueError) as error:  # FaultError is a ValueError
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def configuration(arguments: list[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(prog="python -m trunkline_dev.modal", description=__doc__)
    default = Config()
    parser.add_argument("--host", default=default.host)
    parser.add_argument("--port", type=int, default=default.port, help="of the API; 0: any")
    parser.add_argument("--local-port", type=int, default=default.local_port, help="of /_local")
    parser.add_argument(
        "--addresses",
        type=ipaddress.IPv4Network,
        default=default.addresses,
        help="loopback network, one address per container (default: one picked at random)",
    )
    parser.add_argument(
        "--cold-seconds", type=float, default=0.0, help="a first boot takes at least so long"
    )
    parser.add_argument(
        "--restore-seconds", type=float, default=0.0, help="a restore takes at least so long"
    )
    parser.add_argument("--logs", type=Path, help="folder for a log file per container")
    parser.add_argument("--capacity", type=int, help="containers at most, of all apps together")
    parser.add_argument(
        "--gpus",
        type=gpus,
        action="append",
        default=[],
        metavar="TYPE=COUNT",
        help="GPUs of this type that there are; may be given again (default: any number of any)",
    )
    parser.add_argument(
        "--faults",
        type=faults,
        default=default.faults,
        metavar="FILE",
        help="JSON: what goes wrong from the start (docs/local-modal.md)",
    )
    parser.add_argument(
        "--proxy-token",
        type=pair,
        action="append",
        default=[],
        metavar="wk-…:ws-…",
        help="accepted at the start of sessions; may be given again",
    )
    parser.add_argument(
        "--token",
        type=pair,
        action="append",
        metavar="ak-…:as-…",
        help="the only API tokens that are accepted (default: any)",
    )
    options = parser.parse_args(arguments)
    return Config(
        host=options.host,
        port=options.port,
        local_port=options.local_port,
        addresses=options.addresses,
        cold_seconds=options.cold_seconds,
        restore_seconds=options.restore_seconds,
        logs=options.logs,
        capacity=options.capacity,
        gpus=dict(options.gpus) or None,
        faults=options.faults,
        proxy_tokens=dict(options.proxy_token),
        api_tokens=dict(options.token) if options.token else None,
    )


async def serve(config: Config) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signal.SIGINT, signal.SIGTERM:
        loop.add_signal_handler(number, stop.set)
    async with LocalModal(config) as modal:
        ready = {"server_url": modal.server_url, "local_url": modal.local_url}
        print(json.dumps(ready), flush=True)
        await stop.wait()


def main() -> None:
    config = configuration()
    configure_logging("modal")
    try:
        uvloop.run(serve(config))
    except (CannotListen, WrongModal) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
