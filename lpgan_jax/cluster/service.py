"""A server's end of gRPC: it authenticates the sender, and hands over to the session."""

from __future__ import annotations

import functools
import math
import queue
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

from lpgan_jax.cluster import wire
from lpgan_jax.cluster.certificates import Identity
from lpgan_jax.cluster.journal import Journal
from lpgan_jax.cluster.reporting import Reporter
from lpgan_jax.cluster.session import Session
from lpgan_jax.cluster.settings import DEALER, PROVIDER, ClusterConfig, Timeouts
from lpgan_jax.cluster.wire import (
    Forbidden,
    Hello,
    Malformed,
    Opening,
    Refused,
    Result,
    SampleRequest,
    decode,
    encode,
)

SERVICE = "lpgan.Server"
_THREADS = 32
_STREAMS = 16  # that last as long as their sender likes; the other threads answer questions
_HEARTBEAT_S = 1.0

_CODES = {
    Malformed: grpc.StatusCode.INVALID_ARGUMENT,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
}

Context = Any
"""A `grpc.ServicerContext`; grpc has no types."""


def link_options(timeouts: Timeouts) -> list[tuple[str, int]]:
    """gRPC's options at both ends: small messages, and a dead line is noticed."""
    half = int(timeouts.silence_s * 500)
    return [
        ("grpc.max_receive_message_length", wire.LARGEST_MESSAGE),
        ("grpc.max_send_message_length", wire.LARGEST_MESSAGE),
        ("grpc.keepalive_time_ms", half),
        ("grpc.keepalive_timeout_ms", half),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", half // 2),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", half // 2),
    ]


class Service:
    """Answers DS, further owners and SP.

    Attributes:
        port: where it listens.
    """

    def __init__(
        self,
        config: ClusterConfig,
        identity: Identity,
        session: Session,
        journal: Journal,
        reporter: Reporter,
    ) -> None:
        """Starts listening.

        Raises:
            OSError: the port is taken.
        """
        self._config, self._session, self._journal = config, session, journal
        self._reporter = reporter
        self._roles = {config.certificate_name(role): role for role in config.roles}
        self._refused, self._refused_at = 0, -math.inf
        self._streams = queue.Queue[None](_STREAMS)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(_THREADS),
            options=[*link_options(config.timeouts), ("grpc.so_reuseport", 0)],
        )
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers = {
            "Describe": unary(self._guarded(self._describe)),
            "Open": unary(self._guarded(self._open)),
            "Send": grpc.stream_unary_rpc_method_handler(self._guarded(self._send)),
            "Watch": stream(self._guarded_stream(self._watch)),
            "Results": stream(self._guarded_stream(self._results)),
            "Sample": grpc.stream_stream_rpc_method_handler(self._guarded_stream(self._sample)),
        }
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(SERVICE, handlers)]
        )
        where = config.address(session.server).place
        try:
            self.port = self._server.add_secure_port(where, identity.for_server())
        except RuntimeError as error:
            raise OSError(f"{where}: cannot listen here: {error}") from None
        self._server.start()

    # Who is it, and what if it is refused -----------------------------------------------------

    def _sender(self, context: Context) -> str:
        names = context.auth_context().get("x509_subject_alternative_name", [])
        for name in names:
            if role := self._roles.get(name.decode(errors="replace")):
                return role
        raise Forbidden("the certificate names no role of this session")

    def _refuse(self, context: Context, sender: str, error: Refused) -> None:
        self._refused += 1
        now = time.monotonic()
        if now - self._refused_at > 1.0:  # many refusals must not fill the log
            self._reporter.event(
                "refused",
                sender=sender,
                peer=context.peer(),
                reason=str(error),
                so_far=self._refused,
            )
            self._refused_at = now
        context.abort(_CODES.get(type(error), grpc.StatusCode.FAILED_PRECONDITION), str(error))

    def _guarded(self, method: Callable[[str, Any], bytes]) -> Callable[[Any, Context], bytes]:
        @functools.wraps(method)
        def call(request: Any, context: Context) -> bytes:
            sender = "nobody"
            try:
                sender = self._sender(context)
                return method(sender, request)
            except Refused as error:
                self._refuse(context, sender, error)
                raise AssertionError from None  # abort raises

        return call

    def _guarded_stream(
        self, method: Callable[[str, Any, Context], Iterator[bytes]]
    ) -> Callable[[Any, Context], Iterator[bytes]]:
        @functools.wraps(method)
        def call(request: Any, context: Context) -> Iterator[bytes]:
            sender = "nobody"
            try:
                sender = self._sender(context)
                with self._one_stream():
                    yield from method(sender, request, context)
            except Refused as error:
                self._refuse(context, sender, error)

        return call

    # The methods ------------------------------------------------------------------------------

    def _describe(self, sender: str, data: bytes) -> bytes:
        self._session.check(decode(Hello, data), sender, *self._config.owners, PROVIDER)
        return encode(self._session.describe())

    def _open(self, sender: str, data: bytes) -> bytes:
        opening = decode(Opening, data)
        self._session.check(opening, sender, DEALER)
        self._session.open(opening)
        return b""

    def _send(self, sender: str, frames: Iterator[bytes]) -> bytes:
        with self._one_stream():
            self._session.accept(sender, self._counted(sender, frames))
        return b""

    def _counted(self, sender: str, frames: Iterator[bytes]) -> Iterator[bytes]:
        for frame in frames:
            self._reporter.count(sender, received=len(frame))
            yield frame

    def _watch(self, sender: str, data: bytes, context: Context) -> Iterator[bytes]:
        self._session.check(decode(Hello, data), sender, *self._config.owners)
        seen = None
        while context.is_active():
            progress = self._session.progress(seen, _HEARTBEAT_S)
            if progress != seen:
                seen = progress
                yield encode(progress)

    def _results(self, sender: str, data: bytes, context: Context) -> Iterator[bytes]:
        self._session.check(decode(Hello, data), sender, PROVIDER)
        index = 0
        while context.is_active():
            entry = self._journal.wait(index, _HEARTBEAT_S)
            if entry is not None:
                index += 1
                yield from self._sent(sender, *entry)

    def _sent(self, receiver: str, head: Result, payload: bytes) -> Iterator[bytes]:
        self._reporter.count(receiver, sent=len(payload))
        yield encode(head)
        if payload:
            yield from wire.chunks([payload])

    def _sample(self, sender: str, frames: Iterator[bytes], context: Context) -> Iterator[bytes]:
        request = decode(SampleRequest, next(frames, b""))
        self._session.check(request, sender, PROVIDER)
        self._session.check_wish(request)
        noise = wire.receive(frames, request.size) if request.size else None
        images = self._session.wish(request, noise)
        limit = self._config.timeouts.wait_s
        try:
            payload = images.result(limit)
        except TimeoutError:
            context.abort(
                grpc.StatusCode.UNAVAILABLE, f"{DEALER} dealt nothing for this within {limit:g} s"
            )
        finally:
            self._session.abandon_wish(request.name)
        attempt = self._session.describe().attempt
        head = Result(
            attempt=attempt, serial=0, kind="images", step=0, seconds=0.0, size=len(payload)
        )
        yield from self._sent(sender, head, payload)

    def _one_stream(self) -> _Slot:
        return _Slot(self._streams)


class _Slot:
    """A place among the streams that may be open at a time."""

    def __init__(self, places: queue.Queue[None]) -> None:
        self._places = places

    def __enter__(self) -> None:
        try:
            self._places.put_nowait(None)
        except queue.Full:
            raise wire.Unexpected(f"there are {_STREAMS} streams already: try later") from None

    def __exit__(self, *exception: object) -> None:
        self._places.get_nowait()
