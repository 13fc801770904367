"""Files of weights: read whole and fast, refused with a sentence when they are not what they should be."""

import itertools
import json
import os
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trunkline_runtime.engine.moshi import reading
from trunkline_runtime.engine.moshi.checkpoint import MOSHI_FOLDER, STT_FOLDER, write_tiny
from trunkline_runtime.engine.moshi.integrity import sha256
from trunkline_runtime.engine.moshi.loading import Wanted, check_room, load
from trunkline_runtime.engine.moshi.models import ModelError
from trunkline_runtime.engine.moshi.progress import Phase, Progress
from trunkline_runtime.engine.moshi.source import DEFAULT_NAMES, FolderSource, HubSource, parse

torch.set_num_threads(1)

MODEL, MIMI = DEFAULT_NAMES["moshi_name"], DEFAULT_NAMES["mimi_name"]
TOKENIZER = DEFAULT_NAMES["tokenizer_name"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, 3)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A Moshi checkpoint of the test's own, to be spoilt; no checksums stand in the way."""
    folder = tmp_path / "moshi"
    shutil.copytree(written / MOSHI_FOLDER, folder)
    (folder / "SHA256SUMS").unlink()
    return folder


def loaded(folder: Path, **how: object) -> None:
    load(Wanted(moshi=FolderSource(folder), device="cpu", **how))  # type: ignore[arg-type]


# --- reading -------------------------------------------------------------------------------------------


def state_of_all_kinds(big: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "big": torch.randn(big, generator=generator),
        "half": torch.randn(7, 3, generator=generator).bfloat16(),
        "whole": torch.arange(12).view(3, 4),
        "bytes": torch.arange(5, dtype=torch.int8),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("threads", [1, 5])
def test_a_file_is_read_as_its_own_library_reads_it(
    tmp_path: Path, staged: bool, threads: int
) -> None:
    # Several pieces, of which the last ends in the midst of one.
    state = state_of_all_kinds(reading.PIECE_BYTES // 4 * 3 + 1001)
    save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = reading.layout(tmp_path / "x.safetensors")
    arrived, lock = [0], threading.Lock()

    def count(size: int) -> None:
        with lock:
            arrived[0] += size

    destination = reading.Destination(found)
    reading.fill(destination, staged=staged, threads=threads, arrived=count)
    tensors = destination.tensors
    expected = load_file(tmp_path / "x.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name
    assert arrived == [found.bytes]


@given(st.integers(0, 400), st.integers(0, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_no_damage_to_a_file_is_anything_but_a_model_error(
    at: int, length: int, data: st.DataObject
) -> None:
    """Cut at any place, or with any byte changed: it is refused, or it is a safetensors file still."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file({"a": torch.ones(3, 4), "b": torch.ones(2)}, path)
        raw = bytearray(path.read_bytes())
        raw[at % len(raw)] = data.draw(st.integers(0, 255))
        path.write_bytes(raw[: len(raw) - length % 40])
        try:
            found = reading.layout(path)
        except ModelError:
            return
        assert sum(t.numel() * t.element_size() for t in reading.read(found).values()) == 56


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4096)}, tmp_path / "x.safetensors")
    found = reading.layout(tmp_path / "x.safetensors")
    os.truncate(found.path, found.end - 100)
    for staged in (False, True):
        with pytest.raises(ModelError, match="became shorter"):
            reading.fill(reading.Destination(found), staged=staged)


# --- what is refused, and how it is said ---------------------------------------------------------------


def cut(folder: Path) -> None:
    os.truncate(folder / MODEL, (folder / MODEL).stat().st_size - 1000)


def pointer(folder: Path) -> None:
    (folder / MODEL).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without_tensor(folder: Path) -> None:
    state = load_file(folder / MODEL)
    del state["text_linear.weight"]
    save_file(state, folder / MODEL)


def another_model(folder: Path) -> None:
    shutil.copy(folder / MIMI, folder / MODEL)


def other_tokenizer(folder: Path) -> None:
    (folder / TOKENIZER).write_bytes(b"no model of words")


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (cut, r"is cut off: its header speaks of \d+ bytes and it has \d+; copy or download"),
        (pointer, r"model.safetensors \(\d+ bytes\) is no safetensors file .* Git LFS"),
        (without(MODEL), f"lacks {MODEL}; it holds config.json, mimi.json"),
        (without(TOKENIZER), f"lacks {TOKENIZER}"),
        (
            without("config.json"),
            r"does not fit the config of Mimi of .*moshi \(without config.json, so as Moshi 7B\): .* should be \[",
        ),
        (without_tensor, r"it lacks text_linear\.weight\. Do the weights and config\.json belong"),
        (another_model, r"it lacks .* and \d+ more"),
        (with_config(dim=64), r"emb\.0\.weight is \[33, 32\] and should be \[33, 64\], .* more"),
        (with_config(num_layers=1), r"has, and the model has not, transformer\.layers\.1"),
        (with_config(delays=[0]), r"describes no model that moshi .* can build"),
        (with_config(nonsense=1), r"describes no model that moshi .*nonsense"),
        (with_config(tts_config={"multistream": True}), "a TTS model, which this engine cannot"),
        (with_config(lora=True), "LoRA weights: merge them"),
        (with_config(mimi_name="../elsewhere"), "'../elsewhere', which is not in its folder"),
        (other_tokenizer, "is no SentencePiece model"),
        (no_json, "config.json cannot be read as JSON"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(
    folder: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=sentence) as refused:
        loaded(folder)
    assert "\n" not in str(refused.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no folder .*gone: mount the volume"):
        loaded(tmp_path / "gone")


def test_without_a_gpu_cuda_is_refused_with_what_to_do(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match="no CUDA device is visible: ask for a GPU"):
        load(Wanted(moshi=FolderSource(folder)))


def test_weights_without_room_are_refused_with_the_arithmetic() -> None:
    check_room({"Moshi": 15_380_000_000, "STT": 1_970_000_000}, 17_350_000_000, 0, "L4")
    with pytest.raises(
        ModelError,
        match=r"take 17\.35 GB \(Moshi 15\.38 GB, STT 1\.97 GB\) and 15\.70 of 16\.90 GB are free on T4",
    ):
        check_room(
            {"Moshi": 15_380_000_000, "STT": 1_970_000_000}, 15_700_000_000, 16_900_000_000, "T4"
        )


def test_a_tensor_for_which_there_is_no_memory_is_refused(tmp_path: Path) -> None:
    huge = reading.Placed("x", torch.int8, (2**60,), 8, 8 + 2**60)
    with pytest.raises(
        ModelError, match=r"cpu is out of memory: x\.safetensors takes 1152921504\.61 GB"
    ):
        reading.Destination(reading.Layout(tmp_path / "x.safetensors", (huge,)))


def test_a_codec_of_other_models_is_refused(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    stt = tmp_path / STT_FOLDER
    config = json.loads((stt / "config.json").read_text())
    (stt / "config.json").write_text(json.dumps(config | {"card": 16}))
    (stt / "SHA256SUMS").unlink()
    state = load_file(stt / MODEL)
    for name in [name for name in state if name.startswith("emb.")]:
        state[name] = state[name][:17].clone()
    save_file(state, stt / MODEL)
    with pytest.raises(ModelError, match=r"codebooks have 32 entries .* expects 16"):
        load(
            Wanted(moshi=FolderSource(tmp_path / MOSHI_FOLDER), stt=FolderSource(stt), device="cpu")
        )


# --- checksums -----------------------------------------------------------------------------------------


def test_a_changed_weight_is_found_by_the_list_beside_it(written: Path, folder: Path) -> None:
    shutil.copy(written / MOSHI_FOLDER / "SHA256SUMS", folder)
    loaded(folder)
    with (folder / MODEL).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(ModelError, match=f"{MODEL} is not the file .* SHA-256 [0-9a-f]{{64}}"):
        loaded(folder)


def test_a_given_checksum_counts_before_the_list(folder: Path) -> None:
    right = sha256(folder / MODEL)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {MODEL}\n")
    loaded(folder, checksums={MODEL: right.upper()})
    with pytest.raises(ModelError, match="is not the file"):
        loaded(folder, checksums={TOKENIZER: "0" * 64, MODEL: right})


def test_a_list_that_is_none_is_refused(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text("MODEL = abc\n")
    with pytest.raises(ModelError, match=r"SHA256SUMS line 1 is no checksum"):
        loaded(folder)


# --- names of sources ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "revision", "source"),
    [
        (
            "kyutai/moshiko-pytorch-bf16",
            None,
            HubSource(repository="kyutai/moshiko-pytorch-bf16"),
        ),
        ("hf://kyutai/x@v1.0", None, HubSource(repository="kyutai/x", revision="v1.0")),
        ("kyutai/x", "refs/pr/3", HubSource(repository="kyutai/x", revision="refs/pr/3")),
        ("/weights/moshi", None, FolderSource(Path("/weights/moshi"))),
        ("file:///weights/moshi", None, FolderSource(Path("/weights/moshi"))),
    ],
)
def test_a_source_is_a_repository_or_a_folder(
    text: str, revision: str | None, source: object
) -> None:
    assert parse(text, revision) == source


@pytest.mark.parametrize(
    ("text", "revision"),
    [("moshi", None), ("a/b/c", None), ("", None), ("/weights", "main"), ("kyutai/x@v1", "v2")],
)
def test_what_names_no_weights_is_refused(text: str, revision: str | None) -> None:
    with pytest.raises(ModelError):
        parse(text, revision)


# --- progress ------------------------------------------------------------------------------------------


def test_progress_is_told_in_tenths_and_phases_are_timed() -> None:
    told: list[str] = []
    progress = Progress(told.append, clock=itertools.count(0.0, 2.0).__next__)
    with progress.phase(Phase.DOWNLOAD, 1000):
        progress.add(430)
        assert str(progress) == "downloading 43 %"
    with progress.phase(Phase.READ, 200):
        for _ in range(200):
            progress.add(1)
    assert told[:2] == ["downloading 0 %", "downloading 43 %"]
    assert told[2:] == [f"loading {tenth * 10} %" for tenth in range(11)]
    assert progress.seconds == {Phase.DOWNLOAD: 2.0, Phase.READ: 2.0}


def test_loading_ends_at_100_percent_of_both_models_and_the_codec(written: Path) -> None:
    told: list[str] = []
    progress = Progress(told.append)
    stt = FolderSource(written / STT_FOLDER)
    moshi = FolderSource(written / MOSHI_FOLDER)
    load(Wanted(moshi=moshi, stt=stt, device="cpu"), progress)
    numbers = [int(line.split()[1]) for line in told if line.endswith("%")]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (0, 100)
    assert list(progress.seconds) == [Phase.BUILD, Phase.READ, Phase.FINISH, Phase.VERIFY]


@pytest.mark.parametrize("place", [[8, 24], [2, 18], [0, 12], [16, 16]])
def test_tensors_that_overlap_or_leave_gaps_are_refused(tmp_path: Path, place: list[int]) -> None:
    path = tmp_path / "x.safetensors"
    sides = {"dtype": "F32", "shape": [4]}
    header = {"a": sides | {"data_offsets": [0, 16]}, "b": sides | {"data_offsets": place}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(max(16, place[1])))
    with pytest.raises(ModelError, match="its header makes no sense"):
        reading.layout(path)


def test_the_header_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ModelError, match="no safetensors file"):
        reading.layout(path)
