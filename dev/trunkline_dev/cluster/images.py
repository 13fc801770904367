"""Container images made here, as OCI archives that containerd imports. No registry, no builder."""

import hashlib
import io
import json
import platform
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trunkline_dev.kube import Json

PAUSE: Final = "localhost/trunkline/pause:1"
BUSYBOX: Final = "localhost/trunkline/busybox:1"
COREDNS: Final = "localhost/trunkline/coredns:1"

_OCI: Final = "application/vnd.oci.image"
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What goes into an image: programs by their path in it, links by path, and the command."""

    name: str
    programs: Mapping[str, Path]
    command: Sequence[str]
    links: Mapping[str, str]

    def write(self, archive: Path) -> None:
        """Writes the archive; the same input gives the same bytes."""
        layer = self._layer()
        architecture = _ARCHITECTURES.get(platform.machine(), platform.machine())
        settings = {"Entrypoint": list(self.command), "Env": ["PATH=/bin"]}
        config = _json(
            {
                "architecture": architecture,
                "os": "linux",
                "config": settings,
                "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
            }
        )
        manifest = _json(
            {
                "schemaVersion": 2,
                "mediaType": f"{_OCI}.manifest.v1+json",
                "config": _descriptor(config, f"{_OCI}.config.v1+json"),
                "layers": [_descriptor(layer, f"{_OCI}.layer.v1.tar")],
            }
        )
        entry = _descriptor(manifest, f"{_OCI}.manifest.v1+json") | {
            "platform": {"architecture": architecture, "os": "linux"},
            "annotations": {"io.containerd.image.name": self.name},
        }
        files = {
            "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
            "index.json": _json({"schemaVersion": 2, "manifests": [entry]}),
        }
        for blob in (config, manifest, layer):
            files[f"blobs/sha256/{_digest(blob).partition(':')[2]}"] = blob
        with tarfile.open(archive, "w") as tar:
            for path, content in files.items():
                _add(tar, path, content, 0o644)

    def _layer(self) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for folder in ("bin", "tmp"):
                member = tarfile.TarInfo(folder)
                member.type, member.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
                tar.addfile(member)
            for path, program in sorted(self.programs.items()):
                _add(tar, path, program.read_bytes(), 0o755)
            for path, target in sorted(self.links.items()):
                member = tarfile.TarInfo(path)
                member.type, member.linkname = tarfile.SYMTYPE, target
                tar.addfile(member)
        return buffer.getvalue()


def images(busybox: Path, coredns: Path) -> tuple[Image, ...]:
    """The images that the cluster itself needs, and one with a shell for tests."""
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout
    shell = {"bin/busybox": busybox}
    return (
        Image(name=PAUSE, programs=shell, command=("/bin/busybox", "sleep", "infinity"), links={}),
        Image(
            name=BUSYBOX,
            programs=shell,
            command=("/bin/sh",),
            links={f"bin/{name}": "busybox" for name in applets.split() if name != "busybox"},
        ),
        Image(name=COREDNS, programs={"bin/coredns": coredns}, command=("/bin/coredns",), links={}),
    )


def _add(tar: tarfile.TarFile, path: str, content: bytes, mode: int) -> None:
    member = tarfile.TarInfo(path)
    member.size, member.mode = len(content), mode
    tar.addfile(member, io.BytesIO(content))


def _json(content: Json) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _descriptor(content: bytes, kind: str) -> Json:
    return {"mediaType": kind, "digest": _digest(content), "size": len(content)}
