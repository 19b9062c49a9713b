"""Square roots: a series for each power of four at once, and comparisons that choose among them.

While the comparisons run, every piece's series is evaluated from the same opening of the value, as
if it lay there; so a root takes no more rounds than a comparison.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from lpgan_jax.mpc.arithmetic import masked, mul, truncate, truncate_by
from lpgan_jax.mpc.compare import Bit, less_than_public, select
from lpgan_jax.mpc.range_reduction import MANTISSA_BITS, TOP, Thermometer
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.series import Series, evaluate, fit, waves

_SLACK_BITS = 6  # a threshold may be off by 2^-6 of itself
_UNIT = 6  # powers of four of a step of the coarse search of `over_root`
_MOST_QUOTIENT_BITS = 12


@functools.cache
def _power(exponent: float, factor: float) -> Callable[[np.ndarray], np.ndarray]:
    """factor * m^exponent; cached, since series are cached by their function."""
    return lambda m: factor * m**exponent


def _series(exponent: float, factor: float, zero: bool = False) -> Series:
    """Of 1/4 <= m < 1, and somewhat more."""
    high = 1.0 + 2.0**-_SLACK_BITS
    tolerance = 2.0**-30 if exponent > 0 else 2.0**-26  # a root is a half, or its inverse 1
    return fit(_power(exponent, factor), 0.25, high, "general", tolerance, zero)


class Root:
    """sqrt(u) or 1/sqrt(u) in pieces: u = m 4^p with 1/4 <= m < 1 in each.

    2 rounds, and 4 until a result is known (3 on 43 bits or fewer: where the smallest u is not far
    below 2^62). DS -> S2: about 28 words a piece.
    """

    def __init__(
        self,
        party: Seat,
        u: Secret,
        inverse: bool = True,
        smallest: int = 0,
        largest: int = TOP,
    ) -> None:
        """As `inverse_sqrt` and `sqrt`."""
        self._party = party
        odd = u.frac_bits % 2  # read as u/2, whose root is smaller by sqrt(2)
        sign, factor = (-1, math.sqrt(0.5)) if inverse else (1, math.sqrt(2.0))
        bits = u.frac_bits + odd
        known = (TOP - largest) // 2
        steps = max(0, -(-(TOP - 2 * (known + 1) - smallest) // 2))
        logs = [TOP - 2 * (known + j + 1) for j in range(steps)]
        # The power of two by which the series' value of each piece is multiplied.
        self._exponents = [sign * (TOP // 2 - known - j - bits // 2) for j in range(steps + 1)]
        u = masked(party, u.settled(party))
        self._bits: Bit | None = None
        if logs:
            low = max(0, logs[-1] - _SLACK_BITS)
            self._bits = less_than_public(party, u, [1 << k for k in logs], TOP + 1, low)
        pieces = u.rearrange(lambda v: v[None])
        pieces = pieces.times_ints([1 << (2 * (known + j)) for j in range(steps + 1)])
        series = _series(sign * 0.5, factor if odd else 1.0, zero=not inverse)
        self._waves = waves(party, series, dataclasses.replace(pieces, frac_bits=TOP))
        self._waves = masked(party, self._waves)

    def value(self, frac_bits: int) -> Secret:
        """The root itself. 1 round, beside the comparisons."""
        return self._chosen(self._waves, frac_bits)

    def times(self, x: Secret, frac_bits: int) -> Secret:
        """The root times a value of u's shape (or one that broadcasts to it).

        2 rounds, beside the comparisons; |x| < 2^15 at 18 fraction bits.
        """
        with self._party.filling_the_range():
            y = truncate_by(self._party, self._waves, self._shift(MANTISSA_BITS))
        y = dataclasses.replace(y, frac_bits=MANTISSA_BITS)
        return self._chosen(mul(self._party, y, x), frac_bits)

    def _shift(self, frac_bits: int) -> np.ndarray:
        return np.full((1,) * len(self._waves.shape), self._waves.frac_bits - frac_bits)

    def _chosen(self, pieces: Secret, frac_bits: int) -> Secret:
        """Of multiples of the pieces' series that of u's piece, times its power of two."""
        party = self._party
        shifts = pieces.frac_bits - frac_bits - np.asarray(self._exponents)
        up = max(0, 1 - int(np.min(shifts)))
        shifts = np.minimum(shifts + up, TOP).reshape((-1,) + (1,) * (len(pieces.shape) - 1))
        with party.filling_the_range():
            rounded = truncate_by(party, pieces.times_int(1 << up), shifts)
        total = rounded[0].unmasked()
        if self._bits is not None:
            above, below = (select(party, self._bits, v) for v in (rounded[1:], rounded[:-1]))
            total = total + (above - below).sum((0,))
        return Secret(total.share, frac_bits)


def inverse_sqrt(
    party: Seat, u: Secret, frac_bits: int, smallest: int = 0, largest: int = TOP
) -> Secret:
    """Inverse SSqrt: 1/sqrt(u).

    Args:
        party: this server's seat.
        u: integers in [2^smallest, 2^largest) at any scale. u = 0 gives a large finite value, u < 0
            a meaningless one.
        frac_bits: fraction bits of the result.
        smallest: 0 to 61.
        largest: up to 62.

    Returns:
        The result, within 2^-24 relative, and 1 LSB. 4 rounds.
    """
    return Root(party, u, True, smallest, largest).value(frac_bits)


def sqrt(party: Seat, u: Secret, frac_bits: int) -> Secret:
    """SSqrt: the root of integers u in [0, 2^62) at any scale; like `inverse_sqrt`.

    Returns:
        sqrt(u) at frac_bits, within 2^-25 relative, and 1 LSB; 0 within 1 LSB at u = 0; meaningless
        for u < 0. 4 rounds.
    """
    return Root(party, u, False).value(frac_bits)


def over_root(party: Seat, x: Secret, u: Secret, frac_bits: int) -> Secret:
    """x / sqrt(u), of many elements: what is compared and dealt for each is less, and rounds more.

    The power of four is searched in two steps, whose bits multiply x by its root as well. (The
    second step's thresholds may be off by 2^-6, so that it looks at 17 bits only.)

    Args:
        party: this server's seat.
        x: of u's shape.
        u: integers in [1, 2^62) at an even scale.
        frac_bits: of each of the two factors of which the result is left as a product.

    Returns:
        The result, below 2^12, at 2 frac_bits, within a few LSB at frac_bits, and 2^-20 relative. 9
        rounds, 10 comparisons.
    """
    x = masked(party, x.settled(party))
    # What x counts once it is multiplied by the root of u's power of four: u is 4^-j of the range.
    scale = TOP // 2 - u.frac_bits // 2
    if (excess := x.frac_bits + scale + _MOST_QUOTIENT_BITS - TOP) > 0:
        x = truncate(party, x, x.frac_bits - excess)
    intervals = TOP // 2
    for count, unit, low in (
        (-(-intervals // _UNIT) - 1, _UNIT, 0),
        (_UNIT - 1, 1, TOP - 2 * (_UNIT - 1) - _SLACK_BITS),
    ):
        u = masked(party, u)
        thresholds = [1 << (TOP - 2 * unit * (j + 1)) for j in range(count)]
        bits = less_than_public(party, u, thresholds, TOP + 1, low)
        found = Thermometer(bits, count)
        u = found.times(party, u, [1 << (2 * unit * j) for j in range(count + 1)])
        x = found.times(party, x, [1 << (unit * j) for j in range(count + 1)])
    series = _series(-0.5, 1.0)
    y = evaluate(party, series, Secret(u.settled(party).share, TOP), frac_bits)
    x = dataclasses.replace(x, frac_bits=x.frac_bits + scale)
    if x.frac_bits > frac_bits:
        x = truncate(party, x, frac_bits)
    return mul(party, y, x)


def lowest_bit(value: float, frac_bits: int) -> int:
    """The exponent of the largest power of two that is at most value, in LSB: for `smallest`."""
    return max(0, math.floor(math.log2(max(1.0, value * 2.0**frac_bits))))
