"""The namespaces that are the node: begun with a first process, ended by killing it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from trunkline_dev.cluster import first_process, host, network
from trunkline_dev.cluster.components import NODE, cgroup
from trunkline_dev.cluster.failures import ClusterError
from trunkline_dev.leash import leashed
from trunkline_dev.processes import descendants

START_SECONDS: Final = 20.0
END_SECONDS: Final = 60.0
"""The kernel ends some fifty processes and their mounts in about a second."""
OWNER_LETTERS: Final = 255  # The kernel takes no longer alias for a link.
MARK: Final = "trunkline-cluster"
"""A file that marks a folder as a cluster's, so that no other is ever deleted."""
RECORD: Final = "node.json"
"""The file that says which process is the node's first, for `down` and for later commands."""


class Node:
    """The namespaces of the cluster whose files are in `folder`, running or not."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cgroup = folder, cgroup(folder)
        self._owner = str(folder)[-OWNER_LETTERS:]
        self._unshare: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Node {self.folder} {self.pid or 'down'}>"

    @property
    def pid(self) -> int | None:
        """The first process, in this machine's count; None if it does not run."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads((self.folder / RECORD).read_text())
            birth = _birth(record["pid"])
            if birth and birth == record["birth"]:  # Not another's, who got the number later.
                return int(record["pid"])
        return None

    def start(self, *, leash: bool) -> None:
        """Begins the namespaces, and joins their network to this machine's.

        With `leash` all of it ends with the calling thread, however that ends.
        """
        for name in first_process.PRIVATE:
            (self.folder / name).mkdir(exist_ok=True)
        host.add_cgroups(self.cgroup)
        pid = self._begin(leash)
        for command in network.outside(pid, self._owner):
            host.run(*command)
        for command in network.inside():
            self.run(*command)
        for command in network.routes():
            host.run(*command)

    def _begin(self, leash: bool) -> int:
        namespaces = ("--mount", "--net", "--pid", "--uts", "--ipc", "--mount-proc", "--kill-child")
        module = ("-m", first_process.__name__, str(self.folder), NODE)
        command = [str(host.program("unshare")), *namespaces, "--", sys.executable, *module]
        log = self.folder / "logs" / "first-process.log"
        with log.open("wb") as file:
            self._unshare = subprocess.Popen(
                leashed(command) if leash else command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # A terminal's Ctrl-C is for the command, not for the node.
            )
        self._record(self._unshare.pid)  # Which takes the first process along when it is killed.
        deadline = time.monotonic() + START_SECONDS
        while b"ready" not in log.read_bytes():
            if self._unshare.poll() is not None or time.monotonic() > deadline:
                self._unshare.kill()
                told = log.read_text(errors="replace").strip()[-1000:]
                raise ClusterError(f"the node's namespaces did not come to be: {told}")
            time.sleep(0.01)
        (first,) = descendants(self._unshare.pid)
        self._record(first)
        return first

    def _record(self, pid: int) -> None:
        """For `down` by another process, also if this one is killed right now."""
        new = self.folder / f"{RECORD}.new"
        new.write_text(json.dumps({"pid": pid, "birth": _birth(pid)}))
        new.replace(self.folder / RECORD)

    def command(self, *command: str) -> list[str]:
        """The command, to run in the node."""
        if not (pid := self.pid):
            raise ClusterError(f"no cluster runs in {self.folder}")
        spaces = ("--mount", "--net", "--pid", "--uts", "--ipc")
        return [str(host.program("nsenter")), "--target", str(pid), *spaces, "--", *command]

    def run(self, *command: str, stdin: int | IO[bytes] = subprocess.DEVNULL) -> str:
        """Runs a command in the node and returns what it printed; raises ClusterError."""
        return host.run(*self.command(*command), stdin=stdin)

    def spawn(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Starts a program that ends with the node."""
        with log.open("wb") as file:
            return subprocess.Popen(
                self.command(*command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={"PATH": host.PATH, "HOME": "/root"},
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ends everything that runs in the node, and takes back what this machine got for it."""
        if pid := self.pid:
            birth = _birth(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + END_SECONDS
            while _birth(pid) == birth:
                if time.monotonic() > deadline:
                    raise ClusterError(f"the node's first process {pid} does not end")
                time.sleep(0.02)
        if self._unshare is not None:
            self._unshare.kill()  # Where it had not got so far as to have a first process.
            self._unshare.wait()
            self._unshare = None
        if host.link_owner() == self._owner:
            # It goes with the other end, but later than the next cluster may want it.
            with contextlib.suppress(ClusterError):
                host.run("ip", "link", "delete", network.LINK)
        host.remove_cgroups(self.cgroup)

    def clear(self, *, keep_logs: bool = False) -> None:
        """Removes its files; only after `stop`."""
        for entry in self.folder.iterdir() if self.folder.exists() else ():
            if keep_logs and entry.name in ("logs", MARK):
                continue
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if self.folder.exists() and not keep_logs:
            self.folder.rmdir()


def _birth(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None for a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
