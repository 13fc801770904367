"""python -m trunkline_dev.cluster up|down|import"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Final

from trunkline_dev.binaries import NoBinaries
from trunkline_dev.cluster import network
from trunkline_dev.cluster.cluster import Cluster
from trunkline_dev.cluster.failures import ClusterError

PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")


def default_folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "trunkline" / "cluster"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trunkline_dev.cluster",
        description="Run a real Kubernetes node on this machine, in namespaces of its own.",
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--dir",
        type=Path,
        default=default_folder(),
        metavar="DIR",
        help="where the cluster has its files; default: %(default)s",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", parents=[shared], help="start it, and leave it running")
    commands.add_parser("down", parents=[shared], help="end it, and remove everything it made")
    images = commands.add_parser("import", parents=[shared], help="give the node container images")
    images.add_argument("archives", nargs="+", type=Path, metavar="ARCHIVE")
    arguments = parser.parse_args()
    cluster = Cluster(arguments.dir)
    for number in (signal.SIGTERM, signal.SIGINT):  # A shell's background jobs ignore the latter.
        signal.signal(number, signal.default_int_handler)
    try:
        if arguments.command == "up":
            cluster.up(leash=False)
            print(f"export KUBECONFIG={cluster.kubeconfig}")
            if any(os.environ.get(name) for name in PROXIES):
                print(f"export NO_PROXY={','.join(network.RANGES)}")
        elif arguments.command == "down":
            cluster.down()
        else:
            cluster.import_images(arguments.archives)
    except (ClusterError, NoBinaries) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
