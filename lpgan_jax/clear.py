"""A plaintext interpreter of the secure program, in float64: how large does every value get?

`Clear` takes the place of a `Party`. Layers, losses and optimizers run unchanged; the primitives
below compute on float64 values (scaled by 2^frac_bits, like shares) without shares, masks, rounding
or wrapping. Before each truncation the largest magnitude is recorded, which is what must stay below
2^62: the headroom of a configuration. A range reduction fills that range by design, so its
comparisons and mantissas count only where they do not fit, and so do other comparisons (what they
select is truncated later, and recorded there).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lpgan_jax.mpc import arithmetic, compare, normalise, series
from lpgan_jax.party import Dealt, Party
from lpgan_jax.ring.words import RING64
from lpgan_jax.secret import Secret

RANGE_BITS = 62


class Clear(Party):
    """The seat of nobody: values are plain float64.

    Attributes:
        largest: for each truncation and comparison so far, its place in the program and the largest
            magnitude there, as an integer of the ring (a traced float64 scalar); 0 for a value that
            fills the range by design and fits.
    """

    def __init__(self) -> None:
        self.ring = RING64
        self.place = ()
        self.largest: list[tuple[str, jax.Array]] = []

    def only_s1(self, public: jax.Array) -> jax.Array:
        """A public value itself: there is one server."""
        return public

    def record(self, x: Secret, by_design: bool = False) -> None:
        """Note the magnitude of a value that must be in range; `by_design`: only if it is not."""
        largest = jnp.abs(x.share).max(initial=0.0)
        if by_design:
            largest = jnp.where(largest < 2.0**RANGE_BITS, 0.0, largest)
        self.largest.append(("/".join(self.place), largest))


def headroom_bits(largest: jax.Array) -> jax.Array:
    """Bits left below 2^62: the range of truncation and comparison. NaN leaves -inf."""
    largest = jnp.where(jnp.isnan(largest), jnp.inf, largest)
    return RANGE_BITS - jnp.log2(jnp.maximum(largest, 1.0))


@arithmetic.masked.register
def _masked(party: Clear, x: Secret) -> Secret:
    return x


@arithmetic.bilinear.register
def _bilinear(
    party: Clear, product: arithmetic.Bilinear, x: Secret, y: Secret, *, owing: bool = False
) -> Secret:
    return Secret(product(x.share, y.share), x.frac_bits + y.frac_bits)


@arithmetic.mul.register
def _mul(party: Clear, x: Secret, y: Secret, *, owing: bool = False) -> Secret:
    return Secret(x.share * y.share, x.frac_bits + y.frac_bits)


@arithmetic.square.register
def _square(party: Clear, x: Secret, *, owing: bool = False) -> Secret:
    return Secret(x.share * x.share, 2 * x.frac_bits)


@arithmetic.truncate.register
def _truncate(party: Clear, x: Secret, frac_bits: int) -> Secret:
    if x.frac_bits == frac_bits:
        return x
    if x.frac_bits < frac_bits:
        raise ValueError(f"frac_bits: cannot truncate {x.frac_bits} fraction bits to {frac_bits}")
    party.record(x, by_design=x.frac_bits == normalise.TOP)
    return Secret(x.share * 2.0 ** (frac_bits - x.frac_bits), frac_bits)


@compare.below.register
def _below(
    party: Clear, x: Secret, thresholds: Sequence[int], bits: int | None = None
) -> compare.Bit:
    if bits in (None, RING64.bits):
        party.record(x, by_design=True)
    else:  # the range is narrower, and its headroom counts
        party.record(dataclasses.replace(x, words=x.words * 2.0 ** (RANGE_BITS - (bits - 1))))
    limits = jnp.asarray(thresholds, jnp.float64).reshape((-1,) + (1,) * len(x.shape))
    below = x.share[None] < limits
    return compare.Bit(below, Dealt(jnp.zeros(below.shape), None))


@compare.arithmetic.register
def _arithmetic(party: Clear, bit: compare.Bit) -> Secret:
    return Secret(bit.flipped.astype(jnp.float64), 0)


@compare.select.register
def _select(party: Clear, bit: compare.Bit, x: Secret) -> Secret:
    return Secret(jnp.where(bit.flipped, x.share, 0.0), x.frac_bits)


@series.evaluate.register
def _evaluate(party: Clear, function: series.Series, x: Secret, frac_bits: int) -> Secret:
    real = x.share * 2.0**-x.frac_bits
    angles = jnp.asarray(function.multiples).reshape((-1,) + (1,) * real.ndim) * (
        2 * jnp.pi / 2.0**function.log_period * real
    )
    total = jnp.tensordot(jnp.asarray(function.cosines), jnp.cos(angles), axes=1)
    total += jnp.tensordot(jnp.asarray(function.sines), jnp.sin(angles), axes=1)
    return Secret((total + function.constant) * 2.0**frac_bits, frac_bits)
