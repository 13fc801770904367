"""The types of an agent's conditions, and the closed set of their reasons."""

from enum import StrEnum
from typing import Final


class Condition(StrEnum):
    """The types, in the order in which they are listed."""

    ACCEPTED = "Accepted"  # the spec makes sense
    WARM_READY = "WarmReady"  # the wanted pods are there and ready
    BURST_READY = "BurstReady"  # calls may go to Modal
    WITHIN_BUDGET = "WithinBudget"  # burst may cost more before it reaches its budget
    READY = "Ready"  # every rung that is declared takes calls


class Reason(StrEnum):
    """Why a condition is as it is; the message says it in words."""

    ACCEPTED = "Accepted"
    SPEC_INVALID = "SpecInvalid"
    INFEASIBLE = "Infeasible"  # it cannot hold the calls that it expects, whatever is started
    SHORTFALL = "Shortfall"  # what stands by is too little for them
    KEYS_MISSING = "KeysMissing"  # the Secret of callers' keys cannot be read
    TOKEN_MISSING = "TokenMissing"  # of the policy hook or of the Hub, likewise
    DELETING = "Deleting"
    PODS_READY = "PodsReady"
    NO_PODS_WANTED = "NoPodsWanted"
    NOT_SERVED_HERE = "NotServedHere"  # the agent's regions or its policy leave this cluster out
    PODS_STARTING = "PodsStarting"
    POD_UNSCHEDULABLE = "PodUnschedulable"
    VOLUME_MISSING = "VolumeMissing"  # a volume of the template is not there, or cannot be mounted
    POD_FAILING = "PodFailing"  # image pull, crash loop, wrong configuration
    NODE_NOT_READY = "NodeNotReady"  # a pod's node is silent, so the pod counts as none
    POD_UNREADY = "PodUnready"  # its worker runs, and is not ready any more
    POD_UNLINKED = "PodUnlinked"  # it is ready, and no gateway has it
    PODS_REFUSED = "PodsRefused"  # the API does not let the operator make one: a quota, a right
    TEMPLATE_REJECTED = "TemplateRejected"  # the API takes no such pod as `warm` asks for
    ROLLOUT_BLOCKED = "RolloutBlocked"  # an old pod has calls and there is no room for a new one
    BURST_READY = "BurstReady"
    BURST_OFF = "BurstOff"  # none is asked for, or policy forbids it
    BURST_DEPLOYING = "BurstDeploying"
    BURST_FAILING = "BurstFailing"
    SNAPSHOT_FALLBACK = "SnapshotFallback"  # calls are taken, by containers that start slower
    REGION_DOWN = "RegionDown"  # calls are taken in the other regions
    LIMIT_REACHED = "LimitReached"  # calls are taken, by no more containers than the workspace has
    CREDENTIALS_MISSING = "CredentialsMissing"
    WITHIN_BUDGET = "WithinBudget"
    NO_BUDGET = "NoBudget"
    BUDGET_SPENT = "BudgetSpent"
    BUDGET_TOO_SMALL = "BudgetTooSmall"  # for one call, or for what stands by
    BILL_DIFFERS = "BillDiffers"  # Modal bills something else than was reckoned
    PRICE_UNKNOWN = "PriceUnknown"  # so a budget cannot be held
    ANSWERING = "Answering"
    GATEWAYS_SILENT = "GatewaysSilent"  # the operator hears of none, so nobody knows
    NO_CAPACITY = "NoCapacity"


# Kubernetes allows 32 KiB in a message; a line that a person reads is shorter.
LONGEST_MESSAGE: Final = 1024

Verdict = tuple[Condition, bool | None, Reason, str]
"""A condition, whether it holds (None = nobody knows), why, and the same in words."""
