"""A real etcd and kube-apiserver on loopback, with all that they write in one temporary folder.

Ready in about 1.4 s. No scheduler and no kubelet: `trunkline_dev.node` stands in for both. Without
`controllers` nothing collects garbage and no namespace ever finishes terminating; an operator that
deletes its own pods does not miss them.

    python -m trunkline_dev.controlplane
"""

import argparse
import contextlib
import http.client
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

import yaml

from trunkline_dev import binaries
from trunkline_dev.authority import Authority
from trunkline_dev.leash import leashed

HOST: Final = "127.0.0.1"
START_SECONDS: Final = 60.0
"""Two shared cores under load have needed up to 7 s."""
LOG_TAIL_BYTES: Final = 3000

# Both hooks sleep for a second before they do anything, and an admin needs neither: the default
# ClusterRoles appear about 1.2 s after the control plane is ready.
_SLOW_HOOKS: Final = "rbac/bootstrap-roles", "scheduling/bootstrap-system-priority-classes"
_READYZ: Final = "/readyz?" + "&".join(f"exclude=poststarthook/{hook}" for hook in _SLOW_HOOKS)

# One wants service accounts that a controller makes, the other adds a taint that a controller removes.
_NEED_CONTROLLERS: Final = "ServiceAccount,TaintNodesByCondition"

_ETCD: Final = (
    "--data-dir=etcd",
    "--unsafe-no-fsync",
    "--log-level=warn",
    # A lone member elects itself after a random part of this, up to a second by default.
    "--heartbeat-interval=10",
    "--election-timeout=50",
    # Sockets are relative to the folder: no port to race for, no path that is too long. etcd before
    # 3.7 wants their names to look like host:port.
    "--listen-client-urls=unix://etcd:0",
    "--advertise-client-urls=unix://etcd:0",
    "--listen-peer-urls=unix://peer:0",
    "--initial-advertise-peer-urls=unix://peer:0",
    "--initial-cluster=default=unix://peer:0",
)

_API_SERVER: Final = (
    "--etcd-servers=unix://etcd:0",
    "--authorization-mode=RBAC",
    f"--bind-address={HOST}",
    "--permit-port-sharing",
    f"--advertise-address={HOST}",
    "--endpoint-reconciler-type=none",  # Endpoints may not be loopback addresses.
    "--service-cluster-ip-range=10.96.0.0/16",
    "--client-ca-file=ca.crt",
    "--tls-cert-file=apiserver.crt",
    "--tls-private-key-file=apiserver.key",
    "--service-account-issuer=https://kubernetes.default.svc",
    "--service-account-key-file=apiserver.key",
    "--service-account-signing-key-file=apiserver.key",
    "--kubelet-client-certificate=admin.crt",
    "--kubelet-client-key=admin.key",
)


class ControlPlaneError(RuntimeError):
    """The control plane did not start, or a part of it ended; the text has the end of its log."""


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class ControlPlane:
    """A control plane from entry to exit of the context; on exit its processes and files are gone.

    `controllers` are names for kube-controller-manager, which runs only when there are any. `say` gets
    progress, of which there is none unless the binaries must be downloaded or compiled. Enter it
    from a thread that outlives it, the main thread at best: its processes end with that thread.
    """

    root: Path
    url: str

    def __init__(
        self, controllers: Sequence[str] = (), *, say: Callable[[str], None] = to_stderr
    ) -> None:
        self._controllers, self._say = tuple(controllers), say
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __repr__(self) -> str:
        states = {name: process.poll() for name, process in self._processes.items()}
        parts = ", ".join(
            f"{name} {'runs' if code is None else f'ended with {code}'}"
            for name, code in states.items()
        )
        return f"<ControlPlane {parts or 'stopped'}>"

    @property
    def kubeconfig(self) -> Path:
        """Of an administrator (group system:masters)."""
        return self.root / "kubeconfig"

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes.values())

    def __enter__(self) -> Self:
        names = ["etcd", "kube-apiserver"]
        if self._controllers:
            names.append("kube-controller-manager")
        self._binaries = binaries.prepare(names, say=self._say)
        self.root = Path(tempfile.mkdtemp(prefix="trunkline-control-plane-"))
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def check(self) -> None:
        """Raises ControlPlaneError if a process has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise ControlPlaneError(
                    f"{name} ended with {process.returncode}. Its log ends so:\n{self._tail(name)}"
                )

    def _stop(self) -> None:
        # Killed outright: what a graceful end would put in order goes away with the folder.
        for process in reversed(self._processes.values()):
            process.kill()
            process.wait()
        self._processes.clear()
        shutil.rmtree(self.root)

    def _start(self) -> None:
        authority = Authority(self.root)
        authority.issue("apiserver", "CN=kube-apiserver")
        authority.issue("admin", "O=system:masters,CN=admin")
        self._run("etcd", *_ETCD)
        # Held until the API server listens on it too, so that nobody else can take the port.
        with socket.socket() as reserved:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reserved.bind((HOST, 0))
            port: int = reserved.getsockname()[1]
            without = (
                () if self._controllers else (f"--disable-admission-plugins={_NEED_CONTROLLERS}",)
            )
            self._run("kube-apiserver", *_API_SERVER, f"--secure-port={port}", *without)
            self._wait_ready(port)
        self.url = f"https://{HOST}:{port}"
        self._write_kubeconfig()
        if self._controllers:
            self._run(
                "kube-controller-manager",
                f"--kubeconfig={self.kubeconfig}",
                "--leader-elect=false",
                "--secure-port=0",
                f"--controllers={','.join(self._controllers)}",
                "--service-account-private-key-file=apiserver.key",
                "--root-ca-file=ca.crt",
                "--kube-api-qps=300",
                "--kube-api-burst=500",
            )

    def _run(self, name: str, *flags: str) -> None:
        command = leashed([str(self._binaries / name), *flags])
        with (self.root / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command, cwd=self.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _wait_ready(self, port: int) -> None:
        tls = ssl.create_default_context(cafile=self.root / "ca.crt")
        tls.load_cert_chain(self.root / "admin.crt", self.root / "admin.key")
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            client = http.client.HTTPSConnection(HOST, port, timeout=5, context=tls)
            with (
                contextlib.suppress(OSError, http.client.HTTPException),
                contextlib.closing(client),
            ):
                client.request("GET", _READYZ)
                if client.getresponse().status == 200:
                    return
            time.sleep(0.02)
        tails = "\n".join(f"{name}:\n{self._tail(name)}" for name in self._processes)
        raise ControlPlaneError(f"the API server is not ready after {START_SECONDS:g} s.\n{tails}")

    def _tail(self, name: str) -> str:
        text = (self.root / f"{name}.log").read_bytes()[-LOG_TAIL_BYTES:]
        return text.decode(errors="replace").strip() or "(it wrote nothing)"

    def _write_kubeconfig(self) -> None:
        root = str(self.root)
        cluster = {"server": self.url, "certificate-authority": f"{root}/ca.crt"}
        user = {"client-certificate": f"{root}/admin.crt", "client-key": f"{root}/admin.key"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "dev", "cluster": cluster}],
            "users": [{"name": "dev", "user": user}],
            "contexts": [{"name": "dev", "context": {"cluster": "dev", "user": "dev"}}],
            "current-context": "dev",
        }
        self.kubeconfig.write_text(yaml.safe_dump(config))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trunkline_dev.controlplane",
        description="Run a Kubernetes control plane on loopback until interrupted.",
    )
    parser.add_argument(
        "--controllers",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME,…",
        help="controllers of kube-controller-manager to run as well",
    )
    controllers = parser.parse_args().controllers
    for number in (signal.SIGTERM, signal.SIGINT):  # A shell's background jobs ignore the latter.
        signal.signal(number, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt), ControlPlane(controllers) as plane:
            print(f"export KUBECONFIG={plane.kubeconfig}", flush=True)
            while True:
                plane.check()
                time.sleep(0.5)
    except (ControlPlaneError, binaries.NoBinaries) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
