"""Puts a call into a slot from its token log, in this process or another, as if it had been there all along.

The language model's keys and values are computed anew from the tokens, many frames at once. A ring that has
wrapped holds values that depend on frames long gone from it (each layer looks back one more context), so all
of the call is run through, never only its end. It runs beside the batch in a ring that is a chunk longer
than the context: then no frame of a chunk overwrites one that another of the chunk still looks at, and the
attention mask makes the window the same as step by step. What is left in the end is copied to the slot.

The codec's decoder is rebuilt likewise from the agent's tokens. It takes two steps a frame, and in a ring that
has wrapped the second overwrites what the first still looked at; many frames at once do not repeat that, so
that until the decoder's window has passed the sound differs by some -80 dBFS. Its encoder cannot be, for the log has codes
and no sound: it begins anew, and until its window has passed (10 s for Mimi) may hear a frame in other codes
than it would have. The transcript begins anew.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import torch
from moshi.modules.transformer import RingKVCache, StreamingMultiheadAttention
from moshi.utils.compile import no_cuda_graph
from numpy.typing import NDArray

from trunkline_runtime.engine.moshi.state import SlotRows
from trunkline_runtime.engine.moshi.stepper import Stepper
from trunkline_runtime.engine.moshi.token_log import TokenLog

CHUNK: Final = 64  # frames at once
CODEC_STEPS: Final = 2  # of the codec's transformers a frame
DECODER: Final = ("decoder", "upsample")  # the codec's parts that the agent's tokens run through


def rebuild(stepper: Stepper, slot: int, log: TokenLog, chunk: int = CHUNK) -> None:
    """Makes `slot`, which is new or was left, continue the call; between two steps, on their thread.

    It takes `chunk` frames at once, which costs memory for as many frames of one slot.

    The next frame of the caller is then stepped as any other. The neighbours notice nothing.
    """
    drawn, heard = log.tables()
    stepper.join(slot, frames=len(log))
    stepper.settle()
    if not len(log):
        return
    with torch.inference_mode(), no_cuda_graph():
        _prefill(stepper, slot, drawn, heard, chunk)
        _decode(stepper, slot, drawn, chunk)


def _prefill(
    stepper: Stepper,
    slot: int,
    drawn: NDArray[np.int64],
    heard: NDArray[np.int64],
    chunk: int,
) -> None:
    lm = stepper.models.lm
    inputs = inputs_of(lm, drawn, heard)
    beside = Beside(lm, lambda context: context + chunk)
    with beside.streaming() as rows:
        for piece in inputs.split(chunk, dim=2):
            lm.forward_text(piece)
        place_lm(stepper, slot, rows, (drawn, heard))


def place_lm(
    stepper: Stepper,
    slot: int,
    states: dict[str, Any],
    tables: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> None:
    """Puts what the language model made of a call beside the batch into a slot; `tables` are the call's."""
    (drawn, heard), lm, gen = tables, stepper.models.lm, stepper.gen
    _place(stepper.rows, slot, dict(_named(states, "lm")))
    # LMGen holds the newest tokens until they become inputs.
    frames = len(drawn)
    state = gen._streaming_state
    state.offsets[slot] = frames
    place = frames % state.cache.shape[2]
    own = 1 + lm.dep_q
    state.cache[slot, :own, place] = torch.from_numpy(drawn[-1]).to(lm.device)
    for number, delay in enumerate(lm.delays[own:]):
        if delay:
            state.cache[slot, own + number, place] = int(heard[-delay, number])


def inputs_of(lm: Any, drawn: NDArray[np.int64], heard: NDArray[np.int64]) -> torch.Tensor:
    """What the model was given in each frame, [1, K, T]: tokens of the frame before, codes by their delay."""
    frames = len(drawn)
    inputs = np.broadcast_to(lm._get_initial_token().cpu().numpy(), (1, lm.num_codebooks, frames))
    inputs = inputs.copy()
    own = 1 + lm.dep_q
    for row, delay in enumerate(lm.delays[:own]):
        inputs[0, row, delay + 1 :] = drawn[delay : frames - 1, row]
    for number, delay in enumerate(lm.delays[own:]):
        inputs[0, own + number, delay + 1 :] = heard[1 : frames - delay, number]
    return torch.from_numpy(inputs).to(lm.device)


def _decode(stepper: Stepper, slot: int, drawn: NDArray[np.int64], chunk: int) -> None:
    lm, mimi = stepper.models.lm, stepper.models.mimi
    delays = lm.delays[1 : 1 + lm.dep_q]
    late = stepper.gen.max_delay
    spoken = len(drawn) - late
    if spoken <= 0:
        return
    columns = [drawn[delay : delay + spoken, 1 + k] for k, delay in enumerate(delays)]
    codes = torch.from_numpy(np.stack(columns)[None]).to(lm.device)
    with Beside(mimi, lambda context: context + CODEC_STEPS * chunk).streaming() as rows:
        for piece in codes.split(chunk, dim=2):
            mimi.decode(piece)
        made = {
            name: found
            for name, found in _named(rows, "mimi")
            if name.removeprefix("mimi.").startswith(DECODER)
        }
    _place(stepper.rows, slot, made)


class Beside:
    """A second stream of a module, a batch of one. The module's own waits while this one runs.

    `ring` tells how many frames its rings hold, from how far the module looks back; the attention mask keeps
    the window the same.
    """

    def __init__(self, module: Any, ring: Callable[[int], int]) -> None:
        self._module = module
        attentions = [m for m in module.modules() if isinstance(m, StreamingMultiheadAttention)]
        contexts = [attention.context for attention in attentions]
        own = module.get_streaming_state()
        module._stop_streaming()
        try:
            # The ring's length is read from the context when it is made, the mask's window when it is used.
            for attention, context in zip(attentions, contexts, strict=True):
                attention.context = context and ring(context)
            with module.streaming(1):
                self._states: dict[str, Any] = module.get_streaming_state()
        finally:
            for attention, context in zip(attentions, contexts, strict=True):
                attention.context = context
            module.set_streaming_state(own)

    @contextlib.contextmanager
    def streaming(self) -> Iterator[dict[str, Any]]:
        """Yields its states by path; what is run inside goes on where it was."""
        own = self._module.get_streaming_state()
        self._module.set_streaming_state(self._states)
        try:
            yield self._states
        finally:
            self._module.set_streaming_state(own)


def _named(states: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Rings as they are, and the rows of a batch of one, under the names that the stepper's rows have."""
    for path, state in states.items():
        for attribute, value in vars(state).items():
            name = f"{prefix}.{path}.{attribute}"
            if isinstance(value, RingKVCache):
                yield f"{name}.ring", value
                yield f"{name}.end_offset", value.end_offset[0]
            elif isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == 1:
                yield name, value[0]


def _place(rows: SlotRows, slot: int, made: dict[str, Any]) -> None:
    """Copies a batch of one into a slot; of a longer ring, what the slot's ring would still hold."""
    for name, tensor, dimension in rows.tensors():
        found = made.get(name)
        if found is None:
            continue
        row = tensor.select(dimension, slot)
        if not isinstance(found, RingKVCache):
            row.copy_(found)
            continue
        # row is [2, heads, capacity, channels]; the frame at position p lies at p modulo the capacity.
        capacity, end = row.shape[2], int(found.end_offset[0])
        positions = torch.arange(max(0, end - capacity), end, device=row.device)
        row[:, :, positions % capacity] = found.cache[:, 0][:, :, positions % found.capacity]
