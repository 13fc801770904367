"""The certificates of an installation on loopback, and which links of the rigs use them."""

from functools import cache
from pathlib import Path

from trunkline_dev.authority import Authority
from trunkline_runtime.contract import ENV_TLS_CA, ENV_TLS_CERT, ENV_TLS_KEY, worker_server_name
from trunkline_runtime.tls import MountedIdentity, WorkerTls, proving, trusting


class Pki:
    """One CA. The gateway's certificate is for loopback and the name `gateways`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.authority.issue("tls", "CN=gateway", names=["gateways"])
        self.ca = (folder / "ca.crt").read_text()
        self.gateway = MountedIdentity(folder)

    def pem(self, file: str, *names: str) -> tuple[bytes, bytes]:
        """A new certificate for these names, and its key."""
        self.authority.issue(file, f"CN={file}", names=names)
        return (self.folder / f"{file}.crt").read_bytes(), (
            self.folder / f"{file}.key"
        ).read_bytes()

    @cache  # noqa: B019 - it lives as long as the tests
    def worker(self, agent: str) -> WorkerTls:
        certificate, key = self.pem(agent.replace("/", "-"), worker_server_name(agent))
        return WorkerTls(gateways=trusting(self.ca), calls=proving(certificate, key))

    def environment(self, agent: str) -> dict[str, str]:
        """What makes a worker's links TLS, as in a pod."""
        certificate, key = self.pem(f"{agent.replace('/', '-')}-env", worker_server_name(agent))
        return {
            ENV_TLS_CA: self.ca,
            ENV_TLS_CERT: certificate.decode(),
            ENV_TLS_KEY: key.decode(),
        }


class Links:
    """What the rigs ask: without a `pki` their links are plain."""

    pki: Pki | None = None
