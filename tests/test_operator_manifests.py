"""Bodies of what an agent owns: as a real API server takes them, and what replaces them."""

import base64
from dataclasses import replace
from typing import Any

import pytest
from test_crd import TEMPLATE
from worlds import BURST, INSTALLATION, an_agent

from trunkline_dev.kube import Api
from trunkline_operator.agent.policy import ladder
from trunkline_operator.agent.spec import VoiceAgent
from trunkline_operator.decisions.manifests import (
    burst_app,
    burst_hash,
    engine_environment,
    image_of,
    secret,
    secret_strings,
    template_hash,
    worker_pod,
)
from trunkline_operator.decisions.offers import measured
from trunkline_operator.decisions.world import Phase, PodFacts, Traffic, WorkerFacts
from trunkline_runtime import contract


def container(agent: VoiceAgent) -> dict[str, Any]:
    (only,) = worker_pod(agent, 0, INSTALLATION)["spec"]["containers"]
    found: dict[str, Any] = only
    return found


async def test_a_real_api_server_takes_pod_and_secret_as_they_are(api: Api, namespace: str) -> None:
    agent = replace(an_agent(warm__resources__requests={"cpu": "250m"}), namespace=namespace)
    made = worker_pod(agent, 0, INSTALLATION)
    stored = await api.request(
        "POST", f"/api/v1/namespaces/{namespace}/pods", made, dryRun="All", fieldValidation="Strict"
    )
    assert stored["spec"]["containers"][0]["resources"]["requests"] == {
        "cpu": "250m",
        "nvidia.com/gpu": "1",
    }
    facts = PodFacts.of(stored)
    assert (facts.name, facts.ordinal, facts.owner) == ("desk-0", 0, agent.uid)
    assert (facts.phase, facts.active, facts.started) == (Phase.PENDING, True, False)
    assert facts.template == template_hash(agent, INSTALLATION)
    await api.request(
        "POST",
        f"/api/v1/namespaces/{namespace}/secrets",
        secret(agent, "wk", "tk"),
        dryRun="All",
        fieldValidation="Strict",
    )


async def test_a_real_api_server_takes_a_pod_with_a_whole_template(
    api: Api, namespace: str
) -> None:
    """Its classes and its account must exist before, so they are left to the test of what is refused."""
    # The API server makes it a moment after it has begun to answer.
    await api.wait_for_one("/apis/scheduling.k8s.io/v1/priorityclasses/system-node-critical")
    named = {"runtimeClassName": None, "serviceAccountName": None}
    template = {**TEMPLATE, **named}
    agent = an_agent(warm={"template": template, "gpu": {"product": "NVIDIA-L4"}})
    made = worker_pod(replace(agent, namespace=namespace), 0, INSTALLATION)
    stored = await api.request(
        "POST", f"/api/v1/namespaces/{namespace}/pods", made, dryRun="All", fieldValidation="Strict"
    )
    pod = stored["spec"]
    assert pod["nodeSelector"] == {"pool": "voice", "nvidia.com/gpu.product": "NVIDIA-L4"}
    assert template["tolerations"][0] in pod["tolerations"]
    assert pod["affinity"] == template["affinity"]
    (spread,) = pod["topologySpreadConstraints"]
    assert spread["labelSelector"] == {"matchLabels": {contract.LABEL_AGENT: "desk"}}
    assert [volume["name"] for volume in pod["volumes"]] == ["weights", "shm", "trunkline-tmp"]
    (worker,) = pod["containers"]
    assert [mount["mountPath"] for mount in worker["volumeMounts"]] == [
        "/models",
        "/dev/shm",
        "/tmp",
    ]
    env = {each["name"]: each.get("value") for each in worker["env"]}
    assert env["HF_HOME"] == "/models/hub"
    assert env[contract.ENV_SLOTS] == "4"
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert (pod["priorityClassName"], pod["automountServiceAccountToken"]) == (
        "system-node-critical",
        False,
    )


def test_what_workers_measure_counts_and_replaces_no_pod() -> None:
    engine = {"type": "moshi", "model": "tiny"}
    agent = an_agent(engine=engine, warm__slotsPerPod="auto")
    env = {each["name"]: each.get("value") for each in container(agent)["env"]}
    assert env[contract.ENV_SLOTS] == "auto"
    assert measured(agent, Traffic()).warm.slots_per_pod == 4  # nobody knows yet
    told = {
        name: WorkerFacts(slots=slots, busy=0, draining=False)
        for name, slots in (("desk-0", 30), ("desk-1", 25))
    }
    known = measured(agent, Traffic(workers=told))
    assert known.warm.slots_per_pod == 27
    assert ladder(known).words == "at most 4 × 27 warm = 108 calls"
    assert template_hash(known, INSTALLATION) == template_hash(agent, INSTALLATION)
    fixed = an_agent(engine=engine)
    assert template_hash(fixed, INSTALLATION) != template_hash(agent, INSTALLATION)
    assert measured(fixed, Traffic(workers=told)) == fixed


def test_without_a_template_a_pod_has_none_of_its_fields() -> None:
    fields = worker_pod(an_agent(), 0, INSTALLATION)["spec"].keys()
    assert fields.isdisjoint({"nodeSelector", "tolerations", "affinity", "runtimeClassName"})


def test_a_worker_learns_everything_from_its_environment() -> None:
    agent = an_agent(warm__slotsPerPod=8, session__maxSeconds=600)
    env = {entry["name"]: entry for entry in container(agent)["env"]}
    plain = {name: entry["value"] for name, entry in env.items() if "value" in entry}
    assert plain == {
        contract.ENV_AGENT: "ns/desk",
        contract.ENV_ENGINE: "loopback",
        contract.ENV_SLOTS: "8",
        contract.ENV_PORT: "8000",
        contract.ENV_HEALTH_PORT: "9090",
        contract.ENV_GATEWAYS: "gateway:8081",
        contract.ENV_MAX_SECONDS: "600",
    }
    fields = {name: env[name]["valueFrom"] for name in env.keys() - plain.keys()}
    assert fields == {
        contract.ENV_WORKER: {"fieldRef": {"fieldPath": "metadata.name"}},
        contract.ENV_HOST: {"fieldRef": {"fieldPath": "status.podIP"}},
        contract.ENV_WORKER_KEY: {"secretKeyRef": {"name": "desk-trunkline", "key": "worker-key"}},
    }


def test_with_a_ca_a_worker_gets_its_certificate_from_its_agents_secret() -> None:
    agent, secure = an_agent(), replace(INSTALLATION, ca="ca-1")
    pod = worker_pod(agent, 0, secure)
    (worker,) = pod["spec"]["containers"]
    plain = [entry["name"] for entry in container(agent)["env"]]
    more = {it["name"]: it["valueFrom"] for it in worker["env"] if it["name"] not in plain}
    assert more == {
        name: {"secretKeyRef": {"name": "desk-trunkline", "key": entry}}
        for name, entry in (
            (contract.ENV_TLS_CA, "ca.crt"),
            (contract.ENV_TLS_CERT, "tls.crt"),
            (contract.ENV_TLS_KEY, "tls.key"),
        )
    }
    assert PodFacts.of(pod | {"metadata": pod["metadata"] | {"uid": "u"}}).ca == "ca-1"
    assert (
        contract.ANNOTATION_CA not in worker_pod(agent, 0, INSTALLATION)["metadata"]["annotations"]
    )
    # Pods are replaced for another CA, not for what else an operator's upgrade brings.
    assert template_hash(agent, secure) == template_hash(agent, INSTALLATION)


def test_a_pod_belongs_to_its_agent_and_outlives_its_last_call() -> None:
    pod = worker_pod(an_agent(session__maxSeconds=600), 3, INSTALLATION)
    (owner,) = pod["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("VoiceAgent", "desk", "uid-0001-0002")
    assert owner["controller"] is True
    assert pod["metadata"]["name"] == "desk-3"
    assert pod["metadata"]["labels"][contract.LABEL_AGENT] == "desk"
    assert pod["spec"]["terminationGracePeriodSeconds"] == 660


def test_a_moshi_worker_is_told_of_its_model() -> None:
    engine = {
        "type": "moshi",
        "model": "kyutai/moshiko-pytorch-bf16@1a2b",
        "stt": "kyutai/stt-1b-en_fr",
        "quantization": "int8",
        "contextSeconds": 120,
        "contextEnd": "refresh",
        "tokenSecretRef": {"name": "hub"},
    }
    agent = an_agent(engine=engine)
    env = {entry["name"]: entry for entry in container(agent)["env"]}
    told = {name: env[name]["value"] for name in engine_environment(agent.engine)}
    assert told == {
        contract.ENV_ENGINE: "moshi",
        contract.ENV_MODEL: "kyutai/moshiko-pytorch-bf16@1a2b",
        contract.ENV_STT_MODEL: "kyutai/stt-1b-en_fr",
        contract.ENV_INT8: "1",
        contract.ENV_CONTEXT_SECONDS: "120",
        contract.ENV_CONTEXT_END: "refresh",
    }
    token = env[contract.ENV_HUB_TOKEN]["valueFrom"]["secretKeyRef"]
    assert token == {"name": "hub", "key": "token"}
    plain = {entry["name"] for entry in container(an_agent())["env"]}
    assert plain.isdisjoint({contract.ENV_MODEL, contract.ENV_HUB_TOKEN})


def test_moshi_has_an_image_of_its_own() -> None:
    moshi, other = an_agent(engine={"type": "moshi", "model": "tiny"}), an_agent()
    both = replace(INSTALLATION, moshi_image="worker-moshi:1")
    assert image_of(moshi, both) == "worker-moshi:1"
    assert image_of(other, both) == image_of(moshi, INSTALLATION) == INSTALLATION.worker_image
    assert template_hash(moshi, both) != template_hash(moshi, INSTALLATION)
    assert template_hash(other, both) == template_hash(other, INSTALLATION)


def test_a_pod_may_do_no_more_than_it_must() -> None:
    pod = worker_pod(an_agent(), 0, INSTALLATION)["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(an_agent())["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize(("engine", "limit"), [("loopback", "1Gi"), ("moshi", "64Gi")])
def test_a_worker_writes_to_tmp_alone_and_not_without_end(engine: str, limit: str) -> None:
    agent = an_agent(engine={"type": engine} | ({"model": "a/b"} if engine == "moshi" else {}))
    assert container(agent)["volumeMounts"] == [{"name": "trunkline-tmp", "mountPath": "/tmp"}]
    assert worker_pod(agent, 0, INSTALLATION)["spec"]["volumes"] == [
        {"name": "trunkline-tmp", "emptyDir": {"sizeLimit": limit}}
    ]


def test_a_template_may_bring_its_own_tmp() -> None:
    volume = {"name": "scratch", "emptyDir": {"sizeLimit": "200Gi"}}
    mount = {"name": "scratch", "mountPath": "/tmp/"}
    agent = an_agent(warm__template={"volumes": [volume], "volumeMounts": [mount]})
    assert container(agent)["volumeMounts"] == [mount]
    assert worker_pod(agent, 0, INSTALLATION)["spec"]["volumes"] == [volume]


def test_a_gpu_is_a_limit_and_a_worker_has_a_share_of_the_processors() -> None:
    share = {"requests": {"cpu": "250m", "memory": "256Mi"}}
    assert container(an_agent(warm__gpu={"count": 2}))["resources"] == share | {
        "limits": {"nvidia.com/gpu": "2"}
    }
    assert container(an_agent(warm__gpu={"count": 0}))["resources"] == share
    none: dict[str, Any] = {"requests": {}}
    assert container(an_agent(warm__gpu={"count": 0}, warm__resources=none))["resources"] == {}
    own = {"requests": {"cpu": 1}, "limits": {"memory": "1Gi"}}
    assert container(an_agent(warm={"gpu": {"count": 1}, "resources": own}))["resources"] == {
        "requests": {"cpu": "1"},
        "limits": {"memory": "1Gi", "nvidia.com/gpu": "1"},
    }


def test_an_agent_without_an_image_gets_the_operators() -> None:
    assert container(an_agent())["image"] == "worker:1"
    assert container(an_agent(warm__image="mine:2"))["image"] == "mine:2"


@pytest.mark.parametrize(
    ("changes", "replaced"),
    [
        ({"warm__image": "mine:2"}, True),
        ({"engine__type": "speech"}, True),
        ({"warm__slotsPerPod": 5}, True),
        ({"warm__gpu": {"count": 0}}, True),
        ({"warm__gpu": {"resource": "amd.com/gpu"}}, True),
        ({"warm__resources__requests": {"cpu": 1}}, True),
        ({"warm__gpu": {"product": "NVIDIA-L4"}}, True),
        ({"warm__template": {"nodeSelector": {"pool": "voice"}}}, True),
        ({"warm__template": {"env": [{"name": "HF_HOME", "value": "/models"}]}}, True),
        ({"warm__template": {"tolerations": []}}, False),
        ({"warm__image": "worker:1"}, False),
        ({"engine__greeting": "Hello."}, False),
        ({"engine__replies": [{"match": "a", "say": "b"}], "engine__fallback": "What?"}, False),
        ({"warm": {"minPods": 2, "maxPods": 9, "bufferSlots": 3}}, False),
        ({"session": {"maxSeconds": 60, "idleSeconds": 60, "answerSeconds": 9}}, False),
        ({"access": {"public": True, "origins": ["https://a.example"]}}, False),
        (BURST, False),
        ({"slo__admissionMs": 5, "policy__dataClass": "phi"}, False),
    ],
)
def test_only_what_a_running_worker_cannot_change_replaces_pods(
    changes: dict[str, Any], replaced: bool
) -> None:
    before = template_hash(an_agent(), INSTALLATION)
    assert (template_hash(an_agent(**changes), INSTALLATION) != before) is replaced


def test_a_new_worker_image_of_the_operator_replaces_pods() -> None:
    newer = replace(INSTALLATION, worker_image="worker:2")
    assert template_hash(an_agent(), newer) != template_hash(an_agent(), INSTALLATION)
    moved = replace(INSTALLATION, gateways="elsewhere:8081", build="2")
    assert template_hash(an_agent(), moved) == template_hash(an_agent(), INSTALLATION)


@pytest.mark.parametrize(
    ("changes", "redeployed"),
    [
        ({"burst__modal__gpu": ["A10"]}, True),
        ({"burst__modal__maxContainers": 11}, False),
        ({"burst__modal__snapshot": "none"}, True),
        ({"burst__modal__environment": "test"}, True),
        ({"session__maxSeconds": 600}, True),
        ({"engine__type": "speech"}, True),
        ({"burst__modal__startDeadlineSeconds": 5}, False),
        ({"burst__modal__credentialsSecretRef__name": "other"}, False),
        ({"engine__greeting": "Hello."}, False),
        ({"warm__slotsPerPod": 5}, False),
    ],
)
def test_only_what_the_app_is_made_of_redeploys_it(
    changes: dict[str, Any], redeployed: bool
) -> None:
    before = burst_hash(an_agent(**BURST), INSTALLATION)
    assert (burst_hash(an_agent(**BURST | changes), INSTALLATION) != before) is redeployed


def test_a_new_build_redeploys_and_no_burst_has_no_hash() -> None:
    agent = an_agent(**BURST)
    newer = replace(INSTALLATION, build="2")
    assert burst_hash(agent, newer) != burst_hash(agent, INSTALLATION)
    assert burst_hash(an_agent(), INSTALLATION) == ""


def test_app_names_fit_and_differ() -> None:
    assert burst_app(an_agent()) == "trunkline-ns-desk-uid-0001"
    long = replace(an_agent(), namespace="n" * 63, name="a" * 50)
    assert len(burst_app(long)) == 63
    assert burst_app(long) != burst_app(replace(long, uid="another-cluster"))


def test_hashes_do_not_depend_on_the_order_of_keys() -> None:
    one = an_agent(warm__resources__requests={"cpu": 1, "memory": "1Gi"})
    two = an_agent(warm__resources__requests={"memory": "1Gi", "cpu": 1})
    assert template_hash(one, INSTALLATION) == template_hash(two, INSTALLATION)


def test_a_secret_comes_back_as_it_was_made() -> None:
    assert secret_strings(secret(an_agent(), "wk", "tk")) == {
        "worker-key": "wk",
        "ticket-key": "tk",
    }


def test_a_secret_is_read_as_people_write_it() -> None:
    data = {"echo": b"key\n", "two": b"a\nb\n\n", "binary": b"\xff\xfe", "empty": b""}
    encoded = {name: base64.b64encode(value).decode() for name, value in data.items()}
    assert secret_strings({"data": encoded}) == {"echo": "key", "two": "a\nb\n", "empty": ""}
    assert secret_strings({}) == {}
