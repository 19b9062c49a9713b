"""Real numbers as fixed-point integers of the ring Z_{2^64}."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lpgan_jax.ring.words import RING64

MAX_FRAC_BITS = 28


def require_x64() -> None:
    """Refuse to run without JAX's 64-bit types (they would silently become 32-bit).

    Raises:
        RuntimeError: `jax_enable_x64` is off.
    """
    if jnp.result_type(jnp.uint64) != jnp.uint64:
        raise RuntimeError(
            "lpgan_jax needs JAX's 64-bit types, which were turned off after it was imported: "
            'call jax.config.update("jax_enable_x64", True)'
        )


def encode(values: ArrayLike, frac_bits: int) -> jax.Array:
    """Real values to uint64 at any number of fraction bits; unchecked (see `FixedPoint.encode`)."""
    scaled = jnp.round(jnp.asarray(values, jnp.float64) * 2.0**frac_bits)
    # Through int64: a direct float -> uint64 conversion maps negative values to 0.
    return scaled.astype(jnp.int64).astype(jnp.uint64)


def check_range(name: str, values: ArrayLike, frac_bits: int, log_range: int) -> None:
    """Raise ValueError unless all values are finite and |value| < 2^log_range; `name` them."""
    host = np.asarray(values, dtype=np.float64)
    if not np.isfinite(host).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    largest = float(np.abs(host).max(initial=0.0))
    if largest >= 2.0**log_range:
        raise ValueError(
            f"{name}: expected |x| < 2^{log_range} with {frac_bits} fraction bits, got {largest:g}"
        )


@dataclass(frozen=True)
class FixedPoint:
    """The encoding x -> round(x * 2^frac_bits) mod 2^64, in two's complement.

    Attributes:
        frac_bits: fraction bits f, 1 to 28; one LSB is 2^-f.

    Raises:
        TypeError: frac_bits is not an int.
        ValueError: frac_bits is outside 1 to 28.
    """

    frac_bits: int = 18

    def __post_init__(self) -> None:
        if isinstance(self.frac_bits, bool) or not isinstance(self.frac_bits, int):
            raise TypeError(f"frac_bits: expected an int, got {self.frac_bits!r}")
        if not 1 <= self.frac_bits <= MAX_FRAC_BITS:
            raise ValueError(f"frac_bits: expected 1 to {MAX_FRAC_BITS}, got {self.frac_bits}")

    @property
    def bound(self) -> float:
        """Values must be smaller than this in magnitude: 2^(62 - f)."""
        return 2.0 ** (62 - self.frac_bits)

    def encode(self, values: ArrayLike) -> jax.Array:
        """Encode real values.

        Args:
            values: float or int array of any shape; converted to float64.

        Returns:
            uint64 array of that shape, round-half-to-even of values * 2^f.

        Raises:
            ValueError: a value is NaN or infinite, or |value| >= 2^(62-f). Values that are being
                traced by JAX cannot be checked.
        """
        require_x64()
        if not isinstance(values, jax.core.Tracer):
            self.check(values)
        return encode(values, self.frac_bits)

    def check(self, values: ArrayLike) -> None:
        """Raise ValueError for values that `encode` refuses."""
        check_range("values", values, self.frac_bits, 62 - self.frac_bits)

    def decode(self, words: ArrayLike) -> jax.Array:
        """Decode ring elements: uint64 of any shape to float64 (exact below 2^53 LSB).

        Raises:
            TypeError: words are not uint64.
        """
        require_x64()
        words = jnp.asarray(words)
        if words.dtype != jnp.uint64:
            raise TypeError(f"words: expected uint64, got {words.dtype}")
        return RING64.signed(words).astype(jnp.float64) * 2.0**-self.frac_bits


def public_constant(value: float, significant_bits: int) -> tuple[int, int]:
    """A public real as k * 2^-s, with a scale of its own.

    Args:
        value: any finite nonzero real.
        significant_bits: how many bits k may have; the relative error is below 2^-significant_bits.

    Returns:
        (k, s): a signed integer, odd or of the least size, and the binary exponent (may be
        negative). Powers of two give k = 1 or -1, so that they cost nothing but the shift.
    """
    if not math.isfinite(value) or value == 0:
        raise ValueError(f"value: expected a finite nonzero constant, got {value}")
    mantissa, exponent = math.frexp(value)
    k, s = round(mantissa * 2**significant_bits), significant_bits - exponent
    while k % 2 == 0:
        k, s = k // 2, s - 1
    return k, s
