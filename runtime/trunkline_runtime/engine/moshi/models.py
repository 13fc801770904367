"""The models that a Moshi engine runs, however they were made, and what is fixed about their streams.

Shapes: B slots, K codebooks, T frames. Audio is [B, 1, 1920] float32 in -1…1 a frame of 80 ms; codes and
tokens are int64 [B, K, 1]. Ids are those of moshi 0.2.13.
"""

from dataclasses import dataclass, field
from typing import Any, Final

from moshi.models import LMModel, MimiModel
from moshi.modules.transformer import StreamingMultiheadAttention
from sentencepiece import SentencePieceProcessor

from trunkline_runtime.engine import EngineError

FRAME_RATE: Final = 12.5  # frames a second
UNGENERATED: Final = -2  # the token of a slot that has nothing to say yet, or was not stepped

# Text ids of the inner monologue and of transcripts alike.
END_OF_PAD: Final = 0  # a word begins with the next id
BOS: Final = 1
EOS: Final = 2
PAD: Final = 3  # nothing is said in this frame


class ModelError(EngineError, ValueError):
    """Models that cannot be run as they were asked for; the text says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How tokens are drawn; the defaults are those of `moshi.models.LMGen`.

    All slots of a batch draw from one random state, so what a call samples depends on its neighbours.
    """

    use_sampling: bool = True
    temp: float = 0.8  # of audio tokens
    temp_text: float = 0.7
    top_k: int = 250
    top_k_text: int = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcription:
    """What an STT model's config says about its timing (`stt_config` in Kyutai's config.json)."""

    delay_seconds: float = 0.5  # from a sound to the frame that tells of it
    prefix_seconds: float = 0.0  # silence that the model wants first
    pause_head: int | None = 2  # of the extra heads, which tells a pause; None: the model has none


@dataclass(slots=True, kw_only=True)
class Models:
    """One set of weights. Nothing here knows of calls; streaming state is made by the stepper."""

    name: str
    mimi: MimiModel  # set to encode as many codebooks as the hungriest model takes
    lm: LMModel
    text_tokenizer: SentencePieceProcessor
    generation: Generation = field(default_factory=Generation)
    stt: LMModel | None = None
    stt_tokenizer: SentencePieceProcessor | None = None
    transcription: Transcription = field(default_factory=Transcription)

    def __post_init__(self) -> None:
        wanted = max(user_codebooks(self.lm), self.lm.dep_q)
        if self.stt is not None:
            wanted = max(wanted, user_codebooks(self.stt))
            if self.stt_tokenizer is None:
                raise ModelError("an STT model needs a tokenizer of its own")
        if self.mimi.total_codebooks < wanted:
            raise ModelError(
                f"Mimi has {self.mimi.total_codebooks} codebooks and the language models take {wanted}:"
                " take the codec that belongs to them"
            )
        self.mimi.set_num_codebooks(wanted)

    @property
    def context_frames(self) -> int:
        """How many frames Moshi looks back, which is also the length of its ring of keys and values."""
        return int(self.lm.context)


def user_codebooks(lm: LMModel) -> int:
    """How many codebooks of the caller's audio a language model takes, the first ones of Mimi's."""
    return int(lm.num_codebooks - lm.dep_q - 1)


def limit_context(lm: LMModel, frames: int) -> None:
    """Makes the model look back `frames` at most. Comes before streaming, for rings are made then."""
    if not 1 <= frames <= lm.context:
        raise ModelError(
            f"a context of {frames} frames ({frames / FRAME_RATE:g} s) is not within the model's"
            f" 1…{lm.context} ({lm.context / FRAME_RATE:g} s): change contextSeconds"
        )
    # The depth transformer streams over codebooks, not over time, and has no context of its own.
    for module in lm.transformer.modules():
        if isinstance(module, StreamingMultiheadAttention):
            module.context = frames
    lm.context = frames


def freeze(module: Any) -> None:
    """No gradients, and the behaviour of inference."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
