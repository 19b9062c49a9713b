"""What a run's seed decides: the order of examples, and what is random but not secret."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from lpgan_jax.privacy.mechanism import seeded
from lpgan_jax.privacy.sampling import PoissonBatches


class Stream(IntEnum):
    """What random numbers under a seed are for; each has a stream of its own."""

    INIT = 0
    NOISE = 1
    SAMPLES = 2
    GENERATION = 3
    EVALUATION = 4
    PERTURBATION = 5


def random_stream(seed: int, purpose: Stream, step: int = 0) -> np.random.Generator:
    """Random numbers that are not secret from DS: repeatable, for one purpose and step."""
    return np.random.default_rng([seed, purpose, step])


@dataclass(frozen=True)
class Batches:
    """The order of examples: each epoch takes every one once, in an order of its own.

    Those that do not fill the last batch of an epoch are left out of that epoch. The order
    depends on nothing but the fields, so a resumed run goes on as it would have.

    Attributes:
        num_examples: how many examples there are.
        batch_size: how many a step takes.
        seed: decides the order.

    Raises:
        ValueError: a batch is empty or larger than the data, or the seed is negative.
    """

    num_examples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.num_examples:
            raise ValueError(
                f"batch_size: {self.batch_size} given, "
                f"expected 1 to {self.num_examples}, the number of examples"
            )
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} given, expected at least 0")

    @property
    def per_epoch(self) -> int:
        """The number of whole batches in an epoch."""
        return self.num_examples // self.batch_size

    def indices(self, step: int) -> np.ndarray:
        """Return the examples of one step.

        Args:
            step: the number of the step, from 0; any order of calls gives the same answers.

        Returns:
            int64[batch_size], all different, each in [0, num_examples).

        Raises:
            ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step: {step} given, expected at least 0")
        epoch, batch = divmod(step, self.per_epoch)
        start = batch * self.batch_size
        return _order(self.num_examples, self.seed, epoch)[start : start + self.batch_size].copy()


@lru_cache(maxsize=2)
def _order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting raw words, because NumPy keeps those, but not its `permutation`, from version to
    # version: a run may be resumed under a newer one.
    random = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    return np.argsort(random.random_raw(num_examples), kind="stable")


def shuffled(arrays: Any, size: int, seed: int) -> Callable[[int], Any]:
    """Batches of rows of arrays, in the order of `Batches`.

    Args:
        arrays: a pytree of arrays [N, ...] of one N.
        size: rows of a batch.
        seed: decides the order.

    Returns:
        A turn, counted from 0, to the same pytree of [size, ...].

    Raises:
        ValueError: the arrays have different lengths, or fewer rows than a batch.
    """
    order = Batches(_length(arrays), size, seed)
    return lambda turn: _rows(arrays, order.indices(turn))


def _length(arrays: Any) -> int:
    lengths = {len(leaf) for leaf in jax.tree.leaves(arrays)}
    if len(lengths) != 1:
        raise ValueError(f"arrays: expected one length, got {sorted(lengths)}")
    return lengths.pop()


def _rows(arrays: Any, chosen: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], arrays)


def poisson(
    arrays: Any, sampling_rate: float, size: int, seed: int, sums: int = 1
) -> Callable[[int], tuple[Any, np.ndarray]]:
    """Batches for private sums: each example is in one with the same probability, by itself.

    Args:
        arrays: a pytree of arrays [N, ...] of one N.
        sampling_rate: the probability.
        size: rows of a batch; those that are not filled have weight 0.
        seed: decides who is in which batch, and so is secret (a run without `--seed` draws one).
        sums: batches of a step.

    Returns:
        A turn, counted from 0, to (the same pytree of [sums, size, ...], the weights, int32 [sums,
        size]).

    Raises:
        ValueError: the arrays have different lengths, or a number is out of range.
    """
    sampled = PoissonBatches(_length(arrays), sampling_rate, size, seeded("sampling", seed))

    def draw(turn: int) -> tuple[Any, np.ndarray]:
        each = [sampled.draw(sums * turn + number) for number in range(sums)]
        rows, weights = (np.stack(both) for both in zip(*each, strict=True))
        return _rows(arrays, rows), weights

    return draw
