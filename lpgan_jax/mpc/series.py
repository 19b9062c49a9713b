"""Functions of one variable as trigonometric series of a masked argument: 2 rounds each.

With x - a = e open, cos(w x) = cos(w e) cos(w a) - sin(w e) sin(w a): the period is a power of two
of LSB (so that wrapping does no harm), the servers know the first factors and DS deals shares of
the second. A smooth function on an interval is approximated by a series of a period at least twice
as long (a Fourier extension), whose error falls geometrically with the number of terms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc.arithmetic import masked, opening, truncate
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret, add_public

_PUBLIC_BITS, _DEALT_BITS = 28, 30  # of the servers' sines, and of DS's
WAVE_BITS = _PUBLIC_BITS + _DEALT_BITS  # fraction bits of a sum of waves
_MOST_TERMS = 96
_AMPLIFICATION = 32.0  # sum of |coefficients| that may multiply the waves' errors, at the least

Kind = Literal["odd", "even", "general"]


@dataclass(frozen=True)
class Series:
    """constant + sum_k cosines_k cos(w_k x) + sines_k sin(w_k x), w_k = 2 pi multiples_k / period.

    Attributes:
        multiples: integers.
        cosines: of each multiple; used by DS alone, so that servers need not agree on last bits.
        sines: likewise.
        constant: added to the sum (by S1 alone).
        log_period: binary logarithm of the period in real terms.
    """

    multiples: tuple[int, ...]
    cosines: tuple[float, ...]
    sines: tuple[float, ...]
    constant: float
    log_period: int


@functools.cache
def fit(
    function: Callable[[np.ndarray], np.ndarray],
    low: float,
    high: float,
    kind: Kind,
    tolerance: float = 2.0**-30,
    zero: bool = False,
) -> Series:
    """The shortest series within `tolerance` of function on [low, high] (by least squares).

    `zero`: the series is 0 at 0 too, which may lie outside of the interval.

    Its coefficients are small enough for the waves' own errors (2^-28) to stay near the tolerance.

    An odd or even function on [-high, high] takes the odd multiples of a period of at least four
    times `high`: they suffice for a function that is antisymmetric about a quarter of the period,
    which is how a saturating function continues best.

    Raises:
        ValueError: none of up to 96 terms is.
    """
    width = high if kind != "general" else high - low
    log_period = math.ceil(math.log2(width * (2.0 if kind == "general" else 4.2)))
    x = (low + high) / 2 + (high - low) / 2 * np.cos(np.linspace(0, math.pi, 2001))
    values = function(x)
    if zero:
        x, values = np.append(x, 0.0), np.append(values, 0.0)
    has_cosines, has_sines = kind != "odd", kind != "even"
    amplification = max(_AMPLIFICATION, 2.0**26 * tolerance)
    for terms in range(4, _MOST_TERMS + 1, 4 if kind != "general" else 2):
        multiples = np.arange(1, terms + 1) if kind == "general" else 2 * np.arange(terms) + 1
        angles = 2 * math.pi / 2.0**log_period * np.outer(x, multiples)
        waves = ([np.cos(angles)] if has_cosines else []) + ([np.sin(angles)] if has_sines else [])
        constant = [np.ones((len(x), 1))] if has_cosines else []
        basis = np.concatenate(constant + waves, axis=1)
        used = np.repeat([has_cosines, has_cosines, has_sines], [1, terms, terms])
        left, sizes, right = np.linalg.svd(basis, full_matrices=False)
        parts = left.T @ values / sizes
        for smallest in (1e-8, 1e-9, 1e-10, 1e-11, 1e-12):
            kept = sizes > smallest * sizes[0]
            solution = np.zeros(2 * terms + 1)
            solution[used] = parts[kept] @ right[kept]
            error = np.abs(basis @ solution[used] - values).max()
            if error <= tolerance and np.abs(solution[1:]).sum() <= amplification:
                cosines, sines = solution[1:].reshape(2, -1).tolist()
                return Series(
                    tuple(multiples.tolist()),
                    tuple(cosines),
                    tuple(sines),
                    float(solution[0]),
                    log_period,
                )
    raise ValueError(
        f"no series of up to {_MOST_TERMS} terms is within {tolerance:g} on [{low:g}, {high:g}]"
    )


@functools.partial(jax.jit, static_argnums=1)  # traced once for each shape
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
def evaluate(party: Seat, series: Series, x: Secret, frac_bits: int) -> Secret:
    """The series at x. 2 rounds (1 if x is masked), two words per element (one).

    DS -> S2: two words per multiple and element, and two to truncate.

    Args:
        party: this server's seat.
        series: from `fit`; x.frac_bits + series.log_period is at most 64.
        x: any value of the ring (the series is periodic).
        frac_bits: fraction bits of the result.

    Returns:
        The series' value, |.| < 2^4, within 2^-26 and 1 LSB.
    """
    with party.filling_the_range():
        return truncate(party, waves(party, series, x, frac_bits), frac_bits)


@functools.singledispatch
def waves(party: Seat, series: Series, x: Secret, frac_bits: int = WAVE_BITS) -> Secret:
    """The series at x, at `WAVE_BITS` fraction bits. Local if x is masked.

    DS -> S2: two words per multiple and element.

    Args:
        party: this server's seat.
        series: as of `evaluate`.
        x: as of `evaluate`.
        frac_bits: what it will be rounded to (which a plain seat may look at).
    """
    a, e = opening(masked(party, x))
    log_turn = x.frac_bits + series.log_period
    dealt_factors = party.correlate(lambda mask: dealt_waves(series, mask, log_turn), a)
    total = (dealt_factors.share * public_waves(series, e, log_turn)).sum((0, 1), dtype=jnp.uint64)
    return add_public(party, Secret(total, WAVE_BITS), series.constant)


def dealt_waves(series: Series, mask: jax.Array, log_turn: int) -> jax.Array:
    """DS's factors of the terms: [2, multiples, ...] of cos(w e) and of sin(w e), at 30 bits."""
    cosines, sines = (
        _column(np.asarray(c), mask) * 2.0 ** (_DEALT_BITS - 30)
        for c in (series.cosines, series.sines)
    )
    sine, cosine = _sine_cosines(series, mask, log_turn)
    # Of cos(w e) and of sin(w e), in cosines cos(w e + w a) + sines sin(w e + w a).
    both = jnp.stack([cosines * cosine + sines * sine, sines * cosine - cosines * sine])
    return jnp.round(both).astype(jnp.int64).astype(jnp.uint64)


def public_waves(series: Series, opened: jax.Array, log_turn: int) -> jax.Array:
    """The servers' factors: cos(w e) and sin(w e), [2, multiples, ...], at 28 bits."""
    sine, cosine = _sine_cosines(series, opened, log_turn)
    return (jnp.stack([cosine, sine]) >> (30 - _PUBLIC_BITS)).astype(jnp.uint64)


def _sine_cosines(series: Series, words: jax.Array, log_turn: int) -> tuple[jax.Array, jax.Array]:
    multiples = _column(np.asarray(series.multiples, np.uint64), words)
    return sine_cosine(words[None] * multiples, log_turn)


def _column(values: np.ndarray, like: jax.Array) -> np.ndarray:
    return values.reshape((-1,) + (1,) * like.ndim)
