"""The development control plane: where its programs come from, its life, and the client that talks to it."""

import asyncio
import contextlib
import hashlib
import http.server
import io
import json
import os
import select
import shutil
import signal
import ssl
import subprocess
import sys
import tarfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import yaml
from aiohttp import web

from trunkline_dev import binaries, envtest
from trunkline_dev.authority import Authority
from trunkline_dev.controlplane import ControlPlane, ControlPlaneError
from trunkline_dev.kube import Api, ApiError, Expired, Json, KubeconfigError, is_true

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

NAMES = ("etcd", "kube-apiserver")
CACHED = f"kubernetes-{binaries.KUBERNETES}-"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def programs(folder: Path, *, kubernetes: str = "1.36.3", etcd: str = "3.6.8") -> Path:
    """A folder of programs that can say a version and nothing else."""
    program(folder / "etcd", f"echo etcd Version: {etcd}")
    program(folder / "kube-apiserver", f"echo Kubernetes v{kubernetes}")
    return folder


class Machine:
    """A machine as `prepare` sees it: an empty cache, no Go, and a network that only has `index`."""

    def __init__(self, folder: Path, environ: pytest.MonkeyPatch) -> None:
        self.folder, self.said = folder, list[str]()
        self.path = folder / "path"
        self.path.mkdir()
        for name in ("sh", "sleep", "cat", "cp", "mkdir", "chmod", "setpriv"):
            for place in ("/bin", "/usr/bin"):
                if Path(place, name).exists() and not (self.path / name).exists():
                    (self.path / name).symlink_to(Path(place, name))
        environ.setenv("PATH", str(self.path))
        environ.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        environ.delenv("KUBEBUILDER_ASSETS", raising=False)
        environ.setenv(envtest.INDEX_VARIABLE, "http://127.0.0.1:9/index.yaml")
        self.environ = environ

    @property
    def cache(self) -> Path:
        found = list((self.folder / "cache" / "trunkline").glob(f"{CACHED}*"))
        return found[0] if found else Path("/nowhere")

    def prepare(self) -> Path:
        return binaries.prepare(NAMES, say=self.said.append)

    def failure(self) -> str:
        with pytest.raises(binaries.NoBinaries) as caught:
            self.prepare()
        left = {path.name for path in (self.folder / "cache" / "trunkline").iterdir()}
        assert left == {"lock"}, "a failure left something half"
        return str(caught.value)

    def go(self, script: str) -> None:
        """Puts a `go` on the PATH; its first words are answered here, the rest by the script."""
        program(
            self.path / "go",
            f"""
echo "$@" >> {self.folder}/calls
case "$1 $2" in
"env GOVERSION") echo ${{GO_CLAIMS:-go1.26.8}};;
"mod download") echo '{{"GoMod": "{self.folder}/upstream.mod"}}';;
"get "*) cp go.mod {self.folder}/used.mod;;
*) {script};;
esac""",
        )
        (self.folder / "upstream.mod").write_text(
            "module k8s.io/kubernetes\n\ngo 1.26.0\n\nreplace (\n"
            "\tk8s.io/api => ./staging/src/k8s.io/api\n"
            "\tk8s.io/client-go => ./staging/src/k8s.io/client-go\n)\n"
        )


# go build -mod=mod -ldflags=… -o FILE PACKAGE
BUILD = """
case "$6" in *etcd*) echo '#!/bin/sh
echo etcd Version: 3.6.8' > "$5";; *) echo '#!/bin/sh
echo Kubernetes v1.36.3' > "$5";; esac
chmod 755 "$5"
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@contextlib.contextmanager
def mirror(folder: Path) -> Iterator[str]:
    """Serves a folder over HTTP on loopback, and yields its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)  # type: ignore[arg-type]  # typeshed has no way to pass them on

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def publish(folder: Path, url: str, version: str, content: Path, *, checksum: str = "") -> None:
    """Writes an envtest archive of the programs in `content`, and its entry in the index."""
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in sorted(path.name for path in content.iterdir()):
            archive.add(content / name, f"controller-tools/envtest/{name}")
    name = f"envtest-v{version}-{binaries.machine()}.tar.gz"
    (folder / name).write_bytes(buffer.getvalue())
    index = folder / "index.yaml"
    releases = yaml.safe_load(index.read_text())["releases"] if index.exists() else {}
    digest = checksum or hashlib.sha512(buffer.getvalue()).hexdigest()
    releases[f"v{version}"] = {name: {"hash": digest, "selfLink": f"{url}/{name}"}}
    index.write_text(yaml.safe_dump({"releases": releases}))


def test_assets_come_first_and_are_looked_at(machine: Machine, tmp_path: Path) -> None:
    machine.environ.setenv("KUBEBUILDER_ASSETS", str(programs(tmp_path / "assets")))
    assert machine.prepare() == tmp_path / "assets"
    assert machine.said == []
    programs(tmp_path / "assets", kubernetes="1.33.9")
    assert "kube-apiserver is version 1.33.9, older than 1.34" in machine.failure()
    program(tmp_path / "assets" / "kube-apiserver", "echo broken >&2; exit 1")
    assert "--version failed: broken" in machine.failure()


def test_the_cache_comes_before_the_network_and_the_asked_for_version_before_newer_ones(
    machine: Machine, tmp_path: Path
) -> None:
    home = tmp_path / "cache" / "trunkline"
    newer = programs(home / f"kubernetes-1.37.1-{binaries.machine()}", kubernetes="1.37.1")
    programs(home / f"kubernetes-1.20.0-{binaries.machine()}", kubernetes="1.20.0")
    programs(home / "kubernetes-1.38.0-plan9-mips", kubernetes="1.38.0")
    assert machine.prepare() == newer
    exact = programs(home / f"{CACHED}{binaries.machine()}")
    assert machine.prepare() == exact
    assert machine.said == []


def test_a_download_is_verified_kept_and_not_repeated(machine: Machine, tmp_path: Path) -> None:
    with mirror(tmp_path / "mirror") as url:
        machine.environ.setenv(envtest.INDEX_VARIABLE, f"{url}/index.yaml")
        for version in ("1.35.9", "1.36.0", "1.36.1"):
            content = programs(tmp_path / version, kubernetes=version)
            publish(tmp_path / "mirror", url, version, content)
        folder = machine.prepare()
    assert folder.name == f"kubernetes-1.36.1-{binaries.machine()}"
    told = subprocess.run([folder / "kube-apiserver"], capture_output=True, text=True, check=True)
    assert told.stdout == "Kubernetes v1.36.1\n"
    assert "downloading Kubernetes 1.36.1" in machine.said[0]
    machine.said.clear()
    assert machine.prepare() == folder  # The mirror is gone.
    assert machine.said == []


def test_a_download_that_is_not_as_the_index_says_is_refused(
    machine: Machine, tmp_path: Path
) -> None:
    content = programs(tmp_path / "content")
    with mirror(tmp_path / "mirror") as url:
        index = tmp_path / "mirror" / "index.yaml"
        machine.environ.setenv(envtest.INDEX_VARIABLE, f"{url}/index.yaml")
        publish(tmp_path / "mirror", url, "1.36.3", content, checksum="0" * 128)
        assert "has the wrong checksum" in machine.failure()
        (content / "kube-apiserver").unlink()
        publish(tmp_path / "mirror", url, "1.36.3", content)
        assert "has no kube-apiserver" in machine.failure()
        archive = next((tmp_path / "mirror").glob("*.tar.gz"))
        archive.write_bytes(b"no archive")
        digest = hashlib.sha512(b"no archive").hexdigest()
        entry = {"hash": digest, "selfLink": f"{url}/{archive.name}"}
        index.write_text(yaml.safe_dump({"releases": {"v1.36.3": {archive.name: entry}}}))
        assert "cannot be unpacked" in machine.failure()
        archive.unlink()
        assert "404" in machine.failure()
        index.write_text("releases: {v1.35.0: {}}")
        assert "the index has no Kubernetes 1.36" in machine.failure()
        index.write_text("releases: [1]")
        assert "is no envtest index" in machine.failure()


def test_the_one_error_names_all_four_ways_and_what_to_do(machine: Machine) -> None:
    told = machine.failure()
    for words in (
        "- KUBEBUILDER_ASSETS: not set",
        f"- cache: {machine.folder}/cache/trunkline/{CACHED}{binaries.machine()} has no etcd",
        "- download: http://127.0.0.1:9/index.yaml: ",
        "- compile: there is no Go on PATH",
        "install Go 1.26 or newer",
    ):
        assert words in told


def test_an_old_or_failing_go_is_said(machine: Machine) -> None:
    machine.go("echo undefined: x >&2; exit 2")
    machine.environ.setenv("GO_CLAIMS", "go1.25.4")
    assert "is go1.25.4, older than 1.26" in machine.failure()
    machine.environ.delenv("GO_CLAIMS")
    assert "compiling etcd: go build ended with 2: undefined: x" in machine.failure()


def test_a_compilation_builds_what_is_missing_with_published_modules(machine: Machine) -> None:
    machine.go(BUILD)
    folder = machine.prepare()
    assert folder == machine.cache
    used = (machine.folder / "used.mod").read_text()
    assert "go 1.26.0\nrequire k8s.io/kubernetes v1.36.3\n" in used
    assert "replace k8s.io/client-go => k8s.io/client-go v0.36.3\n" in used
    assert machine.said[0].startswith("no download: http://127.0.0.1:9/index.yaml")
    assert "because they were neither found nor downloaded" in machine.said[1]
    (folder / "etcd").unlink()
    assert machine.prepare() == folder
    calls = (machine.folder / "calls").read_text()
    assert (calls.count("cmd/kube-apiserver\n"), calls.count("etcd/server/v3\n")) == (1, 2)


def test_what_the_archive_lacks_is_compiled_and_the_rest_is_not(
    machine: Machine, tmp_path: Path
) -> None:
    machine.go(BUILD)
    content = programs(tmp_path / "content")
    with mirror(tmp_path / "mirror") as url:
        machine.environ.setenv(envtest.INDEX_VARIABLE, f"{url}/index.yaml")
        publish(tmp_path / "mirror", url, "1.36.3", content)
        folder = binaries.prepare((*NAMES, "kubelet"), say=machine.said.append)
    assert {path.name for path in folder.iterdir()} == {*NAMES, "kubelet"}
    built = [line for line in (tmp_path / "calls").read_text().splitlines() if line[:5] == "build"]
    assert [line.rpartition("/")[2] for line in built] == ["kubelet"]
    assert "no download: there is none of kubelet" in machine.said


PREPARE = [sys.executable, "-m", "trunkline_dev.binaries"]


@contextlib.contextmanager
def preparing(*, until: str) -> Iterator[subprocess.Popen[str]]:
    """A process that prepares the programs and has got as far as saying `until`."""
    with subprocess.Popen(
        [sys.executable, "-m", "trunkline_dev.binaries"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr
            said: list[str] = []
            while until not in (line := process.stderr.readline()):
                said.append(line)
                assert line, "".join(said)
            yield process
        finally:
            process.kill()


def test_of_two_processes_one_compiles_and_the_other_waits(machine: Machine) -> None:
    gate = machine.folder / "gate"
    os.mkfifo(gate)
    machine.go(f'case "$6" in *etcd*) cat {gate} > /dev/null;; esac; {BUILD}')
    with (
        preparing(until="compiling etcd …") as first,
        preparing(until="waiting for another process") as second,
    ):
        gate.write_text("")
        answers = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert answers == [f"{machine.cache}\n"] * 2
    calls = (machine.folder / "calls").read_text()
    assert (calls.count("cmd/kube-apiserver\n"), calls.count("etcd/server/v3\n")) == (1, 1)


def test_an_interrupted_compilation_leaves_nothing(machine: Machine) -> None:
    os.mkfifo(machine.folder / "pid")
    machine.go(f"echo $$ > {machine.folder}/pid; exec sleep 1000")
    with preparing(until="compiling etcd …") as process:
        compiler = os.pidfd_open(int((machine.folder / "pid").read_text()))
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (1, "interrupted; nothing half-done was kept\n")
    assert [path.name for path in (machine.folder / "cache" / "trunkline").iterdir()] == ["lock"]
    # Interrupted before it had hold of the compiler, the process takes it along by the leash alone,
    # and that is a moment later.
    with os.fdopen(compiler):
        assert select.select([compiler], [], [], 20)[0]


# The control plane


def crd(plural: str) -> Json:
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.example.com"},
        "spec": {
            "group": "example.com",
            "scope": "Namespaced",
            "names": {"plural": plural, "kind": plural.title()},
            "versions": [version],
        },
    }


async def test_a_new_kind_can_be_used_as_soon_as_it_is_established(
    api: Api, namespace: str
) -> None:
    owls = f"/apis/example.com/v1/namespaces/{namespace}/owls"
    await api.apply(f"{CRDS}/owls.example.com", crd("owls"))
    await api.wait_for_one(f"{CRDS}/owls.example.com", lambda found: is_true(found, "Established"))
    assert await api.list(owls) == []
    owl = {"apiVersion": "example.com/v1", "kind": "Owls", "metadata": {"name": "a"}, "size": 1}
    await api.apply(f"{owls}/a", owl)
    assert (await api.patch(f"{owls}/a", {"size": 2}))["size"] == 2
    with pytest.raises(ApiError, match="already exists") as caught:
        await api.create(owls, owl)
    assert (caught.value.status, caught.value.reason) == (409, "AlreadyExists")
    await api.delete(f"{owls}/a")
    await api.delete(f"{owls}/a")
    await api.wait_gone(f"{owls}/a")
    await api.delete(f"{CRDS}/owls.example.com")


async def test_a_wait_in_vain_says_what_was_there_instead(api: Api, namespace: str) -> None:
    path = f"/api/v1/namespaces/{namespace}"
    with pytest.raises(Expired, match=f"{namespace}, phase=Active"):
        await api.wait_for_one(path, lambda found: found["status"]["phase"] == "Gone", timeout=0.5)
    with pytest.raises(Expired, match="there was nothing"):
        await api.wait_for_one(f"{path}/pods/none", timeout=0.5)
    with pytest.raises(Expired, match="404"):
        await api.wait_for("/apis/example.com/v1/bats", bool, timeout=0.5)


@contextlib.asynccontextmanager
async def api_of(bats: Handler, folder: Path) -> AsyncIterator[Api]:
    """A client of a server that answers at /bats."""
    authority = Authority(folder)
    authority.issue("server", "CN=server")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(folder / "server.crt", folder / "server.key")
    app = web.Application()
    app.router.add_get("/bats", bats)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        url = f"https://127.0.0.1:{runner.addresses[0][1]}"
        async with Api(kubeconfig(folder, url)) as api:
            yield api
    finally:
        await runner.cleanup()


async def test_the_storage_of_a_new_kind_is_waited_for_and_other_refusals_are_not(
    tmp_path: Path,
) -> None:
    answers = [
        "storage is (re)initializing",
        "storage is (re)initializing",
        "",
        "too many requests",
    ]

    async def bats(_: web.Request) -> web.StreamResponse:
        if not (message := answers.pop(0)):
            return web.json_response({"items": [{"size": 1}]})
        body = {"kind": "Status", "message": message, "reason": "TooManyRequests", "code": 429}
        return web.json_response(body, status=429)

    async with api_of(bats, tmp_path) as api:
        assert await api.list("/bats") == [{"size": 1}]
        with pytest.raises(ApiError, match="429 TooManyRequests: too many requests"):
            await api.list("/bats")
    assert answers == []


async def test_a_follower_starts_afresh_after_every_trouble(tmp_path: Path) -> None:
    """A server of the list-and-watch protocol that goes wrong in each of the known ways."""
    lists: list[str] = []

    async def bats(request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            lists.append(str(len(lists) + 1))
            if len(lists) == 2:
                return web.Response(status=503, text="the server is starting")
            item = {"metadata": {"name": "bat", "uid": "1", "resourceVersion": lists[-1]}}
            return web.json_response({"metadata": {"resourceVersion": lists[-1]}, "items": [item]})
        assert request.query["resourceVersion"] == lists[-1]
        response = web.StreamResponse()
        await response.prepare(request)
        if len(lists) == 1:
            expired = {"kind": "Status", "code": 410, "message": "too old resource version"}
            await response.write(json.dumps({"type": "ERROR", "object": expired}).encode() + b"\n")
        elif len(lists) == 3 and request.transport:
            request.transport.abort()
        elif len(lists) == 4:
            gone = {"metadata": {"name": "bat", "uid": "1"}}
            await response.write(json.dumps({"type": "DELETED", "object": gone}).encode() + b"\n")
        return response

    troubles: list[str] = []
    seen: list[list[str]] = []
    async with api_of(bats, tmp_path) as api:
        changes = api.follow("/bats", troubled=troubles.append)
        async with asyncio.timeout(30), contextlib.aclosing(changes):
            async for objects in changes:
                seen.append([item["metadata"]["resourceVersion"] for item in objects.values()])
                if not objects:
                    break
    assert seen == [["1"], ["3"], ["4"], []]
    assert len(troubles) == 2
    assert "503: the server is starting" in troubles[0]


def kubeconfig(folder: Path, url: str) -> Path:
    user = {"client-certificate": f"{folder}/server.crt", "client-key": f"{folder}/server.key"}
    cluster = {"server": url, "certificate-authority": f"{folder}/ca.crt"}
    config = {
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("text", ["", "[]", "current-context: x", "{: }"])
def test_what_is_no_kubeconfig_is_refused_with_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "kubeconfig").write_text(text)
    with pytest.raises(KubeconfigError, match="is no kubeconfig of a development cluster"):
        Api(tmp_path / "kubeconfig")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_a_control_plane_leaves_nothing_however_it_ends(number: signal.Signals) -> None:
    plane = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "trunkline_dev.controlplane", stdout=subprocess.PIPE
    )
    try:
        assert plane.stdout
        line = (await plane.stdout.readline()).decode().strip()
        config = Path(line.removeprefix("export KUBECONFIG="))
        children = Path(f"/proc/{plane.pid}/task/{plane.pid}/children").read_text().split()
        assert len(children) == 2
        handles = [os.pidfd_open(int(pid)) for pid in children]
        async with Api(config) as api:
            await api.get("/api/v1/namespaces/default")
        plane.send_signal(number)
        code = await plane.wait()
    finally:
        if plane.returncode is None:
            plane.kill()
            await plane.wait()
    for handle in handles:
        with os.fdopen(handle):
            assert (await asyncio.to_thread(select.select, [handle], [], [], 20))[0]
    if number == signal.SIGKILL:  # Nobody was left to remove it.
        shutil.rmtree(config.parent)
    else:
        assert code == 0
        assert not config.parent.exists()


def test_a_control_plane_that_does_not_start_shows_why_and_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = programs(tmp_path / "assets")
    program(
        folder / "etcd",
        "test $1 = --version && echo etcd Version: 3.6.8 || { echo no room for data; exit 4; }",
    )
    program(folder / "kube-apiserver", "test $1 = --version && echo v1.36.3 || exec sleep 1000")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(folder))
    plane = ControlPlane()
    with pytest.raises(ControlPlaneError, match=r"etcd ended with 4.*\n.*no room for data"):
        plane.__enter__()
    assert plane.pids == ()
    assert not plane.root.exists()
