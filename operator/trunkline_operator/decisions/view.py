"""An agent and its world, as every rule of a plan looks at them: which pods are the agent's, and what is true of each. Pure."""

import math

from trunkline_operator.agent.policy import ladder
from trunkline_operator.agent.spec import VoiceAgent
from trunkline_operator.decisions.manifests import (
    GRACE_BEYOND_LAST_CALL,
    Installation,
    template_hash,
)
from trunkline_operator.decisions.world import Phase, PodFacts, World


class View:
    """What every rule below looks at."""

    __slots__ = ("agent", "installation", "now", "pods", "template", "world")

    def __init__(
        self, agent: VoiceAgent, world: World, now: float, installation: Installation
    ) -> None:
        self.agent, self.world, self.now, self.installation = agent, world, now, installation
        self.template = template_hash(agent, installation)
        # A pod of somebody else, or of an agent that had this name before, is not ours to touch.
        own = (pod for pod in world.pods if pod.owner == agent.uid)
        self.pods = sorted(own, key=lambda pod: pod.ordinal)

    def current(self, pod: PodFacts) -> bool:
        return pod.template == self.template and pod.ca == self.installation.ca

    def busy(self, pod: PodFacts) -> int | None:
        """The pod's calls; None = unknown. A worker that was never ready has none."""
        worker = self.world.traffic.workers.get(pod.name)
        if worker is None:
            return None if pod.started else 0
        return worker.busy

    def taking(self, pod: PodFacts) -> bool:
        """Calls are placed on it: it is ready, and a gateway has it."""
        return pod.ready and pod.name in self.world.traffic.workers

    def unborn(self, pod: PodFacts) -> bool:
        """It never had a worker."""
        return pod.phase is Phase.PENDING and self.busy(pod) == 0

    def broken(self, pod: PodFacts) -> bool:
        """Of an older template and not running: it holds no call and nobody waits for it."""
        return not self.current(pod) and not pod.started and self.busy(pod) == 0

    def stranded(self, pod: PodFacts) -> bool:
        """Of another CA than the gateways that report: it can link to none of them, and gets no new call."""
        return self.world.traffic.known and pod.ca != self.installation.ca

    def must_go(self, pod: PodFacts) -> bool:
        """It cannot stay where it is, whatever is wanted."""
        return self.stranded(pod) or bool(pod.node_leaving)

    def drained(self, pod: PodFacts) -> bool:
        """It was told to drain, and no call is left on it."""
        if pod.draining_since is None:
            return False
        if worker := self.world.traffic.workers.get(pod.name):
            return worker.drained
        return not pod.started or self.now >= self.last_call(pod.draining_since)

    def last_call(self, since: float) -> float:
        """When every call that was there at a time has ended: none outlives maxSeconds."""
        return since + self.agent.session.max_seconds + GRACE_BEYOND_LAST_CALL

    def burst_silent(self) -> bool:
        """No call is on burst, and no gateway would start one."""
        traffic = self.world.traffic
        return traffic.known and traffic.acknowledged and traffic.burst == 0

    def overflows(self) -> bool:
        """Calls that find no warm slot may go to burst."""
        facts = self.world.burst
        return ladder(self.agent).burst is not None and bool(facts.url)

    def loss(self, pod: PodFacts) -> tuple[bool, bool, float, int, int]:
        """How much is lost with a pod, least first: not ready, older template, few calls, few slots, high ordinal."""
        busy, worker = self.busy(pod), self.world.traffic.workers.get(pod.name)
        calls = math.inf if busy is None else busy
        slots = worker.slots if worker else self.agent.warm.slots_per_pod
        return pod.ready, self.current(pod), calls, slots, -pod.ordinal
