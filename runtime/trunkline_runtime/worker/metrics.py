"""What a worker counts, for /metrics."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Protocol, runtime_checkable

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from trunkline_runtime.engine import Engine
from trunkline_runtime.worker.control import ControlLinks
from trunkline_runtime.worker.slots import State
from trunkline_runtime.worker.switchboard import Switchboard


@runtime_checkable
class Counting(Protocol):
    """An engine that has totals of its own to show."""

    def totals(self) -> Mapping[str, int]:
        """Totals by name, such as `late_frames`; they never fall."""


class Lateness:
    """How punctual an engine was since it was last asked, where its totals tell of frames or steps that were late."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before = self._counts()

    def share(self) -> float:
        """Late frames of those since the last time, from 0 to 1; 0 where there were none."""
        before, self._before = self._before, self._counts()
        frames, late = (now - then for now, then in zip(self._before, before, strict=True))
        return min(1.0, late / frames) if frames > 0 else 0.0

    def _counts(self) -> tuple[int, int]:
        totals = self._engine.totals() if isinstance(self._engine, Counting) else {}
        what = "steps" if "late_steps" in totals else "frames"
        return totals.get(what, 0), totals.get(f"late_{what}", 0)


@runtime_checkable
class Loading(Protocol):
    """An engine that loads weights."""

    def load_seconds(self) -> Mapping[str, float]:
        """How long each finished phase of loading took, by its name."""


class WorkerMetrics:
    """One registry per worker, so that a process may hold several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.calls = Counter(
            "trunkline_worker_calls",
            "Calls that ended, by the close code that the worker gave, or `caller`.",
            ["code"],
            registry=self.registry,
        )
        self.refused = Counter(
            "trunkline_worker_refused",
            "Data links refused before the 101, by status.",
            ["status"],
            registry=self.registry,
        )
        audio = Counter(
            "trunkline_worker_audio_bytes",
            "PCM16 at 24 kHz that crossed the seam to the engine.",
            ["direction"],
            registry=self.registry,
        )
        self.heard = audio.labels("in")
        self.spoken = audio.labels("out")

    def watch(self, switchboard: Switchboard) -> None:
        """Shows the slots as they are when a scrape asks."""
        slots = Gauge(
            "trunkline_worker_slots", "Slots by state.", ["state"], registry=self.registry
        )
        for state in State:
            slots.labels(state.value).set_function(partial(_count, switchboard, state))
        draining = Gauge(
            "trunkline_worker_draining", "1 while no new call is taken.", registry=self.registry
        )
        draining.set_function(lambda: float(switchboard.draining))

    def watch_links(self, links: ControlLinks) -> None:
        up = Gauge("trunkline_worker_links", "Gateways linked to.", registry=self.registry)
        up.set_function(lambda: links.up)

    def watch_engine(self, engine: Engine) -> None:
        if isinstance(engine, Counting):
            self.registry.register(_EngineTotals(engine))
        if isinstance(engine, Loading):
            self.registry.register(_LoadSeconds(engine))


def _count(switchboard: Switchboard, state: State) -> float:
    return switchboard.counts()[state]


class _EngineTotals(Collector):
    def __init__(self, engine: Counting) -> None:
        self._engine = engine

    def collect(self) -> Iterable[CounterMetricFamily]:
        for name, value in self._engine.totals().items():
            yield CounterMetricFamily(
                f"trunkline_engine_{name}", f"Total of the engine: {name}.", value=value
            )


class _LoadSeconds(Collector):
    def __init__(self, engine: Loading) -> None:
        self._engine = engine

    def collect(self) -> Iterable[GaugeMetricFamily]:
        seconds = GaugeMetricFamily(
            "trunkline_engine_load_seconds", "Loading of weights, by phase.", labels=["phase"]
        )
        for phase, value in self._engine.load_seconds().items():
            seconds.add_metric([phase], value)
        yield seconds
