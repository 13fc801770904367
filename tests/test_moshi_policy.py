"""Rules of an agent's settings, several policies at once, and what a hook is sent and may answer."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import an_agent

from trunkline_operator.decisions.routes import Keys, route
from trunkline_runtime.contract import GuardRule, PolicySettings, ReplyRule, Settings
from trunkline_runtime.engine.moshi.policy import (
    MAX_SEARCHED,
    Action,
    Ban,
    Hangup,
    Mute,
    NoPolicy,
    Note,
    Policy,
    ResetTranscript,
    Rules,
    Say,
    Several,
    Unmute,
)
from trunkline_runtime.engine.moshi.policy_hook import (
    FAILED,
    LATE,
    MAX_BANS,
    MAX_WAITING,
    Failure,
    Hook,
    HookError,
    Standing,
    Waiting,
    actions_of,
    request_body,
)
from trunkline_runtime.engine.moshi.policy_settings import (
    MAX_PROGRAM,
    pattern_of,
    program_size,
    rules_of,
)
from trunkline_runtime.engine.moshi.transcript import Word

WORD = Word("now", 0.0, 0.1)


def policy(
    bannedWords: Sequence[str] = (),
    bargeIn: bool = False,
    guards: Sequence[GuardRule] = (),
) -> Policy:
    return rules_of(
        Settings(
            policy=PolicySettings(
                bannedWords=list(bannedWords), bargeIn=bargeIn, guards=list(guards)
            )
        )
    )


def heard(subject: Policy, turn: str, *, agent_speaks: bool = False) -> list[Action]:
    return list(subject.on_word(WORD, turn, agent_speaks=agent_speaks))


# --- rules of the settings -----------------------------------------------------------------------------------


def test_banned_words_and_barge_in_come_from_the_settings() -> None:
    subject = policy(bannedWords=["darn", "heck"], bargeIn=True)
    assert subject.on_start() == (Ban("darn"), Ban("heck"))
    assert heard(subject, "wait", agent_speaks=True) == [Mute()]
    assert subject.on_pause("wait") == [Unmute()]
    assert type(policy()) is NoPolicy
    assert type(policy(guards=[])) is NoPolicy


def test_each_guard_does_its_own() -> None:
    subject = policy(
        guards=[
            GuardRule(match="GOOD ?BYE", do="hangUp", say=""),
            GuardRule(
                match="my name is (?P<name>\\w+)", do="say", say="Hello {name}, {1}. {heard}"
            ),
        ]
    )
    (hangup,) = heard(subject, "well goodbye")
    assert isinstance(hangup, Hangup)
    assert heard(subject, "well goodbye my name is Bo") == [
        Say("Hello Bo, Bo. well goodbye my name is Bo")
    ]


def test_a_guards_silence_lasts_until_a_turn_has_ended_without_it() -> None:
    subject = policy(guards=[GuardRule(match="card number", do="mute", say="")])
    assert heard(subject, "my card number") == [Mute()]
    assert subject.on_pause("my card number") == []
    assert heard(subject, "is card number five") == [Mute()], "once a turn, and this is another"
    assert subject.on_pause("is card number five") == []
    assert heard(subject, "thanks") == []
    assert subject.on_pause("thanks") == [Unmute()]
    assert subject.on_pause("bye") == []


def test_barge_in_does_not_end_a_guards_silence() -> None:
    subject = policy(bargeIn=True, guards=[GuardRule(match="card", do="mute", say="")])
    assert heard(subject, "card", agent_speaks=True) == [Mute(), Mute()]
    assert subject.on_pause("card") == []
    assert subject.on_pause("fine") == [Unmute()]


def test_places_of_a_reply_are_filled_and_unknown_ones_stand() -> None:
    rule = ReplyRule(match="(red)?(blue)", say="{2} {1}{3} of {heard}")
    subject = rules_of(Settings(replies=[rule]))
    assert subject.on_pause("blue") == [Say("blue {3} of blue")]


def test_only_the_end_of_a_turn_is_searched() -> None:
    subject = policy(guards=[GuardRule(match="stop", do="mute", say="")])
    assert heard(subject, "stop" + "x" * MAX_SEARCHED) == []
    assert heard(subject, "x" * MAX_SEARCHED + "stop") == [Mute()]


def test_the_example_of_the_docs_is_a_policy() -> None:
    text = (Path(__file__).parent.parent / "docs/engines.md").read_text()
    found = re.search(r"```yaml\n(engine:.*?)```", text, re.DOTALL)
    assert found is not None
    agent = an_agent(engine=yaml.safe_load(found[1])["engine"])
    subject = rules_of(route(agent, Keys(worker="w", ticket="t"), {})["settings"])
    assert heard(subject, "hi my name is Bo", agent_speaks=True) == [Mute(), Say("Hello Bo.")]


# --- patterns ------------------------------------------------------------------------------------------------


def test_what_takes_pythons_matcher_for_ever_takes_milliseconds() -> None:
    patterns = (r"(a+)+b", r"(a|aa)+$b", r".*a.*a.*a.*a.*a.*b")
    subject = policy(guards=[GuardRule(match=p, do="mute", say="") for p in patterns])
    began = time.thread_time()
    assert heard(subject, "a" * MAX_SEARCHED) == []
    assert time.thread_time() - began < 0.08, "a frame"


@pytest.mark.parametrize(
    ("match", "why"),
    [
        ("(", "missing"),
        ("(?=a)b", r"invalid perl operator.*without lookaround"),
        (r"(a)\1", "invalid escape sequence"),
        ("a{1001}", "invalid repetition size"),
        (r"\PN{99}" * 9, "pattern too large"),
        (r"\PN{9}", f"steps for each letter heard, and {MAX_PROGRAM} are allowed"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused_with_a_sentence(match: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"policy.guards\[1\].match cannot be used: .*{why}"):
        policy(
            guards=[
                GuardRule(match="fine", do="mute", say=""),
                GuardRule(match=match, do="mute", say=""),
            ]
        )


def test_many_patterns_that_are_costly_together_are_refused() -> None:
    size = program_size(pattern_of("(?:a?b?c?d?){100}", ""))
    assert size <= MAX_PROGRAM
    rules = [ReplyRule(match=f"(?:a?b?c?d?){{100}}{n}", say="") for n in range(64)]
    with pytest.raises(ValueError, match="use fewer or simpler ones"):
        rules_of(Settings(replies=rules))


# --- several -------------------------------------------------------------------------------------------------


def test_an_agent_is_muted_while_any_policy_wants_it() -> None:
    guards = [GuardRule(match="card", do="mute", say="")]
    one, two = policy(guards=guards, bargeIn=True), policy(bargeIn=True)
    subject = Several((one, two))
    assert heard(subject, "card", agent_speaks=True) == [Mute(), Mute(), Mute()]
    assert subject.on_pause("card") == [], "the first policy still wants it"
    assert subject.on_pause("else") == [Unmute(), Unmute()]
    assert subject.on_start() == []
    assert list(subject.answers()) == list(subject.on_partial("a")) == []


# --- a hook --------------------------------------------------------------------------------------------------


def test_a_request_holds_the_call_and_what_happened() -> None:
    body = request_body("c1", [{"type": "pause", "text": "é"}], agent_speaks=True)
    assert json.loads(body) == {
        "call": "c1",
        "agentSpeaks": True,
        "events": [{"type": "pause", "text": "é"}],
    }


def test_every_action_can_be_wanted() -> None:
    wanted: list[Any] = [
        {"type": "say", "text": "Hello."},
        {"type": "ban", "word": "darn"},
        *({"type": name} for name in ("mute", "unmute", "hangUp", "resetTranscript")),
    ]
    assert actions_of(json.dumps({"actions": wanted}).encode()) == [
        Say("Hello."),
        Ban("darn"),
        Mute(),
        Unmute(),
        Hangup("the agent's policy"),
        ResetTranscript(),
    ]
    for nothing in (b"", b" \n", b"{}", b'{"actions": []}'):
        assert actions_of(nothing) == []


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"[", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "not {"),
        (b'{"actions": {}}', "not {"),
        (b'{"actions": ["mute"]}', "not an object"),
        (b'{"actions": [{"type": "mute"}, {"type": "transfer"}]}', "type that is not known"),
        (b'{"actions": [{"type": "say"}]}', "text of an action"),
        (json.dumps({"actions": [{"type": "say", "text": "a" * 1025}]}).encode(), "1 to 1024"),
        (json.dumps({"actions": [{"type": "ban", "word": "a" * 65}]}).encode(), "1 to 64"),
        (json.dumps({"actions": [{"type": "mute"}] * 33}).encode(), "33 actions"),
    ],
)
def test_an_answer_that_makes_no_sense_is_none(answer: bytes, why: str) -> None:
    with pytest.raises(HookError, match=why):
        actions_of(answer)


def test_only_the_newest_partial_word_waits_and_no_more_than_fit() -> None:
    waiting = Waiting()
    for text in ("he", "hel", "hello"):
        assert waiting.add({"type": "partial", "text": text})
    assert waiting.add({"type": "word", "text": "hello"})
    assert waiting.add({"type": "partial", "text": "y"})
    assert [event["text"] for event in waiting.take()] == ["hello", "y"]
    kept = [waiting.add({"type": "word", "text": str(n)}) for n in range(MAX_WAITING + 2)]
    assert kept == [True] * MAX_WAITING + [False] * 2
    assert [event["text"] for event in waiting.take()] == [
        str(n) for n in range(2, MAX_WAITING + 2)
    ]
    assert waiting.take() == []


def test_closed_mutes_from_the_first_failure_until_an_answer() -> None:
    subject = Standing(closed=True)
    assert subject.failed(Failure.LATE) == [Note(LATE), Mute()]
    assert subject.failed(Failure.REFUSED) == [Note(FAILED)]
    assert subject.answered([Say("back")]) == [Unmute(), Say("back")]
    assert subject.answered([Mute()]) == [Mute()]
    assert subject.failed(Failure.LATE) == [Note(LATE), Mute()]
    assert subject.answered([]) == [], "it was the hook that muted, before it failed"
    assert subject.answered([Unmute()]) == [Unmute()]


def test_open_leaves_no_silence_behind_that_nobody_could_end() -> None:
    subject = Standing(closed=False)
    assert subject.answered([Mute()]) == [Mute()]
    assert subject.failed(Failure.UNREACHABLE) == [Note(FAILED), Unmute()]
    assert subject.failed(Failure.UNREACHABLE) == [Note(FAILED)]
    assert subject.answered([]) == []


@settings(deadline=None)
@given(
    closed=st.booleans(),
    steps=st.lists(
        st.sampled_from(Failure)
        | st.lists(st.sampled_from((Mute(), Unmute(), Say("a"))), max_size=3),
        max_size=20,
    ),
)
def test_whatever_happens_the_silence_is_what_it_should_be(
    closed: bool, steps: list[Failure | list[Action]]
) -> None:
    subject, muted, wanted = Standing(closed=closed), False, False
    for step in steps:
        failed = isinstance(step, Failure)
        for action in subject.failed(step) if isinstance(step, Failure) else subject.answered(step):
            muted = isinstance(action, Mute) if isinstance(action, Mute | Unmute) else muted
        for action in () if isinstance(step, Failure) else step:
            wanted = isinstance(action, Mute) if isinstance(action, Mute | Unmute) else wanted
        wanted = wanted and not (failed and not closed)
        assert muted == (wanted or (failed and closed))


def test_a_hook_bans_only_so_many_words() -> None:
    subject = Standing(closed=False)
    made = [subject.answered([Ban(str(n))]) for n in range(MAX_BANS + 1)]
    assert made[-2:] == [[Ban(str(MAX_BANS - 1))], []]


def test_a_hooks_token_is_not_shown() -> None:
    hook = Hook(url="https://a.example/", token="secret")
    assert "secret" not in repr(hook)
    assert hook.headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in Hook(url="https://a.example/").headers


def test_rules_with_nothing_to_do_are_no_policy() -> None:
    assert rules_of(Settings(greeting="Hi")) == Rules(greeting="Hi")
