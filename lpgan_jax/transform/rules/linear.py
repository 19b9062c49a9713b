"""Sums over axes, matrix products and convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc import arithmetic
from lpgan_jax.ring import Conv2D, matmul
from lpgan_jax.secret import Secret
from lpgan_jax.transform.rules.arithmetic import _words, factor_scales, product
from lpgan_jax.transform.rules.registry import Node, Value, Values, rule

Bilinear = Callable[[jax.Array, jax.Array], jax.Array]


@rule("reduce_sum")
def _reduce_sum(values: Values, node: Node, x: Value) -> Value:
    axes = tuple(map(int, node.params["axes"]))
    return linear(values, node, x, lambda v: _sum(v, axes))


def _sum(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A sum over leading axes, long and slow, is a matrix product: it is read in order."""
    kept = v.shape[len(axes) :]
    if axes == tuple(range(len(axes))) and kept and v.ndim > 1:
        rows = v.reshape(-1, math.prod(kept))
        return matmul(jnp.ones((1, rows.shape[0]), v.dtype), rows)[0].reshape(kept)
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
            return arithmetic.bilinear(values.party, of, first, second, owing=True)

        return values.now(node.shape, make, c * d)
    secret, public = (x, y) if isinstance(x, Value) else (y, x)
    factor, source = secret.factored()

    def with_public() -> Secret:
        known = source.at(min(source.frac_bits, source.form.frac_bits))
        scaled = jnp.round(jnp.asarray(public, jnp.float64) * 2.0**f)

        def apply(v: jax.Array) -> jax.Array:
            words = _words(scaled, v)
            return of(v, words) if secret is x else of(words, v)

        return known.map(apply).divided_by_power_of_two(f)

    return values.now(node.shape, with_public, factor)


@rule("inner")
def _inner(values: Values, node: Node, x: Any, y: Any) -> Value:
    axes = tuple(map(int, node.params["axes"]))
    if any(isinstance(v, Value) and v.is_bits for v in (x, y)):
        return linear(values, node, product(values, x, y), lambda v: _sum(v, axes))
    return bilinear(values, node, lambda u, v: _sum(u * v, axes), x, y)


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
    inner = math.prod(x.shape[a] for a in x_inner)
    left = x.transpose(*x_batch, *x_free, *x_inner).reshape(-1, math.prod(rows), inner)
    right = y.transpose(*y_batch, *y_inner, *y_free).reshape(-1, inner, math.prod(columns))
    result = jax.vmap(matmul)(left, right) if batch else matmul(left[0], right[0])
    return result.reshape(*batch, *rows, *columns)


@rule("conv_general_dilated")
def _conv(values: Values, node: Node, x: Any, w: Any) -> Value:
    return bilinear(values, node, convolution(node), x, w)


def convolution(node: Node) -> Bilinear:
    """`lax.conv_general_dilated` in the ring."""
    params = node.params
    numbers = params["dimension_numbers"]
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise NotImplementedError("grouped convolution")
    if len(lhs) != 4:
        raise NotImplementedError("convolution that is not two-dimensional")
    strides, padding = tuple(params["window_strides"]), tuple(map(tuple, params["padding"]))
    lhs_dilation, rhs_dilation = params["lhs_dilation"], params["rhs_dilation"]
    back = np.argsort((out[0], *out[2:], out[1]))

    def apply(x: jax.Array, w: jax.Array) -> jax.Array:
        x = x.transpose(lhs[0], *lhs[2:], lhs[1])
        w = w.transpose(*rhs[2:], rhs[1], rhs[0])
        y = _convolve(x, w, strides, padding, lhs_dilation, rhs_dilation)
        return y.transpose(*back)

    return apply


def _convolve(
    x: jax.Array, w: jax.Array, strides: Any, padding: Any, lhs_dilation: Any, rhs_dilation: Any
) -> jax.Array:
    """NHWC by HWIO. Dilated operands are those of gradients, without the zeros."""
    kernel = w.shape[:2]
    if max(*lhs_dilation, *rhs_dilation) == 1:
        return Conv2D(strides, padding).forward(x, w)
    if max(*strides, *rhs_dilation) == 1:
        # The gradient, in its input, of a convolution whose kernel is w, flipped and transposed.
        before = [(k - 1 - low) for k, (low, _) in zip(kernel, padding, strict=True)]
        sizes = [
            (n - 1) * s + 1 + low + high - k + 1
            for n, s, k, (low, high) in zip(
                x.shape[1:3], lhs_dilation, kernel, padding, strict=True
            )
        ]
        after = [
            (n - 1) * s + k - p - size
            for n, s, k, p, size in zip(
                x.shape[1:3], lhs_dilation, kernel, before, sizes, strict=True
            )
        ]
        pads = tuple(zip(before, after, strict=True))
        flipped = w[::-1, ::-1].swapaxes(2, 3)
        return _input_gradient(x, flipped, tuple(lhs_dilation), pads, tuple(sizes))
    if max(*strides, *lhs_dilation) == 1:
        # The gradient, in its kernel, of a convolution: x's channels are its batch.
        images, gradient = x.transpose(3, 1, 2, 0), w.transpose(2, 0, 1, 3)
        size = tuple(
            n + low + high - (k - 1) * s
            for n, k, s, (low, high) in zip(
                x.shape[1:3], kernel, rhs_dilation, padding, strict=True
            )
        )
        return _kernel_gradient(images, gradient, tuple(rhs_dilation), padding, size)
    raise NotImplementedError("convolution with strides and dilations")


def _input_gradient(
    dy: jax.Array, w: jax.Array, strides: Any, padding: Any, size: Any
) -> jax.Array:
    """Strides that do not divide leave pixels at the end that no output looks at."""
    pads: Any = tuple((low, max(high, 0)) for low, high in padding)
    conv = Conv2D(strides, pads)
    return conv.input_grad(dy, w, size)


def _kernel_gradient(
    x: jax.Array, dy: jax.Array, strides: Any, padding: Any, size: Any
) -> jax.Array:
    pads: Any = tuple((low, max(high, 0)) for low, high in padding)
    conv = Conv2D(strides, pads)
    return conv.weight_grad(x, dy, size).transpose(2, 0, 1, 3)
