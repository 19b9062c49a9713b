"""A server's word on what it does: signed, to the other server and to DS, after each task.

Here an honest server sees to it that nobody can blame it: it says nothing to DS that contradicts
what the other one signed, and verifies that as DS will.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from lpgan_jax.cluster.accounts import Accounts
from lpgan_jax.cluster.signatures import Forged, Signer, Verifier
from lpgan_jax.cluster.transcript import Witness, digest, digest_of
from lpgan_jax.cluster.wire import Alarm, Commitment, Opened, Sent, Shown, Signed
from lpgan_jax.mpc import exchange

_S = TypeVar("_S", bound=Signed)


class Line(exchange.Line, Protocol):
    """The line to the other server (`line.Line`)."""

    other: str

    def swap_notes(self, own: Any, limit_s: float) -> Any:
        """Say something, and hear the same of the other server."""

    def broken(self, reason: str) -> Exception:
        """End the line: the error to raise."""


class Conduct:
    """Of one attempt.

    Attributes:
        witness: of the line, for programs.
    """

    def __init__(
        self,
        signer: Signer,
        verifier: Verifier,
        line: Line,
        accounts: Accounts,
        attempt: int,
        limit_s: float,
    ) -> None:
        """Says hello to the other server.

        Args:
            signer: for this server.
            verifier: of this session.
            line: to the other server.
            accounts: where DS looks.
            attempt: its number.
            limit_s: for the other server to say something.
        """
        self.witness = Witness(line)
        self._signer, self._verifier, self._line = signer, verifier, line
        self._accounts, self._attempt, self._limit_s = accounts, attempt, limit_s
        shown = Shown(certificate=signer.certificate)
        self._other_certificate: str = line.swap_notes(shown, limit_s).certificate

    def commit(self, serial: int, before: Any, after: Any, result: bytes) -> None:
        """Say what was done in a task, whose messages went by the witness since `begin`.

        Args:
            serial: of the task.
            before: own share of the state before it.
            after: own share of the state after it.
            result: own share of the result.

        Raises:
            Exception: the line's, if the other server says that it was something else.
        """
        about: dict[str, Any] = {"attempt": self._attempt, "serial": serial}
        sent, received = self.witness.sent.bytes(), self.witness.received.bytes()
        own, other = self._swap(Sent(**about, digests=sent, received=digest(received)))
        if other.digests != received or other.received != digest(sent):
            raise self._line.broken(f"{self._line.other} says that something else was sent")
        commitment = Commitment(
            **about,
            own=own,
            other=other,
            state=digest_of(after),
            result=digest(result),
            certificate=self._signer.certificate,
            other_certificate=self._other_certificate,
        )
        self._accounts.commit(self._signer.sign(commitment), before)

    def open_alarm(self, serial: int, share: int) -> Opened:
        """Open an alarm with the other server, to whose look both have committed.

        Call it when DS has heard both (`Accounts.wait_until_heard`): so nobody sees the alarm and
        leaves before DS may look.
        """
        own, other = self._swap(Alarm(attempt=self._attempt, serial=serial, share=share))
        return Opened(own=own, other=other)

    def _swap(self, own: _S) -> tuple[_S, _S]:
        """Say something signed to the other server: (as it was said, what the other says)."""
        own = self._signer.sign(own)
        other = self._line.swap_notes(own, self._limit_s)
        try:
            self._verifier.require(other, self._line.other, self._other_certificate)
        except Forged as error:
            raise self._line.broken(str(error)) from None
        if (other.attempt, other.serial) != (own.attempt, own.serial):
            raise self._line.broken(f"{self._line.other} signs what is of another task")
        return own, other
