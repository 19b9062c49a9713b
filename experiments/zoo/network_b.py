"""Network B, of MiniONN: two convolutions and pools, two layers."""

import flax.linen as nn
import jax
from classification import classification

import lpgan_jax as lp


class NetworkB(nn.Module):
    """16 maps each."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, 10] of images [N, 28, 28, 1]."""
        for _ in range(2):
            x = nn.relu(nn.Conv(16, (5, 5), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(100)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def training(batch_size: int = 128) -> lp.Training:
    """The training."""
    return classification(NetworkB(), (28, 28, 1), batch_size)
