"""The other end of gRPC: what DS, further owners and SP ask of a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import grpc

from lpgan_jax.cluster import wire
from lpgan_jax.cluster.certificates import Identity
from lpgan_jax.cluster.reporting import Lost, Reporter
from lpgan_jax.cluster.service import SERVICE, link_options
from lpgan_jax.cluster.settings import ClusterConfig, ServerName
from lpgan_jax.cluster.wire import Description, Hello, Opening, Progress, Result, SampleRequest

_POLL_S = 0.3
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
_T = TypeVar("_T")


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

    def _guarded(self, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except grpc.RpcError as error:
            raise self._explained(error) from None

    def _explained(self, error: Any) -> Exception:
        code, details = error.code(), error.details()
        if code in _GONE:
            return Lost(self.server, details)
        if code == grpc.StatusCode.UNKNOWN:
            return Lost(self.server, f"an error there: {details}")
        return RefusedBy(f"{self.server} refuses: {details}")

    def describe(self) -> Description:
        """What the server says of itself."""
        limit = self._config.timeouts.silence_s
        call = self._channel.unary_unary(f"/{SERVICE}/Describe")
        data = self._guarded(lambda: call(self._hello(), timeout=limit))
        return wire.decode(Description, data)

    def wait_until(self, wanted: Callable[[Description], bool], limit_s: float) -> Description:
        """What the server says, once it is as wanted."""
        end, last = time.monotonic() + limit_s, "not as wanted"
        while time.monotonic() < end:
            try:
                description = self.describe()
                if wanted(description):
                    return description
                last = f"still {description.phase}"
            except Lost as error:
                last = str(error)
            time.sleep(_POLL_S)
        raise Lost(self.server, f"not ready within {limit_s:g} s: {last}")

    def open(self, opening: Opening) -> None:
        """Begin an attempt."""
        call = self._channel.unary_unary(f"/{SERVICE}/Open")
        limit = self._config.timeouts.wait_s
        self._guarded(lambda: call(wire.encode(opening), timeout=limit))

    def send(self, frames: Iterable[bytes]) -> None:
        """Send parcels; returns when all are accepted."""
        call = self._channel.stream_unary(f"/{SERVICE}/Send")
        self._guarded(lambda: call(self._counted(frames)))

    def _counted(self, frames: Iterable[bytes]) -> Iterator[bytes]:
        for frame in frames:
            self._reporter.count(self.server, sent=len(frame))
            yield frame

    def watch(self) -> Iterator[Progress]:
        """The server's progress, whenever it changes."""
        for data in self._stream("Watch", self._hello()):
            yield wire.decode(Progress, data)

    def results(self, sizes: Mapping[str, int]) -> Iterator[tuple[Result, bytearray]]:
        """The server's shares of results, from the first one on; never ends by itself.

        `sizes`: bytes of a share of each kind of result.
        """
        frames = self._stream("Results", self._hello())
        for data in frames:
            yield self._result(data, frames, sizes)

    def sample(
        self, request: SampleRequest, noise: list[Any], sizes: Mapping[str, int], limit_s: float
    ) -> tuple[Result, bytearray]:
        """The server's share of the images that SP asks for."""

        def frames() -> Iterator[bytes]:
            yield wire.encode(request)
            yield from wire.chunks(noise)

        call = self._channel.stream_stream(f"/{SERVICE}/Sample")
        answer = self._checked(call(frames(), timeout=limit_s))
        return self._result(next(answer, b""), answer, sizes)

    def _result(
        self, data: bytes, frames: Iterator[bytes], sizes: Mapping[str, int]
    ) -> tuple[Result, bytearray]:
        head = wire.decode(Result, data)
        if head.size != sizes.get(head.kind):
            raise wire.Malformed(f"{self.server}: {head.size} bytes of {head.kind}")
        payload = wire.receive(frames, head.size)
        self._reporter.count(self.server, received=head.size)
        return head, payload

    def _stream(self, method: str, data: bytes) -> Iterator[bytes]:
        return self._checked(self._channel.unary_stream(f"/{SERVICE}/{method}")(data))

    def _checked(self, answers: Iterator[bytes]) -> Iterator[bytes]:
        try:
            yield from answers
        except grpc.RpcError as error:
            raise self._explained(error) from None

    def close(self) -> None:
        """Hang up."""
        self._channel.close()
