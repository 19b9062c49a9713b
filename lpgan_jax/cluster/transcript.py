"""What passes between the servers in a task, as digests of each server's messages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lpgan_jax.cluster.settings import SERVERS
from lpgan_jax.cluster.wire import buffers
from lpgan_jax.mpc.exchange import Line
from lpgan_jax.mpc.secret import is_secret

DIGEST = 16
"""Bytes of a message's digest: to find another message of the same digest takes 2^128 tries."""
MOST_MESSAGES = 2**12
"""Of a server in a task, where DS checks."""


class Digests:
    """Of messages in their order, one after the other."""

    def __init__(self) -> None:
        self._found: list[bytes] = []

    def add(self, number: int, parts: Sequence[memoryview]) -> None:
        """The message of this number, from 0."""
        assert number == len(self._found), "messages come in order"
        of = hashlib.sha256()
        for part in parts:
            of.update(part)
        self._found.append(of.digest()[:DIGEST])

    def bytes(self) -> bytes:
        """All of them."""
        return b"".join(self._found)


def first_difference(first: bytes, second: bytes) -> int | None:
    """The place of the first digest that differs; None if none does."""
    for place in range(0, max(len(first), len(second)), DIGEST):
        if first[place : place + DIGEST] != second[place : place + DIGEST]:
            return place // DIGEST
    return None


class Witness:
    """A line, and digests of what this server sends and receives on it in a task.

    Attributes:
        sent, received: since `begin`.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self.begin()

    def begin(self) -> None:
        """A task begins."""
        self.sent, self.received = Digests(), Digests()

    def swap(self, number: int, sent: Sequence[memoryview], received: Sequence[memoryview]) -> None:
        """As `exchange.Line`."""
        self._line.swap(number, sent, received)
        self.sent.add(number, sent)
        self.received.add(number, received)


class Between:
    """Both ends of a line in one process: each gets what the other one sends.

    Attributes:
        sent: digests of S1's and of S2's messages.
    """

    def __init__(self) -> None:
        self.sent = Digests(), Digests()

    def swap(self, number: int, sent: Sequence[memoryview], received: Sequence[memoryview]) -> None:
        """As `exchange.Line`, of paired words (`ServerProgram.run_both`)."""
        halves = [(part[: len(part) // 2], part[len(part) // 2 :]) for part in sent]
        for digests, parts in zip(self.sent, zip(*halves, strict=True), strict=True):
            digests.add(number, parts)
        for (first, second), into in zip(halves, received, strict=True):
            into[: len(second)], into[len(second) :] = second, first


def digest(payload: bytes | bytearray) -> bytes:
    """Of a share of a result or a state, or of digests."""
    return hashlib.sha256(payload).digest()


def digest_of(share: Any) -> bytes:
    """Of a pytree of one server's shares, as the bytes of its leaves."""
    found = hashlib.sha256()
    for part in buffers(arrays(share)):
        found.update(part.data)
    return found.digest()


def digests_of(paired: Any) -> list[bytes]:
    """Of S1's and of S2's shares in a pytree of paired arrays."""
    both = arrays(paired)
    return [
        digest_of(jax.tree.map(lambda x, place=place: x[place], both))
        for place in range(len(SERVERS))
    ]


def arrays(tree: Any) -> Any:
    """Shares as NumPy arrays."""

    def leaf(value: Any) -> np.ndarray:
        return np.asarray(value.share if is_secret(value) else value)

    return jax.tree.map(leaf, tree, is_leaf=is_secret)
