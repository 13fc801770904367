"""Tiny models: the real classes with small seeded weights, made in memory on a CPU in a second.

They say nothing sensible, but all that is built around the models can be shown on them: frames of 1920
samples, 32 codebooks of which Moshi takes 8, delays, rings that wrap, a transcribing model with heads that
tell pauses. The same seed makes the same weights with the same version of torch.
"""

import copy
import io
import itertools
from typing import Any, Final

import torch
from moshi.models import LMModel, MimiModel, loaders
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from trunkline_runtime.engine.moshi.models import Generation, Models, Transcription, freeze

CODEBOOKS: Final = 32
CARDINALITY: Final = 32  # of a codebook
VOCABULARY: Final = 64
CONTEXT_FRAMES: Final = 250  # 20 s

_WORDS: Final = [
    "the",
    "a",
    "trunk",
    "line",
    "call",
    "is",
    "answered",
    "when",
    "slot",
    "free",
    "hello",
    "how",
    "are",
    "you",
    "today",
    "what",
    "can",
    "we",
    "do",
    "for",
    "your",
    "number",
    "thanks",
    "good",
    "bye",
]


def tiny(seed: int, *, context_frames: int = CONTEXT_FRAMES, mimi_context: int = 20) -> Models:
    """Models that run on a CPU; tokens are drawn greedily, so that a run can be repeated.

    `mimi_context` counts the codec's own steps, two to a frame.
    """
    return Models(
        name="tiny",
        mimi=_mimi(seed, mimi_context),
        lm=_language_model(seed + 1, moshi_config(context_frames)),
        text_tokenizer=SentencePieceProcessor(model_proto=tokenizer_model()),
        generation=Generation(use_sampling=False),
        stt=_language_model(seed + 2, stt_config(context_frames)),
        stt_tokenizer=SentencePieceProcessor(model_proto=tokenizer_model()),
        transcription=Transcription(),
    )


def mimi_config(context: int = 20) -> dict[str, Any]:
    """Mimi's shape with a sixteenth of its channels or less. The ratios stay, for they make the frame."""
    config: dict[str, Any] = copy.deepcopy(loaders._mimi_config)
    config["seanet"].update(n_filters=2, dimension=16)
    config["quantizer"].update(
        dimension=8, n_q=CODEBOOKS, bins=CARDINALITY, input_dimension=16, output_dimension=16
    )
    config["transformer"].update(
        d_model=16,
        num_heads=2,
        num_layers=1,
        dim_feedforward=32,
        input_dimension=16,
        output_dimensions=[16],
        context=context,
        layer_scale=0.5,
    )
    return config


def moshi_config(context_frames: int = CONTEXT_FRAMES) -> dict[str, Any]:
    """Moshi's shape: 8 codebooks of its own, 8 of the caller, the acoustic ones a frame late."""
    own: dict[str, Any] = {
        "dim": 32,
        "text_card": VOCABULARY,
        "card": CARDINALITY,
        "num_heads": 4,
        "num_layers": 2,
        "context": context_frames,
        "depformer_dim": 16,
        "depformer_dim_feedforward": 66,
        "depformer_num_heads": 2,
        "depformer_num_layers": 1,
    }
    return {**loaders._lm_kwargs, **own}


def stt_config(context_frames: int = CONTEXT_FRAMES) -> dict[str, Any]:
    """The shape of Kyutai's STT-1B: no voice, no delays, four heads that tell pauses."""
    config = moshi_config(context_frames)
    del config["depformer_layer_scale"], config["depformer_max_period"]
    return config | {
        "n_q": CODEBOOKS,
        "dep_q": 0,
        "delays": [0] * (CODEBOOKS + 1),
        "max_period": 100_000,
        "extra_heads_num_heads": 4,
        "extra_heads_dim": 6,
    }


def tokenizer_model() -> bytes:
    """A SentencePiece model of exactly VOCABULARY pieces, with Moshi's special ids."""
    sentences = itertools.islice(itertools.product(_WORDS, repeat=3), 0, None, 37)
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(" ".join(words) for words in sentences),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _mimi(seed: int, context: int) -> MimiModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mimi = loaders.get_mimi(None, mimi_config(context), device="cpu", num_codebooks=CODEBOOKS)
        with torch.no_grad():
            _fill_codebooks(mimi)
            # As they are initialised, the convolutions let the signal die away, and all codes are equal.
            for name, parameter in mimi.named_parameters():
                if parameter.dim() >= 2 and ("encoder.model" in name or "downsample" in name):
                    parameter.mul_(2.2)
                if "quantizer" in name and "input_proj" in name:
                    parameter.mul_(4.0)
    freeze(mimi)
    return mimi


def _fill_codebooks(mimi: MimiModel) -> None:
    """Codebooks begin as zeros. They are filled before the first use, which keeps a copy."""
    for module in mimi.modules():
        if type(module).__name__ == "EuclideanCodebook":
            module.embedding_sum.normal_(std=0.5)
            module.cluster_usage.fill_(1.0)
            module._initialized.fill_(1.0)


def _language_model(seed: int, config: dict[str, Any]) -> LMModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = loaders.get_moshi_lm(None, lm_kwargs=config, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                # Louder embeddings, so that what is heard changes what is said.
                if name.startswith(("emb.", "text_emb", "depformer_emb", "depformer_text_emb")):
                    parameter.mul_(3.0)
    freeze(lm)
    return lm
