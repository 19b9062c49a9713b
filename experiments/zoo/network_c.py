"""Network C, LeNet with ReLUs: two convolutions and pools, two layers, wider than B."""

import flax.linen as nn
import jax
from classification import classification

import lpgan_jax as lp


class NetworkC(nn.Module):
    """20 maps, then 50."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, 10] of images [N, 28, 28, 1]."""
        for features in (20, 50):
            x = nn.relu(nn.Conv(features, (5, 5), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(500)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def training(batch_size: int = 128) -> lp.Training:
    """The training."""
    return classification(NetworkC(), (28, 28, 1), batch_size)
