"""The demo's picture: where the calls were, and what was kept running for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trunkline_dev.accounts import Outcome, Stay

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WARM, BURST, WAITING, REFUSED, QUIET = "#2a6f97", "#f4a261", "#cbd2d9", "#c1121f", "#8d99ae"
STEP_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Interval:
    """Something that was there from `began` to `ended` (None: still there)."""

    began: float
    ended: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is drawn; times are seconds since the epoch."""

    began: float
    ended: float
    stays: Sequence[Stay]
    outcomes: Sequence[Outcome]
    ready_pods: Sequence[tuple[float, int]]  # (since, how many)
    containers: Sequence[Interval]
    marks: Sequence[tuple[float, str]]


def alive(intervals: Sequence[Interval], at: float) -> int:
    """How many of the intervals hold the moment `at`."""
    return sum(each.began <= at and (each.ended is None or at < each.ended) for each in intervals)


def level(steps: Sequence[tuple[float, int]], at: float) -> int:
    """The value of a step function given by (since, value), 0 before its first step."""
    value = 0
    for since, height in steps:
        if since > at:
            break
        value = height
    return value


def waits(outcomes: Sequence[Outcome], stays: Sequence[Stay]) -> list[Interval]:
    """How long each caller waited: until a slot was theirs, or they were refused or gave up."""
    began = {stay.call: stay.began for stay in stays}
    return [
        Interval(outcome.offered, began.get(outcome.call or "", outcome.ended))
        for outcome in outcomes
    ]


def draw(scene: Scene, file: Path) -> None:
    """Writes a PNG: calls by place over time, pods and containers beneath."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (calls, hosts) = plt.subplots(
        2,
        1,
        figsize=(10, 5.5),
        sharex=True,
        gridspec_kw={
            "height_ratios": (3, 1.2),
            "hspace": 0.3,
            "left": 0.07,
            "right": 0.98,
            "top": 0.93,
            "bottom": 0.09,
        },
    )
    count = max(2, int((scene.ended - scene.began) / STEP_SECONDS))
    moments = [scene.began + number * STEP_SECONDS for number in range(count)]
    _draw_calls(calls, scene, moments)
    _draw_hosts(hosts, scene, moments)
    for number, (at, text) in enumerate(scene.marks):
        for axes in (calls, hosts):
            axes.axvline(at - scene.began, color=QUIET, linewidth=0.8, linestyle=":", zorder=0)
        calls.annotate(
            text,
            (at - scene.began, 1.0 - 0.07 * number),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color="#444444",
        )
    for axes in (calls, hosts):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw_calls(axes: "Axes", scene: Scene, moments: Sequence[float]) -> None:
    seconds = [at - scene.began for at in moments]
    series = [
        [Interval(stay.began, stay.ended) for stay in scene.stays if stay.place == "warm"],
        [Interval(stay.began, stay.ended) for stay in scene.stays if stay.place == "burst"],
        waits(scene.outcomes, scene.stays),
    ]
    heights = [[alive(rows, at) for at in moments] for rows in series]
    names = ("in warm pods", "in burst containers", "waiting for an answer")
    axes.stackplot(seconds, *heights, labels=names, colors=(WARM, BURST, WAITING), step="post")
    refused = [o.ended or o.offered for o in scene.outcomes if o.status is not None]
    axes.plot(
        [at - scene.began for at in refused],
        [0.0] * len(refused),
        "x",
        color=REFUSED,
        label=f"refused ({len(refused)})",
        clip_on=False,
    )
    axes.set_ylabel("calls")
    top = max((sum(column) for column in zip(*heights, strict=True)), default=0)
    axes.set_ylim(0, max(1, top) * 1.45)  # room for the marks' words
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)


def _draw_hosts(axes: "Axes", scene: Scene, moments: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    seconds = [at - scene.began for at in moments]
    pods = [level(scene.ready_pods, at) for at in moments]
    containers = [alive(scene.containers, at) for at in moments]
    axes.step(seconds, pods, WARM, where="post", label="ready pods", linewidth=2)
    axes.step(seconds, containers, BURST, where="post", label="Modal containers", linewidth=2)
    axes.set_ylabel("running")
    axes.set_xlabel("seconds")
    axes.set_ylim(0, max([1, *pods, *containers]) * 1.2)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
