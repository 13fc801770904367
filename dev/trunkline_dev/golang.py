"""Compiles a cluster's programs from the modules at the Go proxy.

k8s.io/kubernetes cannot be `go install`ed: its go.mod replaces the modules k8s.io/* by its folder
./staging, which no module carries. A module of our own replaces them by the published ones instead.
CoreDNS as published has plugins for three clouds; a main package of our own takes the five that a
cluster without an outside needs.
Measured on 2 cores with nothing cached: kube-apiserver 5 min 19 s, etcd 32 s, the other programs of
Kubernetes together 2 min 47 s, CoreDNS and kube-router 4 CPU minutes each.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from trunkline_dev.leash import leashed

MINIMUM: Final = (1, 26)
"""What the go.mod of Kubernetes 1.36 asks for."""
MINIMUM_TEXT: Final = ".".join(map(str, MINIMUM))
REPORT_SECONDS: Final = 15.0
"""How often a long step says that it still runs."""
LOG_TAIL_BYTES: Final = 2000

KUBERNETES: Final = "1.36.3"
ETCD: Final = "3.6.8"
COREDNS: Final = "1.15.0"
KUBE_ROUTER: Final = "2.1.0"
"""The newest that the Go proxy has as a module."""

_IN_KUBERNETES: Final = {
    **{
        name: f"k8s.io/kubernetes/cmd/{name}@v{KUBERNETES}"
        for name in (
            "kube-apiserver",
            "kube-controller-manager",
            "kube-scheduler",
            "kube-proxy",
            "kubelet",
            "kubectl",
        )
    },
    "etcd": f"go.etcd.io/etcd/server/v3@v{ETCD}",
}
"""These share most of their modules, so that they are compiled in one."""

_COREDNS_MODULE: Final = "github.com/coredns/coredns"
_KUBE_ROUTER_MODULE: Final = "github.com/cloudnativelabs/kube-router/v2"

_COREDNS_MAIN: Final = """\
package main

import (
\t"github.com/coredns/coredns/core/dnsserver"
\t"github.com/coredns/coredns/coremain"

\t_ "github.com/coredns/coredns/plugin/cache"
\t_ "github.com/coredns/coredns/plugin/errors"
\t_ "github.com/coredns/coredns/plugin/health"
\t_ "github.com/coredns/coredns/plugin/kubernetes"
\t_ "github.com/coredns/coredns/plugin/ready"
\t_ "github.com/coredns/coredns/plugin/template"
)

func main() {
\tdnsserver.Directives = []string{"errors", "health", "ready", "cache", "kubernetes", "template"}
\tcoremain.Run()
}
"""


class CompilationFailed(Exception):
    """The text says which step failed, and how."""


def compile_programs(names: Sequence[str], folder: Path, *, say: Callable[[str], None]) -> None:
    """Puts the named programs into `folder`; raises CompilationFailed."""
    go = _go()
    say(
        f"compiling {', '.join(names)} with Go, because they were neither found nor downloaded; "
        "this happens once and takes up to 6 minutes each on 2 cores"
    )
    of_kubernetes = [name for name in names if name in _IN_KUBERNETES]
    for several, build in (
        (of_kubernetes, _build_kubernetes),
        ([name for name in names if name == "coredns"], _build_coredns),
        ([name for name in names if name == "kube-router"], _build_kube_router),
    ):
        if several:
            with tempfile.TemporaryDirectory(prefix="trunkline-go-") as work:
                build(_Module(go, Path(work), say), several, folder)


def _build_kubernetes(module: "_Module", names: Sequence[str], folder: Path) -> None:
    module.describe_kubernetes()
    # All of them even if fewer are wanted: the same modules, so that a later compilation of the
    # others finds them cached.
    module.run("fetching modules", "get", *_IN_KUBERNETES.values())
    version = f"gitVersion=v{KUBERNETES}"
    flags = f"-X k8s.io/component-base/version.{version} -X k8s.io/client-go/pkg/version.{version}"
    for name in names:
        module.build(_IN_KUBERNETES[name].partition("@")[0], folder / name, flags)


def _build_coredns(module: "_Module", _: Sequence[str], folder: Path) -> None:
    module.describe()
    module.write("main.go", _COREDNS_MAIN)
    module.run("fetching CoreDNS", "get", f"{_COREDNS_MODULE}@v{COREDNS}")
    module.build(".", folder / "coredns")


def _build_kube_router(module: "_Module", _: Sequence[str], folder: Path) -> None:
    package = f"{_KUBE_ROUTER_MODULE}/cmd/kube-router"
    module.describe()
    module.run("fetching kube-router", "get", f"{package}@v{KUBE_ROUTER}")
    flags = f"-X {_KUBE_ROUTER_MODULE}/pkg/version.Version=v{KUBE_ROUTER}"
    module.build(package, folder / "kube-router", flags)


def _go() -> str:
    if not (go := shutil.which("go")):
        raise CompilationFailed("there is no Go on PATH")
    # Where a go.mod could ask for another toolchain, the answer would be about that one.
    answer = subprocess.run(
        [go, "env", "GOVERSION"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tempfile.gettempdir(),
    )
    found = re.match(r"go(\d+)\.(\d+)", answer.stdout)
    if not found:
        told = (answer.stdout + answer.stderr).strip()[-300:]
        raise CompilationFailed(f"{go} does not say its version: {told}")
    if (int(found[1]), int(found[2])) < MINIMUM:
        raise CompilationFailed(f"{go} is {answer.stdout.strip()}, older than {MINIMUM_TEXT}")
    return go


class _Module:
    """A module of its own in a temporary folder, and the go commands that run in it."""

    def __init__(self, go: str, folder: Path, say: Callable[[str], None]) -> None:
        self._go, self._folder, self._say = go, folder, say

    def write(self, name: str, text: str) -> None:
        (self._folder / name).write_text(text)

    def describe(self) -> None:
        """Writes a go.mod that requires nothing yet."""
        self.write("go.mod", f"module cluster\n\ngo {MINIMUM_TEXT}\n")

    def describe_kubernetes(self) -> None:
        """Writes a go.mod with the replacements that the one of Kubernetes has, but published."""
        module = f"k8s.io/kubernetes@v{KUBERNETES}"
        told = json.loads(self.run("fetching Kubernetes", "mod", "download", "-json", module))
        upstream = Path(told["GoMod"]).read_text()
        staged = sorted(set(re.findall(r"(k8s\.io/[a-z0-9.-]+) => \./staging", upstream)))
        language = re.search(r"^go \S+$", upstream, re.MULTILINE)
        if not staged or not language:
            raise CompilationFailed(f"the go.mod of {module} is not as expected")
        published = f"v0.{KUBERNETES.partition('.')[2]}"
        lines = [
            "module cluster",
            language[0],
            f"require k8s.io/kubernetes v{KUBERNETES}",
            *(f"replace {name} => {name} {published}" for name in staged),
        ]
        self.write("go.mod", "\n".join(lines) + "\n")

    def build(self, package: str, program: Path, flags: str = "") -> None:
        output = ("-o", str(program), package)
        self.run(
            f"compiling {program.name}", "build", "-mod=mod", f"-ldflags=-s -w {flags}", *output
        )

    def run(self, step: str, *arguments: str) -> str:
        """Runs a go command, saying now and then that it still runs, and returns what it printed."""
        began = time.monotonic()
        self._say(f"{step} …")
        with (
            (self._folder / "log").open("wb+") as log,
            self._running(arguments, log.fileno()) as go,
        ):
            while True:
                try:
                    code = go.wait(REPORT_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    self._say(f"{step} … {time.monotonic() - began:.0f} s")
            log.seek(0)
            tail = log.read()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        if code != 0:
            raise CompilationFailed(f"{step}: go {arguments[0]} ended with {code}: {tail}")
        self._say(f"{step}: done in {time.monotonic() - began:.0f} s")
        return (self._folder / "output").read_text()

    @contextlib.contextmanager
    def _running(self, arguments: Sequence[str], log: int) -> Iterator[subprocess.Popen[bytes]]:
        """A go command in a process group of its own; an interruption ends its compilers too."""
        with (self._folder / "output").open("wb") as output:
            go = subprocess.Popen(
                leashed([self._go, *arguments]),
                cwd=self._folder,
                env=os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield go
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(go.pid, signal.SIGKILL)
            go.wait()
