"""The programs of a cluster: found, downloaded, or compiled.

`prepare` tries, in this order,

1. the folder that KUBEBUILDER_ASSETS names;
2. the cache, $XDG_CACHE_HOME/trunkline/kubernetes-<version>-<os>-<arch>/ (~/.cache without it);
3. a download of the archive that kubebuilder's envtest uses, its checksum verified;
4. a compilation from the modules at the Go proxy.

Whatever comes from 3 or 4 goes to the cache, a whole file at a time, so that neither an interruption
nor a second process leaves a half one.
"""

import argparse
import contextlib
import fcntl
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trunkline_dev import envtest, golang

KUBERNETES: Final = golang.KUBERNETES
MINIMUM: Final = {
    "etcd": (3, 5),
    "kube-apiserver": (1, 34),
    "kube-controller-manager": (1, 34),
    "kube-scheduler": (1, 34),
    "kube-proxy": (1, 34),
    "kubelet": (1, 34),
    "kubectl": (1, 34),
    "kube-router": (2,),
    "coredns": (1, 11),
}
"""CRDs and probes as this project uses them work from here on; older API servers are passed over."""

VERSION_SECONDS: Final = 30.0
"""A program that cannot say its version in this time is no use; it takes 0.2 s."""

Say = Callable[[str], None]


class Unavailable(Exception):
    """One of the four ways did not give the programs; the text says why."""


class NoBinaries(RuntimeError):
    """None of the four ways worked; the text names each with its failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to prepare, and the folder that holds the caches."""

    names: tuple[str, ...]
    caches: Path
    say: Say


def prepare(names: Sequence[str] = ("etcd", "kube-apiserver"), *, say: Say) -> Path:
    """A folder that holds all of the named programs, each new enough.

    `say` gets a line whenever there is something to wait for. Raises NoBinaries, and ValueError for a
    name that is not in MINIMUM.
    """
    if unknown := set(names) - MINIMUM.keys():
        raise ValueError(f"cannot prepare {', '.join(sorted(unknown))}; there are {list(MINIMUM)}")
    wanted = Wanted(names=tuple(names), caches=_caches(), say=say)
    failures: list[str] = []
    for way, attempt in (("KUBEBUILDER_ASSETS", _from_assets), ("cache", _from_cache)):
        try:
            return attempt(wanted)
        except Unavailable as failure:
            failures.append(f"{way}: {failure}")
    with _locked(wanted):
        for way, attempt in (
            ("cache", _from_cache),  # Another process may have filled it meanwhile.
            ("download", _from_download),
            ("compile", _from_compilation),
        ):
            try:
                return attempt(wanted)
            except Unavailable as failure:
                if f"{way}: {failure}" not in failures:
                    failures.append(f"{way}: {failure}")
                if way == "download":  # What follows takes minutes, so they shall know why.
                    say(f"no download: {failure}")
    raise NoBinaries(
        f"found no way to get {', '.join(names)} for a development control plane:\n"
        + "\n".join(f"- {failure}" for failure in failures)
        + f"\nSet KUBEBUILDER_ASSETS to a folder that has them, put them into {_cache(wanted)}, "
        f"allow the download, or install Go {golang.MINIMUM_TEXT} or newer."
    )


def _caches() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "trunkline"


def machine() -> str:
    """As in "linux-amd64"."""
    processor = platform.machine().lower()
    names = {"x86_64": "amd64", "aarch64": "arm64"}
    return f"{sys.platform}-{names.get(processor, processor)}"


def _cache(wanted: Wanted, version: str = KUBERNETES) -> Path:
    return wanted.caches / f"kubernetes-{version}-{machine()}"


def _from_assets(wanted: Wanted) -> Path:
    if not (folder := os.environ.get("KUBEBUILDER_ASSETS")):
        raise Unavailable("not set")
    _verify(Path(folder), wanted.names)
    return Path(folder)


def _from_cache(wanted: Wanted) -> Path:
    others = wanted.caches.glob(f"kubernetes-*-{machine()}")
    newest = sorted(others, key=lambda folder: _version(folder.name), reverse=True)
    for folder in (_cache(wanted), *newest):
        with contextlib.suppress(Unavailable):
            _verify(folder, wanted.names)
            return folder
    _verify(_cache(wanted), wanted.names)  # Says why not.
    return _cache(wanted)


def _verify(folder: Path, names: Sequence[str]) -> None:
    if missing := [name for name in names if not os.access(folder / name, os.X_OK)]:
        raise Unavailable(f"{folder} has no {' and no '.join(missing)}")
    for name in names:
        version = _version(_told_version(folder / name))
        if version < MINIMUM[name]:
            told, least = (".".join(map(str, numbers)) for numbers in (version, MINIMUM[name]))
            raise Unavailable(f"{folder / name} is version {told}, older than {least}")


def _usable(folder: Path, name: str) -> bool:
    try:
        _verify(folder, [name])
    except Unavailable:
        return False
    return True


def _told_version(program: Path) -> str:
    question = ("version", "--client") if program.name == "kubectl" else ("--version",)
    try:
        answer = subprocess.run(
            [program.name, *question],  # kube-router repeats this, and the folder has a version.
            executable=program,
            check=False,
            capture_output=True,
            text=True,
            timeout=VERSION_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{program} does not run here: {error}") from error
    if answer.returncode != 0:
        raise Unavailable(f"{program} {question[0]} failed: {answer.stderr.strip()[-500:]}")
    return answer.stdout or answer.stderr  # The latter is where kube-router says it.


def _version(text: str) -> tuple[int, ...]:
    """The first version in a text, or () where there is none."""
    found = re.search(r"\d+(\.\d+)+", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def _from_download(wanted: Wanted) -> Path:
    """What the archive lacks is left to the compiler, which then finds the others in the cache."""
    lacking = [name for name in wanted.names if name not in envtest.PROGRAMS]
    names = [name for name in wanted.names if name in envtest.PROGRAMS]
    if lacking and all(_usable(_cache(wanted), name) for name in names):
        raise Unavailable(f"there is none of {', '.join(lacking)}")
    with _staging(wanted) as staging:
        try:
            version = envtest.download(
                names, staging, version=KUBERNETES, machine=machine(), say=wanted.say
            )
        except envtest.DownloadFailed as failure:
            raise Unavailable(str(failure)) from failure
        folder = _keep(wanted, staging, names, _cache(wanted, version))
    if lacking:
        raise Unavailable(f"there is none of {', '.join(lacking)}")
    return folder


def _from_compilation(wanted: Wanted) -> Path:
    folder = _cache(wanted)
    missing = [name for name in wanted.names if not _usable(folder, name)]
    with _staging(wanted) as staging:
        try:
            golang.compile_programs(missing, staging, say=wanted.say)
        except golang.CompilationFailed as failure:
            raise Unavailable(str(failure)) from failure
        _keep(wanted, staging, missing, folder)
    _verify(folder, wanted.names)
    return folder


@contextlib.contextmanager
def _staging(wanted: Wanted) -> Iterator[Path]:
    """A folder for half-done files on the cache's file system, so that they can be renamed into it."""
    with tempfile.TemporaryDirectory(prefix="staging-", dir=wanted.caches) as folder:
        yield Path(folder)


def _keep(wanted: Wanted, staging: Path, names: Sequence[str], folder: Path) -> Path:
    _verify(staging, names)
    folder.mkdir(exist_ok=True)
    for name in names:
        (staging / name).replace(folder / name)
    wanted.say(f"{', '.join(names)} kept in {folder}")
    return folder


@contextlib.contextmanager
def _locked(wanted: Wanted) -> Iterator[None]:
    """Holds the cache for this process alone; the lock goes with the process, however it ends."""
    try:
        wanted.caches.mkdir(parents=True, exist_ok=True)
        lock = (wanted.caches / "lock").open("ab")
    except OSError as error:
        raise NoBinaries(
            f"cannot write the cache for a control plane's programs: {error}; "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wanted.say(f"waiting for another process that prepares {wanted.caches}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left_by_a_killed_one in wanted.caches.glob("staging-*"):
            shutil.rmtree(left_by_a_killed_one)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trunkline_dev.binaries",
        description="Prepare the programs of a development control plane, and print their folder.",
    )
    parser.add_argument("names", nargs="*", default=["etcd", "kube-apiserver"], metavar="NAME")
    for number in (signal.SIGTERM, signal.SIGINT):  # A shell's background jobs ignore the latter.
        signal.signal(number, signal.default_int_handler)
    try:
        print(prepare(parser.parse_args().names, say=lambda text: print(text, file=sys.stderr)))
    except (NoBinaries, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing half-done was kept")


if __name__ == "__main__":
    main()
