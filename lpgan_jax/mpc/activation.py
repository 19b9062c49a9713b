"""Leaky ReLU, and the range that activations are compared in."""

from __future__ import annotations

from lpgan_jax.mpc.arithmetic import truncate
from lpgan_jax.mpc.compare import Bit, select
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret

LOG_RANGE = 8
"""ReLU and leaky ReLU take |x| < 2^LOG_RANGE in real terms, and |x| < 2^62 as an integer.

A normalised value is at most the root of their number: 2^8 in 64 maps of 32x32. With 9, leaky ReLU
would need a truncation more at twice 18 fraction bits.
"""


def leaky(party: Seat, bit: Bit, x: Secret, alpha: float, frac_bits: int) -> Secret:
    """alpha*x + (1 - alpha)*bit*x at frac_bits; |x| < 2^`LOG_RANGE` in real terms. 2 rounds."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: expected a slope between 0 and 1, got {alpha}")
    # |alpha x| 2^shift must stay below 2^62, and alpha's own error, |x| 2^-shift, at an LSB.
    shift = min(24, 62 - LOG_RANGE - x.frac_bits)
    if shift < frac_bits:
        x = truncate(party, x, frac_bits)
        shift = min(24, 62 - LOG_RANGE - frac_bits)
    k = round(alpha * 2**shift)
    x = x.settled(party)
    chosen = select(party, bit, x)
    total = x.unmasked().times_int(k) + chosen.times_int(2**shift - k)
    return truncate(party, total.divided_by_power_of_two(shift), frac_bits)
