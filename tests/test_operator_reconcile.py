"""What stands around a look at an agent: when it is taken, what it writes, and work at Modal beside it."""

import asyncio
import contextvars
import copy
import gc
import logging
import socket
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import BURST, an_object

from trunkline_operator.agenda import (
    BACKOFF_SECONDS,
    GAP_SECONDS,
    LOOKS_AT_ONCE,
    LOOKS_IN_HASTE,
    Agenda,
    backoff,
)
from trunkline_operator.agent.parsing import parsed
from trunkline_operator.burst.client import Burst, BurstApp, Credentials
from trunkline_operator.burst.deployments import Account, Deployments, described
from trunkline_operator.burst.sdk import Sdk
from trunkline_operator.cluster.client import ApiError
from trunkline_operator.cluster.credentials import (
    caller_keys_missing,
    credentials_missing,
    hook_token_missing,
    hub_token_missing,
    proxy_token,
    token_of,
)
from trunkline_operator.decisions.routes import Keys
from trunkline_operator.decisions.world import BurstFacts
from trunkline_operator.reconcile import difference

AGENT = "ns/desk"


# --- when -------------------------------------------------------------------------------------------------


class Looks:
    """Looks that last until they are let go; `answers` says how each ends, the last for all others."""

    def __init__(self, *answers: float | Exception | None) -> None:
        self.answers = list(answers) or [30.0]
        self.begun = 0
        self.at_once = 0
        self.most_at_once = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self._told = asyncio.Condition()

    async def __call__(self, agent: str) -> float | None:
        self.begun += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        async with self._told:
            self._told.notify_all()
        try:
            await self.gate.wait()
        finally:
            self.at_once -= 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def until(self, begun: int) -> None:
        async with asyncio.timeout(20), self._told:
            await self._told.wait_for(lambda: self.begun >= begun)


async def idle(agenda: Agenda) -> None:
    """Until no agent is left."""
    async with asyncio.timeout(20):
        while len(agenda):
            await asyncio.sleep(0.01)


async def test_whatever_happens_during_a_look_makes_one_more() -> None:
    looks = Looks(30.0, None)
    agenda = Agenda(looks)
    looks.gate.clear()
    agenda.add(AGENT)
    await looks.until(1)
    for _ in range(100):
        agenda.add(AGENT)
    looks.gate.set()
    await idle(agenda)
    assert (looks.begun, looks.most_at_once) == (2, 1)


async def test_what_happens_before_a_look_begins_makes_no_other() -> None:
    looks = Looks(None)
    agenda = Agenda(looks)
    looks.gate.clear()
    for number in range(LOOKS_AT_ONCE):
        agenda.add(f"ns/{number}")
    await looks.until(LOOKS_AT_ONCE)
    agenda.add(AGENT)
    await asyncio.sleep(0)  # it waits for room
    agenda.add(AGENT)
    looks.gate.set()
    await idle(agenda)
    assert looks.begun == LOOKS_AT_ONCE + 1


async def test_an_agent_that_comes_back_while_it_goes_is_looked_at_again() -> None:
    looks = Looks(None, None)
    agenda = Agenda(looks)
    looks.gate.clear()
    agenda.add(AGENT)
    await looks.until(1)
    agenda.add(AGENT)
    looks.gate.set()
    await idle(agenda)
    assert looks.begun == 2


async def test_a_look_that_asks_for_another_gets_it() -> None:
    looks = Looks(0.0, 0.2, None)
    agenda = Agenda(looks)
    agenda.add(AGENT)
    await idle(agenda)
    assert looks.begun == 3


async def test_nothing_happening_is_looked_at_too() -> None:
    looks = Looks(1e9, None)
    agenda = Agenda(looks, resync_seconds=0.2)
    agenda.add(AGENT)
    await idle(agenda)
    assert looks.begun == 2


async def test_looks_that_fail_are_tried_again_and_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    looks = Looks(ApiError(403, "Forbidden", "quota"), RuntimeError("bug"), None)
    agenda = Agenda(looks)
    agenda.add(AGENT)
    await idle(agenda)
    assert looks.begun == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{AGENT}: 403 Forbidden: quota",
        f"{AGENT}: again RuntimeError('bug')",
    ]


async def test_one_agents_trouble_is_not_anothers() -> None:
    async def look(agent: str) -> float | None:
        if agent == "ns/bad":
            raise RuntimeError("bug")
        return None

    agenda = Agenda(look)
    agenda.add("ns/bad")
    agenda.add("ns/good")
    async with asyncio.timeout(20):
        await agenda.looked_at(["ns/good", "ns/unknown"])
    await agenda.close()
    assert len(agenda) == 0


async def test_a_storm_of_events_is_looked_at_a_few_times() -> None:
    looks = Looks(30.0)
    agenda = Agenda(looks)
    loop = asyncio.get_running_loop()
    ends = loop.time() + 1.0
    while loop.time() < ends:
        agenda.add(AGENT)
        await asyncio.sleep(0)
    await agenda.close()
    assert LOOKS_IN_HASTE <= looks.begun <= LOOKS_IN_HASTE + 1.0 / GAP_SECONDS + 1


async def test_after_a_calm_the_next_looks_wait_for_nothing() -> None:
    began: list[float] = []
    loop = asyncio.get_running_loop()

    async def look(_: str) -> float | None:
        began.append(loop.time())
        return 0.0 if len(began) < LOOKS_IN_HASTE + 1 else None

    agenda = Agenda(look)
    agenda.add(AGENT)
    await idle(agenda)
    first = began[0]
    assert began[LOOKS_IN_HASTE - 1] - first < GAP_SECONDS
    assert began[LOOKS_IN_HASTE] - first >= LOOKS_IN_HASTE * GAP_SECONDS * 0.99


async def test_after_the_end_nothing_is_looked_at() -> None:
    looks = Looks(30.0)
    agenda = Agenda(looks)
    agenda.wake(AGENT)  # unknown
    agenda.add(AGENT)
    await looks.until(1)
    await agenda.close()
    agenda.add(AGENT)
    assert (len(agenda), looks.begun) == (0, 1)


async def test_so_many_looks_at_once_and_each_agent_has_its_turn() -> None:
    looks = Looks(30.0)
    looks.gate.clear()
    agenda = Agenda(looks)
    agents = [f"ns/desk-{number}" for number in range(3 * LOOKS_AT_ONCE)]
    for agent in agents:
        agenda.add(agent)
        agenda.add(agent)
    await looks.until(LOOKS_AT_ONCE)
    looks.gate.set()
    async with asyncio.timeout(20):
        await agenda.looked_at(agents)
    assert (looks.begun, looks.most_at_once) == (len(agents), LOOKS_AT_ONCE)
    await agenda.close()


async def test_an_agent_at_rest_has_no_task() -> None:
    agenda = Agenda(Looks(30.0))
    agenda.add(AGENT)
    async with asyncio.timeout(20):
        await agenda.looked_at([AGENT])
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0)
    assert len(agenda) == 1
    await agenda.close()


async def test_nothing_is_kept_of_the_event_that_made_an_agent_known() -> None:
    """kopf has a variable of the context hold what it tells of."""
    told: contextvars.ContextVar[Ends | None] = contextvars.ContextVar("told", default=None)
    seen: list[Ends | None] = []

    async def look(_: str) -> float | None:
        seen.append(told.get())
        return 30.0

    def tell(event: Ends) -> None:
        told.set(event)
        agenda.add(AGENT)

    agenda = Agenda(look)
    event = Ends()
    kept = weakref.ref(event)
    contextvars.copy_context().run(tell, event)
    del event
    async with asyncio.timeout(20):
        await agenda.looked_at([AGENT])
    gc.collect()
    assert (seen, kept()) == ([None], None)
    await agenda.close()


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_a_back_off_grows_to_its_bound(failures: int, chance: float) -> None:
    first, longest = BACKOFF_SECONDS
    assert first / 2 <= backoff(failures, chance) <= longest
    assert backoff(failures, chance) <= backoff(failures + 1, chance)


# --- what is written ----------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.booleans(), st.integers(-3, 3), st.text("ab", max_size=2), st.lists(st.integers())
)
OBJECTS = st.recursive(
    st.dictionaries(st.sampled_from("abc"), LEAVES, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), LEAVES | inner, max_size=3),
    max_leaves=8,
)


def merged(target: Any, patch: Any) -> Any:
    """RFC 7386, section 2, word for word."""
    if not isinstance(patch, dict):
        return patch
    target = copy.deepcopy(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        else:
            target[name] = merged(target.get(name), value)
    return target


@given(OBJECTS, OBJECTS)
def test_a_patch_makes_the_new_of_the_old(old: dict[str, Any], new: dict[str, Any]) -> None:
    patch = difference(old, new)
    assert merged(old, patch) == new
    assert bool(patch) == (old != new)


# --- Secrets ----------------------------------------------------------------------------------------------------


def test_what_a_secret_lacks_is_a_sentence() -> None:
    keyed = parsed(an_object(access__apiKeysSecretRef__name="callers", access__public=False))
    assert "Secret callers of access.apiKeysSecretRef does not exist" in caller_keys_missing(
        keyed, None
    )
    assert "has no keys" in caller_keys_missing(keyed, {"alice": ""})
    assert caller_keys_missing(keyed, {"alice": "k"}) == ""
    assert caller_keys_missing(parsed(an_object()), None) == ""
    signed = {"authTokenSecretRef": {"name": "twilio"}, "publicUrl": "wss://calls.example/desk"}
    both = parsed(
        an_object(
            access__apiKeysSecretRef__name="callers", access__twilio=signed, access__public=False
        )
    )
    missing = caller_keys_missing(both, None, None)
    assert "Secret callers of access.apiKeysSecretRef does not exist" in missing
    assert "Secret twilio of access.twilio.authTokenSecretRef does not exist" in missing
    assert "has no auth tokens" in caller_keys_missing(both, {"alice": "k"}, {"main": ""})
    assert caller_keys_missing(both, {"alice": "k"}, {"main": "t"}) == ""
    burst = parsed(an_object(**BURST)).burst
    assert burst
    assert "does not exist" in credentials_missing(burst, None)
    lacking = credentials_missing(burst, {"token-id": ""})
    assert "lacks token-id and token-secret" in lacking
    assert credentials_missing(burst, {"token-id": "a", "token-secret": "b"}) == ""


def test_a_proxy_token_needs_both_halves() -> None:
    assert proxy_token({"proxy-token-id": "wk-1", "proxy-token-secret": "ws-1"}) == "wk-1.ws-1"
    assert proxy_token({"proxy-token-id": "wk-1"}) == ""


# --- work at Modal ------------------------------------------------------------------------------------------------


class Ends:
    """Told when work on an app has ended."""

    def __init__(self) -> None:
        self.agents: asyncio.Queue[str] = asyncio.Queue()

    def __call__(self, agent: str) -> None:
        self.agents.put_nowait(agent)


@pytest.fixture
async def away(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Deployments, Ends]]:
    """Deployments at a Modal that does not answer."""
    ends = Ends()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MODAL_SERVER_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        deployments = Deployments(Sdk(lambda: Burst(call_seconds=0.5, deploy_seconds=1)), ends)
        yield deployments, ends
        await deployments.close()


def app() -> BurstApp:
    agent = parsed(an_object(**BURST))
    assert agent.burst
    keys = Keys(worker="", ticket="a key of thirty-two characters!!")
    return described(agent, agent.burst, "app", keys)


async def test_a_modal_that_is_away_is_a_fact_and_no_exception(
    away: tuple[Deployments, Ends],
) -> None:
    deployments, ends = away
    account = Account(credentials=Credentials(token_id="ak-1", token_secret="as-1"), environment="")
    there = BurstFacts(app="app", urls={"us-east": "u"})
    assert deployments.facts(AGENT, there) == there
    deployments.remember(AGENT, account)
    deployments.deploy(AGENT, app(), "hash-1")
    deployments.deploy(AGENT, app(), "hash-2")  # never two at once
    assert deployments.facts(AGENT, BurstFacts()).working
    async with asyncio.timeout(30):
        assert await ends.agents.get() == AGENT
    facts = deployments.facts(AGENT, BurstFacts())
    assert (facts.working, facts.failures, facts.failed_hash) == (False, 1, "hash-1")
    assert facts.message.startswith("ModalUnreachable: ")
    assert facts.url == "u"  # what was deployed before goes on
    deployments.stop(AGENT, "app")
    async with asyncio.timeout(30):
        await ends.agents.get()
    facts = deployments.facts(AGENT, BurstFacts())
    assert (facts.failures, facts.failed_hash, facts.stopped) == (2, "", False)


async def test_work_on_an_app_ends_with_its_agent(away: tuple[Deployments, Ends]) -> None:
    deployments, ends = away
    account = Account(credentials=Credentials(token_id="ak-1", token_secret="as-1"), environment="")
    deployments.facts(AGENT, BurstFacts())
    deployments.remember(AGENT, account)
    deployments.deploy(AGENT, app(), "hash-1")
    deployments.forget(AGENT)
    assert deployments.account(AGENT) is None
    assert ends.agents.empty()


# --- tokens of the engine ---------------------------------------------------------------------------------


def test_a_token_that_cannot_be_sent_is_told_in_words_that_do_not_show_it() -> None:
    hook = {"url": "https://policy.example/v1", "tokenSecretRef": {"name": "hook"}}
    engine = {"type": "moshi", "model": "a/b", "tokenSecretRef": {"name": "hub"}}
    engine |= {"stt": "a/c", "policy": {"hook": hook}}
    agent = parsed(an_object(engine=engine))
    for missing, name, where in (
        (hook_token_missing, "hook", "engine.policy.hook.tokenSecretRef"),
        (hub_token_missing, "hub", "engine.tokenSecretRef"),
    ):
        gone = missing(agent, None)
        assert gone.startswith(f"Secret {name} of {where} does not exist: create it with an entry")
        assert f"Secret {name} of {where} has no text as its entry token" in missing(
            agent, {"k": "v"}
        )
        for malformed in ("two words", "line\nbreak", "käse"):
            told = missing(agent, {"token": malformed})
            assert told.startswith(f"entry token of Secret {name} of {where} is no bearer token")
            assert malformed not in told
            assert token_of({"token": malformed}) == ""
        assert missing(agent, {"token": "hf_abc.DEF-123=="}) == ""
    unasked = parsed(an_object())
    assert hook_token_missing(unasked, None) == hub_token_missing(unasked, None) == ""
