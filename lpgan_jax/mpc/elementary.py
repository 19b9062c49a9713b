"""Exponential, logarithm, sigmoid, tanh, erf and softplus: range reduction, then one series.

On ring shares e^(u' + u'') is no product of the servers' own exponentials (the sum wraps), so the
published forms cannot be used.
"""

from __future__ import annotations

import math

import numpy as np

from lpgan_jax.mpc.arithmetic import masked, truncate
from lpgan_jax.mpc.compare import Bit, less_than_public, select
from lpgan_jax.mpc.range_reduction import TOP, Thermometer, normalise
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret, add_public
from lpgan_jax.mpc.series import evaluate, fit

_GUARD_BITS = 8  # of an exponential's argument beyond its scale
_POWER_BITS = 26  # fraction bits of e^t, 0 <= t < ln 2


def _integer(value: float, frac_bits: int) -> int:
    return round(value * 2.0**frac_bits)


def _clamped(
    party: Seat, x: Secret, low: float, high: float, bits: tuple[Bit, Bit]
) -> tuple[Secret, Secret]:
    """(x clamped to [low, high], the part above), with the bits [x < low] and [x < high]; exact."""
    over, under = add_public(party, x, -high), add_public(party, x, -low)
    excess = over.unmasked() - select(party, bits[1], over)
    return x.unmasked() - excess - select(party, bits[0], under), excess


def clamp(party: Seat, x: Secret, bound: float) -> tuple[Secret, Secret]:
    """(x clamped to [-bound, bound], the part above); exact. 4 rounds, 2 comparisons."""
    x = masked(party, x.settled(party))
    limits = [_integer(-bound, x.frac_bits), _integer(bound, x.frac_bits)]
    bits = less_than_public(party, x, limits)
    return _clamped(party, x, -bound, bound, (bits[0], bits[1]))


def _saturation(frac_bits: int) -> float:
    """Where 1 - tanh(x) falls below half an LSB."""
    return (frac_bits + 2) * math.log(2) / 2


def tanh(party: Seat, x: Secret, frac_bits: int) -> Secret:
    """The hyperbolic tangent, saturating, everywhere. 6 rounds, 2 comparisons."""
    bound = _saturation(frac_bits)
    inside, _ = clamp(party, x, bound)
    series = fit(np.tanh, -bound, bound, "odd", 2.0 ** -(frac_bits + 2))
    return evaluate(party, series, inside, frac_bits)


def _centred_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.tanh(x / 2) / 2


def sigmoid(party: Seat, x: Secret, frac_bits: int) -> Secret:
    """1/(1 + e^-x) = 1/2 + tanh(x/2)/2, saturating, everywhere. 6 rounds, 2 comparisons."""
    bound = 2 * _saturation(frac_bits)
    inside, _ = clamp(party, x, bound)
    series = fit(_centred_sigmoid, -bound, bound, "odd", 2.0 ** -(frac_bits + 2))
    return add_public(party, evaluate(party, series, inside, frac_bits), 0.5)


def _erf(x: np.ndarray) -> np.ndarray:
    return np.array([math.erf(v) for v in np.ravel(x)]).reshape(np.shape(x))


def erf(party: Seat, x: Secret, frac_bits: int) -> Secret:
    """The error function, saturating, everywhere. 6 rounds, 2 comparisons."""
    bound = math.sqrt((frac_bits + 2) * math.log(2))  # 1 - erf(x) < e^(-x^2)
    inside, _ = clamp(party, x, bound)
    series = fit(_erf, -bound, bound, "odd", 2.0 ** -(frac_bits + 2))
    return evaluate(party, series, inside, frac_bits)


def _log_two_cosh_half(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x / 2, -x / 2)


def softplus(party: Seat, x: Secret, frac_bits: int) -> Secret:
    """ln(1 + e^x) = x/2 + ln(2 cosh(x/2)) inside the clamp, x above. 7 rounds, 2 comparisons."""
    bound = 2 * _saturation(frac_bits)
    inside, excess = clamp(party, x, bound)
    series = fit(_log_two_cosh_half, -bound, bound, "even", 2.0 ** -(frac_bits + 2))
    linear = inside.unmasked().divided_by_power_of_two(1)
    scale = max(frac_bits, linear.frac_bits)
    total = evaluate(party, series, inside, scale) + linear.at_scale(scale) + excess.at_scale(scale)
    return truncate(party, total, frac_bits)


def exp(party: Seat, x: Secret, frac_bits: int, largest: int | None = None) -> Secret:
    """SecExp: e^x = 2^i e^t with x = i ln 2 + t, 0 <= t < ln 2, for x of any size below 2^(54-f).

    i is found by comparing x with the multiples of ln 2. Below -(f + 2) ln 2 the result is 0; above
    (34 - f) ln 2 (11.09 at 18 bits) it stays what it is there, 2^(34-f).

    Args:
        party: this server's seat.
        x: at f fraction bits.
        frac_bits: f.
        largest: e^x < 2^largest, if that is known; above, the result stays what it is there.

    Returns:
        e^x within 2^-24 relative, and 1 LSB, and the effect of x's own rounding at f + 8 bits. 7
        rounds, 37 comparisons at any f (fewer with `largest`).
    """
    scale = x.frac_bits + _GUARD_BITS
    x = masked(party, x.settled(party).at_scale(scale))
    lowest, highest = -(frac_bits + 2), 33 - frac_bits  # of i
    highest = highest if largest is None else max(lowest + 1, min(highest, largest - 1))
    limits = [_integer(i * math.log(2), scale) for i in range(highest + 1, lowest - 1, -1)]
    bits = less_than_public(party, x, limits)
    count = len(limits)
    thermometer = Thermometer(bits, count)
    # The multiple to subtract where j limits lie above x; clamped at both ends.
    starts = [limits[1], *limits[1:], limits[-1]]
    low, high = limits[-1] * 2.0**-scale, limits[0] * 2.0**-scale
    inside, _ = _clamped(party, x, low, high, (bits[-1], bits[0]))
    t = inside - Secret(thermometer.lookup(party, starts).share, scale)
    power = evaluate(party, fit(np.exp, 0.0, math.log(2), "general"), t, _POWER_BITS)
    # 2^(i - lowest); none below the lowest limit.
    weights = [1 << (highest - lowest - max(j - 1, 0)) for j in range(count)] + [0]
    result = thermometer.times(party, power, weights)
    return truncate(party, Secret(result.share, _POWER_BITS - lowest), frac_bits)


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
    normalised, exponent, known = normalise(party, u, 1, smallest, largest)
    mantissa = Secret(normalised.share, TOP)
    log_m = evaluate(party, fit(np.log, 0.5, 1.0, "general"), mantissa, frac_bits)
    # p = 62 - u.frac_bits - known - j
    ln2 = _integer(math.log(2), scale)
    offset = (TOP - u.frac_bits - known) * math.log(2)
    if not exponent.levels:
        return add_public(party, log_m, offset)
    ((thermometer, _),) = exponent.levels
    power = thermometer.lookup(party, [-ln2 * j for j in range(thermometer.count + 1)])
    whole = add_public(party, Secret(power.share, scale), offset)
    return truncate(party, whole, frac_bits) + log_m.unmasked()
