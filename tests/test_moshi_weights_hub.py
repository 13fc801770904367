"""Weights from the Hub, by its real client against a server on loopback that speaks its protocol."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_rig import COMMIT, REPOSITORY, TOKEN, Hub, hub

from trunkline_runtime.engine.moshi.checkpoint import MOSHI_FOLDER, write_tiny
from trunkline_runtime.engine.moshi.loading import Wanted, checkpoint, load
from trunkline_runtime.engine.moshi.models import ModelError
from trunkline_runtime.engine.moshi.progress import Phase, Progress
from trunkline_runtime.engine.moshi.source import DEFAULT_NAMES, HubSource

torch.set_num_threads(1)

MODEL = DEFAULT_NAMES["moshi_name"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, 3)
    return folder / MOSHI_FOLDER


@pytest.fixture
def served(written: Path, tmp_path: Path) -> Iterator[Hub]:
    shutil.copytree(written, tmp_path / "files")
    with hub(tmp_path / "files") as it:
        yield it


def source(served: Hub, **changes: object) -> HubSource:
    known = {"repository": REPOSITORY, "token": TOKEN, "endpoint": served.url}
    cache = served.files.parent / "cache"
    return HubSource(**(known | {"cache": cache} | changes))  # type: ignore[arg-type]


def test_a_repository_is_downloaded_once_and_of_one_commit(served: Hub) -> None:
    told: list[str] = []
    progress = Progress(told.append)
    models = load(Wanted(moshi=source(served), device="cpu"), progress)
    assert models.name == f"{REPOSITORY}@{COMMIT}"
    assert told[0].startswith("downloading")
    assert Phase.DOWNLOAD in progress.seconds
    # Only the first file is asked for by branch, for that may move.
    assert {path.split("/")[4] for path in served.asked if "config.json" not in path} == {COMMIT}

    served.asked.clear()
    load(Wanted(moshi=source(served, revision=COMMIT), device="cpu"))
    assert served.asked == []


def test_checksums_of_the_repository_are_checked(served: Hub) -> None:
    raw = bytearray((served.files / MODEL).read_bytes())
    raw[-1] ^= 1
    (served.files / MODEL).write_bytes(raw)
    with pytest.raises(ModelError, match="is not the file that its checksum belongs to"):
        load(Wanted(moshi=source(served), device="cpu"))


def test_where_the_hub_has_no_answer_the_cache_is_enough(served: Hub) -> None:
    checkpoint(source(served), Progress())
    served.busy = True
    assert checkpoint(source(served), Progress()).weights.is_file()
    with pytest.raises(ModelError, match=r"not whole in the cache .*, and the Hub cannot"):
        checkpoint(source(served, revision="v2"), Progress())


def test_offline_nothing_is_asked_and_the_environment_says_where_the_cache_is(
    served: Hub,
) -> None:
    checkpoint(source(served, cache=served.files.parent / "home/hub"), Progress())
    served.asked.clear()
    program = """if True:
        from trunkline_runtime.engine.moshi.loading import *
        from trunkline_runtime.engine.moshi.source import parse
        print(checkpoint(parse("kyutai/tiny"), Progress()).name)
        try:
            checkpoint(parse("kyutai/tiny@v2"), Progress())
        except ModelError as error:
            print(error)
    """
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(served.files.parent / "home"),
        "HF_ENDPOINT": served.url,
    }
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
    )
    name, refusal = found.stdout.splitlines()
    assert name == f"{REPOSITORY}@{COMMIT}"
    assert "kyutai/tiny@v2 is not whole in the cache" in refusal
    assert "HF_HUB_OFFLINE is set: download it there first" in refusal
    assert served.asked == []


def test_each_refusal_says_what_to_do(served: Hub) -> None:
    with pytest.raises(ModelError, match=r"shows no repository kyutai/tiny: .* HF_TOKEN if it is"):
        checkpoint(source(served, token="hf_wrong"), Progress())
    with pytest.raises(ModelError, match="no revision 'v9': give a branch, a tag or a commit"):
        checkpoint(source(served, revision="v9"), Progress())
    (served.files / MODEL).unlink()
    with pytest.raises(ModelError, match=f"lacks a file that its config names.*{MODEL}"):
        checkpoint(source(served), Progress())
    served.gated = True
    with pytest.raises(ModelError, match=r"is gated: accept its terms .* HF_TOKEN"):
        checkpoint(source(served, revision="main"), Progress())


def test_a_token_is_never_said(served: Hub) -> None:
    assert TOKEN not in repr(source(served))
    with pytest.raises(ModelError) as refused:
        checkpoint(source(served, revision="v9"), Progress())
    assert TOKEN not in str(refused.value)
