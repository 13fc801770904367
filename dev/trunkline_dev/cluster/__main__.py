"""python -m trunkline_dev.cluster install|up|down|import"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

from trunkline_dev import binaries
from trunkline_dev.binaries import NoBinaries
from trunkline_dev.cluster import host
from trunkline_dev.cluster.cluster import PROGRAMS, Cluster, default_folder, to_stderr
from trunkline_dev.cluster.failures import ClusterError


def _do(arguments: argparse.Namespace) -> None:
    if arguments.command == "install":
        host.install(to_stderr)
        binaries.prepare((*PROGRAMS, "kubectl"), say=to_stderr)
        return
    cluster = Cluster(arguments.dir)
    if arguments.command == "up":
        cluster.up(leash=False)
        for name, value in cluster.environment.items():
            print(f"export {name}={shlex.quote(value)}")
    elif arguments.command == "down":
        cluster.down()
    else:
        cluster.import_images(arguments.archives)


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
    commands.add_parser(
        "install",
        help="install the Debian packages that it needs and this machine lacks, and fetch or "
        "compile its programs",
    )
    commands.add_parser("up", parents=[shared], help="start it, and leave it running")
    commands.add_parser("down", parents=[shared], help="end it, and remove everything it made")
    images = commands.add_parser("import", parents=[shared], help="give the node container images")
    images.add_argument("archives", nargs="+", type=Path, metavar="ARCHIVE")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # A shell's background jobs ignore the latter.
        signal.signal(number, signal.default_int_handler)
    try:
        _do(arguments)
    except (ClusterError, NoBinaries) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
