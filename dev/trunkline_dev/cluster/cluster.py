"""A cluster of one node: its programs started in order, with a word about each."""

import asyncio
import http.client
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import aiohttp

from trunkline_dev import binaries
from trunkline_dev.authority import Authority
from trunkline_dev.cluster import components, dns, host, images, network
from trunkline_dev.cluster.components import NODE, Places
from trunkline_dev.cluster.failures import ClusterError
from trunkline_dev.cluster.node import MARK, Node
from trunkline_dev.kube import Api, ApiError, Expired, Json, is_true

PROGRAMS: Final = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kube-router",
    "coredns",
)
START_SECONDS: Final = 120.0
"""For each thing that is waited for. Two shared cores under load have needed 20 s."""
CHECK_SECONDS: Final = 0.2
LOG_TAIL_BYTES: Final = 3000
PROXIES: Final = (
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
)
GPU: Final = "nvidia.com/gpu"
NODE_PATH: Final = f"/api/v1/nodes/{NODE}"

Say = Callable[[str], None]
T = TypeVar("T")


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def default_folder() -> Path:
    """Where a cluster has its files unless told: always the same, so that the next one clears it."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "trunkline" / "cluster"


class Cluster:
    """A cluster from entry to exit of the context; on exit everything but this machine is gone.

    Its files go to `folder`, which is new, empty or an ended cluster's. There is one cluster a
    machine at a time. Enter it from a thread that outlives it: it ends with that thread. If the
    context ends by an exception, `folder`/logs stays. Errors are ClusterErrors.
    """

    def __init__(self, folder: Path, say: Say = to_stderr) -> None:
        self._say, self._began = say, time.monotonic()
        self._folder = folder.absolute()
        self._node = Node(self._folder)
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def __repr__(self) -> str:
        return f"<Cluster {self._node!r}>"

    @property
    def kubeconfig(self) -> Path:
        """Of an administrator."""
        return self._folder / "kubeconfig"

    @property
    def node_address(self) -> str:
        """The node's own, where its API server and node ports listen."""
        return network.NODE_ADDRESS

    @property
    def host_address(self) -> str:
        """This machine's, as pods see it: they reach what listens there, or on all addresses.

        They reach nothing else of or behind this machine, which in turn reaches pods and services.
        """
        return network.HOST_ADDRESS

    @property
    def environment(self) -> dict[str, str]:
        """What a program such as kubectl or Helm needs on top of its environment to come here."""
        added = {"KUBECONFIG": str(self.kubeconfig)}
        if any(os.environ.get(name) for name in PROXIES):
            for name in ("NO_PROXY", "no_proxy"):  # Some programs read only the one or the other.
                added[name] = ",".join(filter(None, (os.environ.get(name), *network.RANGES)))
        return added

    @property
    def logs(self) -> Path:
        """A log a component, and those of the pods' containers below pods/."""
        return self._folder / "logs"

    def __enter__(self) -> Self:
        self.up(leash=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.down(keep_logs=kind is not None)

    def up(self, *, leash: bool) -> None:
        """Starts the cluster; with `leash` it ends with the calling thread."""
        self._began = time.monotonic()
        if reason := host.usable():
            raise ClusterError(f"no Kubernetes node can run here: {reason}")
        self._claim()
        try:
            self._start(leash)
        except BaseException:
            self.down(keep_logs=True)
            raise

    def down(self, *, keep_logs: bool = False) -> None:
        """Ends the cluster and removes what it left, here and on the machine; fine if there is none."""
        if self._folder.exists() and not (self._folder / MARK).exists():
            raise ClusterError(f"{self._folder} is no cluster's folder; nothing was touched")
        self._node.stop()
        for process in self._started.values():
            process.wait()
        self._started.clear()
        self._node.clear(keep_logs=keep_logs)

    def import_images(self, archives: Iterable[Path]) -> None:
        """Gives the node container images from OCI or Docker archives, under the names in them."""
        command = ("ctr", "--namespace=k8s.io", "images", "import", "-")
        for archive in archives:
            try:
                with archive.open("rb") as file:  # The node does not see every file by its path.
                    self._node.run(*command, stdin=file)
            except OSError as error:
                raise ClusterError(f"cannot read the image archive {archive}: {error}") from error
            except ClusterError as error:
                raise ClusterError(f"the image archive {archive} was not taken: {error}") from error
            self._tell(f"{archive.name} imported")

    def set_gpus(self, count: int) -> None:
        """Makes the node claim so many GPUs. Pods that ask for some are scheduled, and get none."""
        amount = {GPU: str(count)}
        patch = {"status": {"capacity": amount, "allocatable": amount}}

        async def change(api: Api) -> None:
            await api.patch(f"{NODE_PATH}/status", patch)

        self._ask(change)

    def check(self) -> None:
        """Raises ClusterError if a program that this object started has ended."""
        for name, process in self._started.items():
            if process.poll() is not None:
                raise ClusterError(f"{name} ended with {process.returncode}. {self._tail(name)}")

    def _tell(self, text: str) -> None:
        self._say(f"{time.monotonic() - self._began:5.1f} s  {text}")

    def _claim(self) -> None:
        """Makes the folder ours, and ends what an earlier cluster left in it."""
        for place in ("/run", "/var/run", "/var/lib", "/var/log", "/proc", "/sys"):
            if self._folder.is_relative_to(place):
                raise ClusterError(
                    f"{self._folder} is below {place}, which the node hides; choose another"
                )
        if self._node.pid:
            raise ClusterError(f"a cluster runs in {self._folder} already; end it first")
        other = host.link_owner()
        if other is not None and other != str(self._folder):
            raise ClusterError(
                f"a cluster runs in {other or 'an unknown folder'}, and there is one a machine at a "
                f"time; end it first: python -m trunkline_dev.cluster down --dir {other}"
            )
        if self._folder.exists() and any(self._folder.iterdir()):
            self.down()
        for hierarchy in host.hierarchies(host.mounts()):
            host.sweep_cgroups(hierarchy, components.CGROUPS)
        self.logs.mkdir(parents=True)
        (self._folder / MARK).touch()

    def _start(self, leash: bool) -> None:
        programs = binaries.prepare(PROGRAMS, say=self._say)
        cni = host.cni_folder()
        assert cni is not None, "usable has said so"
        places = Places(
            folder=self._folder,
            programs=programs,
            containerd=host.program("containerd"),
            runc=host.program("runc"),
            cni=cni,
        )
        self._configure(places)
        self._node.start(leash=leash)
        self._tell("node's namespaces are there")
        commands = components.commands(places)

        def run(*names: str) -> None:
            for name in names:
                self._started[name] = self._node.spawn(commands[name], self.logs / f"{name}.log")

        run("etcd", "containerd", "kube-apiserver")
        self._wait("containerd", self._containerd_answers)
        self.import_images(self._made_images(places))
        self._wait("kube-apiserver", self._api_server_answers)
        self._tell("API server is ready")
        run("kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
        self._ask(self._node_ready)
        self._tell("node is Ready")
        run("kube-router")
        self._ask(self._start_dns)
        self._tell("cluster DNS is ready")
        self.check()

    def _configure(self, at: Places) -> None:
        """Writes certificates and every component's configuration."""
        at.pki.mkdir()
        (at.config / "cni").mkdir(parents=True)
        authority = Authority(at.pki)
        authority.issue(
            "apiserver",
            "CN=kube-apiserver",
            names=(
                network.NODE_ADDRESS,
                network.API_SERVICE_ADDRESS,
                "kubernetes",
                "kubernetes.default",
                "kubernetes.default.svc",
                f"kubernetes.default.svc.{network.DOMAIN}",
            ),
        )
        for user, subject in components.USERS.items():
            authority.issue(user, subject)
            # JSON is YAML too.
            at.kubeconfig(user).write_text(json.dumps(components.kubeconfig(at, user)))
        self.kubeconfig.write_text(json.dumps(components.kubeconfig(at, "admin"), indent=1))
        (at.config / "containerd.toml").write_text(components.containerd(at))
        (at.config / "kubelet.json").write_text(json.dumps(components.kubelet(at)))
        (at.config / "cni" / "pods.conflist").write_text(json.dumps(network.cni()))
        (at.config / "resolv.conf").write_text(f"nameserver {network.DNS_ADDRESS}\n")

    def _made_images(self, at: Places) -> list[Path]:
        busybox = host.busybox()
        assert busybox is not None, "usable has said so"
        archives = []
        for image in images.images(busybox, at.programs / "coredns"):
            archives.append(at.folder / f"{Path(image.name).name.partition(':')[0]}.tar")
            image.write(archives[-1])
        return archives

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{name} is not ready after {START_SECONDS:g} s. {self._tail(name)}"
                )
            time.sleep(0.05)

    def _containerd_answers(self) -> bool:
        try:
            self._node.run("ctr", "version")
        except ClusterError:
            return False
        return True

    def _api_server_answers(self) -> bool:
        pki = self._folder / "pki"
        tls = ssl.create_default_context(cafile=pki / "ca.crt")
        tls.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        client = http.client.HTTPSConnection(
            network.NODE_ADDRESS, network.API_PORT, timeout=5, context=tls
        )
        try:
            client.request("GET", "/readyz")
            return client.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            client.close()

    async def _node_ready(self, api: Api) -> None:
        await api.wait_for_one(NODE_PATH, lambda node: is_true(node, "Ready"), START_SECONDS)

    async def _start_dns(self, api: Api) -> None:
        for path, manifest in dns.manifests().items():
            await api.apply(path, manifest)

        def available(deployment: Json) -> bool:
            return is_true(deployment, "Available")

        await api.wait_for_one(dns.DEPLOYMENT_PATH, available, START_SECONDS)

    def _ask(self, question: Callable[[Api], Coroutine[Any, Any, T]]) -> T:
        """Talks to the API server, in a thread of its own, as the caller's may have a running loop."""
        enough = threading.Event()
        try:
            with ThreadPoolExecutor(1) as thread:
                try:
                    return thread.submit(asyncio.run, self._talk(question, enough)).result()
                finally:
                    enough.set()  # Leaving the pool waits for its thread, also on Ctrl-C.
        except (Expired, ApiError, aiohttp.ClientError) as error:
            self.check()
            raise ClusterError(f"{error}\n{self._tail('kubelet')}") from error

    async def _talk(
        self, question: Callable[[Api], Coroutine[Any, Any, T]], enough: threading.Event
    ) -> T:
        """The answer, or ClusterError as soon as a program has ended that it may depend on."""
        async with Api(self.kubeconfig) as api:
            answer = asyncio.ensure_future(question(api))
            try:
                while not (answer.done() or enough.is_set()):
                    self.check()
                    await asyncio.wait((answer,), timeout=CHECK_SECONDS)
            finally:
                answer.cancel()
                await asyncio.wait((answer,))  # It uses the connection until its end.
            return answer.result()

    def _tail(self, name: str) -> str:
        log = self.logs / f"{name}.log"
        text = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        return f"{log} ends so:\n{text or '(it wrote nothing)'}"
