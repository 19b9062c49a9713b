"""Exact 2-D convolution and its two gradients modulo 2^64.

XLA's integer convolution is naive on CPU and absent on GPU. Images are NHWC, kernels HWIO, all of
one unsigned integer type. Each function is linear in each operand modulo 2^bits: one `contract` of
the operands where they lie, or, in JAX alone, a linear map of indices and one `matmul`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.ring import views
from lpgan_jax.ring.contraction import Contraction, Portable, contract
from lpgan_jax.ring.matmul import matmul

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Conv2D:
    """A 2-D convolution (cross-correlation, as in `jax.lax`) of given strides and zero padding.

    Attributes:
        strides: rows, columns; each at least 1.
        padding: ((top, bottom), (left, right)) zeros around the image; each at least 0.
    """

    strides: Size = (2, 2)
    padding: tuple[Size, Size] = ((1, 1), (1, 1))

    def __post_init__(self) -> None:
        if not _is_pair(self.strides) or not all(_is_int(s, 1) for s in self.strides):
            raise ValueError(f"strides must be two integers of at least 1, not {self.strides}")
        if not _is_pair(self.padding) or not all(
            _is_pair(side) and all(_is_int(p, 0) for p in side) for side in self.padding
        ):
            raise ValueError(
                f"padding must be two pairs of integers of at least 0, not {self.padding}"
            )

    def output_hw(self, input_hw: Size, kernel_hw: Size) -> Size:
        """Height and width of the convolution of an image: (n + p0 + p1 - k) // s + 1.

        Raises:
            ValueError: a size is below 1, or the kernel is larger than the padded image.
        """
        _check_sizes("input_hw", input_hw)
        _check_sizes("kernel_hw", kernel_hw)
        spans = [n + sum(p) - k for n, p, k in zip(input_hw, self.padding, kernel_hw, strict=True)]
        if min(spans) < 0:
            raise ValueError(
                f"kernel {kernel_hw} is larger than input {input_hw} with padding {self.padding}"
            )
        height, width = (span // s + 1 for span, s in zip(spans, self.strides, strict=True))
        return height, width

    def deconv_hw(self, input_hw: Size, kernel_hw: Size) -> Size:
        """Height and width of the deconvolution of an image: (n - 1) s + k - p0 - p1.

        This is the smallest image whose convolution has size `input_hw`.

        Raises:
            ValueError: a size is below 1, or the result's would be.
        """
        _check_sizes("input_hw", input_hw)
        _check_sizes("kernel_hw", kernel_hw)
        height, width = (
            (n - 1) * s + k - sum(p)
            for n, s, k, p in zip(input_hw, self.strides, kernel_hw, self.padding, strict=True)
        )
        if min(height, width) < 1:
            raise ValueError(
                f"deconvolution of {input_hw} by kernel {kernel_hw} has no pixels left inside"
                f" padding {self.padding}"
            )
        return height, width

    def forward(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """Convolution.

        Args:
            x: uint[N, H, W, C].
            w: uint[kh, kw, C, O].

        Returns:
            uint[N, *output_hw, O].

        Raises:
            ValueError: shapes do not fit.
        """
        _check_rank("x", x)
        _check_rank("w", w)
        if x.shape[3] != w.shape[2]:
            raise ValueError(f"x has {x.shape[3]} channels, but w takes {w.shape[2]}")
        return _product(x, w, views.forward(self, x.shape, w.shape), self._forward)

    def _forward(self, x: jax.Array, w: jax.Array) -> jax.Array:
        columns = patches(x, _kernel_hw(w), self)
        y = matmul(_rows(columns), w.reshape(math.prod(w.shape[:3]), w.shape[3]))
        return y.reshape(*columns.shape[:3], w.shape[3])

    def input_grad(self, dy: jax.Array, w: jax.Array, input_hw: Size) -> jax.Array:
        """Transpose of `forward` in `x`; the forward pass of a deconvolution.

        No inserted zero is multiplied.

        Args:
            dy: uint[N, *output_hw, O].
            w: uint[kh, kw, C, O].
            input_hw: the size of `x`. For a deconvolution, `deconv_hw`.

        Returns:
            uint[N, *input_hw, C].

        Raises:
            ValueError: shapes do not fit.
        """
        _check_rank("dy", dy)
        _check_rank("w", w)
        self._check_output(dy, input_hw, _kernel_hw(w))
        if dy.shape[3] != w.shape[3]:
            raise ValueError(f"dy has {dy.shape[3]} channels, but w gives {w.shape[3]}")
        portable = functools.partial(self._input_grad, input_hw=input_hw)
        return _product(dy, w, views.input_grad(self, dy.shape, w.shape, input_hw), portable)

    def _input_grad(self, dy: jax.Array, w: jax.Array, input_hw: Size) -> jax.Array:
        """Each output pixel's patch is a product, and overlapping patches add up."""
        columns = matmul(_rows(dy), w.reshape(math.prod(w.shape[:3]), w.shape[3]).T)
        columns = columns.reshape(*dy.shape[:3], columns.shape[1])
        return _add_patches(columns, input_hw, _kernel_hw(w), self)

    def weight_grad(self, x: jax.Array, dy: jax.Array, kernel_hw: Size) -> jax.Array:
        """Transpose of `forward` in `w`.

        Args:
            x: uint[N, H, W, C].
            dy: uint[N, *output_hw, O].
            kernel_hw: the size of the kernel.

        Returns:
            uint[kh, kw, C, O].

        Raises:
            ValueError: shapes do not fit.
        """
        _check_rank("x", x)
        _check_rank("dy", dy)
        self._check_output(dy, _hw(x), kernel_hw)
        if x.shape[0] != dy.shape[0]:
            raise ValueError(f"x holds {x.shape[0]} images, but dy {dy.shape[0]}")
        portable = functools.partial(self._weight_grad, kernel_hw=kernel_hw)
        return _product(x, dy, views.weight_grad(self, x.shape, dy.shape, kernel_hw), portable)

    def _weight_grad(self, x: jax.Array, dy: jax.Array, kernel_hw: Size) -> jax.Array:
        columns = patches(x, kernel_hw, self)
        transposed = matmul(_rows(dy).T, _rows(columns))  # transposing dy is cheaper than columns
        return transposed.T.reshape(*kernel_hw, x.shape[3], dy.shape[3])

    def _check_output(self, dy: jax.Array, input_hw: Size, kernel_hw: Size) -> None:
        expected = self.output_hw(input_hw, kernel_hw)
        if dy.shape[1:3] != expected:
            raise ValueError(
                f"dy has size {dy.shape[1:3]}, but the convolution of {input_hw} by kernel"
                f" {kernel_hw} has {expected}"
            )


def _product(
    x: jax.Array, y: jax.Array, described: Contraction | None, portable: Portable
) -> jax.Array:
    """The product of ring elements by its views; in the clear, or without views, in JAX alone."""
    if described is None or jnp.issubdtype(x.dtype, jnp.floating):
        return portable(x, y)
    return contract(x, y, described, portable)


def patches(x: jax.Array, kernel_hw: Size, conv: Conv2D) -> jax.Array:
    """The part of the padded image under the kernel, for each output pixel (im2col).

    Args:
        x: [N, H, W, C] of any type.
        kernel_hw: the size of the kernel.
        conv: strides and padding.

    Returns:
        [N, *output_hw, kh * kw * C], channels fastest: as `w.reshape(-1, O)` expects it.
    """
    _check_rank("x", x)
    output_hw = conv.output_hw(_hw(x), kernel_hw)
    padded = jnp.pad(x, ((0, 0), *conv.padding, (0, 0)))
    # The image row of output row a and kernel row c, and likewise for columns. One gather compiles
    # much faster than the concatenation of kh * kw strided slices, and runs twice as fast.
    rows, cols = (
        np.arange(n)[:, None] * s + np.arange(k)
        for n, s, k in zip(output_hw, conv.strides, kernel_hw, strict=True)
    )
    result = padded.at[:, rows[:, None, :, None], cols[None, :, None, :]].get(
        mode="promise_in_bounds"
    )
    return result.reshape(x.shape[0], *output_hw, math.prod(kernel_hw) * x.shape[3])


def _add_patches(columns: jax.Array, input_hw: Size, kernel_hw: Size, conv: Conv2D) -> jax.Array:
    """The transpose of `patches`: overlapping patches add up (col2im).

    Kernel rows that are equal modulo the stride touch the same image rows, one stride apart. So
    each residue (and likewise for columns) is a dense sum of shifted patches, and the image
    interleaves these sums: nothing is spread by zeros first.
    """
    images, height, width, channels = columns.shape
    channels //= kernel_hw[0] * kernel_hw[1]
    columns = columns.reshape(images, height, width, *kernel_hw, channels)
    (down, across), ((top, bottom), (left, right)) = conv.strides, conv.padding
    rows = -(-(input_hw[0] + top + bottom) // down)
    cols = -(-(input_hw[1] + left + right) // across)

    def residue(first_i: int, first_j: int) -> jax.Array:
        total = jnp.zeros_like(columns, shape=(images, rows, cols, channels))
        for i in range(first_i, kernel_hw[0], down):
            for j in range(first_j, kernel_hw[1], across):
                above, before = i // down, j // across
                margins = (above, rows - height - above), (before, cols - width - before)
                total += jnp.pad(columns[:, :, :, i, j], ((0, 0), *margins, (0, 0)))
        return total

    interleaved = jnp.stack(
        [jnp.stack([residue(i, j) for j in range(across)], axis=3) for i in range(down)], axis=2
    )
    padded = interleaved.reshape(images, rows * down, cols * across, channels)
    return padded[:, top : top + input_hw[0], left : left + input_hw[1]]


def _hw(x: jax.Array) -> Size:
    return x.shape[1], x.shape[2]


def _kernel_hw(w: jax.Array) -> Size:
    return w.shape[0], w.shape[1]


def _rows(x: jax.Array) -> jax.Array:
    """One matrix row a pixel."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check_rank(name: str, x: jax.Array) -> None:
    if x.ndim != 4:
        raise ValueError(f"{name} must have 4 axes, not shape {x.shape}")


def _check_sizes(name: str, sizes: Size) -> None:
    if not _is_pair(sizes) or not all(_is_int(n, 1) for n in sizes):
        raise ValueError(f"{name} must be two integers of at least 1, not {sizes}")


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
