"""The addresses of the cluster, and the commands that put them in place. Pure.

The node has a network namespace of its own, joined to the machine by one link:

    this machine, 198.51.100.1  --  trunkline0 | eth0  --  198.51.100.2, the node
                                                              bridge, 10.244.0.0/24, its pods

The machine gets routes to pods and services over that link, the node none to anywhere else, so that
nothing in the cluster can talk to the outside. Pods and services share 10.244.0.0/16, so that a single
private range is taken. The link is from a range for documentation (RFC 5737); the others of these may
well be in use, as sandboxes give such addresses to what stands for the internet.
"""

from typing import Final

from trunkline_dev.kube import Json

LINK: Final = "trunkline0"
HOST_ADDRESS: Final = "198.51.100.1"
NODE_ADDRESS: Final = "198.51.100.2"
LINK_PREFIX: Final = 30
POD_RANGE: Final = "10.244.0.0/24"
SERVICE_RANGE: Final = "10.244.1.0/24"
RANGES: Final = (f"{HOST_ADDRESS}/{LINK_PREFIX}", POD_RANGE, SERVICE_RANGE)
API_SERVICE_ADDRESS: Final = "10.244.1.1"
DNS_ADDRESS: Final = "10.244.1.10"
API_PORT: Final = 6443
DOMAIN: Final = "cluster.local"

Command = tuple[str, ...]


def outside(pid: int, owner: str) -> tuple[Command, ...]:
    """On this machine: the link to the network of process `pid`, marked as `owner`'s."""
    return (
        ("ip", "link", "add", LINK, "type", "veth", "peer", "name", "eth0", "netns", str(pid)),
        ("ip", "address", "add", f"{HOST_ADDRESS}/{LINK_PREFIX}", "dev", LINK),
        ("ip", "link", "set", LINK, "alias", owner, "up"),
    )


def routes() -> tuple[Command, ...]:
    """On this machine, once the node's end is up."""
    return tuple(
        ("ip", "route", "add", network, "via", NODE_ADDRESS, "dev", LINK)
        for network in (POD_RANGE, SERVICE_RANGE)
    )


def inside() -> tuple[Command, ...]:
    """In the node's namespaces."""
    return (
        ("ip", "link", "set", "lo", "up"),
        ("ip", "address", "add", f"{NODE_ADDRESS}/{LINK_PREFIX}", "dev", "eth0"),
        ("ip", "link", "set", "eth0", "up"),
        # These are the namespace's own. The second lets network policies see what stays on the bridge.
        ("sysctl", "-qw", "net.ipv4.ip_forward=1"),
        ("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=1"),
    )


def cni() -> Json:
    """The configuration list for pods' interfaces."""
    bridge: Json = {
        "type": "bridge",
        "bridge": "pods",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,  # A pod may reach itself through its Service.
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": POD_RANGE}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, ports]}
