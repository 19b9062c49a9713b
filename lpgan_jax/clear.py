"""A plaintext interpreter of the secure program, in float64: how large does every value get?

`Clear` takes the place of a `Party`. Layers, losses and optimizers run unchanged; the primitives
below compute on float64 values (scaled by 2^frac_bits, like shares) without shares, masks, rounding
or wrapping. Before each truncation the largest magnitude is recorded, which is what must stay below
2^62: the headroom of a configuration.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lpgan_jax.party import Dealt, Party
from lpgan_jax.mpc import arithmetic, compare, elementary
from lpgan_jax.ring.words import RING64
from lpgan_jax.secret import Secret

_RANGE_BITS = 62


class Clear(Party):
    """The seat of nobody: values are plain float64.

    Attributes:
        largest: for each truncation so far, its place in the program and the largest magnitude
            before it, as an integer of the ring (a traced float64 scalar).
    """

    def __init__(self) -> None:
        self.ring = RING64
        self.place = ()
        self.largest: list[tuple[str, jax.Array]] = []

    def only_s1(self, public: jax.Array) -> jax.Array:
        """A public value itself: there is one server."""
        return public


def headroom_bits(largest: jax.Array) -> jax.Array:
    """Bits left below 2^62: the range of truncation and comparison."""
    return _RANGE_BITS - jnp.log2(jnp.maximum(largest, 1.0))


@arithmetic.masked.register
def _masked(party: Clear, x: Secret) -> Secret:
    return x


@arithmetic.bilinear.register
def _bilinear(party: Clear, product: arithmetic.Bilinear, x: Secret, y: Secret) -> Secret:
    return Secret(product(x.share, y.share), x.frac_bits + y.frac_bits)


@arithmetic.square.register
def _square(party: Clear, x: Secret) -> Secret:
    return Secret(x.share * x.share, 2 * x.frac_bits)


@arithmetic.truncate.register
def _truncate(party: Clear, x: Secret, frac_bits: int) -> Secret:
    if x.frac_bits == frac_bits:
        return x
    party.largest.append(("/".join(party.place), jnp.abs(x.share).max(initial=0.0)))
    return Secret(x.share * 2.0 ** (frac_bits - x.frac_bits), frac_bits)


@compare.negative.register
def _negative(party: Clear, x: Secret) -> compare.Bit:
    negative = x.share < 0
    return compare.Bit(negative, Dealt(jnp.zeros_like(x.share), None))


@compare.arithmetic.register
def _arithmetic(party: Clear, bit: compare.Bit) -> Secret:
    return Secret(bit.flipped.astype(jnp.float64), 0)


@compare.select.register
def _select(party: Clear, bit: compare.Bit, x: Secret) -> Secret:
    return Secret(jnp.where(bit.flipped, x.share, 0.0), x.frac_bits)


@elementary.evaluate.register
def _evaluate(party: Clear, series: elementary.Series, x: Secret, frac_bits: int) -> Secret:
    real = x.share * 2.0**-x.frac_bits
    odd = 2 * jnp.arange(len(series.coefficients)) + 1
    angles = 2 * jnp.pi / 2.0**series.log_period * real * odd.reshape((-1,) + (1,) * real.ndim)
    waves = jnp.cos(angles) if series.even else jnp.sin(angles)
    total = jnp.tensordot(jnp.asarray(series.coefficients), waves, axes=1) + series.constant
    return Secret(total * 2.0**frac_bits, frac_bits)
