"""Sums, products, powers and quotients, element by element."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc import arithmetic
from lpgan_jax.mpc.fixed_point import public_constant
from lpgan_jax.mpc.range_reduction import TOP
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.transform.rules.moves import chosen, masked_by
from lpgan_jax.transform.rules.registry import Node, Value, Values, known_scalar, lifted, rule
from lpgan_jax.transform.values import Format, Stored, power_of_two

_FACTOR_BITS, _LEAST_FACTOR_BITS = 20, 14  # of a public factor that is not known while tracing


@rule("add", "add_any")
def _add(values: Values, node: Node, x: Any, y: Any) -> Value:
    return lifted(values, x) + lifted(values, y)


@rule("sub")
def _sub(values: Values, node: Node, x: Any, y: Any) -> Value:
    return lifted(values, x) - lifted(values, y)


@rule("neg")
def _neg(values: Values, node: Node, x: Value) -> Value:
    return x.times(-1.0)


@rule("mul")
def _mul(values: Values, node: Node, x: Any, y: Any) -> Value:
    if not isinstance(x, Value):
        x, y = y, x
    if isinstance(y, Value):
        return product(values, x, y)
    factor = known_scalar(y)
    return x.times(factor) if factor is not None else times_public(values, x, y)


def product(values: Values, x: Value, y: Value) -> Value:
    """x * y of two secrets, at the sum of their scales."""
    for one, other in ((x, y), (y, x)):
        if one.is_bits:
            total = Value(values, np.broadcast_shapes(x.shape, y.shape), [])
            for term in one.terms:
                part = other if term.bit is None else chosen(values, term.bit, other)
                total = total + part.times(term.coefficient)
            return total
    (c, u), (d, v) = x.factored(), y.factored()
    if (
        u is v and power_of_two(c) is None
    ):  # a running average of squares takes no factor beside its own
        c, d, u, v = 1.0, 1.0, x.stored, x.stored
    shape = np.broadcast_shapes(x.shape, y.shape)
    form = values.form.times(1 / (c * d))

    def make() -> Secret:
        if u is v:
            scale, _ = factor_scales(u, v, form)
            return arithmetic.square(values.party, _factor(u, scale, 1))
        size = math.prod(shape)
        one, other = factor_scales(u, v, form)
        first, second = _factor(u, one, size), _factor(v, other, size)
        return arithmetic.mul(values.party, first, second)

    return values.now(shape, make, c * d)


def factor_scales(x: Stored, y: Stored, product: Format) -> tuple[int, int]:
    """The fraction bits at which two factors enter a product of a format."""
    first, second = (min(v.frac_bits, v.form.frac_bits) for v in (x, y))
    excess = max(0, first + second - product.finest)
    if x is y:
        return first - -(-excess // 2), first - -(-excess // 2)
    return (first - excess, second) if first > second else (first, second - excess)


def _factor(x: Stored, scale: int, size: int) -> Secret:
    """A factor with a public part; `size`: of the product.

    Of a truncated value every product takes another dealt word: if it has few elements that are
    repeated, opening them under a mask of one part is cheaper.
    """
    return x.opened(scale) if 2 * x.distinct <= size else x.known(scale)


def times_public(values: Values, x: Value, factor: Any) -> Value:
    """x * a public array that is not known while tracing, or not the same everywhere.

    Each of its elements becomes an integer of up to 20 bits and a power of two of its own, so that
    small rates keep their bits.
    """
    c, source = x.factored()
    if isinstance(factor, np.ndarray) and set(np.unique(factor)) <= {0.0, 1.0}:
        return masked_by(values, x, factor)
    shape = np.broadcast_shapes(x.shape, np.shape(factor))
    form = source.form
    f = form.frac_bits
    if isinstance(factor, np.ndarray) and not _is_wide(factor, f):
        largest = float(np.abs(factor).max(initial=0.0)) or 1.0
        _, shift = public_constant(2.0 ** np.ceil(np.log2(largest)), 20)
        shift = max(0, shift + 20)
        integers = np.rint(factor * 2.0**shift)

        def scaled() -> Secret:
            raw = source.at(min(f, source.frac_bits))
            return dataclasses.replace(
                raw.map(lambda v: v * words_like(integers, v)), frac_bits=raw.frac_bits + shift
            )

        return values.later(shape, scaled, c)

    def make() -> Secret:
        # One truncation, if a fine value leaves the factor enough bits; it ends at f at most.
        scale = source.frac_bits
        if form.finest - scale < _LEAST_FACTOR_BITS:
            scale = f
        raw = source.at(scale).settled(values.party).unmasked()
        dropped = max(0, scale - f)
        bits = min(_FACTOR_BITS, form.finest - scale)
        whole, shift = floating(jnp.asarray(factor, jnp.float64), bits, TOP - dropped)
        total = raw.map(lambda v: v * words_like(whole, v))
        fine = dataclasses.replace(total, frac_bits=scale - dropped)
        return arithmetic.truncate_by(values.party, fine, shift + dropped)

    return values.later(shape, make, c)


def _is_wide(factor: np.ndarray, frac_bits: int) -> bool:
    """Whether an array has elements so large that one scale leaves too few bits to small ones."""
    _, exponents = np.frexp(factor[(factor != 0) & (factor != np.rint(factor))])
    largest = np.frexp(np.abs(factor).max(initial=0.0))[1]
    shift = _FACTOR_BITS - largest
    few = exponents.min(initial=largest) + shift < _LEAST_FACTOR_BITS
    return bool(few and shift < frac_bits - 2)


def floating(array: jax.Array, bits: int, most: int) -> tuple[jax.Array, jax.Array]:
    """(k, s) with array = k / 2^s, |k| at most 2^bits, s from 1 to `most`; exact integers."""
    _, exponent = jnp.frexp(array)
    shift = jnp.clip(bits - exponent, 1, most)
    return jnp.round(jnp.ldexp(array, shift)), shift.astype(jnp.int64)


def words_like(integers: Any, like: jax.Array) -> jax.Array:
    """Public integers as words of the ring (or floats, in the clear)."""
    if jnp.issubdtype(like.dtype, jnp.floating):
        return jnp.asarray(integers, like.dtype)
    return jnp.asarray(integers).astype(jnp.int64).astype(like.dtype)


@rule("square")
def _square(values: Values, node: Node, x: Value) -> Value:
    return product(values, x, x)


@rule("integer_pow")
def _power(values: Values, node: Node, x: Value) -> Value:
    exponent = int(node.params["y"])
    result, base = None, x
    n = exponent
    while n:
        if n % 2:
            result = base if result is None else product(values, result, base)
        n //= 2
        base = product(values, base, base) if n else base
    assert result is not None
    return result
