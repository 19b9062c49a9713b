"""SG and SD: the DCGAN of the LP-GAN paper, on secret shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpgan_jax.nn.activation import SLR, SR, SecTanh
from lpgan_jax.nn.layer import Layer, Params
from lpgan_jax.nn.linear import SecConv, SecDeconv, SecFC
from lpgan_jax.nn.normalization import SecBN
from lpgan_jax.party import Party
from lpgan_jax.secret import Secret


@dataclass(frozen=True)
class Reshape:
    """Reshape each example; a linear map, free."""

    shape: tuple[int, ...]

    def init(
        self, rng: np.random.Generator, shape: tuple[int, ...]
    ) -> tuple[Params, tuple[int, ...]]:
        """No parameters."""
        return {}, self._target(shape)

    def _target(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(shape),) if self.shape == (-1,) else self.shape

    def forward(self, party: Party, params: Params, x: Secret) -> tuple[Secret, Any]:
        """(y, the input's shape)."""
        return x.reshape(x.shape[0], *self._target(x.shape[1:])), x.shape[1:]

    def backward(
        self, party: Party, residuals: Any, dy: Secret, *, input_grad: bool, param_grads: bool
    ) -> tuple[Secret | None, Params | None]:
        """dy in the input's shape."""
        return dy.reshape(dy.shape[0], *residuals), {}

    def group(self, residuals: Any, index: int, groups: int) -> Any:
        """The same for every batch."""
        return residuals

    def infer(self, party: Party, params: Params, stats: Params, x: Secret) -> Secret:
        """As `forward`."""
        return self.forward(party, params, x)[0]


@dataclass(frozen=True)
class Sequential:
    """Named layers, one after the other. Parameters are {layer: {name: Secret}}.

    Layers without parameters have no entry. `stats` holds the running statistics of the
    normalisations, in the same form.
    """

    name: str
    input_shape: tuple[int, ...]
    layers: tuple[tuple[str, Layer], ...]

    def init(self, rng: np.random.Generator) -> tuple[Params, Params]:
        """Initial float64 (parameters, running statistics)."""
        params: Params = {}
        stats: Params = {}
        shape = self.input_shape
        for name, layer in self.layers:
            own, shape = layer.init(rng, shape)
            if own:
                params[name] = own
            if isinstance(layer, SecBN):
                stats[name] = layer.init_stats(shape)
        return params, stats

    def forward(self, party: Party, params: Params, x: Secret) -> tuple[Secret, list[Any]]:
        """(output, residuals) with batch statistics; x [N, *input_shape]."""
        residuals = []
        for name, layer in self.layers:
            with party.at(f"{self.name}.{name}.forward"):
                x, residual = layer.forward(party, params.get(name, {}), x)
            residuals.append(residual)
        return x, residuals

    def backward(
        self,
        party: Party,
        residuals: list[Any],
        dy: Secret,
        *,
        input_grad: bool = False,
        param_grads: bool = True,
    ) -> tuple[Secret | None, Params]:
        """(gradient at the input if asked for, gradients of the parameters if asked for)."""
        grads: Params = {}
        gradient: Secret | None = dy
        for index in reversed(range(len(self.layers))):
            name, layer = self.layers[index]
            assert gradient is not None
            with party.at(f"{self.name}.{name}.backward"):
                gradient, own = layer.backward(
                    party,
                    residuals[index],
                    gradient,
                    input_grad=input_grad or index > 0,
                    param_grads=param_grads,
                )
            if own:
                grads[name] = own
        return gradient, grads

    def group(self, residuals: list[Any], index: int, groups: int) -> list[Any]:
        """The residuals of one of `groups` batches that went through `forward` together."""
        pairs = zip(self.layers, residuals, strict=True)
        return [layer.group(residual, index, groups) for (_, layer), residual in pairs]

    def update_stats(self, party: Party, stats: Params, residuals: list[Any]) -> Params:
        """Running statistics after the batch that gave these residuals."""
        updated = {}
        for (name, layer), residual in zip(self.layers, residuals, strict=True):
            if isinstance(layer, SecBN):
                with party.at(f"{self.name}.{name}.stats"):
                    updated[name] = layer.update_stats(party, stats[name], residual)
        return updated

    def infer(self, party: Party, params: Params, stats: Params, x: Secret) -> Secret:
        """The output with running statistics: generation after training."""
        for name, layer in self.layers:
            with party.at(f"{self.name}.{name}.infer"):
                x = layer.infer(party, params.get(name, {}), stats.get(name, {}), x)
        return x


@dataclass(frozen=True)
class DCGAN:
    """The shapes of a DCGAN; `generator` and `discriminator` build its two networks.

    The published 32x32 network is the default. Each of `depth` layers doubles (SG) or halves (SD)
    the size; SG ends, and SD begins, with `features` maps, twice as many with every layer away from
    the image.

    Attributes:
        channels: of an image, 1 or 3.
        noise_size: length of the generator's input.
        features: maps of the layer nearest the image.
        base_size: height and width at the fully connected layers; an image has base_size * 2^depth.
        depth: layers between the image and the fully connected ones.
        kernel_size: of the convolutions, at stride 2.
        leaky_slope: of SD's activations.
        norm_eps: epsilon of the normalisations.
        norm_momentum: momentum of their running statistics.
        init_std: standard deviation of the initial kernels.
        frac_bits: fraction bits of activations and parameters.
    """

    channels: int = 1
    noise_size: int = 100
    features: int = 64
    base_size: int = 4
    depth: int = 3
    kernel_size: int = 4
    leaky_slope: float = 0.2
    norm_eps: float = 1e-5
    norm_momentum: float = 0.9
    init_std: float = 0.02
    frac_bits: int = 18

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        size = self.base_size * 2**self.depth
        return size, size, self.channels

    def _conv(self) -> dict[str, Any]:
        total = self.kernel_size - 2  # padding that makes stride 2 halve every even size
        padding = (total // 2, total - total // 2)
        return {
            "kernel_size": (self.kernel_size, self.kernel_size),
            "padding": (padding, padding),
            "frac_bits": self.frac_bits,
            "init_std": self.init_std,
        }

    def _norm(self, groups: int) -> SecBN:
        return SecBN(self.norm_eps, self.norm_momentum, self.frac_bits, groups)

    def generator(self, groups: int = 1) -> Sequential:
        """SG: noise [N, noise_size] to images [N, H, W, C] in (-1, 1).

        `groups` batches, one after the other along N, are normalised apart.
        """
        maps = self.features * 2 ** (self.depth - 1)
        base = (self.base_size, self.base_size, maps)
        layers: list[tuple[str, Layer]] = [
            ("fc", SecFC(math.prod(base), frac_bits=self.frac_bits, init_std=self.init_std)),
            ("reshape", Reshape(base)),
        ]
        for i in range(self.depth):
            layers += [(f"bn{i}", self._norm(groups)), (f"relu{i}", SR(self.frac_bits))]
            features = self.channels if i == self.depth - 1 else maps // 2 ** (i + 1)
            layers.append((f"deconv{i}", SecDeconv(features, **self._conv())))
        layers.append(("tanh", SecTanh(self.frac_bits)))
        return Sequential("generator", (self.noise_size,), tuple(layers))

    def discriminator(self, groups: int = 1) -> Sequential:
        """SD: images [N, H, W, C] to logits [N, 1]; `groups` as in `generator`."""
        layers: list[tuple[str, Layer]] = []
        for i in range(self.depth):
            layers.append((f"conv{i}", SecConv(self.features * 2**i, **self._conv())))
            if i:
                layers.append((f"bn{i}", self._norm(groups)))
            layers.append((f"leaky{i}", SLR(self.frac_bits, self.leaky_slope)))
        layers.append(("reshape", Reshape((-1,))))
        fc = SecFC(1, use_bias=True, frac_bits=self.frac_bits, init_std=self.init_std)
        return Sequential("discriminator", self.image_shape, (*layers, ("fc", fc)))
