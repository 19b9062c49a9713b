"""Range reduction under sharing, and the inverse square root built on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from lpgan_jax.mpc.arithmetic import masked, mul, scale_public, square, truncate
from lpgan_jax.mpc.compare import Bit, negative, select
from lpgan_jax.party import Party
from lpgan_jax.secret import Secret, add_public

_TOP = 62  # normalised integers lie in [2^60, 2^62)
_MANTISSA_BITS = 28  # products of mantissas below 4 stay in range at double this


@dataclass(frozen=True)
class Level:
    """One step of the range reduction: `count` comparisons in parallel, in units of 4^unit."""

    count: int
    unit: int


Search = Callable[[int], tuple[Level, ...]]


def parallel_levels(steps: int) -> tuple[Level, ...]:
    """All thresholds at once: few rounds, `steps` comparisons per value."""
    return (Level(steps, 1),) if steps else ()


def binary_levels(steps: int) -> tuple[Level, ...]:
    """A binary search: log2(steps + 1) comparisons per value, one after the other."""
    return tuple(Level(1, 2**i) for i in reversed(range(steps.bit_length())))


@dataclass(frozen=True)
class Shift:
    """A secret shift by a multiple of `unit`, as a thermometer of bits (leading axis)."""

    bits: Bit
    level: Level

    def apply(self, party: Party, x: Secret, base: int) -> Secret:
        """x times base^(unit * number of bits set); exact, 1 round."""
        x = masked(party, x)
        chosen = select(party, self.bits, x.rearrange(lambda v: v[None]))
        unit, count = self.level.unit, self.level.count
        steps = [base ** (unit * (j + 1)) - base ** (unit * j) for j in range(count)]
        return x.unmasked() + chosen.times_ints(steps).sum((0,))


def normalise(
    party: Party, x: Secret, smallest: int, largest: int, search: Search = parallel_levels
) -> tuple[Secret, list[Shift], int]:
    """Multiply x by a secret power of 4 that brings it into [2^60, 2^62).

    This is the published range conversion (SRC), for every x in the range and not only for small
    shares, and without revealing the size of any share: the exponent is found by comparing x with
    public thresholds under sharing.

    Args:
        party: this server's seat.
        x: integers (its scale is ignored) in [2^smallest, 2^largest).
        smallest: 0 to 60.
        largest: up to 62.
        search: how the exponent is found; all thresholds at once by default.

    Returns:
        (x * 4^(q + k), the shifts that make up 4^q, k) with public k. Exact. Per level: 9 rounds.
    """
    known = (_TOP - largest) // 2
    x = x.times_int(4**known)
    steps = max(0, -(-(_TOP - 2 - smallest - 2 * known) // 2))
    shifts = []
    for level in search(steps):
        thresholds = [-(1 << (_TOP - 2 * level.unit * (j + 1))) for j in range(level.count)]
        ones = Secret(jnp.ones((level.count, *x.shape), x.share.dtype), x.frac_bits)
        below = party.only_s1(ones.times_ints(thresholds).share)
        differences = Secret(x.share[None] + below, x.frac_bits)
        shift = Shift(negative(party, differences), level)
        x = shift.apply(party, x, base=4)
        shifts.append(shift)
    return x, shifts, known


def _mantissa_inverse_sqrt(party: Party, m: Secret, iterations: int) -> Secret:
    """1/sqrt(m) for m in [1/4, 1) at `_MANTISSA_BITS`, by Goldschmidt's iteration.

    The start 2.625 - 3.125 m + 1.5 m^2 errs by 1/32 at most (relative); a step takes an error e to
    1.5 e^2: 1.5e-3, 3.2e-6, 1.6e-11.
    """
    bits = _MANTISSA_BITS
    m = masked(party, m)
    quadratic = square(party, m).times_int(12) - m.unmasked().at_scale(2 * bits).times_int(25)
    y = add_public(party, Secret(quadratic.share, 2 * bits + 3), 2.625)  # coefficients in eighths
    y = truncate(party, y, bits)
    g, h = mul(party, m, y), y
    g = truncate(party, g, bits)  # -> sqrt(m)
    for step in range(iterations):
        g, h = masked(party, g), masked(party, h)
        # r = 3/2 - g h / 2
        half = mul(party, g, h).divided_by_power_of_two(1)
        r = masked(party, add_public(party, -truncate(party, half, bits), 1.5))
        h = truncate(party, mul(party, h, r), bits)
        if step < iterations - 1:
            g = truncate(party, mul(party, g, r), bits)
    return h


def inverse_sqrt(
    party: Party,
    u: Secret,
    frac_bits: int | None,
    times: Secret | None = None,
    factor: float = 1.0,
    smallest: int = 0,
    largest: int = 62,
    search: Search = parallel_levels,
) -> Secret:
    """Inverse SSqrt: 1/sqrt(u), or times/sqrt(u).

    u = m 4^p with 1/4 <= m < 1 by `normalise`; 1/sqrt(m) by Goldschmidt's iteration (2 steps up to
    18 fraction bits, else 3); the power 2^-p by selecting shifts with the same bits, exactly. The
    published protocol finds p from each server's own share, which needs small shares and shows
    their size to the other server.

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
        The result, within 2^-17 relative (2 steps) or 2^-26 (3 steps), and 1 LSB.
    """
    if u.frac_bits % 2:  # read as u/2, whose root is smaller by sqrt(2)
        u, factor = u.divided_by_power_of_two(1), factor * math.sqrt(0.5)
    iterations = 2 if (frac_bits or 0) <= 18 else 3
    normalised, shifts, known = normalise(party, u, smallest, largest, search)
    m = truncate(party, Secret(normalised.share, _TOP), _MANTISSA_BITS)
    y = _mantissa_inverse_sqrt(party, m, iterations=iterations)
    scale = _MANTISSA_BITS
    if factor != 1.0:
        y = scale_public(party, y, factor, scale, magnitude_bits=2)
    if times is not None:
        scale = times.frac_bits
        coarse = min(_MANTISSA_BITS, 62 - 13 - scale)
        y = truncate(party, mul(party, truncate(party, y, coarse), times), scale)
    # 1/sqrt(u) = 2^(q + known - 31 + u.frac_bits/2) / sqrt(m); the selected shifts give the 2^q.
    for shift in shifts:
        y = shift.apply(party, y, base=2)
    exponent = _TOP // 2 - known - u.frac_bits // 2
    result = Secret(y.share, scale + exponent)
    if frac_bits is None:
        return result
    if result.frac_bits < frac_bits:
        return result.at_scale(frac_bits)
    return truncate(party, result, frac_bits)


def lowest_bit(value: float, frac_bits: int) -> int:
    """The exponent of the largest power of two that is at most value, in LSB: for `smallest`."""
    return max(0, math.floor(math.log2(max(1.0, value * 2.0**frac_bits))))
