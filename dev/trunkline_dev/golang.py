"""Compiles the control plane's programs from the modules at the Go proxy.

k8s.io/kubernetes cannot be `go install`ed: its go.mod replaces the modules k8s.io/* by its folder
./staging, which no module carries. A module of our own replaces them by the published ones instead.
Measured on 2 cores with nothing cached: kube-apiserver 5 min 19 s, etcd 32 s.
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

_PACKAGES: Final = {
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "etcd": "go.etcd.io/etcd/server/v3",
}


class CompilationFailed(Exception):
    """The text says which step failed, and how."""


def compile_programs(
    names: Sequence[str],
    folder: Path,
    *,
    kubernetes: str,
    etcd: str,
    say: Callable[[str], None],
) -> None:
    """Puts the named programs into `folder`; raises CompilationFailed."""
    go = _go()
    say(
        f"compiling {', '.join(names)} with Go, because they were neither found nor downloaded; "
        "this happens once and takes about 6 minutes on 2 cores"
    )
    with tempfile.TemporaryDirectory(prefix="trunkline-go-") as work:
        module = _Module(go, Path(work), say)
        module.describe(kubernetes)
        # All of them even if fewer are wanted: the same modules, so that a later compilation of the
        # others finds them cached.
        versions = {name: etcd if name == "etcd" else kubernetes for name in _PACKAGES}
        module.run("fetching modules", "get", *(f"{_PACKAGES[n]}@v{versions[n]}" for n in versions))
        version = f"gitVersion=v{kubernetes}"
        flags = f"-s -w -X k8s.io/component-base/version.{version} -X k8s.io/client-go/pkg/version.{version}"
        for name in names:
            output = ("-o", str(folder / name), _PACKAGES[name])
            module.run(f"compiling {name}", "build", "-mod=mod", f"-ldflags={flags}", *output)


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

    def describe(self, kubernetes: str) -> None:
        """Writes a go.mod with the replacements that the one of Kubernetes has, but published."""
        module = f"k8s.io/kubernetes@v{kubernetes}"
        told = json.loads(self.run("fetching Kubernetes", "mod", "download", "-json", module))
        upstream = Path(told["GoMod"]).read_text()
        staged = sorted(set(re.findall(r"(k8s\.io/[a-z0-9.-]+) => \./staging", upstream)))
        language = re.search(r"^go \S+$", upstream, re.MULTILINE)
        if not staged or not language:
            raise CompilationFailed(f"the go.mod of {module} is not as expected")
        published = f"v0.{kubernetes.partition('.')[2]}"
        lines = [
            "module controlplane",
            language[0],
            f"require k8s.io/kubernetes v{kubernetes}",
            *(f"replace {name} => {name} {published}" for name in staged),
        ]
        (self._folder / "go.mod").write_text("\n".join(lines) + "\n")

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
