"""Exponential, logarithm, sigmoid, tanh, erf and softplus.

A saturating function is computed as if its argument were in the range where it does not saturate,
and what it is outside is selected by comparisons that run beside. On ring shares e^(u' + u'') is no
product of the servers' own exponentials (the sum wraps), so the published forms cannot be used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from lpgan_jax.mpc import exponential
from lpgan_jax.mpc.arithmetic import masked, truncate
from lpgan_jax.mpc.compare import Bit, b2a, less_than_public, select
from lpgan_jax.mpc.range_reduction import TOP, normalise
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret, add_public
from lpgan_jax.mpc.series import evaluate, fit

_PLACE_BITS = 3  # fraction bits that a saturating function's argument is compared with
_GUARD_BITS = 8  # of an exponential's argument beyond its scale


def _integer(value: float, frac_bits: int) -> int:
    return round(value * 2.0**frac_bits)


def _piecewise(party: Seat, bits: Bit, inside: Secret, below: float, above: float) -> Secret:
    """`below` where x < low, `above` where x >= high, of the bits [x < low] and [x < high]."""
    chosen = select(party, bits, inside.rearrange(lambda v: v[None]))
    ends = [_integer(below, inside.frac_bits), -_integer(above, inside.frac_bits)]
    outside = b2a(party, bits).times_ints(ends).sum((0,))
    outside = add_public(party, Secret(outside.share, inside.frac_bits), above)
    return chosen.times_ints([-1, 1]).sum((0,)) + outside


def _placed(party: Seat, x: Secret, bound: float) -> tuple[Secret, Bit, float]:
    """(x masked, [x < -b] and [x < b], b) for a b a little above the bound.

    x counts as up to 2^-3 less than it is: only bits above that are compared.
    """
    x = masked(party, x.settled(party))
    low = max(0, x.frac_bits - _PLACE_BITS)
    high = (_integer(bound, x.frac_bits) >> low) + 1
    limits = [-(high + 1) << low, high << low]
    bits = less_than_public(party, x, limits, TOP + 1, low)
    return x, bits, ((high + 1) << low) * 2.0**-x.frac_bits


Function = Callable[[np.ndarray], np.ndarray]


@functools.cache
def _of_multiple(function: Function, factor: float) -> Function:
    """function(factor x); cached, since series are cached by their function."""
    return function if factor == 1 else lambda x: function(factor * x)


def _saturating(
    party: Seat,
    function: Function,
    x: Secret,
    bound: float,
    end: float,
    frac_bits: int,
    factor: float,
) -> Secret:
    """An odd function of factor x: a series where |factor x| < bound, else -end or end."""
    x, bits, bound = _placed(party, x, bound / abs(factor))
    series = fit(_of_multiple(function, factor), -bound, bound, "odd", 2.0 ** -(frac_bits + 2))
    end = math.copysign(end, factor)
    return _piecewise(party, bits, evaluate(party, series, x, frac_bits), -end, end)


def _saturation(frac_bits: int) -> float:
    """Where 1 - tanh(x) falls below half an LSB."""
    return (frac_bits + 2) * math.log(2) / 2


def tanh(party: Seat, x: Secret, frac_bits: int, factor: float = 1.0) -> Secret:
    """The hyperbolic tangent of a public factor times x, saturating, everywhere.

    4 rounds, 2 comparisons; a factor costs nothing, since it makes another series.
    """
    bound = _saturation(frac_bits)
    return _saturating(party, np.tanh, x, bound, 1.0, frac_bits, factor)


def _centred_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.tanh(x / 2) / 2


def sigmoid(party: Seat, x: Secret, frac_bits: int, factor: float = 1.0) -> Secret:
    """1/(1 + e^-x) = 1/2 + tanh(x/2)/2, as `tanh`."""
    bound = 2 * _saturation(frac_bits)
    centred = _saturating(party, _centred_sigmoid, x, bound, 0.5, frac_bits, factor)
    return add_public(party, centred, 0.5)


def _erf(x: np.ndarray) -> np.ndarray:
    return np.array([math.erf(v) for v in np.ravel(x)]).reshape(np.shape(x))


def erf(party: Seat, x: Secret, frac_bits: int, factor: float = 1.0) -> Secret:
    """The error function, as `tanh`."""
    bound = math.sqrt((frac_bits + 2) * math.log(2))  # 1 - erf(x) < e^(-x^2)
    return _saturating(party, _erf, x, bound, 1.0, frac_bits, factor)


def _log_two_cosh_half(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x / 2, -x / 2)


def softplus(party: Seat, x: Secret, frac_bits: int) -> Secret:
    """ln(1 + e^x) = x/2 + ln(2 cosh(x/2)), where |x|/2 is the second term far from 0.

    5 rounds, 2 comparisons.
    """
    x, bits, bound = _placed(party, x, 2 * _saturation(frac_bits))
    series = fit(_log_two_cosh_half, -bound, bound, "even", 2.0 ** -(frac_bits + 2))
    half = x.divided_by_power_of_two(1)
    scale = max(frac_bits, half.frac_bits)
    inside = evaluate(party, series, x, scale)
    even, odd = (
        select(party, bits, v.rearrange(lambda words: words[None])) for v in (inside, half)
    )
    # bits: both of x < -bound, the second of what lies inside, none of x > bound.
    linear = half.unmasked().times_int(2) - odd.sum((0,))
    total = even.times_ints([-1, 1]).sum((0,)).at_scale(scale) + linear.at_scale(scale)
    return truncate(party, total, frac_bits)


def exp(party: Seat, x: Secret, frac_bits: int, largest: int | None = None) -> Secret:
    """SecExp: e^x for x of any size below 2^(54-f).

    Below -(f + 2) ln 2 the result is 0; above (34 - f) ln 2 (11.09 at 18 bits) it stays what it is
    there, 2^(34-f).

    Args:
        party: this server's seat.
        x: at f fraction bits.
        frac_bits: f.
        largest: e^x < 2^largest, if that is known: no comparison is made with what lies above.

    Returns:
        e^x within 2^-24 relative, and 1.25 LSB, and the effect of x's own rounding at f + 8 bits. 4
        rounds, 2 comparisons (1 with `largest`).
    """
    scale = x.frac_bits + _GUARD_BITS
    x = masked(party, x.settled(party).at_scale(scale))
    saturated = 34 - frac_bits
    top = saturated if largest is None else max(1 - frac_bits, min(saturated, largest))
    low = math.ceil(-(frac_bits + 2) * math.log(2) * 2.0**scale)
    # Of the upper end so much is left that e^x stays below 2^top with its errors.
    high = math.floor(top * math.log(2) * 2.0**scale) - 4
    window = exponential.Window(low, high, scale, top, frac_bits)
    inside = exponential.evaluate(party, window, x, frac_bits)
    if largest is not None and largest <= saturated:
        below = less_than_public(party, x, (low,))[0]
        return inside.unmasked() - select(party, below, inside)
    return _piecewise(party, less_than_public(party, x, (low, high)), inside, 0.0, 2.0**top)


def log(party: Seat, u: Secret, frac_bits: int, smallest: int = 0, largest: int = TOP) -> Secret:
    """SecLog: ln u = ln m + p ln 2 with u = m 2^p, 1/2 <= m < 1, for integers u in [1, 2^62).

    Args:
        party: this server's seat.
        u: at scale u.frac_bits. u = 0 gives a finite value, u < 0 a meaningless one.
        frac_bits: fraction bits of the result.
        smallest: as in `normalise`.
        largest: as in `normalise`.

    Returns:
        ln u, within 2^-26 and 1 LSB. 6 rounds, 61 comparisons (fewer in a smaller
        range). The published series of 11 terms has no range reduction and errs by 0.16 at u = 0.1.
    """
    scale = max(frac_bits, 30)
    normalised, exponent, known = normalise(party, u, smallest, largest)
    mantissa = Secret(normalised.share, TOP)
    log_m = evaluate(party, fit(np.log, 0.5, 1.0, "general"), mantissa, frac_bits)
    # p = 62 - u.frac_bits - known - j
    ln2 = _integer(math.log(2), scale)
    offset = (TOP - u.frac_bits - known) * math.log(2)
    if (thermometer := exponent.thermometer) is None:
        return add_public(party, log_m, offset)
    power = thermometer.lookup(party, [-ln2 * j for j in range(thermometer.count + 1)])
    whole = add_public(party, Secret(power.share, scale), offset)
    return truncate(party, whole, frac_bits) + log_m.unmasked()
