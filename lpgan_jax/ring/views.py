"""A convolution and its two gradients as contractions: which words their products read.

With padded images, y[n, p, q] sums x[n, s p + i, s q + j] w[i, j] over taps i, j: each operand's
address is a sum of strides. The gradient in x is taken one phase at a time: the pixels of x that
are equal modulo the stride meet the same taps, so that no inserted zero is multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from lpgan_jax.ring.contraction import Axis, Contraction, padded

if TYPE_CHECKING:
    from lpgan_jax.ring.conv import Conv2D

Shape = Sequence[int]


def forward(conv: Conv2D, x: Shape, w: Shape) -> Contraction:
    """The views of y = conv(x, w), of operands of these shapes."""
    shape = (x[0], *conv.output_hw((x[1], x[2]), (w[0], w[1])), w[3])
    pixels, taps = _patches(conv, x)
    return Contraction(
        rows=_axes(shape[:3], pixels, _row_major(shape)),
        inner=_axes(w[:3], taps, _row_major(w)),
        columns=_axes(w[3:], (1,), (1,)),
        shape=shape,
        padding=_padding(conv),
    )


def weight_grad(conv: Conv2D, x: Shape, dy: Shape, kernel_hw: tuple[int, int]) -> Contraction:
    """The views of the gradient in w, a product of (x, dy)."""
    shape = (*kernel_hw, x[3], dy[3])
    pixels, taps = _patches(conv, x)
    return Contraction(
        rows=_axes(shape[:3], taps, _row_major(shape)),
        inner=_axes(dy[:3], pixels, _row_major(dy)),
        columns=_axes(dy[3:], (1,), (1,)),
        shape=shape,
        padding=_padding(conv),
    )


def input_grad(conv: Conv2D, dy: Shape, w: Shape, input_hw: tuple[int, int]) -> Contraction | None:
    """The views of the gradient in x, a product of (dy, w).

    None where strides do not divide the sizes of the image and the kernel: phases then differ.
    """
    strides = conv.strides
    if any(n % s for n, s in zip((*input_hw, *w[:2]), (*strides, *strides), strict=True)):
        return None
    # x[s u + phase] meets tap s t + (phase + p) mod s of dy[u + (phase + p) div s - t].
    before = [side[0] for side in conv.padding]
    pixels = [n // s for n, s in zip(input_hw, strides, strict=True)]
    taps = [k // s for k, s in zip(w[:2], strides, strict=True)]
    least = [p // s - (t - 1) for p, s, t in zip(before, strides, taps, strict=True)]
    most = [(s - 1 + p) // s + n - 1 for p, s, n in zip(before, strides, pixels, strict=True)]
    margins = [
        (max(0, -low), max(0, high + 1 - n))
        for low, high, n in zip(least, most, dy[1:3], strict=True)
    ]
    padding = ((0, 0), *margins, (0, 0))
    shape = (dy[0], *input_hw, w[2])
    left = _row_major(padded(dy, padding))
    right, out = _row_major(w), _row_major(shape)
    starts = []
    for phase in product(*map(range, strides)):
        shifted = [i + p for i, p in zip(phase, before, strict=True)]
        first = [i // s + m[0] for i, s, m in zip(shifted, strides, margins, strict=True)]
        tap = [i % s for i, s in zip(shifted, strides, strict=True)]
        starts.append((_dot(first, left[1:3]), _dot(tap, right[:2]), _dot(phase, out[1:3])))
    rows = (left[:3], (out[0], strides[0] * out[1], strides[1] * out[2]))
    inner = ((-left[1], -left[2], 1), (strides[0] * right[0], strides[1] * right[1], 1))
    return Contraction(
        rows=_axes((dy[0], *pixels), *rows),
        inner=_axes((*taps, w[3]), *inner),
        columns=_axes(w[2:3], right[2:3], (1,)),
        shape=shape,
        starts=tuple(starts),
        padding=padding,
    )


def _patches(conv: Conv2D, x: Shape) -> tuple[Shape, Shape]:
    """Strides in the padded image of output pixels [n, p, q] and of taps [i, j, c]."""
    image, row, pixel, channel = _row_major(padded(x, _padding(conv)))
    down, across = conv.strides
    return (image, down * row, across * pixel), (row, pixel, channel)


def _padding(conv: Conv2D) -> tuple[tuple[int, int], ...]:
    return ((0, 0), *conv.padding, (0, 0))


def _row_major(shape: Shape) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _axes(sizes: Shape, first: Shape, second: Shape) -> tuple[Axis, ...]:
    """Axes of these sizes and strides; strides of further axes are left out."""
    return tuple(Axis(n, (s, t)) for n, s, t in zip(sizes, first, second))  # noqa: B905


def _dot(x: Sequence[int], y: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(x, y, strict=True))
