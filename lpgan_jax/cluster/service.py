"""A server's end of gRPC: it authenticates the sender, and hands over to the session."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from lpgan_jax.cluster import wire
from lpgan_jax.cluster.certificates import Identity
from lpgan_jax.cluster.condition import own_condition
from lpgan_jax.cluster.journal import Journal, Order
from lpgan_jax.cluster.reporting import Reporter
from lpgan_jax.cluster.session import Session
from lpgan_jax.cluster.settings import DEALER, PROVIDER, ClusterConfig, Timeouts
from lpgan_jax.cluster.wire import (
    Forbidden,
    Hello,
    Malformed,
    Opening,
    Question,
    Received,
    Refused,
    Release,
    Result,
    Reveal,
    Revealed,
    Unexpected,
    Watching,
    decode,
    encode,
)

SERVICE = "lpgan.Server"
_CALLS = 8
"""That one role may have open at a time, so that no role can keep the others out."""
_HEARTBEAT_S = 1.0

_CODES = {
    Malformed: grpc.StatusCode.INVALID_ARGUMENT,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
}

_M = TypeVar("_M", bound=wire.Message)
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
    """Answers DS, further owners, SP and clients.

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
        self._open_calls = dict.fromkeys(config.roles, 0)
        self._lock = threading.Lock()
        owners = config.owners
        methods: dict[str, tuple[Callable[..., Iterator[bytes]], list[str]]] = {
            "Describe": (self._describe, [*owners, *config.askers]),
            "Condition": (self._condition, [*owners, *config.askers]),
            "Open": (self._open, [DEALER]),
            "Send": (self._send, owners),
            "Watch": (self._watch, owners),
            "Results": (self._results, [PROVIDER]),
            "Received": (self._received, [PROVIDER]),
            "Ask": (self._ask, config.askers),
            "Reveal": (self._reveal, [DEALER]),
            "Release": (self._release, [DEALER]),
        }
        # All take streams, and so are called before anything is received: gRPC would read a single
        # message in one of its few threads, however long the sender takes, whoever it is.
        handlers = {
            name: grpc.stream_stream_rpc_method_handler(self._guarded(method, allowed))
            for name, (method, allowed) in methods.items()
        }
        threads = _CALLS * len(config.roles)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(threads),
            options=[*link_options(config.timeouts), ("grpc.so_reuseport", 0)],
            maximum_concurrent_rpcs=threads,
        )
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(SERVICE, handlers)]
        )
        where = config.address(session.server).place
        try:
            self.port = self._server.add_secure_port(where, identity.for_server())
        except RuntimeError as error:
            raise OSError(f"{where}: in use, or no address of this machine") from error
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

    def _guarded(
        self, method: Callable[..., Iterator[bytes]], allowed: list[str]
    ) -> Callable[[Iterator[bytes], Context], Iterator[bytes]]:
        @functools.wraps(method)
        def call(frames: Iterator[bytes], context: Context) -> Iterator[bytes]:
            sender = "nobody"
            try:
                sender = self._sender(context)
                if sender not in allowed:
                    raise Forbidden(f"{sender} may not do this, expected {' or '.join(allowed)}")
                with self._one_call_of(sender):
                    yield from method(sender, frames, context)
            except Refused as error:
                self._refuse(context, sender, error)

        return call

    @contextmanager
    def _one_call_of(self, sender: str) -> Iterator[None]:
        with self._lock:
            if self._open_calls[sender] >= _CALLS - 1:
                raise Unexpected(f"{sender} has {_CALLS - 1} calls open already: try later")
            self._open_calls[sender] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open_calls[sender] -= 1

    def _read(self, model: type[_M], sender: str, frames: Iterator[bytes]) -> _M:
        """The first message of a call, checked."""
        message = decode(model, next(frames, b""))
        self._session.check(message, sender)
        return message

    # The methods ------------------------------------------------------------------------------

    def _describe(self, sender: str, frames: Iterator[bytes], _: Context) -> Iterator[bytes]:
        self._read(Hello, sender, frames)
        yield encode(self._session.describe())

    def _condition(self, sender: str, frames: Iterator[bytes], _: Context) -> Iterator[bytes]:
        self._read(Hello, sender, frames)
        yield encode(own_condition())

    def _open(self, sender: str, frames: Iterator[bytes], _: Context) -> Iterator[bytes]:
        self._session.open(self._read(Opening, sender, frames))
        yield b""

    def _send(self, sender: str, frames: Iterator[bytes], _: Context) -> Iterator[bytes]:
        self._session.accept(sender, self._counted(sender, frames))
        yield b""

    def _counted(self, sender: str, frames: Iterator[bytes]) -> Iterator[bytes]:
        for frame in frames:
            self._reporter.count(sender, received=len(frame))
            yield frame

    def _watch(self, sender: str, frames: Iterator[bytes], context: Context) -> Iterator[bytes]:
        self._session.watch(self._read(Watching, sender, frames))
        if not context.add_callback(functools.partial(self._session.gone, sender)):
            self._session.gone(sender)
        seen = None
        while context.is_active():
            progress = self._session.progress(seen, _HEARTBEAT_S)
            if progress != seen:
                seen = progress
                yield encode(progress)

    def _results(self, sender: str, frames: Iterator[bytes], context: Context) -> Iterator[bytes]:
        after = self._has(sender, frames)
        for entry in self._journal.results(after, _HEARTBEAT_S):
            if not context.is_active():
                return
            if entry is not None:
                yield from self._sent(sender, *entry)

    def _received(self, sender: str, frames: Iterator[bytes], _: Context) -> Iterator[bytes]:
        self._has(sender, frames)
        yield b""

    def _has(self, sender: str, frames: Iterator[bytes]) -> Order:
        """Up to which result SP has them all; they are dropped."""
        received = self._read(Received, sender, frames)
        self._journal.drop((received.attempt, received.serial))
        return received.attempt, received.serial

    def _sent(self, receiver: str, head: Result, payload: bytes) -> Iterator[bytes]:
        self._reporter.count(receiver, sent=len(payload))
        yield encode(head)
        if payload:
            yield from wire.chunks([payload])

    def _ask(self, sender: str, frames: Iterator[bytes], context: Context) -> Iterator[bytes]:
        question = self._read(Question, sender, frames)
        self._session.check_question(sender, question)
        shares = wire.receive(frames, question.size) if question.size else None
        answer = self._session.ask(sender, question, shares)
        timeouts = self._config.timeouts
        # The first that DS looks at has it compile what it looks with.
        limit = timeouts.wait_s if self._config.integrity is None else timeouts.start_s
        try:
            held = answer.result(limit)
        except TimeoutError:
            reason = f"{DEALER} dealt nothing for this within {limit:g} s"
            context.abort(grpc.StatusCode.UNAVAILABLE, reason)
        yield from self._sent(sender, held.head, held.payload)

    def _reveal(self, sender: str, frames: Iterator[bytes], _: Context) -> Iterator[bytes]:
        asked = self._read(Reveal, sender, frames)
        self._session.of_attempt(asked)
        state = self._session.accounts.reveal(asked.serial)
        yield encode(Revealed(size=wire.nbytes(state)))
        yield from wire.chunks(state)

    def _release(self, sender: str, frames: Iterator[bytes], _: Context) -> Iterator[bytes]:
        release = self._read(Release, sender, frames)
        self._session.of_attempt(release)
        if release.caught is not None:
            self._session.caught(release.caught)
        else:
            self._session.accounts.release(release)
        yield b""
