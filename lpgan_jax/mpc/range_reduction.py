"""Range reduction under sharing: multiply a secret by the power of two that normalises it.

This is the published range conversion (SRC). There each server finds the exponent from its own
share, which needs small shares, shows their size to the other server, and misses the range where
shares cancel. Here the exponent is found by comparing the value with public powers of two under
sharing: it holds for every value in the range, and nothing is revealed.
"""

from __future__ import annotations

from collections.abc import Sequence
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
class Exponent:
    """A secret exponent j, as a thermometer."""

    thermometer: Thermometer | None

    def times_power(self, party: Seat, y: Secret, log_base: int) -> Secret:
        """y * 2^(log_base * j); exact. No round if y is masked or was truncated."""
        if self.thermometer is None:
            return y
        return self.thermometer.times(party, y, self._powers(self.thermometer, log_base))

    def power(self, party: Seat, log_base: int) -> Secret:
        """2^(log_base * j) itself; exact, local."""
        assert self.thermometer is not None
        return self.thermometer.lookup(party, self._powers(self.thermometer, log_base))

    @staticmethod
    def _powers(of: Thermometer, log_base: int) -> list[int]:
        return [1 << (log_base * j) for j in range(of.count + 1)]


def normalise(
    party: Seat, x: Secret, smallest: int = 0, largest: int = TOP
) -> tuple[Secret, Exponent, int]:
    """Multiply a positive x by the power of two that brings it just below 2^62.

    Args:
        party: this server's seat.
        x: integers (its scale is ignored) in [2^smallest, 2^largest). 0 gives 0.
        smallest: 0 to 61.
        largest: up to 62.

    Returns:
        (x * 2^(j + known), in [2^61, 2^62); j; known, which is public). Exact. 4 rounds.
    """
    known = TOP - largest
    x = masked(party, x.times_int(1 << known))
    thresholds = [1 << (TOP - j - 1) for j in range(max(0, TOP - known - 1 - smallest))]
    if not thresholds:
        return x.settled(party), Exponent(None), known
    found = Thermometer(less_than_public(party, x, thresholds), len(thresholds))
    exponent = Exponent(found)
    return exponent.times_power(party, x, 1).settled(party), exponent, known


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
