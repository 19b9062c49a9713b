"""Range reduction under sharing: multiply a secret by the power of two that normalises it.

This is the published range conversion (SRC). There each server finds the exponent from its own
share, which needs small shares, shows their size to the other server, and misses the range where
shares cancel. Here the exponent is found by comparing the value with public powers of two under
sharing: it holds for every value in the range, and nothing is revealed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lpgan_jax.mpc.arithmetic import masked
from lpgan_jax.mpc.compare import Bit, b2a, less_than_public, select
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret, add_public

TOP = 62  # the largest integers that truncation takes lie below 2^62
MANTISSA_BITS = 28  # fraction bits of a function of a normalised value


@dataclass(frozen=True)
class Thermometer:
    """A secret count j of public thresholds above |x|, in unary, and the sign of x.

    Attributes:
        bits: [x < t] for t = t_0 > t_1 > ...; if signed, then [x < 0] and [x < 1 - t_0], ...
        count: the number of thresholds.
        signed: whether x may be negative.
    """

    bits: Bit
    count: int
    signed: bool = False

    def lookup(self, party: Seat, values: Sequence[int]) -> Secret:
        """values[j], an integer (0 fraction bits), of an unsigned x; exact, local.

        `values`: count + 1 public integers.
        """
        steps = [after - before for before, after in pairwise(values)]
        total = b2a(party, self.bits).times_ints(steps).sum((0,))
        return add_public(party, total, values[0])

    def times(
        self, party: Seat, y: Secret, weights: Sequence[int], with_sign: bool = False
    ) -> Secret:
        """y * weights[j], or sign(x) y weights[j]; exact.

        1 round, one word per element (none if y is masked or was truncated); DS -> S2: one word per
        bit (two if y was truncated).

        Args:
            party: this server's seat.
            y: of x's shape.
            weights: count + 1 public integers.
            with_sign: multiply by the sign of x too (1 at x = 0).
        """
        steps = [after - before for before, after in pairwise(weights)]
        if self.signed:
            # For x < 0 all of the first bits are set, and [x < 1 - t] says [|x| >= t].
            sign, sense = (-2 * weights[-1], 1) if with_sign else (0, -1)
            steps = [*steps, sign, *(sense * step for step in steps)]
        y = y.settled(party)
        chosen = select(party, self.bits, y.rearrange(lambda v: v[None]))
        return y.unmasked().times_int(weights[0]) + chosen.times_ints(steps).sum((0,))


@dataclass(frozen=True)
class Level:
    """One step of a search for the exponent: `count` thresholds at once, in units of `unit`."""

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
class Exponent:
    """A secret exponent j, as the sum of thermometers of several units."""

    levels: tuple[tuple[Thermometer, int], ...]

    def times_power(self, party: Seat, y: Secret, log_base: int) -> Secret:
        """y * 2^(log_base * j); exact. A round a level but the first, if y is masked."""
        for thermometer, unit in self.levels:
            powers = [1 << (log_base * unit * j) for j in range(thermometer.count + 1)]
            y = thermometer.times(party, y, powers)
        return y

    def power(self, party: Seat, log_base: int) -> Secret:
        """2^(log_base * j) itself, of a search with one level; exact, local."""
        ((thermometer, unit),) = self.levels
        return thermometer.lookup(
            party, [1 << (log_base * unit * j) for j in range(thermometer.count + 1)]
        )


def normalise(
    party: Seat,
    x: Secret,
    log_base: int,
    smallest: int = 0,
    largest: int = TOP,
    search: Search = parallel_levels,
) -> tuple[Secret, Exponent, int]:
    """Multiply a positive x by the power of 2^log_base that brings it just below 2^62.

    Args:
        party: this server's seat.
        x: integers (its scale is ignored) in [2^smallest, 2^largest). 0 gives 0.
        log_base: 1 or 2.
        smallest: 0 to 61.
        largest: up to 62.
        search: how the exponent is found; all thresholds at once by default.

    Returns:
        (x * 2^(log_base * (j + known)), in [2^(62 - log_base), 2^62); j; known, which is public).
        Exact. Per level: 4 rounds.
    """
    known = (TOP - largest) // log_base
    x = x.times_int(1 << (log_base * known))
    steps = max(0, -(-(TOP - log_base * (known + 1) - smallest) // log_base))
    levels = []
    for level in search(steps):
        x = masked(party, x)
        thresholds = [1 << (TOP - log_base * level.unit * (j + 1)) for j in range(level.count)]
        thermometer = Thermometer(less_than_public(party, x, thresholds), level.count)
        x = Exponent(((thermometer, level.unit),)).times_power(party, x, log_base)
        levels.append((thermometer, level.unit))
    return x.settled(party), Exponent(tuple(levels)), known


def normalise_magnitude(
    party: Seat, x: Secret, top: int, positive: bool = False
) -> tuple[Secret, Thermometer]:
    """Multiply x, of either sign, by its sign and the power of two that brings it below 2^top.

    Args:
        party: this server's seat.
        x: integers, 0 < |x| < 2^top, masked. 0 gives 0.
        top: up to 62.
        positive: x > 0 is known, and half of the comparisons are made.

    Returns:
        (|x| * 2^j in [2^(top-1), 2^top), the thermometer of j with the sign). Exact. 4 rounds (3
        after x was masked).
    """
    thresholds = [1 << (top - 1 - j) for j in range(top - 1)]
    below = () if positive else (0, *(1 - t for t in thresholds))
    bits = less_than_public(party, x, [*thresholds, *below])
    thermometer = Thermometer(bits, len(thresholds), signed=not positive)
    powers = [1 << j for j in range(len(thresholds) + 1)]
    return thermometer.times(party, x, powers, with_sign=True), thermometer
