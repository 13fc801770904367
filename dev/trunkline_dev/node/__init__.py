"""A Kubernetes node whose containers are plain processes of this machine, each pod on its own 127.x address.

It stands in for scheduler and kubelet: it binds the pods that fit, runs them, probes them, restarts
them, ends them gracefully, and serves their logs to `kubectl logs`. What it cannot do it does not
ignore: such a pod waits with CreateContainerConfigError and a sentence (see `support`).

    python -m trunkline_dev.node --kubeconfig F --logs DIR --image IMAGE=COMMAND
"""

from trunkline_dev.node.config import NodeConfig, NodeConfigError
from trunkline_dev.node.node import Node, running

__all__ = ["Node", "NodeConfig", "NodeConfigError", "running"]
