"""What gateways are told of all agents, read back by what reads it in a gateway."""

import json
from dataclasses import dataclass, field

import pytest
from gateway_rig import a_route
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from trunkline_operator.gateways.bulletin import FORETOLD_SECONDS, RouteBulletin, RunwayBulletin
from trunkline_runtime.gateway.routebook import RouteBook
from trunkline_runtime.gateway.routes_reader import (
    RouteError,
    route_changes_from,
    routes_from,
    runway_from,
)
from trunkline_runtime.gateway.runway import Outlook

AGENTS = tuple(f"default/agent-{number}" for number in range(4))
EPOCH = 7


@dataclass(eq=False)
class Gateway:
    """One gateway at the end of a link: what it reads, and what its link was told."""

    told: int = 0
    foretold: int = 0
    book: RouteBook = field(default_factory=RouteBook)
    outlook: Outlook = field(default_factory=Outlook)


class BulletinMachine(RuleBasedStateMachine):
    """Routes and slots come and go, and gateways hear of it sooner or later, or dial anew."""

    gateways = Bundle("gateways")

    def __init__(self) -> None:
        super().__init__()
        self.routes, self.runway = RouteBulletin(EPOCH), RunwayBulletin()
        self.set: dict[str, float] = {}  # agent → answerSeconds of its route
        self.starting: dict[str, int] = {}  # agent → slots
        self.linked: list[Gateway] = []
        self.now = 0.0

    @rule(agent=st.sampled_from(AGENTS), seconds=st.sampled_from([1.0, 2.0, 3.0]))
    def route(self, agent: str, seconds: float) -> None:
        new = self.routes.put(agent, a_route(agent, answerSeconds=seconds))
        assert new == (self.set.get(agent) != seconds)
        self.set[agent] = seconds

    @rule(agent=st.sampled_from(AGENTS))
    def unroute(self, agent: str) -> None:
        assert self.routes.put(agent, None) == (agent in self.set)
        self.set.pop(agent, None)
        self.runway.forget(agent)
        self.starting.pop(agent, None)

    @rule(agent=st.sampled_from(AGENTS), slots=st.integers(0, 3))
    def starts(self, agent: str, slots: int) -> None:
        if agent in self.set:
            self.runway.put(agent, [(slots, 40.0)] if slots else [], self.now)
            self.starting[agent] = slots

    @rule(sharing=st.integers(1, 2))
    def publish(self, sharing: int) -> None:
        told = [gateway.told for gateway in self.linked if gateway.told]
        self.routes.told_to_all(min(told, default=self.routes.revision))
        self.routes.publish(sharing)
        self.runway.publish()
        self.sharing = sharing

    @rule(target=gateways)
    def dials(self) -> Gateway:
        self.linked.append(Gateway())
        return self.linked[-1]

    @rule(gateway=gateways)
    def dials_anew(self, gateway: Gateway) -> None:
        """It has what it had, and is told everything."""
        gateway.told = gateway.foretold = 0

    @rule(gateway=gateways)
    def hears(self, gateway: Gateway) -> None:
        if not self.routes.revision:
            return
        routed = self.routes.new_since(gateway.told)
        if whole := not gateway.told:
            gateway.book.take(routes_from(json.loads(self.routes.whole())), "operator")
            gateway.outlook.replace(runway_from(json.loads(self.runway.whole(self.now))), self.now)
        else:
            changes = route_changes_from(json.loads(self.routes.since(gateway.told)))
            gateway.book.change(changes)
            gateway.book.change(changes)  # as over a second link
            if text := self.runway.since(gateway.foretold, routed, self.now):
                gateway.outlook.update(runway_from(json.loads(text)), self.now)
        gateway.outlook.keep(gateway.book.by_agent().keys())
        gateway.told, gateway.foretold = self.routes.revision, self.runway.revision
        assert whole or gateway.book.now.revision == self.routes.revision

    @rule(gateway=gateways)
    def catches_up(self, gateway: Gateway) -> None:
        """After a last word it has exactly what there is."""
        self.publish(1)
        self.hears(gateway)
        told = {agent: it.answer_seconds for agent, it in gateway.book.by_agent().items()}
        assert told == self.set
        assert gateway.book.share == 1.0
        coming = {agent: sum(it.slots for it in gateway.outlook.of(agent).coming) for agent in told}
        assert coming == {agent: self.starting.get(agent, 0) for agent in told}

    @invariant()
    def the_document_is_what_was_set(self) -> None:
        routes = self.routes.document["routes"]
        assert {route["agent"]: route["answerSeconds"] for route in routes} == self.set

    @invariant()
    def no_more_is_kept_than_there_is_to_tell(self) -> None:
        everyone = all(gateway.told == self.routes.revision for gateway in self.linked)
        if everyone and not self.routes._news:
            self.routes.told_to_all(self.routes.revision)
            assert len(self.routes._changed_in) == len(self.set)


BulletinMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestBulletin = BulletinMachine.TestCase


def test_a_change_is_as_long_as_what_changed() -> None:
    routes = RouteBulletin(EPOCH)
    for number in range(1000):
        routes.put(f"default/agent-{number}", a_route(f"default/agent-{number}"))
    routes.publish(1)
    before = routes.revision
    routes.put("default/agent-7", a_route("default/agent-7", answerSeconds=1.0))
    routes.put("default/agent-8", None)
    assert routes.publish(1)
    assert len(routes.since(before)) < len(routes.whole()) / 500
    message = json.loads(routes.since(before))
    assert [route["agent"] for route in message["routes"]] == ["default/agent-7"]
    assert message["gone"] == ["default/agent-8"]


def test_another_share_is_told_though_no_route_has_changed() -> None:
    routes = RouteBulletin(EPOCH)
    assert routes.publish(1), "that there are no agents is told, too"
    assert not routes.publish(1)
    before = routes.revision
    assert routes.publish(2)
    message = json.loads(routes.since(before))
    assert (message["share"], message["routes"], message["gone"]) == (0.5, [], [])


def test_who_is_gone_is_named_until_the_slowest_gateway_was_told() -> None:
    routes = RouteBulletin(EPOCH)
    routes.put(AGENTS[0], a_route(AGENTS[0]))
    routes.publish(1)
    routes.put(AGENTS[0], None)
    routes.publish(1)
    for told, named in ((1, [AGENTS[0]]), (2, [])):
        routes.told_to_all(told)
        assert json.loads(routes.since(1))["gone"] == named
        routes.put(AGENTS[1], a_route(AGENTS[1], answerSeconds=float(told)))
        routes.publish(1)


def test_a_route_counts_as_told_from_its_revision_on() -> None:
    routes = RouteBulletin(EPOCH)
    routes.put(AGENTS[0], a_route(AGENTS[0]))
    assert routes.changed_in(AGENTS[0]) == 1
    routes.publish(1)
    routes.put(AGENTS[1], a_route(AGENTS[1]))
    assert (routes.changed_in(AGENTS[0]), routes.changed_in(AGENTS[1])) == (1, 2)


def test_a_pod_that_comes_a_moment_later_is_no_news() -> None:
    runway = RunwayBulletin()
    assert runway.put(AGENTS[0], [(4, 40.0)], 0.0)
    assert not runway.put(AGENTS[0], [(4, 39.0)], 1.5)
    assert runway.put(AGENTS[0], [(4, 40.0)], FORETOLD_SECONDS)
    runway.publish()
    assert runway.since(runway.revision, (), 3.0) == ""
    assert json.loads(runway.since(0, (), 3.0))["agents"] == {
        AGENTS[0]: [{"slots": 4, "seconds": 39.0}]
    }


@pytest.mark.parametrize(("epoch", "since"), [(EPOCH, 3), (EPOCH + 1, 2)])
def test_changes_of_routes_that_are_not_here_are_an_error_that_says_so(
    epoch: int, since: int
) -> None:
    book = RouteBook()
    book.take(routes_from(json.loads(_routes(EPOCH, 2))), "operator")
    changes = route_changes_from(_changes(epoch, since, since + 1))
    with pytest.raises(RouteError, match=f"begin at revision {since} of epoch {epoch}"):
        book.change(changes)
    assert book.now.revision == 2


def test_changes_of_an_old_epoch_and_those_that_are_known_are_passed_over() -> None:
    book = RouteBook()
    book.take(routes_from(json.loads(_routes(EPOCH, 5))), "operator")
    for epoch, since in ((EPOCH - 1, 5), (EPOCH, 4), (EPOCH, 3)):
        assert not book.change(route_changes_from(_changes(epoch, since, since + 1)))
    assert book.change(route_changes_from(_changes(EPOCH, 4, 6))), "a part of it is new"


def test_nothing_is_changed_that_came_from_the_file() -> None:
    """The file lags behind: its revision says nothing of what the link was told."""
    book = RouteBook()
    book.take(routes_from(json.loads(_routes(EPOCH, 2))), "file")
    with pytest.raises(RouteError):
        book.change(route_changes_from(_changes(EPOCH, 2, 3)))


def _routes(epoch: int, revision: int) -> str:
    routes = RouteBulletin(epoch)
    for number in range(revision):
        routes.put(AGENTS[0], a_route(AGENTS[0], answerSeconds=1.0 + number))
        routes.publish(1)
    return routes.whole()


def _changes(epoch: int, since: int, revision: int) -> dict[str, object]:
    return {
        "type": "routeChanges",
        "epoch": epoch,
        "since": since,
        "revision": revision,
        "routes": [a_route(AGENTS[1])],
        "gone": [],
    }
