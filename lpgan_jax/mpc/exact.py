"""The secure program in float64: what it would compute with numbers of any size and precision.

Values are float64, scaled by 2^frac_bits like shares; nothing is rounded and nothing wraps. What
comes out is the reference for `emulated`, and the magnitudes on the way are the headroom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lpgan_jax.mpc import arithmetic, clipping, compare, exponential, series
from lpgan_jax.mpc.dealt import Dealt
from lpgan_jax.mpc.plain import PlainSeat
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.share_trees import scaled
from lpgan_jax.ring.words import Ring


class ExactSeat(PlainSeat):
    """The seat of nobody: values are plain float64."""

    def real(self, value: Secret) -> jax.Array:
        """A value as float64."""
        return value.share * 2.0**-value.frac_bits

    def encoded(self, values: jax.Array, frac_bits: int) -> jax.Array:
        """Public reals as they are, in LSB."""
        words: jax.Array = scaled(values, frac_bits).words
        return words

    def _check_fresh(self) -> None:
        """There are no masks."""

    def _seeds(self, count: int) -> Any:
        return None

    def _child(self, seed: Any) -> ExactSeat:
        child = ExactSeat()
        child.place = self.place
        return child

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a protocol on words of the ring, of which there are none in float64")

    exchange = mask = correlate = compute = settle = _refuse


@arithmetic.masked.register
def _masked(party: ExactSeat, x: Secret) -> Secret:
    return x


@arithmetic.truncate.register
def _truncate(party: ExactSeat, x: Secret, frac_bits: int, ring: Ring | None = None) -> Secret:
    if x.frac_bits == frac_bits:
        return x
    if x.frac_bits < frac_bits:
        raise ValueError(f"frac_bits: cannot truncate {x.frac_bits} fraction bits to {frac_bits}")
    result = Secret(x.share * 2.0 ** (frac_bits - x.frac_bits), frac_bits)
    party.saw_truncation(x, result)
    return result


@arithmetic.times_small.register
def _times_small(party: ExactSeat, x: Secret, digits: arithmetic.Digits, frac_bits: int) -> Secret:
    factor = sum(sign * 2.0**-shift for sign, shift in digits)
    result = Secret(x.share * factor * 2.0 ** (frac_bits - x.frac_bits), frac_bits)
    party.saw_truncation(x, result)
    return result


@arithmetic.truncate_by.register
def _truncate_by(party: ExactSeat, x: Secret, shift: jax.Array) -> Secret:
    result = Secret(x.share * jnp.exp2(-shift.astype(jnp.float64)), x.frac_bits)
    party.saw_truncation(x, result)
    return result


@compare.less_than_public.register
def _less_than_public(
    party: ExactSeat,
    x: Secret,
    thresholds: Sequence[int],
    bits: int | None = None,
    low: int = 0,
) -> compare.Bit:
    party.saw_comparison(x, bits)
    limits = jnp.asarray(thresholds, jnp.float64).reshape((-1,) + (1,) * len(x.shape))
    below = x.share[None] < limits
    return compare.Bit(below, Dealt(jnp.zeros(below.shape), None))


@clipping.clipped_sum.register
def _clipped_sum(party: ExactSeat, gradients: Secret, weights: Secret, clip: float) -> Secret:
    clipping.check_clip(clip, gradients.frac_bits)
    total = clipping.of_reals(party.real(gradients), party.real(weights), clip)
    return scaled(total, gradients.frac_bits + clipping.FACTOR_BITS)


@compare.floor.register
def _floor(party: ExactSeat, x: Secret) -> Secret:
    return Secret(jnp.floor(party.real(x)), 0)


@series.waves.register
def _waves(
    party: ExactSeat, function: series.Series, x: Secret, frac_bits: int = series.WAVE_BITS
) -> Secret:
    real = party.real(x)
    angles = jnp.asarray(function.multiples).reshape((-1,) + (1,) * real.ndim) * (
        2 * jnp.pi / 2.0**function.log_period * real
    )
    total = jnp.tensordot(jnp.asarray(function.cosines), jnp.cos(angles), axes=1)
    total += jnp.tensordot(jnp.asarray(function.sines), jnp.sin(angles), axes=1)
    return scaled(total + function.constant, series.WAVE_BITS)


@exponential.evaluate.register
def _exponential(party: ExactSeat, window: exponential.Window, x: Secret, frac_bits: int) -> Secret:
    with party.filling_the_range():
        # Elsewhere it may be anything: what fits, since what is truncated is looked at.
        inside = jnp.clip(x.share, window.low, window.high - 1) * 2.0**-window.scale
        power = scaled(jnp.exp(inside), window.result_scale)
        return arithmetic.truncate(party, power, frac_bits)
