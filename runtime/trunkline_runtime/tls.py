"""TLS on the links between Trunkline's own processes.

Both ends are ours, so there is one version (1.3), one certificate authority, and nothing of the system's
store. A server proves its name; a client proves itself inside the link, by a key, a token or a ticket. The
operator uses this module too, so of ours it imports the contract alone.
"""

import contextlib
import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final

from websockets.exceptions import InvalidMessage

from trunkline_runtime.contract import TLS_CERT_FILE, TLS_KEY_FILE

KEPT_AUTHORITIES: Final = 8  # an installation has one, and a second one while it is replaced

# OpenSSL's X509_V_ERR_… of x509_vfy.h, which Python passes on as numbers.
_NOT_YET_VALID: Final = 9
_HAS_ENDED: Final = 10
_OTHER_NAME: Final = frozenset({62, 64})  # a host's, an address'


class TlsError(ValueError):
    """A certificate, key or authority that cannot be used; the text says why, for whoever gave it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Where the two sides of a link have their certificates from: words for whoever must mend them."""

    ca: str  # what the side that dials was given
    certificate: str  # what the side that answers was given


@lru_cache(maxsize=KEPT_AUTHORITIES)
def trusting(authority: str) -> ssl.SSLContext:
    """For dialling servers whose certificates an authority has signed; `authority` is PEM.

    Made once for each authority, for it costs more than a handshake. Raises `TlsError`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.hostname_checks_common_name = False
    # An intermediate authority is trusted as it is: whatever it hangs from may sign for others.
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cadata=authority)
    except (ssl.SSLError, ValueError) as error:
        raise TlsError("it holds no certificate in PEM") from error
    return context


def proving(
    certificate: bytes, key: bytes, *, least: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> ssl.SSLContext:
    """For answering with a certificate (PEM, its chain behind it) and its key. Raises `TlsError`.

    `least` is the oldest version that is spoken: others' clients may be older than ours.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = least
    context.num_tickets = 0  # asyncio's clients never resume a session
    _load(context, certificate, key)
    return context


def _load(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    with _in_memory(certificate + b"\n" + key) as path:
        try:
            context.load_cert_chain(path)
        except (ssl.SSLError, OSError) as error:
            if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
                raise TlsError("the key does not belong to the certificate") from error
            raise TlsError("they are not a certificate and a key in PEM") from error


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A file that is on no disk, for OpenSSL reads a key from nothing else; its path."""
    number = os.memfd_create("tls")
    try:
        os.write(number, content)
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)


class MountedIdentity:
    """What a server answers with, from a directory as a TLS Secret is mounted; it may change there."""

    def __init__(self, directory: Path) -> None:
        """Raises `TlsError`."""
        self._directory = directory
        self._read = self._files()
        self.context: Final = self._proving(*self._read)
        """Links that are made from now on get what `refresh` loads; those that are there stay."""

    def __repr__(self) -> str:
        return f"<MountedIdentity {self._directory}>"

    def refresh(self) -> bool:
        """Takes in what is new, and whether there was any. Raises `TlsError`, and keeps what it had."""
        files = self._files()
        if files == self._read:
            return False
        # A pair that does not fit, half written perhaps, would leave the context without a key.
        self._proving(*files)
        _load(self.context, *files)
        self._read = files
        return True

    def _proving(self, certificate: bytes, key: bytes) -> ssl.SSLContext:
        try:
            return proving(certificate, key)
        except TlsError as error:
            raise TlsError(
                f"{self._directory}/{TLS_CERT_FILE} and {TLS_KEY_FILE}: {error}"
            ) from error

    def _files(self) -> tuple[bytes, bytes]:
        try:
            certificate = (self._directory / TLS_CERT_FILE).read_bytes()
            return certificate, (self._directory / TLS_KEY_FILE).read_bytes()
        except OSError as error:
            raise TlsError(
                f"{self._directory} must hold {TLS_CERT_FILE} and {TLS_KEY_FILE}: {error}"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTls:
    """Both sides of TLS at a worker."""

    gateways: ssl.SSLContext = field(repr=False)  # for dialling them
    calls: ssl.SSLContext = field(repr=False)  # for answering them on the data port


def why_no_link(error: Exception, name: str, given: Given, *, tls: bool) -> str:
    """Why dialling the server called `name` failed, and on which side to mend it; `tls`: it was dialled so."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _distrust(error.verify_code, name, given)
    if isinstance(error, ssl.SSLError | ConnectionResetError) and tls:
        return (
            f"it broke the TLS handshake off: if it serves plain links, give it {given.certificate}"
        )
    if isinstance(error, InvalidMessage) and not tls:
        return f"it does not answer in plain HTTP: if it serves TLS, give this side {given.ca}"
    return f"cannot be reached: {str(error) or 'no answer in time'}"


def _distrust(verdict: int, name: str, given: Given) -> str:
    if verdict == _HAS_ENDED:
        return f"its certificate has ended: renew {given.certificate}"
    if verdict == _NOT_YET_VALID:
        return "its certificate is not valid yet: set the clocks of both sides right"
    if verdict in _OTHER_NAME:
        return f"its certificate is not for {name}: put one for that name into {given.certificate}"
    return (
        f"its certificate is not from the CA in {given.ca}: mend {given.certificate}, "
        f"or {given.ca} if that is the old one"
    )
