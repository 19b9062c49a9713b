"""Three small networks for 28x28 images of ten classes, of the secure layers, and their twins.

They are the networks on which secure inference is usually reported: fully connected, or one
convolution and two fully connected layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from lpgan_jax.models.dcgan import Reshape, Sequential
from lpgan_jax.nn.activation import SR, SecSquare
from lpgan_jax.nn.layer import Layer
from lpgan_jax.nn.linear import SecConv, SecFC

Name = Literal["fc", "conv-square", "conv-relu"]
NAMES: tuple[Name, ...] = get_args(Name)
CLASSES = 10

_RELU_GAIN = 2.0**0.5  # keeps the second moment of activations (He et al. 2015)
_SQUARE_GAIN = 1.0  # values below 1, whose squares shrink from layer to layer


@dataclass(frozen=True)
class SmallNet:
    """One of the three networks; every layer but the reshaping and activations has a bias.

    | name | layers |
    |---|---|
    | `fc` | FC 784-128, square, FC 128-128, square, FC 128-10 |
    | `conv-square` | conv 5x5 stride 2 to 13x13x5 = 845, square, FC 845-100, square, FC 100-10 |
    | `conv-relu` | conv 5x5 stride 2 to 14x14x5 = 980, ReLU, FC 980-100, ReLU, FC 100-10 |

    Ranges, in real terms: |x| < 2^(31 - frac_bits) where x is squared, < 2^`LOG_RANGE` of
    `nn.activation` at a ReLU.

    Attributes:
        name: which of them.
        frac_bits: fraction bits of activations and parameters.

    Raises:
        ValueError: there is no network of this name.
    """

    name: Name
    frac_bits: int = 18

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {self.name!r}")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one example: (784,) for `fc`, else (28, 28, 1)."""
        return (28 * 28,) if self.name == "fc" else (28, 28, 1)

    def network(self) -> Sequential:
        """The secure network: inputs [N, *input_shape] to logits [N, 10]."""
        f, relu = self.frac_bits, self.name == "conv-relu"
        gain = _RELU_GAIN if relu else _SQUARE_GAIN
        activation = SR(f) if relu else SecSquare(f)

        def fc(inputs: int, outputs: int) -> SecFC:
            return SecFC(outputs, use_bias=True, frac_bits=f, init_std=gain / math.sqrt(inputs))

        layers: list[tuple[str, Layer]]
        if self.name == "fc":
            width = 128
            layers = [("fc0", fc(28 * 28, width)), ("act0", activation), ("fc1", fc(width, width))]
        else:
            width = 100
            padding, size = ((1, 2), 14) if relu else ((1, 1), 13)
            conv = SecConv(5, True, f, gain / 5, (5, 5), (2, 2), (padding, padding))
            layers = [("conv0", conv), ("act0", activation), ("reshape", Reshape((-1,)))]
            layers.append(("fc1", fc(5 * size**2, width)))
        layers += [("act1", activation), ("fc2", fc(width, CLASSES))]
        return Sequential(self.name, self.input_shape, tuple(layers))

    def inputs(self, images: ArrayLike) -> np.ndarray:
        """Images [N, 28, 28] or [N, 28, 28, 1] as [N, *input_shape]; values and dtype stay.

        Raises:
            ValueError: they have another shape.
        """
        images = np.asarray(images)
        if images.shape[1:] not in ((28, 28), (28, 28, 1)):
            raise ValueError(f"images: expected [N, 28, 28, 1], got {list(images.shape)}")
        return images.reshape(-1, *self.input_shape)

    def twin(self, dtype: DTypeLike = jnp.float32) -> Twin:
        """The same network in Flax, which takes the secure one's (revealed) parameters."""
        return Twin(self, dtype)


class Twin(nn.Module):
    """A small network in the clear, built from the secure network's own layers.

    Attributes:
        model: which network.
        dtype: of parameters and activations, float32 or float64.
    """

    model: SmallNet
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, 10] from inputs [N, *input_shape]."""
        for name, layer in self.model.network().layers:
            x = self._plain(name, layer, x)
        return x

    def _plain(self, name: str, layer: Layer, x: jax.Array) -> jax.Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.dtype}
        match layer:
            case SecFC():
                normal = nn.initializers.normal(layer.init_std)
                return nn.Dense(layer.features, kernel_init=normal, name=name, **types)(x)
            case SecConv():
                normal = nn.initializers.normal(layer.init_std)
                return nn.Conv(
                    layer.features,
                    layer.kernel_size,
                    layer.strides,
                    layer.padding,
                    kernel_init=normal,
                    name=name,
                    **types,
                )(x)
            case SecSquare():
                return jnp.square(x)
            case SR():
                return jnp.where(x > 0, x, 0)
            case Reshape():
                return x.reshape(x.shape[0], -1)
        raise TypeError(f"{name}: no plaintext counterpart of {type(layer).__name__}")
