"""Who signed what, with the keys and certificates that TLS takes."""

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from lpgan_jax.cluster.certificates import Identity
from lpgan_jax.cluster.roles import local_cluster
from lpgan_jax.cluster.settings import load_cluster
from lpgan_jax.cluster.signatures import Forged, Signer, Verifier
from lpgan_jax.cluster.wire import Alarm, Signed

START = datetime.datetime(2020, 1, 1)


def _ec():
    return ec.generate_private_key(ec.SECP256R1())


KEYS = {
    "EC": _ec,
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}


def certified(name, key, issuer, signer, ca, years=1):
    """A certificate, PEM; of dates that are over, as of a session whose results wait."""
    builder = x509.CertificateBuilder(
        _named(issuer),
        _named(name),
        key.public_key(),
        x509.random_serial_number(),
        START,
        START + datetime.timedelta(days=365 * years),
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _named(name):
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def pem(key):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load_cluster(local_cluster(tmp_path_factory.mktemp("cluster"), "state"))


@pytest.fixture(scope="module")
def authority():
    """(key, certificate)."""
    key = _ec()
    return key, certified("root", key, "root", key, True)


@pytest.fixture
def identity(authority):
    """Of a role, with a key of some kind; through an authority between, or not."""

    def make(name, kind="EC", between=False):
        key, (root, root_pem) = KEYS[kind](), authority
        if not between:
            return Identity(root_pem, certified(name, key, "root", root, False), pem(key))
        middle = _ec()
        chain = certified(name, key, "middle", middle, False)
        chain += certified("middle", middle, "root", root, True)
        return Identity(root_pem, chain, pem(key))

    return make


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("kind", KEYS)
def test_a_role_signs_with_its_certificate(config, identity, kind, between):
    signer = Signer(config, identity("s1", kind, between), "s1")
    verifier = Verifier(config, identity("ds"))
    signed = signer.sign(Alarm(attempt=1, serial=2, share=3))
    verifier.require(signed, "s1", signer.certificate)
    forged = [
        (signed.model_copy(update={"share": 4}), "s1"),
        (signed.model_copy(update={"serial": 3}), "s1"),
        (signed.model_copy(update={"signature": signed.signature[:-1]}), "s1"),
        (signed.model_copy(update={"signature": b""}), "s1"),
        (Signed(**signed.model_dump(exclude={"share"})), "s1"),
        (signed, "s2"),
    ]
    for message, role in forged:
        with pytest.raises(Forged):
            verifier.require(message, role, signer.certificate)
    other = config.model_copy(update={"session": "another"})
    with pytest.raises(Forged, match="s1 did not sign this Alarm"):
        Verifier(other, identity("ds")).require(signed, "s1", signer.certificate)


def test_whose_certificate_it_is(config, identity, authority):
    own = identity("s1")
    signer = Signer(config, own, "s1")
    signed = signer.sign(Alarm(attempt=1, serial=2, share=3))
    verifier = Verifier(config, identity("ds"))
    key, root_pem = _ec(), authority[1]
    stranger = certified("s1", key, "root", _ec(), False)  # of another authority of the same name
    by_a_role = certified("s1", key, "s2", _ec(), False) + identity("s2").certificate
    for certificate in (stranger, by_a_role, root_pem, b"", b"nothing", own.key):
        with pytest.raises(Forged):
            verifier.require(signed, "s1", certificate.decode())
    with pytest.raises(Forged, match="another than s2"):
        verifier.require(signed, "s2", signer.certificate)


def test_a_key_of_another_kind_is_refused_at_the_beginning(config, authority):
    key, (root, root_pem) = ed448.Ed448PrivateKey.generate(), authority
    identity = Identity(root_pem, certified("s1", key, "root", root, False), pem(key))
    with pytest.raises(ValueError, match="key of s1: expected one of EC, RSA or Ed25519"):
        Signer(config, identity, "s1")
