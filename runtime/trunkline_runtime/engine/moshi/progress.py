"""How far the loading of weights has come: written by the threads that load, read by any."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from enum import StrEnum


class Phase(StrEnum):
    """The steps of loading, in their order."""

    DOWNLOAD = "download"  # from the Hub into its cache
    BUILD = "build"  # modules without memory, and the check that the file fits them
    READ = "read"  # files to the device
    FINISH = "finish"  # weights into modules, quantised where asked for
    VERIFY = "verify"  # what is left of hashing when all else is done


class Progress:
    """One load. `str` is the sentence for `/readyz`; `seconds` holds how long each finished phase took.

    `tell` is called with that sentence when a phase begins and at each tenth of one that counts bytes.
    """

    def __init__(
        self,
        tell: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._lock = threading.Lock()
        self._phase: Phase | None = None
        self._done = 0
        self._total = 0
        self.seconds: dict[str, float] = {}  # by the name of the phase

    def __repr__(self) -> str:
        return f"<Progress {self}: {self._done} of {self._total} bytes, {self.seconds}>"

    def __str__(self) -> str:
        with self._lock:
            return self._sentence()

    @contextlib.contextmanager
    def phase(self, phase: Phase, total: int = 0) -> Iterator[None]:
        """Times a phase; `total` is in bytes, 0 where there is nothing to count."""
        began = self._clock()
        with self._lock:
            self._phase, self._done, self._total = phase, 0, total
            sentence = self._sentence()
        self._tell(sentence)
        try:
            yield
        finally:
            took = self._clock() - began
            self.seconds[phase] = self.seconds.get(phase, 0.0) + took

    def add(self, count: int) -> None:
        """Counts bytes that have arrived."""
        with self._lock:
            before = self._tenths()
            self._done += count
            sentence = self._sentence() if self._tenths() > before else None
        if sentence is not None:
            self._tell(sentence)

    def _tenths(self) -> int:
        return self._done * 10 // self._total if self._total else 0

    def _sentence(self) -> str:
        verb = "downloading" if self._phase is Phase.DOWNLOAD else "loading"
        if not self._total:
            return verb
        return f"{verb} {min(self._done * 100 // self._total, 100)} %"
