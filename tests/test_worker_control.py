"""The links between workers and gateways: who is told what, who gets a slot, and what a loss costs."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tls_rig import Links
from websockets.asyncio.client import ClientConnection
from worker_rig import (
    AGENT,
    PATIENCE,
    WORKER_KEY,
    FakeGateway,
    next_message,
    refusal,
    worker,
)

from trunkline_runtime import __version__
from trunkline_runtime.contract import WORKER_PROTOCOL_VERSION, Hello
from trunkline_runtime.worker.control import (
    MAX_BACKOFF_SECONDS,
    ControlLinks,
    Dialling,
    Endpoint,
    addresses_of,
    backoff,
)
from trunkline_runtime.worker.metrics import Lateness
from trunkline_runtime.worker.switchboard import Switchboard
from trunkline_runtime.worker.tickets import LinkTickets

pytestmark = pytest.mark.usefixtures("links")


def hello(link: int, ticket_key: str) -> Hello:
    return Hello(
        type="hello",
        version=WORKER_PROTOCOL_VERSION,
        agent=AGENT,
        worker="echo-0",
        boot="b",
        slots=1,
        port=1,
        protocols=["realtime"],
        build="0",
        link=link,
        ticketKey=ticket_key,
    )


def dialling_by(dns: Callable[[], frozenset[Endpoint]]) -> Dialling:
    """As a worker dials, but names stand for what `dns` says."""

    async def resolve(_: Endpoint) -> frozenset[Endpoint]:
        return dns()

    return Dialling(
        hello=hello,
        agent=AGENT,
        key=WORKER_KEY,
        source=None,
        tls=Links.pki.worker(AGENT).gateways if Links.pki else None,
        resolve=resolve,
        resolve_seconds=0.01,
    )


def slot_log(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int, str]]:
    """(step, slot, call) of each line of the slot log."""
    return [
        (record.message, record.__dict__["slot"], record.__dict__["call"])
        for record in caplog.records
        if record.name == "trunkline.slots"
    ]


async def test_a_worker_says_who_it_is_and_what_is_free() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway, slots=3) as running:
        (said,) = gateway.hellos
        key = said.pop("ticketKey")
        assert gateway.hellos == [
            {
                "type": "hello",
                "version": WORKER_PROTOCOL_VERSION,
                "agent": AGENT,
                "worker": "echo-0",
                "boot": running.host.boot,
                "slots": 3,
                "port": running.host.port,
                "protocols": ["realtime", "moshi"],
                "build": __version__,
                "link": 1,
            }
        ]
        assert len(key) >= 32, "nobody guesses it"
        assert _told(gateway) == _free(n=3, busy=0)
        await gateway.until(lambda: len(gateway.heard("free")) >= 3)  # once a second, unasked


async def test_the_link_comes_from_the_address_where_the_data_server_is() -> None:
    async with FakeGateway().serving("127.0.0.1") as gateway, worker(gateway, host="127.0.0.6"):
        assert gateway.peers == ["127.0.0.6"]


async def test_a_slot_is_taken_and_freed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trunkline.slots")
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        async with running.dial(gateway.ticket("a")) as first:
            await next_message(first, "session.created")
            async with running.dial(gateway.ticket("b")) as second:
                await next_message(second, "session.created")
                full = await refusal(running.dial(gateway.ticket("c")))
                assert full == (503, "no slot is free\n"), "two slots, two calls"
            await gateway.until(lambda: gateway.free["busy"] == 1)
        await gateway.until(lambda: gateway.free["busy"] == 0)
        assert slot_log(caplog) == [
            ("live", 0, "a"),
            ("live", 1, "b"),
            ("freed", 1, "b"),
            ("freed", 0, "a"),
        ]
        extras = next(r.__dict__ for r in caplog.records if r.name == "trunkline.slots")
        assert extras["worker"] == "echo-0"
        assert extras["boot"] == running.host.boot
        assert extras["t"] == pytest.approx(extras["created"], abs=5)


async def test_a_link_that_is_lost_takes_its_tickets_with_it_and_no_call() -> None:
    async with (
        FakeGateway().serving() as first,
        FakeGateway().serving() as second,
        worker(first, second, slots=4) as running,
    ):
        unused, others = first.ticket("is lost"), second.ticket("is of another link")
        async with running.dial(first.ticket("is live")) as caller:
            await next_message(caller, "session.created")
            first.cut()
            await first.until(lambda: len(first.hellos) == 2)
            assert (await refusal(running.dial(unused)))[0] == 403
            assert first.hellos[0]["ticketKey"] != first.hellos[1]["ticketKey"]
            for ticket in (others, first.ticket("is new")):
                async with running.dial(ticket) as other:
                    await next_message(other, "session.created")
            # The call of the lost link goes on.
            await caller.send('{"type": "response.create"}')
            await next_message(caller, "response.done")


def _told(gateway: FakeGateway) -> dict[str, Any]:
    """The last count that was heard, but for its number."""
    return {key: value for key, value in gateway.free.items() if key != "seq"}


def _free(*, n: int, busy: int, draining: bool = False) -> dict[str, Any]:
    return {"type": "free", "n": n, "busy": busy, "draining": draining}


async def test_two_gateways_race_for_the_last_slot_and_one_gets_it() -> None:
    async with (
        FakeGateway().serving() as first,
        FakeGateway().serving() as second,
        worker(first, second, slots=1) as running,
    ):
        for number in range(20):
            dials = await asyncio.gather(
                *(
                    running.dial(gateway.ticket(f"{gateway.port}-{number}"))
                    for gateway in (first, second)
                ),
                return_exceptions=True,
            )
            (link,) = (dial for dial in dials if isinstance(dial, ClientConnection))
            await next_message(link, "session.created")
            await link.close()
            for gateway in (first, second):
                await gateway.until(lambda gateway=gateway: gateway.free["busy"] == 0)  # type: ignore[misc]


async def test_a_gateway_that_hangs_is_dropped_and_dialled_again() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway):
        gateway.silent = True
        await gateway.until(lambda: gateway.links == 0)
        gateway.silent = False
        await gateway.until(lambda: len(gateway.hellos) == 2)


async def test_a_gateway_that_restarts_is_found_again() -> None:
    first, second = FakeGateway(), FakeGateway()
    async with contextlib.AsyncExitStack() as killed:
        await killed.enter_async_context(first.serving())
        async with worker(first) as running:
            await killed.aclose()
            async with second.serving(port=first.port):
                await second.until(lambda: _told(second) == _free(n=2, busy=0))
                assert second.hellos[0]["boot"] == running.host.boot


@pytest.mark.parametrize(
    ("status", "words"), [(401, "worker key"), (404, "no route"), (500, "500")]
)
async def test_a_refusal_is_logged_once_and_dialled_again(
    status: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeGateway().serving() as gateway:
        gateway.refuse_with = status
        async with worker(gateway, linked=False) as running:
            await gateway.until(lambda: gateway.dials >= 3)
            refusals = [r.message for r in caplog.records if "refused" in r.message]
            assert len(refusals) == 1
            assert words in refusals[0]
            assert await running.health("/readyz") == (200, "ready\n"), "its engine is ready"
            gateway.refuse_with = None
            await gateway.until(lambda: _told(gateway) == _free(n=2, busy=0))


async def test_a_name_is_resolved_by_the_system() -> None:
    async with FakeGateway().serving() as gateway:
        endpoint = Endpoint("localhost", gateway.port)
        assert Endpoint("127.0.0.1", gateway.port) in await addresses_of(endpoint)
        async with worker(gateway, gateways=(endpoint,)):
            assert len(gateway.hellos) == 1


async def test_the_links_follow_the_addresses_of_a_name() -> None:
    board = Switchboard(slots=1, worker="echo-0", boot="b")
    async with (
        FakeGateway().serving("127.0.0.1") as first,
        FakeGateway().serving("127.0.0.2", first.port) as second,
    ):
        one, two = Endpoint("127.0.0.1", first.port), Endpoint("127.0.0.2", first.port)
        stands_for = frozenset({one})

        links = ControlLinks(
            dialling_by(lambda: stands_for),
            (Endpoint("gateways", first.port),),
            board,
            LinkTickets(),
        )
        running = asyncio.create_task(links.run())
        await first.until(lambda: bool(first.free))
        assert repr(links) == "<ControlLinks up=1 of 1>"
        stands_for = frozenset({one, two})
        await second.until(lambda: bool(second.free))
        assert (first.dials, second.dials) == (1, 1)
        # A gateway that leaves the name keeps its link, for its calls go on; lost, it stays lost.
        stands_for = frozenset({two})
        board.drain(1)
        await first.until(lambda: first.free["draining"])
        first.cut()
        async with asyncio.timeout(PATIENCE):
            while repr(links) != "<ControlLinks up=1 of 1>":
                await asyncio.sleep(0.01)
        assert (first.dials, second.dials) == (1, 1)
        await links.bye()
        running.cancel()
        await asyncio.wait({running})
        assert second.heard("bye")


async def test_gateways_tell_of_gateways_that_dns_does_not_know_yet() -> None:
    board = Switchboard(slots=1, worker="echo-0", boot="b")
    async with (
        FakeGateway().serving("127.0.0.1") as first,
        FakeGateway().serving("127.0.0.2", first.port) as second,
    ):
        cached = frozenset({Endpoint("127.0.0.1", first.port)})

        links = ControlLinks(
            dialling_by(lambda: cached),
            (Endpoint("gateways", first.port),),
            board,
            LinkTickets(),
        )
        running = asyncio.create_task(links.run())
        await first.until(lambda: bool(first.free))
        await first.say(type="gateways", hosts=["127.0.0.1", "127.0.0.2"])
        await second.until(lambda: bool(second.free))
        # Lost, it is dialled again, for the first one's word still holds, and who has come this way may tell, too.
        second.cut()
        await second.until(lambda: len(second.hellos) == 2)
        cached = frozenset()
        await second.say(type="gateways", hosts=["127.0.0.2", "127.0.0.1"])
        first.cut()
        await first.until(lambda: len(first.hellos) == 2)
        # Nobody's word counts longer than its link.
        await second.say(type="gateways", hosts=["127.0.0.2"])
        board.drain(1)
        await second.until(lambda: second.free["draining"])
        first.cut()
        async with asyncio.timeout(PATIENCE):
            while repr(links) != "<ControlLinks up=1 of 1>":
                await asyncio.sleep(0.01)
        assert first.dials == 2
        await links.bye()
        running.cancel()
        await asyncio.wait({running})


async def test_beats_tell_how_many_frames_came_late() -> None:
    shares = iter([0.25])
    board = Switchboard(slots=1, worker="echo-0", boot="b")
    async with FakeGateway().serving() as gateway:
        endpoint = Endpoint("127.0.0.1", gateway.port)
        dialling = dialling_by(lambda: frozenset({endpoint}))
        links = ControlLinks(dialling, (endpoint,), board, LinkTickets(), lambda: next(shares, 0.0))
        running = asyncio.create_task(links.run())
        await gateway.until(lambda: bool(gateway.free) and gateway.free.get("late") == 0.25)
        await gateway.until(lambda: "late" not in gateway.free)
        running.cancel()
        await asyncio.wait({running})


class Metronome:
    """An engine that has nothing but totals."""

    def __init__(self, **totals: int) -> None:
        self.counts = totals

    def totals(self) -> dict[str, int]:
        return self.counts


@pytest.mark.parametrize("what", ["frames", "steps"])
def test_lateness_is_of_what_happened_since_the_last_beat(what: str) -> None:
    engine = Metronome(**{what: 100, f"late_{what}": 50})
    lateness = Lateness(engine)  # type: ignore[arg-type]  # all of an engine that it asks
    assert lateness.share() == 0.0
    engine.counts = {what: 110, f"late_{what}": 51}
    assert lateness.share() == pytest.approx(0.1)
    assert lateness.share() == 0.0
    assert Lateness(object()).share() == 0.0  # type: ignore[arg-type]  # one that counts nothing


async def test_a_name_that_resolves_to_nothing_is_logged_and_costs_no_other_link(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with FakeGateway().serving() as gateway:
        nowhere = Endpoint("gateway.invalid", 1)
        known = Endpoint("127.0.0.1", gateway.port)
        async with worker(gateway, gateways=(nowhere, known)):
            said = [r.message for r in caplog.records if "gateway.invalid" in r.message]
            assert len(said) == 1
            assert "cannot resolve" in said[0]


@pytest.mark.parametrize("message", ["no json", '{"type": 1}', "[]", '{"n": 1}'])
async def test_a_message_that_makes_no_sense_costs_the_link_and_nothing_else(message: str) -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        ticket = gateway.ticket("a")
        async with running.dial(ticket) as caller:
            await next_message(caller, "session.created")
            await gateway.say_raw(message)
            await gateway.until(lambda: len(gateway.hellos) == 2)
            await caller.send('{"type": "response.create"}')
            await next_message(caller, "response.done")


async def test_what_a_newer_gateway_says_is_passed_over() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway):
        await gateway.say(type="rebalance", calls=["a"])
        await gateway.say(type="drain")
        await gateway.until(lambda: gateway.free["draining"])
        assert len(gateway.hellos) == 1


async def test_a_gateway_drains_a_worker_and_takes_it_back() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        live = await running.dial(gateway.ticket("a"))
        await next_message(live, "session.created")
        await gateway.say(type="drain")
        await gateway.until(lambda: _told(gateway) == _free(n=0, busy=1, draining=True))
        assert (await refusal(running.dial(gateway.ticket("b"))))[0] == 503
        assert await running.health("/readyz") == (503, "draining: 1 busy\n")
        await gateway.say(type="undrain")
        await gateway.until(lambda: _told(gateway) == _free(n=1, busy=1))
        assert await running.health("/readyz") == (200, "ready\n")
        other = await running.dial(gateway.ticket("b"))
        await next_message(other, "session.created")
        for caller in (live, other):
            await caller.close()


async def test_a_worker_drains_while_any_gateway_that_is_there_wants_it() -> None:
    async with (
        FakeGateway().serving() as first,
        FakeGateway().serving() as second,
        worker(first, second) as running,
    ):
        await first.say(type="drain")
        await second.say(type="drain")
        await first.until(lambda: first.free["draining"])
        await first.say(type="undrain")
        beats = len(first.heard("free"))
        await first.until(lambda: len(first.heard("free")) > beats)
        assert first.free["draining"]
        assert (await refusal(running.dial(first.ticket("a"))))[0] == 503
        second.cut()
        await first.until(lambda: not first.free["draining"])


async def test_a_worker_that_stops_says_bye_when_its_last_call_is_over() -> None:
    async with FakeGateway().serving() as gateway, worker(gateway) as running:
        ticket = gateway.ticket("a")
        async with running.dial(ticket) as caller:
            await next_message(caller, "session.created")
            running.stop.set()
            await gateway.until(lambda: _told(gateway) == _free(n=0, busy=1, draining=True))
            assert (await refusal(running.dial(gateway.ticket("b"))))[0] == 503
            await gateway.say(type="undrain")  # has no say in this
            await caller.send('{"type": "response.create"}')
            await next_message(caller, "response.done")
            assert gateway.free["draining"]
            assert not gateway.heard("bye")
        async with asyncio.timeout(PATIENCE):
            await running.run
        await gateway.until(lambda: gateway.messages[-1] == {"type": "bye"})
        assert gateway.messages[-2] == gateway.free
        assert _told(gateway) == _free(n=0, busy=0, draining=True)


async def test_a_drain_has_an_end(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeGateway().serving() as gateway, worker(gateway, max_seconds=1) as running:
        board = running.host._switchboard
        assert board is not None
        assert board.take("whose end never comes") is not None
        running.stop.set()
        await gateway.until(lambda: gateway.free.get("draining", False))
        async with asyncio.timeout(PATIENCE):
            await running.run
    assert "calls are cut off" in caplog.messages


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_backoff_is_bounded_and_spread(failures: int, chance: float) -> None:
    assert 0.1 <= backoff(failures, chance) <= MAX_BACKOFF_SECONDS
    assert backoff(failures, 0) == 0.1 < backoff(failures, 1)
    assert backoff(16, 1) == MAX_BACKOFF_SECONDS
