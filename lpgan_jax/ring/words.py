"""The ring Z_{2^bits}: how its elements sit in machine words."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Int, UInt

Elements = UInt[jax.Array, "*shape"]
"""Elements of a ring, in unsigned words."""

_CONTAINERS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(frozen=True)
class Ring:
    """Z_{2^bits}, held in the smallest unsigned words that fit.

    Production runs use 64 bits. Tests use a few, so that everything a server can see is enumerable.
    Sums and products of containers are right modulo 2^bits without further ado; only what looks at
    the top of a word (shifts, signs, comparison of words) must `reduce` it first.

    Attributes:
        bits: 2 to 64.
        words: width of the words, if it is to be more than they need: the two rings of a program
            (`Seat.ring_of`) are told apart by it.
    """

    bits: int = 64
    words: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 64:
            raise ValueError(f"bits: expected 2 to 64, got {self.bits}")
        if self.words is not None and (self.words not in _CONTAINERS or self.words < self.bits):
            raise ValueError(
                f"words: {self.words}, expected 8, 16, 32 or 64, no fewer than {self.bits}"
            )

    @property
    def container_bits(self) -> int:
        """Width of the machine word that holds an element: 8, 16, 32 or 64."""
        return self.words or min(width for width in _CONTAINERS if width >= self.bits)

    @property
    def dtype(self) -> np.dtype:
        """NumPy dtype of that machine word."""
        return np.dtype(_CONTAINERS[self.container_bits])

    def constant(self, value: int) -> np.ndarray:
        """A Python integer as a ring element (a NumPy scalar of `dtype`)."""
        return np.asarray(value % 2**self.bits, self.dtype)

    def reduce(self, words: Elements) -> Elements:
        """The representative in [0, 2^bits)."""
        if self.bits == self.container_bits:
            return words
        return words & self.constant(-1)

    def top_bit(self, words: Elements) -> Elements:
        """The most significant bit of each element, 0 or 1, in `dtype`."""
        return self.reduce(words) >> self.constant(self.bits - 1)

    def shift_left(self, words: Elements, count: int | jax.Array) -> Elements:
        """Multiply by 2^count (count may reach the width: the result is then 0)."""
        if not isinstance(count, int):
            return words << count
        if count >= self.container_bits:
            return jnp.zeros_like(words)
        return words << self.constant(count)

    def shift_right(self, words: Elements, count: int | jax.Array) -> Elements:
        """Drop the lowest `count` bits of the representative in [0, 2^bits).

        A count that is not known while tracing is an array of `dtype`, below the width.
        """
        by = self.constant(count) if isinstance(count, int) else count
        return self.reduce(words) >> by

    def signed(self, words: Elements) -> Int[jax.Array, "*shape"]:
        """The representative in [-2^(bits-1), 2^(bits-1)), in the signed type of equal width."""
        spare = self.constant(self.container_bits - self.bits)
        signed_dtype = np.dtype(f"int{self.container_bits}")
        return (words << spare).astype(signed_dtype) >> spare.astype(signed_dtype)


RING64, RING32 = Ring(64), Ring(32)


def bit_and(x: jax.Array, y: jax.Array | np.ndarray) -> jax.Array:
    """x & y. An operator of lax takes a third of the time of jnp's to trace."""
    return lax.bitwise_and(x, y) if _alike(x, y) else x & y


def bit_xor(x: jax.Array, y: jax.Array | np.ndarray) -> jax.Array:
    """x ^ y; see `bit_and`."""
    return lax.bitwise_xor(x, y) if _alike(x, y) else x ^ y


def _alike(x: jax.Array, y: jax.Array | np.ndarray) -> bool:
    return x.shape == y.shape or not y.shape
