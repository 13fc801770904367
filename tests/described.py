"""What `kubectl describe va` tells in each case of failure, as golden files to be read as the person on call would.

    python tests/described.py

writes them anew; read what changed before you commit it. Pods are given as the kubelet and the scheduler write
them, and everything from there on is the operator's own.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from worlds import BURST, DEPLOYED, INSTALLATION, NOW, a_world, an_agent, an_object

from trunkline_operator.agent.parsing import parsed
from trunkline_operator.agent.spec import SpecError, VoiceAgent
from trunkline_operator.burst.client import BurstError, BurstReason
from trunkline_operator.burst.deployments import failed
from trunkline_operator.burst.limit import Limit
from trunkline_operator.cluster.client import ApiError
from trunkline_operator.cluster.credentials import (
    caller_keys_missing,
    credentials_missing,
    hook_token_missing,
    hub_token_missing,
)
from trunkline_operator.decisions.events import Event, Look, Memory, chosen, of_look, of_status
from trunkline_operator.decisions.manifests import owned_by, template_hash
from trunkline_operator.decisions.nodes import GOING, NodeFacts
from trunkline_operator.decisions.plan import planned, rfc3339
from trunkline_operator.decisions.reach import UNLINKED_SECONDS
from trunkline_operator.decisions.spending import terms
from trunkline_operator.decisions.status import rejected, reported
from trunkline_operator.decisions.template import refusal as of_refusal
from trunkline_operator.decisions.world import BurstFacts, PodFacts
from trunkline_operator.decisions.world import World as Seen
from trunkline_operator.scaling import prices
from trunkline_operator.scaling.decision import Memory as ScalingMemory
from trunkline_operator.scaling.spend import Account, Gateway, shut
from trunkline_runtime.contract import ANNOTATION_TEMPLATE

Json = dict[str, Any]

FOLDER = Path(__file__).parent / "golden/describe"
STARTED = rfc3339(NOW - 3600)
UNREADY = "containers with unready status: [worker]"


# --- pods as Kubernetes writes them ------------------------------------------------------------------------


def pod(agent: VoiceAgent, worker: Json | None, ready: Json, **conditions: Json) -> PodFacts:
    """desk-0, with its container and conditions."""
    container = {"name": "worker", "restartCount": 0, "ready": False, "started": False}
    body = {
        "metadata": {
            "name": "desk-0",
            "uid": "pod-0",
            "creationTimestamp": STARTED,
            "annotations": {ANNOTATION_TEMPLATE: template_hash(agent, INSTALLATION)},
            "ownerReferences": [owned_by(agent)],
        },
        "status": {
            "phase": "Running" if worker and "running" in worker["state"] else "Pending",
            "conditions": [{"type": "Ready", **ready}]
            + [{"type": kind, **rest} for kind, rest in conditions.items()],
            "containerStatuses": [container | worker] if worker else [],
        },
    }
    return PodFacts.of(body)


def waits(agent: VoiceAgent, reason: str, message: str, **more: Any) -> PodFacts:
    state = {"waiting": {"reason": reason, "message": message}}
    return pod(agent, {"state": state, **more}, not_ready())


def not_ready(since: float = NOW - 3600) -> Json:
    return {"status": "False", "lastTransitionTime": rfc3339(since), "message": UNREADY}


def healthy(agent: VoiceAgent) -> PodFacts:
    worker = {"ready": True, "started": True, "state": {"running": {"startedAt": STARTED}}}
    return pod(agent, worker, {"status": "True", "lastTransitionTime": STARTED})


# --- the cases ---------------------------------------------------------------------------------------------

Case = tuple[VoiceAgent, Seen, ApiError | None]


def image_pull() -> Case:
    agent = an_agent(warm__image="registry.example/worker:2")
    image = '"registry.example/worker:2"'
    message = (
        f"Back-off pulling image {image}: ErrImagePull: rpc error: code = NotFound desc = failed to pull and "
        f"unpack image {image}: failed to resolve reference {image}: registry.example/worker:2: not found"
    )
    return agent, a_world([waits(agent, "ImagePullBackOff", message)]), None


def unschedulable() -> Case:
    agent = an_agent(**BURST)
    message = (
        "0/3 nodes are available: 1 node(s) had untolerated taint {gpu: reserved}, 2 Insufficient "
        "nvidia.com/gpu. preemption: 0/3 nodes are available: 3 Preemption is not helpful for scheduling."
    )
    scheduled = {"status": "False", "reason": "Unschedulable", "message": message}
    facts = pod(agent, None, not_ready(), PodScheduled=scheduled)
    return agent, a_world([facts], burst=DEPLOYED), None


def crash_loop() -> Case:
    agent = an_agent()
    log = (
        "loading weights from /models/moshi\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity "
        "of 15.77 GiB of which 1.20 GiB is free.\n"
    )
    message = "back-off 2m40s restarting failed container=worker pod=desk-0_ns(0b7e3a52)"
    last = {"terminated": {"reason": "Error", "exitCode": 1, "message": log}}
    return (
        agent,
        a_world([waits(agent, "CrashLoopBackOff", message, lastState=last, restartCount=5)]),
        None,
    )


def failing_readiness() -> Case:
    agent = an_agent(**BURST)
    worker = {"started": True, "state": {"running": {"startedAt": STARTED}}}
    return (
        agent,
        a_world([pod(agent, worker, not_ready(NOW - 40))], {"desk-0": 2}, burst=DEPLOYED),
        None,
    )


def missing_caller_keys() -> Case:
    agent = an_agent(
        access={"apiKeysSecretRef": {"name": "callers"}, "public": False},
    )
    return agent, a_world([healthy(agent)], access=caller_keys_missing(agent, None)), None


def missing_model_token() -> Case:
    agent = an_agent(
        engine={"type": "moshi", "model": "a/b", "tokenSecretRef": {"name": "hugging-face"}}
    )
    facts = waits(agent, "CreateContainerConfigError", 'secret "hugging-face" not found')
    return agent, a_world([facts], tokens=hub_token_missing(agent, None)), None


def malformed_hook_secret() -> Case:
    hook = {"url": "https://policy.example/v1", "tokenSecretRef": {"name": "policy-hook"}}
    agent = an_agent(
        engine={"type": "moshi", "model": "a/b", "stt": "a/c", "policy": {"hook": hook}}
    )
    words = hook_token_missing(agent, {"token": "two words"})
    return agent, a_world([healthy(agent)], tokens=words), None


def malformed_modal_secret() -> Case:
    agent = an_agent(**BURST)
    assert agent.burst is not None
    words = credentials_missing(agent.burst, {"token-id": "ak-1"})
    return agent, a_world([healthy(agent)], burst=BurstFacts(credentials=words)), None


def modal_refused() -> Case:
    return modal_failed(BurstFacts(), BurstReason.CREDENTIALS_REFUSED, "Token validation failed")


def modal_limit() -> Case:
    message = "Workspace limit reached: at most 10 GPUs on the Starter plan."
    return modal_failed(DEPLOYED, BurstReason.LIMIT_REACHED, message)


def modal_full() -> Case:
    """Calls go on in the containers that there are; a gateway was refused for one more, twice in a row."""
    limit = Limit(containers=6, since=NOW - 1500, at=NOW - 60, refusals=2)
    facts = replace(DEPLOYED, running={"us-east": 6}, limit=limit)
    agent = an_agent(**BURST)
    return agent, a_world([healthy(agent)], {"desk-0": 4}, burst=facts), None


def budget_spent() -> Case:
    """At eight in the morning, after a busy night: what ten containers may cost yet is more than is left of the day."""
    agent = an_agent(
        **BURST, burst__modal__minContainers=2, burst__modal__budget={"perHour": 20, "perDay": 60}
    )
    assert agent.burst is not None
    agreed = terms(agent, agent.burst, prices.read(), DEPLOYED.standing)
    assert agreed is not None
    held = 20 * agreed.call_worst
    gateway = Gateway(spent=21.5, reserved=held, granted=21.5 + held, starts=412, heard=NOW)
    account = Account(at=NOW, day=55.9, containers=10, gateways={"g0": gateway})
    assert shut(account, agreed, NOW, before=False)
    facts = replace(DEPLOYED, account=account, terms=agreed, capped=True)
    world = a_world([healthy(agent)], {"desk-0": 4}, burst=facts)
    return agent, replace(world, traffic=replace(world.traffic, burst=20)), None


def modal_failed(facts: BurstFacts, reason: BurstReason, message: str) -> Case:
    agent = an_agent(**BURST)
    error = BurstError(reason, message)
    for _ in range(3):
        facts = failed(facts, "build", str(error))
    return agent, a_world([healthy(agent)], burst=replace(facts, failed_at=NOW)), None


def shortfall() -> Case:
    agent = an_agent(
        **BURST,
        burst__modal__minContainers=4,
        burst__modal__bufferContainers=6,
        burst__modal__slotsPerContainer=1,
        burst__modal__maxContainers=200,
        warm={"minPods": 1, "maxPods": 3, "slotsPerPod": 2},
        slo={"callsAtOnce": 200},
    )
    return agent, a_world([healthy(agent)], burst=DEPLOYED, slots=2), None


def infeasible() -> Case:
    agent = an_agent(slo={"callsAtOnce": 200})
    return agent, a_world([healthy(agent)]), None


def template_rejected() -> Case:
    agent = an_agent(warm__template={"affinity": {"nodeAffinity": {"requierd": {}}}})
    message = (
        'Pod in version "v1" cannot be handled as a Pod: strict decoding error: unknown field '
        '"spec.affinity.nodeAffinity.requierd"'
    )
    return agent, a_world(), ApiError(400, "BadRequest", message)


def missing_priority_class() -> Case:
    agent = an_agent(**BURST, warm__template={"priorityClassName": "gold"})
    message = 'pods "desk-0" is forbidden: no PriorityClass with name gold was found'
    return agent, a_world(burst=DEPLOYED), ApiError(403, "Forbidden", message)


def unknown_gpu_product() -> Case:
    agent = an_agent(**BURST, warm__gpu={"product": "NVIDIA-L5"})
    message = (
        "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector. preemption: 0/3 nodes "
        "are available: 3 Preemption is not helpful for scheduling."
    )
    scheduled = {"status": "False", "reason": "Unschedulable", "message": message}
    facts = pod(agent, None, not_ready(), PodScheduled=scheduled)
    return agent, a_world([facts], burst=DEPLOYED), None


def quota() -> Case:
    agent = an_agent(warm__minPods=2)
    message = (
        'pods "desk-1" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, '
        "used: requests.nvidia.com/gpu=1, limited: requests.nvidia.com/gpu=1"
    )
    return agent, a_world([healthy(agent)]), ApiError(403, "Forbidden", message)


def terminating_namespace() -> Case:
    agent = an_agent(warm__minPods=2)
    message = (
        'pods "desk-1" is forbidden: unable to create new content in namespace ns because it is being '
        "terminated"
    )
    return agent, a_world([healthy(agent)]), ApiError(403, "Forbidden", message)


def lost_node() -> Case:
    agent = an_agent(**BURST)
    lost = replace(healthy(agent), ready=False, node="gpu-7").on(NodeFacts(lost=True))
    return agent, a_world([lost], {"desk-0": 2}, burst=DEPLOYED), None


def missing_claim() -> Case:
    volumes = [{"name": "weights", "persistentVolumeClaim": {"claimName": "weights"}}]
    agent = an_agent(**BURST, warm__template={"volumes": volumes})
    message = (
        '0/3 nodes are available: persistentvolumeclaim "weights" not found. preemption: 0/3 nodes are '
        "available: 3 Preemption is not helpful for scheduling."
    )
    scheduled = {"status": "False", "reason": "Unschedulable", "message": message}
    facts = pod(agent, None, not_ready(), PodScheduled=scheduled)
    return agent, a_world([facts], burst=DEPLOYED), None


def missing_config_map() -> Case:
    volumes = [{"name": "phrases", "configMap": {"name": "phrases"}}]
    agent = an_agent(warm__template={"volumes": volumes})
    scheduled = {"status": "True", "lastTransitionTime": STARTED}
    facts = pod(
        agent,
        {"state": {"waiting": {"reason": "ContainerCreating"}}},
        not_ready(),
        PodScheduled=scheduled,
    )
    assert facts.mounting is not None
    words = 'MountVolume.SetUp failed for volume "phrases" : configmap "phrases" not found'
    return agent, a_world([replace(facts, unmounted=words)]), None


def few_slots() -> Case:
    agent = an_agent(warm__minPods=1)
    return agent, a_world([healthy(agent)], {"desk-0": 2}, slots=3), None


def unlinked_worker() -> Case:
    agent = an_agent()
    return agent, a_world([healthy(agent)], {}), None


def silent_gateways() -> Case:
    agent = an_agent()
    return agent, a_world([healthy(agent)], {}, known=False, silent=True), None


def cordoned_node() -> Case:
    agent = an_agent(**BURST)
    node = NodeFacts(leaving=GOING["ToBeDeletedByClusterAutoscaler"])
    leaving = replace(healthy(agent), node="gpu-7").on(node)
    return agent, a_world([leaving], {"desk-0": 2}, burst=DEPLOYED), None


CASES: dict[str, Callable[[], Case]] = {
    "image-pull": image_pull,
    "unschedulable": unschedulable,
    "crash-loop": crash_loop,
    "failing-readiness": failing_readiness,
    "missing-caller-keys": missing_caller_keys,
    "missing-model-token": missing_model_token,
    "malformed-hook-secret": malformed_hook_secret,
    "malformed-modal-secret": malformed_modal_secret,
    "modal-refused": modal_refused,
    "modal-limit": modal_limit,
    "modal-full": modal_full,
    "budget-spent": budget_spent,
    "quota": quota,
    "terminating-namespace": terminating_namespace,
    "lost-node": lost_node,
    "cordoned-node": cordoned_node,
    "unlinked-worker": unlinked_worker,
    "silent-gateways": silent_gateways,
    "few-slots": few_slots,
    "missing-claim": missing_claim,
    "missing-config-map": missing_config_map,
    "template-rejected": template_rejected,
    "shortfall": shortfall,
    "infeasible": infeasible,
    "missing-priority-class": missing_priority_class,
    "unknown-gpu-product": unknown_gpu_product,
}


# --- what is told ------------------------------------------------------------------------------------------


MISTAKES: dict[str, Json] = {
    "max-below-min": {"warm": {"minPods": 3, "maxPods": 2}},
    "not-a-pattern": {"engine": {"type": "speech", "replies": [{"match": "(", "say": "?"}]}},
}
"""Edits that make no sense. The first is refused by the API server, unless its definition of agents is older."""


def mistaken(case: str) -> str:
    """Status and Events of an agent that was well, after an edit that makes no sense."""
    agent = an_agent()
    well = a_world([healthy(agent)])
    before = reported(
        agent, well, planned(agent, well, NOW - 600, ScalingMemory(), INSTALLATION), {}, NOW - 600
    )
    edited = an_object(**MISTAKES[case], metadata={"generation": 2})
    try:
        parsed(edited)
    except SpecError as error:
        status = rejected({**edited, "status": before}, error, NOW)
        return written(status, chosen(of_status(before, status), Memory(), NOW)[0])
    raise AssertionError(f"{case} makes sense")


def described(case: str) -> str:
    """Status and Events of a case, after the look that finds it where all was well before."""
    if case in MISTAKES:
        return mistaken(case)
    agent, world, refusal = CASES[case]()
    burst = DEPLOYED if world.burst.app else BurstFacts()
    well = a_world([healthy(agent)], burst=burst, slots=agent.warm.slots_per_pod)
    earlier = planned(agent, well, NOW - 600, ScalingMemory(), INSTALLATION)
    before = reported(agent, well, earlier, {}, NOW - 600)
    # What must last before it is told has lasted.
    begun = planned(agent, world, NOW - UNLINKED_SECONDS, earlier.memory, INSTALLATION)
    unlinked = begun.memory.unlinked
    plan = planned(agent, world, NOW, replace(earlier.memory, unlinked=unlinked), INSTALLATION)
    why = of_refusal(agent, refusal.status, refusal.message) if refusal else None
    status = reported(agent, world, plan, before, NOW, why)
    look = Look(
        agent=agent,
        world=world,
        plan=plan,
        taken=() if refusal else plan.steps,
        installation=INSTALLATION,
        now=NOW,
    )
    news, _ = chosen([*of_status(before, status), *of_look(look, Memory())], Memory(), NOW)
    return written(status, news)


def written(status: Json, news: Iterable[Event]) -> str:
    lines = ["Status:", *indented(shown(status)), "Events:"]
    lines += [f"  {event.kind} {event.reason}: {event.message}" for event in news] or ["  none"]
    return "\n".join(lines) + "\n"


def shown(status: Json) -> list[str]:
    """The parts that a person reads."""
    lines = ["Conditions:"]
    for one in status["conditions"]:
        lines += [f"  {one['type']}={one['status']} {one['reason']}", f"    {one['message']}"]
    last = status["lastDecision"]
    lines.append(f"Last decision: {last['pods']} pods at {last['time']}: {last['reason']}")
    for part in ("pods", "slots", "burst"):
        numbers = ", ".join(f"{name} {told(value)}" for name, value in status[part].items())
        lines.append(f"{part.capitalize()}: {numbers}")
    return lines


def indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def told(value: Any) -> str:
    """Of a list of objects their own values, of an object its entries."""
    if isinstance(value, dict):
        return " ".join(f"{name} {told(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " and ".join(" ".join(map(str, each.values())) for each in value)
    return str(value)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in (*CASES, *MISTAKES):
        (FOLDER / f"{case}.txt").write_text(described(case))


if __name__ == "__main__":
    main()
