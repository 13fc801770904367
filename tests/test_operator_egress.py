"""No combination of what an agent says lets a call go where it must not: all of them are tried.

What must hold is said here anew, in other words than the code's: as sets of places, not as rules in an order.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest
from worlds import BURST, INSTALLATION, an_agent

from trunkline_operator.agent.egress import Way, allowed_hook, permitted
from trunkline_operator.agent.policy import allowed_burst, here, ladder, pinned
from trunkline_operator.agent.spec import (
    Budget,
    Burst,
    CallPolicy,
    DataClass,
    Hook,
    Policy,
    Region,
    Snapshot,
    Transcripts,
    Upstream,
    VoiceAgent,
    WarmRegion,
)
from trunkline_operator.burst.deployments import described
from trunkline_operator.decisions.manifests import burst_hash
from trunkline_operator.decisions.routes import Keys, route

KEYS: Final = Keys(worker="w" * 32, ticket="t" * 32)
URLS: Final = {region.value: f"https://{region.value}.modal.example" for region in Region}
OUTSIDE, INSIDE = "https://policy.example/v1", "http://policy.ns.svc:8080/v1"

US, EU = Region.US_EAST, Region.EU_WEST
# Which of the regions below each list of residency names, written out.
NAMED: Final[dict[tuple[str, ...], frozenset[str]]] = {
    (): frozenset({"us-east", "us-west", "eu-west", "ap-south", "us-east-1", "eu-west-1", ""}),
    ("eu",): frozenset({"eu-west", "eu-west-1", ""}),
    ("us-east", "ap"): frozenset({"us-east", "us-east-1", "ap-south", ""}),
    ("eu-west-1",): frozenset({"eu-west-1", ""}),
    ("antarctica",): frozenset({""}),
}
"""An operator without a region, "", is left out by none: nobody could serve the agent else, and it says so."""

POLICIES: Final = tuple(
    Policy(data_class=data, baa_acknowledged=baa, residency=residency, transcripts=transcripts)
    for data, baa, residency, transcripts in itertools.product(
        DataClass, (False, True), NAMED, Transcripts
    )
)
BUDGETS: Final = (
    Budget(),
    Budget(per_hour=5.0, per_day=50.0),
    Budget(per_hour=0.0),
    Budget(per_day=0.0),
)
BURSTS: Final[tuple[Burst | None, ...]] = (
    None,
    *(
        Burst(credentials_secret="modal", regions=regions, snapshot=snapshot, budget=budget)
        for regions, snapshot, budget in itertools.product(
            ((US,), (EU, US), (Region.AP_SOUTH, Region.US_WEST)), Snapshot, BUDGETS
        )
    ),
)
WARM: Final[tuple[tuple[WarmRegion, ...], ...]] = (
    (),
    (WarmRegion(name="eu-west-1", min_pods=1, max_pods=2),),
)
PLAIN: Final = an_agent(engine={"type": "moshi", "model": "tiny"})


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may be, of one combination."""

    warm: bool
    regions: list[str]
    snapshots: frozenset[str]
    hook: bool


def must_be(agent: VoiceAgent, url: str) -> Allowed:
    """The rule, in sets."""
    policy, burst = agent.policy, agent.burst
    health = policy.data_class == "phi"
    named = NAMED[policy.residency]
    served = {each.name for each in agent.warm.regions} or {agent.region}
    regions = [each.value for each in burst.regions if each in named] if burst else []
    unpaid = burst is not None and 0.0 in {burst.budget.per_hour, burst.budget.per_day}
    if unpaid or (health and not policy.baa_acknowledged):
        regions = []
    quiet = policy.transcripts == "none"
    free = not health and policy.residency == ()
    return Allowed(
        warm=agent.region in named and agent.region in served,
        regions=regions,
        snapshots=frozenset({"none"} if health else {"none", "cpu", "gpu"}),
        hook=url != "" and not quiet and (free or url == INSIDE),
    )


def agents(policy: Policy, hook: str) -> Iterator[VoiceAgent]:
    engine = replace(PLAIN.engine, policy=CallPolicy(hook=Hook(url=hook)) if hook else None)
    for burst, regions, region in itertools.product(BURSTS, WARM, ("", "eu-west-1", "us-east-1")):
        warm = replace(PLAIN.warm, regions=regions)
        yield here(replace(PLAIN, engine=engine, policy=policy, burst=burst, warm=warm), region)


@pytest.mark.parametrize("hook", ["", INSIDE, OUTSIDE])
def test_no_combination_lets_a_call_out_where_it_must_not_go(hook: str) -> None:
    seen: dict[str, int] = {"warm": 0, "burst": 0, "none": 0, "hook": 0}
    for policy in POLICIES:
        for agent in agents(policy, hook):
            allowed, routed = must_be(agent, hook), route(agent, KEYS, URLS)
            rungs = [rung["kind"] for rung in routed["rungs"]]
            bursts = [rung["name"] for rung in routed["rungs"] if rung["kind"] == "burst"]
            assert rungs == ["warm"] * allowed.warm + ["burst"] * len(allowed.regions), agent
            assert bursts == allowed.regions, agent
            assert ("hook" in routed["settings"].get("policy", {})) is allowed.hook, agent
            found = ladder(agent).burst
            assert (found is not None) is bool(allowed.regions)
            assert (burst_hash(agent, INSTALLATION) != "") is bool(allowed.regions)
            if found is not None:
                assert found.snapshot.value in allowed.snapshots, agent
                assert [each.value for each in found.regions] == allowed.regions
            # Without a pod that may start there is no warm rung, and no pod without the rung.
            assert (agent.warm.max_pods > 0) is allowed.warm, agent
            for kind in ("warm", "burst"):
                seen[kind] += kind in rungs
            seen["none"] += not rungs
            seen["hook"] += allowed.hook
    # Nothing of it is true only because nothing was there.
    assert min(seen["warm"], seen["burst"], seen["none"]) > 100
    assert (seen["hook"] > 0) is bool(hook)


UPSTREAMS: Final = tuple(
    Upstream(url="wss://elsewhere.example", data_classes=classes, region=region)
    for classes, region in itertools.product(
        ((), (DataClass.STANDARD,), (DataClass.PHI,), tuple(DataClass)),
        ("", "eu-west-1", "us-east-1", "antarctica"),
    )
)


def test_no_combination_lets_a_call_upstream_where_it_must_not_go() -> None:
    went = 0
    for policy, upstream, burst in itertools.product(POLICIES, UPSTREAMS, BURSTS[:2]):
        agent = replace(PLAIN, policy=policy, upstream=upstream, burst=burst)
        known = upstream.region in NAMED[policy.residency] - {""}
        if upstream.region == "antarctica":
            known = "antarctica" in policy.residency
        fine = policy.data_class in upstream.data_classes and (policy.residency == () or known)
        rungs = [rung["kind"] for rung in route(agent, KEYS, URLS)["rungs"]]
        assert ("upstream" in rungs) is fine, agent
        went += fine
    assert went > 10


def test_containers_of_an_agent_with_residency_are_bound_to_its_places() -> None:
    for policy, burst in itertools.product(POLICIES, BURSTS):
        agent = replace(PLAIN, policy=policy, burst=burst)
        if (found := allowed_burst(agent)) is None:
            continue
        app = described(agent, found, "app", KEYS)
        assert set(app.pinned) == (set(app.regions) if policy.residency else set())
        assert set(app.pinned.values()) <= set(policy.residency)
        for region, place in app.pinned.items():
            assert region == place or region.startswith(f"{place}-")
        assert app.snapshot == "none" or policy.data_class is DataClass.STANDARD


def test_another_place_for_containers_redeploys() -> None:
    free, bound = an_agent(**BURST), an_agent(**BURST, policy__residency=["us"])
    assert burst_hash(free, INSTALLATION) != burst_hash(bound, INSTALLATION)
    assert pinned("us-east", ("eu", "us")) == "us"
    assert pinned("us-east", ()) == ""


def test_an_agent_that_goes_has_no_way_left() -> None:
    for policy in POLICIES:
        agent = replace(PLAIN, policy=policy, burst=BURSTS[1], deleted_at=1.0)
        assert route(agent, KEYS, URLS)["rungs"] == []


TELLING: Final = ("hook", "llm", "tools", "webhooks")


@pytest.mark.parametrize("way", Way)
def test_what_is_said_goes_no_other_way(way: Way) -> None:
    for policy, inside in itertools.product(POLICIES, (False, True)):
        tells = way.value in TELLING
        quiet = way.value == "hook" and policy.transcripts == "none"
        free = policy.data_class == "standard" and policy.residency == ()
        wanted = not quiet and (inside or free or not tells)
        assert permitted(policy, way, in_cluster=inside) is wanted


def test_a_hook_outside_is_told_nothing_of_phi() -> None:
    engine: dict[str, Any] = {
        "type": "moshi",
        "model": "tiny",
        "policy": {"hook": {"url": OUTSIDE}},
    }
    agent = an_agent(engine=engine)
    assert allowed_hook(agent) is not None
    assert allowed_hook(replace(agent, policy=Policy(data_class=DataClass.PHI))) is None
    assert allowed_hook(an_agent()) is None
