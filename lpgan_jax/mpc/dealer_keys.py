"""DS's keys of a run: the order in which everything that it splits and deals gets its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp


class DealerKeys:
    """One key for the initial state, then two for each task; asking twice never gives the same.

    A simulation and a cluster's DS use them alike, hence equal words from equal master keys. A
    repeated or resumed run must be given a new master key: never the same keys for other values.
    """

    def __init__(self, master: jax.Array) -> None:
        """`master`: a typed ChaCha20 key."""
        state, self._parent = jax.random.split(master)
        self._state: jax.Array | None = state

    def for_state(self) -> jax.Array:
        """The key that the initial state is split with.

        Raises:
            RuntimeError: it was asked for before.
        """
        if self._state is None:
            raise RuntimeError("the initial state was split already, and its key is used up")
        key, self._state = self._state, None
        return key

    def take(self) -> jax.Array:
        """A key that was never handed out before."""
        self._parent, key = jax.random.split(self._parent)
        return key

    def take_two(self) -> jax.Array:
        """Two of them, for a task: to share its inputs, and to deal for it."""
        return jnp.stack([self.take(), self.take()])
