"""Exact convolution modulo 2^64, of all kinds that JAX has: see `jax.lax.conv_general_dilated`.

An output p of an axis meets the taps i at which strides * p + kernel_dilation * i - padding is a
multiple of the input's dilation: at the element that many dilations in. Outputs that are equal
modulo dilation / gcd(strides, dilation) form a phase: they meet the same taps, evenly apart. So
each phase is a convolution of an input that is not dilated, and no inserted zero is multiplied; and
each is a view of its operands as they lie, for every group of channels or images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lpgan_jax.ring.contraction import Axis, Contraction, contract, padded
from lpgan_jax.ring.matmul import matmul


@dataclass(frozen=True)
class Phase:
    """Outputs of an axis that meet the same taps.

    Attributes:
        first: the first of these outputs.
        outputs: how many they are, one after each period.
        first_tap: the first tap that they meet.
        taps: how many they meet, `tap_step` apart.
        start: the element at which the first output meets the first tap; may lie outside.
    """

    first: int
    outputs: int
    first_tap: int
    taps: int
    start: int


@dataclass(frozen=True)
class Sliding:
    """A kernel that slides along one axis.

    Attributes:
        size: of the input.
        kernel: taps.
        stride: of the kernel.
        padding: zeros before and after the dilated input; fewer than 0 cut it.
        dilation: of the input.
        kernel_dilation: of the kernel.
    """

    size: int
    kernel: int
    stride: int
    padding: tuple[int, int]
    dilation: int
    kernel_dilation: int

    @property
    def outputs(self) -> int:
        """How many places the kernel takes."""
        dilated = max(0, (self.size - 1) * self.dilation + 1) + sum(self.padding)
        span = max(0, (self.kernel - 1) * self.kernel_dilation + 1)
        return max(0, (dilated - span) // self.stride + 1)

    @property
    def period(self) -> int:
        """Outputs this far apart meet the same taps."""
        return self.dilation // math.gcd(self.stride, self.dilation)

    @property
    def tap_step(self) -> int:
        """Taps this far apart meet elements of the input, if one of them does."""
        return self.dilation // math.gcd(self.kernel_dilation, self.dilation)

    @property
    def steps(self) -> tuple[int, int]:
        """Elements of the input between outputs of a phase, and between its taps."""
        return (
            self.stride * self.period // self.dilation,
            self.kernel_dilation * self.tap_step // self.dilation,
        )

    def phases(self) -> list[Phase]:
        """All outputs."""
        found = []
        for first in range(min(self.period, self.outputs)):
            shifts = [
                self.stride * first + self.kernel_dilation * tap - self.padding[0]
                for tap in range(min(self.tap_step, self.kernel))
            ]
            tap = next((i for i, n in enumerate(shifts) if n % self.dilation == 0), self.kernel)
            taps = -(-(self.kernel - tap) // self.tap_step)
            start = shifts[tap] // self.dilation if taps else 0
            found.append(Phase(first, -(-(self.outputs - first) // self.period), tap, taps, start))
        return found

    def margins(self) -> tuple[int, int]:
        """Elements before and after the input that some output meets."""
        (step, tap_step), least, most = self.steps, 0, 0
        for phase in self.phases():
            if phase.taps:
                last = phase.start + (phase.outputs - 1) * step + (phase.taps - 1) * tap_step
                least, most = min(least, phase.start), max(most, last + 1 - self.size)
        return -least, most


@dataclass(frozen=True)
class Convolution:
    """A convolution (cross-correlation) of any number of axes; the parameters are `jax.lax`'s.

    Attributes:
        input_axes: where the input has (images, channels, *others).
        kernel_axes: where the kernel has (output channels, input channels, *others).
        output_axes: where the output has (images, channels, *others).
        strides: of each of the other axes; and so all that follow.
        padding: (before, after), zeros around the dilated input; fewer than 0 cut it.
        dilation: of the input.
        kernel_dilation: of the kernel.
        channel_groups: each group of output channels sees its own input channels.
        image_groups: each group of output channels sees its own images.
    """

    input_axes: tuple[int, ...]
    kernel_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    channel_groups: int = 1
    image_groups: int = 1

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The convolution of words of one unsigned type; in the clear, of floats."""
        if jnp.issubdtype(x.dtype, jnp.floating):
            return self._of_floats(x, w)
        axes = [axis.phases() for axis in self._sliding(x.shape, w.shape)]
        shape = self.shape(x.shape, w.shape)
        if all(len({(p.outputs, p.taps) for p in phases}) <= 1 for phases in axes):
            return self._product(x, w, list(itertools.product(*axes)), shape)
        return self._interleaved(x, w, axes, shape)

    def shape(self, x: Sequence[int], w: Sequence[int]) -> tuple[int, ...]:
        """Of the output, for operands of these shapes."""
        sizes = (
            x[self.input_axes[0]] // self.image_groups,
            w[self.kernel_axes[0]],
            *(axis.outputs for axis in self._sliding(x, w)),
        )
        return tuple(n for _, n in sorted(zip(self.output_axes, sizes, strict=True)))

    def _sliding(self, x: Sequence[int], w: Sequence[int]) -> list[Sliding]:
        return [
            Sliding(x[i], w[k], *others)
            for i, k, *others in zip(
                self.input_axes[2:],
                self.kernel_axes[2:],
                self.strides,
                self.padding,
                self.dilation,
                self.kernel_dilation,
                strict=True,
            )
        ]

    def _of_floats(self, x: jax.Array, w: jax.Array) -> jax.Array:
        numbers = lax.ConvDimensionNumbers(self.input_axes, self.kernel_axes, self.output_axes)
        return lax.conv_general_dilated(
            x,
            w,
            self.strides,
            self.padding,
            self.dilation,
            self.kernel_dilation,
            numbers,
            self.channel_groups,
            self.image_groups,
        )

    def _interleaved(
        self, x: jax.Array, w: jax.Array, axes: list[list[Phase]], shape: tuple[int, ...]
    ) -> jax.Array:
        """Phases of different sizes: a product each, spread over the output."""
        periods = [axis.period for axis in self._sliding(x.shape, w.shape)]
        zero, total = jnp.zeros((), x.dtype), jnp.zeros(shape, x.dtype)
        for phases in itertools.product(*axes):
            own, margins = list(shape), [(0, 0, 0)] * len(shape)
            for axis, period, phase in zip(self.output_axes[2:], periods, phases, strict=True):
                own[axis] = phase.outputs
                after = shape[axis] - phase.first - (phase.outputs - 1) * period - 1
                margins[axis] = (phase.first, after, period - 1)
            total = total + lax.pad(self._product(x, w, [phases], tuple(own)), zero, margins)
        return total

    def _product(
        self,
        x: jax.Array,
        w: jax.Array,
        phases: Sequence[Sequence[Phase]],
        shape: tuple[int, ...],
    ) -> jax.Array:
        """Phases of one size, one after the other or interleaved, as one product of views."""
        nothing = not phases or not all(p.taps for p in phases[0])
        if nothing or 0 in (*shape, *x.shape, *w.shape):
            return jnp.zeros(shape, x.dtype)
        sliding = self._sliding(x.shape, w.shape)
        padding = [(0, 0)] * x.ndim
        for axis, own in zip(self.input_axes[2:], sliding, strict=True):
            padding[axis] = own.margins()
        left = _strides(padded(x.shape, padding), self.input_axes)
        right, out = _strides(w.shape, self.kernel_axes), _strides(shape, self.output_axes)
        # Alone, a phase is all of its output; together they fill it.
        periods = [axis.period if len(phases) > 1 else 1 for axis in sliding]
        images, channels = (x.shape[axis] for axis in self.input_axes[:2])
        images, channels = images // self.image_groups, channels // self.channel_groups
        groups = self.channel_groups * self.image_groups
        columns = w.shape[self.kernel_axes[0]] // groups
        rows = [Axis(images, (left[0], out[0]))]
        inner = [Axis(channels, (left[1], right[1]))]
        for i, (along, phase) in enumerate(zip(sliding, phases[0], strict=True), 2):
            step, tap_step = along.steps
            rows.append(Axis(phase.outputs, (left[i] * step, out[i] * periods[i - 2])))
            inner.append(Axis(phase.taps, (left[i] * tap_step, right[i] * along.tap_step)))
        starts = [
            (
                group * (images * left[0] if self.image_groups > 1 else channels * left[1])
                + _dot([p.start + padding[a][0] for p, a in self._placed(own)], left[2:]),
                group * columns * right[0] + _dot([p.first_tap for p in own], right[2:]),
                group * columns * out[1]
                + _dot([p.first if len(phases) > 1 else 0 for p in own], out[2:]),
            )
            for group in range(groups)
            for own in phases
        ]
        contraction = Contraction(
            rows=_in_order(rows),
            inner=_in_order(inner),
            columns=(Axis(columns, (right[0], out[1])),),
            shape=shape,
            starts=tuple(starts),
            padding=tuple(padding) if any(map(any, padding)) else (),
        )
        return contract(x, w, contraction, lambda a, b: by_gathers(a, b, contraction))

    def _placed(self, phases: Sequence[Phase]) -> list[tuple[Phase, int]]:
        return list(zip(phases, self.input_axes[2:], strict=True))


def by_gathers(a: jax.Array, b: jax.Array, contraction: Contraction) -> jax.Array:
    """A contraction in JAX alone: its views are gathered, and its products scattered."""
    c = contraction
    a = jnp.pad(a, c.padding) if c.padding else a
    a, b, starts = a.reshape(-1), b.reshape(-1), np.asarray(c.starts)

    def product(start: Any) -> jax.Array:
        rows, inner = _offsets(c.rows, 0), _offsets(c.inner, 0)
        left = _at(a, start[0] + rows[:, None] + inner)
        inner, columns = _offsets(c.inner, 1), _offsets(c.columns, 0)
        return matmul(left, _at(b, start[1] + inner[:, None] + columns))

    products = jax.vmap(product)(jnp.asarray(starts))
    places = _offsets(c.rows, 1)[:, None] + _offsets(c.columns, 1)
    places = starts[:, 2, None, None] + places
    out = jnp.zeros(math.prod(c.shape), a.dtype)
    filled = out.at[places].set(products, mode="promise_in_bounds", unique_indices=True)
    return filled.reshape(c.shape)


def _at(words: jax.Array, places: Any) -> jax.Array:
    return words.at[places].get(mode="promise_in_bounds")


def _offsets(axes: Sequence[Axis], array: int) -> np.ndarray:
    """Of a walk over axes, in words of one of the two arrays that have them."""
    total = np.zeros(1, np.int64)
    for axis in axes:
        total = (total[:, None] + np.arange(axis.size) * axis.strides[array]).reshape(-1)
    return total


def _in_order(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Axes in the order in which the left operand lies in memory."""
    return tuple(sorted(axes, key=lambda axis: -axis.strides[0]))


def _strides(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in axes]


def _dot(x: Sequence[int], y: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(x, y, strict=True))
