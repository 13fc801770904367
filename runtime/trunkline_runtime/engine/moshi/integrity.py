"""SHA-256 of weights: against a list beside them, as `sha256sum` writes it, or one that is given."""

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from trunkline_runtime.engine.moshi.models import ModelError

LIST_NAME: Final = "SHA256SUMS"


def listed(folder: Path) -> dict[str, str]:
    """Name to digest of the list in a folder; empty where there is none. Raises `ModelError`."""
    path = folder / LIST_NAME
    if not path.is_file():
        return {}
    return parsed(path.read_text(), str(path))


def parsed(text: str, where: str) -> dict[str, str]:
    """Lines of a digest, two blanks (or a blank and a star) and a name."""
    digests = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line.rstrip())
        if match is not None:
            digests[match[2]] = match[1].lower()
        elif line.strip():
            raise ModelError(
                f"{where} line {number} is no checksum: write it with sha256sum FILE …"
            )
    return digests


class Verification:
    """Hashes files beside the loading, a thread each: the pages that one reads the other finds."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(thread_name_prefix="sha256")
        self._found: list[tuple[Path, str, Future[str]]] = []

    def begin(self, files: Mapping[Path, str]) -> None:
        """Starts to hash files, each with the digest that it should have."""
        for path, wanted in files.items():
            self._found.append((path, wanted, self._pool.submit(sha256, path)))

    def finish(self) -> None:
        """Waits. Raises `ModelError` for the first file that is not what the list says."""
        for path, wanted, future in self._found:
            found = future.result()
            if found != wanted.lower():
                raise ModelError(
                    f"{path} is not the file that its checksum belongs to: SHA-256 {found},"
                    f" and {wanted} is wanted; copy or download it again"
                )

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def sha256(path: Path) -> str:
    """A file's digest, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
