"""A picture of settings side by side: calls over time, and the slots that were there for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from trunkline_operator.simulation.model import Outcome
from trunkline_operator.simulation.traces import HOUR, Trace

INK: Final = {"calls": "#1f2933", "slots": "#2f6fb0", "burst": "#d1495b", "grid": "#d9dee3"}
INCHES: Final = (9.0, 2.6)
HEADROOM: Final = 1.05


def plotted(path: Path, trace: Trace, runs: Sequence[tuple[str, Outcome]]) -> None:
    """Writes a PNG with one panel for each (name, outcome)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width, height = INCHES
    figure, panels = pyplot.subplots(
        len(runs), 1, figsize=(width, height * len(runs)), sharex=True, sharey=True, squeeze=False
    )
    for panel, (name, outcome) in zip(panels[:, 0], runs, strict=True):
        _panel(panel, name, outcome)
    tops = [max(sample.slots, sample.calls) for _, outcome in runs for sample in outcome.curve]
    panels[0, 0].set_ylim(0, max(tops, default=1) * HEADROOM + 1)
    panels[0, 0].legend(
        loc="lower right", bbox_to_anchor=(1, 1), frameon=False, ncols=3, fontsize=9
    )
    panels[-1, 0].set_xlabel(f"hours of {trace.name}")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _panel(panel: Any, name: str, outcome: Outcome) -> None:
    hours = [sample.at / HOUR for sample in outcome.curve]
    calls = [sample.calls for sample in outcome.curve]
    warm = [sample.calls - sample.burst for sample in outcome.curve]
    slots = [sample.slots for sample in outcome.curve]
    panel.fill_between(hours, slots, step="post", color=INK["slots"], alpha=0.18, lw=0)
    panel.step(hours, slots, where="post", color=INK["slots"], lw=1.0, label="warm slots")
    panel.fill_between(
        hours, warm, calls, color=INK["burst"], alpha=0.8, lw=0, label="calls on burst"
    )
    panel.plot(hours, calls, color=INK["calls"], lw=0.9, label="calls")
    refused = f", {outcome.refused} refused" if outcome.refused else ""
    panel.set_title(
        f"{name}: {outcome.overflow:.2%} of calls overflow{refused}, {outcome.pod_hours:.0f} pod-hours",
        fontsize=10,
        loc="left",
    )
    panel.grid(color=INK["grid"], lw=0.5)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.margins(x=0)
