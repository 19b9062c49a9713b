"""Sums over axes, matrix products and convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc import arithmetic
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.ring import Convolution, matmul
from lpgan_jax.transform.rules.arithmetic import factor_scales, product, words_like
from lpgan_jax.transform.rules.registry import Node, Value, Values, rule

_SMALL = 4  # public factors below 2^-4 get more than f fraction bits

Bilinear = Callable[[jax.Array, jax.Array], jax.Array]


@rule("reduce_sum")
def _reduce_sum(values: Values, node: Node, x: Value) -> Value:
    axes = tuple(map(int, node.params["axes"]))
    return linear(values, node, x, lambda v: _sum(v, axes))


def _sum(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A sum of rows, long and slow, is a matrix product: it is read in order."""
    first, end = min(axes, default=0), max(axes, default=-1) + 1
    lead, summed, kept = v.shape[:first], v.shape[first:end], v.shape[end:]
    if len(axes) == len(summed) and math.prod(kept) > 1:
        rows = v.reshape(math.prod(lead), math.prod(summed), math.prod(kept))
        ones = jnp.ones((1, rows.shape[1]), v.dtype)
        return jax.vmap(lambda own: matmul(ones, own))(rows).reshape(lead + kept)
    return v.sum(axes, dtype=v.dtype)


@rule("cumsum")
def _cumsum(values: Values, node: Node, x: Value) -> Value:
    axis, reverse = int(node.params["axis"]), node.params["reverse"]

    def running(v: jax.Array) -> jax.Array:
        return jax.lax.cumsum(v, axis, reverse)

    return linear(values, node, x, running)


def linear(values: Values, node: Node, x: Value, of: Callable[[jax.Array], jax.Array]) -> Value:
    """A linear map with public integer coefficients: local; a multiple stays one."""
    factor, source = x.factored()
    return values.now(node.shape, lambda: source.raw.map(of), factor)


def bilinear(values: Values, node: Node, of: Bilinear, x: Any, y: Any) -> Value:
    """A bilinear map; of a public operand, a linear one."""
    f = values.frac_bits
    if isinstance(x, Value) and isinstance(y, Value):
        (c, u), (d, v) = x.factored(), y.factored()
        one, other = factor_scales(u, v, values.form.times(1 / (c * d)))

        def make() -> Secret:
            first = u.opened(one)
            second = first if u is v else v.opened(other)
            return arithmetic.bilinear(values.party, of, first, second)

        return values.now(node.shape, make, c * d)
    secret, public = (x, y) if isinstance(x, Value) else (y, x)
    factor, source = secret.factored()

    def with_public() -> Secret:
        known = source.at(min(source.frac_bits, source.form.frac_bits))
        bits = f
        if isinstance(public, np.ndarray):  # of small constants, such as those of a mean, more
            _, exponent = np.frexp(np.abs(public).max(initial=0.0))
            room = values.form.finest - known.frac_bits
            bits = max(f, min(f - int(exponent), room)) if exponent < -_SMALL else f
        scaled = jnp.round(jnp.asarray(public, jnp.float64) * 2.0**bits)

        def apply(v: jax.Array) -> jax.Array:
            words = words_like(scaled, v)
            return of(v, words) if secret is x else of(words, v)

        return known.map(apply).divided_by_power_of_two(bits)

    return values.now(node.shape, with_public, factor)


@rule("inner")
def _inner(values: Values, node: Node, x: Any, y: Any) -> Value:
    axes = tuple(map(int, node.params["axes"]))
    if x is y and isinstance(x, Value) and not x.is_bits:
        return _sum_of_squares(values, node, x, axes)
    if any(isinstance(v, Value) and v.is_bits for v in (x, y)):
        return linear(values, node, product(values, x, y), lambda v: _sum(v, axes))
    return bilinear(values, node, lambda u, v: _sum(u * v, axes), x, y)


def _sum_of_squares(values: Values, node: Node, x: Value, axes: tuple[int, ...]) -> Value:
    """Of a truncated value in no round; its opening, for other products, goes beside."""
    factor, source = x.factored()
    scale, _ = factor_scales(source, source, values.form.times(1 / factor**2))

    def make() -> Secret:
        total = arithmetic.square(values.party, source.known(scale)).map(lambda v: _sum(v, axes))
        source.opened(scale)
        return total

    return values.now(node.shape, make, factor**2)


@rule("dot_general")
def _dot(values: Values, node: Node, x: Any, y: Any) -> Value:
    dimensions = node.params["dimension_numbers"]
    return bilinear(values, node, lambda u, v: dot(u, v, dimensions), x, y)


def dot(x: jax.Array, y: jax.Array, dimensions: Any) -> jax.Array:
    """`lax.dot_general` in the ring."""
    (x_inner, y_inner), (x_batch, y_batch) = (
        tuple(tuple(map(int, axes)) for axes in pair) for pair in dimensions
    )
    x_free = [a for a in range(x.ndim) if a not in (*x_inner, *x_batch)]
    y_free = [a for a in range(y.ndim) if a not in (*y_inner, *y_batch)]
    batch = [x.shape[a] for a in x_batch]
    rows, columns = [x.shape[a] for a in x_free], [y.shape[a] for a in y_free]
    inner, size = math.prod(x.shape[a] for a in x_inner), math.prod(batch)
    left = x.transpose(*x_batch, *x_free, *x_inner).reshape(size, math.prod(rows), inner)
    right = y.transpose(*y_batch, *y_inner, *y_free).reshape(size, inner, math.prod(columns))
    result = jax.vmap(matmul)(left, right) if batch else matmul(left[0], right[0])
    return result.reshape(*batch, *rows, *columns)


@rule("conv_general_dilated")
def _conv(values: Values, node: Node, x: Any, w: Any) -> Value:
    return bilinear(values, node, convolution(node), x, w)


def convolution(node: Node) -> Convolution:
    """`lax.conv_general_dilated` in the ring."""
    params = node.params
    numbers = params["dimension_numbers"]
    return Convolution(
        tuple(numbers.lhs_spec),
        tuple(numbers.rhs_spec),
        tuple(numbers.out_spec),
        tuple(map(int, params["window_strides"])),
        tuple((int(low), int(high)) for low, high in params["padding"]),
        tuple(map(int, params["lhs_dilation"])),
        tuple(map(int, params["rhs_dilation"])),
        int(params["feature_group_count"]),
        int(params["batch_group_count"]),
    )
