"""The certificate authority of one development cluster."""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# A development cluster that runs longer than this wants to be a real one.
LIFETIME: Final = timedelta(days=30)

_LOOPBACK: Final = ("localhost", "127.0.0.1")

_SIGNS_CERTIFICATES: Final = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


class Authority:
    """Signs certificates for loopback and writes them to `<root>/<file>.crt` and `.key`.

    Its own certificate is `ca.crt`; its key stays in memory unless `keep` writes it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "trunkline-dev")])
        (root / "ca.crt").write_bytes(
            self._certificate(
                self._name,
                self._key.public_key(),
                x509.BasicConstraints(ca=True, path_length=None),
                _SIGNS_CERTIFICATES,
            )
        )

    def issue(self, file: str, subject: str, *, names: Sequence[str] = ()) -> None:
        """Writes a certificate for a server or client on loopback; `subject` as "O=group,CN=name".

        `names` are further addresses and host names of a server, or URIs.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certificate(
            x509.Name.from_rfc4514_string(subject),
            key.public_key(),
            x509.SubjectAlternativeName([_name(text) for text in (*_LOOPBACK, *names)]),
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
        )
        (self._root / f"{file}.crt").write_bytes(certificate)
        self._write_key(file, key)

    def keep(self) -> None:
        """Writes its own key to `ca.key`, for another process that signs in its name."""
        self._write_key("ca", self._key)

    def _write_key(self, file: str, key: ec.EllipticCurvePrivateKey) -> None:
        secret = self._root / f"{file}.key"
        secret.touch(mode=0o600)
        secret.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                # The API server reads a service-account key in no other format.
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )

    def _certificate(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *extensions: x509.ExtensionType
    ) -> bytes:
        now, issuer = datetime.now(UTC), self._key.public_key()
        builder = (
            x509.CertificateBuilder()
            .issuer_name(self._name)
            .subject_name(subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + LIFETIME)
            # Python 3.13 and newer refuse certificates without these two.
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False
            )
        )
        for extension in extensions:
            critical = isinstance(extension, x509.BasicConstraints | x509.KeyUsage)
            builder = builder.add_extension(extension, critical=critical)
        signed = builder.sign(self._key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)


def _name(text: str) -> x509.GeneralName:
    if "://" in text:
        return x509.UniformResourceIdentifier(text)
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
