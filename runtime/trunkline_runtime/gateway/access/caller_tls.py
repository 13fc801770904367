"""TLS for callers: the certificate that they are answered with, and the certificates that they may show.

The files may change at any time; each handshake takes what was read last. A file that cannot be used changes
nothing, so that a half-written renewal shuts nobody out.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from trunkline_runtime.contract import TLS_CERT_FILE, TLS_KEY_FILE
from trunkline_runtime.gateway.access.tokens import MAX_TENANT_CHARS
from trunkline_runtime.tls import TlsError, proving

HTTP: Final = "http/1.1"  # a WebSocket of RFC 6455 begins with nothing else


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCertificates:
    """Whose certificates callers may show; `required`: none is let in without one."""

    ca: Path  # PEM of one or more authorities
    required: bool = False


@dataclass(frozen=True, slots=True)
class _Files:
    certificate: bytes
    key: bytes
    ca: bytes | None


class CallersTls:
    """What callers are answered with, from a folder as a TLS Secret is mounted."""

    def __init__(self, folder: Path, clients: ClientCertificates | None = None) -> None:
        """Raises `TlsError`."""
        self._folder = folder
        self._clients = clients
        self._files = self._read()
        self.context, self.ends = self._made(self._files)
        """The context of the next handshake, and when its certificate ends in Unix time."""

    def __repr__(self) -> str:
        return f"<CallersTls {self._folder}>"

    def refresh(self) -> bool:
        """Takes in what is new, and whether there was any. Raises `TlsError`, and keeps what it had."""
        files = self._read()
        if files == self._files:
            return False
        # A new context, for authorities can only be added to one; it also forgets the sessions of before.
        self.context, self.ends = self._made(files)
        self._files = files
        return True

    def _made(self, files: _Files) -> tuple[ssl.SSLContext, float]:
        where = f"{self._folder}/{TLS_CERT_FILE} and {TLS_KEY_FILE}"
        try:
            context = proving(files.certificate, files.key, least=ssl.TLSVersion.TLSv1_2)
            ends = x509.load_pem_x509_certificate(files.certificate).not_valid_after_utc
        except (TlsError, ValueError) as error:
            raise TlsError(f"{where}: {error}") from error
        context.options |= ssl.OP_NO_RENEGOTIATION  # a caller could have us sign again and again
        context.set_alpn_protocols([HTTP])
        if self._clients is not None and files.ca is not None:
            _ask(context, files.ca, self._clients)
        return context, ends.timestamp()

    def _read(self) -> _Files:
        ca = None if self._clients is None else _content(self._clients.ca)
        certificate = _content(self._folder / TLS_CERT_FILE)
        return _Files(certificate, _content(self._folder / TLS_KEY_FILE), ca)


def _ask(context: ssl.SSLContext, ca: bytes, clients: ClientCertificates) -> None:
    """Has a context ask callers for a certificate. One that is shown must be good, whether required or not."""
    try:
        context.load_verify_locations(cadata=ca.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as error:
        raise TlsError(f"{clients.ca}: it holds no certificate in PEM") from error
    context.verify_mode = ssl.CERT_REQUIRED if clients.required else ssl.CERT_OPTIONAL
    # An intermediate authority is trusted as it is: whatever it hangs from may sign for others.
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TlsError(f"{file} cannot be read: {error.strerror}") from error


def name_in(certificate: Mapping[str, Any] | None) -> str:
    """Who a verified certificate says its holder is, "" where nobody that could be a tenant.

    `certificate` is as `SSLObject.getpeercert` gives it. The first URI of subjectAltName (a SPIFFE ID for
    instance), else its first DNS name, else the common name.
    """
    if not certificate:
        return ""
    other = certificate.get("subjectAltName", ())
    common = [pair for part in certificate.get("subject", ()) for pair in part]
    for kind, pairs in (("URI", other), ("DNS", other), ("commonName", common)):
        for found, name in pairs:
            if found == kind:
                usable = 0 < len(name) <= MAX_TENANT_CHARS and name.isprintable()
                return str(name) if usable else ""
    return ""
