"""The demo's picture: where the calls were, and what was kept running for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trunkline_dev.accounts import Outcome, Stay

WARM, BURST, WAITING, REFUSED = "#2a6f97", "#f4a261", "#bfc7cf", "#c1121f"
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


def draw(scene: Scene, file: Path) -> None:
    """Writes a PNG: calls by place over time, pods and containers beneath."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    count = max(2, int((scene.ended - scene.began) / STEP_SECONDS))
    moments = [scene.began + number * STEP_SECONDS for number in range(count)]
    seconds = [moment - scene.began for moment in moments]
    by_place = {
        place: [Interval(stay.began, stay.ended) for stay in scene.stays if stay.place == place]
        for place in ("warm", "burst")
    }
    waits = [
        Interval(outcome.offered, outcome.answered or outcome.ended) for outcome in scene.outcomes
    ]
    series = [[alive(rows, at) for at in moments] for rows in (*by_place.values(), waits)]
    refused = [outcome.ended or outcome.offered for outcome in scene.outcomes if outcome.status]

    figure, (calls, hosts) = plt.subplots(
        2, 1, figsize=(10, 6), sharex=True, height_ratios=(3, 1.4), layout="constrained"
    )
    labels = ("in warm pods", "in burst containers", "waiting for an answer")
    calls.stackplot(seconds, *series, labels=labels, colors=(WARM, BURST, WAITING), step="post")
    calls.plot(
        [at - scene.began for at in refused],
        [0.0] * len(refused),
        "x",
        color=REFUSED,
        label=f"refused ({len(refused)})",
        clip_on=False,
    )
    calls.set_ylabel("calls")
    calls.legend(loc="upper right", frameon=False)
    calls.set_title("A spike past warm capacity", loc="left", fontweight="bold")
    for at, text in scene.marks:
        for axes in (calls, hosts):
            axes.axvline(at - scene.began, color="#8d99ae", linewidth=0.8, linestyle=":")
        calls.annotate(
            text,
            (at - scene.began, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -4),
            textcoords="offset points",
            rotation=90,
            va="top",
            fontsize=8,
            color="#555555",
        )
    hosts.step(
        seconds,
        [level(scene.ready_pods, at) for at in moments],
        WARM,
        where="post",
        label="ready pods",
    )
    hosts.step(
        seconds,
        [alive(scene.containers, at) for at in moments],
        BURST,
        where="post",
        label="Modal containers",
    )
    hosts.set_ylabel("running")
    hosts.set_xlabel("seconds")
    hosts.set_ylim(bottom=0)
    hosts.yaxis.get_major_locator().set_params(integer=True)
    hosts.legend(loc="upper right", frameon=False)
    for axes in (calls, hosts):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0)
    figure.savefig(file, dpi=120)
    plt.close(figure)
