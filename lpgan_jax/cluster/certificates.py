"""Who is who: mutual TLS, and certificates for a try-out.

A role is known by the name in its certificate (its subject alternative name, DNS), which the
cluster's authority signed. The file names are fixed: ca.pem, ROLE.pem, ROLE.key.
"""

from __future__ import annotations

import datetime
import os
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import grpc

from lpgan_jax.cluster.settings import ClusterConfig, ServerName
from lpgan_jax.common.files import atomic_write, private_directory

_DAYS = 90
AUTHORITY = "ca.pem"


@dataclass(frozen=True)
class Identity:
    """What a role proves who it is with, PEM.

    Attributes:
        authority: the certificate of the cluster's authority.
        certificate: the role's own.
        key: its private key.
    """

    authority: bytes
    certificate: bytes
    key: bytes

    def for_channel(self) -> grpc.ChannelCredentials:
        """To connect to a server."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)

    def for_server(self) -> grpc.ServerCredentials:
        """To be a server, which asks everybody for a certificate."""
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], self.authority, require_client_auth=True
        )


def load_identity(config: ClusterConfig, role: str) -> Identity:
    """Read a role's certificate and key.

    Raises:
        FileNotFoundError: one is missing; the message names it.
        ValueError: a key is readable by others.
    """
    directory = Path(config.certificates)
    files = [directory / name for name in (AUTHORITY, f"{role}.pem", f"{role}.key")]
    for file in files:
        if not file.is_file():
            hint = "" if directory.exists() else f" (try out: lpgan certificates --out {directory})"
            raise FileNotFoundError(f"{file}: missing, expected the certificates of {role}{hint}")
    key = files[-1]
    if key.stat().st_mode & 0o077:
        raise ValueError(f"{key}: others can read it, expected mode 600: chmod 600 {key}")
    authority, certificate, key_pem = (file.read_bytes() for file in files)
    return Identity(authority, certificate, key_pem)


def line_context(config: ClusterConfig, server: ServerName) -> ssl.SSLContext:
    """TLS 1.3 for the line between the servers: both ends show a certificate of the authority.

    Whose it is has to be looked at by who uses it.

    Raises:
        FileNotFoundError, ValueError: as of `load_identity`.
        ssl.SSLError: a file is no certificate, or no key.
    """
    load_identity(config, server)
    own = ssl.PROTOCOL_TLS_SERVER if server == "s1" else ssl.PROTOCOL_TLS_CLIENT
    context, directory = ssl.SSLContext(own), Path(config.certificates)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the name is the role's, and looked at by `line`
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(directory / AUTHORITY)
    # An encrypted key is an error, and no question on somebody's terminal.
    context.load_cert_chain(directory / f"{server}.pem", directory / f"{server}.key", password="")
    if server == "s1":
        context.num_tickets = 0  # nobody resumes
    return context


def make_certificates(out: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Make an authority, and a certificate and key for each name, for a try-out.

    The authority's own key is thrown away, so that nobody can be added later. Real deployments
    bring certificates of their own, and each machine gets its own key only.

    Args:
        out: a new or empty directory.
        names: of the roles.

    Raises:
        FileExistsError: the directory is not empty.
        PermissionError: it is a symbolic link, or belongs to someone else.
        OSError: it cannot be written.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out}: not empty, expected a new directory for certificates")
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def certify(
        name: str,
        key: ec.EllipticCurvePrivateKey,
        signer: ec.EllipticCurvePrivateKey,
        usages: list[tuple[x509.ExtensionType, bool]],
    ) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named(_AUTHORITY_NAME))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(days=_DAYS))
        )
        for usage, critical in usages:
            builder = builder.add_extension(usage, critical)
        return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority = ec.generate_private_key(ec.SECP256R1())
    is_authority = x509.BasicConstraints(ca=True, path_length=0)
    private_directory(out)
    atomic_write(
        out / AUTHORITY, certify(_AUTHORITY_NAME, authority, authority, [(is_authority, True)])
    )
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        usages: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.SubjectAlternativeName([x509.DNSName(name)]), False),
            (x509.ExtendedKeyUsage(both), False),
        ]
        atomic_write(out / f"{name}.pem", certify(name, key, authority, usages))
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        atomic_write(out / f"{name}.key", pem)


_AUTHORITY_NAME = "lpgan try-out authority"
