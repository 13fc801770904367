"""The Moshi engine that a worker's environment asks for."""

import logging
from typing import Final

from trunkline_runtime.engine.moshi.engine import Knobs, MoshiEngine
from trunkline_runtime.engine.moshi.loading import Wanted, load
from trunkline_runtime.engine.moshi.models import Models
from trunkline_runtime.engine.moshi.progress import Progress
from trunkline_runtime.engine.moshi.source import parse
from trunkline_runtime.engine.moshi.tiny import tiny

log = logging.getLogger("trunkline.moshi")

TINY: Final = "tiny"
SEED: Final = 0  # of the tiny models: all workers' are the same


def moshi_engine(
    slots: int,
    *,
    model: str,
    auto: bool = False,
    stt: str = "",
    device: str = "",
    int8: bool = False,
    context_seconds: float | None = None,
    refresh: bool = False,
) -> MoshiEngine:
    """An engine with nothing loaded; with `auto` it has as many of the slots as it can hold. Raises `ModelError` for sources that name nothing."""
    knobs = Knobs(slots=slots, auto=auto, context_seconds=context_seconds, refresh=refresh)
    if model == TINY:
        return MoshiEngine(lambda: tiny(SEED), knobs)
    wanted = Wanted(
        moshi=parse(model), stt=parse(stt) if stt else None, device=device or "cuda", int8=int8
    )
    progress = Progress(log.info)

    def make() -> Models:
        models = load(wanted, progress)
        for phase, seconds in progress.seconds.items():
            log.info("loaded", extra={"phase": str(phase), "seconds": round(seconds, 3)})
        return models

    return MoshiEngine(make, knobs, lambda: str(progress), lambda: progress.seconds)
