"""The resource, as a real API server takes it, and as the operator's own types have it."""

import asyncio
import copy
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from trunkline_dev.kube import Api, ApiError
from trunkline_operator.agent import parsing, spec
from trunkline_operator.agent.rules import AGENT_RULES, BURST_RULES
from trunkline_operator.decisions.conditions import Condition
from trunkline_runtime import contract

ROOT = Path(__file__).parent.parent
CRD = yaml.safe_load((ROOT / "crds/voiceagents.yaml").read_text())
V1ALPHA1 = CRD["spec"]["versions"][0]
SCHEMA = V1ALPHA1["schema"]["openAPIV3Schema"]
SPEC = SCHEMA["properties"]["spec"]
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
API_VERSION = f"{contract.GROUP}/{contract.VERSION}"

CLASSES: dict[str, type] = {
    "engine": spec.Engine,
    "engine.policy": spec.CallPolicy,
    "engine.policy.hook": spec.Hook,
    "warm": spec.Warm,
    "warm.gpu": spec.Gpu,
    "warm.resources": spec.Resources,
    "warm.template": spec.Template,
    "burst.modal": spec.Burst,
    "burst.modal.budget": spec.Budget,
    "session": spec.Session,
    "access": spec.Access,
    "access.jwt": spec.Jwt,
    "access.clientCertificates": spec.Certificates,
    "access.twilio": spec.Twilio,
    "access.tenants": spec.Tenants,
    "access.tenants.limits": spec.Limits,
    "policy": spec.Policy,
    "slo": spec.Slo,
    "upstream": spec.Upstream,
}
"""Group of `parsing.FIELDS` → the dataclass that it fills."""

Json = dict[str, Any]


@pytest.fixture
async def agents(api: Api, namespace: str) -> str:
    """The path of a namespace's agents; the CRD is there and served."""
    await api.apply(f"{CRDS}/{CRD['metadata']['name']}", CRD)
    await api.wait_for(
        CRDS,
        lambda crds: any(
            condition["type"] == "Established" and condition["status"] == "True"
            for condition in crds[0].get("status", {}).get("conditions") or ()
        ),
        fieldSelector=f"metadata.name={CRD['metadata']['name']}",
    )
    path = f"/apis/{API_VERSION}/namespaces/{namespace}/{contract.PLURAL}"
    async with asyncio.timeout(30):
        while True:  # a kind is served a moment after it is established, and nothing tells when
            try:
                await api.get(path)
            except ApiError as error:
                if error.status != 404:
                    raise
                await asyncio.sleep(0.05)
            else:
                return path


def an_agent(name: str = "an-agent", /, **changes: Any) -> Json:
    """A minimal agent with the values at some paths (`__` for a dot) changed; None takes them away."""
    body: Json = {"engine": {"type": "loopback"}, "access": {"public": True}}
    return {
        "apiVersion": API_VERSION,
        "kind": contract.KIND,
        "metadata": {"name": name},
        "spec": changed(body, changes),
    }


def changed(body: Json, changes: Json) -> Json:
    body = copy.deepcopy(body)
    for path, value in copy.deepcopy(changes).items():
        *parents, last = path.split("__")
        place = body
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is None:
            place.pop(last)
        else:
            place[last] = value
    return body


BURST_MODAL: Json = {"credentialsSecretRef": {"name": "modal"}}
BURST: Json = {"burst__modal": BURST_MODAL}
JWT: Json = {
    "issuer": "https://id.example/realms/us",
    "audience": "calls",
    "jwksUri": "https://id.example/realms/us/protocol/openid-connect/certs",
}
JWKS = '{"keys": [{"kty": "RSA", "n": "AQAB", "e": "AQAB"}]}'
RULED: Json = {
    "guards": [{"match": "a", "do": "mute"}],
    "hook": {"url": "https://policy.example/v1"},
}
TENANTS: Json = {
    "claim": "https://us.example/tenant",
    "limits": {"concurrentCalls": 5, "guaranteedSlots": 1},
    "overrides": [{"tenant": "acme", "concurrentCalls": 50, "guaranteedSlots": 4}, {"tenant": "b"}],
}

TWILIO: Json = {
    "authTokenSecretRef": {"name": "twilio"},
    "publicUrl": "wss://calls.example/desk?a=%2F",
}

TEMPLATE: Json = {
    "nodeSelector": {"pool": "voice"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
                ]
            }
        }
    },
    "topologySpreadConstraints": [
        {
            "maxSkew": 1,
            "topologyKey": "topology.kubernetes.io/zone",
            "whenUnsatisfiable": "ScheduleAnyway",
        }
    ],
    "volumes": [
        {"name": "weights", "persistentVolumeClaim": {"claimName": "weights", "readOnly": True}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
    ],
    "volumeMounts": [
        {"name": "weights", "mountPath": "/models", "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ],
    "env": [{"name": "HF_HOME", "value": "/models/hub"}],
    "imagePullSecrets": [{"name": "registry"}],
    "priorityClassName": "system-node-critical",
    "runtimeClassName": "nvidia",
    "serviceAccountName": "voice",
}

MOSHI: Json = {"type": "moshi", "model": "tiny"}
VOLUME_RULE = (
    "warm.template.volumes: each needs exactly one of persistentVolumeClaim, emptyDir, configMap, secret, "
    "csi and ephemeral"
)
REGION_RULE = "warm.regions: maxPods is below minPods: raise maxPods or lower minPods"
GUARD_RULE = "engine.policy.guards: say goes with do: say; set both or neither"

REFUSED: dict[str, Json] = {
    "engine.type moshi needs engine.model: name a Hugging Face repository (owner/name), a folder in the "
    "pod, or tiny": {"engine": {"type": "moshi"}},
    "engine.model is for engine.type moshi: remove it or set the type": {
        "engine__model": "kyutai/moshiko-pytorch-bf16"
    },
    "engine.policy is for engine.type moshi: remove it or set the type": {"engine__policy": {}},
    "engine.policy can only hear callers with engine.stt: name an STT model there, or leave out bargeIn, "
    "guards and hook": {
        "engine": {
            "type": "moshi",
            "model": "a/b",
            "policy": {"guards": [{"match": "a", "do": "mute"}]},
        }
    },
    "engine.type moshi looks for patterns with RE2: use no lookaround, backreference, atomic group or "
    "possessive repeat in engine.replies and engine.policy.guards": {
        "engine": MOSHI | {"policy": {"guards": [{"match": r"(a)\1", "do": "mute"}]}}
    },
    GUARD_RULE: {"engine": MOSHI | {"policy": {"guards": [{"match": "a", "do": "say"}]}}},
    "engine.policy.hook.url must be an https URL, or http to a Service of the cluster "
    "(http://name.namespace.svc/…), because it is sent what callers say": {
        "engine": MOSHI | {"policy": {"hook": {"url": "http://a.example/"}}}
    },
    "policy.dataClass phi keeps calls in the cluster: let engine.policy.hook.url name a Service of it "
    "(https://name.namespace.svc/…) or set dataClass to standard": {
        "engine": MOSHI | {"policy": {"hook": {"url": "https://a.example/"}}},
        "policy__dataClass": "phi",
    },
    "warm.maxPods is below warm.minPods: raise maxPods or lower minPods": {
        "warm": {"minPods": 3, "maxPods": 2}
    },
    "warm.schedule asks for more pods than warm.maxPods: raise maxPods or lower minPods there": {
        "warm__schedule": [{"start": "0 8 * * *", "durationSeconds": 3600, "minPods": 5}]
    },
    "warm.autoscaling external needs warm.replicas: set it to the number of pods to begin with": {
        "warm__autoscaling": "external"
    },
    "warm.resources names the resource of warm.gpu: remove it there and set warm.gpu.count": {
        "warm__resources__limits": {"nvidia.com/gpu": 1}
    },
    "warm.gpu.product is for GPUs of nvidia.com: remove it, or name a label of your nodes in "
    "warm.template.nodeSelector": {"warm__gpu": {"product": "MI300X", "resource": "amd.com/gpu"}},
    "warm.template.nodeSelector names nvidia.com/gpu.product, as warm.gpu.product does: remove one of "
    "them": {
        "warm__gpu__product": "NVIDIA-L4",
        "warm__template__nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L4"},
    },
    "warm.template.volumeMounts names a volume that is not in warm.template.volumes: add it there": {
        "warm__template__volumeMounts": [{"name": "weights", "mountPath": "/models"}]
    },
    "warm.template.env sets what the operator sets, TRUNKLINE_… or HF_TOKEN: remove it there and use the "
    "fields of engine, warm and session": {
        "warm__template__env": [{"name": "TRUNKLINE_SLOTS", "value": "9"}]
    },
    REGION_RULE: {"warm__regions": [{"name": "eu", "minPods": 5}]},
    "warm.slotsPerPod auto is for engine.type moshi, whose workers measure: set a number": {
        "warm__slotsPerPod": "auto"
    },
    VOLUME_RULE: {"warm__template__volumes": [{"name": "a"}]},
    "no call could ever be placed: raise warm.maxPods or add burst.modal": {
        "warm": {"minPods": 0, "maxPods": 0}
    },
    "access.twilio.publicUrl must be the wss URL that Twilio calls, with a path, such as "
    "wss://calls.example/desk": {
        "access": {"twilio": {**TWILIO, "publicUrl": "https://calls.example/desk"}}
    },
    "access needs either public: true, or some of apiKeysSecretRef, jwt, clientCertificates and twilio: "
    "set one side and remove the other": {"access__apiKeysSecretRef": {"name": "callers"}},
    "access.jwt needs exactly one of jwksUri and jwks: set one and remove the other": {
        "access": {"jwt": {"issuer": "https://id.example/", "audience": "calls"}}
    },
    "access.jwt.jwksUri must be an https URL, or http to a Service of the cluster "
    "(http://name.namespace.svc/…): over plain http anybody on the way could give keys": {
        "access": {"jwt": {**JWT, "jwksUri": "http://id.example/keys"}}
    },
    "access.tenants guarantees more slots than there can be: lower guaranteedSlots, or raise "
    "warm.maxPods or warm.slotsPerPod": {
        "access__tenants": {
            "overrides": [
                {"tenant": "a", "guaranteedSlots": 16},
                {"tenant": "b", "guaranteedSlots": 1},
                {"tenant": "c"},
            ]
        }
    },
    "burst.modal.maxContainers is below minContainers: raise maxContainers or lower minContainers": {
        **BURST,
        "burst__modal__minContainers": 11,
    },
    "burst.modal.snapshot gpu needs a GPU: name one in burst.modal.gpu or set snapshot to cpu": {
        **BURST,
        "burst__modal__snapshot": "gpu",
        "burst__modal__gpu": [],
    },
    "burst.modal.startDeadlineSeconds is above session.answerSeconds, so callers would be refused "
    "before it: lower startDeadlineSeconds or raise answerSeconds": {
        **BURST,
        "session__answerSeconds": 6,
    },
    "session.maxSeconds is at most 3600 with burst, because Modal lets a container finish its calls for "
    "one hour: lower maxSeconds or remove burst": {**BURST, "session__maxSeconds": 3601},
    "policy.dataClass phi keeps calls in the cluster: remove burst, or set policy.baa.acknowledged once "
    "Modal has signed a business associate agreement with you": {
        **BURST,
        "burst__modal__snapshot": "none",
        "policy__dataClass": "phi",
    },
    "policy.dataClass phi goes into no snapshot, which Modal's business associate agreement leaves out: "
    "set burst.modal.snapshot to none": {
        **BURST,
        "policy": {"dataClass": "phi", "baa": {"acknowledged": True}},
    },
    "policy.residency keeps what callers say in its regions, and nobody knows where engine.policy.hook is: "
    "let its url name a Service of the cluster or leave residency empty": {
        "engine": MOSHI | {"policy": {"hook": {"url": "https://a.example/"}}},
        "policy__residency": ["eu"],
    },
    "policy.transcripts none tells nobody what callers say: remove engine.policy.hook or set transcripts "
    "to caller": {
        "engine": MOSHI | {"policy": {"hook": {"url": "https://a.example/"}}},
        "policy__transcripts": "none",
    },
    "burst.modal.regions names a region twice: remove one": {
        **BURST,
        "burst__modal__regions": ["eu-west", "us-east", "eu-west"],
    },
    "upstream.url must be wss://host, or ws:// to a Service of the cluster (ws://name.namespace.svc), with "
    "nothing behind its path": {"upstream__url": "ws://calls.example"},
    "upstream.deadlineSeconds is above session.answerSeconds, so callers would be refused before it: lower "
    "deadlineSeconds or raise answerSeconds": {
        "upstream": {"url": "wss://calls.example", "deadlineSeconds": 9}
    },
    "burst.modal.budget.perHour is above perDay and would never be reached: lower it or raise perDay": {
        **BURST,
        "burst__modal__budget": {"perHour": 5, "perDay": 4.99},
    },
}
"""Sentence of a rule → a spec that breaks this rule and no other."""

NAME_RULE = "the name is too long, because pods are named after it: use at most 50 characters"
ENVIRONMENT_RULE = (
    "burst.modal.environment cannot change while burst is on: remove burst, wait until "
    "status.burst.app is empty, and add burst with the new environment"
)


WRONG_WINDOWS: tuple[Json, ...] = (
    {"durationSeconds": 59},
    {"durationSeconds": 604_801},
    {"minPods": -1},
    {"minPods": 1001},
    {"start": "0 8 * *"},
    {"start": "0 8 * * *" + " " * 120},
    {"timeZone": "a" * 65},
)


async def refusal(api: Api, path: str, body: Json) -> str:
    with pytest.raises(ApiError) as caught:
        await api.create(path, body)
    assert (caught.value.status, caught.value.reason) == (422, "Invalid")
    return caught.value.message


# --- a real API server ----------------------------------------------------------------------------------


async def test_every_rule_is_refused_with_its_sentence(api: Api, agents: str) -> None:
    for sentence, changes in REFUSED.items():
        message = await refusal(api, agents, an_agent(**changes))
        told = [other for other in rules(SCHEMA) if other in message]
        assert told == [sentence], message


REGIONS: Json = {"warm__regions": [{"name": "eu", "minPods": 0, "maxPods": 2}, {"name": "us"}]}


@pytest.mark.parametrize(
    ("changes", "fine"),
    [
        ({"warm__maxPods": 0, "warm__minPods": 0}, True),
        ({"warm__schedule": [{"start": "0 8 * * *", "durationSeconds": 3600, "minPods": 4}]}, True),
        (
            {"warm__schedule": [{"start": "0 8 * * *", "durationSeconds": 3600, "minPods": 5}]},
            False,
        ),
        ({"warm__regions": [{"name": "eu", "minPods": 0, "maxPods": 0}]}, False),
        ({"access__tenants": {"overrides": [{"tenant": "a", "guaranteedSlots": 99}]}}, True),
    ],
)
async def test_bounds_of_regions_take_the_place_of_those_above(
    api: Api, agents: str, changes: Json, fine: bool
) -> None:
    body = an_agent(**REGIONS | changes)
    metadata = {"name": "an-agent", "namespace": "n", "uid": "u", "generation": 1}
    if fine:
        await api.create(agents, body)
        assert parsing.parsed({**body, "metadata": metadata}).warm.regions
    else:
        message = await refusal(api, agents, body)
        with pytest.raises(spec.SpecError) as caught:
            parsing.parsed({**body, "metadata": metadata})
        assert str(caught.value) in message


async def test_access_needs_one_of_its_two_ways(api: Api, agents: str) -> None:
    message = await refusal(api, agents, an_agent(access={}))
    assert "access needs either public: true, or some of apiKeysSecretRef, jwt" in message


async def test_a_name_too_long_for_pods_is_refused(api: Api, agents: str) -> None:
    assert NAME_RULE in await refusal(api, agents, an_agent("a" * 51))
    await api.create(agents, an_agent("a" * 50))


async def test_the_environment_stays_while_burst_is_on(api: Api, agents: str) -> None:
    await api.create(agents, an_agent(**BURST))
    other = {"spec": {"burst": {"modal": {**BURST_MODAL, "environment": "test"}}}}
    with pytest.raises(ApiError) as caught:
        await api.patch(f"{agents}/an-agent", other)
    assert ENVIRONMENT_RULE in caught.value.message
    await api.patch(f"{agents}/an-agent", {"spec": {"burst": None}})
    await api.patch(f"{agents}/an-agent", other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine__type": "echo"}, 'Unsupported value: "echo": supported values: "loopback", "speech", "moshi"'),
        ({"engine": None}, "spec.engine: Required value"),
        ({"access": None}, "spec.access: Required value"),
        ({"warm__slotsPerPod": 0}, "should be greater than or equal to 1"),
        ({"warm__slotsPerPod": "four"}, "spec.warm.slotsPerPod"),
        ({"warm__slotsPerPod": 257}, "should be less than or equal to 256"),
        ({"warm__bufferSlots": "25"}, "spec.warm.bufferSlots"),
        ({"warm__bufferSlots": "100%"}, "spec.warm.bufferSlots"),
        ({"warm__bufferSlots": 10_001}, "should be less than or equal to 10000"),
        *(
            ({"warm__schedule": [{"start": "0 8 * * *", "durationSeconds": 60, "minPods": 0} | wrong]}, "spec.warm.schedule[0]")
            for wrong in WRONG_WINDOWS
        ),
        ({"burst__modal": {}}, "spec.burst.modal.credentialsSecretRef: Required value"),
        ({"warm__resources__requests": {"cpu": "much"}}, "spec.warm.resources.requests.cpu"),
        (BURST | {"burst__modal__regions": []}, "spec.burst.modal.regions"),
        (BURST | {"burst__modal__regions": ["us"]}, 'Unsupported value: "us": supported values: "us-east"'),
        (BURST | {"burst__modal__budget": {"perDay": -1}}, "spec.burst.modal.budget.perDay"),
        ({"warm__gpu": {"product": "L4 or A10"}}, "spec.warm.gpu.product"),
        ({"warm__template": {"tolerations": [{"operator": "Is"}]}}, "spec.warm.template.tolerations[0].operator"),
        ({"warm__template": {"volumeMounts": [{"name": "a", "mountPath": "models"}]}}, "volumeMounts[0].mountPath"),
        ({"warm__template": {"env": [{"name": "A"}]}}, "spec.warm.template.env[0].value: Required value"),
        ({"warm__template": {"nodeSelector": {"a": "b" * 64}}}, "spec.warm.template.nodeSelector.a"),
        ({"warm": {"regions": [{"name": "eu"}, {"name": "eu"}]}}, "Duplicate value"),
        ({"warm": {"regions": [{"name": "EU"}]}}, "spec.warm.regions[0].name"),
        ({"policy__residency": ["EU"]}, "spec.policy.residency[0]"),
        ({"policy__residency": ["eu", "eu"]}, "Duplicate value"),
        ({"session__protocols": ["sip"]}, 'Unsupported value: "sip": supported values: "realtime", "moshi"'),
    ],
)  # fmt: skip
async def test_a_wrong_shape_is_refused(api: Api, agents: str, changes: Json, said: str) -> None:
    assert said in await refusal(api, agents, an_agent(**changes))


async def test_the_server_fills_in_what_the_operator_would(api: Api, agents: str) -> None:
    secured: Json = {
        "access": {"jwt": JWT, "tenants": TENANTS, "twilio": TWILIO, "clientCertificates": {}}
    }
    window = {"start": "45 7 * * MON-FRI", "durationSeconds": 60, "minPods": 3}
    planned: Json = {"warm": {"schedule": [window], "bufferSlots": "25%"}}
    for name, changes in (
        ("plain", {}),
        ("with-burst", BURST),
        ("secured", secured),
        ("planned", planned),
        ("moshi", {"engine": MOSHI}),
        ("ruled", {"engine": MOSHI | {"policy": RULED}}),
        (
            "placed",
            {"warm__template": TEMPLATE, "warm__gpu": {"product": "NVIDIA-L4"}},
        ),
        ("measured", {"engine": MOSHI, "warm__slotsPerPod": "auto"}),
        ("regions", {"warm": {"regions": [{"name": "eu"}, {"name": "us", "maxPods": 9}]}}),
        (
            "bounded",
            BURST | {"burst__modal__budget": {"perHour": 7.5}, "policy__residency": ["eu"]},
        ),
    ):
        body = an_agent(name, **changes)
        # Kept by nobody: an operator of a later test would find no such classes for its pods.
        stored = await api.request("POST", agents, body, dryRun="All")
        metadata = {k: stored["metadata"][k] for k in ("name", "namespace", "uid", "generation")}
        assert stored["spec"] != body["spec"]
        assert parsing.parsed(stored) == parsing.parsed({**body, "metadata": metadata})


@pytest.mark.parametrize(
    ("uri", "fine"),
    [
        ("https://id.example/keys", True),
        ("http://keycloak.auth.svc/keys", True),
        ("http://keycloak.auth.svc.cluster.local:8080/keys", True),
        ("http://127.0.0.1:9/keys", True),
        ("http://localhost/keys", True),
        ("http://keycloak.auth.svc.evil@evil.example/keys", False),
        ("http://keycloak.auth.svc.evil.example/keys", False),
        ("http://169.254.169.254/latest", False),
        ("http://evil.example/.svc/", False),
        ("https:///keys", False),
        ("file:///etc/passwd", False),
    ],
)
async def test_where_keys_come_from_is_trusted_alike_by_server_and_operator(
    api: Api, agents: str, uri: str, fine: bool
) -> None:
    body = an_agent(access={"jwt": {**JWT, "jwksUri": uri}})
    metadata = {"name": "an-agent", "namespace": "n", "uid": "u", "generation": 1}
    if fine:
        await api.create(agents, body)
        assert parsing.parsed({**body, "metadata": metadata}).access.jwt
    else:
        assert "access.jwt.jwksUri must be an https URL" in await refusal(api, agents, body)
        with pytest.raises(spec.SpecError, match=r"jwksUri must be an https URL"):
            parsing.parsed({**body, "metadata": metadata})


@pytest.mark.parametrize(
    ("jwks", "said"),
    [
        ("{}", "must be a JWKS document"),
        ("[", "must be a JWKS document"),
        ('{"keys": []}', "must be a JWKS document"),
        ('{"keys": [3]}', "must be a JWKS document"),
        ('{"keys": [{"kty": "RSA", "d": "AQAB"}]}', "holds a private key"),
        ('{"keys": [{"kty": "oct", "k": "AQAB"}]}', "holds a private key"),
    ],
)
def test_a_jwks_that_is_none_or_holds_a_private_key_is_told_of(jwks: str, said: str) -> None:
    access = {"jwt": {"issuer": "i", "audience": "a", "jwks": jwks}}
    metadata = {"name": "an-agent", "namespace": "n", "uid": "u", "generation": 1}
    with pytest.raises(spec.SpecError, match=said):
        parsing.parsed({**an_agent(access=access), "metadata": metadata})


async def test_amounts_may_be_numbers_or_text(api: Api, agents: str) -> None:
    amounts = {"requests": {"cpu": 2, "memory": "1.5Gi"}, "limits": {"memory": "2Gi"}}
    agent = parsing.parsed(await api.create(agents, an_agent(warm__resources=amounts)))
    assert agent.warm.resources.requests == {"cpu": "2", "memory": "1.5Gi"}
    assert agent.warm.resources.limits == {"memory": "2Gi"}


@pytest.mark.parametrize(
    "example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.stem
)
async def test_examples_are_accepted(api: Api, agents: str, namespace: str, example: Path) -> None:
    for document in yaml.safe_load_all(example.read_text()):
        if document["kind"] == "Secret":
            await api.create(f"/api/v1/namespaces/{namespace}/secrets", document)
        else:
            stored = await api.create(agents, document)
            assert parsing.parsed(stored).name == example.stem


async def test_scale_writes_and_reads_replicas(api: Api, agents: str) -> None:
    await api.create(agents, an_agent(warm={"autoscaling": "external", "replicas": 2}))
    status = {"replicas": 1, "selector": "trunkline.dev/agent=an-agent"}
    await api.patch(f"{agents}/an-agent/status", {"status": status})
    await api.patch(f"{agents}/an-agent/scale", {"spec": {"replicas": 3}})
    scale = await api.get(f"{agents}/an-agent/scale")
    assert (scale["spec"], scale["status"]) == ({"replicas": 3}, status)
    assert parsing.parsed(await api.get(f"{agents}/an-agent")).warm.replicas == 3


# --- the text itself ------------------------------------------------------------------------------------


def rules(schema: Json) -> list[str]:
    """The sentences of all rules."""
    own = [rule["message"] for rule in schema.get("x-kubernetes-validations", ())]
    return own + [sentence for _, child in children(schema) for sentence in rules(child)]


def children(schema: Json) -> Iterator[tuple[str, Json]]:
    yield from schema.get("properties", {}).items()
    if "items" in schema:
        yield "[]", schema["items"]


def walk(schema: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    for name, child in children(schema):
        below = f"{path}.{name}" if path else name
        yield below, child
        yield from walk(child, below)


def schema_at(path: str) -> Json:
    schema: Json = SPEC
    for name in path.split("."):
        schema = schema["properties"][name]
    return schema


def table() -> Iterator[tuple[str, str, Json, Any]]:
    """(group, path of a field, its schema, its default in the dataclass)."""
    for group, entries in parsing.FIELDS.items():
        defaults = {field.name: field for field in fields(CLASSES[group])}
        for path, (name, _) in entries.items():
            field = defaults[name]
            made = field.default if field.default_factory is MISSING else field.default_factory()
            yield group, f"{group}.{path}", schema_at(f"{group}.{path}"), made


def test_it_is_the_resource_of_the_contract() -> None:
    names = CRD["spec"]["names"]
    assert (CRD["spec"]["group"], V1ALPHA1["name"]) == (contract.GROUP, contract.VERSION)
    assert (names["kind"], names["plural"]) == (contract.KIND, contract.PLURAL)
    assert CRD["metadata"]["name"] == f"{contract.PLURAL}.{contract.GROUP}"
    assert CRD["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_every_rule_has_a_test_and_the_operator_says_the_same() -> None:
    tested = {*REFUSED, NAME_RULE, ENVIRONMENT_RULE}
    assert sorted(rules(SCHEMA)) == sorted(tested)
    assert {*AGENT_RULES, *BURST_RULES} <= tested


def test_everything_is_described_in_a_sentence() -> None:
    for path, schema in walk(SCHEMA):
        if not path.endswith("[]"):
            assert schema.get("description", "").endswith("."), path


def test_the_operator_reads_every_field() -> None:
    read = {path for _, path, _, _ in table()}
    groups = {path.rsplit(".", n)[0] for path in read for n in range(1, path.count(".") + 1)}
    leaves = {path for path, _ in walk(SPEC) if "[]" not in path} - groups
    # What the API server judges goes into a pod as it is.
    assert {path for path in leaves if not path.startswith("warm.template.affinity.")} == read


def test_defaults_are_the_same_in_both() -> None:
    for _, path, schema, default in table():
        if default is MISSING or default is None or "SecretRef" in path:
            assert "default" not in schema, path
        else:
            plain = list(default) if isinstance(default, tuple) else default
            assert schema["default"] == plain, path
    for path, schema in walk(SPEC):
        declared = path.startswith(("engine", "access", "burst", "upstream")) or "[]" in path
        if schema.get("type") == "object" and "properties" in schema and not declared:
            assert schema["default"] == {}, path


def test_bounds_are_the_same_in_both() -> None:
    for group, path, schema, _ in table():
        read = parsing.FIELDS[group][path.removeprefix(f"{group}.")][1]
        for fine, wrong in edges(schema):
            read(JWKS.ljust(len(fine)) if path == "access.jwt.jwks" else fine, path)
            with pytest.raises(spec.SpecError, match=re.escape(path)):
                read(wrong, path)


def edges(schema: Json) -> Iterator[tuple[Any, Any]]:
    """(a value at the edge, one past it) for each bound of a field."""
    match schema:
        case {"x-kubernetes-int-or-string": True, "pattern": "^auto$"}:
            yield from ((1, 0), (256, 257), ("auto", "many"), (4, "4"), (4, True))
        case {"x-kubernetes-int-or-string": True}:
            yield from ((schema["minimum"], -1), (schema["maximum"], schema["maximum"] + 1))
            yield from (("0%", "1 %"), ("99%", "100%"), ("5%", "05%"), ("25%", True))
        case {"enum": words}:
            yield from ((word, f"{word}-") for word in words)
        case {"type": "integer"}:
            yield schema["minimum"], schema["minimum"] - 1
            yield schema["minimum"], True
            yield (most := schema.get("maximum", 2**31 - 1)), most + 1
        case {"type": "number"}:
            yield schema["minimum"], -0.01
            yield 7.5, "7.5"
            yield schema["maximum"], schema["maximum"] + 0.01
            yield 0.0, False
        case {"type": "array", "items": {"enum": [word, *_]}}:
            least, most = schema.get("minItems", 0), schema["maxItems"]
            yield [word] * most, [word] * (most + 1)
            yield [word] * least, [word] * (least - 1) if least else "a"
            yield [word], [f"{word}-"]
        case {"type": "string"}:
            yield "a" * schema["maxLength"], "a" * (schema["maxLength"] + 1)
            yield "a", 1
        case {"type": "array", "items": {"type": "string", "maxLength": longest}}:
            yield ["a"] * schema["maxItems"], ["a"] * (schema["maxItems"] + 1)
            yield ["a" * longest], ["a" * (longest + 1)]
        case {"type": "array", "items": {"required": ["start", *_]}}:
            window = {"start": "0 8 * * *", "durationSeconds": 60, "minPods": 0}
            yield [window] * schema["maxItems"], [window] * (schema["maxItems"] + 1)
            for wrong in WRONG_WINDOWS:
                yield [window], [window | wrong]
            yield [window], [{"start": "0 8 * * *"}]
        case {"type": "array", "items": {"required": ["tenant"]}}:
            tenant = {"tenant": "a" * 128, "concurrentCalls": 100_000}
            yield [tenant] * schema["maxItems"], [tenant] * (schema["maxItems"] + 1)
            yield [tenant], [{**tenant, "tenant": "a" * 129}]
            yield [tenant], [{**tenant, "concurrentCalls": 100_001}]
            yield [tenant], [{"concurrentCalls": 1}]
        case {"type": "array", "items": {"required": ["match", "do"]}}:
            guard = {"match": "a" * 256, "do": "say", "say": "a" * 1024}
            yield [guard] * schema["maxItems"], [guard] * (schema["maxItems"] + 1)
            yield [guard], [{**guard, "match": "a" * 257}]
            yield [guard], [{**guard, "say": "a" * 1025}]
            yield [guard], [{**guard, "do": "sing"}]
        case {"type": "array", "items": {"type": "object", "properties": properties} as each} if (
            "match" not in properties
        ):
            entry: Json = {name: sample(properties[name]) for name in each.get("required", ())}
            if "minPods" in properties:
                entry["name"] = "eu"
                yield [{**entry, "minPods": 0, "maxPods": 1000}], [{**entry, "minPods": 5}]
                yield [{**entry, "maxPods": 1000}], [{**entry, "maxPods": 1001}]
            if "emptyDir" in properties:
                entry |= {"emptyDir": {}}
                yield [entry], [entry | {"csi": {}}]
                yield [entry], [{"name": "a", "hostPath": {"path": "/"}}]
            yield [entry] * schema["maxItems"], [entry] * (schema["maxItems"] + 1)
            yield [entry], ["a"]
            yield [entry], [{**entry, "more": "a" * 16_384}]
            for name in each.get("required", ()):
                yield [entry], [{**entry, name: None}]
        case {"type": "array"}:
            entry = {"match": "a" * 256, "say": "a" * 1024}
            yield [entry] * schema["maxItems"], [entry] * (schema["maxItems"] + 1)
            yield [entry], [{**entry, "match": "a" * 257}]
            yield [entry], [{**entry, "say": "a" * 1025}]
        case {"type": "boolean"}:
            yield False, "no"
        case {"type": "object", "additionalProperties": {"maxLength": 63}}:
            most = schema["maxProperties"]
            yield {f"k{n}": "a" * 63 for n in range(most)}, {f"k{n}": "a" for n in range(most + 1)}
            yield {"pool": "voice"}, {"pool": "a" * 64}
        case {"type": "object"}:
            yield {"cpu": 1}, ["cpu"]


def sample(schema: Json) -> Any:
    """A value that a field takes."""
    return schema.get("minimum", next(iter(schema.get("enum", ["/a"]))))


def test_conditions_are_named_in_the_description() -> None:
    described = SCHEMA["properties"]["status"]["properties"]["conditions"]["description"]
    assert [word for word in described.split() if word.endswith(":")] == [
        f"{condition}:" for condition in Condition
    ]


def test_columns_show_what_the_status_has() -> None:
    columns = {
        column["name"]: column["jsonPath"] for column in V1ALPHA1["additionalPrinterColumns"]
    }
    assert list(columns) == ["Engine", "Pods", "Slots", "Busy", "Burst", "Ready", "Age"]
    paths = {path for path, _ in walk(SCHEMA)}
    for name, path in columns.items():
        if name not in ("Ready", "Age"):
            assert path.removeprefix(".") in paths
