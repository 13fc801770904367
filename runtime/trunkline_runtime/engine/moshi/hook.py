"""Hooks, asked: one thread with an event loop and an HTTP client for all calls of an engine.

    engine's thread ──events──▶ Waiting ──▶ the call's task on this thread ──POST──▶ hook
    engine's thread ◀─actions── deque  ◀──                                 ◀─────────

Neither side waits for the other: the engine's thread puts events under a lock that is held for microseconds, and
takes at the next frame what has been answered by then.
"""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Final

import httpx

from trunkline_runtime.contract import PolicySettings, Settings
from trunkline_runtime.engine.moshi.policy import Action, Hangup, Note, Policy, Several
from trunkline_runtime.engine.moshi.policy_hook import (
    MAX_ANSWER,
    MAX_TURN,
    MISSED,
    REQUESTS,
    Event,
    Failure,
    Hook,
    HookError,
    Standing,
    Waiting,
    actions_of,
    request_body,
)
from trunkline_runtime.engine.moshi.policy_settings import rules_of
from trunkline_runtime.engine.moshi.transcript import Word

log = logging.getLogger("trunkline.hook")

MAX_CONNECTIONS: Final = 256  # a call has one request under way; as many calls as a worker may have
RETRY_SECONDS: Final = 1.0  # after a failure, where nothing happens that would be asked about


def policy_of(settings: Settings, hooks: "Hooks") -> Policy:
    """The policy of a call: its rules, its hook, both or neither. Raises ValueError."""
    rules = rules_of(settings)
    hook = settings.get("policy", PolicySettings()).get("hook")
    if hook is None:
        return rules
    return Several((rules, HookPolicy(Hook.of(hook), settings.get("call", ""), hooks)))


class Hooks:
    """The thread on which hooks are asked. It begins with the first call that has one: threads must not be
    there when a memory snapshot is taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: httpx.AsyncClient | None = None

    def __repr__(self) -> str:
        return f"<Hooks running={self._loop is not None}>"

    def start(self, work: Coroutine[Any, Any, None]) -> "Future[None]":
        """Runs this on the thread."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                name = "moshi-hooks"
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name=name, daemon=True
                )
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def soon(self, wake: asyncio.Event) -> None:
        """Sets an event of the thread's loop."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(wake.set)

    @property
    def client(self) -> httpx.AsyncClient:
        """For the thread alone. No proxy of the environment and no redirect takes transcripts elsewhere."""
        if self._client is None:
            self._client = httpx.AsyncClient(
                trust_env=False,
                timeout=None,  # each request has a deadline of its own
                limits=httpx.Limits(max_connections=MAX_CONNECTIONS),
            )
        return self._client

    def close(self) -> None:
        """Ends the thread and what runs on it."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
            self._client = None


class HookPolicy:
    """The policy of one call that has a hook."""

    def __init__(self, hook: Hook, call: str, hooks: Hooks) -> None:
        self._hook = hook
        self._call = call
        self._hooks = hooks
        self._lock = threading.Lock()  # guards what waits
        self._waiting = Waiting()
        self._agent_speaks = False
        self._wake = asyncio.Event()
        # At most one request is under way, and each adds a few; taken at every frame.
        self._decided: deque[Action] = deque()
        self._standing = Standing(closed=hook.closed)
        self._task: Future[None] | None = None

    def __repr__(self) -> str:
        return f"<HookPolicy {self._call} {self._waiting!r} {self._standing!r}>"

    # --- on the engine's thread --------------------------------------------------------------------------

    def on_start(self) -> Sequence[Action]:
        self._task = self._hooks.start(self._run())
        self._task.add_done_callback(self._ended)
        return self._tell({"type": "start"})

    def on_partial(self, text: str) -> Sequence[Action]:
        return self._tell({"type": "partial", "text": text[:MAX_TURN]})

    def on_word(self, word: Word, turn: str, *, agent_speaks: bool) -> Sequence[Action]:
        self._agent_speaks = agent_speaks
        said = word.text[:MAX_TURN]
        return self._tell({"type": "word", "text": said, "start": word.start, "end": word.end})

    def on_pause(self, turn: str) -> Sequence[Action]:
        return self._tell({"type": "pause", "text": turn[-MAX_TURN:]})

    def answers(self) -> Sequence[Action]:
        actions = []
        while self._decided:
            actions.append(self._decided.popleft())
        return actions

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _tell(self, event: Event) -> Sequence[Action]:
        with self._lock:
            kept = self._waiting.add(event)
        self._hooks.soon(self._wake)
        return () if kept else (Note(MISSED),)

    # --- on the hooks' thread ----------------------------------------------------------------------------

    def _ended(self, task: "Future[None]") -> None:
        """A call must not go on without the policy that it was to have."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the policy of a call is broken", extra={"call": self._call}, exc_info=error)
            self._decided.append(Hangup("the agent's policy is broken"))

    async def _run(self) -> None:
        while True:
            patience = RETRY_SECONDS if self._standing.failing else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._wake.wait()
            self._wake.clear()
            with self._lock:
                events = self._waiting.take()
            outcome = await self._ask(events)
            self._decided.append(Note(REQUESTS))
            self._decided.extend(self._judged(outcome))

    def _judged(self, outcome: list[Action] | Failure) -> list[Action]:
        before = self._standing.failing
        if isinstance(outcome, Failure):
            actions = self._standing.failed(outcome)
            if not before:
                what = "the agent is mute" if self._hook.closed else "the call goes on without"
                extra = {"call": self._call, "why": outcome.value}
                log.warning("the policy hook fails: %s until it answers again", what, extra=extra)
            return actions
        if before:
            log.info("the policy hook answers again", extra={"call": self._call})
        return self._standing.answered(outcome)

    async def _ask(self, events: Sequence[Event]) -> list[Action] | Failure:
        """One request, within the deadline."""
        body = request_body(self._call, events, agent_speaks=self._agent_speaks)
        client = (
            self._hooks.client
        )  # the first one takes a while to make, which is not the hook's fault
        try:
            async with asyncio.timeout(self._hook.deadline):
                return await self._post(client, body)
        except TimeoutError:
            return Failure.LATE
        except HookError:
            return Failure.UNUSABLE
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError):
            return Failure.UNREACHABLE

    async def _post(self, client: httpx.AsyncClient, body: bytes) -> list[Action] | Failure:
        hook = self._hook
        async with client.stream("POST", hook.url, content=body, headers=hook.headers) as response:
            if not response.is_success:
                return Failure.REFUSED
            answer = bytearray()
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > MAX_ANSWER:
                    raise HookError(f"it is longer than {MAX_ANSWER} bytes")
        return actions_of(bytes(answer))
