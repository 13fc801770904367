"""The first process of a node: arranges its view of the file system, then reaps orphans for ever.

It runs in new mount, process, network and host-name namespaces. When it is killed, the kernel kills
everything else in them, and their mounts, links and packet filters are gone too: that is how a node
ends, whatever it was doing.

    python -m trunkline_dev.cluster.first_process FOLDER NAME
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

PRIVATE: Final = {"lib": "/var/lib", "logs": "/var/log"}
"""Folders of the node and where programs expect them: images and volumes, pods' logs."""

# The kubelet sets these for the whole machine unless they already have the values that it wants.
# Plain files in their place spare the machine the change.
_KERNEL_SETTINGS: Final = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def mount(*arguments: str) -> None:
    subprocess.run(("mount", *arguments), check=True)


def arrange(folder: Path) -> None:
    mount("--make-rprivate", "/")
    # Sockets, locks and network namespaces of container tools have fixed names below /run.
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for name, place in PRIVATE.items():
        mount("--bind", str(folder / name), place)
    for setting, value in _KERNEL_SETTINGS.items():
        file = folder / "kernel" / setting
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
        mount("--bind", str(file), f"/proc/sys/{setting}")
    # Pods may ask for mounts that spread; they spread no further than this namespace.
    mount("--make-rshared", "/")


def main() -> None:
    folder, name = sys.argv[1:]
    socket.sethostname(name)
    arrange(Path(folder))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The kernel reaps what is orphaned here.
    os.write(1, b"ready\n")
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
