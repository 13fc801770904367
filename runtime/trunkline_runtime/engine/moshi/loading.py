"""From the files of a checkpoint to `Models`.

Modules are built on the meta device, where they take no memory, and no weight is initialised only to be
overwritten; that the file fits them is known from its header, before a byte of it is read. Then all files are
read at once in pieces (`reading.py`) and become the modules' parameters without another copy.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from moshi.models import LMModel, MimiModel, loaders
from moshi.utils.quantize import replace_linear_with_qlinear
from sentencepiece import SentencePieceProcessor
from torch.overrides import TorchFunctionMode

from trunkline_runtime.engine.moshi.hub import snapshot
from trunkline_runtime.engine.moshi.integrity import Verification, listed
from trunkline_runtime.engine.moshi.models import (
    Generation,
    ModelError,
    Models,
    Transcription,
    freeze,
)
from trunkline_runtime.engine.moshi.progress import Phase, Progress
from trunkline_runtime.engine.moshi.reading import Layout, Placed, layout, read
from trunkline_runtime.engine.moshi.source import Checkpoint, FolderSource, Source, in_folder

META: Final = torch.device("meta")
SCALES: Final = "_scb"  # the end of the names of int8 weights' scales, one float a row
PAUSE_HEAD: Final = 2  # of an STT model's extra heads
_SHOWN: Final = 3  # names in a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to load, and onto what."""

    moshi: Source
    stt: Source | None = None
    device: str = "cuda"
    dtype: torch.dtype | None = None  # of the language models; None: as in the file
    int8: bool = False  # quantise Moshi's linear layers while loading (bitsandbytes)
    checksums: Mapping[str, str] = field(
        default_factory=dict
    )  # by file name, beside the lists found


@dataclass(slots=True)
class _Part:
    """One module on its way to its weights."""

    name: str
    module: torch.nn.Module
    layout: Layout
    dtype: torch.dtype | None


def load(wanted: Wanted, progress: Progress | None = None) -> Models:
    """Loads everything; raises `ModelError`, which says what is wrong and what to do."""
    progress = progress or Progress()
    device = _device(wanted.device)
    moshi = checkpoint(wanted.moshi, progress)
    # Both language models are fed by one codec, Moshi's; their repositories hold the same one.
    stt = checkpoint(wanted.stt, progress, with_codec=False) if wanted.stt else None
    with contextlib.closing(Verification()) as verification:
        verification.begin(_to_verify(moshi, stt, wanted.checksums))
        with progress.phase(Phase.BUILD):
            parts = _built(moshi, stt, wanted)
            for part in parts:
                _check(part)
            if device.type == "cuda":
                sizes = {part.name: part.layout.bytes for part in parts}
                free, total = torch.cuda.mem_get_info(device)
                check_room(sizes, free, total, torch.cuda.get_device_name(device))
        with progress.phase(Phase.READ, sum(part.layout.bytes for part in parts)):
            for part in parts:
                _fill(part, read(part.layout, device, arrived=progress.add))
        with progress.phase(Phase.FINISH):
            models = _finished(moshi, stt, parts, wanted, device)
        with progress.phase(Phase.VERIFY):
            verification.finish()
    return models


def checkpoint(source: Source, progress: Progress, *, with_codec: bool = True) -> Checkpoint:
    """The files of a source, downloaded where they must be. Raises `ModelError`."""
    if isinstance(source, FolderSource):
        return in_folder(source, with_codec=with_codec)
    return snapshot(source, progress, with_codec=with_codec)


# --- what is to be loaded ------------------------------------------------------------------------------


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "no CUDA device is visible: ask for a GPU in the pod's resources (nvidia.com/gpu: 1), look for"
            " the NVIDIA runtime on the node, or run model: tiny on the CPU"
        )
    return device


def _to_verify(
    moshi: Checkpoint, stt: Checkpoint | None, given: Mapping[str, str]
) -> dict[Path, str]:
    wanted: dict[Path, str] = {}
    files = [(moshi, path) for path in (moshi.weights, moshi.mimi, moshi.tokenizer)]
    if stt is not None:
        files += [(stt, path) for path in (stt.weights, stt.tokenizer)]
    for owner, path in files:
        digest = given.get(path.name) or listed(owner.folder).get(path.name)
        if digest is not None:
            wanted[path] = digest
    return wanted


def _built(moshi: Checkpoint, stt: Checkpoint | None, wanted: Wanted) -> list[_Part]:
    with _explained(moshi):
        mimi = hollow_mimi(moshi.mimi_config)
    parts = [_Part(f"Mimi of {moshi.name}", mimi, layout(moshi.mimi), None)]
    for found in filter(None, (moshi, stt)):
        file = layout(found.weights)
        with _explained(found):
            lm = hollow_lm(found.language_model, wanted.dtype or _float_dtype(file))
        parts.append(_Part(found.name, lm, file, wanted.dtype))
    return parts


class _Unfilled(TorchFunctionMode):  # type: ignore[misc]  # torch is Any to mypy here
    """Leaves out all that gives new weights their values.

    On the meta device nothing is filled, but going through the motions takes ten seconds for Moshi 7B,
    for random numbers on it are drawn by a library that is imported for them.
    """

    _FILLING = frozenset(
        {
            torch.Tensor.uniform_,
            torch.Tensor.normal_,
            torch.Tensor.clamp_,
            torch.Tensor.erfinv_,
        }
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._FILLING or getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def hollow_lm(config: Mapping[str, Any] | None, dtype: torch.dtype) -> LMModel:
    """A language model without memory, on the meta device; Moshi 7B where no config is given."""
    config = loaders._lm_kwargs if config is None else config
    # moshi makes some layers without a device, and moves them there when they have taken memory.
    with META, _Unfilled():
        return loaders.get_moshi_lm(None, lm_kwargs=dict(config), device=META, dtype=dtype)


def hollow_mimi(config: Mapping[str, Any] | None) -> MimiModel:
    """A codec without memory, with all its codebooks."""
    config = loaders._mimi_config if config is None else config
    with META, _Unfilled():
        return loaders.get_mimi(
            None, dict(config), device=META, num_codebooks=config["quantizer"]["n_q"]
        )


@contextlib.contextmanager
def _explained(found: Checkpoint) -> Iterator[None]:
    """What moshi raises for a config that it cannot build."""
    try:
        yield
    except (TypeError, KeyError, AssertionError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"the config of {found.name} describes no model that moshi 0.2.13 can build: {error}"
        ) from error


def _float_dtype(found: Layout) -> torch.dtype:
    """The type of most of a file's numbers that are not whole."""
    count: dict[torch.dtype, int] = {}
    for placed in found.tensors:
        if placed.dtype.is_floating_point and not placed.name.endswith(SCALES):
            count[placed.dtype] = count.get(placed.dtype, 0) + placed.end - placed.start
    return max(count, key=lambda dtype: count[dtype], default=torch.bfloat16)


# --- whether it fits -----------------------------------------------------------------------------------


def _check(part: _Part) -> None:
    """Compares names and shapes of the file with the module's, by loading tensors without content."""
    state = {
        placed.name: torch.empty(placed.shape, dtype=_wanted_dtype(placed, part), device=META)
        for placed in part.layout.tensors
    }
    file = part.layout.path.name
    try:
        missing, unexpected = part.module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(
            f"{file} does not fit the config of {part.name}: {_wrong_shapes(str(error))}"
        ) from error
    for names, what in ((missing, "lacks"), (unexpected, "has, and the model has not,")):
        if names:
            raise ModelError(
                f"{file} is not a checkpoint of {part.name}: it {what} {_some(names)}. Do the weights and"
                " config.json belong together?"
            )


def _wrong_shapes(text: str) -> str:
    """The sentence about shapes in what torch says."""
    found = re.findall(
        r"size mismatch for (\S+): copying a param with shape torch\.Size\((\[[^]]*\])\) from checkpoint,"
        r" the shape in current model is torch\.Size\((\[[^]]*\])\)",
        text,
    )
    if not found:
        return text
    return _some([f"{name} is {there} and should be {wanted}" for name, there, wanted in found])


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def check_room(sizes: Mapping[str, int], free: int, total: int, gpu: str) -> None:
    """Raises `ModelError` with the arithmetic where weights of these bytes do not fit."""
    needed = sum(sizes.values())
    if needed > free:
        each = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items())
        raise ModelError(
            f"the weights take {needed / 1e9:.2f} GB ({each}) and {free / 1e9:.2f} of {total / 1e9:.2f} GB"
            f" are free on {gpu}: take a larger GPU, or int8 weights"
        )


# --- the weights into the modules ----------------------------------------------------------------------


def _wanted_dtype(placed: Placed, part: _Part) -> torch.dtype:
    """Scales of int8 weights stay float32: bitsandbytes takes no others."""
    keep = part.dtype is None or not placed.dtype.is_floating_point or placed.name.endswith(SCALES)
    return placed.dtype if keep else part.dtype


def _fill(part: _Part, tensors: dict[str, torch.Tensor]) -> None:
    for placed in part.layout.tensors:
        tensors[placed.name] = tensors[placed.name].to(_wanted_dtype(placed, part))
    part.module.load_state_dict(tensors, strict=True, assign=True)
    freeze(part.module)


def _finished(
    moshi: Checkpoint,
    stt: Checkpoint | None,
    parts: Sequence[_Part],
    wanted: Wanted,
    device: torch.device,
) -> Models:
    mimi, lm, *rest = (part.module for part in parts)
    if wanted.int8:
        _quantise(lm, device)
    for module in (lm, *rest):
        if module.card != mimi.cardinality:
            raise ModelError(
                f"Mimi's codebooks have {mimi.cardinality} entries and a language model of it expects"
                f" {module.card}: take the codec that belongs to it"
            )
    return Models(
        name=moshi.name,
        mimi=mimi,
        lm=lm,
        text_tokenizer=_tokenizer(moshi, lm),
        generation=_generation(moshi),
        stt=rest[0] if stt is not None else None,
        stt_tokenizer=_tokenizer(stt, rest[0]) if stt is not None else None,
        transcription=_transcription(stt, rest[0]) if stt is not None else Transcription(),
    )


def _quantise(lm: LMModel, device: torch.device) -> None:
    """Linear layers to int8 with a scale a row, as `quantize` in a config makes moshi build them.

    Layer by layer, so that no more than one exists twice.
    """
    try:
        replace_linear_with_qlinear(lm)
    except ImportError as error:
        raise ModelError("int8 weights need bitsandbytes: install trunkline[moshi]") from error
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{device} is out of memory while Moshi is quantised: the bf16 weights must fit first; take a"
            " checkpoint that is int8 already"
        ) from error
    freeze(lm)


def _tokenizer(found: Checkpoint, lm: LMModel) -> SentencePieceProcessor:
    try:
        tokenizer = SentencePieceProcessor(model_file=str(found.tokenizer))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{found.tokenizer} is no SentencePiece model: {error}") from error
    if tokenizer.vocab_size() < lm.text_card:
        raise ModelError(
            f"{found.tokenizer.name} has {tokenizer.vocab_size()} pieces and {found.name} says"
            f" {lm.text_card} different ones: take the tokenizer that belongs to it"
        )
    return tokenizer


def _generation(found: Checkpoint) -> Generation:
    """`lm_gen_config`; keys that are not ours are moshi's for other models."""
    given = {
        key: value
        for key, value in found.generation.items()
        if key in Generation.__dataclass_fields__
    }
    return Generation(**given)


def _transcription(found: Checkpoint, stt: LMModel) -> Transcription:
    given = found.transcription
    return Transcription(
        delay_seconds=float(given.get("audio_delay_seconds", Transcription().delay_seconds)),
        prefix_seconds=float(given.get("audio_silence_prefix_seconds", 0.0)),
        pause_head=PAUSE_HEAD if len(stt.extra_heads) > PAUSE_HEAD else None,
    )
