"""Files of a repository of the Hugging Face Hub, through its own client and cache.

The first file fixes the commit, and all others are taken from that one: a branch may move in between. A
repository whose files are in the cache, asked for by commit, costs no request; one asked for by branch or tag
costs one, and none when the Hub cannot be reached or `HF_HUB_OFFLINE` is set.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import requests
from huggingface_hub import (
    constants,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import get_hf_file_metadata, repo_folder_name

from trunkline_runtime.engine.moshi.integrity import LIST_NAME
from trunkline_runtime.engine.moshi.models import ModelError
from trunkline_runtime.engine.moshi.progress import Phase, Progress
from trunkline_runtime.engine.moshi.source import (
    CONFIG_NAME,
    Checkpoint,
    HubSource,
    file_names,
    read_config,
    understood,
)

WATCH_SECONDS: Final = 0.5  # between two looks at what a download has written


def snapshot(source: HubSource, progress: Progress, *, with_codec: bool = True) -> Checkpoint:
    """The repository's files, of one commit, in the cache. Raises `ModelError`.

    Without the codec, no file of Mimi is downloaded.
    """
    with _explained(source):
        config_path = _optional(source, CONFIG_NAME, source.revision)
        config = {} if config_path is None else read_config(config_path)
        names = file_names(config, with_codec=with_codec)
        if config_path is None:
            config_path = _file(source, names[0], source.revision).parent / CONFIG_NAME
        folder = config_path.parent  # …/snapshots/<commit>
        _optional(source, LIST_NAME, folder.name)
        _download(source, names, folder.name, progress)
    return understood(config, folder, f"{source.repository}@{folder.name}", with_codec=with_codec)


def _download(source: HubSource, names: list[str], commit: str, progress: Progress) -> None:
    wanted = [name for name in names if not _cached(source, name, commit)]
    if not wanted:
        return
    sizes = 0
    for name in wanted:
        url = hf_hub_url(source.repository, name, revision=commit, endpoint=source.endpoint)
        token = source.token or get_token()
        sizes += get_hf_file_metadata(url, token=token, endpoint=source.endpoint).size or 0
    with progress.phase(Phase.DOWNLOAD, sizes), _watched(source, progress):
        for name in wanted:
            _file(source, name, commit)


def _cache(source: HubSource) -> Path:
    return source.cache or Path(constants.HF_HUB_CACHE)


def _cached(source: HubSource, name: str, commit: str) -> bool:
    found = try_to_load_from_cache(source.repository, name, source.cache, commit)
    return isinstance(found, str)


def _file(source: HubSource, name: str, revision: str) -> Path:
    return Path(
        hf_hub_download(
            source.repository,
            name,
            revision=revision,
            cache_dir=source.cache,
            token=source.token,
            endpoint=source.endpoint,
        )
    )


def _optional(source: HubSource, name: str, revision: str) -> Path | None:
    try:
        return _file(source, name, revision)
    except LocalEntryNotFoundError:
        # Out of reach, so the cache alone counts: it remembers which files a commit does not have, but
        # not for a mirror that was filled by hand.
        if name == LIST_NAME:
            return None
        raise
    except EntryNotFoundError:
        return None


@contextlib.contextmanager
def _watched(source: HubSource, progress: Progress) -> Iterator[None]:
    """Tells of the bytes that arrive in the cache; its client has no way to say so."""
    blobs = _cache(source) / repo_folder_name(repo_id=source.repository, repo_type="model")
    blobs /= "blobs"
    over = threading.Event()
    begun = _written(blobs)

    def watch() -> None:
        told = begun
        while not over.wait(WATCH_SECONDS):
            now = _written(blobs)
            progress.add(max(now - told, 0))
            told = max(now, told)

    watcher = threading.Thread(target=watch, name="download", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _written(folder: Path) -> int:
    total = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # a finished download has just been renamed
            total += path.stat().st_size
    return total


@contextlib.contextmanager
def _explained(source: HubSource) -> Iterator[None]:
    """The client's errors as sentences that say what to do."""
    repository, revision = source.repository, source.revision
    cache = _cache(source)
    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{repository} is gated: accept its terms on the Hub, and put a token that may read it"
            " into HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the Hub shows no repository {repository}: check the name, and HF_TOKEN if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{repository} has no revision {revision!r}: give a branch, a tag or a commit"
        ) from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise ModelError(
            f"{source} is not whole in the cache {cache}, and {why}: download it there first, or set"
            " HF_HOME to where it is"
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(
            f"{repository} at {revision!r} lacks a file that its config names: {_line(error)}"
        ) from error
    except (requests.RequestException, HFValidationError, OSError) as error:
        raise ModelError(f"{source} cannot be downloaded to {cache}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The client's errors have paragraphs."""
    return " ".join(str(error).split())
