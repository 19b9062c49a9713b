"""Poisson sampling: each example is in a batch with the same probability, whatever the others do.

A batch has a fixed number of rows. What is drawn comes first; the other rows have weight 0, and
hold an example that does not count. So nobody who sees the shape of a batch learns how many were
drawn: the weights are shared like the images. Of a draw that is larger than the batch a random part
is taken, which `accounting` has a part of delta for.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from lpgan_jax.privacy.noise import SEED_BYTES, Stream


def require_sampling(sampling_rate: float, **counts: int) -> None:
    """Raise ValueError, and name it, if a rate is no probability above 0, or a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: {count}, expected at least 1")
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling_rate: {sampling_rate:g}, expected above 0, at most 1")


@dataclass(frozen=True)
class PoissonBatches:
    """The examples of each step, from a secret key.

    Who knows the key knows who is in which batch, and then sampling protects nobody. It is for
    nothing else.

    Attributes:
        num_examples: in the data set.
        sampling_rate: the probability of each to be in a batch, to 2^-64 (rounded down).
        batch_size: rows of a batch.
        key: `SEED_BYTES` bytes.
    """

    num_examples: int
    sampling_rate: float
    batch_size: int
    key: bytes

    def __post_init__(self) -> None:
        """ValueError: a field is out of range."""
        require_sampling(
            self.sampling_rate, num_examples=self.num_examples, batch_size=self.batch_size
        )
        if len(self.key) != SEED_BYTES:
            raise ValueError(f"key: {len(self.key)} bytes, expected {SEED_BYTES}")

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch of a step, counted from 0; any order of calls gives the same.

        Returns:
            (rows, weights): int64[batch_size], each in [0, num_examples), and int32[batch_size],
            1 of those that were drawn, which are all different and come first, then 0.

        Raises:
            ValueError: the step is negative.
        """
        if step < 0:
            raise ValueError(f"step: {step} given, expected at least 0")
        described = b"lpgan sampling" + self.key + step.to_bytes(8, "little")
        stream = Stream(hashlib.sha256(described).digest())
        words = stream.words(self.num_examples)
        bound = math.floor(math.ldexp(self.sampling_rate, 64))
        drawn = np.flatnonzero(words < np.uint64(bound)) if bound < 2**64 else np.arange(len(words))
        if len(drawn) > self.batch_size:
            order = np.argsort(stream.words(len(drawn)), kind="stable")
            drawn = np.sort(drawn[order[: self.batch_size]])
        rows = np.zeros(self.batch_size, np.int64)
        rows[: len(drawn)] = drawn
        weights = (np.arange(self.batch_size) < len(drawn)).astype(np.int32)
        return rows, weights
