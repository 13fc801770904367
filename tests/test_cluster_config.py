"""The parts of the real node that need no root: addresses, command lines, images, and what is refused."""

import hashlib
import ipaddress
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from trunkline_dev.cluster import Cluster, ClusterError, components, dns, host, images, network
from trunkline_dev.cluster import cluster as cluster_module
from trunkline_dev.cluster.components import Places
from trunkline_dev.cluster.node import MARK, RECORD, Node

AT = Places(
    folder=Path("/cluster"),
    programs=Path("/programs"),
    containerd=Path("/usr/bin/containerd"),
    runc=Path("/usr/sbin/runc"),
    cni=Path("/usr/lib/cni"),
)
DOCUMENTATION = ipaddress.IPv4Network("198.51.100.0/24")
PODS = ipaddress.IPv4Network("10.244.0.0/16")


def test_addresses_are_nobodys_and_apart() -> None:
    ranges = [ipaddress.IPv4Network(text, strict=False) for text in network.RANGES]
    assert all(any(own.subnet_of(free) for free in (DOCUMENTATION, PODS)) for own in ranges)
    assert not any(a.overlaps(b) for a in ranges for b in ranges if a is not b)
    link, _, services = ranges
    assert {
        ipaddress.ip_address(network.HOST_ADDRESS),
        ipaddress.ip_address(network.NODE_ADDRESS),
    } == (set(link.hosts()))
    # The API server takes the first address of its range for itself.
    assert ipaddress.ip_address(network.API_SERVICE_ADDRESS) == next(services.hosts())
    assert ipaddress.ip_address(network.DNS_ADDRESS) in services


def test_the_node_has_no_way_out() -> None:
    """A default route inside would let pods reach what the machine forwards to."""
    assert not [command for command in network.inside() if "route" in command]
    assert network.cni()["plugins"][0]["ipMasq"] is False


@pytest.mark.parametrize(
    ("routes", "taken"),
    [
        ("default via 192.0.2.1 dev eth0\n192.0.2.0/24 dev eth0 scope link", None),
        ("10.244.0.0/24 via 198.51.100.2 dev trunkline0", None),
        ("10.244.0.0/16 dev cni0 scope link src 10.244.0.1", network.POD_RANGE),
        ("unreachable 10.0.0.0/8\n10.244.0.7 dev cali1 scope link", network.POD_RANGE),
        ("10.244.1.0/25 dev wg0", network.SERVICE_RANGE),
    ],
)
def test_a_range_in_use_is_named(routes: str, taken: str | None) -> None:
    told = host.taken_range(routes)
    assert (told is None) if taken is None else (told is not None and taken in told)


def test_hierarchies_of_either_version() -> None:
    hybrid = [
        ("/", "ext4", "rw"),
        ("/sys/fs/cgroup/cpu", "cgroup", "rw,relatime,cpu"),
        ("/sys/fs/cgroup/systemd", "cgroup", "rw,relatime,name=systemd"),
        ("/sys/fs/cgroup/unified", "cgroup2", "rw,relatime"),
    ]
    assert host.hierarchies(hybrid) == {
        Path("/sys/fs/cgroup/cpu"): {"cpu"},
        Path("/sys/fs/cgroup/systemd"): frozenset(),
        Path("/sys/fs/cgroup/unified"): frozenset(),
    }


def test_only_a_program_without_a_linker_is_static() -> None:
    shell = shutil.which("sh")
    assert shell is not None
    assert not host.is_static(Path(shell).resolve().read_bytes()), "a usual program has a linker"
    assert not host.is_static(b"#!/bin/sh\n")
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    header[32], header[54], header[56] = 64, 56, 1  # One segment, right after the header.
    loaded, linked = (bytes([kind]) + bytes(55) for kind in (1, 3))  # PT_LOAD, PT_INTERP
    assert host.is_static(bytes(header) + loaded)
    assert not host.is_static(bytes(header) + linked)


def test_every_cluster_has_its_own_cgroup() -> None:
    first, second = (components.cgroup(Path(text)) for text in ("/a", "/b"))
    assert first != second
    assert first == components.cgroup(Path("/a"))
    assert components.kubelet(AT)["cgroupRoot"] == f"/{AT.cgroup}"


def test_cgroups_of_the_dead_are_swept_and_no_others(tmp_path: Path) -> None:
    """Folders stand for cgroups: one with something in it cannot be removed, as one in use cannot."""
    dead, used = (components.cgroup(Path(text)) for text in ("/dead", "/used"))
    (tmp_path / dead / "kubepods" / "pod1").mkdir(parents=True)
    (tmp_path / used / "kubepods").mkdir(parents=True)
    (tmp_path / used / "kubepods" / "process").touch()
    (tmp_path / "trunkline-mine").mkdir()
    host.sweep_cgroups(tmp_path, components.CGROUPS)
    assert {entry.name for entry in tmp_path.iterdir()} == {used, "trunkline-mine"}


def test_components_agree_with_each_other() -> None:
    commands = components.commands(AT)
    for name in ("kube-apiserver", "kube-controller-manager", "kube-router"):
        assert f"--service-cluster-ip-range={network.SERVICE_RANGE}" in commands[name]
    for name in ("kube-controller-manager", "kube-proxy"):
        assert f"--cluster-cidr={network.POD_RANGE}" in commands[name]
    users = {
        word.partition("=")[2]
        for command in commands.values()
        for word in command
        if word.startswith("--kubeconfig=")
    }
    assert users == {str(AT.kubeconfig(user)) for user in components.USERS}
    kubelet = components.kubelet(AT)
    assert kubelet["clusterDNS"] == [network.DNS_ADDRESS]
    assert kubelet["containerRuntimeEndpoint"] == f"unix://{components.CONTAINERD_SOCKET}"
    assert f'address = "{components.CONTAINERD_SOCKET}"' in components.containerd(AT)
    assert f'sandbox_image = "{images.PAUSE}"' in components.containerd(AT)


def test_dns_is_where_pods_look_for_it() -> None:
    manifests = dns.manifests()
    assert manifests["/api/v1/namespaces/kube-system/services/kube-dns"]["spec"]["clusterIP"] == (
        network.DNS_ADDRESS
    )
    pod = manifests[dns.DEPLOYMENT_PATH]["spec"]["template"]
    assert pod["metadata"]["labels"] == {"k8s-app": "kube-dns"}
    assert pod["spec"]["containers"][0]["image"] == images.COREDNS
    for path, manifest in manifests.items():
        metadata = manifest["metadata"]
        assert path.endswith(f"s/{metadata['name']}")
        assert ("/namespaces/" in path) == ("namespace" in metadata)


def test_an_archive_is_an_image_by_its_digests(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    image = images.Image(
        name="localhost/x:1", programs={"bin/x": program}, command=("/bin/x",), links={"bin/y": "x"}
    )
    archives = [tmp_path / "one.tar", tmp_path / "two.tar"]
    for archive in archives:
        image.write(archive)
    assert archives[0].read_bytes() == archives[1].read_bytes(), "the same input, other bytes"

    with tarfile.open(archives[0]) as tar:
        files = {m.name: file.read() for m in tar if (file := tar.extractfile(m)) is not None}
    blobs = {name: text for name, text in files.items() if name.startswith("blobs/sha256/")}
    assert all(name.endswith(hashlib.sha256(text).hexdigest()) for name, text in blobs.items())

    def blob(digest: str) -> bytes:
        return blobs[f"blobs/{digest.replace(':', '/')}"]

    (entry,) = json.loads(files["index.json"])["manifests"]
    assert entry["annotations"] == {"io.containerd.image.name": "localhost/x:1"}
    manifest = json.loads(blob(entry["digest"]))
    config = json.loads(blob(manifest["config"]["digest"]))
    assert config["config"]["Entrypoint"] == ["/bin/x"]
    (layer,) = manifest["layers"]
    assert config["rootfs"]["diff_ids"] == [layer["digest"]]
    (tmp_path / "layer.tar").write_bytes(blob(layer["digest"]))
    with tarfile.open(tmp_path / "layer.tar") as tar:
        assert tar.getmember("bin/x").mode == 0o755
        assert tar.getmember("bin/y").linkname == "x"


def test_down_leaves_a_folder_that_is_no_clusters(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ClusterError, match="no cluster's folder; nothing was touched"):
        Cluster(tmp_path).down()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_down_where_nothing_is_or_all_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    Cluster(folder).down()
    (folder / "logs").mkdir(parents=True)
    (folder / MARK).touch()
    Cluster(folder).down(keep_logs=True)
    assert {entry.name for entry in folder.iterdir()} == {"logs", MARK}
    Cluster(folder).down()
    assert not folder.exists()


def test_a_later_process_of_the_same_number_is_not_the_node(tmp_path: Path) -> None:
    """A record that outlived a restart of the machine must not make `down` kill a stranger."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        record = {"pid": stranger.pid, "birth": "1"}
        (tmp_path / MARK).touch()
        (tmp_path / RECORD).write_text(json.dumps(record))
        assert Node(tmp_path).pid is None
        Cluster(tmp_path).down()
        assert stranger.poll() is None
        assert stranger.stdin is not None
        stranger.stdin.write(b"\n")
    assert stranger.returncode == 0


def test_a_process_that_died_before_it_was_looked_at_is_not_the_node(tmp_path: Path) -> None:
    record = {"pid": 2**22 + 1, "birth": None}  # One more than the most that Linux gives.
    (tmp_path / RECORD).write_text(json.dumps(record))
    assert Node(tmp_path).pid is None


def test_commands_for_a_cluster_that_does_not_run_say_so(tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    with pytest.raises(ClusterError, match=r"cannot read the image archive .*image\.tar"):
        Cluster(tmp_path / "cluster").import_images([archive])
    archive.touch()
    with pytest.raises(ClusterError, match="no cluster runs in"):
        Cluster(tmp_path / "cluster").import_images([archive])


def test_what_a_program_needs_to_come_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cluster_module.PROXIES:
        monkeypatch.delenv(name, raising=False)
    cluster = Cluster(tmp_path)
    assert cluster.environment == {"KUBECONFIG": str(tmp_path / "kubeconfig")}
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "localhost")
    monkeypatch.delenv("no_proxy", raising=False)
    assert cluster.environment["NO_PROXY"] == ",".join(("localhost", *network.RANGES))
    assert cluster.environment["no_proxy"] == ",".join(network.RANGES)


def test_what_is_lacking_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    missing = host.missing_packages(str(tmp_path), ())
    assert missing == sorted({*host.PACKAGES.values(), host.BUSYBOX_PACKAGE, host.CNI_PACKAGE})
    told = host.lacking(missing)
    assert told.startswith("this machine lacks busybox-static, conntrack, containerd")
    assert told.endswith(f"; {host.INSTALL} installs it")
    with pytest.raises(ClusterError, match="there is no frobnicate on this machine"):
        host.run("frobnicate")
