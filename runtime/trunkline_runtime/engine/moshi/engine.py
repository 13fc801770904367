"""The Moshi engine: one thread, one clock of 80 ms frames, one batch for all calls.

Each tick takes the next frame of every call, steps once, and tells each call what came out. The event loop
only puts audio into inboxes and is told events; it never waits for a step. What goes wrong inside a step is
wrong for all calls of the batch: they are told `Failed`, the worker is told that the engine is broken, and
the process ends, for a device in an unknown state can only be cured by a new process.
"""

import logging
import secrets
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from trunkline_runtime.contract import Settings
from trunkline_runtime.engine import FRAME_SAMPLES, Emit
from trunkline_runtime.engine.moshi.capacity import FRAME_SECONDS, Fit, Strain, fit, p99
from trunkline_runtime.engine.moshi.clock import next_due
from trunkline_runtime.engine.moshi.conversation import MoshiConversation
from trunkline_runtime.engine.moshi.dialogue import Dialogue, Outcome, Tokenizer
from trunkline_runtime.engine.moshi.hook import Hooks, policy_of
from trunkline_runtime.engine.moshi.memory import memory_of
from trunkline_runtime.engine.moshi.models import FRAME_RATE, ModelError, Models, limit_context
from trunkline_runtime.engine.moshi.policy import Policy
from trunkline_runtime.engine.moshi.policy_hook import HOOK_NOTES
from trunkline_runtime.engine.moshi.refresh import Refresh, is_near, ring_frames
from trunkline_runtime.engine.moshi.stepper import Steering, Step, Stepper
from trunkline_runtime.engine.moshi.token_log import TokenLog
from trunkline_runtime.engine.moshi.transcript import Transcript

log = logging.getLogger("trunkline.moshi")

WARM_UP_STEPS: Final = 4  # CUDA graphs are captured in the second; two more see them replayed
MEASURED_STEPS: Final = 25
SILENT_POWER: Final = 1e-12  # -120 dBFS
COUNTED: Final = (
    "steps",
    "frames",
    "late_steps",
    "skipped_ticks",
    "dropped_frames",
    "refreshes",
    *HOOK_NOTES,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """How an engine runs what it loads."""

    slots: int
    auto: bool = False  # slots is the most: fewer are as good, where memory or time is short
    context_seconds: float | None = None  # None: as far back as the model can look
    refresh: bool = (
        False  # at a pause near the context's end forget half of it; False: let it slide
    )
    policy: Callable[[Settings], Policy] | None = None  # None: what the settings ask for
    measure: bool = True  # False: offers all slots, whatever a step takes
    token_log: bool = False  # keep each call's tokens while it lasts; they are what was said


class MoshiEngine:
    """See the module. Tests that pass time by hand call `tick` and never `resume`, but `prepare`."""

    def __init__(
        self,
        make_models: Callable[[], Models],
        knobs: Knobs,
        loading: Callable[[], str] = lambda: "loading",
        load_seconds: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """`make_models` runs in `load`; `loading` says how far it has come, `load_seconds` what took how long."""
        self._make_models = make_models
        self._knobs = knobs
        self.loading = loading
        self.load_seconds = load_seconds
        self._offered = knobs.slots
        self._models: Models | None = None
        self._stepper: Stepper | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._hooks = Hooks()  # has a thread from the first call on that has a hook
        self._broken: Callable[[str], None] = lambda _: None
        self._room: Callable[[int], None] = lambda _: None
        # Guards the seats, which both the event loop and the thread change.
        self._lock = threading.Lock()
        self._seated: dict[int, MoshiConversation] = {}
        self._joined: list[int] = []  # since the last tick
        self._left: list[int] = []
        self._refresh: tuple[Refresh, MoshiConversation] | None = (
            None  # one at a time; the thread's
        )
        self._dead: str | None = None
        self._strain = Strain()
        self._totals: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))

    def __repr__(self) -> str:
        return f"<MoshiEngine {len(self._seated)} of {self._offered} slots {self._stepper!r}>"

    # --- Engine ------------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Calls that fit at once; after `resume` not more than keep the frame's deadline."""
        return self._offered

    def load(self) -> None:
        """Brings the weights in; nothing of it is this process's own. Raises `ModelError`."""
        if self._models is not None:
            return
        models = self._make_models()
        if self._knobs.context_seconds is not None:
            limit_context(models.lm, max(1, round(self._knobs.context_seconds * FRAME_RATE)))
        memory = memory_of(models)
        if self._knobs.refresh:
            memory = replace(memory, beside_frames=ring_frames(models.context_frames))
        if models.lm.device.type == "cuda":
            room = torch.cuda.mem_get_info(models.lm.device)
            if self._knobs.auto:
                fits = min(self._knobs.slots, memory.fits(*room))
                self._knobs = replace(self._knobs, slots=max(fits, 1))
            memory.check(self._knobs.slots, *room)
        log.info("memory: %s", memory.sentence(self._knobs.slots))
        self._models = models

    def resume(self) -> None:
        """Makes what must not be cloned: random state, streams, CUDA graphs, the clock."""
        if self._thread is not None:
            return
        self.prepare()
        self._thread = threading.Thread(target=self._run, name="moshi-frames", daemon=True)
        self._thread.start()

    def prepare(self) -> None:
        """All of `resume` but the clock."""
        if self._models is None:
            raise RuntimeError("load comes before resume")
        torch.manual_seed(secrets.randbits(63))
        self._strain = Strain(self._judged)
        if not self._knobs.measure:
            self._restep(self._knobs.slots)
            return
        found = fit(self._knobs.slots, self._measured)
        if self._stepper is None or self._stepper.slots != found.slots:
            self._restep(found.slots)
        self._offered = found.slots
        self._report(found)

    def watch(self, broken: Callable[[str], None], room: Callable[[int], None]) -> None:
        self._broken, self._room = broken, room
        if self._dead is not None:
            broken(self._dead)
        room(self._offered)

    def open(self, settings: Settings, emit: Emit) -> MoshiConversation:
        """Raises ValueError for settings that cannot be used."""
        if self._models is None or self._stepper is None:
            raise RuntimeError("load and resume come before open")
        policy = (self._knobs.policy or self._policy_of)(settings)
        dialogue = Dialogue(policy, tokenizer_of(self._models), transcript_of(self._models))
        try:
            conversation = self._seat(dialogue, emit)
        except RuntimeError:
            dialogue.close()
            raise
        conversation.temperature = settings.get("textTemperature")
        return conversation

    def _policy_of(self, settings: Settings) -> Policy:
        return policy_of(settings, self._hooks)

    def _seat(self, dialogue: Dialogue, emit: Emit) -> MoshiConversation:
        with self._lock:
            if self._dead is not None:
                raise RuntimeError(self._dead)
            free = [n for n in range(self._offered) if n not in self._seated]
            if not free:
                raise RuntimeError(f"all {self._offered} slots of the engine are taken")
            conversation = MoshiConversation(free[0], dialogue, emit, self._closed)
            kept = self._knobs.token_log or self._knobs.refresh
            conversation.token_log = TokenLog() if kept else None
            self._seated[conversation.slot] = conversation
            self._joined.append(conversation.slot)
        return conversation

    def close(self) -> None:
        """Ends the thread; a step that is being made is finished first."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._hooks.close()
        if self._stepper is not None:
            self._stepper.close()

    def totals(self) -> Mapping[str, int]:
        """For /metrics."""
        with self._lock:
            totals = Counter(self._totals)
            conversations = tuple(self._seated.values())
        for conversation in conversations:
            totals.update(conversation.counts())
        return totals

    # --- before the first call ---------------------------------------------------------------------------

    def _restep(self, slots: int) -> Stepper:
        """A stepper of another size, in place of the one that is there."""
        assert self._models is not None
        if self._stepper is not None:
            self._stepper.close()
            self._stepper = None  # its memory has to be free before the next is made
        try:
            self._stepper = Stepper(self._models, slots)
        except torch.OutOfMemoryError as error:
            sentence = memory_of(self._models).sentence(slots)
            raise ModelError(
                f"the device has no room for {sentence}: take fewer slots (slotsPerPod) or a shorter"
                f" contextSeconds ({error})"
            ) from error
        return self._stepper

    def _measured(self, slots: int) -> float:
        """The time of a step in seconds, all slots busy, from the frames' upload to the answers' download.

        It is the p99. On a CPU it is the median: each step there is the same work, and what makes some longer is
        what else the machine does.

        It also warms everything up, and finds weights that make no sense before a caller does.
        """
        stepper = self._stepper
        if stepper is None or stepper.slots != slots:
            stepper = self._restep(slots)
        self._calm()
        draw = np.random.default_rng(0)
        noise = draw.integers(-9_000, 9_000, FRAME_SAMPLES).astype("<i2").tobytes()
        frames = dict.fromkeys(range(slots), noise)
        clock = self._step_clock
        seconds = []
        for number in range(WARM_UP_STEPS + MEASURED_STEPS):
            began = clock()
            stepper.step(frames)
            if number >= WARM_UP_STEPS:
                seconds.append(clock() - began)
        for slot in frames:
            stepper.leave(slot)
            stepper.join(slot)
        stepper.settle()
        return self._judged(seconds)

    def _judged(self, seconds: Sequence[float]) -> float:
        return statistics.median(seconds) if self._on_cpu else p99(seconds)

    @property
    def _step_clock(self) -> Callable[[], float]:
        """What a step costs, in seconds. On a CPU the thread's own time: what else runs there will end."""
        return time.thread_time if self._on_cpu else time.perf_counter

    @property
    def _on_cpu(self) -> bool:
        assert self._models is not None
        return bool(self._models.lm.device.type == "cpu")

    def _calm(self) -> None:
        """On a CPU one thread computes: the models run there are tiny, and threads wait for each other."""
        if self._on_cpu:
            torch.set_num_threads(1)

    def _report(self, found: Fit) -> None:
        if found.keeps and (self._knobs.auto or found.slots == self._knobs.slots):
            log.info("capacity: %s", found)
            return
        log.warning("this machine is too slow for %d slots and offers %s", self._knobs.slots, found)

    # --- the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._calm()
        due = time.monotonic() + FRAME_SECONDS
        try:
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                clock = self._step_clock
                began = clock()
                stepped = self.tick()
                seconds, ended = clock() - began, time.monotonic()
                if stepped:
                    self._judge(seconds, late=ended - due > FRAME_SECONDS)
                due, skipped = next_due(due, ended)
                self._totals["skipped_ticks"] += skipped
        except Exception as error:  # the boundary of the thread; see the module
            log.exception("the Moshi engine is broken")
            self._die(f"the Moshi engine is broken: {error}")

    def tick(self) -> bool:
        """One step for all calls; returns whether there was anything to step."""
        stepper = self._stepper
        assert stepper is not None
        with self._lock:
            seated = dict(self._seated)
            left, joined = self._left, self._joined
            self._left, self._joined = [], []
        for slot in left:
            stepper.leave(slot)
        for slot in joined:
            stepper.join(slot)
        frames, steering = _taken(seated)
        # A strained engine without calls goes on stepping, or it would never find that it is fast again.
        if not frames and not self._strain.strained:
            stepper.settle()
            return False
        step = stepper.step(frames, steering)
        self._tell(step, {slot: seated[slot] for slot in frames})
        self._tend_transcripts(seated)
        if self._knobs.refresh:
            self._tend_refresh(seated)
        self._totals["steps"] += 1
        self._totals["frames"] += len(frames)
        return True

    def _tell(self, step: Step, stepped: Mapping[int, MoshiConversation]) -> None:
        assert self._stepper is not None
        pcm = np.clip(np.rint(step.pcm * 32768), -32768, 32767).astype("<i2")
        levels = _levels(step.pcm)
        heard_levels = _levels(self._stepper.heard_samples())
        for slot, conversation in stepped.items():
            if conversation.token_log is not None:
                conversation.token_log.append(step.drawn[slot].tolist(), step.heard[slot].tolist())
            conversation.advance(
                Outcome(
                    int(step.tokens[slot, 0]) if step.ready[slot] else None,
                    int(step.drawn[slot, 0]),
                    pcm[slot].tobytes(),
                    float(levels[slot]),
                    int(step.words[slot]),
                    float(step.pauses[slot]),
                    float(heard_levels[slot]),
                )
            )

    def _tend_transcripts(self, seated: Mapping[int, MoshiConversation]) -> None:
        """Flushes the transcribing model where a turn is over, and lets it begin anew where it must."""
        assert self._stepper is not None
        ending = {slot: c for slot, c in seated.items() if c.wants_flush}
        if ending:
            steps = max(conversation.flush_frames for conversation in ending.values())
            words = self._stepper.flush_transcripts(ending, steps)
            for slot, conversation in ending.items():
                conversation.flushed(words[:, slot].tolist())
        for slot, conversation in seated.items():
            if conversation.wants_restart():
                self._stepper.forget_transcript(slot)

    def _tend_refresh(self, seated: Mapping[int, MoshiConversation]) -> None:
        """Goes on with the refresh that is under way, or begins the next."""
        assert self._stepper is not None
        if self._refresh is None:
            context = self._stepper.models.context_frames
            for slot, conversation in seated.items():
                log, frames = conversation.token_log, conversation.window_frames
                if log and not log.full and is_near(frames, context) and conversation.calm:
                    self._refresh = Refresh(self._stepper, slot, log), conversation
                    return
            return
        refresh, conversation = self._refresh
        log = conversation.token_log
        if seated.get(refresh.slot) is not conversation or log is None or log.full:
            self._refresh = None
        elif refresh.advance():
            conversation.window_began = refresh.began
            self._totals["refreshes"] += 1
            self._refresh = None

    def _judge(self, seconds: float, *, late: bool) -> None:
        self._totals["late_steps"] += late
        self._totals["step_microseconds"] += round(1e6 * seconds)
        if self._strain.add(seconds):
            strained = self._strain.strained
            log.warning(
                "steps are too slow: no further call is taken"
                if strained
                else "steps are fast again"
            )
            self._room(0 if strained else self._offered)

    def _closed(self, conversation: MoshiConversation) -> None:
        counts = conversation.counts()
        with self._lock:
            if self._seated.get(conversation.slot) is conversation:
                del self._seated[conversation.slot]
                self._left.append(conversation.slot)
            self._totals.update(counts)

    def _die(self, detail: str) -> None:
        with self._lock:
            self._dead = detail
            seated = tuple(self._seated.values())
        for conversation in seated:
            conversation.fail(detail)
        self._broken(detail)


def tokenizer_of(models: Models) -> Tokenizer:
    return Tokenizer(models.text_tokenizer.id_to_piece, models.text_tokenizer.encode)


def transcript_of(models: Models) -> Transcript | None:
    if models.stt is None or models.stt_tokenizer is None:
        return None
    decode: Callable[[Sequence[int]], str] = models.stt_tokenizer.decode
    return Transcript(models.transcription, decode)


def _taken(seated: Mapping[int, MoshiConversation]) -> tuple[dict[int, bytes], Steering]:
    frames: dict[int, bytes] = {}
    silent: list[int] = []
    text: dict[int, int] = {}
    banned: dict[int, Sequence[int]] = {}
    temperatures: dict[int, float] = {}
    for slot, conversation in seated.items():
        taken = conversation.take()
        if taken is None:
            continue
        frames[slot] = taken.frame
        if taken.temperature is not None:
            temperatures[slot] = taken.temperature
        if taken.silent:
            silent.append(slot)
        elif taken.text is not None:
            text[slot] = taken.text
        elif taken.banned:
            banned[slot] = taken.banned
    return frames, Steering(text=text, silent=silent, banned=banned, temperatures=temperatures)


def _levels(samples: NDArray[Any]) -> NDArray[np.float64]:
    """The level of each row of samples in -1…1, in dBFS."""
    power = np.einsum("bt,bt->b", samples, samples) / samples.shape[1]
    levels: NDArray[np.float64] = 10 * np.log10(np.maximum(power, SILENT_POWER))
    return levels
