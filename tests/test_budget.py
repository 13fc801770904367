"""The budget of burst: gateways' purses and the operator's account, held to it together by a model of Modal.

The model is the worst that Modal may be: each session gets a container of its own where one may be started, and a
container lives to the end of its last session and its scaledown window.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline_operator.scaling import spend
from trunkline_operator.scaling.spend import Account, Budget, Said, Terms
from trunkline_runtime.gateway.accounts import budget
from trunkline_runtime.gateway.accounts.budget import Hold, Purses, Wish

AGENT = "default/a"
BEGIN = 1_800_000_000.0 - 1_800_000_000.0 % 86_400 + 84_600.0  # half an hour before midnight
COUNT_SECONDS = 10.0  # between counts of containers
SAVE_SECONDS = 15.0  # between writes of the status
TERMS = Terms(
    container_second=0.0005,
    slots=4,
    call_seconds=600.0,
    linger_seconds=60.0,
    most=6,
    budget=Budget(per_hour=2.0, per_day=3.0),
    rates={"near": 0.0005, "far": 0.0003},
)


def wish(terms: Terms, tenant: str = "t", **more: float) -> Wish:
    return Wish(
        agent=AGENT,
        tenant=tenant,
        rate=terms.call_second,
        worst_seconds=terms.call_seconds,
        budget=budget.Budget(per_hour=terms.budget.per_hour, per_day=terms.budget.per_day),
        **more,
    )


# --- a gateway's purse -------------------------------------------------------------------------------------


def test_a_call_is_let_in_while_its_worst_case_fits_and_gives_back_the_rest() -> None:
    purses, worst = Purses(), TERMS.call_worst
    assert purses.reserve(wish(TERMS), 0.0) == budget.UNDEALT
    purses.allow(AGENT, 2.5 * worst)
    one, two = (purses.reserve(wish(TERMS), 0.0) for _ in range(2))
    assert isinstance(one, Hold)
    assert isinstance(two, Hold)
    assert purses.reserve(wish(TERMS), 0.0) == budget.USED_UP
    purses.began(one, 10.0)
    assert purses.end(one, 70.0) == pytest.approx(60 * TERMS.call_second)
    assert purses.end(one, 99.0) == 0.0  # once
    assert purses.end(two, 70.0) == 0.0  # its session never began
    assert purses.spending(AGENT, 70.0).reserved == 0.0
    # 2.5 − 0.1 = 2.4 calls' worst cases are left.
    again = [purses.reserve(wish(TERMS), 70.0) for _ in range(3)]
    assert [isinstance(each, Hold) for each in again] == [True, True, False]


def test_without_a_budget_nothing_is_refused_and_everything_is_reckoned() -> None:
    purses, free = Purses(), replace(TERMS, budget=Budget())
    hold = purses.reserve(wish(free), 0.0)
    assert isinstance(hold, Hold)
    purses.began(hold, 0.0)
    said = purses.spending(AGENT, 100.0)
    assert said.spent == pytest.approx(100 * TERMS.call_second)
    assert said.spent + said.reserved == pytest.approx(TERMS.call_worst)
    assert said.starts == 1


def test_a_tenant_has_its_share_of_the_hour_and_none_where_it_has_none() -> None:
    purses, unit = Purses(), TERMS.call_worst
    purses.allow(AGENT, 100.0)
    most = int(0.5 * (TERMS.budget.per_hour or 0) / unit)
    asked = [purses.reserve(wish(TERMS, "loud", tenant_share=0.5), 0.0) for _ in range(most + 1)]
    held = [each for each in asked if isinstance(each, Hold)]
    assert len(held) == most
    assert asked[-1] == budget.TENANT
    assert isinstance(purses.reserve(wish(TERMS, "quiet", tenant_share=0.5), 0.0), Hold)
    assert purses.reserve(wish(TERMS, "out", tenant_share=0.0), 0.0) == budget.KEPT_OFF
    for each in held:
        purses.began(each, 0.0)
        purses.end(each, 3000.0)  # five times its worst: what is spent counts
    assert purses.reserve(wish(TERMS, "loud", tenant_share=0.5), 3000.0) == budget.TENANT
    # Another hour, and the day (1.5 × the hour) is used up as well.
    assert purses.reserve(wish(TERMS, "loud", tenant_share=0.5), 3700.0) == budget.TENANT
    assert isinstance(purses.reserve(wish(TERMS, "loud", tenant_share=0.5), 90_000.0), Hold)


def test_a_gateway_that_leaves_gives_back_what_it_does_not_use() -> None:
    purses = Purses()
    purses.allow(AGENT, 5.0)
    assert isinstance(purses.reserve(wish(TERMS), 0.0), Hold)
    purses.give_back(0.0)
    assert purses.spending(AGENT, 0.0).ceiling == pytest.approx(TERMS.call_worst)


# --- the operator's account --------------------------------------------------------------------------------


def test_a_charge_that_spans_the_hour_is_split() -> None:
    before = Account(at=BEGIN - 10, hour=1.0, day=2.0)
    after = spend.counted(before, TERMS, 4, BEGIN - 10 + 20)
    dollars = 4 * 20 * TERMS.container_second
    assert after.hour == pytest.approx(1.0 + dollars)
    assert after.day == pytest.approx(2.0 + dollars)
    hour_end = BEGIN - BEGIN % 3600 + 3600
    late = spend.counted(Account(at=hour_end - 15, hour=1.0, day=2.0), TERMS, 4, hour_end + 5)
    assert late.hour == pytest.approx(dollars / 4)
    assert late.paid == pytest.approx(dollars)


def test_containers_are_charged_by_their_region() -> None:
    there = {"near": 1, "far": 3}
    share = TERMS.share(there)
    assert share == pytest.approx((0.0005 + 3 * 0.0003) / (4 * 0.0005))
    account = spend.counted(Account(at=BEGIN), TERMS, 4, BEGIN + 10, share)
    assert account.hour == pytest.approx(10 * (0.0005 + 3 * 0.0003))
    # What is told meanwhile and what is spent a second are of the same containers.
    assert spend.upto(account, TERMS, 16, BEGIN + 20).hour == pytest.approx(2 * account.hour)
    assert spend.rate(account, TERMS, 16) == pytest.approx(0.0014)
    # What may come is reckoned with the dearest, and so is a region that nobody knows.
    assert spend.bound(account, TERMS) == pytest.approx(4 * 0.0005 * (TERMS.after))
    assert TERMS.share({"elsewhere": 2}) == TERMS.share({}) == 1.0


def test_a_budget_that_cannot_be_reached_limits_nobody() -> None:
    rich = replace(TERMS, budget=Budget(per_hour=2 * 6 * 3600 * 0.0005))
    account = Account(at=BEGIN)
    assert spend.room(account, rich, BEGIN) == inf
    _, ceilings = spend.dealt(account, rich, {"g": 1.0}, BEGIN)
    assert ceilings == {"g": spend.UNLIMITED}


def test_credit_moves_to_another_gateway_only_once_it_was_given_up() -> None:
    account, first = spend.dealt(Account(at=BEGIN), TERMS, {"a": 1.0}, BEGIN)
    whole = first["a"]
    account, second = spend.dealt(account, TERMS, {"a": 1.0, "b": 1.0}, BEGIN)
    assert whole + second["b"] <= spend.room(account, TERMS, BEGIN) + 1e-6
    assert second["b"] < TERMS.call_worst
    assert second["a"] < whole
    account = spend.heard(
        account, {"a": Said(spent=0, ceiling=second["a"]), "b": Said(spent=0, ceiling=0.0)}, BEGIN
    )
    account, third = spend.dealt(account, TERMS, {"a": 1.0, "b": 1.0}, BEGIN)
    assert third["b"] > TERMS.call_worst
    assert third["a"] + third["b"] <= spend.room(account, TERMS, BEGIN) + 1e-6


def said(**ceilings: float | None) -> dict[str, Said]:
    """Gateways that act on these ceilings, and have spent and reserved nothing."""
    return {boot: Said(ceiling=ceiling) for boot, ceiling in ceilings.items()}


def test_a_gateway_that_is_silent_keeps_its_credit_for_as_long_as_it_may_use_it() -> None:
    """It may live, cut off from the operator, and let calls in up to its ceiling all the while."""
    both = {"a": 1.0, "b": 1.0}
    account, ceilings = spend.dealt(Account(at=BEGIN), TERMS, both, BEGIN)
    assert min(ceilings.values()) > 0
    account = spend.heard(account, said(**ceilings), BEGIN)
    silent, held = BEGIN, ceilings["b"]
    # The hour turns meanwhile, and with it comes room; what the silent one holds is never in it.
    for now in (BEGIN + 1, BEGIN + 60, BEGIN + 1800, silent + spend.SILENT_SECONDS - 1):
        account = spend.counted(account, TERMS, 0, now)
        account = spend.heard(account, said(a=ceilings["a"]), now)
        account, ceilings = spend.dealt(account, TERMS, {"a": 1.0}, now)
        assert account.gateways["b"].credit == held
        assert ceilings["a"] + held <= spend.room(account, TERMS, now) + 1e-6
    now = silent + spend.SILENT_SECONDS
    account = spend.heard(account, said(a=ceilings["a"]), now)
    account, after = spend.dealt(account, TERMS, {"a": 1.0}, now)
    assert "b" not in account.gateways
    assert after["a"] >= ceilings["a"] + held - TERMS.call_worst  # whole calls


def test_a_lower_ceiling_counts_once_the_gateway_acts_on_it_and_a_higher_one_at_once() -> None:
    """What is on its way may be lost with the link, and may arrive: the worse of both is reckoned with."""
    account, first = spend.dealt(Account(at=BEGIN), TERMS, {"a": 1.0}, BEGIN)
    account = spend.heard(account, said(**first), BEGIN)
    both = {"a": 1.0, "b": 1.0}
    account, lower = spend.dealt(account, TERMS, both, BEGIN)
    assert lower["a"] < first["a"]
    # It is not there yet, then the link is cut: whoever is silent acts on what it had.
    unheeded = spend.heard(account, said(a=first["a"], b=lower["b"]), BEGIN + 1)
    for known in (account, unheeded):
        cut = spend.heard(known, said(b=lower["b"]), BEGIN + 2)
        assert cut.gateways["a"].credit == first["a"]
        cut, dealt = spend.dealt(cut, TERMS, {"b": 1.0}, BEGIN + 2)
        assert first["a"] + dealt["b"] <= spend.room(cut, TERMS, BEGIN + 2) + 1e-6
    # It is there.
    heeded = spend.heard(unheeded, said(**lower), BEGIN + 3)
    assert heeded.gateways["a"].credit == lower["a"]
    # What is given to the other counts before it has said so, also when it says the ceiling of before.
    raised, higher = spend.dealt(heeded, TERMS, both, BEGIN + 3)
    assert higher["b"] > lower["b"]
    raised = spend.heard(raised, said(a=lower["a"], b=lower["b"]), BEGIN + 4)
    assert raised.gateways["b"].credit == higher["b"]


def test_a_budget_that_was_used_up_opens_again_with_the_hour_however_small_it_is() -> None:
    small = replace(TERMS, budget=Budget(per_hour=TERMS.container_worst))
    assert not spend.too_small(small)
    full = Account(at=BEGIN, hour=TERMS.container_worst)
    assert spend.shut(full, small, BEGIN, before=False)
    assert spend.shut(full, small, BEGIN, before=True)
    later = spend.counted(full, small, 0, BEGIN + 3600)
    assert not spend.shut(later, small, BEGIN + 3600, before=True)


def test_it_says_what_a_budget_is_too_small_for() -> None:
    assert spend.too_small(TERMS) == ""
    poor = replace(TERMS, budget=Budget(per_hour=0.10))
    assert spend.too_small(poor) == (
        "one call may cost a container for 690 s at $1.80 an hour = $0.35, and budget.perHour is $0.10"
    )
    standing = replace(TERMS, least=2)
    assert "2 minContainers cost $3.60 an hour, and budget.perHour is $2.00" in spend.too_small(
        standing
    )


# --- both, and a model of Modal ----------------------------------------------------------------------------


@dataclass(eq=False)
class Container:
    region: str
    calls: int = 0
    idle_since: float = 0.0


@dataclass(eq=False)
class Session:
    gateway: "OneGateway"
    hold: Hold
    container: Container
    ends: float


@dataclass(eq=False)
class OneGateway:
    boot: str
    purses: Purses = field(default_factory=Purses)
    sessions: list[Session] = field(default_factory=list)
    linked: bool = True
    coming: float | None = None  # a ceiling on its way to it

    def receive(self) -> None:
        if self.linked and self.coming is not None:
            self.purses.allow(AGENT, self.coming)
        self.coming = None


class World:
    """Gateways, an operator and Modal; `paid` is what Modal asks, by window."""

    def __init__(self, terms: Terms) -> None:
        self.terms, self.now = terms, BEGIN
        self.containers: list[Container] = []
        self.boots = 0
        self.gateways = [self.gateway(), self.gateway()]
        self.account = Account(at=BEGIN)
        self.saved, self.saved_at = self.account, BEGIN
        self.counted_at = BEGIN
        self.up = True  # the operator
        self.paid: dict[tuple[str, int], float] = {}
        self.let_in = self.refused = 0
        self.orphans: list[Session] = []

    def gateway(self) -> OneGateway:
        self.boots += 1
        return OneGateway(f"boot{self.boots}")

    # --- what happens ---

    def start(self, which: int, seconds: float, alone: bool) -> None:
        gateway = self.gateways[which % len(self.gateways)]
        region = "near" if which % 2 else "far"
        rate = self.terms.rates[region] / self.terms.slots
        hold = gateway.purses.reserve(replace(wish(self.terms), rate=rate), self.now)
        if not isinstance(hold, Hold):
            self.refused += 1
            return
        here = [each for each in self.containers if each.region == region]
        free = [each for each in here if each.calls < self.terms.slots]
        if len(here) < self.terms.most / 2 and (alone or not free):
            free = [Container(region)]
            self.containers += free
        if not free:
            gateway.purses.end(hold, self.now)
            return
        self.let_in += 1
        free[0].calls += 1
        gateway.purses.began(hold, self.now)
        ends = self.now + min(seconds, self.terms.call_seconds)
        gateway.sessions.append(Session(gateway, hold, free[0], ends))

    def rush(self, which: int, seconds: float) -> None:
        for more in range(12):
            self.start(which + more, seconds, True)

    def kill(self, which: int) -> None:
        """Its calls die with it; Modal ends their sessions when they are idle for 30 s."""
        at = which % len(self.gateways)
        old = self.gateways[at]
        for session in old.sessions:
            session.ends = min(session.ends, self.now + 30.0)
        self.orphans += old.sessions
        self.gateways[at] = self.gateway()
        if self.up:  # the same address answers with another boot
            self.account = spend.buried(self.account, old.boot)

    def cut(self, which: int) -> None:
        """Its link to the operator ends, or is there again; what was on its way is lost."""
        gateway = self.gateways[which % len(self.gateways)]
        gateway.linked, gateway.coming = not gateway.linked, None

    def restart_operator(self) -> None:
        self.up = not self.up
        if self.up:
            self.account = self.saved
            self.hear()
            self.account = spend.estimated(self.account, self.terms, self.now)

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            step = min(1.0 if seconds < 20 else 5.0, until - self.now)
            self.pay(step)
            self.now += step
            self.end_what_is_over()
            if self.up:
                self.tick()

    # --- inside ---

    def pay(self, seconds: float) -> None:
        dollars = sum(self.terms.rates[each.region] for each in self.containers) * seconds
        for name, length in ("hour", 3600), ("day", 86_400):
            key = name, int(self.now // length)
            self.paid[key] = self.paid.get(key, 0.0) + dollars

    def end_what_is_over(self) -> None:
        for sessions in (*(each.sessions for each in self.gateways), self.orphans):
            for session in [each for each in sessions if each.ends <= self.now]:
                sessions.remove(session)
                session.gateway.purses.end(session.hold, self.now)
                session.container.calls -= 1
                session.container.idle_since = self.now
        window = self.terms.linger_seconds
        self.containers = [
            each for each in self.containers if each.calls or self.now - each.idle_since < window
        ]

    def hear(self) -> None:
        said = {}
        for gateway in self.gateways:
            if gateway.linked:
                it = gateway.purses.spending(AGENT, self.now)
                said[gateway.boot] = Said(
                    spent=it.spent, reserved=it.reserved, ceiling=it.ceiling, starts=it.starts
                )
        self.account = spend.heard(self.account, said, self.now)

    def tick(self) -> None:
        self.hear()
        if self.now - self.counted_at >= COUNT_SECONDS:
            self.counted_at = self.now
            there = dict(Counter(each.region for each in self.containers))
            whole, share = sum(there.values()), self.terms.share(there)
            self.account = spend.counted(self.account, self.terms, whole, self.now, share)
        here = {gateway.boot: 1.0 for gateway in self.gateways if gateway.linked}
        self.account, ceilings = spend.dealt(self.account, self.terms, here, self.now)
        for gateway in self.gateways:
            gateway.receive()
            gateway.coming = ceilings.get(gateway.boot)
        if self.now - self.saved_at >= SAVE_SECONDS:
            self.saved, self.saved_at = self.account, self.now

    def overshoot(self) -> float:
        """What is stated: containers that no count has seen yet, for as long as that takes."""
        return self.terms.most * self.terms.container_second * COUNT_SECONDS

    def check(self) -> None:
        limits = {"hour": self.terms.budget.per_hour, "day": self.terms.budget.per_day}
        for (name, _), paid in self.paid.items():
            limit = limits[name]
            assert limit is None or paid <= limit + self.overshoot(), (name, paid)


OPS: dict[str, Callable[[World, int, float], None]] = {
    "start": lambda world, which, part: world.start(which, 600 * part, part > 0.5),
    "starts": lambda world, which, part: world.rush(which, 600 * part),
    "second": lambda world, which, part: world.pass_time(1 + 10 * part),
    "minutes": lambda world, which, part: world.pass_time(600 * part),
    "kill": lambda world, which, part: world.kill(which),
    "cut": lambda world, which, part: world.cut(which),
    "operator": lambda world, which, part: world.restart_operator(),
}
STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 3), st.floats(0, 1)), max_size=40
)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.sampled_from([(2.0, 3.0), (1.0, None), (None, 1.5), (0.7, 0.8)]))
def test_no_interleaving_spends_more_than_the_budget_and_what_is_stated(
    steps: list[tuple[str, int, float]], limits: tuple[float | None, float | None]
) -> None:
    world = World(replace(TERMS, budget=Budget(per_hour=limits[0], per_day=limits[1])))
    world.pass_time(3)
    for name, which, part in steps:
        OPS[name](world, which, part)
        world.check()
    world.pass_time(1500)
    world.check()


def test_calls_let_in_at_the_end_of_an_hour_leave_the_next_its_budget() -> None:
    world = World(replace(TERMS, budget=Budget(per_hour=1.0)))
    world.pass_time(1780)
    for which in range(60):
        world.start(which, 600, True)
        world.pass_time(0.3)
    assert world.let_in
    world.pass_time(1500)
    world.check()


def test_a_busy_day_uses_most_of_the_budget_and_no_more() -> None:
    """It is no use to hold a budget by letting nobody in."""
    world = World(replace(TERMS, budget=Budget(per_hour=2.0)))
    while world.now < BEGIN + 4 * 3600:
        world.start(world.let_in, 120.0, False)
        world.pass_time(5)
    world.check()
    hours = [paid for (name, _), paid in world.paid.items() if name == "hour"]
    assert world.refused
    assert min(hours[1:-1]) > 0.7 * 2.0, hours
