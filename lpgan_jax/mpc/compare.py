"""Secret bits that select: comparison, conversion to arithmetic shares, selection."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lpgan_jax.mpc.arithmetic import (
    in_words_of,
    masked,
    opening,
    product_of_parts,
    truncate,
    with_public_part,
)
from lpgan_jax.mpc.boolean import is_comparable, sign_bit, unpack
from lpgan_jax.mpc.dealt import Dealt
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Part, Secret


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bit:
    """A secret bit d = t xor r, ready to select: t is public, r is a dealt random bit.

    Attributes:
        flipped: t as a boolean array.
        random: r as ring elements 0 and 1. One r serves every selection by this bit (forward and
            backward): t is opened once, and each selection gets a fresh correction of its own.
    """

    flipped: jax.Array
    random: Dealt

    def __getitem__(self, index: int) -> Bit:
        return Bit(self.flipped[index], self.random.map(lambda bits: bits[index]))


@functools.singledispatch
@jax.named_scope("comparison")
def less_than_public(
    party: Seat, x: Secret, thresholds: Sequence[int], bits: int | None = None, low: int = 0
) -> Bit:
    """[x < t] for each public t, along a new leading axis; exact for |x - t| < 2^63 as integers.

    With `bits`, exact for |x - t| < 2^(bits-1) only, and cheaper. With `low`, x may count as up to
    2^low less than it is, and the lowest bits of x and t do not count: thresholds far apart need no
    more.

    All comparisons share x's opening and its dealt bits. 4 rounds (3 if x is masked: mask it first
    if it is used otherwise, or was truncated and the bits that that dropped are not more than
    those beyond `bits`; one less on 43 bits or fewer), one word per element unless x is masked, and
    36 bits for each threshold; DS -> S2: 233 bits, and one word and 103 bits for each threshold.
    """
    party.watch(x, "compare", bits)
    if not is_comparable(party, x, bits):
        x = masked(party, x)
    sign = sign_bit(party, x, [-t for t in thresholds], bits, low=low)
    return bit_of_rows(party, sign, x.shape, "compare")


def bit_of_rows(party: Seat, rows: jax.Array, shape: tuple[int, ...], kind: str = "convert") -> Bit:
    """XOR-shared packed rows [k, words] as secret bits [k, *shape]. 1 round, one bit each.

    DS -> S2: one word per bit. `kind` is what the cost model counts them as.
    """
    ring = party.ring_of(rows)

    def bits(rows: jax.Array) -> jax.Array:
        return jax.vmap(lambda row: unpack(ring, row, shape))(rows)

    packed = party.mask(rows.shape, rows.dtype, bitwise=True)
    random = party.correlate(bits, packed)
    flipped = party.open_bits(rows ^ packed.share, "bit")
    return Bit(party.marked(kind, "", lambda rows: bits(rows) != 0)(flipped), random)


def negative(party: Seat, x: Secret, bits: int | None = None) -> Bit:
    """[x < 0], exact for |x| < 2^63 as an integer; see `less_than_public`."""
    return less_than_public(party, x, (0,), bits)[0]


def positive(party: Seat, x: Secret, bits: int | None = None) -> Bit:
    """[x > 0] = [-x < 0]; 0 at x = 0. See `negative`."""
    return negative(party, -x, bits)


@functools.singledispatch
def b2a(party: Seat, bit: Bit) -> Secret:
    """The bit as the integer 0 or 1 (0 fraction bits); local: d = r or 1 - r."""
    one = party.public_share(jnp.ones_like(bit.random.share))
    return Secret(jnp.where(bit.flipped, one - bit.random.share, bit.random.share), 0)


@functools.singledispatch
@jax.named_scope("comparison")
def select(party: Seat, bit: Bit, x: Secret) -> Secret:
    """d * x, exact, at x's scale (bit and x broadcast).

    With x - a = e open: r x = [r] e + [r a], and d x is r x, or x - r x where t = 1. 1 round (none
    if x is masked or was truncated; it does not depend on the bit's), one word per element of x; DS
    -> S2: one word per element of the result (one and a half if x was truncated).
    """
    x = with_public_part(party, x.settled(party))
    ring, random = party.ring_of(x.words), in_words_of(bit.random, x.words)
    chosen = random.share * opening(x)[1]
    for part in x.parts:
        chosen = chosen + product_of_parts(party, ring, part, Part(random))
    return Secret(jnp.where(bit.flipped, x.share - chosen, chosen), x.frac_bits)


@functools.singledispatch
def floor(party: Seat, x: Secret) -> Secret:
    """The largest integer that is at most x, exact, at 0 fraction bits.

    A truncation gives that one or the next, and a comparison of f + 2 bits tells which: 5 rounds.
    """
    if not x.frac_bits:
        return x
    x = masked(party, x.settled(party))
    near = truncate(party, x, 0).unmasked()
    rest = x - near.at_scale(x.frac_bits)
    return near - b2a(party, negative(party, rest, x.frac_bits + 2))


def greater(party: Seat, u: Secret, v: Secret) -> Bit:
    """SecCmp: [u > v] = [v - u < 0], exact for |u|, |v| < 2^62 as integers. 4 rounds."""
    return negative(party, v - u)
