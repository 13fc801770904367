"""Tiny models, calls made of noise, and the stock `moshi.server` as the oracle of what each call must hear."""

import asyncio
import functools
import importlib.util
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import torch
from numpy.typing import NDArray

from trunkline_runtime.audio.pcm import to_samples
from trunkline_runtime.engine import FRAME_SAMPLES
from trunkline_runtime.engine.moshi.models import Models
from trunkline_runtime.engine.moshi.stepper import Stepper
from trunkline_runtime.engine.moshi.tiny import tiny

torch.set_num_threads(1)

CONTEXT_FRAMES = 12  # so that rings wrap within a second
SHORTEST, LONGEST = 6, 30  # frames of a call
MAIN = "\nwith torch.no_grad():\n    main()"


@functools.cache
def models() -> Models:
    """The models of all steppers; their streaming state is one stepper's at a time."""
    return tiny(0, context_frames=CONTEXT_FRAMES, mimi_context=CONTEXT_FRAMES)


@dataclass(frozen=True, slots=True)
class Frame:
    """What a call got for one of its frames; None while the model has nothing to say."""

    tokens: tuple[int, ...] | None  # text, then audio
    pcm: NDArray[np.float32] | None
    word: int  # token of the transcript
    pause: float


@functools.cache
def call(number: int) -> tuple[bytes, ...]:
    """The frames that a caller sends; the same for the same number."""
    draw = np.random.default_rng(1_000 + number)
    frames = int(draw.integers(SHORTEST, LONGEST))
    loud = 32_767 * draw.uniform(0.05, 0.25)
    noise = draw.normal(0, loud, (frames, FRAME_SAMPLES)).clip(-32_768, 32_767)
    return tuple(frame.astype("<i2").tobytes() for frame in noise)


# --- the oracle --------------------------------------------------------------------------------------------


class WithoutMain(SourceFileLoader):
    """Imports `moshi.server`, which otherwise would start a server, without its last two lines."""

    def get_code(self, fullname: str) -> CodeType:
        source, main, _ = Path(self.path).read_text().rpartition(MAIN)
        assert main, "moshi.server ends otherwise than it did: read it again"
        return compile(source, self.path, "exec")


def stock_server() -> ModuleType:
    """The module `moshi.server`; its log is a coloured line a frame, and is not kept."""
    found = importlib.util.find_spec("moshi.server")
    assert found is not None
    assert found.origin is not None
    loader = WithoutMain("moshi.server", found.origin)
    spec = importlib.util.spec_from_loader("moshi.server", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.__dict__["log"] = lambda *_: None
    return module


class Oracle:
    """One caller at a time at the stock server, without a network and without Opus."""

    def __init__(self) -> None:
        own = tiny(0, context_frames=CONTEXT_FRAMES, mimi_context=CONTEXT_FRAMES)
        server = stock_server()
        self._state = state = server.ServerState(
            "moshi", own.mimi, own.text_tokenizer, own.lm, 1.0, "cpu", use_sampling=False
        )
        self._stt = server.LMGen(own.stt, use_sampling=False)
        self._stt.streaming_forever(1)
        self._codes: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor | None] = []
        self._pcm: list[NDArray[np.float32]] = []
        step = state.lm_gen.step

        def recorded(codes: torch.Tensor) -> torch.Tensor | None:
            self._codes.append(codes)
            self._tokens.append(step(codes))
            return self._tokens[-1]

        state.lm_gen.step = recorded

    # --- what the server takes for Opus, and for a socket ---

    def append_bytes(self, payload: bytes) -> NDArray[np.float32]:
        return to_samples(payload)

    def append_pcm(self, pcm: NDArray[np.float32]) -> bytes:
        self._pcm.append(pcm.copy())
        return b""

    async def send_bytes(self, message: bytes) -> None:
        """Text of the agent; the tokens are compared instead."""

    async def _messages(self, frames: Sequence[bytes]) -> AsyncIterator[Any]:
        for frame in frames:
            yield SimpleNamespace(type=aiohttp.WSMsgType.BINARY, data=b"\x01" + frame)

    def answer(self, frames: Sequence[bytes]) -> list[Frame]:
        """What the stock code answers to a whole call."""
        for recorded in (self._codes, self._tokens, self._pcm):
            recorded.clear()
        messages = self._messages(frames)
        socket = _Socket(messages, self.send_bytes)
        with torch.no_grad():
            self._state.mimi.reset_streaming()
            self._state.lm_gen.reset_streaming()
            asyncio.run(self._state.recv_loop(socket, self, self))
            self._stt.reset_streaming()
            transcript = [self._stt.step_with_extra_heads(codes) for codes in self._codes]
        spoken = iter(self._pcm)
        return [
            Frame(
                None if tokens is None else tuple(tokens[0, :, 0].tolist()),
                None if tokens is None else next(spoken),
                int(words[0, 0, 0]),
                float(heads[2][0, 0, 0]),
            )
            for tokens, (words, heads) in zip(self._tokens, transcript, strict=True)
        ]


@dataclass(slots=True)
class _Socket:
    messages: AsyncIterator[Any]
    send_bytes: Any

    def __aiter__(self) -> AsyncIterator[Any]:
        return self.messages


@functools.cache
def oracle() -> Oracle:
    return Oracle()


@functools.cache
def expected(number: int) -> list[Frame]:
    """What call `number` must get."""
    return oracle().answer(call(number))


# --- the stepper, with callers who come, go and stall -------------------------------------------------------


def drive(
    stepper: Stepper, numbers: Sequence[int], seed: int, *, sends: float = 0.8
) -> dict[int, list[Frame]]:
    """Lets the calls come to the slots as they get free, each sending a frame in a step with this chance."""
    chance = random.Random(seed)
    waiting, at = list(numbers), dict.fromkeys(numbers, 0)
    seated: dict[int, int] = {}
    got: dict[int, list[Frame]] = {number: [] for number in numbers}
    while waiting or seated:
        for slot in chance.sample(range(stepper.slots), stepper.slots):
            if slot not in seated and waiting and chance.random() < 0.5:
                seated[slot] = waiting.pop(0)
                stepper.join(slot)
        sending = {s: call(n)[at[n]] for s, n in seated.items() if chance.random() < sends}
        for slot, frame in step(stepper, sending).items():
            number = seated[slot]
            got[number].append(frame)
            at[number] += 1
            if at[number] == len(call(number)):
                del seated[slot]
                stepper.leave(slot)
    return got


def step(stepper: Stepper, frames: dict[int, bytes], **more: Any) -> dict[int, Frame]:
    """One step, and what each slot got."""
    made = stepper.step(frames, **more)
    return {
        slot: Frame(
            tuple(made.tokens[slot].tolist()) if made.ready[slot] else None,
            made.pcm[slot].copy() if made.ready[slot] else None,
            int(made.words[slot]),
            float(made.pauses[slot]),
        )
        for slot in frames
    }


@dataclass(slots=True)
class Differences:
    """Between what calls got and what they had to get."""

    frames: int = 0
    missing: int = 0  # one has spoken and the other has not
    tokens: int = 0
    words: int = 0
    pcm: float = 0.0  # the largest distance of two samples
    pause: float = 0.0
    calls: int = 0  # that differ in any of these by more than rounding

    @property
    def none(self) -> bool:
        return self.calls == 0


def differences(got: dict[int, list[Frame]]) -> Differences:
    found = Differences()
    for number, frames in got.items():
        before = (found.missing, found.tokens, found.words)
        pcm = pause = 0.0
        for mine, theirs in zip(frames, expected(number), strict=True):
            found.frames += 1
            found.words += mine.word != theirs.word
            pause = max(pause, abs(mine.pause - theirs.pause))
            if mine.pcm is None or theirs.pcm is None:
                found.missing += (mine.pcm is None) != (theirs.pcm is None)
                continue
            found.tokens += mine.tokens != theirs.tokens
            pcm = max(pcm, float(np.abs(mine.pcm - theirs.pcm).max()))
        found.calls += (
            before != (found.missing, found.tokens, found.words) or max(pcm, pause) > 1e-5
        )
        found.pcm, found.pause = max(found.pcm, pcm), max(found.pause, pause)
    return found
