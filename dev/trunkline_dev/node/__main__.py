"""python -m trunkline_dev.node: runs the pods of a cluster as processes, until interrupted."""

import argparse
import asyncio
import contextlib
import logging
import os
import shlex
import signal
import sys
from pathlib import Path

from trunkline_dev.kube import Api, KubeconfigError
from trunkline_dev.node import Node, NodeConfig, NodeConfigError


def pairs(texts: list[str], flag: str) -> dict[str, str]:
    """ "a=b" as a mapping, with a sentence for what is not so."""
    for text in texts:
        if not all(text.partition("=")):
            raise NodeConfigError(f"{flag} {text!r}: write NAME=VALUE")
    return {key: value for key, _, value in (text.partition("=") for text in texts)}


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="python -m trunkline_dev.node",
        description="Run the pods of a cluster as processes of this machine, until interrupted.",
    )
    flags.add_argument("--kubeconfig", default=os.environ.get("KUBECONFIG"), metavar="FILE")
    flags.add_argument("--name", default="dev")
    flags.add_argument(
        "--capacity",
        default="cpu=8,memory=32Gi,pods=110,nvidia.com/gpu=8",
        help="what the node claims to have; GPUs need not be there (default: %(default)s)",
    )
    flags.add_argument(
        "--addresses",
        default="127.77.3.0/24",
        metavar="NET",
        help="the loopback network that pods get an address from (default: %(default)s)",
    )
    flags.add_argument("--logs", type=Path, required=True, metavar="DIR")
    flags.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="IMAGE=COMMAND",
        help="the command that stands for an image's entry point; may be repeated",
    )
    flags.add_argument("--namespace", default="", help="see no pods but those of this namespace")
    flags.add_argument(
        "--no-binding", dest="binds", action="store_false", help="leave that to a scheduler"
    )
    flags.add_argument(
        "--pull-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="start a pod's containers so long after it was bound (default: %(default)s)",
    )
    return flags


def config(arguments: argparse.Namespace) -> NodeConfig:
    images = pairs(arguments.image, "--image")
    return NodeConfig(
        name=arguments.name,
        logs=arguments.logs,
        capacity=pairs(arguments.capacity.split(","), "--capacity"),
        addresses=arguments.addresses,
        images={image: tuple(shlex.split(command)) for image, command in images.items()},
        binds=arguments.binds,
        namespace=arguments.namespace,
        pull_seconds=arguments.pull_seconds,
    )


async def run(kubeconfig: Path, settings: NodeConfig) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    async with Api(kubeconfig) as api:
        await Node(api, settings).run()


def main() -> None:
    arguments = parser().parse_args()
    logging.basicConfig(
        format="%(asctime)s %(name)s %(message)s", level=logging.INFO, stream=sys.stderr
    )
    try:
        if not arguments.kubeconfig:
            raise NodeConfigError("say which cluster: --kubeconfig FILE, or set KUBECONFIG")
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(run(Path(arguments.kubeconfig), config(arguments)))
    except (NodeConfigError, KubeconfigError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
