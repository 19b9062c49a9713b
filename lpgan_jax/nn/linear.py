"""SecFC, SecConv and SecDeconv: bilinear in their input and their kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lpgan_jax.mpc.arithmetic import Bilinear, bilinear, masked, truncate
from lpgan_jax.nn.layer import Params, batch_slice
from lpgan_jax.party import Party
from lpgan_jax.ring import Conv2D, matmul
from lpgan_jax.secret import Secret


@dataclass(frozen=True)
class _Maps:
    """The three bilinear maps of a layer y = product(x, w)."""

    product: Bilinear
    input_grad: Bilinear  # (dy, w) -> dx
    kernel_grad: Bilinear  # (x, dy) -> dw


@dataclass(frozen=True)
class _Linear:
    """What the three layers share: products, bias and gradients under one mask per value."""

    features: int
    use_bias: bool = False
    frac_bits: int = 18
    init_std: float = 0.02

    def _kernel_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        raise NotImplementedError

    def _output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        raise NotImplementedError

    def _maps(self, shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> _Maps:
        raise NotImplementedError

    def init(
        self, rng: np.random.Generator, shape: tuple[int, ...]
    ) -> tuple[Params, tuple[int, ...]]:
        """A kernel N(0, init_std) and a zero bias; see `Layer.init`."""
        params = {"kernel": rng.normal(0.0, self.init_std, self._kernel_shape(shape))}
        if self.use_bias:
            params["bias"] = np.zeros(self.features)
        return params, self._output_shape(shape)

    def forward(self, party: Party, params: Params, x: Secret) -> tuple[Secret, Any]:
        """y at double fraction. 1 round after truncating x: x and the kernel are opened masked."""
        x = masked(party, truncate(party, x, self.frac_bits))
        kernel = masked(party, params["kernel"])
        y = bilinear(party, self._maps(x.shape, kernel.shape).product, x, kernel, owing=True)
        if self.use_bias:
            y = y + params["bias"].unmasked().at_scale(y.frac_bits)
        return y, (x, kernel)

    def backward(
        self, party: Party, residuals: Any, dy: Secret, *, input_grad: bool, param_grads: bool
    ) -> tuple[Secret | None, Params | None]:
        """dx and gradients at double fraction. 1 round (after truncating dy): only dy is opened."""
        x, kernel = residuals
        maps = self._maps(x.shape, kernel.shape)
        dy = masked(party, truncate(party, dy, self.frac_bits))
        dx = bilinear(party, maps.input_grad, dy, kernel, owing=True) if input_grad else None
        if not param_grads:
            return dx, None
        grads = {"kernel": bilinear(party, maps.kernel_grad, x, dy, owing=True)}
        if self.use_bias:
            total = dy.unmasked().sum(tuple(range(len(dy.shape) - 1)))
            grads["bias"] = total.at_scale(grads["kernel"].frac_bits)
        return dx, grads

    def group(self, residuals: Any, index: int, groups: int) -> Any:
        """See `Layer.group`."""
        x, kernel = residuals
        return x[batch_slice(x.shape[0], index, groups)], kernel

    def infer(self, party: Party, params: Params, stats: Params, x: Secret) -> Secret:
        """As `forward`."""
        return self.forward(party, params, x)[0]


@dataclass(frozen=True)
class SecFC(_Linear):
    """Fully connected: y = x w + b, x [N, I], w [I, O]."""

    def _kernel_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape, self.features)

    def _output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.features,)

    def _maps(self, shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> _Maps:
        return _Maps(matmul, lambda dy, w: matmul(dy, w.T), lambda x, dy: matmul(x.T, dy))


@dataclass(frozen=True)
class _Conv(_Linear):
    kernel_size: tuple[int, int] = (4, 4)
    strides: tuple[int, int] = (2, 2)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))

    @property
    def _conv(self) -> Conv2D:
        return Conv2D(self.strides, self.padding)

    def _kernel_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*self.kernel_size, shape[-1], self.features)


@dataclass(frozen=True)
class SecConv(_Conv):
    """Convolution, NHWC with an HWIO kernel."""

    def _output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*self._conv.output_hw((shape[0], shape[1]), self.kernel_size), self.features)

    def _maps(self, shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> _Maps:
        conv, input_hw = self._conv, (shape[1], shape[2])
        return _Maps(
            conv.forward,
            lambda dy, w: conv.input_grad(dy, w, input_hw),
            lambda x, dy: conv.weight_grad(x, dy, (kernel_shape[0], kernel_shape[1])),
        )


@dataclass(frozen=True)
class SecDeconv(_Conv):
    """Transposed convolution: y[i*s + a - p] += x[i] w[a], sizes (n - 1) s + k - 2p.

    It is the input gradient of a convolution with the kernel w transposed, w HWIO with I = the
    channels of x; no products with inserted zeros are formed. Flax's ConvTranspose has the same
    kernel flipped in both spatial axes.
    """

    def _output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*self._conv.deconv_hw((shape[0], shape[1]), self.kernel_size), self.features)

    def _maps(self, shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> _Maps:
        conv, kernel_hw = self._conv, (kernel_shape[0], kernel_shape[1])
        output_hw = conv.deconv_hw((shape[1], shape[2]), kernel_hw)
        # As a convolution's kernel, w maps the deconvolution's outputs to its inputs.
        return _Maps(
            lambda x, w: conv.input_grad(x, _swap(w), output_hw),
            lambda dy, w: conv.forward(dy, _swap(w)),
            lambda x, dy: _swap(conv.weight_grad(dy, x, kernel_hw)),
        )


def _swap(kernel: jax.Array) -> jax.Array:
    return kernel.swapaxes(2, 3)
