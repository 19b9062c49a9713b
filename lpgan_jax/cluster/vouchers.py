"""SP takes nothing that DS has not vouched for, where DS checks what the servers do."""

from __future__ import annotations

from collections.abc import Sequence

from lpgan_jax.cluster.certificates import load_identity
from lpgan_jax.cluster.reporting import BadInput
from lpgan_jax.cluster.settings import DEALER, SERVERS, ClusterConfig
from lpgan_jax.cluster.signatures import Forged, Verifier
from lpgan_jax.cluster.transcript import digest
from lpgan_jax.cluster.wire import Result


def verifier_of(cluster: ClusterConfig, role: str) -> Verifier | None:
    """For a role that takes results; None where DS does not check."""
    if cluster.integrity is None:
        return None
    return Verifier(cluster, load_identity(cluster, role))


def require_vouched(
    verifier: Verifier, heads: Sequence[Result], payloads: Sequence[bytes | bytearray]
) -> None:
    """Check that both shares of a result are those that DS checked.

    Args:
        verifier: of whoever takes it.
        heads: S1's and S2's.
        payloads: likewise.

    Raises:
        BadInput: a server gives something else; names it.
    """
    for server, head, payload in zip(SERVERS, heads, payloads, strict=True):
        what, voucher = f"{server}: its share of {head.kind} at step {head.step}", head.voucher
        if voucher is None:
            raise BadInput(f"{what}: {DEALER} has not vouched for it")
        try:
            verifier.require(voucher, DEALER, voucher.certificate)
        except Forged as error:
            raise BadInput(f"{what}: {error}") from None
        said = voucher.server, voucher.attempt, voucher.serial, voucher.kind, voucher.step
        if said != (server, head.attempt, head.serial, head.kind, head.step):
            raise BadInput(f"{what}: {DEALER} vouched for another result")
        if voucher.digest != digest(payload):
            raise BadInput(f"{what}: not the one that {DEALER} vouched for")
    first, second = ((head.attempt, head.serial) for head in heads)
    if first != second:  # an earlier answer, say
        raise BadInput(f"{heads[0].kind}: s1 and s2 give shares of different ones")
