"""The relays that are compared: Trunkline's gateway and its peers, before one worker on loopback.

All of them hold a connection to the worker for each caller, on one core, with no compression and no log of calls
(the gateway alone writes its two lines a call). nginx and haproxy have their defaults, and as much room as needed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from load.peers import AGENT, SLOTS, WORKER_KEY
from load.rig import BenchError, Places, Process, free_ports

from trunkline_dev.authority import Authority
from trunkline_runtime.contract import (
    ENV_AGENT,
    ENV_ENGINE,
    ENV_GATEWAYS,
    ENV_HEALTH_PORT,
    ENV_HOST,
    ENV_OPERATOR_TOKEN,
    ENV_PORT,
    ENV_SLOTS,
    ENV_WORKER,
    ENV_WORKER_KEY,
    READYZ_PATH,
    worker_server_name,
)

TRUNKLINE: Final = "Trunkline"
ASYNCIO: Final = "websockets on asyncio"
UVLOOP: Final = "websockets on uvloop"
NGINX: Final = "nginx"
HAPROXY: Final = "haproxy"

PEERS: Final = str(Path(__file__).with_name("peers.py"))
WORKERS: Final = 8  # behind the gateway, of 256 slots each
KEY: Final = "caller-key-of-the-benchmark"
OPERATOR_TOKEN: Final = "operator-token-of-the-benchmark"
ISSUER: Final = "https://id.example/realms/us"
AUDIENCE: Final = "calls"
TOKENS: Final = (
    1_200  # more than a gateway remembers of an agent, so that in turn each is new to it
)


class NotInstalled(BenchError):
    """A peer that is not on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """Files in PEM: of the authority, and of the worker with its key."""

    authority: Path
    certificate: Path
    key: Path

    @classmethod
    def made(cls, folder: Path) -> "Certificates":
        """New ones."""
        Authority(folder).issue("worker", "CN=worker", names=[worker_server_name(AGENT)])
        return cls(
            authority=folder / "ca.crt",
            certificate=folder / "worker.crt",
            key=folder / "worker.key",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """What all relays stand on: where they run, and the worker behind them."""

    folder: Path
    places: Places
    worker_port: int
    certificates: Certificates | None = None  # the worker's; None: it is spoken to in plain

    @property
    def url(self) -> str:
        return f"{'wss' if self.certificates else 'ws'}://localhost:{self.worker_port}/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """One that runs: the process, and where callers reach it."""

    name: str
    process: Process
    port: int


class Callers:
    """What callers show, and what the route of their agent says of it."""

    def __init__(self, folder: Path) -> None:
        self.keys = folder / "keys"
        self.keys.write_text(KEY)
        self.token = folder / "token"
        self.tokens = folder / "tokens"
        self._private = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def sign(self, count: int, now: float) -> None:
        """Writes one token to `token` and `count` to `tokens`, good for an hour."""
        claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": int(now) + 3600}
        signed = [
            jwt.encode({**claims, "sub": f"user-{number}"}, self._private, "RS256", {"kid": "1"})
            for number in range(count)
        ]
        self.token.write_text(signed[0])
        self.tokens.write_text("\n".join(signed))

    def access(self) -> dict[str, Any]:
        """`access` of the route."""
        public = RSAAlgorithm.to_jwk(self._private.public_key(), as_dict=True)
        public = {**public, "kid": "1", "use": "sig", "alg": "RS256"}
        public.pop("key_ops", None)
        return {
            "public": False,
            "apiKeys": {"bench": hashlib.sha256(KEY.encode()).hexdigest()},
            "origins": [],
            "jwt": {
                "issuer": ISSUER,
                "audience": AUDIENCE,
                "jwks": json.dumps({"keys": [public]}),
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway(Relay):
    """Trunkline's, which also has ports for workers and for health checks."""

    control_port: int
    health_port: int

    def settles(self) -> None:
        """Waits until it takes calls: it has heard of its workers then. Raises `BenchError`."""
        self.process.answers(f"http://127.0.0.1:{self.health_port}{READYZ_PATH}")


@contextlib.contextmanager
def gateway(stand: Stand, callers: Callers) -> Iterator[Gateway]:
    """Trunkline's, without a worker yet. It has the routes from a file, as before an operator has come."""
    port, control_port, health_port = free_ports(3)
    routes = stand.folder / f"routes-{port}.json"
    routes.write_text(json.dumps(_routes(stand, callers)))
    command = [sys.executable, "-m", "trunkline_runtime", "gateway"]
    for option, value in {
        "host": "127.0.0.1",
        "port": port,
        "control-host": "127.0.0.1",
        "control-port": control_port,
        "health-host": "127.0.0.1",
        "health-port": health_port,
        "routes-file": routes,
        "grace-seconds": 0,
        # All callers have one address here, and what they say is no speech.
        "address-per-second": 0,
        "address-waiting": 0,
        "audio-times-real": 0,
    }.items():
        command += [f"--{option}", str(value)]
    environment = {ENV_OPERATOR_TOKEN: OPERATOR_TOKEN}
    with Process(command, stand.places.subject, stand.folder, environment) as process:
        process.listens(control_port)
        yield Gateway(
            name=TRUNKLINE,
            process=process,
            port=port,
            control_port=control_port,
            health_port=health_port,
        )


def _routes(stand: Stand, callers: Callers) -> dict[str, Any]:
    route: dict[str, Any] = {
        "agent": AGENT,
        "hash": "",
        "workerKey": WORKER_KEY,
        "access": callers.access(),
        "answerSeconds": 10.0,
        "maxSeconds": 86_400.0,
        "admissionMs": 0.0,
        "settings": {},
        "rungs": [{"kind": "warm"}],
        "draining": [],
    }
    if stand.certificates:
        route["workerTls"] = stand.certificates.authority.read_text()
    return {"type": "routes", "version": 1, "epoch": 1, "routes": [route]}


@contextlib.contextmanager
def before_workers(stand: Stand, callers: Callers) -> Iterator[Gateway]:
    """Trunkline's, with workers that always have a slot and whose calls the load generator answers."""
    with gateway(stand, callers) as relay:
        command = [sys.executable, PEERS, "--uvloop", "workers"]
        command += [str(relay.control_port), str(stand.worker_port), str(WORKERS)]
        with Process(command, stand.places.beside, stand.folder) as workers:
            workers.says("ready")
            relay.settles()
            yield relay


@contextlib.contextmanager
def before_a_real_worker(stand: Stand, callers: Callers) -> Iterator[Gateway]:
    """Trunkline's, with one worker process of the loopback engine."""
    with gateway(stand, callers) as relay:
        port, health_port = free_ports(2)
        environment = {
            ENV_AGENT: AGENT,
            ENV_WORKER: "worker-0",
            ENV_ENGINE: "loopback",
            ENV_SLOTS: str(SLOTS),
            ENV_HOST: "127.0.0.1",
            ENV_PORT: str(port),
            ENV_HEALTH_PORT: str(health_port),
            ENV_GATEWAYS: f"127.0.0.1:{relay.control_port}",
            ENV_WORKER_KEY: WORKER_KEY,
        }
        command = [sys.executable, "-m", "trunkline_runtime", "worker"]
        with Process(command, stand.places.beside, stand.folder, environment) as worker:
            worker.answers(f"http://127.0.0.1:{health_port}{READYZ_PATH}")
            relay.settles()
            yield relay


@contextlib.contextmanager
def by_websockets(stand: Stand, *, on_uvloop: bool) -> Iterator[Relay]:
    (port,) = free_ports(1)
    command = [sys.executable, PEERS, *(["--uvloop"] if on_uvloop else [])]
    command += ["relay", str(port), stand.url]
    if stand.certificates:
        command += ["--authority", str(stand.certificates.authority)]
    with Process(command, stand.places.subject, stand.folder) as process:
        process.says("ready")
        yield Relay(name=UVLOOP if on_uvloop else ASYNCIO, process=process, port=port)


@contextlib.contextmanager
def echo(stand: Stand, *, on_uvloop: bool) -> Iterator[Relay]:
    """No relay: a server of `websockets` that answers by itself."""
    (port,) = free_ports(1)
    command = [sys.executable, PEERS, *(["--uvloop"] if on_uvloop else []), "echo", str(port)]
    with Process(command, stand.places.subject, stand.folder) as process:
        process.says("ready")
        yield Relay(name=UVLOOP if on_uvloop else ASYNCIO, process=process, port=port)


@contextlib.contextmanager
def nginx(stand: Stand) -> Iterator[Relay]:
    (port,) = free_ports(1)
    home = stand.folder / f"nginx-{port}"
    home.mkdir()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {home}/{kind};" for kind in kinds)
    tls = ""
    if stand.certificates:
        tls = (
            f"proxy_ssl_protocols TLSv1.3; proxy_ssl_verify on; proxy_ssl_name localhost;"
            f"proxy_ssl_server_name on; proxy_ssl_trusted_certificate {stand.certificates.authority};"
        )
    scheme = "https" if stand.certificates else "http"
    (home / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {home}/pid; error_log stderr;"
        "worker_rlimit_nofile 16384; events { worker_connections 16384; }"
        f"http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{port} backlog=4096;"
        f"location / {{ proxy_pass {scheme}://127.0.0.1:{stand.worker_port}; proxy_http_version 1.1;"
        "proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;"
        f"proxy_read_timeout 3600s; {tls} }} }} }}"
    )
    command = [_installed("nginx"), "-p", str(home), "-e", "stderr", "-c", f"{home}/nginx.conf"]
    with Process(command, stand.places.subject, stand.folder) as process:
        process.listens(port)
        yield Relay(name=NGINX, process=process, port=port)


@contextlib.contextmanager
def haproxy(stand: Stand) -> Iterator[Relay]:
    (port,) = free_ports(1)
    config = stand.folder / f"haproxy-{port}.cfg"
    server = f"server worker 127.0.0.1:{stand.worker_port}"
    if stand.certificates:
        server += f" ssl verify required ca-file {stand.certificates.authority}"
        server += " sni str(localhost) verifyhost localhost ssl-min-ver TLSv1.3"
    config.write_text(
        "global\n nbthread 1\n maxconn 8000\n"
        "defaults\n mode http\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n"
        " timeout tunnel 1h\n"
        f"frontend callers\n bind 127.0.0.1:{port} backlog 4096\n default_backend workers\n"
        f"backend workers\n {server}\n"
    )
    command = [_installed("haproxy"), "-db", "-f", str(config)]
    with Process(command, stand.places.subject, stand.folder) as process:
        process.listens(port)
        yield Relay(name=HAPROXY, process=process, port=port)


def _installed(program: str) -> str:
    """Where a program is. Raises `NotInstalled`."""
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise NotInstalled(f"{program}: not installed, as root: apt-get install {program}")
    return found
