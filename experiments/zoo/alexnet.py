"""AlexNet for 32x32, as FALCON and its successors have it, without normalisation."""

import flax.linen as nn
import jax
from classification import classification

import lpgan_jax as lp


class AlexNet(nn.Module):
    """Five convolutions, three layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, 10] of images [N, 32, 32, 3]."""
        x = nn.relu(nn.Conv(96, (11, 11), 4, padding=9)(x))
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = nn.relu(nn.Conv(256, (5, 5), padding=1)(x))
        x = nn.max_pool(x, (2, 2))
        for features in (384, 384, 256):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(10)(x)


def training(batch_size: int = 128) -> lp.Training:
    """The training."""
    return classification(AlexNet(), (32, 32, 3), batch_size)
