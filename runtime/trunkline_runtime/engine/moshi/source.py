"""Where weights come from: a repository of the Hugging Face Hub, or a folder laid out like one.

Such a repository is one model as Kyutai publishes it: `config.json`, the language model and the codec Mimi
as safetensors, and a SentencePiece tokenizer. `config.json` names the other files; without one, the files
are those of Moshi 7B as it was first published.
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from trunkline_runtime.engine.moshi.models import ModelError

CONFIG_NAME: Final = "config.json"
DEFAULT_REVISION: Final = "main"
# As `moshi.models.loaders` has them.
DEFAULT_NAMES: Final = {
    "moshi_name": "model.safetensors",
    "mimi_name": "tokenizer-e351c8d8-checkpoint125.safetensors",
    "tokenizer_name": "tokenizer_spm_32k_3.model",
}
# Keys of config.json that are not the language model's. The last ones ask for what this engine does not do.
_OTHER_KEYS: Final = ("model_type", "model_id", "lm_gen_config", "stt_config", "mimi_config_name")
_UNSUPPORTED: Final = {
    "lora_name": "LoRA weights: merge them into the model first",
    "lora": "LoRA weights: merge them into the model first",
    "conditioners": "conditioners, as translation and TTS models have them",
    "tts_config": "a TTS model",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A repository of the Hub. The cache is `HF_HOME`'s; what it holds is not asked for again."""

    repository: str  # owner/name
    revision: str = DEFAULT_REVISION  # a branch, a tag or a commit
    token: str | None = field(default=None, repr=False)  # None: HF_TOKEN, or none
    endpoint: str | None = None  # None: HF_ENDPOINT, or the Hub
    cache: Path | None = None  # None: below HF_HOME

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder of this machine: a mounted volume, or part of the image."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


Source = HubSource | FolderSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One model's files, all of them there, and what config.json says of them."""

    name: str  # for logs and errors
    folder: Path
    weights: Path
    mimi: Path
    tokenizer: Path
    language_model: dict[str, Any] | None  # keyword arguments of LMModel; None: Moshi 7B's
    mimi_config: dict[str, Any] | None = None  # None: the Mimi of all models so far
    generation: dict[str, Any]  # lm_gen_config
    transcription: dict[str, Any]  # stt_config


def parse(text: str, revision: str | None = None) -> Source:
    """`owner/name`, `hf://owner/name`, either with `@revision`; an absolute path, or `file://` and a path.

    Raises `ModelError`.
    """
    if text.startswith(("/", "./", "../", "file://")):
        if revision:
            raise ModelError(f"a folder has no revisions: leave out {revision!r}, or name a repo")
        return FolderSource(Path(text.removeprefix("file://")))
    match = re.fullmatch(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([^\s@]+))?", text)
    if match is None:
        raise ModelError(
            f"{text!r} names no weights: give owner/name of a Hugging Face repository, or /a/path"
        )
    if revision and match[2] and revision != match[2]:
        raise ModelError(f"two revisions are asked for, {match[2]!r} and {revision!r}: give one")
    return HubSource(repository=match[1], revision=revision or match[2] or DEFAULT_REVISION)


def in_folder(source: FolderSource, *, with_codec: bool = True) -> Checkpoint:
    """The checkpoint in a folder. Raises `ModelError`.

    Without the codec, no file of Mimi is asked for: `mimi` is then where it would be.
    """
    folder = source.path
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}: mount the volume with the weights there")
    config = read_config(folder / CONFIG_NAME)
    wanted = file_names(config, with_codec=with_codec)
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        there = ", ".join(sorted(os.listdir(folder))[:10]) or "nothing"
        raise ModelError(f"{folder} lacks {' and '.join(missing)}; it holds {there}")
    return understood(config, folder, str(source), with_codec=with_codec)


def read_config(path: Path) -> dict[str, Any]:
    """config.json, or nothing where there is none. Raises `ModelError` for what is no JSON object."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return config


def file_names(config: dict[str, Any], *, with_codec: bool) -> list[str]:
    """The files beside config.json that a model needs."""
    names = [config.get(key) or default for key, default in DEFAULT_NAMES.items()]
    if not with_codec:
        names.remove(config.get("mimi_name") or DEFAULT_NAMES["mimi_name"])
    elif config.get("mimi_config_name"):
        names.append(config["mimi_config_name"])
    for name in names:
        path = PurePosixPath(str(name))
        if not isinstance(name, str) or path.is_absolute() or ".." in path.parts:
            raise ModelError(f"config.json names the file {name!r}, which is not in its folder")
    return names


def understood(config: dict[str, Any], folder: Path, name: str, *, with_codec: bool) -> Checkpoint:
    """The checkpoint that a folder with all its files is. Raises `ModelError`."""
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise ModelError(f"{name} wants {what}, which this engine cannot run")
    names = {key: config.get(key) or default for key, default in DEFAULT_NAMES.items()}
    mimi_config = None
    if with_codec and config.get("mimi_config_name"):
        mimi_config = read_config(folder / config["mimi_config_name"])
    apart = {*DEFAULT_NAMES, *_OTHER_KEYS, *_UNSUPPORTED}
    return Checkpoint(
        name=name if config else f"{name} (without config.json, so as Moshi 7B)",
        folder=folder,
        weights=folder / names["moshi_name"],
        mimi=folder / names["mimi_name"],
        tokenizer=folder / names["tokenizer_name"],
        language_model={k: v for k, v in config.items() if k not in apart} or None,
        mimi_config=mimi_config,
        generation=config.get("lm_gen_config") or {},
        transcription=config.get("stt_config") or {},
    )
