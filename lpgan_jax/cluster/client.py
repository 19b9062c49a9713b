"""The other end of gRPC: what DS, further owners and SP ask of a server."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any

import grpc

from lpgan_jax.cluster import wire
from lpgan_jax.cluster.certificates import Identity
from lpgan_jax.cluster.condition import Condition
from lpgan_jax.cluster.reporting import Lost, Reporter
from lpgan_jax.cluster.service import SERVICE, link_options
from lpgan_jax.cluster.settings import ClusterConfig, ServerName
from lpgan_jax.cluster.wire import (
    Description,
    Hello,
    Opening,
    Progress,
    Question,
    Received,
    Release,
    Result,
    Reveal,
    Revealed,
    Watching,
)

_POLL_S = 0.3
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class RefusedBy(Exception):
    """A server refused a message; says which, and its reason."""


class Client:
    """A role's line to one server.

    Its methods raise `Lost` if the server is gone, and `RefusedBy` if it refuses.

    Attributes:
        server: which one.
    """

    def __init__(
        self,
        config: ClusterConfig,
        identity: Identity,
        role: str,
        server: ServerName,
        reporter: Reporter,
    ) -> None:
        """Connects when it is used."""
        self.server, self._config, self._role, self._reporter = server, config, role, reporter
        # The name, not the address, is what its certificate must show.
        name = ("grpc.ssl_target_name_override", config.certificate_name(server))
        backoff = [
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.initial_reconnect_backoff_ms", 200),
        ]
        self._channel = grpc.secure_channel(
            config.address(server).target,
            identity.for_channel(),
            options=[*link_options(config.timeouts), *backoff, name],
        )

    def _hello(self) -> bytes:
        return wire.encode(Hello(session=self._config.session, role=self._role))

    def _explained(self, error: Any) -> Exception:
        code, details = error.code(), error.details()
        if code in _GONE:
            return Lost(self.server, details)
        if code == grpc.StatusCode.UNKNOWN:
            return Lost(self.server, f"an error there: {details}")
        return RefusedBy(f"{self.server} refuses: {details}")

    def _call(
        self, method: str, frames: Iterable[bytes], limit_s: float | None = None
    ) -> Generator[bytes]:
        """The answers of a method."""
        call = self._channel.stream_stream(f"/{SERVICE}/{method}")
        answers = call(iter(frames), timeout=limit_s)
        try:
            yield from answers
        except grpc.RpcError as error:
            raise self._explained(error) from None
        finally:
            answers.cancel()  # whoever has enough reads no more

    def _answer(self, method: str, frames: Iterable[bytes], limit_s: float | None = None) -> bytes:
        """The only answer of a method."""
        with closing(self._call(method, frames, limit_s)) as answers:
            return next(answers, b"")

    def describe(self) -> Description:
        """What the server says of itself."""
        limit = self._config.timeouts.silence_s
        return wire.decode(Description, self._answer("Describe", [self._hello()], limit))

    def condition(self) -> Condition:
        """What the server's machine is like, by itself."""
        limit = self._config.timeouts.silence_s
        return wire.decode(Condition, self._answer("Condition", [self._hello()], limit))

    def wait_until(
        self, wanted: Callable[[Description], bool], *, patient: bool = False
    ) -> Description:
        """What the server says, once it is as wanted.

        It must be so within `wait_s`, or, if `patient`, at any time while the server answers.
        """
        limit = self._config.timeouts.wait_s
        end, last = time.monotonic() + limit, "not as wanted"
        while time.monotonic() < end:
            try:
                description = self.describe()
                if wanted(description):
                    return description
                last = f"still {description.phase}"
                if patient:
                    end = time.monotonic() + limit
            except Lost as error:
                last = str(error)
            time.sleep(_POLL_S)
        raise Lost(self.server, f"not ready within {limit:g} s: {last}")

    def open(self, opening: Opening) -> None:
        """Begin an attempt."""
        self._answer("Open", [wire.encode(opening)], self._config.timeouts.wait_s)

    def send(self, frames: Iterable[bytes]) -> None:
        """Send parcels; returns when all are accepted."""
        self._answer("Send", self._counted(frames))

    def _counted(self, frames: Iterable[bytes]) -> Iterator[bytes]:
        for frame in frames:
            self._reporter.count(self.server, sent=len(frame))
            yield frame

    def watch(self, attempt: int) -> Iterator[Progress]:
        """The server's progress in an attempt, whenever it changes."""
        watching = Watching(session=self._config.session, role=self._role, attempt=attempt)
        for data in self._call("Watch", [wire.encode(watching)]):
            yield wire.decode(Progress, data)

    def results(
        self, after: Received, size_of: Callable[[str], int | None]
    ) -> Iterator[tuple[Result, bytearray]]:
        """The server's shares of results after one; it may drop the others.

        It ends when the server has dropped some of these: a new attempt will compute them again.

        Args:
            after: up to which result SP has them, on its disk.
            size_of: bytes of a share of a kind of result; None if there is no such kind.
        """
        frames = self._call("Results", [wire.encode(after)])
        for data in frames:
            yield self._result(data, frames, size_of)

    def received(self, received: Received) -> None:
        """Say what SP has, on its disk: the server may drop it."""
        self._answer("Received", [wire.encode(received)], self._config.timeouts.wait_s)

    def reveal(self, attempt: int, serial: int, size: int) -> bytearray:
        """The server's share of the state before a task, of so many bytes."""
        asked = Reveal(
            session=self._config.session, role=self._role, attempt=attempt, serial=serial
        )
        limit = self._config.timeouts.wait_s
        frames = self._call("Reveal", [wire.encode(asked)], limit)
        head = wire.decode(Revealed, next(frames, b""))
        if head.size != size:
            raise wire.Malformed(f"{self.server}: {head.size} bytes of a state, expected {size}")
        payload = wire.receive(frames, size)
        self._reporter.count(self.server, received=size)
        return payload

    def release(self, release: Release) -> None:
        """Say what the server need not keep, and may hand on."""
        self._answer("Release", [wire.encode(release)], self._config.timeouts.wait_s)

    def ask(
        self, question: Question, shares: list[Any], size: int, limit_s: float
    ) -> tuple[Result, bytearray]:
        """The server's share of an answer, of so many bytes."""
        frames = itertools.chain([wire.encode(question)], wire.chunks(shares))
        answers = self._call("Ask", frames, limit_s)
        return self._result(next(answers, b""), answers, {"answer": size}.get)

    def _result(
        self, data: bytes, frames: Iterator[bytes], size_of: Callable[[str], int | None]
    ) -> tuple[Result, bytearray]:
        head = wire.decode(Result, data)
        if head.size != size_of(head.kind):
            raise wire.Malformed(f"{self.server}: {head.size} bytes of {head.kind}")
        payload = wire.receive(frames, head.size)
        self._reporter.count(self.server, received=head.size)
        return head, payload

    def close(self) -> None:
        """Hang up."""
        self._channel.close()
