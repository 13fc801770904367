"""The CA in the operator's hands: what it signs, when it signs anew, and what its certificates prove."""

import base64
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from chart_rig import rendered
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from gateway_rig import OPERATOR_TOKEN, a_gateway, events, http, until
from hypothesis import given
from hypothesis import strategies as st
from tls_rig import Pki

from trunkline_operator.cluster.authority import (
    LIFETIME,
    Authority,
    AuthorityError,
    issued,
    new_certificate,
    why_issue,
)
from trunkline_operator.gateways.fleet import Fleet
from trunkline_runtime.contract import ENV_OPERATOR_TOKEN, worker_server_name
from trunkline_runtime.tls import proving, trusting

AGENT = "ns/desk"
NOW = datetime(2030, 1, 1, tzinfo=UTC)
YEAR = timedelta(days=365)
KEY = ec.generate_private_key(ec.SECP256R1())
OTHER_KEY = ec.generate_private_key(ec.SECP256R1())


def a_ca(
    key: CertificateIssuerPrivateKeyTypes = KEY,
    *,
    begins: datetime = NOW - 10 * YEAR,
    ends: datetime = NOW + 30 * YEAR,
    ca: bool = True,
    name: str = "CA",
) -> bytes:
    """The certificate of a CA in PEM, signed by itself."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(begins).not_valid_after(ends)
    constraints = x509.BasicConstraints(ca=ca, path_length=None)
    builder = builder.add_extension(constraints, critical=True)
    edwards = isinstance(key, ed25519.Ed25519PrivateKey)
    signed = builder.sign(key, None if edwards else hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def pem(key: CertificateIssuerPrivateKeyTypes) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def authority(
    key: CertificateIssuerPrivateKeyTypes = KEY, ends: datetime = NOW + 30 * YEAR
) -> Authority:
    return Authority.of(a_ca(key, ends=ends), pem(key), NOW)


def signed(by: Authority, agent: str = AGENT, now: datetime = NOW) -> dict[str, str]:
    return issued(by, agent, OTHER_KEY, 7, now)


def handshake(entries: dict[str, str], ca: str, name: str) -> str:
    """Between a worker that has these and a gateway that trusts the CA: "", or why it fails."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    identity = proving(entries["tls.crt"].encode(), entries["tls.key"].encode())
    server = identity.wrap_bio(to_server, to_client, server_side=True)
    client = trusting(ca).wrap_bio(to_client, to_server, server_hostname=name)
    try:
        for _ in range(3):
            for side in (client, server):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    assert client.version() == "TLSv1.3"
    return ""


# --- what is signed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        KEY,
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["P-256", "RSA", "P-384", "Ed25519"],
)
def test_a_worker_proves_its_agent_and_no_other(key: CertificateIssuerPrivateKeyTypes) -> None:
    ca = authority(key)
    entries = new_certificate(ca, AGENT)
    assert handshake(entries, ca.pem, worker_server_name(AGENT)) == ""
    for other in ("ns/desk2", "ns2/desk", "desk/ns"):
        assert "Hostname mismatch" in handshake(entries, ca.pem, worker_server_name(other))
    stranger = authority(ec.generate_private_key(ec.SECP256R1()))
    why = handshake(entries, stranger.pem, worker_server_name(AGENT))
    assert why in ("unable to get local issuer certificate", "certificate signature failure")


def test_the_charts_own_ca_signs_and_is_believed() -> None:
    """Helm makes it, with an RSA key in the old format."""
    objects = rendered({})
    ca, gateway = (
        {name: base64.b64decode(text) for name, text in objects["Secret", secret]["data"].items()}
        for secret in ("trunkline-ca", "trunkline-gateway-tls")
    )
    made = Authority.of(ca["ca.crt"], ca["ca.key"], datetime.now(UTC))
    assert handshake(new_certificate(made, AGENT), made.pem, worker_server_name(AGENT)) == ""
    host = "trunkline-gateway-control.calls.svc"
    texts = {name: text.decode() for name, text in gateway.items()}
    assert handshake(texts, made.pem, host) == ""
    assert "Hostname mismatch" in handshake(texts, made.pem, worker_server_name(AGENT))


def test_the_longest_name_fits() -> None:
    agent = f"{'n' * 63}/{'d' * 50}"
    entries = signed(authority(), agent)
    assert why_issue(entries, authority(), agent, NOW) == "the CA has a new certificate"
    names = x509.load_pem_x509_certificate(entries["tls.crt"].encode()).extensions
    (name,) = names.get_extension_for_class(x509.SubjectAlternativeName).value
    assert name.value == worker_server_name(agent)


def test_a_certificate_cannot_sign_others() -> None:
    entries = signed(authority())
    with pytest.raises(AuthorityError, match=r"ca\.crt is not the certificate of a CA"):
        Authority.of(entries["tls.crt"].encode(), entries["tls.key"].encode(), NOW)


# --- when ----------------------------------------------------------------------------------------------


def test_a_good_certificate_is_kept() -> None:
    ca = authority()
    entries = signed(ca)
    assert why_issue(entries, ca, AGENT, NOW) == ""
    # As a Secret is read: without a last newline, and beside other entries.
    stripped = {name: text.removesuffix("\n") for name, text in entries.items()}
    assert why_issue(stripped | {"worker-key": "k"}, ca, AGENT, NOW) == ""


def test_what_is_missing_broken_or_anothers_is_made_anew() -> None:
    ca = authority()
    entries = signed(ca)
    for name in entries:
        assert why_issue(entries | {name: ""}, ca, AGENT, NOW) == f"there is no {name}"
    assert why_issue({}, ca, AGENT, NOW) == "there is no tls.crt"
    for name in ("tls.crt", "tls.key"):
        assert why_issue(entries | {name: "junk"}, ca, AGENT, NOW) == "it cannot be read"
    assert why_issue(entries | {"tls.crt": ca.pem}, ca, AGENT, NOW) == "it cannot be read"
    another = entries | {"tls.key": pem(KEY).decode()}
    assert why_issue(another, ca, AGENT, NOW) == "its key is another one's"
    assert why_issue(entries, ca, "ns/other", NOW) == "it is for another name"
    stranger = authority(ec.generate_private_key(ec.SECP256R1()))
    assert why_issue(entries, stranger, AGENT, NOW) == "another CA has signed it"


def test_a_ca_that_was_renewed_with_its_key_is_the_same_ca() -> None:
    old, new = authority(), authority(ends=NOW + 40 * YEAR)
    assert old.pem != new.pem
    assert old.identity == new.identity
    assert old.identity != authority(OTHER_KEY).identity
    assert old.identity != Authority.of(a_ca(name="other"), pem(KEY), NOW).identity
    entries = signed(old)
    assert why_issue(entries, new, AGENT, NOW) == "the CA has a new certificate"
    # A pod that has the old one goes on.
    assert handshake(new_certificate(old, AGENT), new.pem, worker_server_name(AGENT)) == ""


def test_it_is_renewed_when_a_third_is_left() -> None:
    ca = authority()
    entries = signed(ca)
    due = NOW + LIFETIME * (2 / 3)
    assert why_issue(entries, ca, AGENT, due - timedelta(days=1)) == ""
    assert why_issue(entries, ca, AGENT, due + timedelta(days=1)) == "it ends on 2039-12-30"


@given(
    lasts=st.integers(1, 20_000),
    waits=st.lists(st.integers(1, 5000), max_size=8),
)
def test_however_time_goes_a_new_one_is_better_and_never_outlives_its_ca(
    lasts: int, waits: list[int]
) -> None:
    day = timedelta(days=1)
    ca = authority(ends=NOW + lasts * day)
    entries, now = signed(ca), NOW
    for wait in waits:
        now += wait * day
        before = x509.load_pem_x509_certificate(entries["tls.crt"].encode())
        assert before.not_valid_after_utc <= ca.certificate.not_valid_after_utc
        if now >= ca.certificate.not_valid_after_utc:
            return  # an operator does not start with it
        if why_issue(entries, ca, AGENT, now):
            entries = signed(ca, now=now)
            assert why_issue(entries, ca, AGENT, now) == ""
            after = x509.load_pem_x509_certificate(entries["tls.crt"].encode())
            assert after.not_valid_after_utc > before.not_valid_after_utc
        else:
            assert before.not_valid_after_utc > now


# --- what the operator is given ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        (None, pem(KEY), "must hold ca.crt and ca.key"),
        (a_ca(), None, "must hold ca.crt and ca.key"),
        (b"junk", pem(KEY), "are not a certificate and its key in PEM"),
        (a_ca(), b"junk", "are not a certificate and its key in PEM"),
        (a_ca(), pem(OTHER_KEY), "ca.key does not belong to ca.crt"),
        (a_ca(ca=False), pem(KEY), "ca.crt is not the certificate of a CA"),
        (a_ca(ends=NOW), pem(KEY), "ca.crt ended on 2030-01-01: make a new CA"),
    ],
)
def test_what_is_no_ca_is_told(
    certificate: bytes | None, key: bytes | None, said: str, tmp_path: Path
) -> None:
    for name, content in (("ca.crt", certificate), ("ca.key", key)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(AuthorityError) as told:
        Authority.read(tmp_path, NOW)
    assert str(told.value).startswith("--ca-dir: ")
    assert str(tmp_path) in str(told.value)
    assert said in str(told.value)


@pytest.mark.parametrize(("days", "told"), [(364, 1), (366, 0)])
def test_a_ca_that_ends_within_a_year_is_told(
    days: int, told: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ca.crt").write_bytes(a_ca(ends=NOW + timedelta(days=days)))
    (tmp_path / "ca.key").write_bytes(pem(KEY))
    Authority.read(tmp_path, NOW)
    assert [
        record.getMessage().endswith("ends on 2030-12-31, and all links with it: renew it")
        for record in caplog.records
    ] == [True] * told


def test_no_key_is_in_what_is_printed(tmp_path: Path) -> None:
    assert "PrivateKey" not in repr(authority())


def test_an_operator_without_its_ca_does_not_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trunkline_operator", "--gateways=g", "--worker-image=w"]
    environment = os.environ | {ENV_OPERATOR_TOKEN: OPERATOR_TOKEN}
    ended = subprocess.run(
        [*command, f"--ca-dir={tmp_path}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"trunkline-operator: --ca-dir: {tmp_path} must hold ca.crt")


# --- its link to gateways ------------------------------------------------------------------------------


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.mark.parametrize("given", ["another CA", "no CA"])
async def test_a_gateway_that_is_not_believed_gets_no_routes(
    stack: AsyncExitStack, pki: Pki, given: str
) -> None:
    """The operator says which side to mend, and the gateway is not ready."""
    tls = trusting(authority().pem) if given == "another CA" else None
    said = {
        "another CA": "its certificate is not from the CA in the operator's --ca-dir",
        "no CA": "give this side the operator's --ca-dir",
    }
    gateway = await stack.enter_async_context(a_gateway(control_tls=pki.gateway))
    lines = stack.enter_context(events("trunkline.fleet"))
    where = [("localhost", gateway.control_port)]
    fleet = Fleet(where, OPERATOR_TOKEN, epoch=1, changed=lambda _: None, tls=tls)
    await stack.enter_async_context(fleet)
    fleet.open()
    await until(lambda: any(said[given] in line["message"] for line in lines))
    assert fleet.connected == 0
    status, words = await http(gateway.health_port, "/readyz")
    assert (status, "no routes yet" in words) == (503, True)


async def test_a_gateway_is_known_by_the_name_that_stands_for_it(
    stack: AsyncExitStack, pki: Pki
) -> None:
    """Its address is in the certificate, but whoever has the address may be another one by now."""
    gateway = await stack.enter_async_context(a_gateway(control_tls=pki.gateway))
    lines = stack.enter_context(events("trunkline.fleet"))
    where = [("127.1", gateway.control_port)]  # as the resolver takes it, 127.0.0.1
    tls = trusting(pki.ca)
    fleet = Fleet(where, OPERATOR_TOKEN, epoch=1, changed=lambda _: None, tls=tls)
    await stack.enter_async_context(fleet)
    await until(lambda: any("is not for 127.1:" in line["message"] for line in lines))
    assert fleet.connected == 0
