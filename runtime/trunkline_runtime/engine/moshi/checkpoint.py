"""Checkpoints on disk, laid out as Kyutai's repositories are: for tests, for tries without a GPU, and to see
the real loader at work in a second.
"""

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from trunkline_runtime.engine.moshi import tiny
from trunkline_runtime.engine.moshi.integrity import LIST_NAME, sha256
from trunkline_runtime.engine.moshi.source import CONFIG_NAME, DEFAULT_NAMES

MOSHI_FOLDER: Final = "moshi"
STT_FOLDER: Final = "stt"
MIMI_CONFIG_NAME: Final = "mimi.json"


def write_tiny(folder: Path, seed: int, **shape: Any) -> None:
    """Writes the models of `tiny(seed)` as two checkpoints: `moshi` and `stt`, each with all its files.

    `shape` is that of `tiny`. Loaded again, they give the same tokens.
    """
    context = shape.get("context_frames", tiny.CONTEXT_FRAMES)
    mimi = tiny.mimi_config(shape.get("mimi_context", 20))
    models = tiny.tiny(seed, **shape)
    moshi = tiny.moshi_config(context) | {
        "model_type": "moshi",
        "lm_gen_config": {"use_sampling": False},
    }
    _write(folder / MOSHI_FOLDER, moshi, models.lm, models.mimi, mimi)
    assert models.stt is not None
    timing = models.transcription
    stt = tiny.stt_config(context) | {
        "model_type": "stt",
        "lm_gen_config": {"temp": 0.0, "temp_text": 0.0},
        "stt_config": {
            "audio_delay_seconds": timing.delay_seconds,
            "audio_silence_prefix_seconds": timing.prefix_seconds,
        },
    }
    _write(folder / STT_FOLDER, stt, models.stt, models.mimi, mimi)


def _write(
    folder: Path,
    config: dict[str, Any],
    lm: torch.nn.Module,
    mimi: torch.nn.Module,
    mimi_config: dict[str, Any],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = DEFAULT_NAMES | {"mimi_config_name": MIMI_CONFIG_NAME}
    (folder / CONFIG_NAME).write_text(json.dumps(config | names, indent=1))
    (folder / MIMI_CONFIG_NAME).write_text(json.dumps(mimi_config, indent=1))
    (folder / names["tokenizer_name"]).write_bytes(tiny.tokenizer_model())
    save_file(lm.state_dict(), folder / names["moshi_name"])
    save_file(mimi.state_dict(), folder / names["mimi_name"])
    files = sorted(path for path in folder.iterdir() if path.name != LIST_NAME)
    (folder / LIST_NAME).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files))
