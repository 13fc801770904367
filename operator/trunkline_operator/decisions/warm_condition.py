"""Whether the wanted pods are there and ready; if not, what keeps them, and what to do about it."""

from typing import Final

from trunkline_operator.agent.policy import elsewhere
from trunkline_operator.agent.spec import VoiceAgent
from trunkline_operator.decisions.conditions import Condition, Reason, Verdict
from trunkline_operator.decisions.plan import Plan
from trunkline_operator.decisions.template import node_selector
from trunkline_operator.decisions.world import PodFacts, Refusal

# The scheduler, of claims that are not there, not bound, or going.
CLAIM: Final = "persistentvolumeclaim"

# The scheduler, of nodes that lack a label.
SELECTOR_MISSED: Final = "didn't match Pod's node affinity/selector"


def warm_ready(
    agent: VoiceAgent,
    plan: Plan,
    pods: list[PodFacts],
    refused: Refusal | None,
    *,
    overflow: bool,
) -> Verdict:
    """Live numbers stay out of the message: it would be written again with every call."""
    if plan.scaling is None:
        words = f"{len(pods)} pods are left, and each ends with its last call"
        return Condition.WARM_READY, False, Reason.DELETING, words
    wanted = plan.scaling.pods
    ready = answering(plan, pods)
    count = f"{ready} of {wanted} pods are ready"
    if plan.short:
        count += f"; {plan.short}"
    if ready >= wanted:
        if refused and plan.outdated:
            reason, said = _refused(refused)
            words = f"{count}; {plan.outdated} of an older template stay; {said}; calls go on there"
            return Condition.WARM_READY, True, reason, words
        if plan.blocked:
            words = f"{count}; {plan.outdated} of an older template stay until their calls end"
            help_ = "raise warm.maxPods or add burst.modal to replace them sooner"
            return Condition.WARM_READY, True, Reason.ROLLOUT_BLOCKED, f"{words}: {help_}"
        if away := elsewhere(agent):
            return Condition.WARM_READY, True, Reason.NOT_SERVED_HERE, away
        reason = Reason.PODS_READY if wanted else Reason.NO_PODS_WANTED
        advice = plan.scaling.advice
        return Condition.WARM_READY, True, reason, f"{count}; {advice}" if advice else count
    meanwhile = _meanwhile(ready, overflow)
    for pod in pods:
        if pod.node_lost and not (pod.draining or pod.terminating):
            words = f"{count}; {pod.name}: its node {pod.node} is not ready, so it counts as none"
            words += f". Another is made in its place; {meanwhile}"
            return Condition.WARM_READY, False, Reason.NODE_NOT_READY, words
    for pod in pods:
        if pod.active and not pod.ready and (trouble := _pod_trouble(agent, pod)):
            reason, said, next_ = trouble
            words = f"{count}; {pod.name}: {said}. {next_}; {meanwhile}"
            return Condition.WARM_READY, False, reason, words
    if plan.unlinked:
        words = f"{ready} of {wanted} pods take calls; {_unlinked(plan)}; {meanwhile}"
        return Condition.WARM_READY, False, Reason.POD_UNLINKED, words
    if refused:
        reason, said = _refused(refused)
        return Condition.WARM_READY, False, reason, f"{count}; {said}; {meanwhile}"
    return Condition.WARM_READY, False, Reason.PODS_STARTING, count


def answering(plan: Plan, pods: list[PodFacts]) -> int:
    """How many pods take calls."""
    return sum(pod.active and pod.ready and pod.name not in plan.unlinked for pod in pods)


def _unlinked(plan: Plan) -> str:
    name = min(plan.unlinked)
    return (
        f"{name}: it runs, and no gateway has a link from it. It dials them again and again: see kubectl logs {name}, "
        "and whether network policies let it reach them"
    )


def _refused(refused: Refusal) -> tuple[Reason, str]:
    """Why no pod can be made, in the words of the API, and what happens next."""
    words = refused.words.rstrip(".")
    if refused.template:
        said = f"the API takes no such pod: {words}. Change that in warm, and it is tried at once"
        return Reason.TEMPLATE_REJECTED, said
    return Reason.PODS_REFUSED, f"no pod can be made: {words}. It is tried again within 30 s"


def _pod_trouble(agent: VoiceAgent, pod: PodFacts) -> tuple[Reason, str, str] | None:
    """What keeps a pod from taking calls: the reason, the words of Kubernetes, and what happens next."""
    # Of a claim that is not there the scheduler tells, of all other volumes the kubelet.
    if words := pod.unmounted or (pod.unschedulable if CLAIM in pod.unschedulable.lower() else ""):
        next_ = "It starts once that is there: see warm.template.volumes"
        return Reason.VOLUME_MISSING, words.rstrip("."), next_
    if pod.unschedulable:
        next_ = "It starts once a node has room: add one, or free what the message names"
        # The scheduler's words for a label that no node has name neither the label nor its value.
        if SELECTOR_MISSED in pod.unschedulable and (wanted := node_selector(agent)):
            labels = ", ".join(f"{name}={value}" for name, value in sorted(wanted.items()))
            next_ = f"It starts once a node has room that is labelled {labels}"
        return Reason.POD_UNSCHEDULABLE, pod.unschedulable.rstrip("."), next_
    if pod.unready:
        # Gateways go by their links, not by this probe.
        next_ = f"Calls on it go on while gateways reach it: see kubectl logs {pod.name}"
        return Reason.POD_UNREADY, pod.unready, next_
    if not pod.trouble:
        return None
    if (
        "Image" in pod.trouble.partition(":")[0]
    ):  # ErrImagePull, ImagePullBackOff, InvalidImageName, …
        next_ = "The pull is tried again: check warm.image, and that nodes may pull it"
    elif pod.trouble.startswith("CreateContainerConfigError"):
        next_ = "It starts once what is named is there"
    else:
        next_ = f"It is restarted, later each time: see kubectl logs --previous {pod.name}"
    return Reason.POD_FAILING, pod.trouble.rstrip("."), next_


def _meanwhile(ready: int, overflow: bool) -> str:
    """Where calls go that the missing pods would have taken."""
    there = "calls go to the ready pods" if ready else "no pod takes calls"
    if overflow:
        return f"{there} and to burst" if ready else "calls go to burst"
    return f"{there}, and are refused when those are full" if ready else "calls are refused"
