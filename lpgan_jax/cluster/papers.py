"""Whether a role's certificate and key are what the other roles will accept, before they see them.

OpenSSL decides who signed what, in a handshake of the role with itself, as it will decide at the
other end. Names and dates are looked at alone, so that each fault is one finding.
"""

from __future__ import annotations

import datetime
import ssl
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from lpgan_jax.cluster.certificates import AUTHORITY
from lpgan_jax.cluster.findings import Finding
from lpgan_jax.cluster.settings import SERVERS, ClusterConfig

_SOON = datetime.timedelta(days=14)
_NO_CHECK_TIME = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which `ssl` does not name
_TURNS = 6  # of a handshake in memory, at most


def look_at_papers(
    config: ClusterConfig, role: str, now: datetime.datetime
) -> tuple[list[Finding], Validity | None]:
    """Look at ca.pem, ROLE.pem and ROLE.key.

    Args:
        config: of the cluster.
        role: whose.
        now: with a time zone.

    Returns:
        (findings, when the role's certificate is valid, or None without one).
    """
    directory = Path(config.certificates)
    authority, own, key = (directory / name for name in (AUTHORITY, f"{role}.pem", f"{role}.key"))
    missing = [file for file in (authority, own, key) if not file.is_file()]
    if missing:
        mend = f"copy it from who made the certificates (try out: lpgan certificates, {directory})"
        return [
            Finding("failed", file.name, f"{file}: missing", mend=mend) for file in missing
        ], None
    findings, certificates = [_mode(key)], {}
    for file in (authority, own):
        try:
            certificates[file] = x509.load_pem_x509_certificates(file.read_bytes())
        except (ValueError, OSError) as error:
            findings.append(Finding("failed", file.name, f"{error}", "certificates, PEM"))
    if own not in certificates or authority not in certificates:
        return findings, None
    leaf = certificates[own][0]
    belongs = _belongs(key, leaf)
    findings.append(belongs)
    if belongs.status == "OK":  # with another key there can be no handshake
        findings.append(_authority(authority, own, key, role))
    findings.append(_name(own, leaf, config.certificate_name(role)))
    findings += _dates({authority: certificates[authority], own: [leaf]}, now)
    return findings, (leaf.not_valid_before_utc, leaf.not_valid_after_utc)


Validity = tuple[datetime.datetime, datetime.datetime]
"""From when to when."""


def _mode(key: Path) -> Finding:
    check = f"mode of {key.name}"
    mode = stat.S_IMODE(key.stat().st_mode)
    if mode & 0o077:
        return Finding("failed", check, f"{mode:o}, others can read it", "600", f"chmod 600 {key}")
    return Finding("OK", check, f"{mode:o}")


def _belongs(key: Path, leaf: x509.Certificate) -> Finding:
    check = f"{key.name}"
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (ValueError, TypeError, OSError, UnsupportedAlgorithm):  # its text might quote the key
        return Finding("failed", check, "no key", "a private key, PEM, without a password")
    if private.public_key().public_bytes(*form) != leaf.public_key().public_bytes(*form):
        return Finding(
            "failed",
            check,
            "belongs to another certificate",
            f"that of {key.stem}.pem",
            "take both files of one role, made together",
        )
    return Finding("OK", check, f"belongs to {key.stem}.pem")


def _authority(authority: Path, own: Path, key: Path, role: str) -> Finding:
    check = f"authority of {own.name}"
    try:
        refused = _refused(authority, own, key, role)
    except ssl.SSLError as error:  # OpenSSL reads no such file
        refused = str(error.reason or error)
    if refused is None:
        return Finding("OK", check, f"signed by {AUTHORITY}")
    return Finding(
        "failed",
        check,
        refused,
        f"a certificate that {AUTHORITY} signed, to be a server and a client with",
        f"take {own.name}, {key.name} and {AUTHORITY} of the same authority",
    )


def _refused(authority: Path, own: Path, key: Path, role: str) -> str | None:
    """Why others will not believe the role's certificate, whatever the date; None: they will.

    S1 is always called, and DS, SP and clients always call; S2 does both.
    """
    called, calling = (
        ssl.SSLContext(side) for side in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)
    )
    for context in (called, calling):
        context.check_hostname = False
        context.load_verify_locations(authority)
        context.load_cert_chain(own, key)
        context.verify_flags |= _NO_CHECK_TIME
    called.verify_mode = ssl.CERT_NONE if role == "s1" else ssl.CERT_REQUIRED
    calling.verify_mode = ssl.CERT_REQUIRED if role in SERVERS else ssl.CERT_NONE
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = calling.wrap_bio(back, there), called.wrap_bio(there, back, server_side=True)
    try:
        for _ in range(_TURNS):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        return str(error.verify_message)
    return None


def _name(own: Path, leaf: x509.Certificate, wanted: str) -> Finding:
    check = f"name in {own.name}"
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        found = names.value.get_values_for_type(x509.DNSName)
    except (x509.ExtensionNotFound, ValueError):
        found = []
    if wanted in found:
        return Finding("OK", check, wanted)
    return Finding(
        "failed",
        check,
        ", ".join(found) or "none",
        f"{wanted}, as its DNS name (subject alternative name)",
        "take another certificate, or say its name in `names` of every role's configuration",
    )


def _dates(
    certificates: dict[Path, Sequence[x509.Certificate]], now: datetime.datetime
) -> Iterator[Finding]:
    """Of each file; an authority's may hold older ones beside those in use."""
    for file, several in certificates.items():
        check = f"dates of {file.name}"
        last = max(several, key=lambda certificate: certificate.not_valid_after_utc)
        start, end = last.not_valid_before_utc, last.not_valid_after_utc
        if now < start:
            yield Finding(
                "failed",
                check,
                f"valid from {_written(start)}, and it is {_written(now)} by this machine's clock",
                "one that is valid now",
                "set the clock, or take another certificate",
            )
        elif now > end:
            found = f"expired at {_written(end)}; it is {_written(now)} by this machine's clock"
            mend = "take another certificate, or set the clock"
            yield Finding("failed", check, found, "one that is valid now", mend)
        elif end - now < _SOON:
            found, days = f"expires at {_written(end)}", _SOON.days
            mend = "have another one made"
            yield Finding("warning", check, found, f"{days} days or more from now", mend)
        else:
            yield Finding("OK", check, f"until {_written(end)}")


def _written(moment: datetime.datetime) -> str:
    return f"{moment.astimezone(datetime.UTC):%Y-%m-%d %H:%M} UTC"
