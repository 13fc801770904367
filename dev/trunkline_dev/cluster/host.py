"""What this machine must have for a node, and what is added to it for the node's life."""

import contextlib
import ipaddress
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from trunkline_dev.cluster import network
from trunkline_dev.cluster.failures import ClusterError

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where the programs are; a user's PATH often lacks the folders of the administrator."""

PACKAGES: Final[Mapping[str, str]] = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "iptables": "iptables",
    "ipset": "ipset",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "sysctl": "procps",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}
"""The programs that a node needs from this machine, with Debian's packages of them."""

BUSYBOX_PACKAGE: Final = "busybox-static"  # The shared one would need its libraries in the image.
CNI_PACKAGE: Final = "containernetworking-plugins"
CNI_FOLDERS: Final = ("/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni")
CNI_PLUGINS: Final = ("bridge", "host-local", "loopback", "portmap")

INSTALL: Final = "python -m trunkline_dev.cluster install"

COMMAND_SECONDS: Final = 900.0
"""The longest are apt-get's, over a slow network, and the import of an image of gigabytes."""

_PT_INTERP: Final = 3  # elf(5)
CONTROLLERS: Final = frozenset({"cpu", "cpuset", "memory", "pids"})
REMOVAL_SECONDS: Final = 20.0
"""The kernel empties the cgroups of killed processes in well under a second."""


def usable() -> str | None:
    """Why no node can run on this machine, in a sentence; None if nothing is in the way."""
    if sys.platform != "linux":
        return "a Kubernetes node needs Linux; use a Linux machine, or a virtual one"
    if os.geteuid() != 0:
        return "a Kubernetes node needs root: its containers, mounts and links do; use sudo"
    if missing := missing_packages():
        return lacking(missing)
    return (
        _without_namespaces()
        or _without_kernel_parts()
        or _without_cgroups(mounts())
        or _taken_range()
    )


def lacking(packages: list[str]) -> str:
    """The sentence for them."""
    return f"this machine lacks {', '.join(packages)}; {INSTALL} installs it"


def missing_packages(path: str = PATH, cni: Sequence[str] = CNI_FOLDERS) -> list[str]:
    """Debian's packages of what a node needs and this machine has not, in these folders."""
    missing = {package for name, package in PACKAGES.items() if not shutil.which(name, path=path)}
    if cni_folder(cni) is None:
        missing.add(CNI_PACKAGE)
    if busybox(path) is None:
        missing.add(BUSYBOX_PACKAGE)
    return sorted(missing)


def install(say: Callable[[str], None]) -> None:
    """Installs the packages that are missing, with apt-get; raises ClusterError."""
    if not (missing := missing_packages()):
        say("this machine has every package that a node needs")
        return
    if sys.platform != "linux" or not shutil.which("apt-get", path=PATH):
        raise ClusterError(f"there is no apt-get to install {', '.join(missing)}")
    if os.geteuid() != 0:
        raise ClusterError(f"only root can install {', '.join(missing)}; use sudo")
    say(f"installing with apt-get: {' '.join(missing)}")
    began = time.monotonic()
    wait = ("-o", "DPkg::Lock::Timeout=300")  # A fresh machine often upgrades itself just then.
    for arguments in (("update",), ("install", "-y", "--no-install-recommends", *missing)):
        run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", *wait, *arguments)
    if missing := missing_packages():
        raise ClusterError(f"apt-get installed {', '.join(missing)}, and yet programs are missing")
    say(f"installed in {time.monotonic() - began:.0f} s")


def program(name: str) -> Path:
    if not (found := shutil.which(name, path=PATH)):
        raise ClusterError(f"there is no {name} on this machine; install {PACKAGES[name]}")
    return Path(found)


def busybox(path: str = PATH) -> Path | None:
    """A busybox that needs no libraries."""
    found = shutil.which("busybox", path=path)
    return Path(found) if found and is_static(Path(found).read_bytes()) else None


def is_static(elf: bytes) -> bool:
    """Whether a 64-bit little-endian ELF program asks for no dynamic linker. Pure."""
    if elf[:6] != b"\x7fELF\x02\x01":
        return False
    table, size, count = (
        struct.unpack_from(form, elf, at)[0] for form, at in (("<Q", 32), ("<H", 54), ("<H", 56))
    )
    kinds = {struct.unpack_from("<I", elf, table + size * entry)[0] for entry in range(count)}
    return _PT_INTERP not in kinds


def cni_folder(folders: Sequence[str] = CNI_FOLDERS) -> Path | None:
    for folder in map(Path, folders):
        if all(os.access(folder / plugin, os.X_OK) for plugin in CNI_PLUGINS):
            return folder
    return None


def mounts() -> list[tuple[str, str, str]]:
    """(where, kind, options) of everything that is mounted."""
    lines = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return [(where, kind, options) for _, where, kind, options, *_ in lines]


def hierarchies(mounted: list[tuple[str, str, str]]) -> dict[Path, frozenset[str]]:
    """The cgroup hierarchies, by where they are, with their controllers or (version 2) none. Pure."""
    found: dict[Path, frozenset[str]] = {}
    for where, kind, options in mounted:
        if kind == "cgroup":
            found[Path(where)] = CONTROLLERS & set(options.split(","))
        elif kind == "cgroup2":
            found[Path(where)] = frozenset()
    return found


def _without_cgroups(mounted: list[tuple[str, str, str]]) -> str | None:
    found = hierarchies(mounted)
    controllers = set[str]().union(*found.values())
    for folder, first in found.items():
        with contextlib.suppress(OSError):  # Version 2 names its controllers in a file.
            if not first:
                controllers |= set((folder / "cgroup.controllers").read_text().split())
    if lacking := sorted(CONTROLLERS - controllers):
        return f"no cgroup hierarchy below /sys/fs/cgroup has the controllers {', '.join(lacking)}"
    if fixed := [str(folder) for folder in found if not os.access(folder, os.W_OK)]:
        return f"{', '.join(fixed)} cannot be written, as in a container that is not privileged"
    return None


def _without_namespaces() -> str | None:
    trial = ("unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "true")
    if failure := _failure(*trial):
        return f"this machine allows no new namespaces: {failure}"
    return None


def _without_kernel_parts() -> str | None:
    for kernel_module in ("overlay", "br_netfilter"):  # Both are often built in.
        _failure("modprobe", "-q", kernel_module)  # Whether it is there now is asked below.
    if not Path("/proc/sys/net/bridge").exists():
        return "the kernel has no br_netfilter, without which network policies do not hold"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlay file system for containers"
    for question in (("nft", "list", "ruleset"), ("ipset", "list"), ("iptables", "-S")):
        if failure := _failure("unshare", "--net", *question):
            return f"{question[0]} does not work with this kernel: {failure}"
    return None


def _failure(*command: str) -> str | None:
    try:
        run(*command)
    except ClusterError as error:
        return str(error)
    return None


def _taken_range() -> str | None:
    if not (ip := shutil.which("ip", path=PATH)):
        return None
    listed = subprocess.run(
        (ip, "-4", "route", "show"), check=True, capture_output=True, text=True
    ).stdout
    return taken_range(listed)


def taken_range(routes: str) -> str | None:
    """Which of the cluster's ranges this machine already routes elsewhere. Pure."""
    ours = [ipaddress.ip_network(text, strict=False) for text in network.RANGES]
    for route in routes.splitlines():
        words = route.split()
        if not words or network.LINK in words:
            continue
        try:
            theirs = ipaddress.ip_network(words[0])
        except ValueError:  # "default", "unreachable"
            continue
        for range_ in ours:
            if theirs.overlaps(range_):
                return f"the cluster's range {range_} is in use here already: {route.strip()}"
    return None


SHARES: Final = {"cpu.shares": "4096", "cpu.weight": "400"}
"""Four times the usual: without, all pods together get what one process of this machine gets."""


def add_cgroups(name: str) -> None:
    """A cgroup in every hierarchy, with as much of the processors as a few busy processes beside it."""
    for hierarchy in hierarchies(mounts()):
        (hierarchy / name).mkdir(exist_ok=True)
        for file, share in SHARES.items():
            with contextlib.suppress(OSError):  # Each is in one hierarchy of one version.
                (hierarchy / name / file).write_text(share)


def remove_cgroups(name: str) -> None:
    """Removes them with all below; raises ClusterError if a process is still in one."""
    deadline = time.monotonic() + REMOVAL_SECONDS
    for hierarchy in hierarchies(mounts()):
        top = hierarchy / name
        while top.exists():
            _prune(top)
            if top.exists() and time.monotonic() > deadline:
                raise ClusterError(f"{top} is still in use {REMOVAL_SECONDS:g} s after the end")
            if top.exists():
                time.sleep(0.05)


def sweep_cgroups(top: Path, pattern: str) -> None:
    """Removes the cgroups of such names directly below `top`, as far as no process is in them.

    They are of clusters that were killed, and whose folders nobody used again.
    """
    for dead in top.glob(pattern):
        _prune(dead)


def _prune(top: Path) -> None:
    # Files in a cgroup cannot be removed and need not be; only its folders count.
    for folder, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def link_owner() -> str | None:
    """The folder of the cluster that has the link; None if there is no link."""
    try:
        return Path("/sys/class/net", network.LINK, "ifalias").read_text().strip()
    except OSError:
        return None


def run(*command: str, stdin: int | IO[bytes] = subprocess.DEVNULL) -> str:
    """Runs a command of this machine's and returns what it printed; raises ClusterError."""
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            stdin=stdin,
            timeout=COMMAND_SECONDS,
            env=os.environ | {"PATH": PATH},
        )
    except FileNotFoundError as error:
        raise ClusterError(f"there is no {command[0]} on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{' '.join(command)} took over {COMMAND_SECONDS:g} s") from error
    if done.returncode != 0:
        told = (done.stderr or done.stdout).strip()[-1000:]
        raise ClusterError(f"{' '.join(command)} ended with {done.returncode}: {told}")
    return done.stdout
