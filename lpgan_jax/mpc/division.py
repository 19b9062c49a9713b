"""Reciprocal and quotient of secrets of either sign: range reduction, then one series."""

from __future__ import annotations

import numpy as np

from lpgan_jax.mpc.arithmetic import masked, mul, rescale, truncate
from lpgan_jax.mpc.range_reduction import MANTISSA_BITS, TOP, normalise, normalise_magnitude
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.series import evaluate, fit

_QUOTIENT_BITS = 26  # fraction bits of 1/m in a quotient: what is left over limits its size


def inverse(party: Seat, u: Secret, frac_bits: int, positive: bool = False) -> Secret:
    """SecInv: 1/u for integers 0 < |u| < 2^62 at scale u.frac_bits.

    |u| = m 2^p with 1/2 <= m < 1, 1/m by a series (the published protocol iterates Newton's x (2 -
    u x) from a fixed start, which diverges for large u), and the power 2^-p, with the sign, by
    selecting with the bits that found it. That takes two steps with a truncation between, since
    2^-p spans more bits than a word: first the powers below 1, then those above.

    Args:
        party: this server's seat.
        u: of either sign. u = 0 gives a large finite value.
        frac_bits: at most 28.
        positive: as in `normalise_magnitude`.

    Returns:
        1/u, within 2^-25 relative, and 1 LSB. 8 rounds.
    """
    magnitude, thermometer = normalise_magnitude(party, masked(party, u), TOP, positive)
    series = fit(np.reciprocal, 0.5, 1.0, "general")
    y = evaluate(party, series, Secret(magnitude.share, TOP), MANTISSA_BITS)
    # 1/|u| = 2^(j - one) / m: 2^-spare at j = 0 counts as 0 if it is below 2^-31.
    one, count = TOP - u.frac_bits, thermometer.count
    spare = min(one, TOP - MANTISSA_BITS - 3)
    exponents = [spare + min(j - one, 0) for j in range(count + 1)]
    y = thermometer.times(party, y, [1 << e if e >= 0 else 0 for e in exponents])
    y = truncate(party, Secret(y.share, MANTISSA_BITS + spare), MANTISSA_BITS)
    powers = [1 << max(0, j - one) for j in range(count + 1)]
    y = thermometer.times(party, y, powers, with_sign=True)
    return truncate(party, Secret(y.share, MANTISSA_BITS), frac_bits)


def inverse_positive(
    party: Seat, u: Secret, frac_bits: int, smallest: int = 0, largest: int = TOP
) -> Secret:
    """1/u for integers u in [2^smallest, 2^largest), at most 32 apart.

    As `inverse`, without a sign, and with as many comparisons as there are powers of two between.

    Args:
        party: this server's seat.
        u: at scale u.frac_bits. u = 0 gives a large finite value.
        frac_bits: at most 28.
        smallest: as in `normalise`.
        largest: as in `normalise`.

    Returns:
        1/u, within 2^-25 relative, and 1 LSB. 7 rounds.

    Raises:
        ValueError: the range is wider.
    """
    if largest - smallest > TOP - MANTISSA_BITS - 2:
        raise ValueError(f"smallest, largest: {smallest} and {largest} are more than 32 apart")
    normalised, exponent, known = normalise(party, u, smallest, largest)
    series = fit(np.reciprocal, 0.5, 1.0, "general")
    y = evaluate(party, series, Secret(normalised.share, TOP), MANTISSA_BITS)
    # 1/u = 2^(j + known - TOP) / m in LSB of u.
    y = exponent.times_power(party, y, 1)
    result = Secret(y.share, MANTISSA_BITS + TOP - known - u.frac_bits)
    return rescale(party, result, frac_bits)


def quotient_bits(frac_bits: int) -> int:
    """How large a quotient may be: |x / y| < 2^this."""
    return TOP - 2 - _QUOTIENT_BITS - frac_bits


def divide(party: Seat, x: Secret, y: Secret, frac_bits: int, positive: bool = False) -> Secret:
    """SecDiv: x / y for y of either sign, 0 < |y| < 2^28 in real terms.

    With q the power of two (and the sign) that brings y just below 2^top, and m = y q / 2^top, the
    quotient's numerator is x q / 2^top, exactly, and 1/m its factor.

    Args:
        party: this server's seat.
        x: |x / y| < 2^(34 - f), and |x| < 2^62 as an integer; of y's shape and scale.
        y: not 0 (that gives a meaningless, finite value).
        frac_bits: f.
        positive: y > 0 is known, and half of the comparisons are made.

    Returns:
        x / y, within 2^-23 relative, and 2 LSB. 7 rounds.
    """
    x.require_scale_of(y)
    top = TOP - quotient_bits(frac_bits)
    x, y = masked(party, x), masked(party, y)
    magnitude, thermometer = normalise_magnitude(party, y, top, positive)
    series = fit(np.reciprocal, 0.5, 1.0, "general")
    reciprocal = evaluate(party, series, Secret(magnitude.share, top), _QUOTIENT_BITS)
    powers = [1 << j for j in range(thermometer.count + 1)]
    numerator = thermometer.times(party, x, powers, with_sign=True)
    numerator = truncate(party, Secret(numerator.share, top), frac_bits + 1)
    return truncate(party, mul(party, numerator, reciprocal), frac_bits)
