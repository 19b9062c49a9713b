"""A residual GAN as one writes it in Flax, to be trained under sharing.

    PYTHONPATH=experiments lpgan train --config digits --out runs/resnet \
        --set model.module=resnet_gan:Networks --set model.loss=hinge

The loss is the hinge loss, and nothing here knows of sharing. Nearest neighbours double the size,
means halve it, which costs no message; SD has no normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp

_MAPS = 16


class Up(nn.Module):
    """A residual block that doubles the size."""

    maps: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[N, H, W, C] to [N, 2H, 2W, maps]."""

        def normalised(x: jax.Array) -> jax.Array:
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))

        y = nn.Conv(self.maps, (3, 3))(_doubled(normalised(x)))
        y = nn.Conv(self.maps, (3, 3))(normalised(y))
        return y + nn.Conv(self.maps, (1, 1))(_doubled(x))


class Down(nn.Module):
    """A residual block that halves the size."""

    maps: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] to [N, H/2, W/2, maps]."""
        y = nn.Conv(self.maps, (3, 3))(nn.relu(x))
        y = nn.Conv(self.maps, (3, 3))(nn.relu(y))
        return nn.avg_pool(y + nn.Conv(self.maps, (1, 1))(x), (2, 2), strides=(2, 2))


def _doubled(x: jax.Array) -> jax.Array:
    return x.repeat(2, axis=1).repeat(2, axis=2)


class Generator(nn.Module):
    """SG."""

    @nn.compact
    def __call__(self, noise: jax.Array, train: bool = True) -> jax.Array:
        """Noise [N, size] to images [N, 16, 16, 1]."""
        x = nn.Dense(4 * 4 * _MAPS)(noise).reshape(-1, 4, 4, _MAPS)
        x = Up(_MAPS)(x, train)
        x = Up(_MAPS // 2)(x, train)
        return jnp.tanh(nn.Conv(1, (3, 3))(nn.relu(x)))


class Discriminator(nn.Module):
    """SD."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images [N, 16, 16, 1] to logits [N, 1]."""
        x = nn.Conv(_MAPS // 2, (3, 3))(images)
        x = Down(_MAPS)(x)
        x = Down(_MAPS)(x)
        return nn.Dense(1)(nn.relu(x).mean((1, 2)))


@dataclass
class Networks:
    """What a configuration's `model.module` names."""

    generator: nn.Module = field(default_factory=Generator)
    discriminator: nn.Module = field(default_factory=Discriminator)
