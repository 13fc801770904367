"""The installation's certificate authority, and the certificates of workers that it signs.

A worker reads its certificate once, at its start, and a new one must restart no pod. So a certificate lasts
ten years, longer than any pod, or as long as the CA where that ends earlier; it is made anew when a third of
that is left. A pod that has the old one goes on: what counts is the CA's key and the agent's name. The
functions that decide and sign are pure; time, key and serial number are arguments.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trunkline_operator.config import ConfigError
from trunkline_runtime.contract import (
    CA_CERT_FILE,
    CA_KEY_FILE,
    TLS_CERT_FILE,
    TLS_KEY_FILE,
    worker_server_name,
)

LIFETIME: Final = timedelta(days=3650)
RENEW_BELOW: Final = 1 / 3  # of its life that is left
# An operator starts more often than that, if only for its upgrades.
WARN_BELOW: Final = timedelta(days=365)
# A worker's node may be behind the operator's by so much.
CLOCKS_APART: Final = timedelta(hours=1)

# What an X.509 parser raises; a certificate may also name an algorithm that is not known.
_UNREADABLE: Final = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)


log = logging.getLogger("trunkline.authority")


class AuthorityError(ConfigError):
    """The CA cannot be used; the text says what is wrong with which file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """The CA that signs."""

    certificate: x509.Certificate
    key: CertificateIssuerPrivateKeyTypes = field(repr=False)

    @classmethod
    def read(cls, directory: Path, now: datetime) -> Self:
        """From a directory as the CA's Secret is mounted. Raises `AuthorityError`."""
        try:
            certificate = (directory / CA_CERT_FILE).read_bytes()
            key = (directory / CA_KEY_FILE).read_bytes()
        except OSError as error:
            raise AuthorityError(
                f"--ca-dir: {directory} must hold {CA_CERT_FILE} and {CA_KEY_FILE}: {error}"
            ) from error
        try:
            made = cls.of(certificate, key, now)
        except AuthorityError as error:
            raise AuthorityError(f"--ca-dir: in {directory}, {error}") from error.__cause__
        if (end := made.certificate.not_valid_after_utc) - now < WARN_BELOW:
            log.warning(
                "the CA in %s ends on %s, and all links with it: renew it",
                directory,
                f"{end:%Y-%m-%d}",
            )
        return made

    @classmethod
    def of(cls, certificate: bytes, key: bytes, now: datetime) -> Self:
        """From PEM texts; of several certificates the first one signs. Raises `AuthorityError`."""
        try:
            made = cls(
                certificate=x509.load_pem_x509_certificate(certificate),
                # Whatever else a key can be, `public_key` below is not the certificate's.
                key=load_pem_private_key(key, None),  # type: ignore[arg-type]
            )
            signs = made.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        except x509.ExtensionNotFound as error:
            raise AuthorityError(f"{CA_CERT_FILE} is not the certificate of a CA") from error
        except _UNREADABLE as error:
            raise AuthorityError(
                f"{CA_CERT_FILE} and {CA_KEY_FILE} are not a certificate and its key in PEM"
            ) from error
        if not signs.value.ca:
            raise AuthorityError(f"{CA_CERT_FILE} is not the certificate of a CA")
        if made.key.public_key() != made.certificate.public_key():
            raise AuthorityError(f"{CA_KEY_FILE} does not belong to {CA_CERT_FILE}")
        if made.certificate.not_valid_after_utc <= now:
            raise AuthorityError(
                f"{CA_CERT_FILE} ended on {made.certificate.not_valid_after_utc:%Y-%m-%d}: make a new CA"
            )
        return made

    @property
    def pem(self) -> str:
        """The CA's certificate, which workers and gateways trust."""
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def identity(self) -> str:
        """Short; another CA has another, and one that was renewed with its old key and name has the same."""
        key = self.certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha256(self.certificate.subject.public_bytes() + key).hexdigest()[:16]

    def last_day(self, now: datetime) -> datetime:
        """When a certificate that is signed now ends."""
        return min(now + LIFETIME, self.certificate.not_valid_after_utc)


def why_issue(entries: Mapping[str, str], authority: Authority, agent: str, now: datetime) -> str:
    """Why an agent's workers need another certificate than these entries of its Secret hold; "" = they do not.

    `agent` is namespace/name.
    """
    wanted = (TLS_CERT_FILE, TLS_KEY_FILE, CA_CERT_FILE)
    if missing := [entry for entry in wanted if not entries.get(entry)]:
        return f"there is no {missing[0]}"
    try:
        certificate = x509.load_pem_x509_certificate(entries[TLS_CERT_FILE].encode())
        key = load_pem_private_key(entries[TLS_KEY_FILE].encode(), None)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (*_UNREADABLE, x509.ExtensionNotFound):
        return "it cannot be read"
    if key.public_key() != certificate.public_key():
        return "its key is another one's"
    if list(names) != [x509.DNSName(worker_server_name(agent))]:
        return "it is for another name"
    if not _signed(certificate, authority):
        return "another CA has signed it"
    if entries[CA_CERT_FILE].strip() != authority.pem.strip():
        return "the CA has a new certificate"
    return _why_renew(certificate, authority, now)


def _signed(certificate: x509.Certificate, authority: Authority) -> bool:
    try:
        certificate.verify_directly_issued_by(authority.certificate)
    except (InvalidSignature, *_UNREADABLE):
        return False
    return True


def _why_renew(certificate: x509.Certificate, authority: Authority, now: datetime) -> str:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if end - now >= RENEW_BELOW * (end - begin):
        return ""
    # Bound by a CA that ends soon, a new one would last no longer: it would be made at every look.
    if authority.last_day(now) <= end:
        return ""
    return f"it ends on {end:%Y-%m-%d}"


def issued(
    authority: Authority, agent: str, key: ec.EllipticCurvePrivateKey, serial: int, now: datetime
) -> dict[str, str]:
    """A new certificate for an agent's workers, as entries of its Secret, all PEM."""
    name = x509.DNSName(worker_server_name(agent))
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = (
        x509.CertificateBuilder()
        # The name counts where it stands below; here it could be too long (64 characters).
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "trunkline-worker")]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - CLOCKS_APART)
        .not_valid_after(authority.last_day(now))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_SIGNS_HANDSHAKES, critical=True)
        .add_extension(usage, critical=False)
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_authority_key(authority.certificate), critical=False)
    )
    edwards = isinstance(authority.key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    certificate = builder.sign(authority.key, None if edwards else hashes.SHA256())
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return {
        TLS_CERT_FILE: certificate.public_bytes(serialization.Encoding.PEM).decode(),
        TLS_KEY_FILE: secret.decode(),
        CA_CERT_FILE: authority.pem,
    }


_SIGNS_HANDSHAKES: Final = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


def _authority_key(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """As the CA names its own key, for others may count it otherwise (RFC 5280 section 4.2.1.1)."""
    try:
        own = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        public = authority.public_key()
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(public)  # type: ignore[arg-type]
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own.value)


def new_certificate(authority: Authority, agent: str) -> dict[str, str]:
    """`issued` now, with a new key."""
    key = ec.generate_private_key(ec.SECP256R1())
    return issued(authority, agent, key, x509.random_serial_number(), datetime.now(UTC))
