"""Signatures with the keys of the roles' certificates, over messages that others hand on."""

from __future__ import annotations

import functools
import itertools
from typing import Any, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from lpgan_jax.cluster.certificates import Identity
from lpgan_jax.cluster.settings import ClusterConfig
from lpgan_jax.cluster.wire import Signed, encode

_HASH = hashes.SHA256()
_PSS = padding.PSS(padding.MGF1(_HASH), padding.PSS.DIGEST_LENGTH)
_M = TypeVar("_M", bound=Signed)


class Forged(Exception):
    """A message is not signed by whom it should be, and why."""


class Signer:
    """Signs as one role in one session.

    Attributes:
        certificate: the role's, PEM.
    """

    def __init__(self, config: ClusterConfig, identity: Identity, role: str) -> None:
        """ValueError: TLS may take this certificate, or its key, and others will not here."""
        self._session, self._role = config.session, role
        self.certificate = identity.certificate.decode()
        self._key: Any = serialization.load_pem_private_key(identity.key, None)
        trial = self.sign(Signed(attempt=0, serial=0))
        try:
            Verifier(config, identity).require(trial, role, self.certificate)
        except Forged as error:
            raise ValueError(f"certificate of {role}: {error}") from None

    def sign(self, message: _M) -> _M:
        """The same message, signed."""
        statement = _statement(self._session, self._role, message)
        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            signature = self._key.sign(statement, ec.ECDSA(_HASH))
        elif isinstance(self._key, rsa.RSAPrivateKey):
            signature = self._key.sign(statement, _PSS, _HASH)
        elif isinstance(self._key, ed25519.Ed25519PrivateKey):
            signature = self._key.sign(statement)
        else:
            raise ValueError(f"key of {self._role}: expected one of EC, RSA or Ed25519")
        return message.model_copy(update={"signature": signature})


class Verifier:
    """Knows by the session's authority who signed."""

    def __init__(self, config: ClusterConfig, identity: Identity) -> None:
        """`identity`: of whoever verifies."""
        self._config, self._authority = config, identity.authority

    def require(self, message: Signed, role: str, certificate: str) -> None:
        """Check who signed a message.

        Args:
            message: with its signature.
            role: that should have.
            certificate: that the message came with, PEM, with those between it and the authority's.

        Raises:
            Forged: it is not the role's, or did not sign this.
        """
        key = _key_of(certificate, self._authority, self._config.certificate_name(role))
        statement = _statement(self._config.session, role, message)
        try:
            if isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(message.signature, statement, ec.ECDSA(_HASH))
            elif isinstance(key, rsa.RSAPublicKey):
                key.verify(message.signature, statement, _PSS, _HASH)
            elif isinstance(key, ed25519.Ed25519PublicKey):
                key.verify(message.signature, statement)
            else:
                raise Forged(f"certificate of {role}: expected a key of EC, RSA or Ed25519")
        except (InvalidSignature, ValueError):
            raise Forged(f"{role} did not sign this {type(message).__name__}") from None


def _statement(session: str, role: str, message: Signed) -> bytes:
    unsigned = message.model_copy(update={"signature": b""})
    return f"lpgan {type(message).__name__} {session} {role}\n".encode() + encode(unsigned)


@functools.lru_cache(64)
def _key_of(certificate: str, authority: bytes, name: str) -> Any:
    """The public key of a certificate, if the authority certified it for that name.

    Dates are looked at when somebody connects (TLS); what was signed then may be read later.
    """
    try:
        chain = x509.load_pem_x509_certificates(certificate.encode())
        trusted = x509.load_pem_x509_certificates(authority)
        names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if name not in names.get_values_for_type(x509.DNSName):
            raise Forged(f"a certificate of another than {name}")
        for issued, issuer in itertools.pairwise(chain):
            _require_issued(issued, issuer)
        if chain[-1] not in trusted:
            last = chain[-1]
            _require_issued(last, next(ca for ca in trusted if ca.subject == last.issuer))
        return chain[0].public_key()
    except Forged:
        raise
    except Exception:  # many kinds, of what somebody made up
        raise Forged(f"no certificate of {name} by this session's authority") from None


def _require_issued(issued: x509.Certificate, issuer: x509.Certificate) -> None:
    if not issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
        raise ValueError("not an authority")
    issued.verify_directly_issued_by(issuer)
