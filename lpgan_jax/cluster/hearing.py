"""What DS hears of both servers: signed, and no contradiction to what the other one signed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lpgan_jax.cluster.settings import SERVERS
from lpgan_jax.cluster.signatures import Forged, Verifier
from lpgan_jax.cluster.transcript import digest
from lpgan_jax.cluster.units import Unit
from lpgan_jax.cluster.wire import Commitment, Opened, Progress


class Contradiction(Exception):
    """A server says what an honest one does not.

    Attributes:
        server: which one.
        serial: of the task that it is about.
        said: what it said.
    """

    def __init__(self, server: str, serial: int, what: str, said: Commitment | Opened) -> None:
        super().__init__(what)
        self.server, self.serial, self.said = server, serial, said


class Lines(Protocol):
    """Both servers, as DS sees them (`owners`)."""

    progress: dict[str, Progress]
    error: Exception | None

    def wait(self, wanted: Callable[[], bool]) -> object:
        """Until something is so, or the attempt is over, whose error is raised."""

    def fail(self, error: Exception) -> None:
        """End the attempt."""


class Hearing:
    """Of one attempt."""

    def __init__(self, verifier: Verifier, lines: Lines, attempt: int) -> None:
        """`lines`: to both servers; `attempt`: its number."""
        self._verifier, self._lines, self._attempt = verifier, lines, attempt

    def listen(self, unit: Unit) -> None:
        """Take what servers have said of a unit's tasks; the first word counts.

        Raises:
            Contradiction: it is not signed, or not what was said to the other server.
        """
        for place, server in enumerate(SERVERS):
            progress = self._lines.progress.get(server)
            if progress is None or progress.attempt != self._attempt:
                continue
            for said in progress.commitments:
                if said.serial in unit.tasks:
                    both = unit.said.setdefault(said.serial, [None, None])
                    if both[place] is None:
                        self._require_trusted(server, said)
                        both[place] = said
            for opened in progress.opened:
                if opened.own.serial in unit.tasks:
                    alarms = unit.opened.setdefault(opened.own.serial, [None, None])
                    if alarms[place] is None:
                        self._require_heard(unit, place, opened)
                        alarms[place] = opened

    def _require_trusted(self, server: str, said: Commitment) -> None:
        """What a server says is signed by whom it should be, and is no contradiction.

        An honest server does not say anything else: it has looked at what the other one signed.
        """
        other = SERVERS[1 - SERVERS.index(server)]
        what = None
        try:
            self._verifier.require(said, server, said.certificate)
            self._verifier.require(said.own, server, said.certificate)
            self._verifier.require(said.other, other, said.other_certificate)
        except Forged as error:
            what = f"what it says is not signed: {error}"
        about = self._attempt, said.serial
        if {(x.attempt, x.serial) for x in (said, said.own, said.other)} != {about}:
            what = "it says what was signed for another task"
        elif digest(said.own.digests) != said.other.received:
            what = f"it says that it sent something else than what {other} says has come"
        elif digest(said.other.digests) != said.own.received:
            what = f"it says that something else came than what {other} says it sent"
        if what is not None:
            raise Contradiction(server, said.serial, what, said)

    def _require_heard(self, unit: Unit, place: int, opened: Opened) -> None:
        serial, what = opened.own.serial, None
        said = unit.said.get(serial, [None, None])[place]
        if said is None or {(a.attempt, a.serial) for a in (opened.own, opened.other)} != {
            (self._attempt, serial)
        }:
            what = "how an alarm was opened was said of another task"
        else:
            shown = said.certificate, said.other_certificate
            for alarm, of, certificate in zip(
                (opened.own, opened.other), (place, 1 - place), shown, strict=True
            ):
                try:
                    self._verifier.require(alarm, SERVERS[of], certificate)
                except Forged as error:
                    what = f"how an alarm was opened is not signed: {error}"
        if what is not None:
            raise Contradiction(SERVERS[place], serial, what, opened)
