"""The speech engine: spoken conversations on CPU, offline, from what is inside the wheels.

Two threads serve all calls. The thread of turns finds voice, keeps the turns and lets replies out at the
pace of speech; the state of all calls is its own. The thread of models recognises and speaks, one piece at
a time, since the calls share the cores anyway. The event loop only puts messages in the inboxes of calls.
Messages are taken from the inboxes one by one in turn, so that no call waits for another's backlog.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

from trunkline_runtime.audio.pcm import Samples
from trunkline_runtime.contract import Settings
from trunkline_runtime.engine import Emit
from trunkline_runtime.engine.speech.conversation import SpeechConversation, Step
from trunkline_runtime.engine.speech.dialogue import Turn
from trunkline_runtime.engine.speech.recognition import Recogniser
from trunkline_runtime.engine.speech.replies import Script
from trunkline_runtime.engine.speech.synthesis import Synthesiser
from trunkline_runtime.engine.speech.voice_activity import Detector

log = logging.getLogger("trunkline.speech")

CACHED_SENTENCES: Final = 64  # about 10 MB; greetings, fallbacks and answers recur
READY_DETECTORS: Final = 4  # made before the first call; each takes 70 ms

Result = TypeVar("Result")


class SpeechEngine:
    """See the module. Conversations may be opened on any thread between `resume` and `close`."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._recogniser: Recogniser | None = None
        self._synthesiser: Synthesiser | None = None
        self._sentences: OrderedDict[str, bytes] = OrderedDict()  # the thread of models' own
        self._detectors: list[Detector] = []  # not in use; the thread of turns' own
        self._models: ThreadPoolExecutor | None = None
        self._turns: threading.Thread | None = None
        # What the thread of turns waits for, guarded by the condition.
        self._changed = threading.Condition()
        self._ready: OrderedDict[SpeechConversation, None] = OrderedDict()
        self._results: deque[tuple[SpeechConversation, Step]] = deque()
        self._alarms: dict[SpeechConversation, float] = {}
        self._stopping = False

    @property
    def slots(self) -> int:
        return self._slots

    # --- Engine ------------------------------------------------------------------------------------------

    def load(self) -> None:
        self._recogniser = Recogniser()
        self._synthesiser = Synthesiser()
        self._detectors = [Detector() for _ in range(min(self._slots, READY_DETECTORS))]

    def resume(self) -> None:
        self._models = ThreadPoolExecutor(1, "speech-models")
        self._turns = threading.Thread(target=self._run, name="speech-turns", daemon=True)
        self._turns.start()

    def open(self, settings: Settings, emit: Emit) -> SpeechConversation:
        """Raises `ReplyError`, a ValueError, for settings that cannot be used.

        The first events of a greeting may be told before this returns.
        """
        if self._turns is None:
            raise RuntimeError("load and resume come before open")
        return SpeechConversation(self, Script.of(settings), emit)

    def close(self) -> None:
        """Ends both threads. What the models are at is finished first, which takes up to a second."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._turns is not None:
            self._turns.join()
        if self._models is not None:
            self._models.shutdown(wait=True, cancel_futures=True)

    # --- Workplace ---------------------------------------------------------------------------------------

    def ready(self, conversation: SpeechConversation) -> None:
        with self._changed:
            self._ready[conversation] = None
            self._changed.notify()

    def wake(self, conversation: SpeechConversation, at: float) -> None:
        with self._changed:
            self._alarms[conversation] = at
            self._changed.notify()

    def dismiss(self, conversation: SpeechConversation) -> None:
        self._post(conversation, lambda now: self._put_away(conversation))

    def detector(self) -> Detector:
        return self._detectors.pop() if self._detectors else Detector()

    def recognise(
        self,
        conversation: SpeechConversation,
        work: tuple[Turn, Samples],
        told: Callable[[str | None, float], None],
    ) -> None:
        self._ask(conversation, partial(self._recognised, *work), told)

    def synthesise(
        self,
        conversation: SpeechConversation,
        sentence: str,
        made: Callable[[bytes | None, float], None],
    ) -> None:
        self._ask(conversation, partial(self._spoken, sentence), made)

    # --- the thread of models ----------------------------------------------------------------------------

    def _recognised(self, turn: Turn, samples: Samples) -> str:
        assert self._recogniser is not None, "resume comes after load"
        return "" if turn.dropped else self._recogniser.recognise(samples)

    def _spoken(self, sentence: str) -> bytes:
        assert self._synthesiser is not None, "resume comes after load"
        pcm = self._sentences.pop(sentence, None)
        if pcm is None:
            pcm = self._synthesiser(sentence)
        self._sentences[sentence] = pcm
        if len(self._sentences) > CACHED_SENTENCES:
            self._sentences.popitem(last=False)
        return pcm

    # --- the thread of turns -----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._something, self._patience())
                if self._stopping:
                    return
                steps = list(self._results)
                self._results.clear()
                now = time.monotonic()
                for conversation in [c for c, at in self._alarms.items() if at <= now]:
                    del self._alarms[conversation]
                    steps.append((conversation, conversation.tick))
                if self._ready:
                    conversation, _ = self._ready.popitem(last=False)
                    steps.append((conversation, conversation.receive))
            for conversation, step in steps:
                self._attempt(conversation, step)

    def _something(self) -> bool:
        return bool(self._stopping or self._results or self._ready) or self._patience() == 0

    def _patience(self) -> float | None:
        """Seconds until the next alarm."""
        if not self._alarms:
            return None
        return max(0.0, min(self._alarms.values()) - time.monotonic())

    def _attempt(self, conversation: SpeechConversation, step: Step) -> None:
        try:
            step(time.monotonic())
        except (
            Exception
        ):  # the boundary of a call: its failure must not end the thread of all calls
            log.exception("a call failed in the speech engine")
            conversation.fail("the speech engine failed")
        if conversation.expects:
            self.ready(conversation)

    def _put_away(self, conversation: SpeechConversation) -> None:
        with self._changed:
            self._alarms.pop(conversation, None)
        if detector := conversation.release():
            detector.reset()
            self._detectors.append(detector)

    def _ask(
        self,
        conversation: SpeechConversation,
        work: Callable[[], Result],
        done: Callable[[Result | None, float], None],
    ) -> None:
        assert self._models is not None, "conversations are opened after resume"
        future = self._models.submit(work)
        future.add_done_callback(
            lambda future: self._post(conversation, partial(self._done, conversation, future, done))
        )

    def _post(self, conversation: SpeechConversation, step: Step) -> None:
        with self._changed:
            self._results.append((conversation, step))
            self._changed.notify()

    def _done(
        self,
        conversation: SpeechConversation,
        future: "Future[Any]",
        done: Callable[[Any, float], None],
        now: float,
    ) -> None:
        if conversation.closed or future.cancelled():
            return
        if error := future.exception():
            log.error("a model of the speech engine failed", exc_info=error)
        done(None if error else future.result(), now)
