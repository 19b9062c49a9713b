"""Square roots: range reduction by powers of four, then one series."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from lpgan_jax.mpc.arithmetic import mul, rescale, truncate
from lpgan_jax.mpc.range_reduction import MANTISSA_BITS, TOP, Search, normalise, parallel_levels
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.series import evaluate, fit


@functools.cache
def _power(exponent: float, factor: float) -> Callable[[np.ndarray], np.ndarray]:
    """factor * m^exponent; cached, since series are cached by their function."""
    return lambda m: factor * m**exponent


def inverse_sqrt(
    party: Seat,
    u: Secret,
    frac_bits: int | None,
    times: Secret | None = None,
    factor: float = 1.0,
    smallest: int = 0,
    largest: int = TOP,
    search: Search = parallel_levels,
) -> Secret:
    """Inverse SSqrt: 1/sqrt(u), or times/sqrt(u).

    u = m 4^p with 1/4 <= m < 1 by `normalise`; 1/sqrt(m) by a series in one round, where the
    published protocol iterates; the power 2^-p by selecting with the same bits, exactly.

    Args:
        party: this server's seat.
        u: integers in [2^smallest, 2^largest) at any scale. u = 0 gives a large finite value, u < 0
            a meaningless one.
        frac_bits: fraction bits of the result; None for what the exponent gives, without
            truncation.
        times: a factor of u's shape, multiplied in before the power of two, so that the result is
            limited by its own size and not by 1/sqrt(u). |times| < 2^11.
        factor: a public factor of the result, between 1/2 and 1.
        smallest: as in `normalise`.
        largest: as in `normalise`.
        search: as in `normalise`.

    Returns:
        The result, within 2^-24 relative, and 1 LSB. 7 rounds with parallel levels.
    """
    if u.frac_bits % 2:  # read as u/2, whose root is smaller by sqrt(2)
        u, factor = u.divided_by_power_of_two(1), factor * math.sqrt(0.5)
    normalised, exponent, known = normalise(party, u, 2, smallest, largest, search)
    series = fit(_power(-0.5, factor), 0.25, 1.0, "general")
    y = evaluate(party, series, Secret(normalised.share, TOP), MANTISSA_BITS)
    scale = MANTISSA_BITS
    if times is not None:
        scale = times.frac_bits
        coarse = min(MANTISSA_BITS, TOP - 13 - scale)
        y = mul(party, truncate(party, y, coarse), times)
        y = truncate(party, y, scale)
    # 1/sqrt(u) = 2^(j + known - 31 + u.frac_bits/2) / sqrt(m).
    y = exponent.times_power(party, y, 1)
    result = Secret(y.share, scale + TOP // 2 - known - u.frac_bits // 2)
    if frac_bits is None:
        return result
    return rescale(party, result, frac_bits)


def sqrt(party: Seat, u: Secret, frac_bits: int) -> Secret:
    """SSqrt: the root of integers u in [0, 2^62) at any scale; like `inverse_sqrt`.

    Returns:
        sqrt(u) at frac_bits, within 2^-26 relative, and 1 LSB; 0 within 1 LSB at u = 0; meaningless
        for u < 0. 7 rounds.
    """
    factor = 1.0
    if u.frac_bits % 2:
        u, factor = u.divided_by_power_of_two(1), math.sqrt(2.0)
    normalised, exponent, known = normalise(party, u, 2)
    series = fit(_power(0.5, factor), 0.25, 1.0, "general", zero=True)
    y = evaluate(party, series, Secret(normalised.share, TOP), MANTISSA_BITS)
    # sqrt(u) = 2^(31 - j - known - u.frac_bits/2) sqrt(m), with 2^-j as 2^(count - j) / 2^count.
    ((thermometer, _),) = exponent.levels
    count = thermometer.count
    powers = [1 << (count - j) for j in range(count)] + [1]
    y = thermometer.times(party, y, powers)
    result = Secret(y.share, MANTISSA_BITS + count + known + u.frac_bits // 2 - TOP // 2)
    return rescale(party, result, frac_bits)


def lowest_bit(value: float, frac_bits: int) -> int:
    """The exponent of the largest power of two that is at most value, in LSB: for `smallest`."""
    return max(0, math.floor(math.log2(max(1.0, value * 2.0**frac_bits))))
