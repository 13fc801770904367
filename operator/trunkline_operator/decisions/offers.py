"""How many slots pods really have: what the agent asks for, and what workers tell. Pure.

A worker may offer fewer slots than it was told: its GPU holds fewer in time, or its engine has given some up. What a
worker has told counts for its pod. What a pod that has told nothing yet will offer is taken from the agent, where it
names a number, and from the other pods, where it leaves that to them (`auto`).
"""

from collections.abc import Sequence
from dataclasses import replace

from trunkline_operator.agent.spec import VoiceAgent
from trunkline_operator.decisions.view import View
from trunkline_operator.decisions.world import PodFacts, Traffic


def measured(agent: VoiceAgent, traffic: Traffic) -> VoiceAgent:
    """The agent with the slots of its pods as its workers tell them, where it leaves that to them."""
    workers = traffic.workers.values()
    if not agent.warm.slots_auto or not workers:
        return agent
    mean = sum(worker.slots for worker in workers) // len(workers)
    return replace(agent, warm=replace(agent.warm, slots_per_pod=max(mean, 1)))


def usual_slots(view: View) -> int:
    """What the next pod is expected to offer; at least 1."""
    named, told = view.agent.warm.slots_per_pod, [slots for _, slots in _told(view)]
    # One that offers fewer may be ill. Where several do, and none does better, so will the next.
    if view.agent.warm.slots_auto or len(told) < 2:
        return named
    return max(min(named, max(told)), 1)


def _told(view: View) -> list[tuple[str, int]]:
    """Pods of the current template and the slots that they offer. One of an older template was told another number."""
    workers = view.world.traffic.workers
    return [
        (pod.name, workers[pod.name].slots)
        for pod in view.pods
        if pod.active and view.current(pod) and pod.name in workers
    ]


def of(view: View, pods: Sequence[PodFacts]) -> tuple[int, ...]:
    """The slots of each of these pods, those first that would be kept longest; () if all have the usual number."""
    usual, workers = usual_slots(view), view.world.traffic.workers
    slots = {pod.uid: workers[pod.name].slots if pod.name in workers else usual for pod in pods}
    if all(each == usual for each in slots.values()):
        return ()
    return tuple(slots[pod.uid] for pod in sorted(pods, key=view.loss, reverse=True))


def short(view: View) -> str:
    """Which pod offers fewer slots than the agent names, and how many more do, in words; "" = none."""
    if view.agent.warm.slots_auto:
        return ""
    named = view.agent.warm.slots_per_pod
    few = [(name, slots) for name, slots in _told(view) if slots < named]
    if not few:
        return ""
    name, slots = few[0]
    words = f"{name} offers {slots} of {named} slots"
    return words if len(few) == 1 else f"{words}, and {len(few) - 1} more offer fewer than {named}"
