"""e^x of a masked argument in a window, from one opening: 2 rounds, no comparison.

With x - a = e open, e^x = e^e e^a but for the wrap: modulo a window's size 2^w LSB, x = e + a -
2^w carry. For x in the window bit w of x is 0, so that the carry is the XOR of bit w of e, which is
public, and of a, which DS knows. The servers know e^e = m 2^(d q), 1 <= m < 2^d, and DS deals
shares of 2^(d q) e^(a - 2^w carry) for each q and both bits: they take the one that e names.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc.arithmetic import masked, opening, truncate
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret

RESULT_BITS = 62  # results lie below 2^62 at the scale that they have before they are rounded
_MANTISSA_BITS, _ENTRY_BITS = 28, 12  # of m after the point, and before it: at most
_LEAST_MANTISSA_BITS = 24


@dataclass(frozen=True)
class Window:
    """[low, high) LSB of an argument, and how e^x is cut up there.

    Attributes:
        low: in LSB.
        high: likewise.
        scale: fraction bits of the argument.
        top: e^x < 2^top, with what it errs by.
        frac_bits: of the results.
    """

    low: int
    high: int
    scale: int
    top: int
    frac_bits: int

    @property
    def bits(self) -> int:
        """w: binary logarithm of the size in LSB."""
        return (self.high - self.low - 1).bit_length()

    @property
    def _room(self) -> int:
        """Bits for m, where what is dealt is precise to LSB / 2."""
        return RESULT_BITS - self.top - self.frac_bits - 1

    @property
    def entry_bits(self) -> int:
        """d: bits of m before the point."""
        return max(1, min(_ENTRY_BITS, self._room - _LEAST_MANTISSA_BITS))

    @property
    def mantissa_bits(self) -> int:
        """Fraction bits of m."""
        return min(_MANTISSA_BITS, self._room - self.entry_bits)

    @property
    def dealt_bits(self) -> int:
        """Fraction bits of what is dealt."""
        return RESULT_BITS - self.top - self.mantissa_bits

    @property
    def entries(self) -> int:
        """How many values q has."""
        return int(2.0 ** (self.bits - self.scale) / math.log(2)) // self.entry_bits + 1

    @property
    def result_scale(self) -> int:
        """Fraction bits of e^x before it is rounded."""
        return self.mantissa_bits + self.dealt_bits


@functools.singledispatch
def evaluate(party: Seat, window: Window, x: Secret, frac_bits: int) -> Secret:
    """e^x where x is in the window; anything elsewhere. 2 rounds (1 if x is masked), as many words.

    DS -> S2: two words for each entry of the window, and two to truncate.

    Args:
        party: this server's seat.
        window: of x's scale.
        x: any value of the ring.
        frac_bits: those of the window.

    Returns:
        e^x, truncated, within 2^-24 relative and 1.25 LSB.
    """
    a, e = opening(masked(party, x))
    dealt = party.correlate(lambda mask: dealt_powers(window, mask), a)
    power, entry = public_power(window, e)
    entries = np.arange(2 * window.entries).reshape((-1,) + (1,) * len(x.shape))
    named = entry[None] == entries
    share = jnp.where(named, dealt.share, np.uint64(0)).sum(0, dtype=jnp.uint64) * power
    with party.filling_the_range():
        return truncate(party, Secret(share, window.result_scale), frac_bits)


def dealt_powers(window: Window, mask: jax.Array) -> jax.Array:
    """DS's factors, [2 * entries, ...]: where bit w of the servers' e is 0, then where it is 1."""
    size = 2.0 ** (window.bits - window.scale)
    low = mask & np.uint64(2**window.bits - 1)
    bit = ((mask >> np.uint64(window.bits)) & np.uint64(1)).astype(jnp.float64)
    below = low.astype(jnp.float64) * 2.0**-window.scale + window.low * 2.0**-window.scale
    column = (-1,) + (1,) * mask.ndim
    whole = np.arange(window.entries).reshape(column) * (window.entry_bits * math.log(2))
    exponent = jnp.concatenate([below + whole - size * bit, below + whole - size * (1 - bit)])
    largest = window.top * math.log(2)  # what lies above belongs to no x in the window
    power = jnp.exp(jnp.minimum(exponent, largest)) * 2.0**window.dealt_bits
    return jnp.round(power).astype(jnp.int64).astype(jnp.uint64)


def public_power(window: Window, opened: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The servers' factor m, at its fraction bits, and which of the dealt ones belongs to it.

    In integers only: two servers must get the same bits whatever their hardware.
    """
    # The window begins at 0 of words - low; the mask is what it was.
    words = opened - np.uint64(window.low % 2**64)
    bit = (words >> np.uint64(window.bits)) & np.uint64(1)
    top = words << np.uint64(64 - window.bits)
    high, low = top >> np.uint64(32), top & np.uint64(2**32 - 1)
    log2_e = np.uint64(round(math.log2(math.e) * 2**31))
    # log2(e) (words mod 2^bits) in units of 2^-63 windows.
    product = high * log2_e + ((low * log2_e) >> np.uint64(32))
    point = 63 - (window.bits - window.scale)
    whole = product >> np.uint64(point)
    rest = (product >> np.uint64(point - 30)) & np.uint64(2**30 - 1)
    # A quotient and its rest, of numbers below 2^8.
    entry = (whole * np.uint64(-(-(2**16) // window.entry_bits))) >> np.uint64(16)
    mantissa = _two_to(rest) << (whole - entry * np.uint64(window.entry_bits))
    shift = 30 - window.mantissa_bits
    mantissa = (mantissa + np.uint64(1 << (shift - 1))) >> np.uint64(shift)
    return mantissa, (entry + bit * np.uint64(window.entries)).astype(jnp.int32)


def _two_to(fraction: jax.Array) -> jax.Array:
    """2^(fraction / 2^30) at 30 fraction bits, within 8, for 0 <= fraction < 2^30."""
    # Around 1/2, so that a series of few terms does: 2^u = sqrt(2) e^z, |z| <= ln(2)/2.
    z = (fraction.astype(jnp.int64) - (1 << 29)) * round(math.log(2) * 2**30) >> 30
    total = jnp.full_like(z, 1 << 30)
    for n in range(9, 0, -1):  # 1 + z/n (1 + ...)
        total = (1 << 30) + (((z * total) >> 30) * round(2**30 / n) >> 30)
    return ((total * round(math.sqrt(2) * 2**30)) >> 30).astype(jnp.uint64)
