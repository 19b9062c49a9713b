"""What a server did and DS may still look at: commitments, states, and results that wait.

A server says what it did before DS says whether it looks (`checking`). Until then it keeps the
state from before, and hands no result to anybody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpgan_jax.cluster.transcript import arrays, digest
from lpgan_jax.cluster.wire import (
    Commitment,
    Opened,
    Release,
    Result,
    Unexpected,
    Voucher,
    buffers,
)

_MOST_KEPT = 4  # tasks, and so states


@dataclass(frozen=True)
class Held:
    """A result that is ready.

    Attributes:
        head: without its voucher.
        payload: own share.
        request: whose question it answers; None for the results of a training.
    """

    head: Result
    payload: bytes
    request: str | None = None


Publish = Callable[[Held], None]


class Accounts:
    """Of one attempt; thread-safe."""

    def __init__(self, changed: threading.Condition, publish: Publish) -> None:
        """`changed`: is told of every change; `publish`: called with what DS has vouched for."""
        self._changed, self._publish = changed, publish
        self._commitments: dict[int, Commitment] = {}
        self._opened: dict[int, Opened] = {}
        self._states: dict[int, Any] = {}
        self._held: dict[int, Held] = {}
        self._heard = -1

    # For the worker ---------------------------------------------------------------------------

    def begin(self, state: Any) -> None:
        """The state that an attempt goes on from."""
        with self._changed:
            self._states[-1] = state

    def hold(self, serial: int, held: Held) -> None:
        """Keep a result until DS vouches for it."""
        with self._changed:
            self._held[serial] = held

    def commit(self, commitment: Commitment, before: Any) -> None:
        """Say what was done; `before`: own share of the state before it."""
        with self._changed:
            self._commitments[commitment.serial] = commitment
            self._states[commitment.serial] = before
            self._changed.notify_all()

    def open(self, opened: Opened) -> None:
        """Say how an alarm was opened."""
        with self._changed:
            self._opened[opened.own.serial] = opened
            self._changed.notify_all()

    def wait_for_room(self) -> None:
        """Wait until DS has let go of enough states."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._commitments) < _MOST_KEPT)

    def wait_until_heard(self, serial: int) -> None:
        """Wait until DS has what both servers say of a task."""
        with self._changed:
            self._changed.wait_for(lambda: self._heard >= serial)

    def wait_for_all(self) -> None:
        """Wait until DS has vouched for all results."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held)

    # For DS -----------------------------------------------------------------------------------

    def outstanding(self) -> tuple[list[Commitment], list[Opened]]:
        """What DS has not released; the caller holds the condition."""
        return [*self._commitments.values()], [*self._opened.values()]

    def reveal(self, serial: int) -> list[np.ndarray]:
        """Own share of the state before a task, as bytes.

        Raises:
            Unexpected: it is released, or not done yet.
        """
        with self._changed:
            if serial not in self._states:
                raise Unexpected(f"serial: {serial}, whose state is not here")
            state = self._states[serial]
        return buffers(arrays(state))

    def release(self, release: Release) -> None:
        """Let go of what DS has done with.

        Raises:
            Unexpected: DS vouches for something else than what is here.
        """
        with self._changed:
            ready = [self._vouched(voucher) for voucher in release.vouchers]
            self._heard = max(self._heard, release.heard)
            for kept in (self._commitments, self._opened, self._states):
                for serial in [s for s in kept if s <= release.upto]:
                    del kept[serial]
        # In order, and seen as done only when they are there.
        for held, voucher in zip(ready, release.vouchers, strict=True):
            self._publish(held)
            with self._changed:
                del self._held[voucher.serial]
        with self._changed:
            self._changed.notify_all()

    def _vouched(self, voucher: Voucher) -> Held:
        held = self._held.get(voucher.serial)
        if held is None or digest(held.payload) != voucher.digest:
            raise Unexpected(f"serial: {voucher.serial}, of which there is no such result")
        head = held.head.model_copy(update={"voucher": voucher})
        return Held(head, held.payload, held.request)
