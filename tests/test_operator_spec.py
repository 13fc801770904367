"""From the API's object to frozen values, and the sentence when that cannot be. Defaults: test_crd.py."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from worlds import BURST, an_agent, an_object

from trunkline_operator.agent.parsing import parsed
from trunkline_operator.agent.spec import (
    Autoscaling,
    Budget,
    CallPolicy,
    EngineType,
    Guard,
    GuardAction,
    Hook,
    OnFailure,
    Policy,
    Protocol,
    Reply,
    Snapshot,
    SpecError,
    Transcripts,
    epoch,
)


def test_every_group_is_read() -> None:
    agent = an_agent(
        engine={
            "type": "speech",
            "greeting": "Hello.",
            "replies": [{"match": r"(\d)", "say": "{1}!"}],
            "fallback": "What?",
        },
        warm={
            "image": "mine:2",
            "slotsPerPod": 8,
            "minPods": 2,
            "maxPods": 6,
            "bufferSlots": 3,
            "gpu": {"resource": "amd.com/gpu", "count": 2},
            "resources": {"requests": {"cpu": 2}},
            "autoscaling": "external",
            "replicas": 4,
            "scaleDown": {"delaySeconds": 9},
        },
        burst={
            "modal": {
                "credentialsSecretRef": {"name": "modal"},
                "gpu": ["L4", "A10"],
                "regions": ["eu-west", "us-east"],
                "snapshot": "gpu",
                "budget": {"perHour": 20, "perDay": 100.5},
            }
        },
        session={
            "maxSeconds": 600,
            "idleSeconds": 30,
            "answerSeconds": 9,
            "protocols": ["moshi"],
        },
        policy={
            "residency": ["eu", "us-east-1"],
            "baa": {"acknowledged": True},
            "transcripts": "none",
        },
        access={"apiKeysSecretRef": {"name": "callers"}, "origins": ["https://a.example"]},
        slo={"admissionMs": 250, "firstAudioMs": 700},
    )
    assert agent.key == "ns/desk"
    assert (agent.engine.type, agent.engine.greeting) == (EngineType.SPEECH, "Hello.")
    assert agent.engine.replies == (Reply(match=r"(\d)", say="{1}!"),)
    assert (agent.warm.gpu.resource, agent.warm.gpu.count) == ("amd.com/gpu", 2)
    assert (agent.warm.autoscaling, agent.warm.replicas) == (Autoscaling.EXTERNAL, 4)
    assert agent.warm.resources.requests == {"cpu": "2"}
    assert agent.warm.scale_down_delay_seconds == 9
    assert agent.burst is not None
    assert (agent.burst.credentials_secret, agent.burst.gpu) == ("modal", ("L4", "A10"))
    assert (agent.burst.regions, agent.burst.snapshot) == (("eu-west", "us-east"), Snapshot.GPU)
    assert agent.burst.budget == Budget(per_hour=20.0, per_day=100.5)
    assert agent.policy == Policy(
        baa_acknowledged=True, residency=("eu", "us-east-1"), transcripts=Transcripts.NONE
    )
    assert (agent.slo.first_audio_ms, agent.session.protocols) == (700, (Protocol.MOSHI,))
    assert (agent.session.max_seconds, agent.session.answer_seconds) == (600, 9)
    assert (agent.access.api_keys_secret, agent.access.public) == ("callers", False)
    assert (agent.access.origins, agent.slo.admission_ms) == (("https://a.example",), 250)


def test_values_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        an_agent().name = "other"  # type: ignore[misc]  # that it cannot be is the test


def test_burst_without_modal_is_no_burst() -> None:
    assert an_agent(burst={}).burst is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"engine": {}}, "engine.type must be one of: loopback, speech, moshi"),
        ({"engine__type": "echo"}, "engine.type must be one of: loopback, speech, moshi"),
        ({"engine__type": "moshi"}, "engine.type moshi needs engine.model"),
        ({"engine": []}, "engine.type must be one of: loopback, speech, moshi"),
        ({"warm__slotsPerPod": 0}, "warm.slotsPerPod must be a whole number from 1 to 256"),
        ({"access__public": "yes"}, "access.public must be true or false"),
        ({"burst__modal": {}}, "credentialsSecretRef.name must name a Secret"),
        ({"warm__minPods": 9}, "warm.maxPods is below warm.minPods"),
        ({"warm__autoscaling": "external"}, "needs warm.replicas"),
        (BURST | {"session__maxSeconds": 7200}, "session.maxSeconds is at most 3600 with burst"),
        ({"access": {}}, "access needs either public: true, or some of apiKeysSecretRef, jwt"),
        ({"engine__replies": ["hello"]}, r"engine.replies\[0\] needs match and say"),
        (
            {"engine__replies": [{"match": "(", "say": "?"}]},
            r"engine.replies\[0\].match is not a regular expression: missing \)",
        ),
        (
            {"engine__replies": [{"match": "(a)", "say": "{1}"}, {"match": "(a)", "say": "{2}"}]},
            r"engine.replies\[1\].say names \{2\}, but match has no such group: it has 1",
        ),
        (
            {"engine__replies": [{"match": "(?P<a>a)", "say": "{name}"}]},
            r"engine.replies\[0\].say names \{name\}",
        ),
    ],
)
def test_what_makes_no_sense_is_told(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        an_agent(**changes)


MOSHI: dict[str, Any] = {"engine": {"type": "moshi", "model": "tiny"}}
HOOK = {"url": "https://policy.example/v1"}


def with_policy(**policy: Any) -> dict[str, Any]:
    return {"engine": {**MOSHI["engine"], "policy": policy}}


def test_a_policy_is_read_and_none_is_none() -> None:
    assert an_agent(**MOSHI).engine.policy is None
    assert an_agent(**with_policy()).engine.policy == CallPolicy()
    hook: dict[str, Any] = {"url": "http://p.ns.svc:8080/", "deadlineMilliseconds": 50}
    hook |= {"onFailure": "closed", "tokenSecretRef": {"name": "hook"}}
    guard = {"match": "a", "do": "say", "say": "b"}
    found = an_agent(**with_policy(bannedWords=["darn"], bargeIn=True, guards=[guard], hook=hook))
    assert found.engine.policy == CallPolicy(
        banned_words=("darn",),
        barge_in=True,
        guards=(Guard(match="a", do=GuardAction.SAY, say="b"),),
        hook=Hook(
            url="http://p.ns.svc:8080/",
            deadline_milliseconds=50,
            on_failure=OnFailure.CLOSED,
            token_secret="hook",
        ),
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (with_policy(hook={}), "engine.policy.hook needs url"),
        (with_policy(guards=["a"]), r"engine.policy.guards\[0\] needs match and do"),
        (with_policy(guards=[{"match": "a", "do": "say"}]), "say goes with do: say"),
        (with_policy(guards=[{"match": "a", "do": "mute", "say": "b"}]), "say goes with do: say"),
        (with_policy(guards=[{"match": "a", "do": "sing"}]), "must be one of: say, mute, hangUp"),
        (with_policy(guards=[{"match": "(?!a)b", "do": "mute"}]), "use no lookaround"),
        (with_policy(hook={"url": "ftp://a.example/"}), "must be an https URL"),
        (with_policy(hook=HOOK) | {"policy__dataClass": "phi"}, "name a Service of it"),
    ],
)
def test_what_makes_no_sense_in_a_policy_is_told(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        an_agent(**changes)


@pytest.mark.parametrize(
    ("url", "fine", "in_cluster"),
    [
        ("https://policy.example/v1", True, False),
        ("http://policy.example/v1", False, False),
        ("https://policy.example", False, False),
        ("https://me:secret@policy.example/", False, False),
        ("http://p.ns.svc/", True, True),
        ("https://p.ns.svc.cluster.local:8443/v1", True, True),
        ("http://p.ns.svc.evil.example/", False, False),
        ("https://p.ns.svc.evil.example/", True, False),
        ("http://p.ns.svc@evil.example/", False, False),
        ("http://127.0.0.1:9/", True, True),
        ("file:///etc/passwd", False, False),
    ],
)
def test_where_a_hook_may_be(url: str, fine: bool, in_cluster: bool) -> None:
    asked = with_policy(hook={"url": url})
    for changes, wanted in ((asked, fine), (asked | {"policy__dataClass": "phi"}, in_cluster)):
        if wanted:
            an_agent(**changes)
        else:
            with pytest.raises(SpecError, match=r"engine\.policy\.hook\.url"):
                an_agent(**changes)


def test_everything_that_is_wrong_across_fields_is_told_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        an_agent(warm__minPods=9, access={})
    assert str(caught.value).count(";") == 1


def test_a_reply_may_name_its_groups_and_all_that_was_heard() -> None:
    say = "{1} {digit} {heard} {0} and {a b} {} {{"
    an_agent(engine__replies=[{"match": r"(?P<digit>\d)", "say": say}])


def test_an_object_that_is_being_deleted_always_parses() -> None:
    metadata = {"deletionTimestamp": "2026-01-01T00:00:00Z"}
    agent = parsed(an_object(metadata=metadata, engine={"type": "gone"}, warm__minPods=99))
    assert agent.deleted_at == epoch("2026-01-01T00:00:00Z") == 1_767_225_600.0
    assert agent.warm.min_pods == 1
    assert an_agent(metadata=metadata, warm__minPods=3).warm.min_pods == 3
