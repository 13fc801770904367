"""Policy hooks over HTTP: a real server on the loopback, and calls of a real engine that never wait for it."""

import asyncio
import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from aiohttp import web
from moshi_rig import call, models
from worker_rig import FakeGateway, closed, worker

from trunkline_runtime.contract import (
    METRICS_PATH,
    Close,
    GuardRule,
    HookSettings,
    PolicySettings,
    Settings,
)
from trunkline_runtime.engine import Event, HungUp, ReplyText
from trunkline_runtime.engine.moshi.engine import Knobs, MoshiEngine
from trunkline_runtime.engine.moshi.hook import HookPolicy, Hooks, policy_of
from trunkline_runtime.engine.moshi.policy import (
    Action,
    Ban,
    Hangup,
    Mute,
    Note,
    Policy,
    Say,
    Unmute,
)
from trunkline_runtime.engine.moshi.policy_hook import (
    FAILED,
    LATE,
    MAX_ANSWER,
    MISSED,
    REQUESTS,
    Hook,
)
from trunkline_runtime.engine.moshi.transcript import Word

PATIENCE = 30.0
SOON = 5.0  # seconds; a deadline that this machine keeps
WORD = Word("now", 1.0, 1.5)

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def actions(*wanted: dict[str, Any]) -> web.Response:
    return web.json_response({"actions": list(wanted)})


class Server:
    """A hook: answers what the test says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answer: Answer = self.nothing
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    async def nothing(self, _: web.Request) -> web.StreamResponse:
        return web.Response(status=204)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        self.headers.append(dict(request.headers))
        return await self.answer(request)

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator["Server"]:
        app = web.Application()
        app.router.add_post("/hook", self.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
        try:
            yield self
        finally:
            await runner.cleanup()

    def events(self) -> list[str]:
        return [event["type"] for request in self.asked for event in request["events"]]


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    made = Hooks()
    yield made
    made.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server().serving() as made:
        yield made


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.01)


async def decided(policy: Policy, *wanted: Action) -> list[Action]:
    """What the policy decides until all that is wanted has come, in this order; requests are not told."""
    got: list[Action] = []

    def come() -> bool:
        got.extend(action for action in policy.answers() if action != Note(REQUESTS))
        return len(got) >= len(wanted)

    await until(come)
    assert got == list(wanted)
    return got


async def told_of(policy: Policy, enough: Callable[[list[Action]], bool]) -> tuple[Action, ...]:
    """What a policy decides until that is enough, without its notes, which tell of late answers alone.

    A machine may be late more often than its hook.
    """
    got: list[Action] = []

    def come() -> bool:
        got.extend(policy.answers())
        return enough(got)

    await until(come)
    assert {each for each in got if isinstance(each, Note)} <= {Note(REQUESTS), Note(LATE)}
    return tuple(action for action in got if not isinstance(action, Note))


def asking(server: Server, hooks: Hooks, **of: Any) -> HookPolicy:
    made = HookPolicy(Hook(url=server.url, **{"deadline": SOON, **of}), "call-1", hooks)
    made.on_start()
    return made


async def test_a_hook_is_told_what_happens_and_its_wishes_come_back(
    server: Server, hooks: Hooks
) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        match server.asked[-1]["events"]:
            case [*_, {"type": "pause", "text": "please stop"}]:
                return actions({"type": "say", "text": "As you wish."}, {"type": "hangUp"})
            case [{"type": "start"}]:
                return actions({"type": "ban", "word": "darn"})
        return web.Response()

    server.answer = answer
    with closing(asking(server, hooks, token="a-secret")) as policy:
        await decided(policy, Ban("darn"))
        policy.on_partial("sto")
        policy.on_word(WORD, "please stop", agent_speaks=True)
        policy.on_pause("please stop")
        await decided(policy, Say("As you wish."), Hangup("the agent's policy"))
    assert {request["call"] for request in server.asked} == {"call-1"}
    assert server.asked[-1]["agentSpeaks"] is True
    words = [e for request in server.asked for e in request["events"] if e["type"] == "word"]
    assert words == [{"type": "word", "text": "now", "start": 1.0, "end": 1.5}]
    assert server.headers[-1]["Authorization"] == "Bearer a-secret"


async def test_what_happens_during_a_request_goes_with_the_next_one(
    server: Server, hooks: Hooks
) -> None:
    free = asyncio.Event()

    async def answer(_: web.Request) -> web.StreamResponse:
        await free.wait()
        return web.Response()

    server.answer = answer
    with closing(asking(server, hooks)) as policy:
        await until(lambda: server.events() == ["start"])
        missed = [policy.on_word(WORD, "", agent_speaks=False) for _ in range(40)]
        assert missed[-1] == (Note(MISSED),)
        assert missed[0] == ()
        free.set()
        await until(lambda: len(server.asked) == 2)
    assert server.events() == ["start", *["word"] * 32]


@pytest.mark.parametrize(("closed", "then"), [(True, (Mute(),)), (False, ())])
async def test_a_hook_that_is_late_is_asked_again_and_its_return_is_noticed(
    server: Server,
    hooks: Hooks,
    closed: bool,
    then: tuple[Action, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "trunkline.hook")
    slow = asyncio.Event()

    async def answer(_: web.Request) -> web.StreamResponse:
        await slow.wait()
        return web.Response()

    server.answer = answer
    with closing(asking(server, hooks, deadline=0.1, closed=closed, token="a-secret")) as policy:
        assert await told_of(policy, lambda it: it.count(Note(LATE)) >= 2) == then
        server.answer = server.nothing
        server.asked.clear()
        policy.on_pause("what a caller says")
        wanted = (Unmute(),) if closed else ()

        def back(got: list[Action]) -> bool:
            return len(caplog.records) == 2 and set(wanted) <= set(got)

        assert await told_of(policy, back) == wanted
        assert server.asked
    lines = [record.getMessage() for record in caplog.records]
    assert ("the agent is mute" if closed else "the call goes on without") in lines[0]
    assert lines[1] == "the policy hook answers again"
    logged = " ".join(str(vars(record)) for record in caplog.records)
    assert "what a caller says" not in logged
    assert "a-secret" not in logged
    assert "it did not answer in time" in logged
    slow.set()


async def _status(_: web.Request) -> web.StreamResponse:
    return web.Response(status=500, text='{"actions": [{"type": "hangUp"}]}')


async def _elsewhere(request: web.Request) -> web.StreamResponse:
    raise web.HTTPTemporaryRedirect(request.path)


async def _nonsense(_: web.Request) -> web.StreamResponse:
    return web.Response(text="mute, please")


async def _too_long(_: web.Request) -> web.StreamResponse:
    return web.Response(text=" " * (MAX_ANSWER + 1))


async def _gone(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


@pytest.mark.parametrize("answer", [_status, _elsewhere, _nonsense, _too_long, _gone])
async def test_whatever_is_no_answer_is_a_failure(
    server: Server, hooks: Hooks, answer: Answer
) -> None:
    server.answer = answer
    with closing(asking(server, hooks, closed=True)) as policy:
        await decided(policy, Note(FAILED), Mute())
        assert len(server.asked) <= 2, "no redirect is followed"


async def test_a_hook_that_is_not_there_and_then_is(hooks: Hooks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    server = Server()
    server.url = f"http://127.0.0.1:{port}/hook"
    with closing(asking(server, hooks, closed=True)) as policy:
        await decided(policy, Note(FAILED), Mute())
        async with server.serving(port):
            await until(lambda: Unmute() in policy.answers())
            assert server.asked[0]["events"] == [], (
                "an agent that is mute gets no event to ask about"
            )


async def test_no_thread_without_a_hook_and_none_after_the_engine(server: Server) -> None:
    hooks, before = Hooks(), threading.active_count()
    assert policy_of(Settings(greeting="Hi"), hooks).on_start() == (Say("Hi"),)
    assert threading.active_count() == before
    with closing(asking(server, hooks)):
        await until(lambda: bool(server.asked))
        assert threading.active_count() == before + 1
    hooks.close()
    hooks.close()
    assert threading.active_count() == before


async def test_a_call_that_is_over_asks_no_more(server: Server, hooks: Hooks) -> None:
    policy = asking(server, hooks)
    await until(lambda: bool(server.asked))
    policy.close()
    policy.on_pause("too late")
    with closing(asking(server, hooks)) as other:
        other.on_pause("the next call")
        await until(lambda: "the next call" in str(server.asked))
    assert "too late" not in str(server.asked)


# --- in an engine --------------------------------------------------------------------------------------------


def settings(server: Server, seconds: float, how: Any = "open") -> Settings:
    hook = HookSettings(url=server.url, token="", deadlineSeconds=seconds, onFailure=how)
    guard = GuardRule(match="no such word", do="mute", say="")
    return Settings(call="call-7", policy=PolicySettings(hook=hook, guards=[guard]))


def stepping(running: MoshiEngine, conversation: Any) -> Callable[[], None]:
    """Lets a caller send a frame and the engine step, without end."""
    frames = iter(call(3) * 1000)

    def one() -> None:
        conversation.hear(next(frames))
        running.tick()

    return one


def engine() -> MoshiEngine:
    made = MoshiEngine(models, Knobs(slots=1, measure=False))
    made.load()
    made.prepare()
    return made


async def test_a_hook_speaks_and_hangs_up_in_a_call(server: Server) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return actions({"type": "say", "text": "hello you"})

    server.answer = answer
    with closing(engine()) as running:
        told: list[Event] = []
        conversation = running.open(settings(server, SOON), told.append)
        step = stepping(running, conversation)

        def said() -> bool:
            step()
            texts = (event.text for event in told if isinstance(event, ReplyText))
            return "hello you" in "".join(texts)

        await until(said)

        async def hang_up(_: web.Request) -> web.StreamResponse:
            return actions({"type": "hangUp"})

        server.answer = hang_up
        conversation.commit()

        def hung_up() -> bool:
            step()
            return HungUp("the agent's policy") in told

        await until(hung_up)
        assert running.totals()["hook_requests"] >= 2
        assert running.totals()["hook_failed"] == 0
        conversation.close()
    assert {request["call"] for request in server.asked} == {"call-7"}


async def test_a_worker_asks_the_hook_of_the_calls_own_settings(server: Server) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return actions({"type": "hangUp"})

    made = MoshiEngine(models, Knobs(slots=1, measure=False))
    async with FakeGateway().serving() as gateway, worker(gateway, engine=made, slots=1) as running:
        server.answer = answer
        policy = settings(server, SOON)["policy"]
        caller = await running.dial(gateway.ticket("a"), settings={"policy": policy})
        assert await closed(caller) == (Close.NORMAL, "the agent's policy")
        assert {request["call"] for request in server.asked} == {"a"}
        _, metrics = await running.health(METRICS_PATH)
        asked = re.search(r"trunkline_engine_hook_requests_total (\d)", metrics)
        assert asked is not None
        assert int(asked[1]) >= 1


async def test_frames_go_on_while_a_hook_hangs(server: Server) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(PATIENCE)
        return web.Response()

    server.answer = answer
    with closing(engine()) as running:
        conversation = running.open(settings(server, PATIENCE), lambda _: None)
        step = stepping(running, conversation)
        await until(lambda: bool(server.asked))
        waited = []
        for number in range(20):
            began = time.monotonic()
            conversation._dialogue._policy.on_pause(str(number))
            conversation._dialogue._policy.answers()
            waited.append(time.monotonic() - began)
            step()
        assert len(server.asked) == 1
        assert sorted(waited)[10] < 0.001
        assert running.totals()["frames"] >= 18
        conversation.close()


async def test_a_call_that_finds_no_slot_leaves_no_hook_behind(server: Server) -> None:
    with closing(engine()) as running:
        running.open({}, lambda _: None)
        with pytest.raises(RuntimeError, match="all 1 slots"):
            running.open(settings(server, SOON), lambda _: None)
        loop = running._hooks._loop
        assert loop is not None
        await until(lambda: not asyncio.all_tasks(loop))


async def test_a_closed_hook_that_is_not_there_keeps_the_agent_silent(server: Server) -> None:
    gone = Server()
    gone.url = "http://127.0.0.1:9/hook"
    with closing(engine()) as running:
        conversation = running.open(settings(gone, SOON, "closed"), lambda _: None)
        step = stepping(running, conversation)

        def silent() -> bool:
            step()
            return conversation._dialogue.silent

        await until(silent)
        assert running.totals()["hook_failed"] > 0
        conversation.close()
