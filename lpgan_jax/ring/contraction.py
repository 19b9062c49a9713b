"""Products of two strided views, as one primitive of JAX.

Matrix products, convolutions and their gradients are sums out[m, n] = sum_k a[m, k] b[k, n] over
views of their operands: the im2col matrix of an image is a view of it. A `Contraction` describes
the views. On a CPU with the native kernels, `contract` reads its operands where they are;
elsewhere it runs the portable function it was given, which does the same by gathers and `matmul`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax import native
from lpgan_jax.native.primitive import primitive

_NATIVE_WORDS = (jnp.uint32, jnp.uint64)

Portable = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Axis:
    """An axis of a view.

    Attributes:
        size: its length.
        strides: words between its elements, in each of the two arrays that have it.
    """

    size: int
    strides: tuple[int, int]


@dataclass(frozen=True)
class Contraction:
    """The views of a product.

    Attributes:
        rows: axes of m, with strides in (a, out).
        inner: axes of k, with strides in (a, b).
        columns: axes of n, with strides in (b, out).
        shape: of out, which every (start, m, n) fills once.
        starts: (a, b, out): where the views begin, in words; one product for each.
        padding: zeros (before, after) each axis of a, that strides and starts count in.
    """

    rows: tuple[Axis, ...]
    inner: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    shape: tuple[int, ...]
    starts: tuple[tuple[int, int, int], ...] = ((0, 0, 0),)
    padding: tuple[tuple[int, int], ...] = ()

    @property
    def multiply_adds(self) -> int:
        """How many the product takes."""
        axes = (*self.rows, *self.inner, *self.columns)
        return len(self.starts) * math.prod(axis.size for axis in axes)

    def batched(
        self, size: int, a: tuple[int, ...] | None, b: tuple[int, ...] | None
    ) -> Contraction:
        """The contraction for a batch of one operand or both, along a new leading axis.

        Args:
            size: of the batch.
            a: the shape of one element of a, if a is batched.
            b: likewise.
        """
        shape, out_stride = (size, *self.shape), math.prod(self.shape)
        if a is None:
            columns = (Axis(size, (math.prod(b or ()), out_stride)), *self.columns)
            return dataclasses.replace(self, shape=shape, columns=columns)
        a_stride = math.prod(padded(a, self.padding))
        padding = self.padding and ((0, 0), *self.padding)
        if b is None:
            rows = (Axis(size, (a_stride, out_stride)), *self.rows)
            return dataclasses.replace(self, shape=shape, padding=padding, rows=rows)
        b_stride = math.prod(b)
        starts = tuple(
            (at_a + i * a_stride, at_b + i * b_stride, at_out + i * out_stride)
            for i in range(size)
            for at_a, at_b, at_out in self.starts
        )
        return dataclasses.replace(self, shape=shape, padding=padding, starts=starts)


def padded(shape: Sequence[int], padding: Sequence[tuple[int, int]]) -> list[int]:
    """A shape after padding; without any, itself."""
    margins = padding or [(0, 0)] * len(shape)
    return [n + sum(p) for n, p in zip(shape, margins, strict=True)]


def contract(a: jax.Array, b: jax.Array, contraction: Contraction, portable: Portable) -> jax.Array:
    """The product modulo 2^bits of the operands' unsigned integer type.

    Under `vmap`, a batch over one operand makes one larger product.

    Args:
        a: the left operand.
        b: the right operand, of the same type.
        contraction: how the product reads them.
        portable: the same function of (a, b), in JAX.

    Returns:
        An array of `contraction.shape`.
    """
    result: jax.Array = ring_product_p.bind(a, b, contraction=contraction, portable=portable)
    return result


def _abstract(a: Any, b: Any, *, contraction: Contraction, portable: Portable) -> Any:
    # Under shard_map, the result varies over the mesh axes that an operand varies over.
    like = max(a, b, key=lambda operand: len(operand.mat.varying))
    return like.update(shape=contraction.shape, weak_type=False)


def _batch(
    operands: Sequence[jax.Array],
    axes: Sequence[int | None],
    *,
    contraction: Contraction,
    portable: Portable,
) -> tuple[jax.Array, int]:
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    a, b = (
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    )
    shapes = [None if axis is None else x.shape[1:] for x, axis in zip((a, b), axes, strict=True)]
    batched = contraction.batched(size, *shapes)
    in_axes = tuple(None if axis is None else 0 for axis in axes)
    return contract(a, b, batched, jax.vmap(portable, in_axes)), 0


@jax.named_scope("linear_algebra")
def _run_portable(
    a: jax.Array, b: jax.Array, *, contraction: Contraction, portable: Portable
) -> jax.Array:
    return portable(a, b)


@jax.named_scope("linear_algebra")
def _run_on_cpu(
    a: jax.Array, b: jax.Array, *, contraction: Contraction, portable: Portable
) -> jax.Array:
    if a.dtype not in _NATIVE_WORDS or not native.available():
        return portable(a, b)
    if contraction.padding:
        a = jnp.pad(a, contraction.padding)
    c = contraction
    attributes = {"starts": np.ravel(np.asarray(c.starts, np.int64))}
    for name, axes, arrays in (
        ("rows", c.rows, ("a", "out")),
        ("inner", c.inner, ("a", "b")),
        ("columns", c.columns, ("b", "out")),
    ):
        attributes[name] = np.array([axis.size for axis in axes], np.int64)
        for i, array in enumerate(arrays):
            strides = [axis.strides[i] for axis in axes]
            attributes[f"{name}_{array}"] = np.array(strides, np.int64)
    product = jax.ffi.ffi_call(native.RING_PRODUCT, jax.ShapeDtypeStruct(c.shape, a.dtype))
    return product(a, b, **attributes)


ring_product_p = primitive("ring_product", _abstract, _batch, _run_portable, _run_on_cpu)
