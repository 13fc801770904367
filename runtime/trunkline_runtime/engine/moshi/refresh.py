"""Lets Moshi forget the older part of a call at once, instead of letting it slide out frame by frame.

A window that slides is exact and costs nothing, but the model was not trained on it. A refresh makes the slot
what it would be if the call had begun with its last frames: their tokens run through the language model anew,
in a stream beside the batch, a chunk with every step of all, until it has caught up with the call. Then the
slot gets what was made. Neither caller nor neighbours lose a frame; the codec and the transcript are not
touched.

It begins at a pause of both, once the window is nearly full. Where there is no pause the window slides until one
comes.
"""

from typing import Final

import torch
from moshi.utils.compile import no_cuda_graph

from trunkline_runtime.engine.moshi.rebuild import CHUNK, Beside, inputs_of, place_lm
from trunkline_runtime.engine.moshi.stepper import Stepper
from trunkline_runtime.engine.moshi.token_log import TokenLog

NEAR: Final = 0.8  # of the context: from there on a pause is taken
KEPT: Final = (
    0.5  # of the context; less would forget what was just said, more would come again soon
)


def is_near(frames: int, context: int) -> bool:
    """Whether a window with so many frames since it began is nearly full."""
    return frames >= NEAR * context


def ring_frames(context: int, chunk: int = CHUNK) -> int:
    """Frames that the ring beside the batch holds: those kept, and those that come while it catches up."""
    kept = max(1, int(KEPT * context))
    return kept + 2 * chunk + kept // chunk


class Refresh:
    """One refresh under way, on the stepper's thread; `began` is the frame of the call that is now its first."""

    def __init__(self, stepper: Stepper, slot: int, log: TokenLog, chunk: int = CHUNK) -> None:
        context = stepper.models.context_frames
        self.slot = slot
        self.began = max(0, len(log) - int(KEPT * context))
        self._stepper = stepper
        self._log = log
        self._chunk = chunk
        self._done = 0  # frames since `began`
        with torch.inference_mode():
            ring = ring_frames(context, chunk)
            self._beside = Beside(stepper.models.lm, lambda _: ring)

    def __repr__(self) -> str:
        return f"<Refresh of slot {self.slot} from frame {self.began}: {self._done} done>"

    def advance(self) -> bool:
        """Runs a chunk, between two steps; returns whether the slot has been refreshed, which ends it."""
        tail = self._log.tail(self.began)
        tables = tail.tables()
        lm = self._stepper.models.lm
        with torch.inference_mode(), no_cuda_graph(), self._beside.streaming() as states:
            chunk = inputs_of(lm, *tables)[:, :, self._done : self._done + self._chunk]
            if chunk.shape[2]:
                lm.forward_text(chunk)
            self._done += chunk.shape[2]
            if self._done < len(tail):
                return False
            place_lm(self._stepper, self.slot, states, tables)
        return True
