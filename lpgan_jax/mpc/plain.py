"""Interpreters of the secure program on whole values: no shares, nobody to hide them from.

`PlainSeat` takes the place of a `Party`, so that programs run unchanged. What is exact whatever the
masks (products, selections) is computed directly here; `exact.ExactSeat` computes in float64
without rounding, `emulated.EmulatedSeat` on the ring's integers with the protocols' own rounding.

Both record what they truncate and compare, in the same order, which is what ranges, headroom and
the loss of precision are read from.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lpgan_jax.mpc import arithmetic, compare
from lpgan_jax.mpc.guard import RANGE_BITS, Watched, numbered, range_of
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret


class Seen(NamedTuple):
    """A value that a program truncated or compared.

    Attributes:
        place: where in the program.
        value: the value before; it must be below 2^range_bits as an integer.
        result: the truncated value; None of a comparison.
        range_bits: what the operation takes.
        by_design: the value fills that range by design (in a range reduction).
    """

    place: str
    value: Secret
    result: Secret | None
    range_bits: int
    by_design: bool

    @property
    def kind(self) -> str:
        """What was done: "compare" or "truncate"."""
        return "compare" if self.result is None else "truncate"


def named(seen: Sequence[Seen]) -> list[str]:
    """What the guard calls these tensors."""
    names = numbered(of.place for of in seen)
    return [
        str(Watched(name, of.kind, of.range_bits, of.value.size, of.value.size))
        for name, of in zip(names, seen, strict=True)
    ]


class PlainSeat(Seat):
    """A seat where values are whole. Subclasses say what a value is.

    Attributes:
        seen: every truncation and comparison so far, in the order of the program.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []

    def public_share(self, public: jax.Array) -> jax.Array:
        """A public value itself: there is one server."""
        return public

    @abstractmethod
    def real(self, value: Secret) -> jax.Array:
        """A value as float64."""

    def scan(
        self,
        body: Callable[[Any, Any, Any], tuple[Any, Any]],
        carry: Any,
        xs: Any,
        length: int,
        reverse: bool = False,
    ) -> tuple[Any, Any]:
        """See `Seat.scan`."""
        self._check_fresh()

        inside: list[Seen] = []  # known once `step` was traced

        def step(carry: Any, iteration: Any) -> tuple[Any, Any]:
            seed, x = iteration
            seat = self._child(seed)
            carry, y = body(seat, carry, x)
            inside[:] = seat.seen
            values = [(of.value.unmasked(), of.result and of.result.unmasked()) for of in inside]
            return carry, (y, values)

        carry, (ys, values) = lax.scan(step, carry, (self._seeds(length), xs), length, reverse)
        names = numbered(of.place for of in inside)
        for of, name, (value, result) in zip(inside, names, values, strict=True):
            place = f"{name} of a loop"
            self.seen.append(of._replace(place=place, value=value, result=result))
        return carry, ys

    @abstractmethod
    def _seeds(self, count: int) -> Any:
        """What the seats of as many iterations are made from."""

    @abstractmethod
    def _child(self, seed: Any) -> PlainSeat:
        """The seat of an iteration."""

    def saw_truncation(self, value: Secret, result: Secret) -> None:
        """Record a truncation."""
        self.seen.append(Seen(self.tensor_place, value, result, RANGE_BITS, self.filling))

    def saw_comparison(self, value: Secret, bits: int | None) -> None:
        """Record a comparison of values below 2^(bits-1) (as integers), or of any."""
        by_design = bits is None or bits > RANGE_BITS
        range_bits = range_of(bits)
        self.seen.append(Seen(self.tensor_place, value, None, range_bits, by_design))


def bits_left(party: PlainSeat, seen: Seen) -> jax.Array:
    """Bits between the largest magnitude and what the operation takes; NaN leaves -inf.

    Range reductions fill the range by design: where they fit, all `RANGE_BITS` count as left.
    """
    largest = jnp.abs(party.real(seen.value)).max(initial=0.0)
    largest = jnp.where(jnp.isnan(largest), jnp.inf, largest)
    lsb = 2.0**-seen.value.frac_bits
    left = seen.range_bits - jnp.log2(jnp.maximum(largest / lsb, 1.0))
    return jnp.where(left > 0, math.inf, left) if seen.by_design else left


@arithmetic.bilinear.register
def _bilinear(party: PlainSeat, product: arithmetic.Bilinear, x: Secret, y: Secret) -> Secret:
    return Secret(product(x.share, y.share), x.frac_bits + y.frac_bits)


@arithmetic.mul.register
def _mul(party: PlainSeat, x: Secret, y: Secret) -> Secret:
    return Secret(x.share * y.share, x.frac_bits + y.frac_bits)


@compare.b2a.register
def _b2a(party: PlainSeat, bit: compare.Bit) -> Secret:
    return Secret(_whole_bit(bit).astype(bit.random.share.dtype), 0)


@compare.select.register
def _select(party: PlainSeat, bit: compare.Bit, x: Secret) -> Secret:
    return Secret(jnp.where(_whole_bit(bit), x.share, jnp.zeros_like(x.share)), x.frac_bits)


def _whole_bit(bit: compare.Bit) -> jax.Array:
    """The bit itself: what was opened, and the random bit that hides it."""
    return bit.flipped ^ (bit.random.share != 0)
