"""Sigmoid, tanh and softplus: sine series of a masked argument, between two clamps.

On ring shares e^(u' + u'') is no product of the servers' own exponentials (the sum wraps), so the
published form cannot be used. A sine can be had in one round: with x - a = e open,
sin(w x) = sin(w e) cos(w a) + cos(w e) sin(w a), where the period is a power of two of LSB (so that
wrapping does no harm), the servers know the first factors and DS deals shares of the second.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc.arithmetic import _parts, masked, truncate
from lpgan_jax.mpc.compare import negative, select
from lpgan_jax.party import Party
from lpgan_jax.secret import Secret, add_public, concatenate

_PUBLIC_BITS, _DEALT_BITS = 28, 30  # of the servers' sines, and of DS's


@dataclass(frozen=True)
class Series:
    """sum_j c_j sin(2 pi (2j + 1) x / 2^log_period), or cos and a constant for an even function.

    Only odd multiples are used: they suffice for a function that is antisymmetric about a quarter
    of the period, which is how a saturating function continues best.

    Attributes:
        coefficients: c_j; used by DS alone, so that servers need not agree on their last bits.
        constant: added to the sum (by S1 alone); 0 for an odd function.
        log_period: binary logarithm of the period in real terms.
        even: cosines instead of sines.
    """

    coefficients: tuple[float, ...]
    constant: float
    log_period: int
    even: bool


@functools.cache
def fit(
    function: Callable[[np.ndarray], np.ndarray], bound: float, even: bool, tolerance: float
) -> Series:
    """The shortest series within `tolerance` of function on [-bound, bound] (by least squares).

    Raises:
        ValueError: none of up to 96 terms is.
    """
    log_period = math.ceil(math.log2(4.2 * bound))
    x = bound * np.cos(np.linspace(0, math.pi, 2001))
    for terms in range(8, 97, 4):
        angles = 2 * math.pi / 2.0**log_period * np.outer(x, 2 * np.arange(terms) + 1)
        waves = np.cos(angles) if even else np.sin(angles)
        basis = np.concatenate([np.full((len(x), 1), float(even)), waves], axis=1)
        solution = np.linalg.lstsq(basis, function(x), rcond=1e-10)[0]
        if np.abs(basis @ solution - function(x)).max() <= tolerance:
            return Series(tuple(solution[1:].tolist()), float(solution[0]), log_period, even)
    raise ValueError(f"no series of up to 96 terms is within {tolerance:g} on +-{bound:g}")


def sine_cosine(turns: jax.Array, log_turn: int) -> tuple[jax.Array, jax.Array]:
    """round-ish(2^30 sin), round-ish(2^30 cos) of 2 pi turns / 2^log_turn, in integers only.

    Two servers must get the same bits whatever their hardware: a difference of one LSB would be
    multiplied with a share, which is as large as the ring.

    Args:
        turns: unsigned words; only the lowest log_turn bits count.
        log_turn: at most the words' width.

    Returns:
        Two int64 arrays, within 4 of the true values.
    """
    bits = 30
    words = turns.astype(jnp.uint64) << np.uint64(64 - log_turn)
    # Nearest quarter turn, and the angle from it in (-1/8, 1/8] turn, in 2^-32 turns.
    angle = (words + np.uint64(1 << 61)) >> np.uint64(32)
    quarter = angle >> np.uint64(30)
    rest = (angle & np.uint64(2**30 - 1)).astype(jnp.int64) - (1 << 29)
    z = (rest * round(2 * math.pi * 2**bits)) >> 32  # radians, |z| <= pi/4
    square = (z * z) >> bits

    def horner(terms: range) -> jax.Array:
        total = jnp.full_like(z, 1 << bits)
        for n in terms:  # 1 - z^2/(n (n-1)) * (1 - ...)
            reciprocal = round(2**bits / (n * (n - 1)))
            total = (1 << bits) - ((((square * total) >> bits) * reciprocal) >> bits)
        return total

    sine = (z * horner(range(11, 1, -2))) >> bits
    cosine = horner(range(12, 0, -2))
    odd, negative_half = quarter & np.uint64(1), quarter & np.uint64(2)
    first, second = jnp.where(odd == 1, cosine, sine), jnp.where(odd == 1, -sine, cosine)
    return jnp.where(negative_half == 2, -first, first), jnp.where(
        negative_half == 2, -second, second
    )


@functools.singledispatch
def evaluate(party: Party, series: Series, x: Secret, frac_bits: int) -> Secret:
    """The series at x. 2 rounds; DS -> S2: two words per term and element, and two to truncate.

    Args:
        party: this server's seat.
        series: from `fit`.
        x: any value of the ring (the series is periodic).
        frac_bits: fraction bits of the result.

    Returns:
        The series' value, |.| < 2^4, within 2^-26 and 1 LSB.
    """
    a, e = _parts(masked(party, x))
    log_turn = x.frac_bits + series.log_period
    coefficients = np.asarray(series.coefficients)
    column = (-1,) + (1,) * len(x.shape)
    multiples = jnp.asarray(2 * np.arange(len(coefficients)) + 1, jnp.uint64).reshape(column)

    def dealt(mask: jax.Array) -> jax.Array:
        sine, cosine = sine_cosine(mask[None] * multiples, log_turn)
        scale = coefficients.reshape(column) * 2.0 ** (_DEALT_BITS - 30)
        both = jnp.stack([-sine, cosine] if series.even else [cosine, sine]) * scale
        return jnp.round(both).astype(jnp.int64).astype(jnp.uint64)

    dealt_factors = party.correlate(dealt, a)
    sine, cosine = sine_cosine(e[None] * multiples, log_turn)
    # even: cos(we + wa) = -sin(wa) sin(we) + cos(wa) cos(we); odd: cos(wa) sin(we) + sin(wa)
    # cos(we)
    public = jnp.stack([sine, cosine]) >> (30 - _PUBLIC_BITS)
    total = (dealt_factors.share * public.astype(jnp.uint64)).sum((0, 1), dtype=jnp.uint64)
    sum_of_waves = Secret(total, _PUBLIC_BITS + _DEALT_BITS)
    return truncate(party, add_public(party, sum_of_waves, series.constant), frac_bits)


def clamp(party: Party, x: Secret, bound: float) -> tuple[Secret, Secret]:
    """(x clamped to [-bound, bound], the part above); exact. 9 rounds, 2 comparisons."""
    above = add_public(party, x, -bound)
    below = add_public(party, -x.unmasked(), -bound)
    both = concatenate([above.rearrange(lambda v: v[None]), below.rearrange(lambda v: v[None])])
    excess = both - select(party, negative(party, both), both)
    return x - excess[0] + excess[1], excess[0]


def _saturation(frac_bits: int) -> float:
    """Where 1 - tanh(x) falls below half an LSB."""
    return (frac_bits + 2) * math.log(2) / 2


def tanh(party: Party, x: Secret, frac_bits: int) -> Secret:
    """The hyperbolic tangent, saturating, everywhere. 11 rounds, 2 comparisons."""
    bound = _saturation(frac_bits)
    inside, _ = clamp(party, x, bound)
    return evaluate(party, fit(np.tanh, bound, False, 2.0 ** -(frac_bits + 2)), inside, frac_bits)


def sigmoid(party: Party, x: Secret, frac_bits: int) -> Secret:
    """1/(1 + e^-x) = (1 + tanh(x/2))/2, everywhere. 11 rounds, 2 comparisons."""
    half = x.unmasked().divided_by_power_of_two(1)
    doubled = add_public(party, tanh(party, half, frac_bits + 1), 1.0)
    return truncate(party, doubled.divided_by_power_of_two(1), frac_bits)


def _log_two_cosh_half(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x / 2, -x / 2)


def softplus(party: Party, x: Secret, frac_bits: int) -> Secret:
    """ln(1 + e^x) = x/2 + ln(2 cosh(x/2)) inside the clamp, x above. 11 rounds, 2 comparisons."""
    bound = 2 * _saturation(frac_bits)
    inside, excess = clamp(party, x, bound)
    series = fit(_log_two_cosh_half, bound, True, 2.0 ** -(frac_bits + 2))
    linear = inside.unmasked().divided_by_power_of_two(1)
    scale = max(frac_bits, linear.frac_bits)
    total = evaluate(party, series, inside, scale) + linear.at_scale(scale) + excess.at_scale(scale)
    return truncate(party, total, frac_bits)
