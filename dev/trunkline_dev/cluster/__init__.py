"""A real Kubernetes node on this machine, in namespaces of its own, for end-to-end tests.

    python -m trunkline_dev.cluster install
    python -m trunkline_dev.cluster up
    python -m trunkline_dev.cluster down

Unlike `trunkline_dev.controlplane` it runs containers: kubelet, containerd and runc, kube-proxy,
CoreDNS, and kube-router for network policies. It needs Linux and root; `usable` says what else.
"""

from trunkline_dev.cluster.cluster import Cluster, default_folder
from trunkline_dev.cluster.failures import ClusterError
from trunkline_dev.cluster.host import usable

__all__ = ["Cluster", "ClusterError", "default_folder", "usable"]
