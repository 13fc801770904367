"""The Moshi engine on tiny models: calls on its clock, and how it ends when it breaks."""

import queue
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import pytest
import torch
from moshi_rig import CONTEXT_FRAMES, Frame, call, expected, models

from trunkline_runtime.audio.pcm import to_samples
from trunkline_runtime.contract import ReplyRule, Settings
from trunkline_runtime.engine import (
    Event,
    Failed,
    Heard,
    ReplyAudio,
    ReplyStarted,
    ReplyText,
    Watched,
)
from trunkline_runtime.engine.moshi.capacity import WINDOW_STEPS
from trunkline_runtime.engine.moshi.checkpoint import MOSHI_FOLDER, STT_FOLDER, write_tiny
from trunkline_runtime.engine.moshi.configured import moshi_engine
from trunkline_runtime.engine.moshi.engine import Knobs, MoshiEngine
from trunkline_runtime.engine.moshi.models import ModelError
from trunkline_runtime.engine.moshi.policy import Rules
from trunkline_runtime.engine.moshi.tiny import tiny

PATIENCE = 60.0
Wanted = TypeVar("Wanted")


def engine(slots: int = 2, **knobs: Any) -> MoshiEngine:
    """Loaded and with its streams, but without a clock."""
    made = MoshiEngine(models, Knobs(slots=slots, measure=False, **knobs))
    made.load()
    made.prepare()
    return made


def same(heard: list[bytes], frames: list[Frame]) -> bool:
    """Whether this is the end of what the frames hold; rounding to 16 bits may differ by one."""
    pcm = [frame.pcm for frame in frames if frame.pcm is not None]
    pairs = zip(heard, pcm[len(pcm) - len(heard) :], strict=True)
    return all(np.abs(to_samples(a) - b).max() <= 2 / 32768 for a, b in pairs)


def audio(events: list[Event]) -> list[bytes]:
    return [event.pcm for event in events if isinstance(event, ReplyAudio)]


def test_calls_hear_through_the_seam_what_they_hear_alone() -> None:
    with closing(engine()) as running:
        told: list[list[Event]] = [[], []]
        calls = [running.open({}, told[n].append) for n in (0, 1)]
        for number in range(max(len(call(3)), len(call(4)))):
            for conversation, frames in zip(calls, (call(3), call(4)), strict=True):
                for frame in frames[number : number + 1]:
                    conversation.hear(frame)
            assert running.tick()
        for events, number in zip(told, (3, 4), strict=True):
            said = sum(frame.pcm is not None for frame in expected(number))
            heard = audio(events)[: said - 1]
            assert len(heard) == said - 1, "from the first word on"
            assert same(heard, expected(number)[:-1])
            assert isinstance(events[0], ReplyStarted)


def test_a_slot_is_given_to_the_next_caller_and_never_to_two() -> None:
    with closing(engine()) as running:
        told: list[Event] = []
        first, second = running.open({}, told.append), running.open({}, lambda _: None)
        assert {first.slot, second.slot} == {0, 1}
        with pytest.raises(RuntimeError, match="all 2 slots"):
            running.open({}, told.append)
        first.hear(call(0)[0])
        running.tick()
        first.close()
        first.close()
        told.clear()
        third = running.open({}, told.append)
        assert third.slot == 0
        for frame in call(5)[:10]:
            third.hear(frame)
        while running.tick() and len(audio(told)) < 6:
            second.clear()
        assert same(audio(told)[:6], expected(5)[:7])


def test_no_event_follows_a_close() -> None:
    with closing(engine()) as running:
        told: list[Event] = []
        conversation = running.open(Settings(greeting="hello"), told.append)
        for frame in call(0)[:5]:
            conversation.hear(frame)
            running.tick()
        assert told
        told.clear()
        conversation.close()
        conversation.commit()
        conversation.cancel()
        running.tick()
        assert told == []


def test_a_greeting_is_said_in_its_own_words_and_a_commit_is_answered() -> None:
    with closing(engine(1)) as running:
        told: list[Event] = []
        conversation = running.open(Settings(greeting="hello you"), told.append)
        for frame in call(0)[:8]:
            conversation.hear(frame)
        conversation.commit()
        for _ in range(8):
            running.tick()
        text = "".join(event.text for event in told if isinstance(event, ReplyText))
        assert text.startswith(" hello you")
        assert [type(event) for event in told if isinstance(event, Heard)] == [Heard]


def test_a_calls_tokens_are_kept_where_that_is_wanted() -> None:
    with closing(engine(1)) as running:
        assert running.open({}, lambda _: None).token_log is None
    with closing(engine(1, token_log=True)) as running:
        conversation = running.open({}, lambda _: None)
        for frame in call(3)[:5]:
            conversation.hear(frame)
            running.tick()
        assert conversation.token_log is not None
        drawn, _ = conversation.token_log.tables()
        first = [frame.tokens[0] for frame in expected(3)[1:6] if frame.tokens]
        assert drawn[:4, 0].tolist() == first[:4], "what is drawn is said a frame later"


def test_an_agent_does_not_say_what_its_policy_bans() -> None:
    said = [frame.tokens[0] for frame in expected(3) if frame.tokens]
    tokenizer = models().text_tokenizer
    whole = [token for token in said if tokenizer.encode(tokenizer.decode([token])) == [token]]
    often = max(whole, key=said.count)
    word = tokenizer.decode([often])
    with closing(engine(1, policy=lambda _: Rules(banned=(word,)))) as running:
        told: list[Event] = []
        conversation = running.open({}, told.append)
        for frame in call(3):
            conversation.hear(frame)
            running.tick()
    texts = [event.text for event in told if isinstance(event, ReplyText)]
    assert len(texts) > 5
    assert tokenizer.id_to_piece(often).replace("▁", " ") not in texts


def test_a_silent_caller_is_answered_too() -> None:
    with closing(engine(1)) as running:
        told: list[Event] = []
        running.open({}, told.append).respond()
        assert [running.tick() for _ in range(6)] == [False, False, True, True, True, True]
        assert audio(told)


def test_settings_that_cannot_be_used_are_refused() -> None:
    with closing(engine(1)) as running, pytest.raises(ValueError, match="replies"):
        running.open(Settings(replies=[ReplyRule(match="(", say="")]), lambda _: None)
    with closing(engine(1)) as running, pytest.raises(ValueError, match="whole number of 16-bit"):
        running.open({}, lambda _: None).hear(b"123")


def test_order_and_context() -> None:
    unready = MoshiEngine(models, Knobs(slots=1))
    assert isinstance(unready, Watched)
    assert unready.loading() == "loading"
    with pytest.raises(RuntimeError, match="load and resume come before open"):
        unready.open({}, lambda _: None)
    with pytest.raises(RuntimeError, match="load comes before resume"):
        unready.prepare()
    far = MoshiEngine(models, Knobs(slots=1, context_seconds=10))
    with pytest.raises(ModelError, match=r"10 s\) is not within .*contextSeconds"):
        far.load()
    near = MoshiEngine(
        lambda: tiny(0, context_frames=CONTEXT_FRAMES), Knobs(slots=1, context_seconds=0.4)
    )
    near.load()
    near.load()
    assert near._models is not None
    assert near._models.context_frames == 5


def test_an_engine_on_a_checkpoint_says_what_one_in_memory_says(tmp_path: Path) -> None:
    write_tiny(tmp_path, 0, context_frames=CONTEXT_FRAMES, mimi_context=CONTEXT_FRAMES)
    folders = {name: str(tmp_path / name) for name in (MOSHI_FOLDER, STT_FOLDER)}
    loaded = moshi_engine(1, model=folders["moshi"], stt=folders["stt"], device="cpu")
    with closing(loaded):
        loaded.load()
        loaded.prepare()
        told: list[Event] = []
        conversation = loaded.open({}, told.append)
        for frame in call(3)[:12]:
            conversation.hear(frame)
            loaded.tick()
        assert len(audio(told)) > 5
        assert same(audio(told), expected(3)[:12])


def test_capacity_is_measured_before_the_first_call_and_leaves_nothing_behind() -> None:
    measured = MoshiEngine(models, Knobs(slots=2))
    measured.load()
    measured.prepare()
    with closing(measured):
        assert 1 <= measured.slots <= 2
        told: list[Event] = []
        conversation = measured.open({}, told.append)
        for frame in call(3):
            conversation.hear(frame)
            measured.tick()
        assert len(audio(told)) > 5
        assert same(audio(told), expected(3))


def test_a_strained_engine_goes_on_stepping_until_it_is_fast_again() -> None:
    with closing(engine(1)) as running:
        rooms: list[int] = []
        running.watch(lambda _: None, rooms.append)
        assert not running.tick()
        for _ in range(WINDOW_STEPS):
            running._judge(1.0, late=True)
        assert running.tick(), "with nobody there"
        for _ in range(WINDOW_STEPS):
            running._judge(0.01, late=False)
        assert not running.tick()
        assert rooms == [1, 0, 1]
        assert running.totals()["late_steps"] == WINDOW_STEPS


class Line:
    """A call on an engine that runs by itself, and what it is told."""

    def __init__(self, running: MoshiEngine) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.conversation = running.open({}, self._events.put)

    def until(self, kind: type[Wanted]) -> Wanted:
        while True:
            event = self._events.get(timeout=PATIENCE)
            if isinstance(event, kind):
                return event


class Running:
    """An engine with its clock."""

    def __init__(self, made: MoshiEngine) -> None:
        self.engine = made

    def __enter__(self) -> Self:
        self.engine.load()
        self.engine.resume()
        self.engine.resume()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.engine.close()


def test_an_engine_that_breaks_tells_its_calls_and_its_worker() -> None:
    own = tiny(0, context_frames=CONTEXT_FRAMES)
    made = MoshiEngine(lambda: own, Knobs(slots=2, measure=False))
    broken: queue.SimpleQueue[str] = queue.SimpleQueue()
    with Running(made) as running:
        running.engine.watch(broken.put, lambda _: None)
        lines = [Line(running.engine), Line(running.engine)]
        lines[0].conversation.respond()
        lines[0].until(ReplyAudio)
        with torch.inference_mode():
            own.lm.text_linear.weight.fill_(torch.nan)
        for line in lines:
            assert "not finite" in line.until(Failed).detail
        assert "the Moshi engine is broken" in broken.get(timeout=PATIENCE)
        with pytest.raises(RuntimeError, match="the Moshi engine is broken"):
            running.engine.open({}, lambda _: None)
        late: list[str] = []
        running.engine.watch(late.append, lambda _: None)
        assert late, "a worker that watches too late hears of it, too"


def test_steps_and_frames_are_counted() -> None:
    with Running(MoshiEngine(models, Knobs(slots=2, measure=False))) as running:
        rooms: list[int] = []
        running.engine.watch(lambda _: None, rooms.append)
        line = Line(running.engine)
        line.conversation.hear(b"".join(call(0)) * 10)
        line.conversation.respond()
        for _ in range(5):
            line.until(ReplyAudio)
        line.conversation.close()
        totals = running.engine.totals()
        assert rooms == [2]
        assert totals["steps"] >= 5
        assert totals["frames"] >= 5
        assert totals["dropped_frames"] > 0
        assert totals["step_microseconds"] > 0
