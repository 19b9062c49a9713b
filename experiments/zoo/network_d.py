"""Network D, of Chameleon: one convolution, two layers."""

import flax.linen as nn
import jax
from classification import classification

import lpgan_jax as lp


class NetworkD(nn.Module):
    """Five maps of 14x14."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, 10] of images [N, 28, 28, 1]."""
        x = nn.relu(nn.Conv(5, (5, 5), (2, 2), padding=2)(x))
        x = nn.relu(nn.Dense(100)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def training(batch_size: int = 128) -> lp.Training:
    """The training."""
    return classification(NetworkD(), (28, 28, 1), batch_size)
