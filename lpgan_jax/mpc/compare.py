"""Secret bits that select: comparison, conversion to arithmetic shares, selection."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lpgan_jax.mpc.arithmetic import _known, _mask_terms, _parts, _where, masked
from lpgan_jax.mpc.boolean import sign_bit, unpack
from lpgan_jax.party import Dealt, Party
from lpgan_jax.secret import Secret


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


@functools.singledispatch
def negative(party: Party, x: Secret) -> Bit:
    """[x < 0], exact for |x| < 2^63 as an integer.

    4 rounds (3 if x is masked: mask it first if it is used otherwise), one word per element unless x
    is masked and 35 bits; DS -> S2: one word and 343 bits.
    """
    sign = sign_bit(party, masked(party, x))
    packed = party.mask(sign.shape, sign.dtype, bitwise=True)
    random = party.correlate(lambda row: unpack(party.ring, row, x.shape), packed)
    flipped = party.open_bits(sign ^ packed.share, "bit")
    compare = party.marked("compare", "", lambda row: unpack(party.ring, row, x.shape) != 0)
    return Bit(compare(flipped), random)


def positive(party: Party, x: Secret) -> Bit:
    """[x > 0] = [-x < 0]; 0 at x = 0. See `negative`."""
    return negative(party, -x)


@functools.singledispatch
def arithmetic(party: Party, bit: Bit) -> Secret:
    """The bit as the integer 0 or 1 (0 fraction bits); local: d = r or 1 - r."""
    one = party.only_s1(jnp.ones_like(bit.random.share))
    return Secret(jnp.where(bit.flipped, one - bit.random.share, bit.random.share), 0)


@functools.singledispatch
def select(party: Party, bit: Bit, x: Secret) -> Secret:
    """d * x, exact, at x's scale (bit and x broadcast).

    With x - a = e open: r x = [r] e + [r a], and d x is r x, or x - r x where t = 1. 1 round (none
    if x is masked or was truncated; it does not depend on the bit's), one word per element of x; DS
    -> S2: one word per element of the result (two if x was truncated).
    """
    x = _known(party, x)
    chosen = bit.random.share * _parts(x)[1]
    for a, flag in _mask_terms(x):
        chosen = chosen + _where(flag, party.correlate(jnp.multiply, bit.random, a).share)
    return Secret(jnp.where(bit.flipped, x.share - chosen, chosen), x.frac_bits)


def greater(party: Party, u: Secret, v: Secret) -> Bit:
    """SecCmp: [u > v] = [v - u < 0], exact for |u|, |v| < 2^62 as integers. 4 rounds."""
    return negative(party, v - u)
