"""The programs of a node: their command lines and their configuration. Pure.

All of them run in the node's namespaces, where ports and paths are the usual ones and collide with
nothing of this machine's.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trunkline_dev.cluster import images
from trunkline_dev.cluster.network import (
    API_PORT,
    DNS_ADDRESS,
    DOMAIN,
    NODE_ADDRESS,
    POD_RANGE,
    SERVICE_RANGE,
)
from trunkline_dev.kube import Json

NODE: Final = "trunkline"
CGROUPS: Final = "trunkline-" + "[0-9a-f]" * 12
"""The names that `cgroup` gives, as a pattern of file names."""
CONTAINERD_SOCKET: Final = "/run/containerd/containerd.sock"
_ETCD_URL: Final = "http://127.0.0.1:2379"
_LOCAL: Final = ("--leader-elect=false", "--bind-address=127.0.0.1")


def cgroup(folder: Path) -> str:
    """The name of the cgroup for the pods of the cluster in `folder`, which no other cluster has."""
    return f"trunkline-{hashlib.sha256(bytes(folder)).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where a node has its files, and where this machine has the programs."""

    folder: Path
    programs: Path
    containerd: Path
    runc: Path
    cni: Path

    @property
    def cgroup(self) -> str:
        return cgroup(self.folder)

    @property
    def pki(self) -> Path:
        return self.folder / "pki"

    @property
    def config(self) -> Path:
        return self.folder / "config"

    def kubeconfig(self, user: str) -> Path:
        return self.config / f"{user}.kubeconfig"


USERS: Final = {
    "admin": "O=system:masters,CN=admin",
    "controller-manager": "CN=system:kube-controller-manager",
    "scheduler": "CN=system:kube-scheduler",
    "proxy": "CN=system:kube-proxy",
    "kubelet": f"O=system:nodes,CN=system:node:{NODE}",
}
"""Who speaks to the API server, by the name of the certificate."""


def commands(at: Places) -> dict[str, tuple[str, ...]]:
    """Every component's command line, by name."""
    return {
        "etcd": etcd(at),
        "containerd": (str(at.containerd), "--config", str(at.config / "containerd.toml")),
        "kube-apiserver": api_server(at),
        "kube-controller-manager": controller_manager(at),
        "kube-scheduler": (
            str(at.programs / "kube-scheduler"),
            f"--kubeconfig={at.kubeconfig('scheduler')}",
            *_LOCAL,
        ),
        "kubelet": (
            str(at.programs / "kubelet"),
            f"--config={at.config / 'kubelet.json'}",
            f"--kubeconfig={at.kubeconfig('kubelet')}",
            f"--hostname-override={NODE}",
            f"--node-ip={NODE_ADDRESS}",
        ),
        "kube-proxy": proxy(at),
        "kube-router": firewall(at),
    }


def etcd(at: Places) -> tuple[str, ...]:
    return (
        str(at.programs / "etcd"),
        f"--data-dir={at.folder / 'etcd'}",
        "--unsafe-no-fsync",
        "--log-level=warn",
        # A lone member elects itself after a random part of this, up to a second by default.
        "--heartbeat-interval=10",
        "--election-timeout=50",
        f"--listen-client-urls={_ETCD_URL}",
        f"--advertise-client-urls={_ETCD_URL}",
    )


def api_server(at: Places) -> tuple[str, ...]:
    pki = at.pki
    return (
        str(at.programs / "kube-apiserver"),
        f"--etcd-servers={_ETCD_URL}",
        "--bind-address=0.0.0.0",
        f"--advertise-address={NODE_ADDRESS}",
        f"--secure-port={API_PORT}",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged",
        f"--client-ca-file={pki / 'ca.crt'}",
        f"--tls-cert-file={pki / 'apiserver.crt'}",
        f"--tls-private-key-file={pki / 'apiserver.key'}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki / 'apiserver.key'}",
        f"--service-account-signing-key-file={pki / 'apiserver.key'}",
        f"--kubelet-client-certificate={pki / 'admin.crt'}",
        f"--kubelet-client-key={pki / 'admin.key'}",
        "--kubelet-preferred-address-types=InternalIP",
    )


def controller_manager(at: Places) -> tuple[str, ...]:
    return (
        str(at.programs / "kube-controller-manager"),
        f"--kubeconfig={at.kubeconfig('controller-manager')}",
        *_LOCAL,
        "--use-service-account-credentials",
        f"--service-account-private-key-file={at.pki / 'apiserver.key'}",
        f"--root-ca-file={at.pki / 'ca.crt'}",
        # kube-router wants to find the node's range in its Node object.
        "--allocate-node-cidrs",
        f"--cluster-cidr={POD_RANGE}",
        "--node-cidr-mask-size=24",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--kube-api-qps=300",
        "--kube-api-burst=500",
    )


def proxy(at: Places) -> tuple[str, ...]:
    return (
        str(at.programs / "kube-proxy"),
        f"--kubeconfig={at.kubeconfig('proxy')}",
        "--proxy-mode=nftables",
        f"--cluster-cidr={POD_RANGE}",
        f"--hostname-override={NODE}",
        "--healthz-bind-address=127.0.0.1",
        "--metrics-bind-address=127.0.0.1",
        "--conntrack-max-per-core=0",  # The table's size is the machine's to set.
        "--oom-score-adj=0",  # Lower needs a capability that not every root has.
    )


def firewall(at: Places) -> tuple[str, ...]:
    """kube-router enforces network policies and nothing else; the bridge plugin enforces none."""
    return (
        str(at.programs / "kube-router"),
        f"--kubeconfig={at.kubeconfig('admin')}",
        f"--hostname-override={NODE}",
        "--run-firewall=true",
        "--run-router=false",
        "--run-service-proxy=false",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--metrics-port=0",
    )


def kubelet(at: Places) -> Json:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(at.pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": DOMAIN,
        "resolvConf": str(at.config / "resolv.conf"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{at.cgroup}",
        "failCgroupV1": False,  # Development machines still have it.
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,  # Images that were imported cannot be pulled again.
        "shutdownGracePeriod": "0s",
        "nodeStatusUpdateFrequency": "2s",
    }


def containerd(at: Places) -> str:
    """Its configuration; paths that are not named are the usual ones, of the node alone."""
    return f"""\
version = 2
oom_score = 0
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{images.PAUSE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{at.cni}"
    conf_dir = "{at.config / "cni"}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "{at.runc}"
      SystemdCgroup = false
"""


def kubeconfig(at: Places, user: str) -> Json:
    """Of one of USERS; from this machine and from the node alike."""
    pki = at.pki
    server = f"https://{NODE_ADDRESS}:{API_PORT}"
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": NODE,
                "cluster": {"server": server, "certificate-authority": str(pki / "ca.crt")},
            }
        ],
        "users": [
            {
                "name": user,
                "user": {
                    "client-certificate": str(pki / f"{user}.crt"),
                    "client-key": str(pki / f"{user}.key"),
                },
            }
        ],
        "contexts": [{"name": NODE, "context": {"cluster": NODE, "user": user}}],
        "current-context": NODE,
    }
