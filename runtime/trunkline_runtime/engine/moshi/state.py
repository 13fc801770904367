"""The streaming state of models, seen as rows: one row of every tensor belongs to one slot.

Moshi's modules keep their state in `State` objects whose tensors lead with the batch, except for rings of
keys and values, which are [2, B, heads, capacity, channels]. moshi's own reset only winds their counters
back; what a caller said stays in them until it is overwritten. So slots that are given back are erased here.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from moshi.modules.transformer import RingKVCache

from trunkline_runtime.engine.moshi.models import UNGENERATED

# What is not 0 at the beginning: the tokens of LMGen, and whether a convolution has seen nothing yet.
_BEGINNINGS: Final = {"cache": UNGENERATED, "first": True}


class SlotRows:
    """The rows of `slots` slots in streaming modules that are named by the caller, which must stream."""

    def __init__(self, slots: int, **modules: Any) -> None:
        # Some tensors are replaced at every step, so it is their places that are kept.
        self._places: list[tuple[str, Any, str, int]] = []
        for prefix, module in modules.items():
            for path, state in module.get_streaming_state().items():
                self._places += _places(f"{prefix}.{path}", state, slots)

    def __repr__(self) -> str:
        return f"<SlotRows of {len(self._places)} tensors>"

    def tensors(self) -> Iterator[tuple[str, torch.Tensor, int]]:
        """Name, tensor and the dimension along which the slots lie, always in the same order."""
        for name, holder, attribute, dimension in self._places:
            yield name, getattr(holder, attribute), dimension

    def erase(self, slots: Sequence[int]) -> None:
        """Makes these slots what they were before anybody used them."""
        rows: torch.Tensor | None = None
        for name, tensor, dimension in self.tensors():
            if rows is None:
                rows = torch.tensor(slots, device=tensor.device)
            tensor.index_fill_(dimension, rows, _BEGINNINGS.get(name.rpartition(".")[2], 0))

    def export(self, slot: int) -> dict[str, torch.Tensor]:
        """A copy of a slot's row of every tensor, on the device."""
        return {name: t.select(d, slot).clone() for name, t, d in self.tensors()}

    def restore(self, slot: int, rows: dict[str, torch.Tensor]) -> None:
        """Puts exported rows in place of a slot's own; names that are not in `rows` stay as they are."""
        with torch.inference_mode():
            for name, tensor, dimension in self.tensors():
                if name in rows:
                    tensor.select(dimension, slot).copy_(rows[name])


def _places(path: str, state: Any, slots: int) -> Iterator[tuple[str, Any, str, int]]:
    for attribute, value in vars(state).items():
        if isinstance(value, RingKVCache):
            yield f"{path}.{attribute}.ring", value, "cache", 1
            yield f"{path}.{attribute}.end_offset", value, "end_offset", 0
        # `initial` is the same for all; a batch of one makes it look like a row.
        elif (
            isinstance(value, torch.Tensor)
            and attribute not in ("initial", "exec_mask")
            and value.dim() >= 1
            and value.shape[0] == slots
        ):
            yield f"{path}.{attribute}", state, attribute, 0
