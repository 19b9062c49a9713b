"""The line between S1 and S2: mutual TLS 1.3, and in each round one message each way.

S1 listens, S2 dials. Each proves with its certificate who it is, and the other's name is checked at
both ends; then both say which attempt of which session they are in, and later, which program they
run (`agree`). A message has a head of three numbers: the task, the round and the length, all of
which the receiver knows beforehand. Whatever else comes, or does not come in time, ends the line,
and names the step and the round; nothing is allocated for it, and no word of it is used. Messages
are sent and received at the same time, by the thread that waits for them, so that two large ones
cannot block each other.
"""

from __future__ import annotations

import hashlib
import itertools
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import Field

from lpgan_jax.cluster.settings import ClusterConfig, ServerName
from lpgan_jax.cluster.wire import LONGEST_NOTE, Malformed, decode, encode
from lpgan_jax.training.config import Fields

HEAD = struct.Struct("<QQQ")
"""Of a message: a digest of the task and its number, the round in the task, bytes that follow."""

_JOINED = 2**16  # bytes of a message that is sent in one piece
_LENGTH = struct.Struct("<I")
_HANDSHAKE_S = 10.0
_CALLERS = 16  # whose handshakes go on at the same time
_MOST_TOLD = 20  # that were turned away
_AGAIN_S = 0.2  # between two calls of S2


class LineBroken(Exception):
    """The line cannot go on, and why."""


class Hello(Fields):
    """What both say first."""

    session: str = Field(max_length=64)
    attempt: int


class Running(Fields):
    """What both say before the first task: a digest of each part of the program."""

    functions: dict[str, str]


_Note = TypeVar("_Note", bound=Fields)


class Listener:
    """S1's end before S2 has called."""

    def __init__(self, config: ClusterConfig, context: ssl.SSLContext) -> None:
        """Listens from now on.

        Raises:
            OSError: the port is taken, or the address is not this machine's.
        """
        self._config, self._context = config, context
        place = config.line.listen or config.line.host
        family = socket.AF_INET6 if ":" in place else socket.AF_INET
        address = place, config.line.port
        try:
            self._socket = socket.create_server(address, family=family, backlog=_CALLERS)
        except OSError as error:
            reason = f"line: {place}, port {config.line.port}: {error.strerror}"
            raise OSError(error.errno, reason) from error

    def accept(self, attempt: int, limit_s: float, refused: Callable[[str], None]) -> Line:
        """Wait for S2 of this attempt; others are turned away, and may try as long as they like.

        Args:
            attempt: that S2 must be in.
            limit_s: to wait.
            refused: told why somebody was turned away.

        Raises:
            LineBroken: it did not call in time.
        """
        found: list[Line] = []
        calling: dict[ssl.SSLSocket, str] = {}  # the oldest first
        done, lock, told = threading.Event(), threading.Lock(), itertools.count()

        def refuse(caller: str, error: Exception) -> None:
            if not done.is_set() and next(told) < _MOST_TOLD:
                refused(f"{caller}: {_said(error)}")

        def answer(tls: ssl.SSLSocket, caller: str) -> None:
            try:
                line = _greeted(self._config, "s1", tls, attempt, _HANDSHAKE_S)
            except (OSError, ValueError, LineBroken) as error:
                refuse(caller, error)
            else:
                with lock:
                    if done.is_set():
                        line.close()
                    else:
                        found.append(line)
            finally:
                with lock:
                    calling.pop(tls, None)

        end = time.monotonic() + limit_s
        self._socket.settimeout(0.05)
        try:
            while not found and time.monotonic() < end:
                try:
                    connection, address = self._socket.accept()
                except TimeoutError:
                    continue
                except OSError as error:  # of one caller, or of too many
                    refuse("somebody", error)
                    time.sleep(0.05)
                    continue
                caller = str(address[0])
                try:
                    tls = self._context.wrap_socket(
                        connection, server_side=True, do_handshake_on_connect=False
                    )
                except (OSError, ValueError) as error:  # it has hung up already
                    connection.close()
                    refuse(caller, error)
                    continue
                with lock:
                    # S2 shows its certificate at once: who is silent makes room for who comes.
                    if len(calling) >= _CALLERS:
                        with suppress(OSError):
                            socket.socket.shutdown(next(iter(calling)), socket.SHUT_RDWR)
                    calling[tls] = caller
                threading.Thread(target=answer, args=(tls, caller), daemon=True).start()
        finally:
            self.close()
            with lock:
                done.set()
                for line in found[:-1]:
                    line.close()
        if not found:
            raise LineBroken(f"s2 did not call {self._config.line.target} within {limit_s:g} s")
        return found[-1]

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


def dial(config: ClusterConfig, context: ssl.SSLContext, attempt: int, limit_s: float) -> Line:
    """S2's end: call S1, again and again.

    Raises:
        LineBroken: S1 is not there in time, or is in no such attempt; says what came last.
    """
    end, last = time.monotonic() + limit_s, "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            address = (config.line.host, config.line.port)
            connection = socket.create_connection(address, min(left, _HANDSHAKE_S))
        except OSError as error:
            last = _said(error)
        else:
            try:
                tls = context.wrap_socket(connection, do_handshake_on_connect=False)
                left = min(max(end - time.monotonic(), 0.1), _HANDSHAKE_S)
                return _greeted(config, "s2", tls, attempt, left)
            except (OSError, ValueError, LineBroken) as error:
                connection.close()
                last = _said(error)
        time.sleep(_AGAIN_S)
    raise LineBroken(f"s1 at {config.line.target}: {last} (called for {limit_s:g} s)")


def _said(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error)


def _greeted(
    config: ClusterConfig, server: ServerName, tls: ssl.SSLSocket, attempt: int, limit_s: float
) -> Line:
    """The line, once both have shown who they are and that they are in the same attempt.

    Raises:
        OSError: TLS's errors too.
        LineBroken: it is not the other server, or in another attempt.
    """
    other = "s1" if server == "s2" else "s2"
    end = time.monotonic() + limit_s
    try:
        tls.settimeout(limit_s)
        tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _keep_alive(tls, config.timeouts.silence_s)
        tls.do_handshake()
        shown = tls.getpeercert() or {}
        names: Any = shown.get("subjectAltName", ())
        wanted = config.certificate_name(other)
        if ("DNS", wanted) not in names:
            found = ", ".join(str(name) for _, name in names) or "nobody"
            raise LineBroken(f"its certificate is of {found}, expected {wanted}")
        line = Line(tls, other)
        own = Hello(session=config.session, attempt=attempt)
        said = line.swap_notes(own, end - time.monotonic())
        if said != own:
            raise LineBroken(
                f"it is in attempt {said.attempt} of {said.session!r}, expected {attempt} of "
                f"{config.session!r}"
            )
    except BaseException:
        tls.close()
        raise
    return line


def _keep_alive(tls: ssl.SSLSocket, seconds: float) -> None:
    """While servers compile, or wait to be asked, nothing is said, and routers forget who is."""
    tls.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
        if (option := getattr(socket, name, None)) is not None:
            tls.setsockopt(socket.IPPROTO_TCP, option, max(1, int(seconds)))


class Line:
    """An open line; of one thread at a time.

    Attributes:
        other: the other server.
        sent: bytes so far, with heads, without what TLS adds.
        received: likewise.
        failure: why it is broken; None as long as it is not.
    """

    def __init__(self, connection: ssl.SSLSocket, other: str) -> None:
        """`connection`: after the handshake."""
        connection.setblocking(False)
        self._socket, self.other = connection, other
        self._poll = select.poll()
        self.sent = self.received = 0
        self.failure: LineBroken | None = None
        self._tasks, self._task, self._name, self._rounds, self._next = 0, 0, "", 0, 0
        self._end = 0.0

    def agree(self, functions: Mapping[str, str], limit_s: float) -> None:
        """Check that the other server is about to run the same.

        Args:
            functions: a digest of each part.
            limit_s: for it to say so: it may still compile.

        Raises:
            LineBroken: it runs something else (names what), or does not say in time.
        """
        own = Running(functions=dict(functions))
        found = self.swap_notes(own, limit_s).functions
        if differ := sorted(
            name
            for name in own.functions.keys() | found.keys()
            if own.functions.get(name) != found.get(name)
        ):
            raise self.broken(f"the program differs from that of {self.other}: {differ[0]}")

    def begin(self, name: str, rounds: int, limit_s: float) -> None:
        """Say what comes next; both servers have the same tasks, in the same order.

        Args:
            name: "step 7", say: for errors, and in the heads of messages.
            rounds: messages that it takes.
            limit_s: for all of it.
        """
        self._name, self._rounds, self._next = name, rounds, 0
        self._tasks += 1
        described = f"{self._tasks} {name}".encode()
        self._task = int.from_bytes(hashlib.sha256(described).digest()[:8], "little")
        self._end = time.monotonic() + limit_s

    def swap(self, number: int, sent: Sequence[memoryview], received: Sequence[memoryview]) -> None:
        """Send a round's words, and receive the other server's (`exchange.Line`).

        Raises:
            LineBroken: what came is not this round's message, or nothing came in time.
        """
        where = f"{self._name}, round {number + 1} of {self._rounds}"
        if self.failure is not None:
            raise self.failure
        if number != self._next or number >= self._rounds:
            raise self.broken(f"{where}: out of turn, expected round {self._next + 1}")
        if [*map(len, sent)] != [*map(len, received)]:
            raise self.broken(f"{where}: other sizes are sent than received")
        size = sum(map(len, sent))
        expected = HEAD.pack(self._task, number, size)

        out = _pieces([expected, *sent])
        head = bytearray(HEAD.size)
        try:
            self._duplex(out, [memoryview(head)], flush=False)
            if head != expected:
                task, other_number, length = HEAD.unpack(head)
                of = "this" if task == self._task else "another"
                raise LineBroken(
                    f"a message of {of} task, round {other_number + 1}, {length} bytes came, "
                    f"expected round {number + 1} of this, {size} bytes"
                )
            self._duplex(out, received)
        except (OSError, ValueError, LineBroken) as error:
            raise self.broken(f"{where}: {_said(error)}") from error
        self._next += 1

    def finish(self) -> None:
        """After a task.

        Raises:
            LineBroken: it took fewer rounds than it should.
        """
        if self._next != self._rounds:
            raise self.broken(f"{self._name}: {self._next} of {self._rounds} rounds took place")

    def close(self) -> None:
        """Hang up."""
        with suppress(OSError):
            self._socket.close()

    def broken(self, reason: str) -> LineBroken:
        """End the line: the error to raise."""
        self.failure = LineBroken(reason)
        self.close()
        return self.failure

    def swap_notes(self, own: _Note, limit_s: float) -> _Note:
        """Send a note, and receive the other server's of the same kind.

        Raises:
            LineBroken: what came is none, or nothing came in time.
        """
        if self.failure is not None:
            raise self.failure
        self._end = time.monotonic() + limit_s
        text = encode(own)
        head = bytearray(_LENGTH.size)
        out = _pieces([_LENGTH.pack(len(text)), text])
        try:
            self._duplex(out, [memoryview(head)], flush=False)
            (length,) = _LENGTH.unpack(head)
            if length > LONGEST_NOTE:
                raise LineBroken(f"a note of {length} bytes, expected at most {LONGEST_NOTE}")
            found = bytearray(length)
            self._duplex(out, [memoryview(found)])
            return decode(type(own), bytes(found))
        except (OSError, ValueError, LineBroken, Malformed) as error:
            raise self.broken(_said(error)) from error

    def _duplex(
        self, out: deque[memoryview], into: Iterable[memoryview], flush: bool = True
    ) -> None:
        """Send and receive at the same time.

        Args:
            out: to be sent; what was, is taken away.
            into: to be filled.
            flush: whether to go on until all is sent.

        Raises:
            OSError, LineBroken: the other end is gone, or the time is up.
        """
        waiting = deque(view for view in into if view)
        while waiting or (flush and out):
            wanted, moved = 0, 0
            try:
                if out:
                    moved += _take(out, sent := self._socket.send(out[0]))
                    self.sent += sent
            except _WANTS as error:
                wanted |= _event(error)
            try:
                if waiting:
                    moved += _take(waiting, received := self._socket.recv_into(waiting[0]))
                    self.received += received
                    if not received:
                        raise LineBroken("it hung up")
            except _WANTS as error:
                wanted |= _event(error)
            if not moved:
                self._wait(wanted)

    def _wait(self, events: int) -> None:
        """For the connection to be ready."""
        self._poll.register(self._socket, events)
        left = self._end - time.monotonic()
        if left <= 0 or not self._poll.poll(1000 * left):
            raise TimeoutError


_WANTS = (ssl.SSLWantReadError, ssl.SSLWantWriteError)


def _event(error: Exception) -> int:
    return select.POLLIN if isinstance(error, ssl.SSLWantReadError) else select.POLLOUT


def _take(views: deque[memoryview], count: int) -> int:
    """Take so many bytes from the first; how many."""
    views[0] = views[0][count:]
    if not views[0]:
        views.popleft()
    return count


def _pieces(parts: Sequence[bytes | memoryview]) -> deque[memoryview]:
    """A message as what is sent at once: small ones in one piece."""
    if sum(map(len, parts)) <= _JOINED:
        parts = [b"".join(parts)]
    return deque(memoryview(part) for part in parts if part)
