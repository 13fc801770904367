"""`warm.template` and `warm.gpu.product` as fields of a pod and of its container. Pure.

What they leave empty is left out, so that a pod of an agent without a template has none of it.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from trunkline_operator.agent.spec import PRODUCT_LABEL, Json, VoiceAgent
from trunkline_operator.decisions.world import Refusal
from trunkline_runtime.contract import LABEL_AGENT

# What the API answers to a pod whose fields make no sense, and to one with a field that it does not know.
UNFIT: Final = (400, 422)


def pod_fields(agent: VoiceAgent) -> Json:
    """For `spec` of a pod."""
    template = agent.warm.template
    own = {"labelSelector": {"matchLabels": {LABEL_AGENT: agent.name}}}
    return _filled(
        {
            "nodeSelector": node_selector(agent),
            "tolerations": list(template.tolerations),
            "affinity": template.affinity,
            "topologySpreadConstraints": [spread | own for spread in template.spread],
            "volumes": list(template.volumes),
            "imagePullSecrets": list(template.image_pull_secrets),
            "priorityClassName": template.priority_class,
            "serviceAccountName": template.service_account,
            "runtimeClassName": template.runtime_class,
        }
    )


def container_fields(agent: VoiceAgent) -> Json:
    """For the worker's container. The environment is added to its own, which no entry of this one names."""
    template = agent.warm.template
    return _filled({"volumeMounts": list(template.volume_mounts), "env": list(template.env)})


def node_selector(agent: VoiceAgent) -> dict[str, str]:
    """Labels that a node must have, the GPU's product among them."""
    product = agent.warm.gpu.product
    return {**agent.warm.template.node_selector, **({PRODUCT_LABEL: product} if product else {})}


def refusal(agent: VoiceAgent, status: int, words: str) -> Refusal:
    """What it means that the API lets no pod of the agent be made."""
    template = agent.warm.template
    named = (template.priority_class, template.service_account, template.runtime_class)
    missing = "found" in words and any(_names(words, name) for name in named if name)
    return Refusal(words, template=status in UNFIT or missing)


def _names(words: str, name: str) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", words) is not None


def _filled(fields: Mapping[str, Any]) -> Json:
    return {name: value for name, value in fields.items() if value}
