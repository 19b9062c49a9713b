"""The range guard: are the values in range that a program truncates and compares?

A value beyond what its operation takes makes the result wrong, and nobody sees it: nothing is
opened. So a program that is guarded hands out, beside its results, shares of some elements of every
tensor that it truncates or compares, which costs no message; and every so often the servers compare
these, under sharing, with the ranges of their operations.

What it misses. It looks at n of a tensor's N elements (`looked_at`), and each time at others, at
random: one element out of range is seen with probability n/N each time, and of k elements at places
of their own none with about (1 - n/N)^k; a tensor of up to `WHOLE` elements is seen whole. (The
chance is of public numbers, which follow from the step's: it is as good against mistakes, not
against somebody who chooses places.) An element counts by what is left of it modulo 2^64: one that
went beyond 2^63 comes back as a value that is out of range with probability 1 - 2^(bits-63), for an
operation on values below 2^bits: one in two goes unseen at 62 bits, one in 2^37 at an activation's
26.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lpgan_jax.mpc.arithmetic import masked
from lpgan_jax.mpc.compare import b2a, less_than_public, positive
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret, concatenate

RANGE_BITS = 62  # what a truncation takes: integers below 2^62
WHOLE, ONE_OF = 512, 32


def range_of(bits: int | None) -> int:
    """The bits of what a comparison of so many bits takes; None: of any width."""
    return RANGE_BITS if bits is None or bits > RANGE_BITS else bits - 1


def looked_at(size: int) -> int:
    """How many of a tensor's elements a check looks at: one in `ONE_OF`, and `WHOLE` at least."""
    return min(size, max(WHOLE, -(-size // ONE_OF)))


@dataclass(frozen=True)
class Watched:
    """A tensor that is truncated or compared; public.

    Attributes:
        name: where in the program, and which of the operations there.
        operation: "truncate" or "compare".
        bits: the operation takes integers below 2^bits in magnitude.
        size: its elements.
        count: how many of them are looked at.
    """

    name: str
    operation: str
    bits: int
    size: int
    count: int

    def __str__(self) -> str:
        return f"{self.name} ({self.operation}, {self.bits} bits)"


class _Names:
    """Names for operations: each one's place, and which it is of those there, from 1."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def __call__(self, place: str) -> str:
        self._counts[place] += 1
        return f"{place or '(no place)'} {self._counts[place]}"


def numbered(places: Iterable[str]) -> list[str]:
    """Names for operations in the order of a program, by their places."""
    return list(map(_Names(), places))


class Samples:
    """Elements of the tensors of a program, while it is traced.

    Attributes:
        turn: a public number, uint64[], as good as random: which elements it will be. (Samples in
            a loop have one of their own, made from it.)
        taken: [(tensor, elements of it)], in the order of the program.
    """

    def __init__(self, turn: jax.Array) -> None:
        """`turn`: which time it is."""
        self.turn = _mixed(turn)
        self.taken: list[tuple[Watched, Secret]] = []
        self._names = _Names()

    def take(self, place: str, x: Secret, operation: str, bits: int, by_design: bool) -> None:
        """Look at some elements of a tensor, unless it fills the range by design."""
        name = self._names(place)
        if x.size and not by_design:
            self._take(name, x, operation, bits, x.size)

    def _take(self, name: str, x: Secret, operation: str, bits: int, size: int) -> None:
        chosen = _some_of(x, self.turn, looked_at(size))
        self.taken.append((Watched(name, operation, bits, size, chosen.size), chosen))

    def out_of_loop(self, watched: Sequence[Watched], stacked: Sequence[Secret]) -> None:
        """Take what each iteration of a loop took, stacked."""
        for of, x in zip(watched, stacked, strict=True):
            name = self._names(f"{of.name} of a loop")
            self._take(name, x, of.operation, of.bits, of.size * x.shape[0])

    def result(self, party: Seat) -> tuple[list[Watched], Secret]:
        """(the tensors, their elements one after the other).

        DS -> S2: one word for each that was not settled yet.
        """
        owed = [x for _, x in self.taken if x.owed is not None]
        ends = np.cumsum([x.size for x in owed])[:-1].tolist()
        settled = iter(jnp.split(concatenate(owed).settled(party).share, ends) if owed else [])
        whole = [x if x.owed is None else Secret(next(settled), 0) for _, x in self.taken]
        if not whole:
            return [], Secret(jnp.zeros(0, party.ring.dtype), 0)
        return [of for of, _ in self.taken], concatenate(whole)


def _some_of(x: Secret, turn: jax.Array, count: int) -> Secret:
    """So many elements of x in a row, [count]: a row at random, by the turn."""
    rows = -(-x.size // max(count, 1))
    row = ((turn >> np.uint64(32)) * np.uint64(rows)) >> np.uint64(32)

    def move(words: jax.Array) -> jax.Array:
        flat = words.reshape(-1)
        if rows <= 1:
            return flat
        # The last row overlaps the one before it.
        return lax.dynamic_slice_in_dim(flat, row.astype(np.int32) * count, count)

    return replace(x.unmasked(), frac_bits=0).rearrange(move)


def _mixed(number: jax.Array) -> jax.Array:
    """A number as random as its bits (splitmix64: Steele, Lea, Flood 2014)."""
    z = number + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def check(party: Seat, watched: Sequence[Watched], elements: Secret) -> tuple[Secret, Secret]:
    """Compare elements with what their operations take. 7 rounds; DS and lines: as comparisons.

    Args:
        party: this server's seat.
        watched: the tensors, of `Samples.result`.
        elements: theirs.

    Returns:
        (for each tensor, whether an element of it is out of range; the alarm: whether one of all
        is): 1 or 0, at 0 fraction bits. The servers open the alarm; it is all that they learn.
    """
    if not watched:
        return elements, Secret(jnp.zeros((), party.ring.dtype), 0)
    ends = np.cumsum([of.count for of in watched])
    of_each = [elements[end - of.count : end] for of, end in zip(watched, ends, strict=True)]
    order = sorted(range(len(watched)), key=lambda i: watched[i].bits)
    found = []
    for bits, group in itertools.groupby(order, key=lambda i: watched[i].bits):
        found.append(outside(party, concatenate([of_each[i] for i in group]), bits).share)
    # The sum of each tensor's, as differences of running sums; then that of all.
    sums = jnp.cumsum(jnp.concatenate(found), dtype=party.ring.dtype)
    sums = sums[np.cumsum([watched[i].count for i in order]) - 1]
    counts = jnp.diff(sums, prepend=jnp.zeros(1, sums.dtype))[np.argsort(order)]
    sums = jnp.concatenate([counts, sums[-1:]])
    bits = bits_of(2 * int(ends[-1]))
    some = b2a(party, positive(party, Secret(sums, 0), bits))
    return some[:-1], some[-1]


def bits_of(most: int) -> int:
    """Of a comparison of integers up to `most`."""
    return math.ceil(math.log2(most + 1)) + 1


def outside(party: Seat, x: Secret, bits: int) -> Secret:
    """For each element more than 0 if it is not in [-2^bits, 2^bits), else 0."""
    x = masked(party, x)
    if bits >= RANGE_BITS:
        # x + 2^62 has its top bit set on both sides of the range.
        return b2a(party, less_than_public(party, x, [-(1 << bits)]))[0]
    is_less = b2a(party, less_than_public(party, x, [-(1 << bits), 1 << bits]))
    one = party.public_share(jnp.ones(x.shape, party.ring.dtype))
    return Secret(is_less.share[0] + one - is_less.share[1], 0)
