"""A checkpoint on disk, laid out as Kyutai's are, through the real loader: the same models, the same tokens."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moshi.models import LMGen, LMModel, MimiModel, loaders
from safetensors.torch import load_file, save_file

from trunkline_runtime.engine.moshi.checkpoint import MOSHI_FOLDER, STT_FOLDER, write_tiny
from trunkline_runtime.engine.moshi.loading import Wanted, load
from trunkline_runtime.engine.moshi.models import Models
from trunkline_runtime.engine.moshi.source import DEFAULT_NAMES, FolderSource
from trunkline_runtime.engine.moshi.tiny import tiny

torch.set_num_threads(1)

SEED = 5
FRAMES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, SEED, context_frames=24)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Models:
    return load(wanted(folder))


def wanted(folder: Path, **how: object) -> Wanted:
    return Wanted(
        moshi=FolderSource(folder / MOSHI_FOLDER),
        stt=FolderSource(folder / STT_FOLDER),
        device="cpu",
        **how,  # type: ignore[arg-type]
    )


def said(mimi: MimiModel, lm: LMModel) -> torch.Tensor:
    """What a model says to noise: codes in, tokens out, as many frames as wrap its ring."""
    noise = torch.randn(1, 1, 1920 * FRAMES, generator=torch.Generator().manual_seed(1)) * 0.2
    gen, out = LMGen(lm, use_sampling=False), []
    with torch.no_grad(), mimi.streaming(1), gen.streaming(1):
        for frame in noise.split(1920, dim=2):
            codes = mimi.encode(frame)[:, : lm.num_codebooks - lm.dep_q - 1]
            out.append(gen.step(codes))
    return torch.cat([tokens for tokens in out if tokens is not None], dim=2)


def test_loaded_models_say_what_those_in_memory_say(loaded: Models) -> None:
    made = tiny(SEED, context_frames=24)
    assert made.stt is not None
    assert loaded.stt is not None
    ours, theirs = said(loaded.mimi, loaded.lm), said(made.mimi, made.lm)
    assert torch.equal(ours, theirs)
    assert len(set(theirs[0, 1].tolist())) > 3, "a model that says one thing proves nothing"
    assert torch.equal(said(loaded.mimi, loaded.stt), said(made.mimi, made.stt))


def test_all_that_the_config_says_arrives(loaded: Models) -> None:
    made = tiny(SEED, context_frames=24)
    assert loaded.generation == made.generation
    assert loaded.transcription == made.transcription
    assert loaded.context_frames == 24
    assert loaded.text_tokenizer.id_to_piece(9) == made.text_tokenizer.id_to_piece(9)


def test_a_loaded_model_is_ready_for_inference(loaded: Models) -> None:
    for module in (loaded.mimi, loaded.lm, loaded.stt):
        assert module is not None
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        tensors = [*module.parameters(), *(b for b in module.buffers() if b is not None)]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_moshis_own_loader_takes_the_checkpoint(folder: Path, loaded: Models) -> None:
    moshi = folder / MOSHI_FOLDER
    info = loaders.CheckpointInfo.from_hf_repo(
        "not/asked",
        moshi_weights=moshi / DEFAULT_NAMES["moshi_name"],
        mimi_weights=moshi / DEFAULT_NAMES["mimi_name"],
        tokenizer=moshi / DEFAULT_NAMES["tokenizer_name"],
        config_path=moshi / "config.json",
        mimi_config_path=moshi / "mimi.json",
    )
    mimi, lm = info.get_mimi(), info.get_moshi(dtype=torch.float32)
    mimi.set_num_codebooks(32)
    assert torch.equal(said(mimi, lm), said(loaded.mimi, loaded.lm))


def test_weights_as_trained_with_one_matrix_for_all_codebooks_load(
    folder: Path, loaded: Models, tmp_path: Path
) -> None:
    """Kyutai's files hold the depth transformer's projections as one tensor; moshi takes them apart."""
    shutil.copytree(folder / MOSHI_FOLDER, tmp_path / MOSHI_FOLDER)
    shutil.copytree(folder / STT_FOLDER, tmp_path / STT_FOLDER)
    file = tmp_path / MOSHI_FOLDER / DEFAULT_NAMES["moshi_name"]
    (file.parent / "SHA256SUMS").unlink()
    state = load_file(file)
    layer = "depformer.layers.0.self_attn"
    for apart, together in (("in_projs", "in_proj_weight"), ("out_projs", "out_proj.weight")):
        parts = [state.pop(f"{layer}.{apart}.{i}.weight") for i in range(8)]
        state[f"{layer}.{together}"] = torch.cat(parts)
    save_file(state, file)
    again = load(wanted(tmp_path))
    assert torch.equal(said(again.mimi, again.lm), said(loaded.mimi, loaded.lm))


def test_a_type_may_be_asked_for(folder: Path) -> None:
    halved = load(wanted(folder, dtype=torch.bfloat16))
    assert halved.lm.dtype == torch.bfloat16
    assert halved.mimi.encoder.model[0].conv.conv.weight.dtype == torch.float32
    assert said(halved.mimi, halved.lm).shape == (1, 9, FRAMES - 1)


def test_int8_is_quantised_while_loading_or_comes_so(folder: Path, tmp_path: Path) -> None:
    """Both are the same model: once as floats that are quantised, once as a file of int8 and scales."""
    quantised = load(wanted(folder, int8=True))
    state = quantised.lm.state_dict()
    assert state["text_linear.weight"].dtype == torch.int8
    assert state["text_linear.weight_scb"].dtype == torch.float32
    floats = tiny(SEED).lm.state_dict()["text_linear.weight"]
    again = state["text_linear.weight"] * state["text_linear.weight_scb"][:, None] / 127
    assert torch.allclose(floats, again, atol=float(floats.abs().max()) / 100)

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    moshi = tmp_path / MOSHI_FOLDER
    (moshi / "SHA256SUMS").unlink()
    config = json.loads((moshi / "config.json").read_text()) | {
        "quantize": True,
        "moshi_name": "model.q8.safetensors",
    }
    (moshi / "config.json").write_text(json.dumps(config))
    save_file(state, moshi / "model.q8.safetensors")
    for asked in ({}, {"int8": True}):
        stored = load(wanted(tmp_path, **asked))
        assert torch.equal(said(stored.mimi, stored.lm), said(quantised.mimi, quantised.lm))
    # bitsandbytes takes no scales but those of float32, whatever the rest of the model is.
    halved = load(wanted(tmp_path, dtype=torch.bfloat16)).lm
    assert halved.dtype == torch.bfloat16
    assert halved.state_dict()["text_linear.weight_scb"].dtype == torch.float32


def test_loading_does_not_import_the_compiler(folder: Path) -> None:
    """It would cost a cold start three seconds or more."""
    program = (
        "import sys; from pathlib import Path;"
        "from trunkline_runtime.engine.moshi.loading import *;"
        "from trunkline_runtime.engine.moshi.source import FolderSource;"
        f"load(Wanted(moshi=FolderSource(Path({str(folder / MOSHI_FOLDER)!r})), device='cpu'));"
        "print([n for n in ('torch._dynamo', 'torch._inductor') if n in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert found.stdout == "[]\n", found.stderr
