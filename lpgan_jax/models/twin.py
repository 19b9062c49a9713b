"""The plaintext twins of SG and SD: ordinary Flax modules, and the way between the two layouts.

A twin's layers have the names of the secure network's. Parameters differ in one point: a secure
deconvolution adds each input pixel times the kernel, while ConvTranspose slides the kernel, flipped
in both spatial axes, over the image with zeros inserted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lpgan_jax.models.dcgan import DCGAN
from lpgan_jax.nn.layer import Params

Variables = dict[str, Any]


class Generator(nn.Module):
    """SG in the clear.

    Attributes:
        model: the shapes.
        dtype: of parameters, statistics and activations.
    """

    model: DCGAN
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, noise: jax.Array, use_running_average: bool = False) -> jax.Array:
        """Images [N, H, W, C] in (-1, 1) from noise [N, noise_size]."""
        model, types = self.model, _types(self.dtype)
        maps = model.features * 2 ** (model.depth - 1)
        base = (model.base_size, model.base_size, maps)
        normal = nn.initializers.normal(model.init_std)
        fc = nn.Dense(math.prod(base), use_bias=False, kernel_init=normal, name="fc", **types)
        x = fc(noise).reshape(-1, *base)
        # Sliding over all that the kernel touches takes size - 1 zeros a side; padding is cut off.
        before, after = _padding(model)
        margin = model.kernel_size - 1 - before, model.kernel_size - 1 - after
        for i in range(model.depth):
            x = _norm(model, use_running_average, name=f"bn{i}", **types)(x)
            x = jnp.where(x > 0, x, 0)
            x = nn.ConvTranspose(
                model.channels if i == model.depth - 1 else maps // 2 ** (i + 1),
                (model.kernel_size, model.kernel_size),
                strides=(2, 2),
                padding=(margin, margin),
                use_bias=False,
                kernel_init=normal,
                name=f"deconv{i}",
                **types,
            )(x)
        return jnp.tanh(x)


class Discriminator(nn.Module):
    """SD in the clear.

    Attributes:
        model: the shapes.
        dtype: of parameters, statistics and activations.
    """

    model: DCGAN
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, use_running_average: bool = False) -> jax.Array:
        """Logits [N, 1] from images [N, H, W, C]."""
        model, types = self.model, _types(self.dtype)
        normal = nn.initializers.normal(model.init_std)
        x = images
        for i in range(model.depth):
            x = nn.Conv(
                model.features * 2**i,
                (model.kernel_size, model.kernel_size),
                strides=(2, 2),
                padding=(_padding(model), _padding(model)),
                use_bias=False,
                kernel_init=normal,
                name=f"conv{i}",
                **types,
            )(x)
            if i:
                x = _norm(model, use_running_average, name=f"bn{i}", **types)(x)
            # Not jax.nn.leaky_relu: at 0 its derivative is 1, the secure one's the slope.
            x = jnp.where(x > 0, x, model.leaky_slope * x)
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(1, kernel_init=normal, name="fc", **types)(x)


def _padding(model: DCGAN) -> tuple[int, int]:
    """Zeros before and after an axis, so that a convolution of stride 2 halves every even size."""
    return (model.kernel_size - 2) // 2, (model.kernel_size - 1) // 2


def _types(dtype: DTypeLike) -> dict[str, Any]:
    return {"dtype": dtype, "param_dtype": dtype}


def _norm(model: DCGAN, use_running_average: bool, **fields: Any) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=use_running_average,
        momentum=model.norm_momentum,
        epsilon=model.norm_eps,
        use_fast_variance=False,  # E[x^2] - mean^2 cancels
        **fields,
    )


def generator_twin(model: DCGAN, dtype: DTypeLike = jnp.float32) -> Generator:
    """SG's twin; dtype float32 or float64.

    Raises:
        ValueError: another dtype.
    """
    return Generator(model, _float(dtype))


def discriminator_twin(model: DCGAN, dtype: DTypeLike = jnp.float32) -> Discriminator:
    """SD's twin; dtype float32 or float64.

    Raises:
        ValueError: another dtype.
    """
    return Discriminator(model, _float(dtype))


def _float(dtype: DTypeLike) -> np.dtype:
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise ValueError(f"dtype: expected float32 or float64, got {np.dtype(dtype)}")
    return np.dtype(dtype)


def to_flax(params: Params, stats: Params) -> Variables:
    """A secure network's revealed parameters and running statistics as its twin's variables.

    Args:
        params: {layer: {"kernel", "bias" or "scale": array}}.
        stats: {layer: {"mean", "var": array}}.

    Returns:
        {"params", "batch_stats"}, of the same dtypes.
    """
    return {
        "params": _flip_deconvolutions(params),
        "batch_stats": {name: dict(layer) for name, layer in stats.items()},
    }


def from_flax(model: DCGAN, network: str, variables: Variables) -> tuple[Params, Params]:
    """A twin's variables as (parameters, running statistics) of the secure network.

    Args:
        model: the shapes.
        network: "generator" or "discriminator".
        variables: {"params", "batch_stats"}, the latter only where there are normalisations.

    Returns:
        What `to_flax` takes, of the same dtypes.

    Raises:
        ValueError: a layer or a value of a layer is missing, unknown or of another shape.
    """
    secure = model.generator() if network == "generator" else model.discriminator()
    params, stats = secure.init(np.random.default_rng(0))
    if not isinstance(variables, Mapping):
        raise ValueError(f"variables: expected params, batch_stats, got {type(variables).__name__}")
    given = {"batch_stats": {}, **variables}
    _check("", given, {"params": params, "batch_stats": stats})
    return (
        _flip_deconvolutions(given["params"]),
        {name: dict(layer) for name, layer in given["batch_stats"].items()},
    )


def _flip_deconvolutions(params: Params) -> Params:
    """Its own inverse."""
    return {
        name: {"kernel": layer["kernel"][::-1, ::-1]} if name.startswith("deconv") else dict(layer)
        for name, layer in params.items()
    }


def _check(prefix: str, given: Any, expected: Params) -> None:
    """Compare names and shapes, level by level."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{prefix[:-1]}: expected {', '.join(expected)}, got an array")
    for name in expected:
        if name not in given:
            raise ValueError(f"{prefix}{name}: missing")
    for name in given:
        if name not in expected:
            raise ValueError(f"{prefix}{name}: unknown, expected {', '.join(expected) or 'none'}")
    for name, value in expected.items():
        if isinstance(value, dict):
            _check(f"{prefix}{name}.", given[name], value)
        elif (shape := getattr(given[name], "shape", None)) != value.shape:
            found = type(given[name]).__name__ if shape is None else shape
            raise ValueError(f"{prefix}{name}: expected shape {value.shape}, got {found}")
