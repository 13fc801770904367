"""Downloads the control plane's programs as envtest has them: an index with checksums, and archives.

Source of the format: kubernetes-sigs/controller-tools, envtest-releases.yaml (`hash` is a SHA-512).
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Final

import httpx
import yaml

PROGRAMS: Final = ("etcd", "kube-apiserver", "kubectl")
"""What an archive has."""

INDEX_VARIABLE: Final = "TRUNKLINE_ENVTEST_INDEX"
"""The environment variable for an index elsewhere, such as a mirror's."""
INDEX_URL: Final = (
    "https://raw.githubusercontent.com/kubernetes-sigs/controller-tools/HEAD/envtest-releases.yaml"
)
# Without a network a compilation is what helps, and it must not be kept waiting.
TIMEOUT: Final = httpx.Timeout(30.0, connect=5.0)
INDEX_BYTES: Final = 8 << 20  # It has 0.2 MB.
ARCHIVE_BYTES: Final = 1 << 30  # An archive has 70 MB.


class DownloadFailed(Exception):
    """The text says what could not be had, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    version: str
    url: str
    sha512: str


def download(
    names: Sequence[str],
    folder: Path,
    *,
    version: str,
    machine: str,
    say: Callable[[str], None],
) -> str:
    """Puts the named programs into `folder` and returns their version of Kubernetes.

    That is `version`, or else the newest of the same minor. Raises DownloadFailed.
    """
    index = os.environ.get(INDEX_VARIABLE) or INDEX_URL
    try:
        with (
            httpx.Client(timeout=TIMEOUT, follow_redirects=True) as client,
            (folder / "archive").open("w+b") as file,
        ):
            archive = choose(_index(client, index), version, machine)
            say(f"downloading Kubernetes {archive.version} from {archive.url}")
            _fetch(client, archive, file)
            _unpack(file, names, folder, archive.url)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DownloadFailed(f"{index}: {error or type(error).__name__}") from error
    finally:
        (folder / "archive").unlink(missing_ok=True)
    return archive.version


def choose(releases: dict[str, dict[str, dict[str, str]]], version: str, machine: str) -> Archive:
    """The archive of that version for a machine such as "linux-amd64", or the minor's newest."""
    minor = version.rpartition(".")[0]
    found: dict[tuple[int, int], Archive] = {}
    for release, files in releases.items():
        patch = re.fullmatch(rf"v{re.escape(minor)}\.(\d+)", release)
        entry = files.get(f"envtest-{release}-{machine}.tar.gz")
        if patch and entry:
            number = release.removeprefix("v")
            found[number == version, int(patch[1])] = Archive(
                version=number, url=entry["selfLink"], sha512=entry["hash"]
            )
    if not found:
        raise DownloadFailed(f"the index has no Kubernetes {minor} for {machine}")
    return found[max(found)]


def _index(client: httpx.Client, url: str) -> dict[str, dict[str, dict[str, str]]]:
    text = bytearray()
    with client.stream("GET", url) as response:
        response.raise_for_status()
        for chunk in response.iter_bytes():
            text += chunk
            if len(text) > INDEX_BYTES:
                raise DownloadFailed(f"{url} is longer than {INDEX_BYTES} bytes")
    try:
        releases: dict[str, dict[str, dict[str, str]]] = yaml.safe_load(bytes(text))["releases"]
        well_formed = all(
            {"selfLink", "hash"} <= entry.keys()
            for files in releases.values()
            for entry in files.values()
        )
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise DownloadFailed(f"{url} is no envtest index: {error!r}") from error
    if not well_formed:
        raise DownloadFailed(f"{url} is no envtest index: an entry has no selfLink or no hash")
    return releases


def _fetch(client: httpx.Client, archive: Archive, file: IO[bytes]) -> None:
    digest, size = hashlib.sha512(), 0
    with client.stream("GET", archive.url) as response:
        response.raise_for_status()
        for chunk in response.iter_bytes():
            digest.update(chunk)
            size += len(chunk)
            if size > ARCHIVE_BYTES:
                raise DownloadFailed(f"{archive.url} is longer than {ARCHIVE_BYTES} bytes")
            file.write(chunk)
    if digest.hexdigest() != archive.sha512.lower():
        raise DownloadFailed(
            f"{archive.url} has the wrong checksum: {digest.hexdigest()}, not {archive.sha512}"
        )
    file.seek(0)


def _unpack(file: IO[bytes], names: Sequence[str], folder: Path, url: str) -> None:
    """Takes only files of the wanted names, and only their content."""
    missing = set(names)
    try:
        with tarfile.open(fileobj=file, mode="r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in missing and (content := archive.extractfile(member)):
                    with content, (folder / name).open("wb") as program:
                        while chunk := content.read(1 << 20):
                            program.write(chunk)
                    (folder / name).chmod(0o755)
                    missing.discard(name)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DownloadFailed(f"{url} cannot be unpacked: {error}") from error
    if missing:
        raise DownloadFailed(f"{url} has no {' and no '.join(sorted(missing))}")
