"""The operator's links to gateways: what it tells them, and what it believes of what they say."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from fake_gateway import TOKEN, FakeGateway, agent_load, worker_load
from gateway_rig import OPERATOR_TOKEN, a_gateway, a_route, events, until
from hypothesis import given
from hypothesis import strategies as st
from tls_rig import Links

from trunkline_operator.gateways.fleet import Fleet
from trunkline_operator.gateways.loads import AgentReport, Loads, parse_load
from trunkline_runtime.contract import DEAD_AFTER_SECONDS, AgentLoad, Load, LoadChanges, Route
from trunkline_runtime.tls import trusting

AGENT = "default/front-desk"


def load(agents: dict[str, AgentLoad], boot: str = "g0", epoch: int = 1) -> Load:
    return Load(type="load", gateway=f"of-{boot}", boot=boot, epoch=epoch, agents=agents)


def route(agent: str = AGENT, **more: Any) -> Route:
    made = Route(
        agent=agent,
        hash="h",
        workerKey="k",
        access={"public": True, "apiKeys": {}, "origins": []},
        answerSeconds=8,
        maxSeconds=1800,
        admissionMs=0,
        settings={},
        rungs=[{"kind": "warm"}],
        draining=[],
    )
    made.update(more)  # type: ignore[typeddict-item]  # a test names only keys of Route
    return made


# --- loads, put together -------------------------------------------------------------------------------


def test_numbers_of_gateways_add_up_and_their_workers_count_once() -> None:
    loads = Loads()
    said = {"front-desk-0": worker_load(busy=2)}
    loads.hear(load({AGENT: agent_load(said, calls=1, burst=1, arrivals=5)}), 0)
    loads.hear(load({AGENT: agent_load(said, calls=1, burst=0, arrivals=7)}, "g1"), 0)
    assert loads.report(AGENT) == AgentReport(
        workers=said, calls=2, burst=1, arrivals=12, gateways=2
    )


def test_a_gateway_linked_twice_counts_once() -> None:
    loads = Loads()
    for now in (0.0, 0.5):
        loads.hear(load({AGENT: agent_load(calls=3, arrivals=9)}), now)
    assert loads.report(AGENT) == AgentReport(calls=3, arrivals=9, gateways=1)


def test_of_two_words_about_a_worker_the_cautious_one_counts() -> None:
    loads = Loads()
    loads.hear(load({AGENT: agent_load({"w": worker_load(busy=1)})}), 0)
    loads.hear(load({AGENT: agent_load({"w": worker_load(draining=True)})}, "g1"), 1)
    merged = loads.report(AGENT).workers["w"]
    assert (merged["busy"], merged["free"], merged["draining"]) == (1, 0, False)


def test_a_restarted_worker_is_known_by_its_last_boot_alone() -> None:
    loads = Loads()
    old, new = worker_load(busy=4, boot="old"), worker_load(busy=1, boot="new")
    loads.hear(load({AGENT: agent_load({"w": old})}), 0)
    loads.hear(load({AGENT: agent_load({"w": new})}, "g1"), 1)
    assert loads.report(AGENT).workers == {"w": new}


def test_a_silent_gateway_takes_its_workers_and_calls_along_but_not_its_totals() -> None:
    loads = Loads()
    loads.hear(load({AGENT: agent_load({"w": worker_load(busy=1)}, arrivals=3)}), 0)
    assert loads.expire(DEAD_AFTER_SECONDS) == set()
    assert loads.expire(DEAD_AFTER_SECONDS + 0.1) == {AGENT}
    assert loads.report(AGENT) == AgentReport(arrivals=3)


def test_a_beat_keeps_a_gateway() -> None:
    loads = Loads()
    loads.hear(load({AGENT: agent_load(calls=1)}), 0)
    loads.beat("g0", 2)
    assert loads.expire(DEAD_AFTER_SECONDS + 1) == set()


def test_changes_count_for_a_gateway_that_has_said_everything() -> None:
    loads = Loads()
    some = LoadChanges(
        type="loadChanges", gateway="of-g0", boot="g0", epoch=1, agents={AGENT: agent_load(calls=3)}
    )
    assert loads.hear(some, 0) == set()
    loads.hear(load({AGENT: agent_load(arrivals=4), "default/other": agent_load(calls=1)}), 0)
    assert loads.hear(some, 2) == {AGENT}
    assert (loads.report(AGENT).calls, loads.report("default/other").calls) == (3, 1)
    assert loads.report(AGENT).arrivals == 4, "a total never falls"
    assert loads.expire(DEAD_AFTER_SECONDS + 1) == set(), "it was a sign of life"


def test_only_news_is_told() -> None:
    loads = Loads()
    said = load({AGENT: agent_load({"w": worker_load()}), "default/other": agent_load()})
    assert loads.hear(said, 0) == {AGENT, "default/other"}
    assert loads.hear(said, 1) == set()
    busier = load({AGENT: agent_load({"w": worker_load(busy=1)}), "default/other": agent_load()})
    assert loads.hear(busier, 2) == {AGENT}
    assert loads.hear(load({"default/other": agent_load()}), 3) == {AGENT}


@given(
    st.lists(
        st.tuples(st.sampled_from(["g0", "g1", "g2"]), st.integers(0, 9), st.booleans()),
        max_size=40,
    )
)
def test_totals_never_fall_and_are_exact(words: list[tuple[str, int, bool]]) -> None:
    """Gateways count up, restart, fall silent and come back."""
    loads, now, boots, totals = Loads(), 0.0, dict[str, int](), dict[str, int]()
    last = 0
    for gateway, more, restart in words:
        boots[gateway] = boots.get(gateway, 0) + restart
        boot = f"{gateway}.{boots[gateway]}"
        totals[boot] = totals.get(boot, 0) + more
        now += more
        loads.expire(now)
        loads.hear(load({AGENT: agent_load(arrivals=totals[boot])}, boot), now)
        assert loads.report(AGENT).arrivals == sum(totals.values()) >= last
        last = loads.report(AGENT).arrivals


@pytest.mark.parametrize(
    "broken",
    [
        "[]",
        "nonsense",
        '{"type": "load"}',
        json.dumps(load({AGENT: agent_load(calls=-1)})),
        json.dumps(load({AGENT: agent_load(arrivals="7")})),
        json.dumps(load({AGENT: agent_load(workers={"w": {"boot": "b"}})})),
    ],
)
def test_a_message_that_is_not_as_agreed_is_an_error(broken: str) -> None:
    with pytest.raises(ValueError, match=r"not a message|Expecting value"):
        parse_load(broken)


def test_other_messages_are_ignored_and_loads_come_through_whole() -> None:
    said = load({AGENT: agent_load({"w": worker_load(draining=True)}, refused=2)})
    assert parse_load('{"type": "beat"}') is None
    assert parse_load(json.dumps(said)) == said
    some = {**said, "type": "loadChanges"}
    assert parse_load(json.dumps(some)) == some


# --- links -----------------------------------------------------------------------------------------------


class Changes:
    """The agents that a fleet reported as changed."""

    def __init__(self) -> None:
        self.agents: list[str] = []
        self._event = asyncio.Event()

    def __call__(self, agent: str) -> None:
        self.agents.append(agent)
        self._event.set()

    async def until(self, what: Callable[[], bool], seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while not what():
                self._event.clear()
                await self._event.wait()


@pytest.fixture
async def stack(links: None) -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def the_cas() -> ssl.SSLContext | None:
    return trusting(Links.pki.ca) if Links.pki else None


async def start(
    stack: AsyncExitStack, *gateways: FakeGateway, epoch: int = 7, silent_seconds: float = 30.0
) -> tuple[Fleet, Changes]:
    addresses = []
    for gateway in gateways:
        await stack.enter_async_context(gateway.serving())
        addresses.append(("127.0.0.1", gateway.port))
    changes = Changes()
    fleet = Fleet(
        addresses,
        TOKEN,
        epoch=epoch,
        changed=changes,
        tls=the_cas(),
        resolve_seconds=0.2,
        silent_seconds=silent_seconds,
    )
    return await stack.enter_async_context(fleet), changes


async def test_every_gateway_gets_all_routes_once_opened_and_again_when_they_change(
    stack: AsyncExitStack,
) -> None:
    gateways = FakeGateway(), FakeGateway("gateway-1", "g1")
    fleet, _ = await start(stack, *gateways)
    fleet.set_route(AGENT, route())
    for gateway in gateways:
        await gateway.until(lambda it: it.beats)
        assert gateway.told == []  # not opened: a gateway keeps what it has
    fleet.open()
    for gateway in gateways:
        await gateway.until(lambda it: it.routes)
        assert gateway.told == [fleet.document]
    assert not fleet.set_route(AGENT, route())
    assert fleet.set_route(AGENT, route(draining=["front-desk-1"]))
    fleet.set_route("default/b", route("default/b"))
    for gateway in gateways:
        await gateway.until(lambda it: len(it.told) == 2)
        assert gateway.told[-1] == fleet.document
        assert list(gateway.routes) == ["default/b", AGENT]
    fleet.set_route(AGENT, None)
    await gateways[0].until(lambda it: list(it.routes) == ["default/b"])


async def test_a_gateway_is_told_what_differs_and_an_older_one_everything(
    stack: AsyncExitStack,
) -> None:
    new, old = FakeGateway(), FakeGateway("gateway-1", "g1", changes=False)
    fleet, _ = await start(stack, new, old)
    for name in ("default/a", "default/b"):
        fleet.set_route(name, route(name))
    fleet.open()
    for gateway in (new, old):
        await gateway.until(lambda it: len(it.routes) == 2 and "share" in it.told[-1])
        gateway.messages.clear()
    fleet.set_route("default/a", None)
    fleet.set_route("default/b", route("default/b", draining=["b-1"]))
    fleet.set_runway("default/b", [(4, 40.0)])
    for gateway in (new, old):
        await gateway.until(lambda it: list(it.routes) == ["default/b"] and it.runways[-1])
        assert gateway.told[-1] == fleet.document
        assert list(gateway.runways[-1]) == ["default/b"]
    told = {message["type"]: message for message in new.messages}
    assert told.keys() <= {"routeChanges", "runway", "runwayChanges"}
    assert told["routeChanges"]["gone"] == ["default/a"]
    assert {message["type"] for message in old.messages} == {"routes", "runway"}
    await new.cut()
    await new.until(lambda it: it.links == 2 and it.messages[-1]["type"] == "runway")
    assert new.messages[-2] == fleet.document, "after a break it may know less than it was told"


async def test_fleet_and_gateway_agree_on_changes_both_ways(stack: AsyncExitStack) -> None:
    gateway = await stack.enter_async_context(a_gateway(settle_seconds=0.0))
    changes, address = Changes(), ("127.0.0.1", gateway.control_port)
    fleet = Fleet([address], OPERATOR_TOKEN, epoch=3, changed=changes, tls=the_cas())
    await stack.enter_async_context(fleet)
    fleet.set_route(AGENT, a_route(AGENT))
    fleet.open()
    await changes.until(lambda: fleet.report(AGENT).gateways == 1)
    lines = stack.enter_context(events("trunkline.gateway"))
    fleet.set_route("default/b", a_route("default/b"))
    fleet.set_route("default/c", a_route("default/c"))
    await changes.until(lambda: fleet.report("default/c").gateways == 1)
    fleet.set_route("default/b", None)
    await until(lambda: sorted(gateway.gateway._routes.by_agent()) == ["default/c", AGENT])
    said = [(line["message"], line["changed"]) for line in lines if "changed" in line]
    assert said == [
        ("changed routes were taken", ["default/b", "default/c"]),
        ("changed routes were taken", ["default/b"]),
    ]
    async with asyncio.timeout(20):
        while not fleet.acknowledged("default/b"):
            await asyncio.sleep(0.05)


async def test_what_a_gateway_says_of_some_agents_leaves_the_others(stack: AsyncExitStack) -> None:
    gateway = FakeGateway()
    gateway.agents = {AGENT: agent_load(calls=1), "default/b": agent_load(calls=2)}
    fleet, changes = await start(stack, gateway)
    await changes.until(lambda: fleet.report("default/b").calls == 2)
    changes.agents.clear()
    await gateway.mention(AGENT, agent_load(calls=5))
    await changes.until(lambda: fleet.report(AGENT).calls == 5)
    assert fleet.report("default/b").calls == 2
    assert changes.agents == [AGENT]


async def test_who_knows_better_than_dns_is_believed_and_gateways_are_told(
    stack: AsyncExitStack,
) -> None:
    first, second = FakeGateway(), FakeGateway("gateway-1", "g1")
    fleet, _ = await start(stack, first)
    await stack.enter_async_context(second.serving("127.0.0.2", first.port))
    name = "127.0.0.1", first.port
    fleet.set_route(AGENT, route())
    fleet.stands_for(name, frozenset({"127.0.0.1", "127.0.0.2"}))
    await second.until(lambda it: it.beats)
    fleet.stands_for(name, frozenset({"127.0.0.1", "127.0.0.2"}))
    for gateway in (first, second):
        beats = gateway.beats
        await gateway.until(lambda it, beats=beats: it.beats > beats)
    assert not first.messages, "nor is a gateway told anything before all agents are known"
    assert not second.messages
    fleet.open()

    def told(gateway: FakeGateway) -> list[list[str]]:
        return [said["hosts"] for said in gateway.messages if said["type"] == "gateways"]

    for gateway in (first, second):
        await gateway.until(lambda it: it.told)
        assert told(gateway) == [["127.0.0.1", "127.0.0.2"]]
        assert gateway.messages[0]["type"] == "gateways"
        assert gateway.told[-1]["share"] == 0.5
    fleet.set_route(AGENT, None)
    for gateway in (first, second):
        await gateway.until(lambda it: not it.routes)
        assert len(told(gateway)) == 1
    await first.cut()
    await first.until(lambda it: len(told(it)) == 2)
    fleet.stands_for(name, frozenset({"127.0.0.2"}))
    await second.until(lambda it: told(it)[-1] == ["127.0.0.2"])
    await first.cut()
    await second.until(lambda it: "share" not in it.told[-1])
    assert fleet.connected == 1
    fleet.stands_for(name, frozenset())
    assert fleet.connected == 1, "a link that is up stays"
    fleet.stands_for(name, None)  # and DNS is asked again
    await first.until(lambda it: it.links == 3)


async def test_news_that_are_none_cost_no_beat(stack: AsyncExitStack) -> None:
    gateway = FakeGateway()
    fleet, _ = await start(stack, gateway)
    fleet.open()
    await gateway.until(lambda it: it.told)
    beats = gateway.beats

    async def tell_again_and_again() -> None:
        while True:
            fleet.stands_for(("127.0.0.1", gateway.port), frozenset({"127.0.0.1"}))
            await asyncio.sleep(0.01)

    telling = asyncio.create_task(tell_again_and_again())
    try:
        await gateway.until(lambda it: it.beats >= beats + 3)
    finally:
        telling.cancel()
    assert gateway.links == 1


async def test_dns_is_not_asked_for_a_name_that_is_to_be_told(stack: AsyncExitStack) -> None:
    first, second = FakeGateway(), FakeGateway("gateway-1", "g1")
    for gateway in (first, second):
        await stack.enter_async_context(gateway.serving())
    names = [("127.0.0.1", gateway.port) for gateway in (first, second)]
    fleet = Fleet(
        names,
        TOKEN,
        epoch=1,
        changed=Changes(),
        tls=the_cas(),
        told=names[:1],
        resolve_seconds=0.01,
    )
    await stack.enter_async_context(fleet)
    await second.until(lambda it: it.beats >= 2)
    assert first.links == 0
    fleet.stands_for(names[0], frozenset({"127.0.0.1"}))
    await first.until(lambda it: it.links == 1)


async def test_tenants_limits_are_shared_out_among_the_gateways_that_there_are(
    stack: AsyncExitStack,
) -> None:
    alone = FakeGateway()
    fleet, _ = await start(stack, alone)
    fleet.set_route(AGENT, route())
    fleet.open()
    await alone.until(lambda it: it.routes)
    assert "share" not in alone.told[-1]
    gateways = FakeGateway(), FakeGateway("gateway-1", "g1")
    fleet, _ = await start(stack, *gateways, epoch=2)
    fleet.set_route(AGENT, route())
    fleet.open()
    for gateway in gateways:
        await gateway.until(lambda it: it.routes)
        assert gateway.told[-1]["share"] == 0.5


async def test_a_gateway_that_comes_takes_its_share_from_the_others(stack: AsyncExitStack) -> None:
    first, second = FakeGateway(), FakeGateway("gateway-1", "g1")
    fleet, _ = await start(stack, first)
    fleet.set_route(AGENT, route())
    fleet.open()
    await first.until(lambda it: it.routes)
    await stack.enter_async_context(second.serving("127.0.0.2", first.port))
    fleet.stands_for(("127.0.0.1", first.port), frozenset({"127.0.0.1", "127.0.0.2"}))
    await second.until(lambda it: it.told and it.told[-1].get("share") == 0.5)
    await first.until(lambda it: it.told[-1].get("share") == 0.5)


async def test_loads_are_told_as_they_come(stack: AsyncExitStack) -> None:
    gateway = FakeGateway()
    fleet, changes = await start(stack, gateway)
    await gateway.until(lambda it: it.links == 1)
    await gateway.say(AGENT, agent_load({"w": worker_load(busy=1)}))
    await changes.until(lambda: fleet.report(AGENT).calls == 1)
    assert changes.agents == [AGENT]


async def test_a_broken_link_is_dialled_again_and_gets_the_routes_anew(
    stack: AsyncExitStack,
) -> None:
    gateway = FakeGateway()
    gateway.agents[AGENT] = agent_load(calls=2)
    fleet, changes = await start(stack, gateway)
    fleet.set_route(AGENT, route())
    fleet.open()
    await gateway.until(lambda it: it.routes)
    await changes.until(lambda: fleet.report(AGENT).calls == 2)
    await gateway.cut()
    await gateway.until(lambda it: it.links == 2 and len(it.told) == 2)
    assert gateway.told[0] == gateway.told[1]
    assert changes.agents == [AGENT]  # the gap was too short for anything to change


async def test_a_silent_gateway_is_dropped_with_its_numbers(stack: AsyncExitStack) -> None:
    gateway = FakeGateway()
    fleet, changes = await start(stack, gateway)
    await gateway.until(lambda it: it.links == 1)
    await gateway.say(AGENT, agent_load(calls=2))
    await changes.until(lambda: fleet.report(AGENT).calls == 2)
    gateway.silent = True
    await changes.until(lambda: fleet.report(AGENT).calls == 0)
    await gateway.until(lambda it: it.links == 2)  # and dialled again


async def test_when_no_gateway_reports_all_agents_hear_of_it_and_of_its_end(
    stack: AsyncExitStack,
) -> None:
    gateway = FakeGateway()
    fleet, changes = await start(stack, gateway, silent_seconds=0.5)
    others = "default/a", "default/b"
    for agent in others:
        fleet.set_route(agent, route(agent))
    fleet.open()
    await gateway.until(lambda it: it.routes)
    gateway.token = "another"
    await gateway.cut()
    await changes.until(lambda: fleet.silent)
    assert set(changes.agents) >= set(others), "also those of whom it never spoke"
    changes.agents.clear()
    gateway.token = TOKEN
    await changes.until(lambda: not fleet.silent)
    assert set(changes.agents) >= set(others)


async def test_a_wrong_token_is_refused_and_said(
    stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = FakeGateway(token="another")
    fleet, _ = await start(stack, gateway)
    await gateway.until(lambda it: it.refusals >= 3)
    assert fleet.connected == 0
    said = [record.getMessage() for record in caplog.records if record.name == "trunkline.fleet"]
    assert len(said) == 1
    assert "give operator and gateway the same TRUNKLINE_OPERATOR_TOKEN" in said[0]
    assert TOKEN not in caplog.text


async def test_what_gateways_say_is_complete_only_while_none_is_silent(
    stack: AsyncExitStack,
) -> None:
    gateways = FakeGateway(), FakeGateway("gateway-1", "g1", token="another")
    fleet, changes = await start(stack, *gateways)
    assert not fleet.complete
    gateways[0].agents[AGENT] = agent_load(calls=1)
    await changes.until(lambda: fleet.report(AGENT).calls == 1)
    assert not fleet.complete
    gateways[1].agents[AGENT] = agent_load(calls=1)
    gateways[1].token = TOKEN
    await changes.until(lambda: fleet.report(AGENT).calls == 2)
    assert fleet.complete


async def test_a_route_is_acknowledged_once_every_gateway_has_spoken_in_its_light(
    stack: AsyncExitStack,
) -> None:
    gateways = FakeGateway(), FakeGateway("gateway-1", "g1")
    fleet, changes = await start(stack, *gateways)
    calls = 0

    async def spoken() -> None:
        """Every gateway says something new."""
        nonlocal calls
        calls += 1
        for gateway in gateways:
            gateway.agents[AGENT] = agent_load(calls=calls)
        await changes.until(lambda: fleet.report(AGENT).calls == 2 * calls)

    await spoken()
    assert not fleet.acknowledged(AGENT)  # nothing was told yet
    fleet.set_route(AGENT, route())
    fleet.open()
    async with asyncio.timeout(20):
        while not fleet.acknowledged(AGENT):
            await spoken()
    assert all(gateway.routes for gateway in gateways)
    fleet.set_route("default/b", route("default/b"))
    assert fleet.acknowledged(AGENT)
    assert not fleet.acknowledged("default/b")
    async with asyncio.timeout(20):
        while not fleet.acknowledged("default/b"):
            await spoken()
    assert all("default/b" in gateway.routes for gateway in gateways)


async def test_nonsense_ends_the_link_and_not_the_operator(stack: AsyncExitStack) -> None:
    gateway = FakeGateway()
    gateway.agents[AGENT] = agent_load(calls=-1)
    fleet, changes = await start(stack, gateway)
    await gateway.until(lambda it: it.links >= 2)
    gateway.agents[AGENT] = agent_load(calls=1)
    await changes.until(lambda: fleet.report(AGENT).calls == 1)


async def test_a_gateway_may_come_later_than_the_operator(stack: AsyncExitStack) -> None:
    gateway = FakeGateway()
    async with gateway.serving():
        port = gateway.port
    fleet = Fleet([("127.0.0.1", port)], TOKEN, epoch=1, changed=lambda _: None, tls=the_cas())
    await stack.enter_async_context(fleet)
    fleet.set_route(AGENT, route())
    fleet.open()
    await stack.enter_async_context(gateway.serving(port=port))
    await gateway.until(lambda it: it.routes)


async def test_gateways_hear_of_slots_to_come_after_the_route_and_only_of_news(
    stack: AsyncExitStack,
) -> None:
    gateway = await stack.enter_async_context(FakeGateway().serving())
    fleet, _ = await start(stack, gateway)
    fleet.set_runway(AGENT, [(4, 40.0)])
    await gateway.until(lambda it: it.beats)
    assert not gateway.runways, "it knows no agent yet, so it would be lost on it"
    fleet.set_route(AGENT, route())
    fleet.open()
    await gateway.until(lambda it: it.routes and it.runways)
    (starting,) = gateway.runways[-1][AGENT]
    assert starting["slots"] == 4
    assert 30 < starting["seconds"] <= 40
    heard = len(gateway.runways)
    fleet.set_runway(AGENT, [(4, 39.0)])  # the same pod, a moment later
    fleet.set_runway(AGENT, [(4, 39.0), (4, 60.0)])
    await gateway.until(lambda it: len(it.runways[-1].get(AGENT, ())) == 2)
    assert len(gateway.runways) <= heard + 1
    fleet.set_runway(AGENT, [])
    await gateway.until(lambda it: it.runways[-1] == {})


async def test_slots_to_come_of_many_agents_are_told_together(stack: AsyncExitStack) -> None:
    """To a gateway of before, a message holds those of all agents: one a change would be the square of their number."""
    gateway = await stack.enter_async_context(FakeGateway(changes=False).serving())
    fleet, _ = await start(stack, gateway)
    fleet.open()
    await gateway.until(lambda it: it.beats)
    for number in range(200):
        fleet.set_runway(f"ns/agent-{number}", [(4, 40.0)])
        await asyncio.sleep(0)
    await gateway.until(lambda it: it.runways and len(it.runways[-1]) == 200)
    assert len(gateway.runways) <= 20


def test_who_waits_is_added_up_and_a_rung_is_shut_where_no_gateway_tries_it() -> None:
    loads = Loads()
    one, other = agent_load(), agent_load()
    one["waiting"], one["shut"] = 3, {"burst/us-east": "open", "upstream": "open"}
    other["waiting"], other["shut"] = 2, {"burst/us-east": "trying"}
    loads.hear(load({AGENT: one}), 0)
    loads.hear(load({AGENT: other}, "g1"), 0)
    report = loads.report(AGENT)
    assert report.waiting == 5
    assert report.shut == {"burst/us-east": "open"}
    loads.hear(load({AGENT: agent_load()}, "g1"), 1)
    assert not loads.report(AGENT).shut
