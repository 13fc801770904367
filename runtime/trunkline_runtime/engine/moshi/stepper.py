"""One step of all slots: a frame of each caller in, a frame of each answer and of each transcript out.

The batch never changes its size, for CUDA graphs hold its addresses; slots join, leave and stall by masks.
The order of one step, each part of which the tests show to be needed:

    1. erase the slots that were left, so that those who join find them new
    2. codec: run the rows that have a frame; encode
    3. codec: reset the rows that are at their first frame, as moshi.server does: the first frame is never
       seen by a language model, and the padding in front of it has to be applied to the second
    4. Moshi and STT: run the rows that have a frame; Moshi takes the first codebooks, STT all
    5. codec: run only the rows that have made a whole frame of tokens; clamp the rest; decode

What a slot says depends on nothing but its own frames; only with sampling do slots share a random state.
"""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from moshi.models import LMGen
from numpy.typing import NDArray

from trunkline_runtime.audio.pcm import Samples
from trunkline_runtime.engine import FRAME_SAMPLES, EngineError
from trunkline_runtime.engine.moshi.models import PAD, Generation, Models, user_codebooks
from trunkline_runtime.engine.moshi.state import SlotRows

SILENT_FRAMES: Final = (
    32  # of silence until its codes no longer change; Mimi's padding is over in 3
)


class EngineBroken(EngineError):
    """The models compute nonsense; no call can go on in this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """What is decided for some slots in one step instead of by the model."""

    text: Mapping[int, int] = field(default_factory=dict)  # slot → the next text token
    silent: Collection[int] = ()  # slots whose agent says nothing in this frame
    banned: Mapping[int, Sequence[int]] = field(
        default_factory=dict
    )  # slot → text tokens not to say
    temperatures: Mapping[int, float] = field(
        default_factory=dict
    )  # of text, where not the models'


FREE: Final = Steering()


@dataclass(frozen=True, slots=True)
class Step:
    """What one step made; a row for each slot, of meaning only for those that had a frame.

    `heard` and `drawn` are what the model took and drew in this very step; with them a slot can be
    rebuilt. `tokens` are the same put in order: the model draws acoustic codebooks a frame late.
    """

    ready: NDArray[np.bool_]  # [B]: the slot has spoken: tokens and pcm are there
    tokens: NDArray[np.int64]  # [B, 1 + dep_q], text first; -2 where not ready
    pcm: Samples  # [B, 1920]
    heard: NDArray[np.int64]  # [B, K] codes of the caller's frame
    drawn: NDArray[np.int64]  # [B, 1 + dep_q]
    words: NDArray[np.int64]  # [B] transcript tokens; PAD without an STT model
    pauses: NDArray[np.float32]  # [B] probability that the caller pauses; 0 without an STT model


class Stepper:
    """Owns the streaming state of the models. One thread at a time may use it."""

    def __init__(self, models: Models, slots: int) -> None:
        self.slots = slots
        self.models = models
        self._device = models.lm.device
        self._taken = user_codebooks(models.lm)
        self._frames = np.zeros(slots, np.int64)  # that each slot has heard since it joined
        self._left: set[int] = set()  # since the last step
        self._forget: set[int] = set()  # transcripts to begin anew
        self._steering = FREE
        self._finite: Any = None  # these three are filled by LMGen's hooks in every step
        self._text: Any = None
        self._audio: Any = None
        with torch.inference_mode():
            self._silence_heard = self._silent_codes()  # [1, K, 1]
            self._silence = self._silence_heard[0, : models.lm.dep_q, 0]
            self._open(models)
            # Staging: one upload and few downloads a step. Pinned, a copy need not wait for the host.
            pinned = self._device.type == "cuda"
            self._input = torch.zeros((slots, FRAME_SAMPLES), dtype=torch.int16, pin_memory=pinned)

    def __repr__(self) -> str:
        return f"<Stepper {self.slots} slots on {self._device} {self.rows!r}>"

    def _open(self, models: Models) -> None:
        self.gen = LMGen(
            models.lm,
            support_out_of_sync=True,
            on_text_logits_hook=self._on_text_logits,
            on_text_hook=self._on_text,
            on_audio_hook=self._on_audio,
            **_arguments(models.generation),
        )
        self._stt = models.stt and LMGen(models.stt, use_sampling=False, support_out_of_sync=True)
        streams = {"mimi": models.mimi, "gen": self.gen, "lm": models.lm}
        if self._stt is not None:
            streams |= {"stt_gen": self._stt, "stt": models.stt}
        self._streaming = contextlib.ExitStack()
        for module in filter(None, (models.mimi, self.gen, self._stt)):
            self._streaming.enter_context(module.streaming(self.slots))
        self.rows = SlotRows(self.slots, **streams)

    def close(self) -> None:
        """Gives the models back without any streaming state, and its memory with it; no step follows.

        LMGen's hooks lead back to here, so what is not let go of now would be there until some collection of
        garbage, and a larger batch might find no room meanwhile.
        """
        self._streaming.close()
        self.rows = SlotRows(0)
        self.gen = self._stt = None

    # --- who is there ------------------------------------------------------------------------------------

    def join(self, slot: int, frames: int = 0) -> None:
        """A caller takes this slot, which is new or was left; so many frames of the call were before."""
        self._frames[slot] = frames

    def leave(self, slot: int) -> None:
        """The caller is gone; nothing of the call is left in the slot after the next step or `settle`."""
        self._left.add(slot)

    def forget_transcript(self, slot: int) -> None:
        """Lets the STT of this slot begin anew; it does not hear the next frame (80 ms)."""
        self._forget.add(slot)

    def settle(self) -> None:
        """Erases what was left; a part of every step."""
        with torch.inference_mode():
            if self._left:
                left = sorted(self._left)
                self.rows.erase(left)
                self._input[left] = 0
            if self._forget and self._stt is not None:
                self._stt.reset_streaming(self._mask(self._forget))
        self._left.clear()
        self._forget.clear()

    # --- a step ------------------------------------------------------------------------------------------

    def step(self, frames: Mapping[int, bytes], steering: Steering = FREE) -> Step:
        """Steps the slots that have a frame of PCM16; raises `EngineBroken`."""
        self.settle()
        active = np.zeros(self.slots, np.bool_)
        active[list(frames)] = True
        first = active & (self._frames == 0)
        self._frames[active] += 1
        # With delays up to d the tokens of a frame are whole d steps later, as LMGen counts, too. Known
        # here, they need not be fetched from the device in the middle of a step.
        ready = active & (self._frames > self.gen.max_delay)
        self._steering = steering
        with torch.inference_mode():
            running = self._on_device(active)
            codes = self._encode(frames, running, first)
            tokens = self._generate(codes, running)
            words, pauses = self._transcribe(codes, running)
            pcm = self._decode(tokens, self._on_device(ready))
            return self._fetched(active, ready, (tokens, codes, words), (pcm, pauses))

    def heard_samples(self) -> Samples:
        """What the slots heard last, [B, 1920]; rows of slots that were not stepped are older."""
        samples: Samples = self._input.numpy().astype(np.float32) / np.float32(32768)
        return samples

    def flush_transcripts(self, slots: Collection[int], steps: int) -> NDArray[np.int64]:
        """Lets the STT of these slots hear so many frames of silence at once; returns its tokens.

        [steps, B]. What it was about to write comes out, as it lags by its delay. No other part of the
        slots is touched; the transcript has to be forgotten afterwards, for the silence was not there.
        """
        if self._stt is None or not steps:
            return np.full((0, self.slots), PAD)
        with torch.inference_mode():
            self._stt.set_exec_mask(self._mask(slots))
            codes = self._silence_heard.expand(self.slots, -1, -1)
            words = [self._stt.step(codes)[:, 0, 0] for _ in range(steps)]
            flushed: NDArray[np.int64] = torch.stack(words).cpu().numpy()
        return flushed

    def _encode(
        self, frames: Mapping[int, bytes], running: torch.Tensor, first: NDArray[np.bool_]
    ) -> torch.Tensor:
        """Codes [B, K, 1] of all codebooks."""
        staged = self._input.numpy()
        for slot, frame in frames.items():
            staged[slot] = np.frombuffer(frame, "<i2")
        pcm = self._input.to(self._device, non_blocking=True).to(torch.float32).div_(32768.0)
        mimi = self.models.mimi
        mimi.set_exec_mask(running)
        codes = mimi.encode(pcm[:, None])
        if first.any():
            self._restart_codec(self._on_device(first))
        return codes

    def _restart_codec(self, first: torch.Tensor) -> None:
        self.models.mimi.reset_streaming(first)

    def _generate(self, codes: torch.Tensor, running: torch.Tensor) -> torch.Tensor:
        """Tokens [B, 1 + dep_q, 1]."""
        self.gen.set_exec_mask(running)
        return self.gen.step(codes[:, : self._taken])

    def _transcribe(self, codes: torch.Tensor, running: torch.Tensor) -> tuple[Any, Any]:
        """Text tokens [B] and the probability of a pause [B], as far as there are any."""
        if self._stt is None:
            return None, None
        self._stt.set_exec_mask(running)
        tokens, heads = self._stt.step_with_extra_heads(codes)
        head = self.models.transcription.pause_head
        pause = heads[head][:, 0, 0] if head is not None and head < len(heads) else None
        return tokens[:, 0, 0], pause

    def _decode(self, tokens: torch.Tensor, ready: torch.Tensor) -> torch.Tensor:
        """Audio [B, 1920]. A token that is none would end the process on a GPU, so all are clamped."""
        mimi = self.models.mimi
        mimi.set_exec_mask(ready)
        pcm = mimi.decode(tokens[:, 1:].clamp(0, mimi.cardinality - 1))
        return pcm[:, 0]

    def _fetched(
        self,
        active: NDArray[np.bool_],
        ready: NDArray[np.bool_],
        integers: tuple[torch.Tensor, torch.Tensor, Any],
        floats: tuple[torch.Tensor, Any],
    ) -> Step:
        """Brings a step's results to the host, in as few copies as there are types."""
        tokens, codes, words = integers
        width, taken = tokens.shape[1], self._taken
        columns = [tokens[..., 0], self._text[:, None], self._audio, codes[:, :taken, 0]]
        columns += [self._finite[:, None].long()] + ([] if words is None else [words[:, None]])
        table = torch.cat(columns, dim=1).cpu().numpy()
        pcm, pauses = floats
        heard = table[:, 2 * width : 2 * width + taken]
        broken = active & (table[:, 2 * width + taken] == 0)
        if broken.any():
            raise EngineBroken(
                f"the model's logits are not finite in slots {np.flatnonzero(broken).tolist()}:"
                " the weights or the device's memory are damaged"
            )
        return Step(
            ready,
            table[:, :width],
            pcm.cpu().numpy(),
            heard,
            table[:, width : 2 * width],
            np.full(self.slots, PAD) if words is None else table[:, -1],
            np.zeros(self.slots, np.float32) if pauses is None else pauses.float().cpu().numpy(),
        )

    # --- inside a step of LMGen: [B] text tokens, then the audio tokens that follow from them -------------

    def _on_text_logits(self, logits: torch.Tensor) -> None:
        self._finite = torch.isfinite(logits[:, 0, 0]).all(dim=-1)
        # Before the model's own temperature divides them; no matter where tokens are not sampled.
        own = self.models.generation.temp_text
        for slot, temperature in self._steering.temperatures.items():
            logits[slot] *= own / temperature
        for slot, tokens in self._steering.banned.items():
            logits[slot, 0, 0, list(tokens)] = -torch.inf

    def _on_text(self, tokens: torch.Tensor) -> None:
        forced = dict.fromkeys(self._steering.silent, PAD) | dict(self._steering.text)
        if forced:
            slots = torch.tensor(list(forced), device=self._device)
            tokens[slots] = torch.tensor(list(forced.values()), device=self._device)
        self._text = tokens

    def _on_audio(self, tokens: torch.Tensor) -> None:
        if self._steering.silent:
            tokens[torch.tensor(list(self._steering.silent), device=self._device)] = self._silence
        self._audio = tokens

    # --- small things ------------------------------------------------------------------------------------

    def _silent_codes(self) -> torch.Tensor:
        """The codes of silence that has lasted, [1, K, 1]."""
        silence = torch.zeros((1, 1, FRAME_SAMPLES), device=self._device)
        mimi = self.models.mimi
        with mimi.streaming(1):
            for _ in range(SILENT_FRAMES):
                codes = mimi.encode(silence)
        return codes

    def _mask(self, slots: Collection[int]) -> torch.Tensor:
        mask = np.zeros(self.slots, np.bool_)
        mask[list(slots)] = True
        return self._on_device(mask)

    def _on_device(self, mask: NDArray[np.bool_]) -> torch.Tensor:
        return torch.from_numpy(mask).to(self._device)


def _arguments(generation: Generation) -> dict[str, Any]:
    return {
        "use_sampling": generation.use_sampling,
        "temp": generation.temp,
        "temp_text": generation.temp_text,
        "top_k": generation.top_k,
        "top_k_text": generation.top_k_text,
    }
