"""How much memory models and their streaming state take, from the modules themselves."""

from typing import Any

import torch
from moshi.modules.transformer import StreamingMultiheadAttention

from trunkline_runtime.engine.moshi.capacity import Memory
from trunkline_runtime.engine.moshi.models import Models
from trunkline_runtime.engine.moshi.state import SlotRows


def memory_of(models: Models) -> Memory:
    """The arithmetic for these models, before any slot of them is made."""
    parts = [models.mimi, models.lm] + ([models.stt] if models.stt is not None else [])
    stt = models.stt
    fixed = _codec_state(models) + (_frame_bytes(stt) * stt.context if stt is not None else 0)
    return Memory(
        weights=sum(_size(tensor) for part in parts for tensor in _tensors(part)),
        slot_fixed=fixed,
        slot_frame=_frame_bytes(models.lm),
        context_frames=models.context_frames,
    )


def _tensors(module: Any) -> list[Any]:
    return [*module.parameters(), *module.buffers()]


def _size(tensor: torch.Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def _frame_bytes(lm: Any) -> int:
    """Keys and values of one frame in all layers. Quantised layers keep theirs as float16."""
    total = 0
    for module in lm.transformer.modules():
        if isinstance(module, StreamingMultiheadAttention):
            weight = module.in_projs[0].weight
            size = weight.element_size() if weight.dtype.is_floating_point else 2
            total += 2 * module.embed_dim // module.kv_repeat * size
    return total


def _codec_state(models: Models) -> int:
    """What a slot keeps in the codec: 77 states of all sizes in Mimi, which are made to be counted."""
    with torch.inference_mode(), models.mimi.streaming(1):
        rows = SlotRows(1, mimi=models.mimi)
        return sum(_size(tensor) for _, tensor, _ in rows.tensors())
